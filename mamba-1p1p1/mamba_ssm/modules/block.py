"""A pre-norm residual block around a mixer, as language models of Mamba stack it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from mamba_ssm.modules.parts import is_plain
from mamba_ssm.ops.triton.layernorm import RMSNorm, layer_norm_fn
from torch import Tensor, nn


def add_norm(
    norm: nn.Module, hidden: Tensor, residual: Tensor | None, residual_in_fp32: bool, fused: bool
) -> tuple[Tensor, Tensor]:
    """The norm of hidden + residual, and that sum; in one operator if `fused` and the norm is as it was made."""
    if fused and is_plain(norm):
        rms = isinstance(norm, RMSNorm)
        given = hidden, norm.weight, norm.bias, residual, norm.eps, True, residual_in_fp32
        return layer_norm_fn(*given, is_rms_norm=rms)
    residual = hidden if residual is None else residual + hidden
    if residual_in_fp32:
        residual = residual.to(torch.float32)
    return norm(residual.to(norm.weight.dtype)), residual


class Block(nn.Module):
    """add -> norm -> mixer, and with `mlp_cls` add -> norm -> MLP: (B, L, dim) -> (B, L, dim) and the residual."""

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        mlp_cls: Callable[[int], nn.Module] = nn.Identity,
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.norm, self.mixer = norm_cls(dim), mixer_cls(dim)
        if mlp_cls is nn.Identity:
            self.mlp = None
        else:
            self.norm2, self.mlp = norm_cls(dim), mlp_cls(dim)

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None = None, inference_params=None, **mixer_kwargs
    ) -> tuple[Tensor, Tensor]:
        """hidden_states, residual (B, L, dim) -> the mixer's output, and the sum before its norm."""
        how = self.residual_in_fp32, self.fused_add_norm
        hidden_states, residual = add_norm(self.norm, hidden_states, residual, *how)
        hidden_states = self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            hidden_states, residual = add_norm(self.norm2, hidden_states, residual, *how)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None, **kwargs):
        """The mixer's."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)


class FirstBlock(Block):
    """`Block` as the first releases made it in `mamba_simple`: without an MLP, whose place has the norm."""

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__(dim, mixer_cls, nn.Identity, norm_cls, fused_add_norm, residual_in_fp32)
