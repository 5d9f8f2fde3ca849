"""Vision Mamba (Vim) models for timm's registry: one layer class, one model class, and its variants' names.

Zhu et al. 2024, "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model"
(arXiv:2401.09417). The efficiency methods (fusion/) act between and inside the sites of the one model; see
`VisionMamba.site_methods`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops.triton.layernorm import RMSNorm
from timm.layers import DropPath, lecun_normal_, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from embeddings import ChannelPatchEmbed, PatchEmbed, RotaryEmbedding2d, resize_pos_embed
from fusion import Methods, SitePlan, build_site_methods, method_keywords, plans_of
from fusion.dynamic_pruning import PruningOutput, pruning_output
from fusion.token_state import ClassIndex, TokenState, join_cls, mean_over_kept, patch_policy, reorder, split_cls
from models_layers import Block, Untraced, add_norm, checkpoint_filter_fn, init_linears, made_at, run_layers
from models_registry import (
    ALIASES,
    FASTVIM,
    PUBLISHED_SPELLINGS,
    REGISTRY,
    VimSettings,
    pretrained_cfg,
    registry_keywords,
    registry_name,
)

__all__ = ["PUBLISHED_SPELLINGS", "Block", "VimSettings", "VisionMamba", "registry_keywords", "registry_name"]


class VisionMamba(Untraced):
    """Vision Mamba: patch embedding, class tokens or registers, `depth` Mamba layers, norm, linear head.

    Keywords are the fields of `VimSettings`, and those of the methods (`fusion.method_keywords`). `methods` holds every
    method's settings, and `site_methods` those that are on, outermost first.
    """

    def __init__(self, **keywords: Any) -> None:
        super().__init__()
        own = {each.name for each in fields(VimSettings)}
        unknown = sorted(set(keywords) - own - {*method_keywords()})
        if unknown:
            raise TypeError(f"VisionMamba does not know {', '.join(unknown)}; wanted its own or a method's keywords.")
        settings = VimSettings(**{name: value for name, value in keywords.items() if name in own})
        others = {name: value for name, value in keywords.items() if name not in own}
        if settings.channel_tokens and settings.scan_order == "Spatial-First":
            others.setdefault("spatial_axes", (1, 2))
        self.methods = Methods.from_keywords(**others)
        pooling = self.methods.get("pooling")
        if pooling is not None and pooling.pool_dims == 2 and not settings.channel_tokens:
            raise ValueError("pool_dims is 2; wanted it with channel_tokens, whose grid has a third axis.")
        if self.methods.get("pruning") is not None and settings.channel_tokens:
            raise ValueError("Learned pruning knows one channel's patches: wanted it without channel_tokens.")

        self.num_classes, self.drop_rate = settings.num_classes, settings.drop_rate
        self.embed_dim = self.num_features = settings.embed_dim
        self.depth, self.norm_epsilon = settings.depth, settings.norm_epsilon
        self.fused_add_norm, self.residual_in_fp32 = settings.fused_add_norm, settings.residual_in_fp32
        self.if_bidirectional, self.pair_residual = settings.if_bidirectional, settings.pair_residual
        self.final_pool_type = settings.final_pool_type
        self.flip_img_sequences_ratio = settings.flip_img_sequences_ratio
        self.class_tokens = settings.class_tokens
        self.num_prefix_tokens = self.class_tokens.count
        self.grad_checkpointing = self.find_unused_parameters = False

        self._build_embedding(settings)
        self._build_layers(settings)
        self.init_weights(needs_reset=False)
        self.site_methods = build_site_methods(self.methods)
        for method in self.site_methods:
            before = self.state_dict().keys()
            method.attach(self)
            method.added = frozenset(self.state_dict().keys() - before)

    def _build_embedding(self, settings: VimSettings) -> None:
        """Patches, class tokens, positions."""
        pooling, dim = self.methods.get("pooling"), settings.embed_dim
        self._colwise = pooling is not None and pooling.scanpath_type == "colwise"
        self.knows_channels = settings.channel_tokens
        about = {name: getattr(settings, name) for name in ("hcs", "sort_channels", "scan_order")}
        embed = partial(ChannelPatchEmbed, **about) if self.knows_channels else PatchEmbed
        self.patch_embed = embed(
            settings.img_size,
            settings.patch_size,
            settings.patch_size if settings.stride is None else settings.stride,
            settings.in_chans if settings.channels is None else settings.channels,
            dim,
            dynamic=pooling is not None and not settings.if_rope,
        )
        names = ("cls_token_head", "cls_token_tail") if settings.use_double_cls_token else ("cls_token",)
        self.cls_token_names = names if self.class_tokens.count else ()
        for name in self.cls_token_names:
            self.register_parameter(name, nn.Parameter(torch.zeros(1, self.class_tokens.count // len(names), dim)))
        self.pos_embed = self.pos_embed_cls = None
        if settings.if_abs_pos_embed:
            num_patches = self.patch_embed.num_patches
            rows = num_patches + len(self.class_row_positions(num_patches))
            self.pos_embed = nn.Parameter(torch.zeros(1, rows, dim))
            if self.class_tokens.positions == "own":
                self.pos_embed_cls = nn.Parameter(torch.zeros(1, self.class_tokens.count, dim))
        self.pos_drop = nn.Dropout(settings.drop_rate)
        self.rope, self.if_rope_residual = None, settings.if_rope_residual
        if settings.if_rope:
            grid = self.patch_embed.grid_size if settings.ft_seq_len is None else to_2tuple(settings.ft_seq_len)
            if grid != self.patch_embed.grid_size:
                raise ValueError(
                    f"ft_seq_len is {settings.ft_seq_len}; wanted the side of the token grid "
                    f"{self.patch_embed.grid_size}."
                )
            self.rope = RotaryEmbedding2d(dim, grid, settings.pt_hw_seq_len)

    def _build_layers(self, settings: VimSettings) -> None:
        """Layers, last norm, head."""
        dim, depth, norm_after_ssm = settings.embed_dim, settings.depth, settings.use_norm_after_ssm
        if norm_after_ssm is None:
            norm_after_ssm = self.methods.get("pooling") is not None
        norm_layer = partial(RMSNorm if settings.rms_norm else nn.LayerNorm, eps=settings.norm_epsilon)
        new_mixer = partial(
            Mamba,
            dim,
            d_state=settings.d_state,
            bimamba_type="v1" if settings.if_bimamba else settings.bimamba_type,
            if_divide_out=settings.if_divide_out if settings.if_devide_out is None else settings.if_devide_out,
            init_layer_scale=settings.init_layer_scale,
            use_norm_after_ssm=norm_after_ssm,
            **(settings.ssm_cfg or {}),
        )
        # layer 0 never drops, since it starts the residual; layer 1 takes the first rate, the final add the last
        rates = [0.0, *(settings.drop_path_rate * i / max(depth - 1, 1) for i in range(depth))]
        self.layers = nn.ModuleList(
            Block(new_mixer(layer_idx=i), norm_layer(dim), rates[i], self.fused_add_norm, self.residual_in_fp32)
            for i in range(depth)
        )
        self.drop_path = DropPath(settings.drop_path_rate) if settings.drop_path_rate > 0 else nn.Identity()
        self.norm_f = norm_layer(dim)
        self.neck = self.norm_neck = None
        self._build_head(settings.num_classes, settings.global_pool, settings.cls_reduce)
        layers_per_site = 2 if self.if_bidirectional else 1
        self.num_sites = depth // layers_per_site
        self.feature_info = [
            dict(num_chs=dim, reduction=self.patch_embed.stride[0], module=f"layers.{last}")
            for last in range(layers_per_site - 1, depth, layers_per_site)
        ]

    def _build_head(self, num_classes: int, global_pool: str | None, reduce: int = 1) -> None:
        """What the head reads, and the head; `reduce` narrows registers where there is a neck to be made."""
        own = "token" if self.class_tokens.count else "avg" if self.final_pool_type == "mean" else "last"
        pool = {None: own, "mean": "avg"}.get(global_pool, global_pool)
        if pool not in ("", "avg", own):
            raise ValueError(
                f"global_pool is {global_pool!r}; wanted 'token', 'avg' or '': this model reads its class token, or "
                "the mean where it has none."
            )
        self.num_classes, self.global_pool = num_classes, pool
        registers = self.class_tokens.count if self.class_tokens.readout == "concat" and pool == "token" else 0
        if not registers:
            self.neck = self.norm_neck = None
        elif reduce > 1:
            self.neck = nn.Linear(self.embed_dim, self.embed_dim // reduce, bias=False)
            norm = RMSNorm if isinstance(self.norm_f, RMSNorm) else nn.LayerNorm
            self.norm_neck = norm(registers * self.neck.out_features, eps=self.norm_epsilon)
        width = self.embed_dim if self.neck is None else self.neck.out_features
        self.head_hidden_size = width * max(registers, 1)
        self.head = nn.Linear(self.head_hidden_size, num_classes) if num_classes > 0 else nn.Identity()

    # --- weights ---

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as Vim does: LeCun-normal patch convolution, truncated normal (0.02) head, neck, tokens and
        positions; linear biases zero but for dt_proj's; out_proj Kaiming-uniform over sqrt(depth), one residual branch
        a layer. With `needs_reset` all the rest starts again too, as after `to_empty`."""
        if needs_reset:
            for module in self.modules():
                if hasattr(module, "reset_parameters") and not isinstance(module, Mamba):
                    module.reset_parameters()
            if self.rope is not None:
                self._turn_to(self.patch_embed.grid_size)
        if not self.knows_channels:  # those start as torch has it
            lecun_normal_(self.patch_embed.proj.weight)
            nn.init.zeros_(self.patch_embed.proj.bias)
        tokens = [getattr(self, name) for name in self.cls_token_names]
        for parameter in [*tokens, self.pos_embed, self.pos_embed_cls]:
            if parameter is None:
                continue
            trunc_normal_(parameter, std=0.02)
        init_linears(self, self.depth)
        for linear in (self.neck, self.head):
            if isinstance(linear, nn.Linear):
                trunc_normal_(linear.weight, std=0.02)
        for layer in self.layers if needs_reset else ():
            layer.mixer.reset_parameters()

    def _turn_to(self, grid: tuple[int, int]) -> None:
        """Rotary positions of a token grid, made anew."""
        rope = RotaryEmbedding2d(self.embed_dim, grid, self.rope.pretrain_side)
        self.rope = rope.to(self.rope.freqs_cos.device)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone: A, D of every direction, positions, class tokens,
        channels."""
        scan = {
            name for name, _ in self.named_parameters() if name.rpartition(".")[2] in ("A_log", "A_b_log", "D", "D_b")
        }
        channels = {"patch_embed.channel_embed.weight"} if self.knows_channels else set()
        return scan | channels | {"pos_embed", "pos_embed_cls", *self.cls_token_names}

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
        """Replace the head; `global_pool` says what it reads (see `VimSettings`), None what it read before.

        A MambaReg that goes back to its registers from another reading reads them without a neck.
        """
        self._build_head(num_classes, self.global_pool if global_pool is None else global_pool)
        if num_classes > 0:
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        weight = self.layers[0].mixer.out_proj.weight
        self.head.to(device=weight.device, dtype=weight.dtype)

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int] | None = None, patch_size: int | None = None) -> None:
        """Take images of another size from now on: positions are resized, class tokens stand by their rule. The patch
        size, which timm's models can change too, stays."""
        embed, old_grid = self.patch_embed, self.pos_embed_grid
        if patch_size is not None and to_2tuple(patch_size) != embed.patch_size:
            raise ValueError(f"patch_size is {patch_size}; wanted {embed.patch_size}, for which the weights are.")
        embed.resize(embed.img_size if img_size is None else img_size)
        if self.pos_embed is not None and self.pos_embed_grid != old_grid:
            resized = resize_pos_embed(self.pos_embed.detach(), old_grid, self.pos_embed_grid, self.class_row_positions)
            self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)
        if self.rope is not None:
            self._turn_to(embed.grid_size)
        for method in self.site_methods:
            method.resize(self)

    def class_token_positions(self, num_patches: int) -> tuple[int, ...]:
        """Where the class tokens stand among `num_patches` patch tokens."""
        return self.class_tokens.places(num_patches)

    def class_row_positions(self, num_patches: int) -> tuple[int, ...]:
        """Which rows of `pos_embed` are the class tokens', for a grid of `num_patches`; none where those have
        positions of their own."""
        return self.class_token_positions(num_patches) if self.class_tokens.positions == "shared" else ()

    # --- forward ---

    def embed(
        self,
        x: Tensor,
        random_cls_position: bool = False,
        random_token_rank: bool = False,
        keep: Tensor | None = None,
        channels: Any = None,
    ) -> TokenState:
        """Images (B, C, H, W) -> the token sequence before the first site; `channels` as in `forward`.

        `keep` (B, V), long, rising in every row: the raster indices of the patch tokens that are left, as masked
        autoencoding needs; positions are those of the full grid, and class tokens stand among the V by their rule.
        """
        self.refuse_symbolic(x)
        if channels is not None and not self.knows_channels:
            raise ValueError("This model takes its channels together: wanted one with channel_tokens for `channels`.")
        patches, grid = self.patch_embed(x, channels) if self.knows_channels else self.patch_embed(x)
        batch, num_patches, _ = patches.shape
        if keep is not None and (keep.ndim != 2 or len(keep) != batch or keep.dtype != torch.long):
            raise ValueError(f"keep is {tuple(keep.shape)} of {keep.dtype}; wanted ({batch}, V) of torch.int64.")
        left = num_patches if keep is None else keep.shape[1]
        cls = self.class_tokens.among(left)
        if random_cls_position and cls.count == 1:
            cls = cls.moved((int(torch.randint(left + 1, ())),))
        elif random_cls_position and cls.count:
            cls = cls.moved(tuple(torch.randperm(left + cls.count)[: cls.count].sort().values.tolist()))
        # a class token that stands elsewhere has the row of that place
        cls_rows, patch_rows = self.position_rows(
            grid, cls.index if keep is None else self.class_tokens.places(num_patches)
        )
        if patch_rows is not None:
            patches = patches + patch_rows
        drops_classes = cls.positions == "shared"  # registers take no dropout
        patches = patches if drops_classes else self.pos_drop(patches)
        if left < num_patches:
            patches = patches.gather(1, keep.unsqueeze(-1).expand(-1, -1, patches.shape[2]))
        if cls.count:
            classes = torch.cat([getattr(self, name) for name in self.cls_token_names], 1)
            classes = classes if cls_rows is None else classes + cls_rows
            patches = join_cls(classes.expand(batch, -1, -1), patches, cls)
        positions = keep if left < num_patches else None
        hidden = self.pos_drop(patches) if drops_classes else patches
        state = TokenState(hidden, cls=cls, grid=grid, positions=positions)
        if random_token_rank:
            state = reorder(state, torch.randperm(state.num_tokens))
        if (
            self.training
            and self.flip_img_sequences_ratio > 0
            and float(torch.rand(())) < self.flip_img_sequences_ratio
        ):
            state = reorder(state, torch.arange(state.num_tokens - 1, -1, -1))
        return state

    def varies(self, training: bool) -> str:
        """What differs from pass to pass beside numbers on the device (`fusion.varies`)."""
        return "the host draws which sequences are reversed" if training and self.flip_img_sequences_ratio > 0 else ""

    def position_rows(self, grid: tuple[int, ...], index: ClassIndex) -> tuple[Tensor | None, Tensor | None]:
        """The position embeddings of the class tokens (1, K, D), which stand at `index` of the full sequence, and of
        the patch tokens of `grid` (1, M, D); None where there are none."""
        if self.pos_embed is None:
            return None, None
        if self.knows_channels:
            rows_cols = tuple(grid[axis] for axis in self.patch_embed.spatial_axes)
            return None, self.patch_embed.spread(self.pos_embed_for(rows_cols), grid)
        table = self.pos_embed_for(grid)
        return split_cls(table, index) if self.class_tokens.positions == "shared" else (self.pos_embed_cls, table)

    @property
    def pos_embed_grid(self) -> tuple[int, int]:
        """(rows, cols) of the position embedding."""
        return self.position_grid(self.patch_embed.grid_size)

    def position_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """(rows, cols) of the positions of a token grid: its own, or for colwise pooling the transposed one, since
        FastVim's release transposes the grid before adding positions."""
        return grid[::-1] if self._colwise else grid

    def pos_embed_for(self, grid: tuple[int, int]) -> Tensor:
        """The position embedding (1, L, D) of a token grid in raster order, resized bicubically where the grid is not
        the one it was made for."""
        pos_embed = self.pos_embed
        new_grid = self.position_grid(grid)
        if new_grid != self.pos_embed_grid:
            pos_embed = resize_pos_embed(pos_embed, self.pos_embed_grid, new_grid, self.class_row_positions)
        return pos_embed.unflatten(1, new_grid).transpose(1, 2).flatten(1, 2) if self._colwise else pos_embed

    def run_site(self, index: int, state: TokenState, **mixer_args: Any) -> TokenState:
        """Run site `index`: one layer, or in paired models one forward and one on the reversed sequence."""
        hidden, residual = state.hidden, state.residual
        if self.rope is not None:
            hidden = self.rope(hidden, state)
            if self.if_rope_residual and residual is not None:
                residual = self.rope(residual, state)
        if not self.if_bidirectional:
            state = state.replace(hidden=hidden, residual=residual)
            return run_layers([self.layers[index]], state, [SitePlan(mixer_args)])
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
        checkpointed = self.grad_checkpointing and self.training
        alone = checkpointed or visit is not None or self.rope is not None or self.if_bidirectional
        index, end = 0, self.num_sites if num_sites is None else num_sites
        while index < end:
            plans = [] if alone else plans_of(self.site_methods, range(index, end), state)
            if plans:
                state = run_layers([*self.layers][index : index + len(plans)], state, plans)
            elif checkpointed:
                state = checkpoint(self._with_methods, index, state, use_reentrant=False)
            else:
                state = self._with_methods(index, state)
            index += len(plans) or 1
            if visit is not None:
                visit(index - 1, state)
        return state

    def finish(self, state: TokenState) -> Tensor:
        """The last add and norm: normalised tokens (B, L, D), class tokens first, patch tokens behind in their
        order."""
        for method in self.site_methods:
            method.finish(state)
        hidden = self.drop_path(state.hidden)
        if isinstance(self.norm_f, nn.Identity):
            hidden = hidden + state.residual
        else:
            hidden, _ = add_norm(self.norm_f, hidden, state.residual, self.fused_add_norm, self.residual_in_fp32)
        if isinstance(state.cls.index, Tensor) or state.cls.index != tuple(range(state.num_cls)):
            hidden = torch.cat(split_cls(hidden, state.cls), 1)
        return hidden

    def forward_features(
        self,
        x: Tensor,
        if_random_cls_token_position: bool = False,
        if_random_token_rank: bool = False,
        channels: Any = None,
    ) -> Tensor:
        """Images (B, C, H, W) -> normalised tokens (B, `num_prefix_tokens` + M, D), class tokens first."""
        state = self.embed(x, if_random_cls_token_position, if_random_token_rank, channels=channels)
        return self.finish(self.encode(state))

    def forward_head(self, x: Tensor, pre_logits: bool = False, token_policy: Tensor | None = None) -> Tensor:
        """Tokens of `forward_features` -> logits (B, num_classes), or with `pre_logits` the features they are read from
        (B, `head_hidden_size`); a mean over patch tokens leaves out those whose `token_policy` (B, M) is 0."""
        count = self.num_prefix_tokens
        if self.global_pool == "token":
            x = self._read(x[:, :count])
        elif self.global_pool == "avg":
            x = mean_over_kept(x[:, count:], token_policy)
        elif self.global_pool == "last":
            x = x[:, -1]
        return x if pre_logits else self.head(x)

    def _read(self, classes: Tensor) -> Tensor:
        """Normalised class tokens (B, K, D) -> what the head reads (B, `head_hidden_size`)."""
        if self.class_tokens.readout == "mean":
            return classes.mean(1)
        if self.neck is None:
            return classes.flatten(1)
        return self.norm_neck(self.neck(classes).flatten(1))

    def forward(
        self,
        x: Tensor,
        return_features: bool = False,
        if_random_cls_token_position: bool = False,
        if_random_token_rank: bool = False,
        channels: Any = None,
    ) -> Any:
        """Images (B, C, H, W) -> logits (B, num_classes), or with `return_features` the features under the
        head. In training mode a method may return something of its own instead (`SiteMethod.output`). A model with
        `channel_tokens` is told by `channels` which of those that it knows x holds; see `ChannelPatchEmbed`."""
        state, tokens, features = self._features(x, if_random_cls_token_position, if_random_token_rank, channels)
        if return_features:
            return features
        output = self.head(features)
        if self.training:
            for method in self.site_methods:
                output = method.output(output, state, tokens)
        return output

    def forward_with_decisions(
        self, x: Tensor, if_random_cls_token_position: bool = False, if_random_token_rank: bool = False
    ) -> PruningOutput:
        """Images (B, C, H, W) -> logits, final tokens, and what pruning decided on the way, in either mode."""
        if self.methods.get("pruning") is None:
            raise ValueError("This model prunes nothing; wanted one built with pruning 'token', 'block' or 'both'.")
        state, tokens, features = self._features(x, if_random_cls_token_position, if_random_token_rank)
        return pruning_output(state, tokens, self.head(features))

    def _features(
        self, x: Tensor, random_cls_position: bool, random_token_rank: bool, channels: Any = None
    ) -> tuple[TokenState, Tensor, Tensor]:
        state = self.encode(self.embed(x, random_cls_position, random_token_rank, channels=channels))
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
        output_dict: bool = False,
        channels: Any = None,
    ) -> list[Any] | tuple[Tensor, list[Any]] | dict[str, Any]:
        """Token maps after chosen sites, as timm's models give them: (B, D, rows, cols), or (B, M, D) for output_fmt
        "NLC".

        With `return_prefix_tokens` each map comes with its class tokens (B, K, D). With `output_dict` maps are under
        `image_intermediates`, class tokens under `image_intermediates_prefix`, final tokens under `image_features`.
        Needs models that keep their full token grid. Maps of a model with `channel_tokens` are means over the channels.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}; wanted 'NCHW' or 'NLC'.")
        take, last = feature_take_indices(self.num_sites, indices)
        maps: list[Tensor] = []
        prefixes: list[Tensor] = []

        def visit(index: int, state: TokenState) -> None:
            if index not in take:
                return
            if not state.fills_grid:
                raise ValueError("Token maps need the full grid: wanted a model without token merging or pruning.")
            tokens = state.hidden + state.residual
            classes, patches = split_cls(self.norm_f(tokens) if norm else tokens, state.cls)
            grid = state.grid
            if self.knows_channels:
                patches = self.patch_embed.mean(patches, grid)
                grid = tuple(grid[axis] for axis in self.patch_embed.spatial_axes)
            if output_fmt == "NCHW":
                patches = patches.transpose(1, 2).unflatten(2, grid).contiguous()
            maps.append(patches)
            prefixes.append(classes)

        last_site = last + 1 if stop_early and intermediates_only else None
        state = self.encode(self.embed(x, channels=channels), visit, last_site)
        features = None if intermediates_only else self.finish(state)
        if output_dict:
            found: dict[str, Any] = {"image_intermediates": maps}
            if return_prefix_tokens:
                found["image_intermediates_prefix"] = prefixes
            return found if features is None else found | {"image_features": features}
        pairs = list(zip(maps, prefixes)) if return_prefix_tokens else maps
        return pairs if features is None else (features, pairs)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | list[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Any]:
        """DINO's interface to `forward_intermediates`: the last `n` sites, or those named; maps with `reshape`."""
        output_fmt = "NCHW" if reshape else "NLC"
        return self.forward_intermediates(x, n, norm, True, output_fmt, True, return_prefix_tokens)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the layers behind the last of the sites `indices`, and with them what is named; returns the sites."""
        if self.methods.get("pruning") is not None:
            raise ValueError("Learned pruning counts the layers it was built with: wanted a model without it.")
        take, last = feature_take_indices(self.num_sites, indices)
        per_site = self.depth // self.num_sites
        self.num_sites, self.depth = last + 1, (last + 1) * per_site
        self.layers, self.feature_info = self.layers[: self.depth], self.feature_info[: last + 1]
        if prune_norm:
            self.norm_f = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take


# --- registry ---


default_cfgs = generate_default_cfgs(
    {name: pretrained_cfg(REGISTRY[ALIASES.get(name, name)]) for name in (*REGISTRY, *ALIASES)}
)


def _entry(name: str) -> Callable[..., VisionMamba]:
    settings = REGISTRY[ALIASES.get(name, name)]

    def build(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
        # on a Vim name, spatial pooling builds the FastVim of that size
        defaults = settings | FASTVIM if kwargs.get("spatial_pool") else settings
        place = {key: kwargs.pop(key, None) for key in ("device", "dtype")}
        features = dict(out_indices=(-1,), feature_cls="getter")
        how = dict(pretrained_filter_fn=checkpoint_filter_fn, feature_cfg=features, **(defaults | kwargs))
        return made_at(partial(build_model_with_cfg, VisionMamba, name, pretrained, **how), **place)

    build.__name__ = build.__qualname__ = name
    build.keywords = settings
    build.__doc__ = f"`VisionMamba` with {settings}; keywords override."
    return register_model(build)


globals().update({name: _entry(name) for name in (*REGISTRY, *ALIASES)})
