"""Residual addition and normalisation in one call, under the import path the Vim family uses. Nothing here needs
Triton."""

from __future__ import annotations

import torch
from causal_conv1d.backend import KERNEL_DTYPES
from causal_conv1d.checks import check_device, check_dtype, check_shape, check_tensor
from mamba_ssm.ops import operators  # noqa: F401  (registers the operator)
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
    _check(x, weight, bias, residual)
    total_dtype = torch.float32 if residual_in_fp32 else x.dtype if residual is None else residual.dtype
    out, total, _, _ = torch.ops.mamba_ssm.add_norm(x, residual, weight, bias, eps, is_rms_norm, total_dtype)
    return (out, total) if prenorm else out


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
