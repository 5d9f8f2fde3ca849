"""A backbone that gives token maps: this project's Vision Mambas, pruned and merged ones too, and any timm model with
intermediate maps.

Segmentation and detection as published with Vim (arXiv:2401.09417), FastVim (arXiv:2502.00594) and DyVM
(arXiv:2504.04787): images of any size, no class token, no last norm.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

import models_mamba
from checkpoints import grid_of_rows
from embeddings import resize_pos_embed
from fusion.dynamic_pruning import keep_rest, whole
from fusion.pruning_settings import PruningSettings
from fusion.token_state import ClassTokens, TokenState, split_cls

_logger = logging.getLogger(__name__)

FEATURES = ("hidden", "stream")
# what a classifier, or a masked autoencoder, has and a body has not
_HEAD = ("head.", "norm_f.", "neck.", "norm_neck.", "decoder", "mask_token")
_TOKENS = ("cls_token", "cls_token_head", "cls_token_tail")


def create_body(name: str, img_size: int | tuple[int, int], **keywords: Any) -> nn.Module:
    """timm's model `name` without head, class token and last norm, for images of any size.

    `img_size` (pixels; one number or (height, width)) sets the size of its position embedding; images of another size
    are padded at the right and bottom to whole patches, and see it resized bicubically. FastVim names get LayerNorm
    between the layers, as FastVim's dense weights have it, unless `keywords` say otherwise. Other timm models must have
    `forward_intermediates`; they come as timm builds them.
    """
    own = models_mamba.registry_keywords(name)
    if not own:
        return _create_timm_body(name, img_size, **keywords)
    if keywords.get("spatial_pool", own.get("spatial_pool")):
        keywords = dict(rms_norm=False, fused_add_norm=False) | keywords
    tokens = _class_tokens(name, keywords)
    if tokens.positions == "own":
        # MambaReg's registers are a memory of the layers', not only what is read
        keywords = keywords | dict(cls_reduce=1)
    else:
        keywords = keywords | dict(if_cls_token=False, use_double_cls_token=False)
    body = timm.create_model(name, img_size=to_2tuple(img_size), num_classes=0, **keywords)
    body.norm_f = nn.Identity()
    body.classifier_tokens = tokens
    body.patch_embed.dynamic = True
    return body


def _class_tokens(name: str, keywords: dict[str, Any]) -> ClassTokens:
    """The class tokens that the classifier `name` has and a body has not."""
    known = {field.name for field in fields(models_mamba.VimSettings)}
    given = models_mamba.registry_keywords(name) | keywords
    return models_mamba.VimSettings(**{key: value for key, value in given.items() if key in known}).class_tokens


def _create_timm_body(name: str, img_size: int | tuple[int, int], **keywords: Any) -> nn.Module:
    size = to_2tuple(img_size)
    for options in (
        dict(img_size=size, dynamic_img_size=True, dynamic_img_pad=True),  # transformers with a position embedding
        dict(img_size=size, strict_img_size=False),  # windowed ones
        {},  # convolutional ones
    ):
        try:
            body = timm.create_model(name, num_classes=0, **options, **keywords)
        except TypeError:
            continue
        if not hasattr(body, "forward_intermediates"):
            raise ValueError(f"{name} has no intermediate maps; wanted a model with forward_intermediates.")
        return body
    raise ValueError(f"{name} cannot be built with {', '.join(keywords)}.")


def from_classifier(
    weights: dict[str, Tensor], body: nn.Module, size: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """A state dict for `body` (`create_body`) from the one of a classifier of the same name.

    Head, last norm, class token and the token's own row of the position embedding are left out (of M patches, M // 2
    for a middle token), and positions are resized bicubically to the body's grid, from that of images of `size`
    (height, width) where it is known. A body with LayerNorm takes zero
    biases where the weights have RMSNorm. What the body's method adds (DyVM's predictors and gates) and the weights
    lack, the body keeps. Raises ValueError for positions of no known grid.
    """
    if not isinstance(body, models_mamba.VisionMamba):
        adapt = getattr(sys.modules[type(body).__module__], "checkpoint_filter_fn", None)
        weights = weights if adapt is None else adapt(dict(weights), body)
        wanted = body.state_dict()
        return {name: value for name, value in weights.items() if name in wanted}
    own = body.state_dict()
    dropped = [name for name in _TOKENS if name in weights and name not in own]
    state = {name: value for name, value in weights.items() if not name.startswith(_HEAD) and name not in dropped}
    if "pos_embed" in state:
        tokens = body.classifier_tokens
        if any(name.startswith("decoder") for name in weights):
            # a masked autoencoder has its class token's row in front
            tokens = ClassTokens(sum(weights[name].shape[1] for name in dropped), "front")
        state["pos_embed"] = _without_token_rows(state["pos_embed"], tokens if dropped else ClassTokens(), body, size)
    missing = [name for name in own if name not in state]
    kept = [name for name in missing if name.endswith(("norm.bias", "layernorm.bias"))]
    kept += [name for name in missing if name.startswith("score_predictors.") or ".block_head." in name]
    if kept:
        _logger.info("The classifier has no %s and so on: %d tensors start anew.", kept[0], len(kept))
    return state | {name: own[name] for name in kept}


def _without_token_rows(
    pos_embed: Tensor, tokens: ClassTokens, body: models_mamba.VisionMamba, size: tuple[int, int] | None
) -> Tensor:
    """(1, M + K, D) of a classifier with K class `tokens` -> (1, M', D) for the body's grid."""
    num_patches = pos_embed.shape[1] - tokens.count
    pos_embed = split_cls(pos_embed, tokens.among(num_patches))[1]
    grid, own = grid_of_rows(num_patches, body, size), body.pos_embed_grid
    if grid is None:
        raise ValueError(
            f"pos_embed has {num_patches} patch rows; wanted a square number, to know the grid it was made for."
        )
    return pos_embed if grid == own else resize_pos_embed(pos_embed, grid, own, lambda _: ())


class DenseBackbone(nn.Module):
    """`body` as maps: images (B, C, H, W) -> a list of (B, D, rows, cols), one for each of `out_indices` (rising sites;
    of timm's models, indices of their intermediate maps).

    `feature` says what of a Vision Mamba's site is a map: `hidden`, its mixer's output alone, or `stream`, output and
    residual added. `outnorm` adds a LayerNorm (eps 1e-5) over the channels of each map, as FastVim has. A merged patch
    has its group's token; a pruned one keeps the value it was dropped with.
    `channels` and `reductions` (pixels a cell) have an entry for each map.
    """

    def __init__(
        self, body: nn.Module, out_indices: Sequence[int], feature: str = "hidden", outnorm: bool = False
    ) -> None:
        super().__init__()
        if feature not in FEATURES:
            raise ValueError(f"feature is {feature!r}; wanted one of {', '.join(FEATURES)}.")
        sites = num_sites(body)
        if not out_indices or list(out_indices) != sorted({i for i in out_indices if 0 <= i < sites}):
            raise ValueError(f"out_indices is {list(out_indices)}; wanted rising indices from 0 to {sites - 1}.")
        self.body, self.out_indices, self.feature = body, tuple(out_indices), feature
        self.is_mamba = isinstance(body, models_mamba.VisionMamba)
        # layers behind the last map learn nothing, nor may what pruning skips
        self.find_unused_parameters = getattr(body, "find_unused_parameters", False) or self.out_indices[-1] < sites - 1
        if not self.is_mamba:
            body.prune_intermediate_layers(list(self.out_indices), prune_norm=True, prune_head=True)
        info = [body.feature_info[index] for index in self.out_indices]
        self.channels = [entry["num_chs"] for entry in info]
        self.reductions = [entry["reduction"] for entry in info]
        self.outnorm = nn.ModuleList(nn.LayerNorm(width, eps=1e-5) for width in self.channels) if outnorm else None

    def forward(self, x: Tensor) -> list[Tensor]:
        """The maps of images x (B, C, H, W)."""
        return self.forward_with_state(x)[0]

    def forward_with_state(self, x: Tensor) -> tuple[list[Tensor], TokenState | None]:
        """The maps, and the token sequence after the last of them, in which stands what pruning decided; None where the
        body is no Vision Mamba."""
        state = None
        if self.is_mamba:
            maps, state = self._mamba_maps(x)
        else:
            maps = self.body.forward_intermediates(x, indices=list(self.out_indices), intermediates_only=True)
        if self.outnorm is not None:
            maps = [norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for norm, x in zip(self.outnorm, maps)]
        return maps, state

    def _mamba_maps(self, x: Tensor) -> tuple[list[Tensor], TokenState]:
        body, maps = self.body, []
        state = body.embed(x)
        grid, methods = state.grid, body.methods
        if methods.get("merging") is not None:
            patches = torch.arange(state.num_patches, device=x.device)
            state = state.replace(groups=patches.expand(len(x), -1))
        if self.pruning is not None and self.pruning.tokens:
            state = keep_rest(state, wide=body.residual_in_fp32)

        def visit(index: int, state: TokenState) -> None:
            if index not in self.out_indices:
                return
            hidden, residual = whole(state)
            tokens = hidden if self.feature == "hidden" else hidden + residual
            maps.append(tokens.transpose(1, 2).unflatten(2, grid).contiguous())

        # meters count what every site decides; what is trained does not depend on them
        is_partial = self.out_indices[-1] + 1 < body.num_sites
        is_metered = any(method.meters for method in body.site_methods) and not (is_partial and body.training)
        state = body.encode(state, visit, None if is_metered else self.out_indices[-1] + 1)
        if is_metered:
            for method in body.site_methods:
                method.finish(state)
        return maps, state

    def padded_size(self, size: Sequence[int]) -> tuple[int, int]:
        """The size (height, width) in pixels of an image of `size` once it is padded to whole cells of the coarsest map
        that the body itself makes."""
        if self.is_mamba:
            return tuple(side + -side % patch for side, patch in zip(size, self.body.patch_embed.patch_size))
        cell = self.reductions[0] if len(set(self.reductions)) == 1 else 1
        return tuple(side + -side % cell for side in size)

    def group_matcher(self, prefix: str = "", coarse: bool = False) -> dict[str, Any]:
        """timm's grouping of parameters for layer decay, for a model that holds this backbone under `prefix`: the
        body's embedding first, its layers, then everything else together."""
        inner = self.body.group_matcher(coarse=coarse)
        body = re.escape(f"{prefix}body.")

        def under(pattern: str) -> str:
            return "|".join(f"^{body}{part.removeprefix('^')}" for part in pattern.split("|"))

        blocks = inner["blocks"]
        blocks = [(blocks, None)] if isinstance(blocks, str) else list(blocks)
        # one below the number by which timm joins a group to the one before
        return dict(stem=under(inner["stem"]), blocks=[*((under(p), at) for p, at in blocks), (r".*", (99998,))])

    @property
    def pruning(self) -> PruningSettings | None:
        """The settings of a body that prunes, else None."""
        return self.body.methods.get("pruning") if self.is_mamba else None


def num_sites(body: nn.Module) -> int:
    """How many maps `body` can give: its sites, or for timm's models its intermediate maps."""
    return body.num_sites if isinstance(body, models_mamba.VisionMamba) else len(body.feature_info)


def spread_indices(body: nn.Module, count: int = 4) -> tuple[int, ...]:
    """`count` sites of `body`, evenly spread, the last among them: 5, 11, 17, 23 of 24."""
    sites = num_sites(body)
    return tuple(sites * (i + 1) // count - 1 for i in range(count))


def layer_scales(model: nn.Module, prefix: str, body: nn.Module, decay: float) -> dict[str, float] | None:
    """The share of the learning rate of every parameter of `model`, those of `body` under `prefix`: decay^(depth - i)
    for layer i, decay^(depth + 1) for embedding and positions, 1 for all else; None where it is no Vision Mamba."""
    if not isinstance(body, models_mamba.VisionMamba):
        return None
    scales = {}
    for name, _ in model.named_parameters():
        part = name.removeprefix(prefix)
        first, _, rest = part.partition(".")
        if part == name or first not in ("layers", "patch_embed", "pos_embed", "pos_embed_cls", "cls_token"):
            scales[name] = 1.0
        elif first == "layers":
            scales[name] = decay ** (body.depth - int(rest.partition(".")[0]))
        else:
            scales[name] = decay ** (body.depth + 1)
    return scales
