"""Both scans of a bidirectional block as one operator, for kernel sets that run them in one launch.

Such a kernel set has `scan_forward_both` and `scan_backward_both`; with others the two scans run one after the other,
and the result is the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from causal_conv1d.derivatives import gradients_by_reference, wants_reference
from mamba_ssm.kernels.arguments import SCAN_TENSORS, Scan
from mamba_ssm.kernels.registry import backends
from mamba_ssm.ops.operators import OPERATORS
from mamba_ssm.ops.scan import check_scan, scan_flops, selective_scan_fn, selective_scan_ref
from torch import Tensor

Direction = Scan  # the name it was first imported by

_NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
_OPTIONAL = ("D", "z", "delta_bias")


def _alike(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> bool:
    """Whether one launch can take both: B and C of the input, real A, equal sizes, dtypes and devices."""
    _, _, A, B, C, *_ = first
    if A.is_complex() or B.dim() not in (3, 4) or B.shape != C.shape:
        return False
    for one, other in zip(first, second):
        if (one is None) != (other is None):
            return False
        if one is not None and (one.shape != other.shape or one.dtype != other.dtype or one.device != other.device):
            return False
    return True


def bidirectional_scan_fn(
    first: Sequence[Tensor | None], second: Sequence[Tensor | None], delta_softplus: bool = False
) -> tuple[Tensor, Tensor]:
    """`selective_scan_fn` of `first`, and with `reverse=True` of `second`: two (batch, dim, seqlen) outputs.

    Both are u, delta, A, B, C and, or None, D, z, delta_bias. Dtypes and errors are those of `selective_scan_fn`.
    Differentiable in every tensor.
    """
    first, second = ((*tensors, None, None, None)[:SCAN_TENSORS] for tensors in (first, second))
    plain = wants_reference(*first, *second) or not backends.has(first[0], "scan_forward_both")
    if plain or not _alike(first, second):
        forward = selective_scan_fn(*first, delta_softplus=delta_softplus)
        return forward, selective_scan_fn(*second, delta_softplus=delta_softplus, reverse=True)
    for tensors in (first, second):
        check_scan(*tensors)
    first, second = _grouped(first), _grouped(second)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*first, *second))
    out, out_b, _, _ = torch.ops.mamba_ssm.scan_both(*first, *second, delta_softplus, wanted)
    return out, out_b


def _grouped(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The tensors with B and C (batch, groups, dstate, seqlen)."""
    u, delta, A, B, C, *rest = tensors
    B, C = (matrix.unsqueeze(1) if matrix.dim() == 3 else matrix for matrix in (B, C))
    return [u, delta, A, B, C, *rest]


# --- registration ----------------------------------------------------------------------------------------------------


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


def _reference(*arguments) -> tuple[Tensor, Tensor]:
    *tensors, delta_softplus = arguments
    forward = selective_scan_ref(*tensors[:SCAN_TENSORS], delta_softplus)
    return forward, selective_scan_ref(*tensors[SCAN_TENSORS:], delta_softplus, reverse=True)


def _flops(*arguments) -> int:
    return scan_flops(*arguments[:SCAN_TENSORS]) + scan_flops(*arguments[SCAN_TENSORS:])


def _save_both(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.delta_softplus, _ = inputs
    ctx.save_for_backward(*tensors, *output[2:])


def _differentiate_both(ctx, dout: Tensor, dout_b: Tensor, _dstates: Tensor, _dstates_b: Tensor) -> tuple:
    *tensors, states, states_b = ctx.saved_tensors
    if torch.is_grad_enabled():
        return *gradients_by_reference(_reference, (*tensors, ctx.delta_softplus), (dout, dout_b)), None
    grads = torch.ops.mamba_ssm.scan_both_backward(dout, dout_b, *tensors, states, states_b, ctx.delta_softplus)
    return *(None if tensor is None else grad for tensor, grad in zip(tensors, grads)), None, None


def _schema(suffix: str) -> str:
    return ", ".join(f"Tensor{'?' * (name in _OPTIONAL)} {name}{suffix}" for name in _NAMES)


OPERATORS.register(
    f"scan_both({_schema('')}, {_schema('_b')}, bool delta_softplus, bool save_states)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _both,
    _fake_both,
    save=_save_both,
    differentiate=_differentiate_both,
    flops=_flops,
)
OPERATORS.register(
    f"scan_both_backward(Tensor dout, Tensor dout_b, {_schema('')}, {_schema('_b')}, Tensor states, Tensor states_b,"
    f" bool delta_softplus) -> ({', '.join(['Tensor'] * 16)})",
    _both_backward,
    _fake_both_backward,
)
