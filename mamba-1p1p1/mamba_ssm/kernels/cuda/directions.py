"""A mixer between its projections, of the CUDA kernel set: both directions are stacked in one tensor of each kind.

So they share one launch of the convolution, of each product and of every sum; the two scans run one after the other,
and the second adds to what the first left and gates the sum once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from causal_conv1d import _nvrtc
from causal_conv1d._nvrtc import CPP_TYPES
from causal_conv1d._reduce import add_up
from causal_conv1d.kernels.cuda import convolution
from causal_conv1d.kernels.cuda.convolution import Conv
from causal_conv1d.layout import channel_last
from mamba_ssm.kernels import composed
from mamba_ssm.kernels import torch as torch_kernels
from mamba_ssm.kernels.arguments import (
    DIRECTION_TENSORS,
    Direction,
    MixerSizes,
    Scan,
    ScanGradients,
    split_matrices,
    with_rates,
)
from mamba_ssm.kernels.cuda import ahead, scan
from mamba_ssm.kernels.cuda.scan import How, states_shape
from torch import Tensor


def can_stack(xz: Tensor, directions: Sequence[Direction]) -> bool:
    """Whether there are kernels for these directions, alike in all sizes."""
    first = directions[0]
    for other in directions[1:]:
        for one, two in zip(first[:DIRECTION_TENSORS], other[:DIRECTION_TENSORS]):
            if (one is None) != (two is None):
                return False
            if one is not None and (one.shape != two.shape or one.dtype != two.dtype):
                return False
    conv_known = all(t is None or t.dtype in CPP_TYPES for t in (first.conv_weight, first.conv_bias))
    return xz.dtype in CPP_TYPES and conv_known and 0 < first.A.shape[1] <= scan.MAX_DSTATE


def weights_size(directions: Sequence[Direction], dtype: torch.dtype) -> int:
    """Elements of the projections of all directions, where they are copied to be of one dtype and in one piece; else
    0."""
    first, count = directions[0], len(directions)
    weights = first.x_proj_weight, first.dt_proj_weight
    if count == 1 and all(weight.dtype == dtype for weight in weights):
        return 0
    return count * sum(weight.numel() for weight in weights)


class _Weights(NamedTuple):
    """The projections of all directions in one dtype, (directions, rows, dim) and (directions, dim, dt_rank), and the
    memory that they are views of, if they were copied."""

    x_proj: Tensor
    dt_proj: Tensor
    memory: Tensor | None

    @classmethod
    def of(cls, directions: Sequence[Direction], dtype: torch.dtype, memory: Tensor | None = None) -> _Weights:
        """Copied in one launch; `memory` has them already."""
        first, count = directions[0], len(directions)
        size = weights_size(directions, dtype)
        if size == 0:
            return cls(first.x_proj_weight.unsqueeze(0), first.dt_proj_weight.unsqueeze(0), None)
        weights = [weight for each in directions for weight in (each.x_proj_weight, each.dt_proj_weight)]
        flat = first.x_proj_weight.new_empty(size, dtype=dtype) if memory is None else memory
        parts = flat.split([count * weight.numel() for weight in weights[:2]])
        stacks = [part.view(count, *weight.shape) for part, weight in zip(parts, weights)]
        if memory is None:
            torch._foreach_copy_([stack[i] for i in range(count) for stack in stacks], weights)
        return cls(*stacks, flat)


def _convolved(x: Tensor, directions: Sequence[Direction]) -> Tensor:
    """silu(conv(x)) of every direction, (directions, batch, seqlen, dim), of x (batch, dim, seqlen)."""
    u = x.new_empty(len(directions), x.shape[0], x.shape[2], x.shape[1])
    convolution.forward_into(_convs(x, directions), u.transpose(2, 3).unbind())
    return u


def _convs(x: Tensor, directions: Sequence[Direction]) -> list[Conv]:
    return [Conv(x, each.conv_weight, each.conv_bias, True, each.reverse) for each in directions]


def _scans(
    u: Tensor, delta: Tensor, x_dbl: Tensor, directions: Sequence[Direction], gates: Sequence[Tensor | None]
) -> list[Scan]:
    """The directions' scans, out of stacked tensors."""
    scans = []
    for number, (each, gate) in enumerate(zip(directions, gates)):
        _, B, C = split_matrices(x_dbl[number], each.A.shape[1])
        rows = u[number].transpose(1, 2), delta[number].transpose(1, 2)
        scans.append(Scan(*rows, each.A, B, C, each.D, gate, each.dt_bias, True, each.reverse))
    return scans


def _forward_by_torch(
    xz: Tensor, directions: Sequence[Direction], share: float, save_states: bool, log_decay: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rates = with_rates(directions, log_decay)
    out, x_dbls, _ = composed.directions_forward(torch_kernels, xz, rates, share, False)
    (batch, seqlen, width), dstate = xz.shape, directions[0].A.shape[1]
    kept = (len(directions), *states_shape(batch, width // 2, seqlen, dstate)) if save_states else (0,)
    size = weights_size(directions, xz.dtype) if save_states else 0
    return out, torch.stack(tuple(x_dbls)), xz.new_empty(size), xz.new_empty(kept, dtype=torch.float32)


def _backward_by_torch(
    dout: Tensor,
    xz: Tensor,
    directions: Sequence[Direction],
    x_dbl: Tensor,
    memory: Tensor,
    states: Tensor,
    share: float,
    log_decay: bool,
) -> list[Tensor | None]:
    rates = with_rates(directions, log_decay)
    none = [states.new_empty(0)] * len(directions)
    grads = composed.directions_backward(torch_kernels, dout, xz, rates, x_dbl.unbind(), none, share)
    for number, rate in enumerate(rates if log_decay else ()):
        place = 1 + number * DIRECTION_TENSORS + Direction._fields.index("A")
        grads[place] = grads[place] * rate.A
    return grads


def _foretell(xz: Tensor, directions: Sequence[Direction], trains: bool) -> None:
    """Have all compiled that a model of such mixers needs."""
    first, (batch, seqlen, width) = directions[0], xz.shape
    taps = first.conv_weight.dtype, None if first.conv_bias is None else first.conv_bias.dtype
    sizes = batch, seqlen, width // 2, first.A.shape[1], taps, first.conv_weight.shape[1]
    mixer = MixerSizes(xz.dtype, *sizes, 1, first.D is not None, trains)
    ahead.foretell_stacked(xz.device.index, mixer, len(directions))


@_nvrtc.or_else(_forward_by_torch)
def stacked_forward(
    xz: Tensor, directions: Sequence[Direction], share: float, save_states: bool, log_decay: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, and for backward x_dbl (directions, batch, seqlen, dt_rank + 2 * dstate), the weights of the projections as
    they were multiplied with (`weights_size`), states (directions, *states_shape): the last two empty without
    `save_states`."""
    xz = channel_last(xz)
    (batch, seqlen, width), count, last = xz.shape, len(directions), len(directions) - 1
    dim, rank, dstate = width // 2, directions[0].dt_proj_weight.shape[1], directions[0].A.shape[1]
    _foretell(xz, directions, save_states)
    x, z = xz.transpose(1, 2).chunk(2, dim=1)
    weights, u = _Weights.of(directions, xz.dtype), _convolved(x, directions)
    x_dbl = torch.bmm(u.view(count, -1, dim), weights.x_proj.transpose(1, 2))
    delta = torch.bmm(x_dbl[..., :rank], weights.dt_proj.transpose(1, 2)).view_as(u)
    x_dbl = x_dbl.view(count, batch, seqlen, rank + 2 * dstate)
    kept = states_shape(batch, dim, seqlen, dstate) if save_states else (0,)
    states = xz.new_empty((count, *kept) if save_states else (0,), dtype=torch.float32)
    out = xz.new_empty(batch, seqlen, dim)
    gates = [z if number == last else None for number in range(count)]
    for number, each in enumerate(_scans(u, delta, x_dbl, directions, gates)):
        how = How(number > 0, log_decay, share if number == last else 1.0)
        own = states[number] if save_states else states
        scan.forward_into([each], [out.transpose(1, 2)], [None], [own], how)
    memory = weights.memory if save_states and weights.memory is not None else xz.new_empty(0)
    return out, x_dbl, memory, states


@_nvrtc.or_else(_backward_by_torch)
def stacked_backward(
    dout: Tensor,
    xz: Tensor,
    directions: Sequence[Direction],
    x_dbl: Tensor,
    memory: Tensor,
    states: Tensor,
    share: float,
    log_decay: bool,
) -> list[Tensor | None]:
    """Gradients of xz and of each direction's tensors."""
    xz = channel_last(xz)
    count, dim, rank = len(directions), xz.shape[2] // 2, directions[0].dt_proj_weight.shape[1]
    x, z = xz.transpose(1, 2).chunk(2, dim=1)
    dxz = torch.empty_like(xz, memory_format=torch.contiguous_format)
    dx, dz = dxz.transpose(1, 2).chunk(2, dim=1)
    dout = channel_last(dout.to(xz.dtype)).transpose(1, 2)
    weights, u = _Weights.of(directions, xz.dtype, memory if memory.numel() else None), _convolved(x, directions)
    flat = x_dbl.view(count, -1, x_dbl.shape[3])
    delta = torch.bmm(flat[..., :rank], weights.dt_proj.transpose(1, 2)).view_as(u)
    # a step size is read for the last time by the thread that then writes its gradient
    du, dx_dbl = xz.new_empty(u.numel() + x_dbl.numel()).split([u.numel(), x_dbl.numel()])
    du, ddelta, dx_dbl = du.view_as(u), delta, dx_dbl.view_as(x_dbl)
    device, sums, work, small = _nvrtc.device(xz.device.index), [], [], []
    for number, each in enumerate(_scans(u, delta, x_dbl, directions, [z] * count)):
        dA, dD, dbias = (None if t is None else torch.empty_like(t) for t in (each.A, each.D, each.delta_bias))
        _, dB, dC = split_matrices(dx_dbl[number], each.A.shape[1])
        grads = ScanGradients(du[number].transpose(1, 2), ddelta[number].transpose(1, 2), dA, dB, dC, dD, dz, dbias)
        how = How(number > 0, log_decay, share)
        own_sums, own_work = scan.backward_into([each], [dout], [states[number]], [grads], how)
        sums += own_sums
        work.append(own_work)
        small.append((dbias, dA, dD))
    add_up(device, sums)
    del work
    dx_flat, du_flat, ddelta_flat = dx_dbl.view_as(flat), du.view(count, -1, dim), ddelta.view(count, -1, dim)
    torch.bmm(ddelta_flat, weights.dt_proj, out=dx_flat[..., :rank])
    sizes = [stack.numel() for stack in weights[:2]]
    parts = xz.new_empty(sum(sizes)).split(sizes)
    x_weights, dt_weights = (part.view(stack.shape) for part, stack in zip(parts, weights))
    torch.bmm(ddelta_flat.transpose(1, 2), flat[..., :rank], out=dt_weights)
    torch.bmm(dx_flat.transpose(1, 2), u.view_as(du_flat), out=x_weights)
    du_flat.baddbmm_(dx_flat, weights.x_proj)
    convs = convolution.backward_into(du.transpose(2, 3).unbind(), _convs(x, directions), dx)
    own = [torch.empty_like(w) for each in directions for w in (each.x_proj_weight, each.dt_proj_weight)]
    torch._foreach_copy_(own, [stack[i] for i in range(count) for stack in (x_weights, dt_weights)])
    grads = [dxz]
    for number, (dconv, rest) in enumerate(zip(convs, small)):
        grads += [*dconv, *own[2 * number : 2 * number + 2], *rest]
    return grads
