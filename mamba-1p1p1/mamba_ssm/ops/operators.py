"""Registration of the scan and the normalisation with `torch.library`, namespace `mamba_ssm`.

A kernel set (see `causal_conv1d.backend`) for this package has the functions of `torch_kernels.py`, with those
signatures: `states_shape`, `scan_forward`, `scan_backward`, `norm_forward`, `norm_backward`. Tensors arrive checked, on
one device, with any strides.

Scan: `u`, `delta`, `z`, `dout` (batch, dim, seqlen), each float32, bfloat16 or float16, not necessarily the same; `A`
(dim, dstate), `D`, `delta_bias` (dim,) float32; `B`, `C` (batch, groups, dstate, seqlen), with one number of groups, or
(dim, dstate). `scan_forward` returns `out` like `torch.empty_like(u)`, `last_state` (batch, dim, dstate) float32 and,
if `save_states`, whatever its backward wants to start from: float32 of shape `states_shape(...)`, else an empty tensor.
`scan_backward` returns the gradients of u, delta, A, B, C, D, z, delta_bias: of u, delta, z like `torch.empty_like` of
each, the others contiguous, each in its argument's dtype; (0,)-shaped where the argument is None.

Normalisation: `norm_forward` takes `x` and, or None, `residual`, (..., size), and returns `out` in the dtype of `x`,
the sum in `total_dtype`, both contiguous, and float32 mean (0 for RMS) and scale of every row, (rows,) each, in memory
of their own. `norm_backward` takes the gradients of `out` and, or None, of the sum, and returns those of x (in the
dtype of `dout`), residual (in `residual_dtype`), weight and bias; (0,)-shaped where there is no argument.

A backend is a module with a function `load()` that returns the kernel set or raises why it cannot run here.
"""

from __future__ import annotations

from importlib import import_module

import torch
from causal_conv1d.backend import Backends
from mamba_ssm.ops import torch_kernels
from torch import Tensor

backends = Backends("mamba_ssm", torch_kernels)
backends.add("cpp", "cpu", lambda: import_module("mamba_ssm.ops.cpp_kernels").load())
backends.add("cuda", "cuda", lambda: import_module("mamba_ssm.ops.cuda").load())

_SCAN_TENSORS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias"

LIBRARY = torch.library.Library("mamba_ssm", "DEF")
LIBRARY.define(
    f"selective_scan({_SCAN_TENSORS}, bool delta_softplus, bool reverse, bool save_states) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.define(
    f"selective_scan_backward(Tensor dout, {_SCAN_TENSORS}, Tensor states, bool delta_softplus, bool reverse)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.define(
    "add_norm(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, bool is_rms_norm,"
    " ScalarType total_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.define(
    "add_norm_backward(Tensor dout, Tensor? dtotal, Tensor total, Tensor mean, Tensor scale, Tensor weight,"
    " Tensor? bias, bool is_rms_norm, ScalarType? residual_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save_states):
    kernels = backends.pick(u)
    return kernels.scan_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save_states)


def _scan_backward(dout, u, delta, A, B, C, D, z, delta_bias, states, delta_softplus, reverse):
    kernels = backends.pick(u)
    if tuple(states.shape) != kernels.states_shape(*u.shape, A.shape[1]):
        kernels = (
            backends.fallback
        )  # the forward scan ran on another kernel set, and left nothing this one can start from
    return kernels.scan_backward(dout, u, delta, A, B, C, D, z, delta_bias, states, delta_softplus, reverse)


def _fake_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, save_states):
    (batch, dim, seqlen), dstate = u.shape, A.shape[1]
    saved = backends.pick(u).states_shape(batch, dim, seqlen, dstate) if save_states else (0,)
    state_dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    last_state = u.new_empty(batch, dim, dstate, dtype=state_dtype)
    return torch.empty_like(u), last_state, u.new_empty(saved, dtype=torch.float32)


def _gradient_like(argument: Tensor | None, u: Tensor, contiguous: bool) -> Tensor:
    if argument is None:
        return u.new_empty(0)
    return argument.new_empty(argument.shape) if contiguous else torch.empty_like(argument)


def _fake_scan_backward(dout, u, delta, A, B, C, D, z, delta_bias, states, delta_softplus, reverse):
    arguments = (u, False), (delta, False), (A, True), (B, True), (C, True), (D, True), (z, False), (delta_bias, True)
    return tuple(_gradient_like(argument, u, contiguous) for argument, contiguous in arguments)


def _save_scan(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.delta_softplus, ctx.reverse, _ = inputs
    ctx.save_for_backward(*tensors, output[2])


def _differentiate_scan(ctx, dout: Tensor, _dlast_state: Tensor, _dstates: Tensor) -> tuple:
    *tensors, states = ctx.saved_tensors
    grads = torch.ops.mamba_ssm.selective_scan_backward(dout, *tensors, states, ctx.delta_softplus, ctx.reverse)
    grads = tuple(None if tensor is None else grad for tensor, grad in zip(tensors, grads))
    return (*grads, None, None, None)


def _add_norm(x, residual, weight, bias, eps, is_rms_norm, total_dtype):
    return backends.pick(x).norm_forward(x, residual, weight, bias, eps, is_rms_norm, total_dtype)


def _add_norm_backward(dout, dtotal, total, mean, scale, weight, bias, is_rms_norm, residual_dtype):
    kernels = backends.pick(dout)
    return kernels.norm_backward(dout, dtotal, total, mean, scale, weight, bias, is_rms_norm, residual_dtype)


def _fake_add_norm(x, residual, weight, bias, eps, is_rms_norm, total_dtype):
    rows, state_dtype = x.numel() // x.shape[-1], torch.float64 if x.dtype == torch.float64 else torch.float32
    out, total = x.new_empty(x.shape), x.new_empty(x.shape, dtype=total_dtype)
    return out, total, x.new_empty(rows, dtype=state_dtype), x.new_empty(rows, dtype=state_dtype)


def _fake_add_norm_backward(dout, dtotal, total, mean, scale, weight, bias, is_rms_norm, residual_dtype):
    dresidual = dout.new_empty(0) if residual_dtype is None else dout.new_empty(dout.shape, dtype=residual_dtype)
    dbias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return dout.new_empty(dout.shape), dresidual, weight.new_empty(weight.shape), dbias


def _save_add_norm(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    _, residual, weight, bias, _, ctx.is_rms_norm, _ = inputs
    out, total, mean, scale = output
    ctx.set_materialize_grads(False)
    ctx.out_dtype, ctx.residual_dtype = out.dtype, None if residual is None else residual.dtype
    ctx.save_for_backward(total, mean, scale, weight, bias)


def _differentiate_add_norm(ctx, dout: Tensor | None, dtotal: Tensor | None, _dmean, _dscale) -> tuple:
    total, mean, scale, weight, bias = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(total, dtype=ctx.out_dtype)
    dx, dresidual, dweight, dbias = torch.ops.mamba_ssm.add_norm_backward(
        dout, dtotal, total, mean, scale, weight, bias, ctx.is_rms_norm, ctx.residual_dtype
    )
    dresidual, dbias = None if ctx.residual_dtype is None else dresidual, None if bias is None else dbias
    return dx, dresidual, dweight, dbias, None, None, None


@torch.compiler.assume_constant_result
def _load(device_type: str) -> str:
    """Load the kernel set for a kind of device, which a compiler cannot follow."""
    return backends.available(device_type)


def has_kernel(x: Tensor, function: str) -> bool:
    """Whether the kernel set for `x` has `function`, which not all have. Not while a graph is exported, whose reader
    knows the plain operators only."""
    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
    if torch.jit.is_tracing() or exporting():
        return False
    if torch.compiler.is_compiling():
        _load(x.device.type)
    return hasattr(backends.pick(x), function)


def register(name: str, kernel, fake, *, save=None, differentiate=None) -> None:
    """Give operator `mamba_ssm::name` its kernel, its fake and, if it is differentiable, its gradient."""
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mamba_ssm::{name}", fake, lib=LIBRARY)
    if differentiate is not None:
        torch.library.register_autograd(f"mamba_ssm::{name}", differentiate, setup_context=save, lib=LIBRARY)


register("selective_scan", _scan, _fake_scan, save=_save_scan, differentiate=_differentiate_scan)
register("selective_scan_backward", _scan_backward, _fake_scan_backward)
register("add_norm", _add_norm, _fake_add_norm, save=_save_add_norm, differentiate=_differentiate_add_norm)
register("add_norm_backward", _add_norm_backward, _fake_add_norm_backward)
