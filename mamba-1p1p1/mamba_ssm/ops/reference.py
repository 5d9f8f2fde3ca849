"""The selective scan as the loop it is: slow, obvious, and differentiable by autograd.

Gu and Dao 2023 (arXiv:2312.00752), equations 2 and 3 with the discretisation of section 3.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _real_dtype(u: Tensor) -> torch.dtype:
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def _per_channel(matrix: Tensor, u: Tensor, A: Tensor, pairs: bool) -> Tensor:
    """B or C in any of its forms -> (batch, dim, dstate, seqlen), complex if A is."""
    batch, dim, seqlen = u.shape
    if matrix.dim() == 2:
        return matrix.to(A.dtype)[None, :, :, None].expand(batch, dim, matrix.shape[1], seqlen)
    matrix = matrix.to(_real_dtype(u))
    if pairs:
        matrix = torch.view_as_complex(matrix.unflatten(-1, (seqlen, 2)).contiguous())
    matrix = matrix.unsqueeze(1) if matrix.dim() == 3 else matrix
    return matrix.repeat_interleave(dim // matrix.shape[1], dim=1)


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What `selective_scan_fn` computes, one step at a time, in float32 (float64 for float64 `u`).

    A may be complex64: B and C then hold (real, imaginary) pairs along the sequence, (..., 2*seqlen), or are complex
    (dim, dstate), and `y_t = 2 Re <C_t, h_t>`.
    """
    dtype, complex_state = _real_dtype(u), A.is_complex()
    A = A if complex_state else A.to(dtype)
    dt = delta.to(dtype)
    if delta_bias is not None:
        dt = dt + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        dt = F.softplus(dt)
    wide = u.to(dtype)
    B, C = (_per_channel(matrix, u, A, complex_state) for matrix in (B, C))

    state = A.new_zeros(u.shape[0], *A.shape)
    rows = []
    steps = list(zip(wide.unbind(2), dt.unbind(2), B.unbind(3), C.unbind(3)))
    for u_t, dt_t, B_t, C_t in reversed(steps) if reverse else steps:
        dt_t = dt_t.unsqueeze(-1)
        state = torch.exp(dt_t * A) * state + dt_t * B_t * u_t.unsqueeze(-1)
        rows.append((state * C_t).sum(-1))
    rows = rows[::-1] if reverse else rows
    y = torch.stack(rows, dim=-1) if rows else torch.zeros_like(wide)
    y = 2 * y.real if y.is_complex() else y
    if D is not None:
        y = y + D.to(dtype)[:, None] * wide
    if z is not None:
        y = y * F.silu(z.to(dtype))
    y = y.to(u.dtype)
    return (y, state.detach()) if return_last_state else y


def pooled_selective_scan_ref(
    u: Tensor,
    u_compressed: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What `pooled_selective_scan_fn` computes: the scan of the pooled tokens, each value repeated, plus `D * u`."""
    y, last_state = selective_scan_ref(
        u_compressed, delta, A, B, C, None, z, delta_bias, delta_softplus, return_last_state=True, reverse=reverse
    )
    out = y.to(_real_dtype(u)).repeat_interleave(u.shape[2] // u_compressed.shape[2], dim=2)
    if D is not None:
        out = out + D.to(out.dtype)[:, None] * u.to(out.dtype)
    out = out.to(u.dtype)
    return (out, last_state) if return_last_state else out
