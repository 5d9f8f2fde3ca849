"""Both scans of a bidirectional block as one operator, for kernel sets that run them in one launch.

Such a kernel set has `scan_forward_both` and `scan_backward_both`; with others the two scans run one after the other,
and the result is the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from mamba_ssm.ops.operators import LIBRARY, backends, has_kernel, register
from mamba_ssm.ops.scan import check_scan, selective_scan_fn
from torch import Tensor

_NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
_OPTIONAL = ("D", "z", "delta_bias")


def _schema(suffix: str) -> str:
    return ", ".join(f"Tensor{'?' * (name in _OPTIONAL)} {name}{suffix}" for name in _NAMES)


_TAG = torch.Tag.pt2_compliant_tag
LIBRARY.define(
    f"scan_both({_schema('')}, {_schema('_b')}, bool delta_softplus, bool save_states)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAG,
)
LIBRARY.define(
    f"scan_both_backward(Tensor dout, Tensor dout_b, {_schema('')}, {_schema('_b')}, Tensor states, Tensor states_b,"
    f" bool delta_softplus) -> ({', '.join(['Tensor'] * 16)})",
    tags=_TAG,
)


class Direction(NamedTuple):
    """One direction's arguments, as of `selective_scan_fn`."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    delta_bias: Tensor | None = None


def shares_launch(x: Tensor) -> bool:
    """Whether there are kernels that take both scans of `x` at once."""
    return has_kernel(x, "scan_forward_both")


def _alike(first: Direction, second: Direction) -> bool:
    """Whether one launch can take both: B and C of the input, real A, equal sizes, dtypes and devices."""
    if first.A.is_complex() or first.B.dim() not in (3, 4) or first.B.shape != first.C.shape:
        return False
    for one, other in zip(first, second):
        if (one is None) != (other is None):
            return False
        if one is not None and (one.shape != other.shape or one.dtype != other.dtype or one.device != other.device):
            return False
    return True


def bidirectional_scan_fn(first: Direction, second: Direction, delta_softplus: bool = False) -> tuple[Tensor, Tensor]:
    """`selective_scan_fn` of `first`, and with `reverse=True` of `second`: two (batch, dim, seqlen) outputs.

    Arguments, dtypes and errors are those of `selective_scan_fn`. Differentiable in every tensor.
    """
    first, second = Direction(*first), Direction(*second)
    if not (shares_launch(first.u) and _alike(first, second)):
        forward = selective_scan_fn(*first, delta_softplus=delta_softplus)
        return forward, selective_scan_fn(*second, delta_softplus=delta_softplus, reverse=True)
    for direction in (first, second):
        check_scan(*direction)
    first, second = (
        direction._replace(B=_grouped(direction.B), C=_grouped(direction.C)) for direction in (first, second)
    )
    wanted = any(tensor is not None and tensor.requires_grad for tensor in (*first, *second))
    out, out_b, _, _ = torch.ops.mamba_ssm.scan_both(
        *first, *second, delta_softplus, wanted and torch.is_grad_enabled()
    )
    return out, out_b


def _grouped(matrix: Tensor) -> Tensor:
    return matrix.unsqueeze(1) if matrix.dim() == 3 else matrix


def _both(*arguments):
    *tensors, delta_softplus, save_states = arguments
    kernels = backends.pick(tensors[0])
    return kernels.scan_forward_both(tensors[:8], tensors[8:], delta_softplus, save_states)


def _both_backward(dout, dout_b, *arguments):
    *tensors, states, states_b, delta_softplus = arguments
    kernels = backends.pick(tensors[0])
    if not hasattr(kernels, "scan_backward_both"):
        one, other = ((dout, tensors[:8], states, False), (dout_b, tensors[8:], states_b, True))
        scan = torch.ops.mamba_ssm.selective_scan_backward
        return tuple(grad for d, t, s, reverse in (one, other) for grad in scan(d, *t, s, delta_softplus, reverse))
    return kernels.scan_backward_both((dout, dout_b), tensors[:8], tensors[8:], (states, states_b), delta_softplus)


def _fake_both(*arguments):
    *tensors, _, save_states = arguments
    u, u_b, dstate = tensors[0], tensors[8], tensors[2].shape[1]
    shape = backends.pick(u).states_shape(*u.shape, dstate) if save_states else (0,)
    states = [u.new_empty(shape, dtype=torch.float32) for _ in range(2)]
    return torch.empty_like(u), torch.empty_like(u_b), *states


def _fake_both_backward(dout, dout_b, *arguments):
    tensors, grads = arguments[:16], []
    for name, tensor in zip(2 * _NAMES, tensors):
        if tensor is None:
            grads.append(dout.new_empty(0))
        else:
            grads.append(torch.empty_like(tensor) if name in ("u", "delta", "z") else tensor.new_empty(tensor.shape))
    return tuple(grads)


def _save_both(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.delta_softplus, _ = inputs
    ctx.save_for_backward(*tensors, *output[2:])


def _differentiate_both(ctx, dout: Tensor, dout_b: Tensor, _dstates: Tensor, _dstates_b: Tensor) -> tuple:
    *tensors, states, states_b = ctx.saved_tensors
    grads = torch.ops.mamba_ssm.scan_both_backward(dout, dout_b, *tensors, states, states_b, ctx.delta_softplus)
    return *(None if tensor is None else grad for tensor, grad in zip(tensors, grads)), None, None


register("scan_both", _both, _fake_both, save=_save_both, differentiate=_differentiate_both)
register("scan_both_backward", _both_backward, _fake_both_backward)
