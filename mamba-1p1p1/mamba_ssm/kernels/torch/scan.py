"""The selective scan of the torch kernel set, with the state in float32 (float64 for float64 tensors).

It walks time in chunks. Within a chunk all decays and inputs are computed at once, the recurrence is one fused
multiply-add per step over (batch, dim, dstate), and everything else is vectorised over the chunk again. Nothing is
divided by a running product of decays, so nothing overflows that the recurrence itself would not. Memory beyond inputs
and outputs is bounded by `CHUNK_ELEMENTS`, whatever the sequence length, plus one state per chunk for backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 1 << 21
MAX_CHUNK = 64


def states_shape(batch: int, dim: int, seqlen: int, dstate: int) -> tuple[int, ...]:
    """Shape of the float32 tensor a forward scan leaves for its backward: none here, backward starts again."""
    return (0,)


class _Scan(NamedTuple):
    """Time-major views of a scan's arguments, (seqlen, batch, groups, dim/groups, dstate or 1), in scan order."""

    u: Tensor
    dt_raw: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    delta_softplus: bool
    chunk: int

    def chunks(self) -> list[slice]:
        seqlen = self.u.shape[0]
        return [slice(start, min(start + self.chunk, seqlen)) for start in range(0, seqlen, self.chunk)]

    def step_sizes(self, times: slice) -> Tensor:
        raw = self.dt_raw[times]
        return F.softplus(raw) if self.delta_softplus else raw

    def read(self, matrix: Tensor, times: slice) -> Tensor:
        return matrix if matrix.shape[0] == 1 else matrix[times]


def _state_dtype(u: Tensor) -> torch.dtype:
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def _prepare(u, delta, A, B, C, delta_bias, delta_softplus, reverse) -> _Scan:
    (batch, dim, seqlen), dstate, dtype = u.shape, A.shape[1], _state_dtype(u)
    groups = next((matrix.shape[1] for matrix in (B, C) if matrix.dim() == 4), 1)

    def rows(x: Tensor) -> Tensor:
        x = x.flip(-1) if reverse else x
        return x.to(dtype).permute(2, 0, 1).reshape(seqlen, batch, groups, dim // groups, 1)

    def matrices(matrix: Tensor) -> Tensor:
        matrix = matrix.to(dtype)
        if matrix.dim() == 2:
            return matrix.reshape(1, 1, groups, dim // groups, dstate)
        if seqlen == 1:  # one step and a constant look alike to `read`, and mean the same
            return matrix.permute(3, 0, 1, 2).unsqueeze(3)
        return (matrix.flip(-1) if reverse else matrix).permute(3, 0, 1, 2).unsqueeze(3)

    dt_raw = rows(delta)
    if delta_bias is not None:
        dt_raw = dt_raw + delta_bias.to(dtype).reshape(groups, dim // groups, 1)
    chunk = max(1, min(MAX_CHUNK, CHUNK_ELEMENTS // max(1, batch * dim * dstate)))
    decay = A.to(dtype).reshape(groups, dim // groups, dstate)
    return _Scan(rows(u), dt_raw, decay, matrices(B), matrices(C), delta_softplus, chunk)


def _states(scan: _Scan, times: slice, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decays and states of one chunk, (steps, batch, groups, dim/groups, dstate), and the step sizes they came from."""
    dt = scan.step_sizes(times)
    decays = torch.exp(dt * scan.A)
    states = dt * scan.u[times] * scan.read(scan.B, times)
    for step in range(decays.shape[0]):
        state = torch.addcmul(states[step], decays[step], state, out=states[step])
    return decays, states, dt


def _time_last(rows: Tensor, like: Tensor, reverse: bool, dtype: torch.dtype | None = None) -> Tensor:
    """(seqlen, batch, ...) rows in scan order -> (batch, dim, seqlen) in the layout and dtype of `like`."""
    rows = rows.flip(0) if reverse else rows
    return torch.empty_like(like, dtype=dtype).copy_(rows.reshape(like.shape[2], *like.shape[:2]).permute(1, 2, 0))


def _gradient_of_matrix(grad: Tensor, matrix: Tensor, reverse: bool) -> Tensor:
    if matrix.dim() == 2:
        return grad.reshape(matrix.shape).to(matrix.dtype)
    grad = grad.flip(0) if reverse else grad
    return grad.squeeze(3).permute(1, 2, 3, 0).to(matrix.dtype, copy=True, memory_format=torch.contiguous_format)


def scan_forward(
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
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    scan = _prepare(u, delta, A, B, C, delta_bias, delta_softplus, reverse)
    state = scan.u.new_zeros(*scan.u.shape[1:4], A.shape[1])
    y = torch.empty_like(scan.u, memory_format=torch.contiguous_format)
    for times in scan.chunks():
        _, states, _ = _states(scan, times, state)
        y[times] = (states * scan.read(scan.C, times)).sum(-1, keepdim=True)
        state = states[-1].clone()
    out = _time_last(y, u, reverse, scan.u.dtype)
    if D is not None:
        out.addcmul_(u.to(out.dtype), D.to(out.dtype)[:, None])
    if z is not None:
        out.mul_(F.silu(z.to(out.dtype)))
    return out.to(u.dtype), state.reshape(u.shape[0], *A.shape), u.new_empty(0, dtype=torch.float32)


def scan_backward(
    dout: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    states: Tensor,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    scan = _prepare(u, delta, A, B, C, delta_bias, delta_softplus, reverse)
    dtype = scan.u.dtype
    dy = dout.to(dtype)
    dz = z.new_empty(0) if z is not None else u.new_empty(0)
    if z is not None:
        dy = dy * F.silu(z.to(dtype))
    dy_rows = (dy.flip(-1) if reverse else dy).permute(2, 0, 1).reshape(scan.u.shape)

    starts = [scan.u.new_zeros(*scan.u.shape[1:4], A.shape[1])]
    chunks = scan.chunks()
    y = torch.empty_like(scan.u, memory_format=torch.contiguous_format) if z is not None else None
    for times in chunks if z is not None else chunks[:-1]:
        _, chunk_states, _ = _states(scan, times, starts[-1])
        if y is not None:
            y[times] = (chunk_states * scan.read(scan.C, times)).sum(-1, keepdim=True)
        starts.append(chunk_states[-1].clone())

    du, ddelta = (torch.empty_like(scan.u, memory_format=torch.contiguous_format) for _ in range(2))
    dA = torch.zeros_like(scan.A)
    dB, dC = (torch.zeros_like(matrix, memory_format=torch.contiguous_format) for matrix in (scan.B, scan.C))
    carried = torch.zeros_like(starts[0])
    for times, start in reversed(list(zip(chunks, starts))):
        decays, chunk_states, dt = _states(scan, times, start)
        u_rows, dy_chunk = scan.u[times], dy_rows[times]
        B_rows, C_rows = scan.read(scan.B, times), scan.read(scan.C, times)
        dstates = dy_chunk * C_rows
        for step in range(dstates.shape[0] - 1, -1, -1):
            dstates[step] += carried
            carried = dstates[step] * decays[step]
        scan.read(dC, times).add_((dy_chunk * chunk_states).sum_to_size(C_rows.shape))
        scan.read(dB, times).add_((dstates * (dt * u_rows)).sum_to_size(B_rows.shape))
        input_grad = (dstates * B_rows).sum(-1, keepdim=True)
        du[times] = dt * input_grad
        decay_grad = decays.mul_(dstates).mul_(torch.cat([start.unsqueeze(0), chunk_states[:-1]]))
        ddt = (decay_grad * scan.A).sum(-1, keepdim=True) + u_rows * input_grad
        dA += (decay_grad * dt).sum((0, 1))
        if delta_softplus:
            raw = scan.dt_raw[times]
            ddt = torch.where(raw > 20, ddt, ddt * torch.sigmoid(raw))
        ddelta[times] = ddt

    du = _time_last(du, u, reverse, dtype)
    ddelta = _time_last(ddelta, delta, reverse, dtype)
    dD = u.new_empty(0)
    if D is not None:
        du.addcmul_(dy, D.to(dtype)[:, None])
        dD = (dy * u).sum((0, 2)).to(D.dtype)
    if z is not None:
        out = _time_last(y, u, reverse, dtype)
        if D is not None:
            out.addcmul_(u.to(dtype), D.to(dtype)[:, None])
        gate = torch.sigmoid(z.to(dtype))
        dz = torch.empty_like(z).copy_(dout.to(dtype) * out * gate * (1 + z.to(dtype) * (1 - gate)))
    ddelta_bias = u.new_empty(0) if delta_bias is None else ddelta.sum((0, 2)).to(delta_bias.dtype)
    return (
        du.to(u.dtype),
        ddelta.to(delta.dtype),
        dA.reshape(A.shape).to(A.dtype),
        _gradient_of_matrix(dB, B, reverse),
        _gradient_of_matrix(dC, C, reverse),
        dD,
        dz,
        ddelta_bias,
    )
