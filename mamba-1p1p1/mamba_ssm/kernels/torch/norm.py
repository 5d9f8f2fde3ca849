"""Residual addition and normalisation of the torch kernel set, in float32 (float64 for float64 tensors)."""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    is_rms_norm: bool,
    total_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = _wide(x) if residual is None else _wide(x) + residual
    rows = wide.reshape(-1, x.shape[-1])
    mean = rows.new_zeros(rows.shape[0]) if is_rms_norm else rows.mean(1)
    centered = rows - mean[:, None]
    scale = torch.rsqrt(centered.square().mean(1) + eps)
    out = centered * scale[:, None] * weight
    if bias is not None:
        out = out + bias
    total = wide.to(total_dtype, memory_format=torch.contiguous_format)
    return out.to(x.dtype).reshape(x.shape), total.clone() if total is x else total, mean, scale


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
    size = total.shape[-1]
    dout_rows = _wide(dout).reshape(-1, size)
    normal = (_wide(total).reshape(-1, size) - mean[:, None]) * scale[:, None]
    grad = dout_rows * weight
    slope = grad - normal * (grad * normal).mean(1, keepdim=True)
    if not is_rms_norm:
        slope = slope - grad.mean(1, keepdim=True)
    dx = (slope * scale[:, None]).reshape(dout.shape)
    if dtotal is not None:
        dx = dx + dtotal
    dweight = (dout_rows * normal).sum(0).to(weight.dtype)
    dbias = weight.new_empty(0) if bias is None else dout_rows.sum(0).to(bias.dtype)
    dresidual = dout.new_empty(0) if residual_dtype is None else dx.to(residual_dtype, copy=True)
    return dx.to(dout.dtype), dresidual, dweight, dbias
