"""The convolution of the torch kernel set, accumulating in float32 (float64 for float64 tensors)."""

from __future__ import annotations

import torch
from torch import Tensor


def _accumulator_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _taps(width: int, seqlen: int, reverse: bool) -> list[tuple[int, slice, slice]]:
    """(tap, places it writes, places it reads) of every tap that reaches inside a sequence of `seqlen`."""
    taps = []
    for tap in range(width):
        shift = width - 1 - tap
        if shift < seqlen:
            late, early = slice(shift, None), slice(None, seqlen - shift)
            taps.append((tap, early, late) if reverse else (tap, late, early))
    return taps


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    """The convolution before its activation, in the accumulator's dtype and the layout of `x`."""
    x, weight = x.to(_accumulator_dtype(x)), weight.to(_accumulator_dtype(x))
    out = torch.zeros_like(x)
    if bias is not None:
        out += bias[:, None]
    for tap, write, read in _taps(weight.shape[1], x.shape[2], reverse):
        out[..., write].addcmul_(weight[:, tap, None], x[..., read])
    return out


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    out = _convolve(x, weight, bias, reverse)
    if silu:
        out = torch.nn.functional.silu(out)
    return torch.empty_like(x).copy_(out)


def conv_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad = dout.to(_accumulator_dtype(x))
    if silu:
        preactivation = _convolve(x, weight, bias, reverse)
        gate = torch.sigmoid(preactivation)
        grad = grad * gate * (1 + preactivation * (1 - gate))
    wide = x.to(grad.dtype)
    dx = torch.zeros_like(wide)
    dweight = torch.zeros_like(weight, dtype=grad.dtype, memory_format=torch.contiguous_format)
    for tap, write, read in _taps(weight.shape[1], x.shape[2], reverse):
        dx[..., read].addcmul_(weight[:, tap, None].to(grad.dtype), grad[..., write])
        dweight[:, tap] = (grad[..., write] * wide[..., read]).sum((0, 2))
    dbias = weight.new_empty(0) if bias is None else grad.sum((0, 2)).to(bias.dtype)
    return torch.empty_like(x).copy_(dx), dweight.to(weight.dtype), dbias


def conv_update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    conv_state.copy_(torch.cat([conv_state[:, :, 1:], x.unsqueeze(-1).to(conv_state.dtype)], dim=2))
    dtype = _accumulator_dtype(x)
    out = (conv_state.to(dtype) * weight.to(dtype)).sum(-1)
    if bias is not None:
        out = out + bias.to(dtype)
    return (torch.nn.functional.silu(out) if silu else out).to(x.dtype)
