"""Alternating spatial pooling: the scan runs over one pooled token per row, or per column, of the token grid.

Kapse et al. 2025, "FastVim: Accelerating Vision Mamba with Spatial Pooling". Everything position-wise in the mixer, and
its convolution, still sees every token; only the projections of the scan and the scan itself run on groups of them. A
map from tokens to groups and back (`mamba_ssm.modules.mamba_simple.TokenPooling`) is handed to the mixer: `GridPooling`
for the full grid, `VisiblePooling` for a subset of it.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from mamba_ssm.ops.merging import spread_tokens, sum_tokens
from mamba_ssm.ops.pooled import Lines
from mamba_ssm.ops.visible import VisibleLines
from torch import Tensor, nn

from fusion.method import Settings, SiteMethod, SitePlan, option
from fusion.token_state import TokenState

_logger = logging.getLogger(__name__)

MASKED_SCALE = 0.25  # of what goes on from a masked autoencoder, as published
SCAN_PATHS = ("rowwise", "colwise")
COLLAPSE_METHODS = ("mean", "max")


@dataclass(frozen=True)
class PoolingSettings(Settings):
    """What the scan sees of the token grid.

    `pool_dims` says how many axes one site pools. On a grid with more axes than rows and columns, `spatial_axes` says
    which of its axes those two are. `published_rows` matters where only some tokens are present (`VisiblePooling`).
    """

    scanpath_type: str = option("rowwise", choices=SCAN_PATHS)
    rotate_every_block: bool = option(True)
    collapse_method: str = option(
        "mean", "how a row becomes one token", flag="--pool-method", flag_default=None, choices=COLLAPSE_METHODS
    )
    scaling_factor: float = option(
        1.0, "factor on the pooled mean (0.25 from a 75 %% MAE)", flag="--pool-scale", flag_default=None, type=float
    )
    pool_dims: int = option(1, choices=(1, 2))
    spatial_axes: tuple[int, int] = option((0, 1))
    published_rows: bool = option(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scaling_factor > 0:
            raise ValueError(f"scaling_factor is {self.scaling_factor}; wanted a number above 0.")
        if self.scaling_factor != 1 and self.collapse_method != "mean":
            raise ValueError(f"scaling_factor is {self.scaling_factor:g}; wanted it with collapse_method 'mean' only.")


@dataclass(frozen=True)
class GridPooling:
    """Pools one axis of a full token grid; all tensors are channel-last, (B, tokens, C).

    `shape` is the grid that the incoming tokens fill in raster order, `axes` the order in which its axes are walked
    (the identity by default) and `pooled` which of the walked axes, counted after that reordering, become one token:
    one (the last by default) or several. So a row-wise layer is `GridPooling((rows, cols))`, a column-wise one
    `GridPooling((rows, cols), axes=(1, 0))`; one token per channel and patch pools an inner axis,
    `GridPooling((rows, cols, channels), pooled=1)`. `scale` multiplies the mean.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...] | None = None
    pooled: int | tuple[int, ...] = -1
    method: str = "mean"
    scale: float = 1.0
    backward: ClassVar[None] = None

    @property
    def lines(self) -> Lines | None:
        """The same for the kernels, which take means over any axes of a grid of up to three."""
        if self.method != "mean":
            return None
        return Lines.of_grid(self.shape, self.axes, self._pooled_axes, self.scale)

    @property
    def walked(self) -> tuple[int, ...]:
        """The sizes of the grid's axes in the order in which they are walked."""
        return self.shape if self.axes is None else tuple(self.shape[axis] for axis in self.axes)

    @property
    def _pooled_axes(self) -> tuple[int, ...]:
        """Rising, from 0 on."""
        pooled = (self.pooled,) if isinstance(self.pooled, int) else self.pooled
        return tuple(sorted(axis % len(self.shape) for axis in pooled))

    def order(self, x: Tensor) -> Tensor:
        """Tokens in raster order -> in walking order."""
        if self.axes is None:
            return x
        return _permute(x, self.shape, self.axes)

    def restore(self, x: Tensor) -> Tensor:
        """Inverse of `order`."""
        if self.axes is None:
            return x
        return _permute(x, self.walked, tuple(self.axes.index(axis) for axis in range(len(self.axes))))

    def reduce(self, x: Tensor) -> Tensor:
        """Tokens in walking order (B, L, C) -> groups (B, G, C)."""
        lines, axes = x.unflatten(1, self.walked), tuple(axis + 1 for axis in self._pooled_axes)
        groups = lines.amax(axes) if self.method == "max" else lines.mean(axes)
        # one group is left where every axis is pooled
        groups = groups.flatten(1, -2) if groups.ndim > 2 else groups.unsqueeze(1)
        return groups if self.scale == 1 or self.method == "max" else groups * self.scale

    def expand_add(self, x: Tensor, groups: Tensor) -> Tensor:
        """Tokens in walking order (B, L, C) plus the value of their group (B, G, C)."""
        pooled = self._pooled_axes
        spread = tuple(1 if axis in pooled else side for axis, side in enumerate(self.walked))
        return (x.unflatten(1, self.walked) + groups.unflatten(1, spread)).flatten(1, -2)


def _permute(x: Tensor, shape: tuple[int, ...], axes: tuple[int, ...]) -> Tensor:
    """(B, L, C) in raster order of `shape` -> in raster order of the same grid with its axes permuted."""
    return x.unflatten(1, shape).permute(0, *(axis + 1 for axis in axes), len(shape) + 1).flatten(1, -2)


@dataclass(frozen=True)
class VisiblePooling:
    """Pools the visible tokens of a grid whose other tokens are absent, as masked autoencoding needs (FastMaskVim).

    `positions` (B, V), long, is the raster index of each visible token on the grid `grid` (rows, cols). A token belongs
    to the row of its position (`transposed`: to its column), a group is the sum over its visible tokens divided by the
    full length of the row, times `scale`; a row without visible tokens is zero.

    `published_rows` does as FastVim's release, which reverses the tokens for the backward direction but not the numbers
    of their rows: there token i of V counts to the row that mirrors the row of token V - 1 - i.
    """

    positions: Tensor
    grid: tuple[int, int]
    transposed: bool = False
    scale: float = 1.0
    published_rows: bool = False
    # (B, V) each: which token is walked k-th, when each token is walked, and the group of the one walked k-th
    walk: Tensor = field(init=False)
    place: Tensor = field(init=False)
    group: Tensor = field(init=False)
    # None where there are no kernels
    lines: VisibleLines | None = field(init=False)

    def __post_init__(self) -> None:
        rows, cols = self.grid
        count, length = (cols, rows) if self.transposed else (rows, cols)
        where = self.positions % cols * rows + self.positions // cols if self.transposed else self.positions
        where, walk = where.sort(1)
        group, lines = where // length, None
        if not self.published_rows:
            ends = torch.arange(count + 1, device=group.device).expand(len(group), -1).contiguous()
            lines = VisibleLines(walk, torch.searchsorted(group, ends), self.scale / length)
        for name, value in (("walk", walk), ("place", walk.argsort(1)), ("group", group), ("lines", lines)):
            object.__setattr__(self, name, value)

    @cached_property
    def backward(self) -> VisiblePooling | None:
        """The map of the backward direction, where it is another."""
        if not self.published_rows:
            return None
        count = self.grid[1] if self.transposed else self.grid[0]
        mirrored = copy.copy(self)
        object.__setattr__(mirrored, "group", count - 1 - self.group.flip(1))
        return mirrored

    def order(self, x: Tensor) -> Tensor:
        """Tokens as they stand -> in walking order."""
        return _take(x, self.walk)

    def restore(self, x: Tensor) -> Tensor:
        """Inverse of `order`."""
        return _take(x, self.place)

    def reduce(self, x: Tensor) -> Tensor:
        """Tokens in walking order (B, V, C) -> groups (B, G, C), one for every row of the full grid."""
        lines, length = self.grid[::-1] if self.transposed else self.grid
        return sum_tokens(x, self.group, lines) * (self.scale / length)

    def expand_add(self, x: Tensor, groups: Tensor) -> Tensor:
        """Tokens in walking order (B, V, C) plus the value of their group (B, G, C)."""
        return x + spread_tokens(groups, self.group)


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))


class SpatialPooling(SiteMethod):
    """FastVim: every site scans over pooled rows or columns of the token grid.

    Odd sites walk the grid across the others' direction (`rotate_every_block`); `scanpath_type="colwise"` exchanges
    rows and columns everywhere. The tokens between sites stay in raster order. Where only some of the grid's tokens are
    present (`TokenState.positions`), those are pooled, and how they are walked is found once a forward pass.
    """

    name = "pooling"
    title = "alternating spatial pooling (FastVim)"
    Settings = PoolingSettings
    switch = "spatial_pool"

    settings: PoolingSettings

    @classmethod
    def add_arguments(cls, group: argparse._ActionsContainer) -> None:
        """Add the flags."""
        group.add_argument(
            "--spatial-pool",
            default=None,
            choices=("none", "alternate", "row", "col"),
            help="build the FastVim of this size: pool rows and columns in turns, or always the same way",
        )
        super().add_arguments(group)
        group.add_argument("--no-norm-after-ssm", action="store_true", help="leave out the LayerNorm behind the scan")

    @classmethod
    def model_keywords(cls, args: argparse.Namespace, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """The keywords that the flags ask for; `--spatial-pool` says both whether to turn and where to begin."""
        given, is_fastvim = cls.Settings.from_arguments(args), cls.is_on({}, defaults)
        if args.spatial_pool == "none" and is_fastvim:
            raise ValueError(
                f"--spatial-pool is none but {args.model} is a FastVim; wanted a Vim name, or another --spatial-pool."
            )
        if args.spatial_pool in (None, "none") and not is_fastvim:
            if given or args.no_norm_after_ssm:
                raise ValueError(
                    "--pool-method, --no-norm-after-ssm and --pool-scale want --spatial-pool or a FastVim model."
                )
            return {}
        if getattr(args, "if_random_token_rank", False):
            raise ValueError(
                "--if_random_token_rank breaks up the token grid that spatial pooling needs: wanted one of them."
            )
        given[cls.switch] = True
        if args.spatial_pool is not None:
            given["rotate_every_block"] = args.spatial_pool == "alternate"
            given["scanpath_type"] = "colwise" if args.spatial_pool == "col" else "rowwise"
        if args.no_norm_after_ssm:
            given["use_norm_after_ssm"] = False
        return given

    @classmethod
    def conflicts(cls, settings: PoolingSettings, others: Mapping[str, Any]) -> str | None:
        """What breaks up the grid, or gates single directions."""
        if others.get("merging") is not None:
            return "Spatial pooling needs the full token grid, which token merging breaks up: wanted one of the two."
        if others.get("pruning") is not None:
            return "Spatial pooling needs the full token grid and both scan directions: wanted it without pruning."
        return None

    def accept(
        self, args: argparse.Namespace, weights: Mapping[str, Tensor], saved: Mapping[str, Any], path: str
    ) -> PoolingSettings | None:
        """A masked autoencoder pooled the visible tokens of a row alone: what goes on from it scales the mean of all by
        their share. The weights do not show it, so that afterwards the scale has to be typed."""
        scale, flags = self.settings.scaling_factor, vars(args)
        is_masked = any(name.startswith("decoder_pred") for name in weights)
        if flags.get("pool_scale") is not None or scale != 1 or flags.get("task") == "pretrain":
            return None
        if not is_masked:
            trained = saved.get("pool_scale")
            if trained is not None and trained != scale:
                raise ValueError(
                    f"{path} was trained at another scale of the pooled mean; wanted --pool-scale {trained:g}."
                )
            return None
        args.pool_scale = round(1 - float(saved.get("mask_ratio", 1 - MASKED_SCALE)), 6)
        _logger.info(
            "%s is a masked autoencoder: --pool-scale %g, its share of visible patches.", path, args.pool_scale
        )
        return dataclasses.replace(self.settings, scaling_factor=args.pool_scale)

    def attach(self, model: nn.Module) -> None:
        """Refuse a model whose tokens are no plain grid."""
        embed = model.patch_embed
        if embed.stride != embed.patch_size or model.num_prefix_tokens or model.flip_img_sequences_ratio > 0:
            raise ValueError(
                "Spatial pooling needs a plain grid: wanted stride equal to patch_size, no class token or register "
                "among the patches, no flipped sequences."
            )

    def __call__(self, index: int, state: TokenState, run: Callable[..., TokenState]) -> TokenState:
        if state.grid is None or (state.positions is not None and state.num_patches == math.prod(state.grid)):
            raise ValueError("The tokens no longer fill their grid: wanted spatial pooling without reordered tokens.")
        if state.positions is None:
            return run(state, pooling=self.grid_pooling(index, state.grid))
        across, walks = self._is_across(index), state.entry(self.name, {})
        if across not in walks:
            walks = {**walks, across: self._visible_pooling(across, state)}
            state = state.with_entry(self.name, walks)
        return run(state, pooling=walks[across])

    def plan(self, index: int, state: TokenState) -> SitePlan | None:
        if state.grid is None or state.positions is not None:
            return None
        return SitePlan({"pooling": self.grid_pooling(index, state.grid)})

    def _is_across(self, index: int) -> bool:
        """Whether site `index` exchanges rows and columns."""
        settings = self.settings
        turns = index % 3 == 1 if settings.pool_dims == 2 else index % 2 == 1
        return (settings.scanpath_type == "colwise") != (settings.rotate_every_block and turns)

    def grid_pooling(self, index: int, grid: tuple[int, ...]) -> GridPooling:
        """What site `index` pools of a full grid.

        One axis (`pool_dims` 1): of the two spatial ones, the second in walking order. Two: every third site the two
        spatial ones, the others all but the first spatial one in walking order.
        """
        settings, across = self.settings, self._is_across(index)
        rows, cols = settings.spatial_axes
        axes = None
        if across:
            axes = tuple({rows: cols, cols: rows}.get(axis, axis) for axis in range(len(grid)))
        pooled: tuple[int, ...] = (cols,)
        if settings.pool_dims == 2:
            pooled = (rows, cols) if index % 3 == 2 else tuple(axis for axis in range(len(grid)) if axis != rows)
        return GridPooling(grid, axes, pooled, settings.collapse_method, settings.scaling_factor)

    def _visible_pooling(self, across: bool, state: TokenState) -> VisiblePooling:
        if self.settings.collapse_method != "mean" or len(state.grid) != 2:
            raise ValueError("Some of the tokens are absent: wanted pooling by 'mean', over rows and columns alone.")
        settings = self.settings
        return VisiblePooling(state.positions, state.grid, across, settings.scaling_factor, settings.published_rows)
