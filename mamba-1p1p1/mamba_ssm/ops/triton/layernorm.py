"""Residual addition and normalisation under the import path the Vim family uses. Nothing here needs Triton."""

from __future__ import annotations

import torch
from mamba_ssm.ops.norm import layer_norm_fn, layer_norm_ref, rms_norm_fn, rms_norm_ref
from torch import Tensor, nn

__all__ = ["RMSNorm", "layer_norm_fn", "layer_norm_ref", "rms_norm_fn", "rms_norm_ref"]


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension, optionally adding a residual first.

    Raises:
        NotImplementedError: `dropout_p` or `zero_centered_weight` of later releases is more than named.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        device=None,
        dtype=None,
        *,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
    ) -> None:
        super().__init__()
        if dropout_p or zero_centered_weight:
            given = f"dropout_p is {dropout_p} and zero_centered_weight {zero_centered_weight}"
            raise NotImplementedError(f"{given}, wanted 0 and False: rms_norm_fn has both")
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
