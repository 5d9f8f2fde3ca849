"""Residual addition and normalisation of the C++ kernel set; `csrc/norm_abi.h` has the layout of what is passed."""

from __future__ import annotations

import torch
from causal_conv1d.layout import address, float32, rows
from causal_conv1d.native import DTYPE_CODES, bits
from mamba_ssm.kernels.cpp.library import LIBRARY
from torch import Tensor


def _described(x: Tensor | None) -> tuple[int, int, int]:
    """A (rows, size) tensor, as `Rows` of norm_abi.h."""
    return (0, 0, 0) if x is None else (x.data_ptr(), DTYPE_CODES[x.dtype], x.stride(0))


def norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    is_rms_norm: bool,
    total_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.empty_like(x, dtype=total_dtype, memory_format=torch.contiguous_format)
    count = x.numel() // max(1, x.shape[-1])
    mean, scale = (x.new_empty(count, dtype=torch.float32) for _ in range(2))
    if x.numel():
        x, residual = rows(x), None if residual is None else rows(residual)
        weight, bias = float32(weight), float32(bias)
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
        LIBRARY.call("mamba_norm", arguments)
    return out, total, mean, scale


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
    dx = torch.empty_like(dout, memory_format=torch.contiguous_format)
    dresidual = dout.new_empty(0 if residual_dtype is None else dout.shape, dtype=residual_dtype)
    dweight, dbias = (weight.new_empty(0 if x is None else x.shape, dtype=torch.float32) for x in (weight, bias))
    if dout.numel():
        dout, total, dtotal = rows(dout), rows(total), None if dtotal is None else rows(dtotal)
        wide = float32(weight)
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
        LIBRARY.call("mamba_norm", arguments)
    else:
        dweight.zero_(), dbias.zero_()
    return dx, dresidual, dweight.to(weight.dtype), dbias.to((weight if bias is None else bias).dtype)
