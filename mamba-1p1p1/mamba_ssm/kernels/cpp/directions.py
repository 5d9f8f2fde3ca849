"""A mixer between its projections, of the C++ kernel set: sums are taken where they are written, and no tensor is
joined from parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from causal_conv1d.kernels import cpp as conv
from causal_conv1d.layout import channel_last
from mamba_ssm.kernels.arguments import Direction, Scan, ScanGradients, split_matrices
from mamba_ssm.kernels.cpp.linear import product, product_into, weight_gradient
from mamba_ssm.kernels.cpp.scan import scan_backward_into, scan_into, states_shape
from torch import Tensor


def _convolved(x: Tensor, direction: Direction) -> Tensor:
    """silu(conv(x)), (batch, seqlen, dim)."""
    out = conv.conv_forward(x, direction.conv_weight, direction.conv_bias, True, direction.reverse)
    return out.transpose(1, 2)


def directions_forward(
    xz: Tensor, directions: Sequence[Direction], share: float, save_states: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(out, x_dbl of each direction, saved states of each direction)."""
    xz = channel_last(xz)
    batch, seqlen, width = xz.shape
    x, z = xz.transpose(1, 2).chunk(2, dim=1)
    out = xz.new_empty(batch, seqlen, width // 2)
    x_dbls, states = [], []
    for number, direction in enumerate(directions):
        u = _convolved(x, direction)
        x_dbl = product(u, direction.x_proj_weight.to(u.dtype))
        dt, B, C = split_matrices(x_dbl, direction.A.shape[1])
        delta = product(dt, direction.dt_proj_weight.to(u.dtype)).transpose(1, 2)
        shape = states_shape(batch, width // 2, seqlen, direction.A.shape[1]) if save_states else (0,)
        kept = xz.new_empty(shape, dtype=torch.float32)
        last = number == len(directions) - 1
        tensors = u.transpose(1, 2), delta, direction.A, B, C, direction.D, z if last else None, direction.dt_bias
        scan, factor = Scan(*tensors, True, direction.reverse), share if last else 1.0
        scan_into(out.transpose(1, 2), None, kept, scan, accumulate=number > 0, share=factor)
        x_dbls.append(x_dbl)
        states.append(kept)
    return out, x_dbls, states


def directions_backward(
    dout: Tensor,
    xz: Tensor,
    directions: Sequence[Direction],
    x_dbls: Sequence[Tensor],
    states: Sequence[Tensor],
    share: float,
) -> list[Tensor | None]:
    """Gradients of xz and of each direction's tensors."""
    xz = channel_last(xz)
    x, z = xz.transpose(1, 2).chunk(2, dim=1)
    dxz = torch.empty_like(xz, memory_format=torch.contiguous_format)
    dx, dz = dxz.transpose(1, 2).chunk(2, dim=1)
    dout, grads = dout.to(xz.dtype).transpose(1, 2), [dxz]
    for number, (direction, x_dbl, kept) in enumerate(zip(directions, x_dbls, states)):
        u = _convolved(x, direction)
        x_weight, dt_weight = direction.x_proj_weight.to(u.dtype), direction.dt_proj_weight.to(u.dtype)
        dt, B, C = split_matrices(x_dbl, direction.A.shape[1])
        delta = product(dt, dt_weight)
        du, ddelta, dx_dbl = torch.empty_like(u), torch.empty_like(delta), torch.empty_like(x_dbl)
        ddt, dB, dC = split_matrices(dx_dbl, direction.A.shape[1])
        dbias, dA, dD = (
            None if p is None else p.new_empty(p.shape, dtype=torch.float32)
            for p in (direction.dt_bias, direction.A, direction.D)
        )
        tensors = u.transpose(1, 2), delta.transpose(1, 2), direction.A, B, C, direction.D, z, direction.dt_bias
        scan = Scan(*tensors, True, direction.reverse)
        wanted = (du.transpose(1, 2), ddelta.transpose(1, 2), dA, dB, dC, dD, dz, dbias)
        scan_backward_into(ScanGradients(*wanted), dout, scan, kept, accumulate=number > 0, share=share)
        product_into(ddt, ddelta, dt_weight.t())
        ddt_weight, dx_weight = weight_gradient(ddelta, dt), weight_gradient(dx_dbl, u)
        product_into(du, dx_dbl, x_weight.t(), accumulate=True)
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
