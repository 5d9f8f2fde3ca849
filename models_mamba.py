"""Vision Mamba (Vim) models for timm's registry: one layer class, one model class, and the names that spell its
variants.

Zhu et al. 2024, "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model"
(arXiv:2401.09417). The efficiency methods (fusion/) act between and inside the sites of the one model; see
`VisionMamba.site_methods`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops.triton.layernorm import RMSNorm, layer_norm_fn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, lecun_normal_, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from embeddings import PatchEmbed, RotaryEmbedding2d, resize_pos_embed
from fusion import build_site_methods
from fusion.config import METHOD_KEYWORDS, MethodConfig
from fusion.dynamic_pruning import PruningOutput, pruning_output
from fusion.token_state import TokenState, join_cls, mean_over_kept, patch_policy, split_cls


class Block(nn.Module):
    """One encoder layer: add the last output to the residual, normalise, mix."""

    def __init__(
        self,
        mixer: Mamba,
        norm: nn.Module,
        drop_path: float,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.mixer, self.norm = mixer, norm
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.fused_add_norm, self.residual_in_fp32 = fused_add_norm, residual_in_fp32

    def forward(self, hidden: Tensor, residual: Tensor | None, **mixer_args: Any) -> tuple[Tensor, Tensor]:
        """hidden, residual (B, L, D) -> the mixer's output and the new residual; `mixer_args` go to the mixer."""
        if residual is not None:
            hidden = self.drop_path(hidden)
        hidden, residual = add_norm(self.norm, hidden, residual, self.fused_add_norm, self.residual_in_fp32)
        return self.mixer(hidden, **mixer_args), residual


def add_norm(
    norm: nn.Module, hidden: Tensor, residual: Tensor | None, fused: bool, residual_in_fp32: bool
) -> tuple[Tensor, Tensor]:
    """residual + hidden, and its norm: in one operator if `fused`, else step by step in the dtypes that torch gives."""
    if fused:
        is_rms = isinstance(norm, RMSNorm)
        return layer_norm_fn(
            hidden, norm.weight, norm.bias, residual, norm.eps, True, residual_in_fp32, is_rms_norm=is_rms
        )
    residual = hidden if residual is None else residual + hidden
    if residual_in_fp32:
        residual = residual.float()
    return norm(residual.to(norm.weight.dtype)), residual


def init_linears(module: nn.Module, depth: int) -> None:
    """Vim's initialisation of the linear layers in `module`: zero biases but for dt_proj's, and out_proj
    Kaiming-uniform over sqrt(depth), one residual branch a layer."""
    for name, linear in module.named_modules():
        if not isinstance(linear, nn.Linear):
            continue
        if name.endswith("out_proj"):
            nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
            with torch.no_grad():
                linear.weight /= math.sqrt(depth)
        if linear.bias is not None and not getattr(linear.bias, "_no_reinit", False):
            nn.init.zeros_(linear.bias)


class VisionMamba(nn.Module):
    """Vision Mamba: patch embedding, class token, `depth` Mamba layers, norm, linear head.

    Keywords are those of the published constructor; `stride` defaults to `patch_size`. Class token:
    `use_middle_cls_token` puts it at index M // 2 of M patches, `use_double_cls_token` one at each end (read as their
    mean), else it comes first; `if_cls_token=False` averages all tokens (`final_pool_type="mean"`). `if_bidirectional`
    takes layers in pairs, the second on the reversed sequence; `pair_residual` says whether the two residuals, equal
    but for drop-path, are summed (published: it doubles the residual at every site) or averaged.
    `flip_img_sequences_ratio` is the chance that training reverses the sequence. `use_norm_after_ssm` puts a LayerNorm
    behind the scans or leaves it out; None does as the method wants: FastVim has it, Vim has not. The keywords of the
    methods are those of `fusion.config.MethodConfig.from_keywords`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        depth: int = 24,
        embed_dim: int = 192,
        d_state: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        ssm_cfg: dict[str, Any] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        ft_seq_len: int | None = None,
        pt_hw_seq_len: int = 14,
        if_bidirectional: bool = False,
        pair_residual: str = "sum",
        final_pool_type: str = "none",
        if_abs_pos_embed: bool = False,
        if_rope: bool = False,
        if_rope_residual: bool = False,
        flip_img_sequences_ratio: float = -1.0,
        if_bimamba: bool = False,
        bimamba_type: str = "none",
        if_cls_token: bool = False,
        if_divide_out: bool = False,
        init_layer_scale: float | None = None,
        use_double_cls_token: bool = False,
        use_middle_cls_token: bool = False,
        if_devide_out: bool | None = None,
        **method_keywords: Any,
    ) -> None:
        super().__init__()
        unknown = sorted(set(method_keywords) - set(METHOD_KEYWORDS))
        if unknown:
            raise TypeError(f"VisionMamba does not know {', '.join(unknown)}; wanted its own or a method's keywords.")
        if final_pool_type not in ("none", "mean"):
            raise ValueError(f"final_pool_type is {final_pool_type!r}; wanted 'none' or 'mean'.")
        if if_bidirectional and depth % 2:
            raise ValueError(f"depth is {depth}; wanted an even number, since if_bidirectional takes layers in pairs.")
        if pair_residual not in ("sum", "mean"):
            raise ValueError(f"pair_residual is {pair_residual!r}; wanted 'sum' or 'mean'.")
        self.methods = MethodConfig.from_keywords(**method_keywords)
        pooling = self.methods.pooling
        has_norm = method_keywords.get("use_norm_after_ssm")
        if has_norm is None:
            has_norm = pooling is not None and pooling.use_norm_after_ssm
        stride = patch_size if stride is None else stride
        plain_grid = to_2tuple(stride) == to_2tuple(patch_size) and not if_cls_token and flip_img_sequences_ratio <= 0
        if pooling is not None and not plain_grid:
            raise ValueError(
                "Spatial pooling needs a plain grid: wanted stride equal to patch_size, no class token, no flipped "
                "sequences."
            )
        if if_rope and self.methods.merging is not None:
            raise ValueError(
                "A merged token has no one position to turn by: wanted the rotary embedding without token merging."
            )

        self.num_classes, self.drop_rate = num_classes, drop_rate
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.depth, self.norm_epsilon = depth, norm_epsilon
        self.fused_add_norm, self.residual_in_fp32 = fused_add_norm, residual_in_fp32
        self.if_bidirectional, self.pair_residual = if_bidirectional, pair_residual
        self.final_pool_type, self.flip_img_sequences_ratio = final_pool_type, flip_img_sequences_ratio
        self.use_middle_cls_token, self.use_double_cls_token = use_middle_cls_token, use_double_cls_token
        self.num_prefix_tokens = (2 if use_double_cls_token else 1) if if_cls_token else 0
        self.grad_checkpointing = False

        any_size = pooling is not None and not if_rope
        self.patch_embed = PatchEmbed(img_size, patch_size, stride, in_chans, embed_dim, dynamic=any_size)
        token_names = ("cls_token_head", "cls_token_tail") if use_double_cls_token else ("cls_token",)
        self.cls_token_names = token_names if if_cls_token else ()
        for name in self.cls_token_names:
            self.register_parameter(name, nn.Parameter(torch.zeros(1, 1, embed_dim)))
        self.pos_embed = None
        if if_abs_pos_embed:
            num_tokens = self.patch_embed.num_patches + self.num_prefix_tokens
            self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        self.rope, self.if_rope_residual = None, if_rope_residual
        if if_rope:
            grid = self.patch_embed.grid_size if ft_seq_len is None else to_2tuple(ft_seq_len)
            if grid != self.patch_embed.grid_size:
                raise ValueError(
                    f"ft_seq_len is {ft_seq_len}; wanted the side of the token grid {self.patch_embed.grid_size}."
                )
            self.rope = RotaryEmbedding2d(embed_dim, grid, pt_hw_seq_len)

        norm_layer = partial(RMSNorm if rms_norm else nn.LayerNorm, embed_dim, eps=norm_epsilon)
        new_mixer = partial(
            Mamba,
            embed_dim,
            d_state=d_state,
            bimamba_type="v1" if if_bimamba else bimamba_type,
            if_divide_out=if_divide_out if if_devide_out is None else if_devide_out,
            init_layer_scale=init_layer_scale,
            use_norm_after_ssm=has_norm,
            **(ssm_cfg or {}),
        )
        # layer 0 never drops, since it starts the residual; layer 1 takes the first rate, the final add the last
        rates = [0.0, *(drop_path_rate * i / max(depth - 1, 1) for i in range(depth))]
        self.layers = nn.ModuleList(
            Block(new_mixer(layer_idx=i), norm_layer(), rates[i], fused_add_norm, residual_in_fp32)
            for i in range(depth)
        )
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        self.norm_f = norm_layer()
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.num_sites = depth // 2 if if_bidirectional else depth
        self.feature_info = [
            dict(num_chs=embed_dim, reduction=to_2tuple(stride)[0], module=f"layers.{i}") for i in range(depth)
        ]
        # which parameters a step reaches depends on what it prunes
        self.find_unused_parameters = self.methods.pruning is not None
        self.init_weights()
        self.site_methods = build_site_methods(self.methods)
        for method in self.site_methods:
            method.attach(self)

    # --- weights ---

    def init_weights(self) -> None:
        """Initialise as Vim does: LeCun-normal patch convolution, truncated normal (0.02) head, tokens and positions;
        linear biases zero but for dt_proj's; out_proj Kaiming-uniform over sqrt(depth), one residual branch a layer."""
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)
        tokens = [getattr(self, name) for name in self.cls_token_names]
        for parameter in [*tokens, *([] if self.pos_embed is None else [self.pos_embed])]:
            trunc_normal_(parameter, std=0.02)
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
        init_linears(self, self.depth)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone: A, D of every direction, positions, class tokens."""
        marked = {name for name, parameter in self.named_parameters() if getattr(parameter, "_no_weight_decay", False)}
        return marked | {"pos_embed", *self.cls_token_names}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's grouping of parameters into embedding, layers and head."""
        return dict(
            stem=r"^cls_token|pos_embed|patch_embed", blocks=[(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))]
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each site in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The classification head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head; `global_pool` must stay what the model reads from (class token or mean)."""
        if global_pool not in (None, "", "mean" if self.num_prefix_tokens == 0 else "token"):
            raise ValueError(
                f"global_pool is {global_pool!r}; this model reads its class token, or the mean where it has none."
            )
        self.num_classes = num_classes
        head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        if num_classes > 0:
            trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        self.head = head.to(self.norm_f.weight.device)

    def class_token_positions(self, num_patches: int) -> tuple[int, ...]:
        """Where the class tokens stand among `num_patches` patch tokens."""
        if not self.cls_token_names:
            return ()
        if self.use_double_cls_token:
            return 0, num_patches + 1
        return (num_patches // 2 if self.use_middle_cls_token else 0,)

    # --- forward ---

    def embed(self, x: Tensor, random_cls_position: bool = False, random_token_rank: bool = False) -> TokenState:
        """Images (B, C, H, W) -> the token sequence before the first site."""
        patches, grid = self.patch_embed(x)
        num_patches = patches.shape[1]
        cls_index = self.class_token_positions(num_patches)
        if random_cls_position and len(cls_index) == 1:
            cls_index = (int(torch.randint(num_patches + 1, ())),)
        if cls_index:
            classes = torch.cat([getattr(self, name) for name in self.cls_token_names], 1)
            patches = join_cls(classes.expand(patches.shape[0], -1, -1), patches, cls_index)
        if self.pos_embed is not None:
            patches = patches + self.pos_embed_for(grid)
        state = TokenState(self.pos_drop(patches), cls_index=cls_index, grid=grid)
        if random_token_rank:
            state = _reorder(state, torch.randperm(state.num_tokens))
        if (
            self.training
            and self.flip_img_sequences_ratio > 0
            and float(torch.rand(())) < self.flip_img_sequences_ratio
        ):
            state = _reorder(state, torch.arange(state.num_tokens - 1, -1, -1))
        return state

    @property
    def pos_embed_grid(self) -> tuple[int, int]:
        """(rows, cols) of the position embedding: the token grid, or for colwise pooling the transposed one, since
        FastVim's release transposes the grid before adding positions."""
        rows, cols = self.patch_embed.grid_size
        return (cols, rows) if self._colwise else (rows, cols)

    @property
    def _colwise(self) -> bool:
        return self.methods.pooling is not None and self.methods.pooling.scanpath_type == "colwise"

    def pos_embed_for(self, grid: tuple[int, int]) -> Tensor:
        """The position embedding (1, L, D) of a token grid in raster order, resized bicubically where the grid is not
        the one it was made for."""
        pos_embed = self.pos_embed
        new_grid = grid[::-1] if self._colwise else grid
        if new_grid != self.pos_embed_grid:
            pos_embed = resize_pos_embed(pos_embed, self.pos_embed_grid, new_grid, self.class_token_positions)
        return pos_embed.unflatten(1, new_grid).transpose(1, 2).flatten(1, 2) if self._colwise else pos_embed

    def run_site(self, index: int, state: TokenState, **mixer_args: Any) -> TokenState:
        """Run site `index`: one layer, or in paired models one forward and one on the reversed sequence."""
        hidden, residual = state.hidden, state.residual
        if self.rope is not None:
            hidden = self.rope(hidden, state)
            if self.if_rope_residual and residual is not None:
                residual = self.rope(residual, state)
        if not self.if_bidirectional:
            hidden, residual = self.layers[index](hidden, residual, **mixer_args)
            return state.replace(hidden=hidden, residual=residual)
        hidden_f, residual_f = self.layers[2 * index](hidden, residual, **mixer_args)
        flipped = None if residual is None else residual.flip(1)
        if "token_mask" in mixer_args:
            mixer_args = mixer_args | {"token_mask": mixer_args["token_mask"].flip(1)}
        hidden_b, residual_b = self.layers[2 * index + 1](hidden.flip(1), flipped, **mixer_args)
        residual = residual_f + residual_b.flip(1)
        return state.replace(
            hidden=hidden_f + hidden_b.flip(1), residual=residual / 2 if self.pair_residual == "mean" else residual
        )

    def _with_methods(self, index: int, state: TokenState, level: int = 0, **mixer_args: Any) -> TokenState:
        if level == len(self.site_methods):
            return self.run_site(index, state, **mixer_args)

        def run(state: TokenState, **more: Any) -> TokenState:
            return self._with_methods(index, state, level + 1, **mixer_args, **more)

        return self.site_methods[level](index, state, run)

    def encode(
        self, state: TokenState, visit: Callable[[int, TokenState], None] | None = None, num_sites: int | None = None
    ) -> TokenState:
        """The first `num_sites` sites (all by default), methods included; `visit(index, state)` sees the sequence after
        each."""
        for index in range(self.num_sites if num_sites is None else num_sites):
            if self.grad_checkpointing and self.training:
                state = checkpoint(self._with_methods, index, state, use_reentrant=False)
            else:
                state = self._with_methods(index, state)
            if visit is not None:
                visit(index, state)
        return state

    def finish(self, state: TokenState) -> Tensor:
        """The last add and norm: normalised tokens (B, L, D), class tokens first, patch tokens behind in their
        order."""
        hidden = self.drop_path(state.hidden)
        hidden, _ = add_norm(self.norm_f, hidden, state.residual, self.fused_add_norm, self.residual_in_fp32)
        if isinstance(state.cls_index, Tensor) or state.cls_index not in ((), (0,)):
            hidden = torch.cat(split_cls(hidden, state.cls_index), 1)
        return hidden

    def forward_features(
        self, x: Tensor, if_random_cls_token_position: bool = False, if_random_token_rank: bool = False
    ) -> Tensor:
        """Images (B, C, H, W) -> normalised tokens (B, `num_prefix_tokens` + M, D), class tokens first."""
        return self.finish(self.encode(self.embed(x, if_random_cls_token_position, if_random_token_rank)))

    def forward_head(self, x: Tensor, pre_logits: bool = False, token_policy: Tensor | None = None) -> Tensor:
        """Tokens of `forward_features` -> logits (B, num_classes), or with `pre_logits` the features (B, D) they are
        read from; a mean over patch tokens leaves out those whose `token_policy` (B, M) is 0."""
        if self.num_prefix_tokens:
            x = x[:, : self.num_prefix_tokens].mean(1)
        else:
            x = mean_over_kept(x, token_policy) if self.final_pool_type == "mean" else x[:, -1]
        return x if pre_logits else self.head(x)

    def forward(
        self,
        x: Tensor,
        return_features: bool = False,
        if_random_cls_token_position: bool = False,
        if_random_token_rank: bool = False,
    ) -> Tensor | PruningOutput:
        """Images (B, C, H, W) -> logits (B, num_classes), or with `return_features` the features (B, D) under the
        head; a pruned model in training mode returns its decisions too."""
        state, tokens, features = self._features(x, if_random_cls_token_position, if_random_token_rank)
        if return_features:
            return features
        logits = self.head(features)
        return pruning_output(state, tokens, logits) if self.training and self.methods.pruning else logits

    def forward_with_decisions(
        self, x: Tensor, if_random_cls_token_position: bool = False, if_random_token_rank: bool = False
    ) -> PruningOutput:
        """Images (B, C, H, W) -> logits, final tokens, and what pruning decided on the way, in either mode."""
        if self.methods.pruning is None:
            raise ValueError("This model prunes nothing; wanted one built with pruning 'token', 'block' or 'both'.")
        state, tokens, features = self._features(x, if_random_cls_token_position, if_random_token_rank)
        return pruning_output(state, tokens, self.head(features))

    def _features(
        self, x: Tensor, random_cls_position: bool, random_token_rank: bool
    ) -> tuple[TokenState, Tensor, Tensor]:
        state = self.encode(self.embed(x, random_cls_position, random_token_rank))
        tokens = self.finish(state)
        policy = None if state.token_mask is None else patch_policy(state)
        return state, tokens, self.forward_head(tokens, pre_logits=True, token_policy=policy)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        return_prefix_tokens: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Token maps after chosen sites, as timm's models give them: (B, D, rows, cols), or (B, M, D) for output_fmt
        "NLC".

        With `return_prefix_tokens` each map comes with its class tokens (B, K, D). Needs models that keep their full
        token grid.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}; wanted 'NCHW' or 'NLC'.")
        take, last = feature_take_indices(self.num_sites, indices)
        maps: list[Any] = []

        def visit(index: int, state: TokenState) -> None:
            if index not in take:
                return
            if state.grid is None:
                raise ValueError("Token maps need the full grid: wanted a model without token merging or pruning.")
            tokens = state.hidden + state.residual
            classes, patches = split_cls(self.norm_f(tokens) if norm else tokens, state.cls_index)
            if output_fmt == "NCHW":
                patches = patches.transpose(1, 2).unflatten(2, state.grid).contiguous()
            maps.append((patches, classes) if return_prefix_tokens else patches)

        state = self.encode(self.embed(x), visit, last + 1 if stop_early and intermediates_only else None)
        return maps if intermediates_only else (self.finish(state), maps)


def _reorder(state: TokenState, order: Tensor) -> TokenState:
    """The same tokens in another order (L,), for the whole batch; the patches' positions are written down."""
    old_cls = torch.tensor(state.cls_index, dtype=torch.long)
    new_cls = tuple(int(index) for index in torch.isin(order, old_cls).nonzero())
    order = order.to(state.hidden.device)
    batch, length = state.hidden.shape[:2]
    positions = state.positions
    if positions is None:
        positions = torch.arange(length - len(new_cls), device=order.device).expand(batch, -1)
    slots = join_cls(positions.new_full((batch, len(new_cls), 1), -1), positions.unsqueeze(-1), state.cls_index)[
        :, order
    ]
    return state.replace(
        hidden=state.hidden[:, order], cls_index=new_cls, grid=None, positions=split_cls(slots, new_cls)[1].squeeze(-1)
    )


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: VisionMamba) -> dict[str, Tensor]:
    """timm's hook on loaded weights: fit the position embedding of a square grid to the model's own grid."""
    pos_embed = state_dict.get("pos_embed")
    if pos_embed is None or model.pos_embed is None or pos_embed.shape[1] == model.pos_embed.shape[1]:
        return state_dict
    num_patches = pos_embed.shape[1] - model.num_prefix_tokens
    side = math.isqrt(max(num_patches, 0))
    if side * side != num_patches:
        raise ValueError(
            f"pos_embed has {num_patches} patch rows; wanted a square number, to know the grid it was made for."
        )
    resized = resize_pos_embed(pos_embed, (side, side), model.pos_embed_grid, model.class_token_positions)
    return state_dict | {"pos_embed": resized}


# --- registry ---

_VIM = dict(
    rms_norm=True,
    residual_in_fp32=True,
    fused_add_norm=True,
    final_pool_type="mean",
    if_abs_pos_embed=True,
    bimamba_type="v2",
    if_cls_token=True,
    if_divide_out=True,
    use_middle_cls_token=True,
)
_FAMBAV = _VIM | dict(if_bidirectional=True, use_middle_cls_token=False)
_FASTVIM = _VIM | dict(if_cls_token=False, use_middle_cls_token=False, spatial_pool=True)
_VIM_NORM = _VIM | dict(use_norm_after_ssm=True)  # FastVim's authors' Vim, which a masked autoencoder trains
_DYVM = dict(pruning="both")
_VIDEOMAMBA = _VIM | dict(use_middle_cls_token=False, if_divide_out=False)

_TINY, _SMALL, _BASE = (dict(embed_dim=dim, depth=24) for dim in (192, 384, 768))
_NANO = dict(img_size=32, patch_size=4, embed_dim=64, depth=8, num_classes=10, drop_path_rate=0.0)
_STRIDE8 = dict(stride=8)
_LARGE = dict(embed_dim=1024, depth=48)

REGISTRY: dict[str, dict[str, Any]] = {
    "vim_nano_patch4_32": _VIM | _NANO,
    "fambav_nano_patch4_32": _FAMBAV | _NANO,
    "fastvim_nano_patch4_32": _FASTVIM | _NANO,
    "dyvm_nano_patch4_32": _VIM | _NANO | _DYVM | dict(pruning_loc=(2, 4, 6)),
    "vim_tiny_patch16_224": _VIM | _TINY,
    "vim_small_patch16_224": _VIM | _SMALL,
    "vim_base_patch16_224": _VIM | _BASE,
    "vim_tiny_patch16_224_stride8": _VIM | _TINY | _STRIDE8,
    "vim_small_patch16_224_stride8": _VIM | _SMALL | _STRIDE8,
    "vim_base_patch16_224_stride8": _VIM | _BASE | _STRIDE8,
    "fambav_tiny_patch16_224": _FAMBAV | _TINY,
    "fambav_small_patch16_224": _FAMBAV | _SMALL,
    "fastvim_tiny_patch16_224": _FASTVIM | _TINY,
    "fastvim_small_patch16_224": _FASTVIM | _SMALL,
    "fastvim_base_patch16_224": _FASTVIM | _BASE,
    "fastvim_large_patch16_224": _FASTVIM | _LARGE,
    "fastvim_huge_patch14_224": _FASTVIM | dict(embed_dim=1280, depth=64, patch_size=14),
    "dyvm_tiny_patch16_224": _VIM | _TINY | _DYVM,
    "dyvm_small_patch16_224": _VIM | _SMALL | _DYVM,
    "dyvm_base_patch16_224": _VIM | _BASE | _DYVM,
    "videomamba_tiny_patch16_224": _VIDEOMAMBA | _TINY,
    "videomamba_small_patch16_224": _VIDEOMAMBA | _SMALL,
    "videomamba_middle_patch16_224": _VIDEOMAMBA | dict(embed_dim=576, depth=32),
    "videomamba_base_patch16_224": _VIDEOMAMBA | _BASE,
    "dyvm_videomamba_tiny_patch16_224": _VIDEOMAMBA | _TINY | _DYVM,
    "dyvm_videomamba_small_patch16_224": _VIDEOMAMBA | _SMALL | _DYVM,
    "dyvm_videomamba_middle_patch16_224": _VIDEOMAMBA | dict(embed_dim=576, depth=32) | _DYVM,
    "dyvm_videomamba_base_patch16_224": _VIDEOMAMBA | _BASE | _DYVM,
}

REGISTRY |= {
    f"vim_{size}_patch16_224_final_pool_mean_abs_pos_embed_with_midclstok_div2": _VIM_NORM | settings
    for size, settings in (("tiny", _TINY), ("small", _SMALL), ("base", _BASE), ("large", _LARGE))
}

_LONG = "bimambav2_final_pool_mean_abs_pos_embed_with"
_ALIASES = {
    f"vim_tiny_patch16_224_{_LONG}_midclstok_div2": "vim_tiny_patch16_224",
    f"vim_small_patch16_224_{_LONG}_midclstok_div2": "vim_small_patch16_224",
    f"vim_tiny_patch16_stride8_224_{_LONG}_midclstok_div2": "vim_tiny_patch16_224_stride8",
    f"vim_small_patch16_stride8_224_{_LONG}_midclstok_div2": "vim_small_patch16_224_stride8",
    f"vim_base_patch16_224_{_LONG}_middle_cls_token_div2": "vim_base_patch16_224",
} | {
    f"vim_{size}_final_pool_mean_abs_pos_embed_with_noclstok_div2": f"fastvim_{size}"
    for size in ("tiny_patch16_224", "small_patch16_224", "base_patch16_224", "large_patch16_224", "huge_patch14_224")
}


def _pretrained_cfg(name: str) -> dict[str, Any]:
    settings = REGISTRY[_ALIASES.get(name, name)]
    size = settings.get("img_size", 224)
    return dict(
        url="",
        num_classes=settings.get("num_classes", 1000),
        input_size=(3, size, size),
        fixed_input_size=not settings.get("spatial_pool", False),
        pool_size=None,
        crop_pct=0.875,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv="patch_embed.proj",
        classifier="head",
    )


default_cfgs = generate_default_cfgs({name: _pretrained_cfg(name) for name in (*REGISTRY, *_ALIASES)})


def _entry(name: str) -> Callable[..., VisionMamba]:
    settings = REGISTRY[_ALIASES.get(name, name)]

    def build(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
        # on a Vim name, spatial pooling builds the FastVim of that size
        defaults = settings | _FASTVIM if kwargs.get("spatial_pool") else settings
        return build_model_with_cfg(
            VisionMamba,
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=dict(out_indices=(-1,), feature_cls="getter"),
            **(defaults | kwargs),
        )

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"`VisionMamba` with {settings}; keywords override."
    return register_model(build)


globals().update({name: _entry(name) for name in (*REGISTRY, *_ALIASES)})
