"""Residual addition and normalisation of the C++ kernel set; `csrc/norm_abi.h` has the layout of what is passed."""

from __future__ import annotations

import struct

import torch
from causal_conv1d.native import DTYPE_CODES, address, call
from torch import Tensor

NORM_FIELDS = 5 + 4 * 3 + 4 + 4 * 3 + 2
_ABSENT = (0, 0, 0)


def _rows(x: Tensor) -> Tensor:
    """(..., size) as (rows, size) with stride 1 along size, copied only if there is no such view."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _described(rows: Tensor | None) -> tuple[int, int, int]:
    return _ABSENT if rows is None else (rows.data_ptr(), DTYPE_CODES[rows.dtype], rows.stride(0))


def _float32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()


def norm_forward(
    library,
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
        x, residual = _rows(x), None if residual is None else _rows(residual)
        weight, bias = _float32(weight), _float32(bias)
        (eps_bits,) = struct.unpack("q", struct.pack("d", eps))
        fields = (
            *(count, x.shape[1], is_rms_norm, eps_bits, torch.get_num_threads()),
            *_described(x),
            *_described(residual),
            *_described(_rows(out)),
            *_described(_rows(total)),
            *(weight.data_ptr(), address(bias), mean.data_ptr(), scale.data_ptr()),
            *(_ABSENT * 4),
            *(0, 0),
        )
        call(library.mamba_norm, fields)
    return out, total, mean, scale


def norm_backward(
    library,
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
        dout, total, dtotal = _rows(dout), _rows(total), None if dtotal is None else _rows(dtotal)
        wide = _float32(weight)
        fields = (
            *(*dout.shape, is_rms_norm, 0, torch.get_num_threads()),
            *(_ABSENT * 3),
            *_described(total),
            *(wide.data_ptr(), 0, mean.data_ptr(), scale.data_ptr()),
            *_described(dout),
            *_described(dtotal),
            *_described(_rows(dx)),
            *_described(None if residual_dtype is None else _rows(dresidual)),
            *(dweight.data_ptr(), 0 if bias is None else dbias.data_ptr()),
        )
        call(library.mamba_norm, fields)
    else:
        dweight.zero_(), dbias.zero_()
    return dx, dresidual, dweight.to(weight.dtype), dbias.to((weight if bias is None else bias).dtype)
