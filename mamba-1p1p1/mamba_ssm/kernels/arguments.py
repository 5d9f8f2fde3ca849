"""What operators are handed: the tensors that belong together, under one name each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Scan(NamedTuple):
    """A selective scan's arguments, as `selective_scan_fn` describes them."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    delta_bias: Tensor | None = None
    delta_softplus: bool = True
    reverse: bool = False


# Tensors in a Scan.
SCAN_TENSORS = 8


class ScanGradients(NamedTuple):
    """Where a backward scan writes the gradients of the arguments: like them, None where there is none, of any strides.

    Those of A, D and delta_bias, and of B and C that do not depend on the input, are contiguous float32; so are those
    of B and C on CUDA where there is more than one group.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None


class Direction(NamedTuple):
    """The parameters of one scan direction; float32 unless said otherwise.

    `reverse` runs convolution and scan from the last position to the first.
    """

    conv_weight: Tensor  # (dim, width), any of the kernels' dtypes, as the next three
    conv_bias: Tensor | None  # (dim,)
    x_proj_weight: Tensor  # (dt_rank + 2*dstate, dim): rows for dt, B, C
    dt_proj_weight: Tensor  # (dim, dt_rank)
    dt_bias: Tensor | None  # (dim,)
    A: Tensor  # (dim, dstate)
    D: Tensor | None  # (dim,)
    reverse: bool = False


# Tensors in a Direction, and those that may be None.
DIRECTION_TENSORS = 7
OPTIONAL_OF_DIRECTION = ("conv_bias", "dt_bias", "D")


def split_directions(parameters: Sequence[Tensor | None], reverse: Sequence[bool]) -> list[Direction]:
    """The tensors of two directions, one after the other, and the ways of one or both, as `Direction` values."""
    parts = parameters[:DIRECTION_TENSORS], parameters[DIRECTION_TENSORS:]
    return [Direction(*part, way) for part, way in zip(parts, reverse)]


def with_rates(directions: Sequence[Direction], log_decay: bool) -> list[Direction]:
    """The directions with A in the place of log(-A), if `log_decay` says that they hold that."""
    return [each._replace(A=-each.A.exp()) if log_decay else each for each in directions]


class Lines(NamedTuple):
    """A token grid of three axes, in the order in which they are walked, whose `pooled` ones become one token: `scale`
    times the mean.

    `sizes` are the axes' lengths, the last of them 1 where there are fewer, and `strides` how far apart in the
    sequence two neighbours along each are. The convolutions follow the walk, and groups are numbered as it meets them.
    """

    sizes: tuple[int, int, int]
    strides: tuple[int, int, int]
    pooled: tuple[bool, bool, bool]
    scale: float = 1.0

    kernel = "pooled_conv"  # the function of a kernel set that has kernels for them

    @classmethod
    def of_grid(
        cls, shape: Sequence[int], axes: Sequence[int] | None = None, pooled: Sequence[int] = (-1,), scale: float = 1.0
    ) -> Lines | None:
        """Lines of a grid that tokens fill in raster order, its axes walked in the order `axes`, of which those
        numbered `pooled`, after that, are pooled. None if that takes more than three axes once neighbours are one
        where they can be."""
        walked = range(len(shape)) if axes is None else axes
        pooled = {place % len(shape) for place in pooled}
        found: list[tuple[int, int, bool]] = []
        for place, axis in enumerate(walked):
            size, stride, is_pooled = shape[axis], math.prod(shape[axis + 1 :]), place in pooled
            if size == 1:
                continue
            if found and found[-1][1:] == (size * stride, is_pooled):
                size *= found.pop()[0]
            found.append((size, stride, is_pooled))
        if len(found) > 3:
            return None
        found += [(1, 0, False)] * (3 - len(found))
        return cls(*zip(*found), scale)

    @property
    def count(self) -> int:
        """How many groups there are."""
        return math.prod(size for size, is_pooled in zip(self.sizes, self.pooled) if not is_pooled)

    @property
    def length(self) -> int:
        """How many tokens are one group."""
        return math.prod(self.sizes) // self.count

    @property
    def runs(self) -> bool:
        """Whether the tokens of a group are walked one after the other."""
        pooled = [is_pooled for size, is_pooled in zip(self.sizes, self.pooled) if size > 1]
        return pooled == sorted(pooled)

    def spread(self, groups: Tensor) -> Tensor:
        """(batch, groups, dim) -> (batch, *sizes, dim), with 1 for the sizes of pooled axes."""
        return groups.unflatten(1, [1 if is_pooled else size for size, is_pooled in zip(self.sizes, self.pooled)])

    def all_visible(self, batch: int, device: torch.device) -> VisibleLines:
        """The same groups, of `batch` images that show every token, walked one after the other."""
        axes = sorted(range(3), key=lambda axis: self.pooled[axis])
        return self._visible(self._tokens(device).permute(axes).flatten(), batch, self.length)

    def each_visible(self, batch: int, device: torch.device) -> VisibleLines:
        """Every token a line of its own, in the order of the walk."""
        return self._visible(self._tokens(device).flatten(), batch, 1)

    def _tokens(self, device: torch.device) -> Tensor:
        """The token at every place of the grid, as it is walked."""
        first, second, third = (
            torch.arange(size, device=device) * stride for size, stride in zip(self.sizes, self.strides)
        )
        return first[:, None, None] + second[:, None] + third

    def _visible(self, order: Tensor, batch: int, length: int) -> VisibleLines:
        starts = torch.arange(0, math.prod(self.sizes) + 1, length, device=order.device)
        return VisibleLines(order.expand(batch, -1), starts.expand(batch, -1), self.scale / self.length)


class VisibleLines(NamedTuple):
    """Lines of which every image shows other tokens, V in all; each is pooled to `factor` times the sum of its own.

    `order` (batch, V), long, says which token is walked k-th, None where they are walked as they stand; `starts`
    (batch, lines + 1), long, at which place of the walk each line begins, and behind the last one V. The convolutions
    run from line to line.
    """

    order: Tensor | None
    starts: Tensor
    factor: float

    kernel = "visible_conv"

    @property
    def count(self) -> int:
        """How many lines there are, those without a visible token among them."""
        return self.starts.shape[1] - 1


class MixerSizes(NamedTuple):
    """What a mixer's kernels depend on, as far as it is known before the first of them runs."""

    dtype: torch.dtype  # of what its projections give
    batch: int
    seqlen: int  # that its scans run over
    dim: int
    dstate: int
    taps: tuple[torch.dtype | None, ...]  # of the convolution's weight and bias, and of D where that goes with them
    width: int  # of the convolution
    directions: int  # scanned in one launch
    with_D: bool  # whether scans add D * u
    trains: bool


class Taps(NamedTuple):
    """What one direction's convolution needs: weight (dim, width), bias (dim,) or None, and the skip's D (dim,)."""

    weight: Tensor
    bias: Tensor | None
    D: Tensor


class Projections(NamedTuple):
    """What one direction's scan needs: x_proj (dt_rank + 2 * dstate, dim), whose rows give dt, B and C, dt_proj (dim,
    dt_rank), dt_bias (dim,) and A_log (dim, dstate)."""

    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    A_log: Tensor


class Ends(NamedTuple):
    """A mixer's outer projections: in_proj (2 * dim, width), whose rows give x and z, and out_proj (width, dim), each
    with a bias or None."""

    in_proj: Tensor
    in_bias: Tensor | None
    out_proj: Tensor
    out_bias: Tensor | None


def split_matrices(x_dbl: Tensor, dstate: int) -> tuple[Tensor, Tensor, Tensor]:
    """x_dbl (batch, seqlen, dt_rank + 2*dstate) -> dt (batch, seqlen, dt_rank) and B, C (batch, 1, dstate, seqlen)."""
    dt, B, C = x_dbl.split([x_dbl.shape[2] - 2 * dstate, dstate, dstate], dim=2)
    return dt, B.transpose(1, 2).unsqueeze(1), C.transpose(1, 2).unsqueeze(1)
