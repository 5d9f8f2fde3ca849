"""What a file of another kind can hold: operators of this package spelt in those that ONNX knows too."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from causal_conv1d.derivatives import is_exporting_onnx
from torch import Tensor


def scan_by_doubling(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """(out, last_state) of `selective_scan_fn` with real A, in log2(seqlen) steps on the whole sequence.

    After k steps `states` holds what the last 2^k inputs made of the state, and `decays` what is left of one from 2^k
    steps before (Hillis and Steele 1986).
    """
    dtype, length = torch.promote_types(u.dtype, torch.float32), u.shape[2]
    wide, dt = u.to(dtype), delta.to(dtype)
    dt = dt if delta_bias is None else dt + delta_bias.to(dtype)[:, None]
    dt = (F.softplus(dt) if delta_softplus else dt).unsqueeze(2)
    B, C = (_per_channel(matrix.to(dtype), u) for matrix in (B, C))
    decays, states = torch.exp(dt * A.to(dtype).unsqueeze(-1)), dt * B * wide.unsqueeze(2)  # (B, dim, dstate, L)
    for step in range(math.ceil(math.log2(max(length, 1)))):
        shift = 2**step
        earlier, pad = (slice(shift, None), (0, shift)) if reverse else (slice(None, length - shift), (shift, 0))
        states = states + decays * F.pad(states[..., earlier], pad)
        decays = decays * F.pad(decays[..., earlier], pad)
    y = (states * C).sum(2)
    y = y if D is None else y + D.to(dtype)[:, None] * wide
    y = y if z is None else y * F.silu(z.to(dtype))
    return y.to(u.dtype), states[..., 0 if reverse else -1]


def _per_channel(matrix: Tensor, u: Tensor) -> Tensor:
    """B or C in any of its forms -> (batch or 1, dim, dstate, seqlen or 1)."""
    if matrix.dim() == 2:
        return matrix[None, :, :, None]
    matrix = matrix.unsqueeze(1) if matrix.dim() == 3 else matrix
    return matrix.repeat_interleave(u.shape[1] // matrix.shape[1], 1)


def stable_argsort(x: Tensor, dim: int = -1, descending: bool = False) -> Tensor:
    """`x.argsort(stable=True)`; ONNX has no other than its TopK, which gives equal values in their order too."""
    if is_exporting_onnx():
        return torch.topk(x, x.shape[dim], dim, largest=descending, sorted=True).indices
    return x.argsort(dim=dim, descending=descending, stable=True)
