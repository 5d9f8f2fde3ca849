"""What operators are handed: the tensors that belong together, under one name each."""

from __future__ import annotations

from typing import NamedTuple

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


# Tensors in a Direction.
DIRECTION_TENSORS = 7


class Lines(NamedTuple):
    """A token grid cut into `count` lines of equal length, each pooled to `scale` times its mean.

    Token k of line g is number g * length + k of the sequence or, if `across`, number k * count + g. The convolutions
    run from line to line.
    """

    count: int
    across: bool
    scale: float = 1.0

    kernel = "pooled_conv"  # the function of a kernel set that has kernels for them


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


def split_matrices(x_dbl: Tensor, dstate: int) -> tuple[Tensor, Tensor, Tensor]:
    """x_dbl (batch, seqlen, dt_rank + 2*dstate) -> dt (batch, seqlen, dt_rank) and B, C (batch, 1, dstate, seqlen)."""
    dt, B, C = x_dbl.split([x_dbl.shape[2] - 2 * dstate, dstate, dstate], dim=2)
    return dt, B.transpose(1, 2).unsqueeze(1), C.transpose(1, 2).unsqueeze(1)
