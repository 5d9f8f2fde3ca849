"""Residual addition and normalisation in one call, under the import path the Vim family uses. Nothing here needs
Triton."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Add the residual, then normalise over the last dimension in float32.

    x (..., D) and residual (..., D) or None; weight (D,), bias (D,) or None. Returns the normalised sum (..., D) in x's
    dtype, with `prenorm` also the sum itself: float32 if `residual_in_fp32`, else in the residual's (or x's) dtype.
    LayerNorm as in Ba et al. 2016; RMSNorm (`is_rms_norm`) as in Zhang and Sennrich 2019.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; wanted {tuple(x.shape[-1:])}, the last dimension of x."
        )
    if bias is not None and bias.shape != weight.shape:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; wanted {tuple(weight.shape)}, that of weight.")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}; wanted {tuple(x.shape)}, that of x.")
    residual_dtype = torch.float32 if residual_in_fp32 else x.dtype if residual is None else residual.dtype
    total = x.float() if residual is None else x.float() + residual.float()
    weight_f, bias_f = weight.float(), None if bias is None else bias.float()
    if is_rms_norm:
        out = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * weight_f
        if bias_f is not None:
            out = out + bias_f
    else:
        out = F.layer_norm(total, weight.shape, weight_f, bias_f, eps)
    out = out.to(x.dtype)
    return (out, total.to(residual_dtype)) if prenorm else out


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """`layer_norm_fn` with RMS normalisation, its arguments in the published order."""
    return layer_norm_fn(x, weight, bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm=True)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension, optionally adding a residual first."""

    def __init__(self, hidden_size: int, eps: float = 1e-5, device=None, dtype=None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Set the scale back to one."""
        nn.init.ones_(self.weight)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        return rms_norm_fn(x, self.weight, self.bias, residual, prenorm, residual_in_fp32, self.eps)
