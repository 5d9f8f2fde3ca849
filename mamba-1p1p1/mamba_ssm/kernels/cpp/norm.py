"""Residual addition and normalisation of the C++ kernel set; `csrc/norm_abi.h` has the layout of what is passed."""

from __future__ import annotations

import torch
from causal_conv1d.layout import address, float32, rows
from causal_conv1d.native import DTYPE_CODES, Call, bits
from mamba_ssm.kernels.cpp.library import LIBRARY
from torch import Tensor


def _described(x: Tensor | None) -> tuple[int, int, int]:
    """A (rows, size) tensor, as `Rows` of norm_abi.h."""
    return (0, 0, 0) if x is None else (x.data_ptr(), DTYPE_CODES[x.dtype], x.stride(0))


def norm_call(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    is_rms_norm: bool,
    total_dtype: torch.dtype,
    into: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Call]:
    """What `norm_forward` returns, in new memory or in that of `into`, and the call that fills it."""
    count = x.numel() // max(1, x.shape[-1])
    if into is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        total = torch.empty_like(x, dtype=total_dtype, memory_format=torch.contiguous_format)
        into = out, total, *(x.new_empty(count, dtype=torch.float32) for _ in range(2))
    out, total, mean, scale = into
    alive = x, residual, weight, bias = (
        rows(x),
        None if residual is None else rows(residual),
        float32(weight),
        float32(bias),
    )
    arguments = LIBRARY.structs.NormArgs(
        rows=count,
        size=x.shape[1],
        rms=is_rms_norm,
        eps=bits(eps),
        threads=torch.get_num_threads(),
        x=_described(x),
        residual=_described(residual),
        out=_described(rows(out)),
        total=_described(rows(total)),
        weight=address(weight),
        bias=address(bias),
        mean=address(mean),
        scale=address(scale),
    )
    return into, Call(LIBRARY, "mamba_norm", arguments, (alive, into))


def norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    is_rms_norm: bool,
    total_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results, call = norm_call(x, residual, weight, bias, eps, is_rms_norm, total_dtype)
    if x.numel():
        call()
    return results


def norm_backward_call(
    dout: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    is_rms_norm: bool,
    residual_dtype: torch.dtype | None,
    dx: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Call]:
    """What `norm_backward` returns, the gradient of x in new memory or in that of `dx`, those of weight and bias in
    float32; and the call that fills it."""
    dx = torch.empty_like(dout, memory_format=torch.contiguous_format) if dx is None else dx
    dresidual = dout.new_empty(0 if residual_dtype is None else dout.shape, dtype=residual_dtype)
    dweight, dbias = (weight.new_empty(0 if x is None else x.shape, dtype=torch.float32) for x in (weight, bias))
    alive = dout, total, dtotal, wide = (
        rows(dout),
        rows(total),
        None if dtotal is None else rows(dtotal),
        float32(weight),
    )
    count, size = dout.shape
    arguments = LIBRARY.structs.NormArgs(
        rows=count,
        size=size,
        rms=is_rms_norm,
        threads=torch.get_num_threads(),
        total=_described(total),
        weight=address(wide),
        mean=address(mean),
        scale=address(scale),
        dout=_described(dout),
        dtotal=_described(dtotal),
        dx=_described(rows(dx)),
        dresidual=_described(None if residual_dtype is None else rows(dresidual)),
        dweight=address(dweight),
        dbias=0 if bias is None else address(dbias),
    )
    results = dx, dresidual, dweight, dbias
    return results, Call(LIBRARY, "mamba_norm", arguments, (alive, mean, scale, results))


def norm_backward(
    dout: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    is_rms_norm: bool,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = dout, dtotal, total, mean, scale, weight, bias, is_rms_norm, residual_dtype
    (dx, dresidual, dweight, dbias), call = norm_backward_call(*given)
    if dout.numel():
        call()
    else:
        dweight.zero_(), dbias.zero_()
    return dx, dresidual, dweight.to(weight.dtype), dbias.to((weight if bias is None else bias).dtype)
