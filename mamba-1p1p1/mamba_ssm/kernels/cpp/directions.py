"""A mixer between its projections, of the C++ kernel set: sums are taken where they are written, and no tensor is
joined from parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ctypes import Structure

import torch
from causal_conv1d.kernels import cpp as conv
from causal_conv1d.layout import address, addresses, all_float32, channel_last, float32
from causal_conv1d.native import bits, tokens_of
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


def can_mask(xz: Tensor, directions: Sequence[Direction]) -> bool:
    """Whether `directions_forward` and `directions_backward` take a mask."""
    return (_is_widened(xz) or xz.dtype == torch.float32) and _are_fit(directions)


def directions_forward(
    xz: Tensor,
    directions: Sequence[Direction],
    share: float,
    save_states: bool,
    log_decay: bool,
    mask: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(out, x_dbl of each direction, saved states of each direction); with `log_decay`, `A` is log(-A)."""
    if _is_widened(xz):
        out, x_dbls, states = directions_forward(xz.float(), directions, share, save_states, log_decay, mask)
        return out.to(xz.dtype), [x_dbl.to(xz.dtype) for x_dbl in x_dbls], states
    xz = channel_last(xz)
    batch, seqlen, width = xz.shape
    if _fits_in_one(xz, directions):
        x, z = xz.chunk(2, dim=-1)
        return forward_in_one([x] * len(directions), z, directions, share, save_states, log_decay, mask)
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


def _is_widened(xz: Tensor) -> bool:
    """Whether 16 bits go through float32: where that is one call, or where the processor does not multiply them."""
    return xz.dtype != torch.float32 and (products.PREFER_OWN_NARROW or xz.dtype in products.WIDENED)


def _fits_in_one(xz: Tensor, directions: Sequence[Direction]) -> bool:
    """Whether `forward_in_one` and `backward_in_one` do it: float32, directions of equal sizes, and where the own
    products are preferred."""
    return xz.dtype == torch.float32 and _are_fit(directions)


def _are_fit(directions: Sequence[Direction]) -> bool:
    sizes = [(each.dt_proj_weight.shape[1], each.A.shape[1], each.conv_weight.shape[1]) for each in directions]
    return all(size == sizes[0] for size in sizes) and (products.PREFER_OWN or products.PREFER_OWN_NARROW)


NO_TOKENS = 0, 0, 0


def told_of_directions(
    sizes: tuple[int, int, int],
    directions: Sequence[Direction],
    x_dbls: Sequence[Tensor | None],
    states: Sequence[Tensor | None],
    share: float,
    log_decay: bool,
    xs: Sequence[Tensor] | None = None,
    z: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[dict, list[tuple[Tensor | None, ...]]]:
    """The library's arguments of both ways, of sizes (batch, seqlen, dim) and each direction's x of these, and what has
    to live as long as it works with them."""
    alive, weights, tokens = [], [], [NO_TOKENS] * len(directions) if xs is None else map(tokens_of, xs)
    for x, x_dbl, kept, (*tensors, reverse) in zip(tokens, x_dbls, states, directions):
        given = conv, _, _, dt_proj, _, A, _, _, _ = *all_float32(tensors), x_dbl, kept
        weights.append(LIBRARY.structs.DirectionWeights(x, reverse, *addresses(given)))
        alive.append(given)
    mask = float32(mask)
    alive.append((mask,))
    batch, seqlen, dim = sizes
    told = dict(
        batch=batch,
        dim=dim,
        seqlen=seqlen,
        dstate=A.shape[1],
        rank=dt_proj.shape[1],
        width=0 if conv is None else conv.shape[1],
        directions=len(directions),
        threads=torch.get_num_threads(),
        interval=interval_of(A.shape[1]),
        log_decay=log_decay,
        share=bits(share),
        mask=address(mask),
        z=NO_TOKENS if z is None else tokens_of(z),
        first=weights[0],
        second=weights[-1],
    )
    return told, alive


def forward_in_one(
    xs: Sequence[Tensor],
    z: Tensor | None,
    directions: Sequence[Direction],
    share: float,
    save_states: bool,
    log_decay: bool,
    mask: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """`directions_forward` in one call of the library with its own products: image by image, so that what is between
    the steps stays in the cache. Each direction has an x of its own (batch, seqlen, dim), contiguous where there is no
    convolution; without z there is no gate."""
    sizes, out = xs[0].shape, xs[0].new_empty(xs[0].shape)
    x_dbls, states = kept_of_directions(out, sizes, directions, save_states)
    kept = states if save_states else [None] * len(states)
    told, alive = told_of_directions(sizes, directions, x_dbls, kept, share, log_decay, xs, z, mask)
    LIBRARY.call("mamba_directions", LIBRARY.structs.DirectionsArgs(**told, out=address(out)))
    del alive
    return out, x_dbls, states


def kept_of_directions(
    like: Tensor, sizes: tuple[int, int, int], directions: Sequence[Direction], save_states: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """New (x_dbl of each direction, saved states of each direction) for sizes (batch, seqlen, dim), on the device of
    `like`."""
    batch, seqlen, dim = sizes
    x_dbls = [like.new_empty(batch, seqlen, each.x_proj_weight.shape[0]) for each in directions]
    shapes = [states_shape(batch, dim, seqlen, each.A.shape[1]) if save_states else (0,) for each in directions]
    return x_dbls, [like.new_empty(shape) for shape in shapes]


def backward_in_one(
    dout: Tensor,
    xs: Sequence[Tensor],
    z: Tensor | None,
    directions: Sequence[Direction],
    x_dbls: Sequence[Tensor],
    states: Sequence[Tensor],
    share: float,
    log_decay: bool,
    dxs: Sequence[Tensor],
    dz: Tensor | None,
    mask: Tensor | None = None,
) -> list[Tensor | None]:
    """Gradients of each direction's tensors, and the mask's if there is one; those of x and z go to `dxs` and `dz`,
    strided like x and z or not."""
    structs, dout = LIBRARY.structs, channel_last(dout.float())
    grads, written = gradients_of_directions(directions, map(tokens_of, dxs))
    told, alive = told_of_directions(xs[0].shape, directions, x_dbls, states, share, log_decay, xs, z, mask)
    dmask = None if mask is None else torch.zeros_like(mask, dtype=torch.float32, memory_format=torch.contiguous_format)
    arguments = structs.DirectionsBackwardArgs(
        forward=structs.DirectionsArgs(**told),
        dout=tokens_of(dout),
        dz=NO_TOKENS if dz is None else tokens_of(dz),
        dmask=address(dmask),
        first=written[0],
        second=written[-1],
    )
    LIBRARY.call("mamba_directions_backward", arguments)
    del alive
    return grads if mask is None else [*grads, dmask]


def gradients_of_directions(
    directions: Sequence[Direction], tokens: Iterable[tuple[int, int, int]]
) -> tuple[list[Tensor | None], list[Structure]]:
    """New gradients of the directions' tensors, one after the other, and the library's arguments for them and for
    `tokens`, those of each x."""
    grads, written = [], []
    for dx, each in zip(tokens, directions):
        own = [None if x is None else x.new_empty(x.shape, dtype=torch.float32) for x in each[:DIRECTION_TENSORS]]
        written.append(LIBRARY.structs.DirectionGradients(dx, *addresses(own)))
        grads += own
    return grads, written


def directions_backward(
    dout: Tensor,
    xz: Tensor,
    directions: Sequence[Direction],
    x_dbls: Sequence[Tensor],
    states: Sequence[Tensor],
    share: float,
    log_decay: bool,
    mask: Tensor | None = None,
) -> list[Tensor | None]:
    """Gradients of xz and of each direction's tensors, and the mask's if there is one."""
    if _is_widened(xz):
        wide = [x_dbl.float() for x_dbl in x_dbls]
        return directions_backward(dout.float(), xz.float(), directions, wide, states, share, log_decay, mask)
    xz = channel_last(xz)
    if _fits_in_one(xz, directions):
        dxz = torch.empty_like(xz, memory_format=torch.contiguous_format)
        (x, z), (dx, dz) = xz.chunk(2, dim=-1), dxz.chunk(2, dim=-1)
        xs, dxs = [x] * len(directions), [dx] * len(directions)
        return [dxz, *backward_in_one(dout, xs, z, directions, x_dbls, states, share, log_decay, dxs, dz, mask)]
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
