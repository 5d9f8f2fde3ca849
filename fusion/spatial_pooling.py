"""Alternating spatial pooling: the scan runs over one pooled token per row, or per column, of the token grid.

Kapse et al. 2025, "FastVim: Accelerating Vision Mamba with Spatial Pooling". Everything position-wise in the mixer, and
its convolution, still sees every token; only the projections of the scan and the scan itself run on groups of them. A
map from tokens to groups and back (`mamba_ssm.modules.mamba_simple.TokenPooling`) is handed to the mixer: `GridPooling`
for the full grid, `VisiblePooling` for a subset of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from mamba_ssm.ops.pooled import Lines
from torch import Tensor

from fusion.config import PoolingConfig
from fusion.token_state import SiteMethod, TokenState


@dataclass(frozen=True)
class GridPooling:
    """Pools one axis of a full token grid; all tensors are channel-last, (B, tokens, C).

    `shape` is the grid that the incoming tokens fill in raster order, `axes` the order in which its axes are walked
    (the identity by default) and `pooled` which of the walked axes, counted after that reordering, becomes one token
    (the last by default). So a row-wise layer is `GridPooling((rows, cols))`, a column-wise one
    `GridPooling((rows, cols), axes=(1, 0))`; one token per channel and patch pools an inner axis,
    `GridPooling((rows, cols, channels), pooled=1)`. `scale` multiplies the mean.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...] | None = None
    pooled: int = -1
    method: str = "mean"
    scale: float = 1.0
    backward: ClassVar[None] = None

    @property
    def lines(self) -> Lines | None:
        """The rows or columns of a two-dimensional grid, if they are averaged: the case that has kernels."""
        if len(self.shape) != 2 or self.method != "mean" or self.pooled % 2 != 1:
            return None
        return Lines(self.walked[0], self.axes == (1, 0), self.scale)

    @property
    def walked(self) -> tuple[int, ...]:
        """The sizes of the grid's axes in the order in which they are walked."""
        return self.shape if self.axes is None else tuple(self.shape[axis] for axis in self.axes)

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
        lines, axis = x.unflatten(1, self.walked), self.pooled % len(self.shape) + 1
        groups = (lines.amax(axis) if self.method == "max" else lines.mean(axis)).flatten(1, -2)
        return groups if self.scale == 1 or self.method == "max" else groups * self.scale

    def expand_add(self, x: Tensor, groups: Tensor) -> Tensor:
        """Tokens in walking order (B, L, C) plus the value of their group (B, G, C)."""
        axis = self.pooled % len(self.shape)
        left = self.walked[:axis] + self.walked[axis + 1 :]
        return (x.unflatten(1, self.walked) + groups.unflatten(1, left).unsqueeze(axis + 1)).flatten(1, -2)


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
    lines: ClassVar[None] = None

    @property
    def backward(self) -> VisiblePooling | None:
        """The map of the backward direction, where it is another."""
        return _MirroredPooling(self.positions, self.grid, self.transposed, self.scale) if self.published_rows else None

    @property
    def _walk(self) -> Tensor:
        """(B, V): the index of each visible token when the grid is walked."""
        rows, cols = self.grid
        return self.positions % cols * rows + self.positions // cols if self.transposed else self.positions

    @property
    def _line(self) -> int:
        return self.grid[0] if self.transposed else self.grid[1]

    def order(self, x: Tensor) -> Tensor:
        """Tokens as they stand -> in walking order."""
        return _take(x, self._walk.argsort(1))

    def restore(self, x: Tensor) -> Tensor:
        """Inverse of `order`."""
        return _take(x, self._walk.argsort(1).argsort(1))

    def reduce(self, x: Tensor) -> Tensor:
        """Tokens in walking order (B, V, C) -> groups (B, G, C), one for every row of the full grid."""
        groups = x.new_zeros(x.shape[0], math.prod(self.grid) // self._line, x.shape[2])
        return groups.scatter_add(1, self._groups(x), x) * (self.scale / self._line)

    def expand_add(self, x: Tensor, groups: Tensor) -> Tensor:
        """Tokens in walking order (B, V, C) plus the value of their group (B, G, C)."""
        return x + groups.gather(1, self._groups(x))

    def _groups(self, x: Tensor) -> Tensor:
        return (self._walk.sort(1).values // self._line).unsqueeze(-1).expand_as(x)


class _MirroredPooling(VisiblePooling):
    def _groups(self, x: Tensor) -> Tensor:
        return math.prod(self.grid) // self._line - 1 - super()._groups(x).flip(1)


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))


class SpatialPooling(SiteMethod):
    """FastVim: every site scans over pooled rows or columns of the token grid.

    Odd sites walk the grid across the others' direction (`rotate_every_block`); `scanpath_type="colwise"` exchanges
    rows and columns everywhere. The tokens between sites stay in raster order.
    """

    def __init__(self, config: PoolingConfig) -> None:
        self.config = config

    def __call__(self, index: int, state: TokenState, run: Callable[..., TokenState]) -> TokenState:
        if state.grid is None:
            raise ValueError("The tokens no longer fill their grid: wanted spatial pooling without reordered tokens.")
        config = self.config
        across = (config.scanpath_type == "colwise") != (config.rotate_every_block and index % 2 == 1)
        if state.positions is not None:
            return run(
                state,
                pooling=VisiblePooling(
                    state.positions, state.grid, across, config.scaling_factor, config.published_rows
                ),
            )
        pooling = GridPooling(
            state.grid, (1, 0) if across else None, method=config.collapse_method, scale=config.scaling_factor
        )
        return run(state, pooling=pooling)
