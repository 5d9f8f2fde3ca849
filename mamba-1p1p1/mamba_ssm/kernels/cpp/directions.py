"""A mixer between its projections, of the C++ kernel set: sums are taken where they are written, and no tensor is
joined from parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from causal_conv1d.kernels import cpp as conv
from causal_conv1d.layout import address, channel_last, float32
from causal_conv1d.native import bits
from mamba_ssm.kernels import products
from mamba_ssm.kernels.arguments import Direction, Scan, ScanGradients, split_matrices, with_rates
from mamba_ssm.kernels.cpp.library import LIBRARY
from mamba_ssm.kernels.cpp.linear import product, product_into, weight_gradient
from mamba_ssm.kernels.cpp.scan import interval_of, scan_backward_into, scan_into, states_shape
from torch import Tensor


def _convolved(x: Tensor, direction: Direction) -> Tensor:
    """silu(conv(x)), (batch, seqlen, dim)."""
    out = conv.conv_forward(x, direction.conv_weight, direction.conv_bias, True, direction.reverse)
    return out.transpose(1, 2)


def directions_forward(
    xz: Tensor, directions: Sequence[Direction], share: float, save_states: bool, log_decay: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(out, x_dbl of each direction, saved states of each direction); with `log_decay`, `A` is log(-A)."""
    xz = channel_last(xz)
    batch, seqlen, width = xz.shape
    if _fits_in_one(xz, directions):
        return _in_one(xz, directions, share, save_states, log_decay)
    directions = with_rates(directions, log_decay)
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


def _fits_in_one(xz: Tensor, directions: Sequence[Direction]) -> bool:
    """Whether `_in_one` does it: float32, directions of equal sizes, and where the own products are preferred."""
    sizes = {(each.dt_proj_weight.shape[1], each.A.shape[1], each.conv_weight.shape[1]) for each in directions}
    return xz.dtype == torch.float32 and len(sizes) == 1 and (products.PREFER_OWN or products.PREFER_OWN_NARROW)


def _in_one(
    xz: Tensor, directions: Sequence[Direction], share: float, save_states: bool, log_decay: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The same in one call of the library, float32, with its own products: image by image, so that what is between the
    steps stays in the cache."""
    batch, seqlen, dim, structs = *xz.shape[:2], xz.shape[2] // 2, LIBRARY.structs
    out = xz.new_empty(batch, seqlen, dim)
    weights, x_dbls, states, alive = [], [], [], []
    for each in directions:
        *tensors, reverse = each
        conv, conv_bias, x_proj, dt_proj, dt_bias, A, D = (float32(tensor) for tensor in tensors)
        dstate, rank = A.shape[1], dt_proj.shape[1]
        x_dbl = xz.new_empty(batch, seqlen, rank + 2 * dstate)
        kept = xz.new_empty(states_shape(batch, dim, seqlen, dstate) if save_states else (0,))
        given = conv, conv_bias, x_proj, dt_proj, dt_bias, A, D, x_dbl, kept if kept.numel() else None
        weights.append(structs.DirectionWeights(reverse, *map(address, given)))
        alive.append(given)  # copies among them would be gone before they are read
        x_dbls.append(x_dbl)
        states.append(kept)
    arguments = structs.DirectionsArgs(
        batch=batch,
        dim=dim,
        seqlen=seqlen,
        dstate=dstate,
        rank=rank,
        width=conv.shape[1],
        directions=len(directions),
        threads=torch.get_num_threads(),
        interval=interval_of(dstate),
        log_decay=log_decay,
        share=bits(share),
        xz=address(xz),
        xz_batch_stride=xz.stride(0),
        xz_step_stride=xz.stride(1),
        out=address(out),
        first=weights[0],
        second=weights[-1],
    )
    LIBRARY.call("mamba_directions", arguments)
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
