"""A mixer between its projections, of the C++ kernel set: sums are taken where they are written, and no tensor is
joined from parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from causal_conv1d.kernels import cpp as conv
from causal_conv1d.layout import address, channel_last, float32
from causal_conv1d.native import bits
from mamba_ssm.kernels import products
from mamba_ssm.kernels.arguments import DIRECTION_TENSORS, Direction, Scan, ScanGradients, split_matrices, with_rates
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


def _told(
    xz: Tensor,
    directions: Sequence[Direction],
    x_dbls: Sequence[Tensor],
    states: Sequence[Tensor],
    share: float,
    log_decay: bool,
) -> tuple[dict, list[tuple[Tensor | None, ...]]]:
    """The library's arguments of both ways, and what has to live as long as it works with them."""
    alive, weights = [], []
    for *tensors, reverse in directions:
        conv, conv_bias, x_proj, dt_proj, dt_bias, A, D = (float32(tensor) for tensor in tensors)
        kept = states[len(alive)]
        given = conv, conv_bias, x_proj, dt_proj, dt_bias, A, D, x_dbls[len(alive)], kept if kept.numel() else None
        weights.append(LIBRARY.structs.DirectionWeights(reverse, *map(address, given)))
        alive.append(given)
    told = dict(
        batch=xz.shape[0],
        dim=xz.shape[2] // 2,
        seqlen=xz.shape[1],
        dstate=A.shape[1],
        rank=dt_proj.shape[1],
        width=conv.shape[1],
        directions=len(directions),
        threads=torch.get_num_threads(),
        interval=interval_of(A.shape[1]),
        log_decay=log_decay,
        share=bits(share),
        xz=address(xz),
        xz_batch_stride=xz.stride(0),
        xz_step_stride=xz.stride(1),
        first=weights[0],
        second=weights[-1],
    )
    return told, alive


def _in_one(
    xz: Tensor, directions: Sequence[Direction], share: float, save_states: bool, log_decay: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """`directions_forward` in one call of the library with its own products: image by image, so that what is between
    the steps stays in the cache."""
    (batch, seqlen, _), dim = xz.shape, xz.shape[2] // 2
    out, x_dbls, states = xz.new_empty(batch, seqlen, dim), [], []
    for each in directions:
        x_dbls.append(xz.new_empty(batch, seqlen, each.x_proj_weight.shape[0]))
        states.append(xz.new_empty(states_shape(batch, dim, seqlen, each.A.shape[1]) if save_states else (0,)))
    told, alive = _told(xz, directions, x_dbls, states, share, log_decay)
    LIBRARY.call("mamba_directions", LIBRARY.structs.DirectionsArgs(**told, out=address(out)))
    del alive
    return out, x_dbls, states


def _backward_in_one(
    dout: Tensor,
    xz: Tensor,
    directions: Sequence[Direction],
    x_dbls: Sequence[Tensor],
    states: Sequence[Tensor],
    share: float,
    log_decay: bool,
) -> list[Tensor | None]:
    """`directions_backward` in one call of the library."""
    structs, dout = LIBRARY.structs, channel_last(dout)
    dxz = torch.empty_like(xz, memory_format=torch.contiguous_format)
    grads, written = [dxz], []
    for each in directions:
        own = [None if x is None else x.new_empty(x.shape, dtype=torch.float32) for x in each[:DIRECTION_TENSORS]]
        place = each._fields.index("dt_proj_weight")
        own[place] = own[place].view(own[place].shape[::-1])
        written.append(structs.DirectionGradients(*map(address, own)))
        own[place] = own[place].t()
        grads += own
    told, alive = _told(xz, directions, x_dbls, states, share, log_decay)
    arguments = structs.DirectionsBackwardArgs(
        forward=structs.DirectionsArgs(**told),
        dout=address(dout),
        dout_batch_stride=dout.stride(0),
        dout_step_stride=dout.stride(1),
        dxz=address(dxz),
        first=written[0],
        second=written[-1],
    )
    LIBRARY.call("mamba_directions_backward", arguments)
    del alive
    return grads


def directions_backward(
    dout: Tensor,
    xz: Tensor,
    directions: Sequence[Direction],
    x_dbls: Sequence[Tensor],
    states: Sequence[Tensor],
    share: float,
    log_decay: bool,
) -> list[Tensor | None]:
    """Gradients of xz and of each direction's tensors."""
    xz = channel_last(xz)
    if dout.dtype == torch.float32 and _fits_in_one(xz, directions):
        return _backward_in_one(dout, xz, directions, x_dbls, states, share, log_decay)
    directions = with_rates(directions, log_decay)
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
        grads += [*dconv, dx_weight, ddt_weight, dbias, dA * direction.A if log_decay else dA, dD]
    return grads
