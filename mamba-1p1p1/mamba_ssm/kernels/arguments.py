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
