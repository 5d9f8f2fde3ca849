"""`directions.py` of the C++ kernel set: sums are taken where they are written, and no tensor is joined from parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from mamba_ssm.ops.linear import linear, linear_into, weight_gradient
from torch import Tensor

if TYPE_CHECKING:
    from mamba_ssm.ops.directions import Direction


def _views(x_dbl: Tensor, direction: Direction) -> tuple[Tensor, Tensor, Tensor]:
    """dt (batch, seqlen, dt_rank) and B, C (batch, 1, dstate, seqlen) of x_dbl (batch, seqlen, dt_rank + 2*dstate)."""
    dstate = direction.A.shape[1]
    dt, B, C = x_dbl.split([x_dbl.shape[2] - 2 * dstate, dstate, dstate], dim=2)
    return dt, B.transpose(1, 2).unsqueeze(1), C.transpose(1, 2).unsqueeze(1)


def _channel_last(xz: Tensor) -> Tensor:
    return xz if xz.stride(2) == 1 else xz.contiguous()


def _convolved(conv, x: Tensor, direction: Direction) -> Tensor:
    """silu(conv(x)), (batch, seqlen, dim)."""
    out = conv.conv_forward(x, direction.conv_weight, direction.conv_bias, True, direction.reverse)
    return out.transpose(1, 2)


def forward(
    kernels, conv, xz: Tensor, directions: Sequence[Direction], share: float, save_states: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(out, x_dbl of each direction, saved states of each direction)."""
    xz = _channel_last(xz)
    batch, seqlen, width = xz.shape
    x, z = xz.transpose(1, 2).chunk(2, dim=1)
    out = xz.new_empty(batch, seqlen, width // 2)
    x_dbls, states = [], []
    for number, direction in enumerate(directions):
        u = _convolved(conv, x, direction)
        x_dbl = linear(u, direction.x_proj_weight.to(u.dtype))
        dt, B, C = _views(x_dbl, direction)
        delta = linear(dt, direction.dt_proj_weight.to(u.dtype)).transpose(1, 2)
        shape = kernels.states_shape(batch, width // 2, seqlen, direction.A.shape[1]) if save_states else (0,)
        kept = xz.new_empty(shape, dtype=torch.float32)
        last = number == len(directions) - 1
        scan = (u.transpose(1, 2), delta, direction.A, B, C, direction.D, z if last else None, direction.dt_bias)
        kernels.scan_into(
            out.transpose(1, 2),
            None,
            kept,
            (*scan, True, direction.reverse),
            accumulate=number > 0,
            share=share if last else 1.0,
        )
        x_dbls.append(x_dbl)
        states.append(kept)
    return out, x_dbls, states


def backward(
    kernels,
    conv,
    dout: Tensor,
    xz: Tensor,
    directions: Sequence[Direction],
    x_dbls: Sequence[Tensor],
    states: Sequence[Tensor],
    share: float,
) -> list[Tensor | None]:
    """Gradients of xz and of each direction's tensors."""
    xz = _channel_last(xz)
    x, z = xz.transpose(1, 2).chunk(2, dim=1)
    dxz = torch.empty_like(xz, memory_format=torch.contiguous_format)
    dx, dz = dxz.transpose(1, 2).chunk(2, dim=1)
    dout, grads = dout.to(xz.dtype).transpose(1, 2), [dxz]
    for number, (direction, x_dbl, kept) in enumerate(zip(directions, x_dbls, states)):
        u = _convolved(conv, x, direction)
        x_weight, dt_weight = direction.x_proj_weight.to(u.dtype), direction.dt_proj_weight.to(u.dtype)
        dt, B, C = _views(x_dbl, direction)
        delta = linear(dt, dt_weight)
        du, ddelta, dx_dbl = torch.empty_like(u), torch.empty_like(delta), torch.empty_like(x_dbl)
        ddt, dB, dC = _views(dx_dbl, direction)
        dbias, dA, dD = (
            None if p is None else p.new_empty(p.shape, dtype=torch.float32)
            for p in (direction.dt_bias, direction.A, direction.D)
        )
        scan = (u.transpose(1, 2), delta.transpose(1, 2), direction.A, B, C, direction.D, z, direction.dt_bias)
        wanted = (du.transpose(1, 2), ddelta.transpose(1, 2), dA, dB, dC, dD, dz, dbias)
        kernels.scan_backward_into(
            kernels.ScanGradients(*wanted),
            dout,
            (*scan, True, direction.reverse),
            kept,
            accumulate=number > 0,
            share=share,
        )
        linear_into(ddt, ddelta, dt_weight.t())
        ddt_weight, dx_weight = weight_gradient(ddelta, dt), weight_gradient(dx_dbl, u)
        linear_into(du, dx_dbl, x_weight.t(), accumulate=True)
        dconv = conv.conv_backward_into(
            dx,
            du.transpose(1, 2),
            x,
            direction.conv_weight,
            direction.conv_bias,
            True,
            direction.reverse,
            accumulate=number > 0,
        )
        grads += [*dconv, dx_weight, ddt_weight, dbias, dA, dD]
    return grads
