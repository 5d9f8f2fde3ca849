"""Masked autoencoding with a Vision Mamba: the encoder sees visible patches only, a short plain Vim rebuilds the rest.

He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners" (arXiv:2111.06377); with FastVim's mixer
("FastMaskVim") Kapse et al. 2025, "FastVim: Accelerating Vision Mamba with Spatial Pooling". The encoder is
`models_mamba.VisionMamba` without a head; what it learned goes on as a FastVim or Vim (`checkpoints.adapt`), or under
`linear_probe`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops.triton.layernorm import RMSNorm
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, is_model, register_model
from torch import Tensor, nn

from models_layers import made_at
from models_mamba import Block, VisionMamba, add_norm, init_linears
from models_registry import ALIASES, REGISTRY, pretrained_cfg

DEFAULT_RATIO = 0.75


class MaskedAutoencoder(VisionMamba):
    """A Vision Mamba without a head as encoder, and a decoder of `decoder_depth` Vim layers of `decoder_embed_dim`.

    `norm_pix_loss` takes the pixels of each patch less their mean and over their deviation as the target.
    `published_rows` pools as FastVim's release does, which forgets to reverse the rows of the backward direction (see
    `fusion.spatial_pooling.VisiblePooling`): to go on with its pre-training. Other keywords are those of `VisionMamba`,
    but for what a masked grid cannot have: a stride, rotary positions, token merging, pruning, the maximum of a row, a
    class token other than the middle one. Positions are fixed sines and cosines; images have the size `img_size`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 192,
        in_chans: int = 3,
        num_classes: int = 0,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 2,
        norm_pix_loss: bool = True,
        published_rows: bool = False,
        drop_path_rate: float = 0.0,
        **keywords: Any,
    ) -> None:
        if published_rows and not keywords.get("spatial_pool"):
            raise ValueError("published_rows is set; wanted it with spatial pooling only, whose rows they are.")
        _check_keywords(embed_dim, decoder_embed_dim, num_classes, patch_size, keywords)
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            in_chans=in_chans,
            num_classes=0,
            published_rows=published_rows,
            drop_path_rate=drop_path_rate,
            **keywords,
        )
        self.patch_embed.dynamic = False  # the pixels of a padded patch cannot be rebuilt
        self.in_chans, self.decoder_embed_dim, self.norm_pix_loss = in_chans, decoder_embed_dim, norm_pix_loss
        new_norm = partial(RMSNorm, decoder_embed_dim, eps=self.norm_epsilon)
        new_mixer = partial(
            Mamba,
            decoder_embed_dim,
            d_state=keywords.get("d_state", 16),
            bimamba_type="v2",
            if_divide_out=True,
            use_norm_after_ssm=True,
        )
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_blocks = nn.ModuleList(
            Block(new_mixer(layer_idx=i), new_norm(), 0.0, self.fused_add_norm, self.residual_in_fp32)
            for i in range(decoder_depth)
        )
        self.decoder_norm = new_norm()
        rows, cols = self.patch_embed.patch_size
        self.decoder_pred = nn.Linear(decoder_embed_dim, rows * cols * in_chans)
        grid, num_cls = self.patch_embed.grid_size, self.num_prefix_tokens
        self.pos_embed = nn.Parameter(sine_positions(grid, embed_dim, num_cls), requires_grad=False)
        self.decoder_pos_embed = nn.Parameter(sine_positions(grid, decoder_embed_dim, num_cls), requires_grad=False)
        self._init_masked()

    def _init_masked(self) -> None:
        """Over Vim's initialisation: Xavier-uniform patch projection and decoder ends, truncated normal (0.02) tokens,
        and the decoder's out_proj over the root of its own depth."""
        init_linears(self.decoder_blocks, len(self.decoder_blocks))
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        for linear in (self.decoder_embed, self.decoder_pred):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        trunc_normal_(self.mask_token, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone: the encoder's, the decoder's A and D, its tokens."""
        return super().no_weight_decay() | {"mask_token", "decoder_pos_embed"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's grouping of parameters into embedding, encoder layers, and the rest."""
        return dict(
            stem=r"^cls_token|^pos_embed|^patch_embed",
            blocks=[(r"^layers\.(\d+)", None), (r"^norm_f|^mask_token|^decoder", (99999,))],
        )

    # --- encoder ---

    def position_rows(self, grid: tuple[int, int], index: Any) -> tuple[Tensor, Tensor]:
        """The positions of the class token (1, K, D), whose row comes first wherever it stands, and of the patches."""
        return self.pos_embed.tensor_split([self.num_prefix_tokens], 1)

    def forward_encoder(
        self, images: Tensor, mask_ratio: float = DEFAULT_RATIO, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, C, H, W) -> latent (B, `num_prefix_tokens` + V, D), class token first and the V visible tokens
        behind in raster order; mask (B, L), 1 for hidden patches; and ids_restore (B, L), where each patch is found in
        the visible tokens followed by the hidden ones.

        The patches of the `visible_count(L, mask_ratio)` smallest values of `noise` (B, L), uniform by default, are
        visible.
        """
        num_patches = self.patch_embed.num_patches
        if noise is None:
            noise = torch.rand(images.shape[0], num_patches, device=images.device)
        keep, mask, ids_restore = mask_by_noise(noise, visible_count(num_patches, mask_ratio))
        state = self.encode(self.embed(images, keep=keep))
        return self.finish(state), mask, ids_restore

    # --- decoder ---

    def forward_decoder(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """latent and ids_restore of `forward_encoder` -> pixels of every patch (B, L, patch * patch * C), in the order
        of `patchify`; normalised by patch if the loss is."""
        num_cls = self.num_prefix_tokens
        tokens = self.decoder_embed(latent)
        classes, visible = tokens[:, :num_cls], tokens[:, num_cls:]
        hidden = self.mask_token.to(visible.dtype).expand(len(visible), ids_restore.shape[1] - visible.shape[1], -1)
        tokens = torch.cat([visible, hidden], 1)
        tokens = tokens.gather(1, ids_restore.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))
        # the class token's row of positions comes first, the token itself last
        tokens = tokens + self.decoder_pos_embed[:, num_cls:]
        if num_cls:
            tokens = torch.cat([tokens, classes + self.decoder_pos_embed[:, :num_cls]], 1)
        residual = None
        for block in self.decoder_blocks:
            tokens, residual = block(tokens, residual)
        tokens, _ = add_norm(self.decoder_norm, tokens, residual, self.fused_add_norm, self.residual_in_fp32)
        return self.decoder_pred(tokens[:, : ids_restore.shape[1]])

    # --- loss ---

    def patchify(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> pixels of every patch (B, L, patch * patch * C), ordered by (row, column, channel)."""
        rows, cols = self.patch_embed.patch_size
        x = images.unflatten(3, (-1, cols)).unflatten(2, (-1, rows))  # (B, C, grid rows, rows, grid cols, cols)
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Inverse of `patchify`: (B, L, patch * patch * C) -> (B, C, H, W)."""
        x = patches.unflatten(2, (*self.patch_embed.patch_size, self.in_chans)).unflatten(1, self.patch_embed.grid_size)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def patch_losses(self, images: Tensor, pred: Tensor) -> Tensor:
        """Mean square error of pred (B, L, patch * patch * C) in every patch, (B, L) float32."""
        target = self.patchify(images).float()
        return ((pred.float() - (normalise_patches(target) if self.norm_pix_loss else target)) ** 2).mean(-1)

    def forward_loss(self, images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Mean of `patch_losses` over the patches whose mask (B, L) is 1."""
        mask = mask.float()
        return (self.patch_losses(images, pred) * mask).sum() / mask.sum()

    def mean_prediction(self, images: Tensor) -> Tensor:
        """The prediction (B, L, patch * patch * C) that knows each patch's mean alone, which training must beat."""
        target = self.patchify(images).float()
        mean = torch.zeros_like(target[..., :1]) if self.norm_pix_loss else target.mean(-1, keepdim=True)
        return mean.expand_as(target)

    def rebuild(self, images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Images (B, C, H, W) with pred in the place of the patches whose mask is 1, a normalised one with the mean and
        deviation of the patch it stands for."""
        target, pred = self.patchify(images).float(), pred.float()
        if self.norm_pix_loss:
            mean, deviation = patch_moments(target)
            pred = pred * deviation + mean
        return self.unpatchify(torch.where(mask.bool().unsqueeze(-1), pred, target))

    def forward(
        self, images: Tensor, mask_ratio: float = DEFAULT_RATIO, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, C, H, W) -> loss, pred (B, L, patch * patch * C) and mask (B, L), 1 for hidden patches."""
        latent, mask, ids_restore = self.forward_encoder(images, mask_ratio, noise)
        pred = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(images, pred, mask), pred, mask


def _check_keywords(
    embed_dim: int, decoder_embed_dim: int, num_classes: int, patch_size: int, keywords: dict[str, Any]
) -> None:
    for name, width in (("embed_dim", embed_dim), ("decoder_embed_dim", decoder_embed_dim)):
        if width % 4:
            raise ValueError(f"{name} is {width}; wanted a multiple of 4, for the sines and cosines of two axes.")
    if num_classes:
        raise ValueError(f"num_classes is {num_classes}; wanted 0: a masked autoencoder has no head.")
    if keywords.get("stride") not in (None, patch_size):
        raise ValueError(f"stride is {keywords['stride']}; wanted the patch size {patch_size}: patches are rebuilt.")
    if keywords.get("collapse_method", "mean") != "mean":
        raise ValueError("Rows of visible tokens are summed: wanted masked autoencoding with collapse_method 'mean'.")
    for name, off in (("fusion_strategy", "no"), ("pruning", "none")):
        if keywords.get(name, off) != off:
            raise ValueError(
                f"{name} is {keywords[name]!r}; wanted {off!r}: a masked autoencoder chooses its tokens by chance."
            )
    wrong = [name for name in ("if_rope", "if_bidirectional", "use_double_cls_token") if keywords.get(name)]
    if wrong or keywords.get("flip_img_sequences_ratio", -1) > 0:
        raise ValueError(
            f"{(wrong or ['flip_img_sequences_ratio'])[0]} is set; wanted a masked autoencoder without it."
        )


def visible_count(num_patches: int, mask_ratio: float) -> int:
    """How many of `num_patches` patches stay visible: `int(L * (1 - ratio))`, in Python's floats."""
    count = int(num_patches * (1 - mask_ratio)) if 0 <= mask_ratio < 1 else 0
    if not count:
        raise ValueError(
            f"mask_ratio is {mask_ratio:g}; wanted one in [0, 1) that leaves some of {num_patches} patches visible."
        )
    return count


def mask_by_noise(noise: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` patches of the smallest noise (B, L) are visible: their indices (B, count) in raster order, the mask
    (B, L), float32 and 1 where hidden, and each patch's place (B, L) in the visible ones followed by the hidden."""
    mask = torch.ones(noise.shape, device=noise.device)
    mask.scatter_(1, noise.argsort(dim=1, stable=True)[:, :count], 0)
    shuffled = mask.argsort(dim=1, stable=True)
    return shuffled[:, :count], mask, shuffled.argsort(1)


def patch_moments(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (variance over n - 1, and 1e-6) of patches (B, L, n), (B, L, 1) each."""
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def normalise_patches(patches: Tensor) -> Tensor:
    """Patches (B, L, n) less their mean, over their deviation."""
    mean, deviation = patch_moments(patches)
    return (patches - mean) / deviation


def sine_positions(grid: tuple[int, int], dim: int, num_cls: int = 0) -> Tensor:
    """Fixed positions (1, `num_cls` + rows * cols, dim): [sin, cos] of the column, then of the row, at dim / 4
    frequencies 10000^(-4i / dim) each; class tokens, which come first, have zeros."""
    rows, cols = (torch.arange(size, dtype=torch.float64) for size in grid)
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    by_row, by_col = (torch.cat([at.sin(), at.cos()], 1) for at in (rows.outer(frequencies), cols.outer(frequencies)))
    table = torch.cat(
        [by_col.expand(grid[0], -1, -1), by_row.unsqueeze(1).expand(-1, grid[1], -1)],
        -1,
    ).flatten(0, 1)
    return torch.cat([table.new_zeros(num_cls, dim), table]).float().unsqueeze(0)


def linear_probe(model: nn.Module) -> nn.Module:
    """Freeze all of a classifier but a new head in the place of its old one, and return it: batch normalisation without
    weights, then a linear layer (truncated normal, 0.01)."""
    old = model.get_classifier()
    if not isinstance(old, nn.Linear):
        raise ValueError(f"The head is a {type(old).__name__}; wanted a model with a linear head to probe.")
    for parameter in model.parameters():
        parameter.requires_grad = False
    name = next(name for name, module in model.named_modules() if module is old)
    head = nn.Linear(old.in_features, old.out_features)
    trunc_normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    probe = nn.Sequential(nn.BatchNorm1d(old.in_features, affine=False, eps=1e-6), head)
    model.set_submodule(name, probe.to(old.weight.device))
    return model


# --- registry ---

_PUBLISHED = {"base": "patch16_224", "large": "patch16_224", "huge": "patch14_224"}
_SIZES = {"tiny": "patch16_224", "small": "patch16_224"} | _PUBLISHED
_WITH_NORM = REGISTRY["vim_base_patch16_224_final_pool_mean_abs_pos_embed_with_midclstok_div2"]

_REGISTRY: dict[str, dict[str, Any]] = {}
for _size, _patch in _SIZES.items():
    _fastvim = REGISTRY[f"fastvim_{_size}_{_patch}"]
    _REGISTRY[f"mae_fastvim_{_size}_{_patch}"] = _fastvim
    _REGISTRY[f"mae_vim_{_size}_patch16_224"] = _WITH_NORM | {key: _fastvim[key] for key in ("embed_dim", "depth")}
for _family in ("fastvim", "vim"):
    _REGISTRY[f"mae_{_family}_nano_patch4_32"] = REGISTRY[f"{_family}_nano_patch4_32"] | dict(
        num_classes=0, decoder_embed_dim=64, use_norm_after_ssm=True
    )

_ALIASES = {f"mae_FastVim_{size}_dec512d2b": f"mae_fastvim_{size}_{patch}" for size, patch in _PUBLISHED.items()} | {
    f"mae_vim_{size}_dec512d2b": f"mae_vim_{size}_patch16_224" for size in _PUBLISHED
}


def masked_name(name: str) -> str | None:
    """The masked autoencoder whose encoder is the Vim or FastVim `name`, or that is so called itself; None if there is
    none."""
    short = ALIASES.get(name, name).replace("_final_pool_mean_abs_pos_embed_with_midclstok_div2", "")
    masked = short if short.startswith("mae_") else f"mae_{short}"
    return masked if is_model(masked) else None


default_cfgs = generate_default_cfgs(
    {
        name: pretrained_cfg(_REGISTRY[_ALIASES.get(name, name)] | dict(num_classes=0), classifier=None, fixed=True)
        for name in (*_REGISTRY, *_ALIASES)
    }
)


def _entry(name: str) -> Callable[..., MaskedAutoencoder]:
    settings = _REGISTRY[_ALIASES.get(name, name)]

    def build(pretrained: bool = False, **kwargs: Any) -> MaskedAutoencoder:
        place = {key: kwargs.pop(key, None) for key in ("device", "dtype")}
        how = settings | kwargs
        return made_at(partial(build_model_with_cfg, MaskedAutoencoder, name, pretrained, **how), **place)

    build.__name__ = build.__qualname__ = name
    build.keywords = settings
    build.__doc__ = f"`MaskedAutoencoder` with {settings}; keywords override."
    return register_model(build)


globals().update({name: _entry(name) for name in (*_REGISTRY, *_ALIASES)})
