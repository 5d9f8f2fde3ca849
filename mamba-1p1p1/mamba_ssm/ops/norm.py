"""Residual addition and normalisation in one call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from causal_conv1d.backend import KERNEL_DTYPES
from causal_conv1d.checks import check_device, check_dtype, check_shape, check_tensor
from causal_conv1d.derivatives import gradients_by_reference, wants_reference
from mamba_ssm.kernels.registry import backends
from mamba_ssm.ops.operators import OPERATORS
from torch import Tensor


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    *,
    x1: None = None,
    weight1: None = None,
    bias1: None = None,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    zero_centered_weight: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Add the residual, then normalise over the last dimension in float32.

    x (..., D) and residual (..., D) or None; weight (D,), bias (D,) or None. Returns the normalised sum (..., D) in x's
    dtype, with `prenorm` also the sum itself: float32 if `residual_in_fp32`, else in the residual's (or x's) dtype.
    LayerNorm as in Ba et al. 2016; RMSNorm (`is_rms_norm`) as in Zhang and Sennrich 2019.

    Of what later releases take, x is multiplied with `rowscale` (...,) and dropped with probability `dropout_p` before
    the residual, and a `zero_centered_weight` is one less than what multiplies.

    Raises:
        ValueError, TypeError: a tensor that does not fit. NotImplementedError: a second input (`x1`), a second norm
        (`weight1`, `bias1`) or the dropout's mask is asked for.
    """
    if return_dropout_mask or any(second is not None for second in (x1, weight1, bias1)):
        raise NotImplementedError("x1, weight1, bias1 or return_dropout_mask is given, wanted one input and one norm")
    _check(x, weight, bias, residual)
    if rowscale is not None:
        check_tensor("rowscale", rowscale)
        check_shape("rowscale", rowscale, x.shape[:-1], "(...,), x's shape without its last dimension")
        x = x * rowscale.unsqueeze(-1).to(x.dtype)
    x = F.dropout(x, dropout_p) if dropout_p else x
    weight = weight + 1 if zero_centered_weight else weight
    if wants_reference(x, weight, bias, residual):
        return layer_norm_ref(x, weight, bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm)
    total_dtype = torch.float32 if residual_in_fp32 else x.dtype if residual is None else residual.dtype
    if torch.is_grad_enabled():
        types = x.dtype, (x if residual is None else residual).dtype, total_dtype, weight.dtype
        backends.foretell(x, "foretell_norm", lambda: (types, x.shape[-1], 1 + (bias is not None)))
    out, total, _, _ = torch.ops.mamba_ssm.add_norm(x, residual, weight, bias, eps, is_rms_norm, total_dtype)
    return (out, total) if prenorm else out


def layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What `layer_norm_fn` computes."""
    total_dtype = torch.float32 if residual_in_fp32 else x.dtype if residual is None else residual.dtype
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    total = wide if residual is None else wide + residual
    out = _normalise(total, weight, bias, eps, is_rms_norm).to(x.dtype)
    return (out, total.to(total_dtype)) if prenorm else out


def _normalise(total: Tensor, weight: Tensor, bias: Tensor | None, eps: float, is_rms_norm: bool) -> Tensor:
    """Ba et al. 2016, equation 3, or Zhang and Sennrich 2019, equation 4, in float32 at least."""
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    centered = wide if is_rms_norm else wide - wide.mean(-1, keepdim=True)
    out = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps) * weight
    return out if bias is None else out + bias


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    check_tensor("x", x)
    dtypes = (torch.float64,) if x.dtype == torch.float64 else KERNEL_DTYPES
    check_dtype("x", x, (*KERNEL_DTYPES, torch.float64))
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, wanted (..., size) with a size of at least 1")
    check_tensor("weight", weight)
    check_shape("weight", weight, x.shape[-1:], "(size,)")
    if bias is not None:
        check_tensor("bias", bias)
        check_shape("bias", bias, x.shape[-1:], "(size,)")
    if residual is not None:
        check_tensor("residual", residual)
        check_shape("residual", residual, x.shape, "the shape of x")
        check_dtype("residual", residual, dtypes)
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is not None:
            check_device(name, tensor, x, "x")


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
    **newer,
) -> Tensor | tuple[Tensor, Tensor]:
    """`layer_norm_fn` with RMS normalisation, its arguments in the published order; `newer` are those after `*`."""
    return layer_norm_fn(x, weight, bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm=True, **newer)


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """What `rms_norm_fn` computes."""
    return layer_norm_ref(x, weight, bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm=True)


# --- registration ----------------------------------------------------------------------------------------------------


def _forward(x, residual, weight, bias, eps, is_rms_norm, total_dtype):
    return backends.pick(x).norm_forward(x, residual, weight, bias, eps, is_rms_norm, total_dtype)


def _backward(dout, dtotal, total, mean, scale, weight, bias, is_rms_norm, residual_dtype):
    kernels = backends.pick(dout)
    return kernels.norm_backward(dout, dtotal, total, mean, scale, weight, bias, is_rms_norm, residual_dtype)


def _fake_forward(x, residual, weight, bias, eps, is_rms_norm, total_dtype):
    rows, state_dtype = x.numel() // x.shape[-1], torch.float64 if x.dtype == torch.float64 else torch.float32
    out, total = x.new_empty(x.shape), x.new_empty(x.shape, dtype=total_dtype)
    return out, total, x.new_empty(rows, dtype=state_dtype), x.new_empty(rows, dtype=state_dtype)


def _fake_backward(dout, dtotal, total, mean, scale, weight, bias, is_rms_norm, residual_dtype):
    dresidual = dout.new_empty(0) if residual_dtype is None else dout.new_empty(dout.shape, dtype=residual_dtype)
    dbias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return dout.new_empty(dout.shape), dresidual, weight.new_empty(weight.shape), dbias


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    _, residual, weight, bias, ctx.eps, ctx.is_rms_norm, _ = inputs
    out, total, mean, scale = output
    ctx.set_materialize_grads(False)
    ctx.out_dtype, ctx.residual_dtype = out.dtype, None if residual is None else residual.dtype
    ctx.save_for_backward(total, mean, scale, weight, bias)


def _differentiate(ctx, dout: Tensor | None, dtotal: Tensor | None, _dmean, _dscale) -> tuple:
    total, mean, scale, weight, bias = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(total, dtype=ctx.out_dtype)
    if torch.is_grad_enabled():
        given = total, weight, bias, ctx.eps, ctx.is_rms_norm
        dx, dweight, dbias, *_ = gradients_by_reference(_normalise, given, (dout.to(total.dtype),))
        dx = dtotal if dx is None else dx if dtotal is None else dx + dtotal
        dresidual = None if ctx.residual_dtype is None or dx is None else dx.to(ctx.residual_dtype)
        return None if dx is None else dx.to(ctx.out_dtype), dresidual, dweight, dbias, None, None, None
    dx, dresidual, dweight, dbias = torch.ops.mamba_ssm.add_norm_backward(
        dout, dtotal, total, mean, scale, weight, bias, ctx.is_rms_norm, ctx.residual_dtype
    )
    dresidual, dbias = None if ctx.residual_dtype is None else dresidual, None if bias is None else dbias
    return dx, dresidual, dweight, dbias, None, None, None


OPERATORS.register(
    "add_norm(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, bool is_rms_norm,"
    " ScalarType total_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    save=_save,
    differentiate=_differentiate,
)
OPERATORS.register(
    "add_norm_backward(Tensor dout, Tensor? dtotal, Tensor total, Tensor mean, Tensor scale, Tensor weight,"
    " Tensor? bias, bool is_rms_norm, ScalarType? residual_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
