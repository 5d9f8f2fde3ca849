"""The selective scan: the functions, their obvious versions, and the operator.

Gu and Dao 2023 (arXiv:2312.00752), equation 2: `h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t`, `y_t = <C_t, h_t> + D u_t`,
with the discretisation of section 3.2.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from causal_conv1d.backend import KERNEL_DTYPES
from causal_conv1d.checks import check_device, check_dtype, check_ndim, check_shape, check_tensor
from causal_conv1d.derivatives import gradients_by_reference, is_exporting_onnx, wants_reference
from mamba_ssm.kernels.registry import backends
from mamba_ssm.ops.exporting import scan_by_doubling
from mamba_ssm.ops.operators import OPERATORS
from torch import Tensor

_FLOAT64 = (torch.float64,)
_PARAMETER_DTYPES = (torch.float32, torch.complex64)


def _check_matrix(name: str, matrix: Tensor, u: Tensor, A: Tensor) -> None:
    batch, dim, seqlen = u.shape
    dstate, columns = A.shape[1], seqlen * (2 if A.is_complex() else 1)
    columns_name = "2*seqlen" if A.is_complex() else "seqlen"
    if matrix.dim() == 2:
        check_shape(name, matrix, (dim, dstate), "(dim, dstate)")
    elif matrix.dim() == 3:
        check_shape(name, matrix, (batch, dstate, columns), f"(batch, dstate, {columns_name})")
    elif matrix.dim() == 4:
        groups = matrix.shape[1]
        check_shape(name, matrix, (batch, groups, dstate, columns), f"(batch, groups, dstate, {columns_name})")
        if groups == 0 or dim % groups:
            raise ValueError(f"{name} has {groups} groups, wanted a number that divides dim = {dim}")
    else:
        wanted = f"(batch, dstate, {columns_name}), (batch, groups, dstate, {columns_name}) or (dim, dstate)"
        raise ValueError(f"{name} has shape {tuple(matrix.shape)}, wanted {wanted}")


def check_scan(u, delta, A, B, C, D, z, delta_bias, u_name: str = "u") -> None:
    """Raise one sentence unless the arguments of a scan fit each other (see `selective_scan_fn`)."""
    check_tensor(u_name, u)
    check_ndim(u_name, u, "(batch, dim, seqlen)")
    double = u.dtype == torch.float64
    check_dtype(u_name, u, (*KERNEL_DTYPES, *_FLOAT64))
    signal_dtypes, parameter_dtypes = (_FLOAT64, _FLOAT64) if double else (KERNEL_DTYPES, KERNEL_DTYPES[:1])
    check_tensor("A", A)
    check_ndim("A", A, "(dim, dstate)")
    check_shape("A", A, (u.shape[1], A.shape[1]), "(dim, dstate)")
    check_dtype("A", A, _FLOAT64 if double else _PARAMETER_DTYPES)
    for name, tensor in (("delta", delta), ("z", z)):
        if tensor is not None or name == "delta":
            check_tensor(name, tensor)
            check_shape(name, tensor, u.shape, "(batch, dim, seqlen)")
            check_dtype(name, tensor, signal_dtypes)
    for name, tensor in (("B", B), ("C", C)):
        check_tensor(name, tensor)
        _check_matrix(name, tensor, u, A)
        complex_constant = A.is_complex() and tensor.dim() == 2
        check_dtype(name, tensor, (*signal_dtypes, torch.complex64) if complex_constant else signal_dtypes)
    for name, tensor in (("D", D), ("delta_bias", delta_bias)):
        if tensor is not None:
            check_tensor(name, tensor)
            check_shape(name, tensor, u.shape[1:2], "(dim,)")
            check_dtype(name, tensor, parameter_dtypes)
    for name, tensor in zip(("delta", "A", "B", "C", "D", "z", "delta_bias"), (delta, A, B, C, D, z, delta_bias)):
        if tensor is not None:
            check_device(name, tensor, u, u_name)


def _grouped(matrix: Tensor, groups: int) -> Tensor:
    """B or C as (batch, groups, dstate, seqlen), or unchanged if it does not depend on the input."""
    if matrix.dim() == 3:
        matrix = matrix.unsqueeze(1)
    if matrix.dim() == 4 and matrix.shape[1] != groups:
        matrix = matrix.repeat_interleave(groups // matrix.shape[1], dim=1)
    return matrix


def _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse) -> tuple[Tensor, Tensor]:
    """The scan of checked arguments with real A."""
    if is_exporting_onnx():
        return scan_by_doubling(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    groups = math.lcm(*(matrix.shape[1] for matrix in (B, C) if matrix.dim() == 4))
    B, C = _grouped(B, groups), _grouped(C, groups)
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    save_states = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    # torch.jit.trace compares its graph with one made without gradients
    save_states = save_states or torch.jit.is_tracing()
    out, last_state, _ = torch.ops.mamba_ssm.selective_scan(*tensors, delta_softplus, reverse, save_states)
    return out, last_state.detach()


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan along the sequence, differentiable in every tensor argument.

    `dt = softplus(delta + delta_bias)` (softplus only if asked; linear above 20),
    `h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t` with `h = 0` before the first step, `y_t = <C_t, h_t> + D u_t`,
    `out = y silu(z)`. The state and every sum are float32 (float64 if all arguments are float64).

    Args:
        u, delta, z: (batch, dim, seqlen), float32, bfloat16 or float16, any strides. Channel-last memory (stride 1
            along dim, any stride along seqlen) is the fast layout and is never copied.
        A: (dim, dstate) float32; complex64 runs on `selective_scan_ref`, see there.
        B, C: (batch, dstate, seqlen), grouped (batch, groups, dstate, seqlen) with groups dividing dim, or
            input-independent (dim, dstate).
        D, delta_bias: (dim,) float32 or None.
        delta_softplus: pass `delta + delta_bias` through softplus.
        return_last_state: also return the state after the last step.
        reverse: scan from the last position to the first, that is `flip(scan(flip(...)))`, without the flipped copies.

    Returns:
        out (batch, dim, seqlen) in the dtype and memory layout of `u`; with `return_last_state`, `(out, last_state)`,
        last_state (batch, dim, dstate) float32, not differentiated.

    Raises:
        ValueError: a shape or device that does not fit. TypeError: not a tensor, or a dtype that does not fit.
    """
    check_scan(u, delta, A, B, C, D, z, delta_bias)
    if A.is_complex() or (not is_exporting_onnx() and wants_reference(u, delta, A, B, C, D, z, delta_bias)):
        return selective_scan_ref(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, reverse=reverse
        )
    out, last_state = _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    return (out, last_state) if return_last_state else out


def pooled_selective_scan_fn(
    u: Tensor,
    u_compressed: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan of pooled tokens (FastVim): everything but `u` and `D` has length seqlen/k.

    The scan of `u_compressed`, gated by `z` if given, each value repeated k times along the sequence, plus `D * u`.

    Args:
        u: (batch, dim, seqlen).
        u_compressed: (batch, dim, seqlen/k), any whole k of at least 1.
        delta, A, B, C, z, delta_bias, delta_softplus, return_last_state, reverse: as for `selective_scan_fn`, at length
            seqlen/k.
        D: (dim,) or None.

    Returns:
        out (batch, dim, seqlen) in the dtype of `u`; with `return_last_state`, `(out, last_state)`.

    Raises:
        ValueError, TypeError: as for `selective_scan_fn`.
    """
    check_tensor("u", u)
    check_ndim("u", u, "(batch, dim, seqlen)")
    check_dtype("u", u, (*KERNEL_DTYPES, *_FLOAT64))
    check_scan(u_compressed, delta, A, B, C, D, z, delta_bias, u_name="u_compressed")
    check_device("u_compressed", u_compressed, u, "u")
    (batch, dim, seqlen), groups = u.shape, u_compressed.shape[2]
    fits = seqlen == groups or (groups > 0 and seqlen > 0 and seqlen % groups == 0)
    if u_compressed.shape[:2] != u.shape[:2] or not fits:
        raise ValueError(
            f"u_compressed has shape {tuple(u_compressed.shape)}, wanted (batch, dim, seqlen/k) with"
            f" (batch, dim, seqlen) = {(batch, dim, seqlen)} and a whole k"
        )
    tensors = u, u_compressed, delta, A, B, C, D, z, delta_bias
    if A.is_complex() or (not is_exporting_onnx() and wants_reference(*tensors)):
        return pooled_selective_scan_ref(
            u, u_compressed, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, reverse=reverse
        )
    y, last_state = _scan(u_compressed, delta, A, B, C, None, z, delta_bias, delta_softplus, reverse)
    repeats = seqlen // groups if groups else 1
    y = y.unsqueeze(-1)
    tokens = u.unflatten(2, (groups, repeats))
    if D is None:
        out = y.to(u.dtype).expand_as(tokens)
    else:
        out = torch.addcmul(y.to(D.dtype), D[:, None, None], tokens.to(D.dtype)).to(u.dtype)
    out = out.flatten(2)
    return (out, last_state) if return_last_state else out


# --- references ------------------------------------------------------------------------------------------------------


def _real_dtype(u: Tensor) -> torch.dtype:
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def _per_channel(matrix: Tensor, u: Tensor, A: Tensor, pairs: bool) -> Tensor:
    """B or C in any of its forms -> (batch, dim, dstate, seqlen), complex if A is."""
    batch, dim, seqlen = u.shape
    if matrix.dim() == 2:
        return matrix.to(A.dtype)[None, :, :, None].expand(batch, dim, matrix.shape[1], seqlen)
    matrix = matrix.to(_real_dtype(u))
    if pairs:
        matrix = torch.view_as_complex(matrix.unflatten(-1, (seqlen, 2)).contiguous())
    matrix = matrix.unsqueeze(1) if matrix.dim() == 3 else matrix
    return matrix.repeat_interleave(dim // matrix.shape[1], dim=1)


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What `selective_scan_fn` computes, one step at a time, in float32 (float64 for float64 `u`).

    A may be complex64: B and C then hold (real, imaginary) pairs along the sequence, (..., 2*seqlen), or are complex
    (dim, dstate), and `y_t = 2 Re <C_t, h_t>`.
    """
    dtype, complex_state = _real_dtype(u), A.is_complex()
    A = A if complex_state else A.to(dtype)
    dt = delta.to(dtype)
    if delta_bias is not None:
        dt = dt + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        dt = F.softplus(dt)
    wide = u.to(dtype)
    B, C = (_per_channel(matrix, u, A, complex_state) for matrix in (B, C))

    state = A.new_zeros(u.shape[0], *A.shape)
    rows = []
    steps = list(zip(wide.unbind(2), dt.unbind(2), B.unbind(3), C.unbind(3)))
    for u_t, dt_t, B_t, C_t in reversed(steps) if reverse else steps:
        dt_t = dt_t.unsqueeze(-1)
        state = torch.exp(dt_t * A) * state + dt_t * B_t * u_t.unsqueeze(-1)
        rows.append((state * C_t).sum(-1))
    rows = rows[::-1] if reverse else rows
    y = torch.stack(rows, dim=-1) if rows else torch.zeros_like(wide)
    y = 2 * y.real if y.is_complex() else y
    if D is not None:
        y = y + D.to(dtype)[:, None] * wide
    if z is not None:
        y = y * F.silu(z.to(dtype))
    y = y.to(u.dtype)
    return (y, state.detach()) if return_last_state else y


def pooled_selective_scan_ref(
    u: Tensor,
    u_compressed: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What `pooled_selective_scan_fn` computes: the scan of the pooled tokens, each value repeated, plus `D * u`."""
    y, last_state = selective_scan_ref(
        u_compressed, delta, A, B, C, None, z, delta_bias, delta_softplus, return_last_state=True, reverse=reverse
    )
    out = y.to(_real_dtype(u)).repeat_interleave(u.shape[2] // u_compressed.shape[2], dim=2)
    if D is not None:
        out = out + D.to(out.dtype)[:, None] * u.to(out.dtype)
    out = out.to(u.dtype)
    return (out, last_state) if return_last_state else out


# --- registration ----------------------------------------------------------------------------------------------------


def _forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save_states):
    kernels = backends.pick(u)
    return kernels.scan_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save_states)


def _backward(dout, u, delta, A, B, C, D, z, delta_bias, states, delta_softplus, reverse):
    kernels = backends.pick(u)
    if tuple(states.shape) != kernels.states_shape(*u.shape, A.shape[1]):
        # the forward scan ran on another kernel set, and left nothing that this one can start from
        kernels = backends.fallback
    return kernels.scan_backward(dout, u, delta, A, B, C, D, z, delta_bias, states, delta_softplus, reverse)


def _fake_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save_states):
    (batch, dim, seqlen), dstate = u.shape, A.shape[1]
    saved = backends.pick(u).states_shape(batch, dim, seqlen, dstate) if save_states else (0,)
    state_dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    last_state = u.new_empty(batch, dim, dstate, dtype=state_dtype)
    return torch.empty_like(u), last_state, u.new_empty(saved, dtype=torch.float32)


def _gradient_like(argument: Tensor | None, u: Tensor, contiguous: bool) -> Tensor:
    if argument is None:
        return u.new_empty(0)
    return argument.new_empty(argument.shape) if contiguous else torch.empty_like(argument)


def _fake_backward(dout, u, delta, A, B, C, D, z, delta_bias, states, delta_softplus, reverse):
    arguments = (u, False), (delta, False), (A, True), (B, True), (C, True), (D, True), (z, False), (delta_bias, True)
    return tuple(_gradient_like(argument, u, contiguous) for argument, contiguous in arguments)


def _reference(*arguments) -> Tensor:
    *tensors, delta_softplus, reverse = arguments
    return selective_scan_ref(*tensors, delta_softplus, reverse=reverse)


def scan_flops(u, delta, A, B, C, D, z, *_) -> int:
    """Nine multiply-adds a state and step, and one each for D and z."""
    return 2 * math.prod(u) * (9 * A[1] + (D is not None) + (z is not None))


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.delta_softplus, ctx.reverse, _ = inputs
    ctx.save_for_backward(*tensors, output[2])


def _differentiate(ctx, dout: Tensor, _dlast_state: Tensor, _dstates: Tensor) -> tuple:
    *tensors, states = ctx.saved_tensors
    if torch.is_grad_enabled():
        return *gradients_by_reference(_reference, (*tensors, ctx.delta_softplus, ctx.reverse), (dout,)), None
    grads = torch.ops.mamba_ssm.selective_scan_backward(dout, *tensors, states, ctx.delta_softplus, ctx.reverse)
    grads = tuple(None if tensor is None else grad for tensor, grad in zip(tensors, grads))
    return (*grads, None, None, None)


_TENSORS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias"
OPERATORS.register(
    f"selective_scan({_TENSORS}, bool delta_softplus, bool reverse, bool save_states) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    save=_save,
    differentiate=_differentiate,
    flops=scan_flops,
)
OPERATORS.register(
    f"selective_scan_backward(Tensor dout, {_TENSORS}, Tensor states, bool delta_softplus, bool reverse)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
