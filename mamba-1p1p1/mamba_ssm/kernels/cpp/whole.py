"""Whole mixers of the C++ kernel set, float32: from in_proj to out_proj in one call of the library, and back in
another, image by image, so that what is between the steps stays in the cache; a pooled mixer's steps are calls of their
own where gradients are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from causal_conv1d.layout import address, channel_last, float32
from causal_conv1d.native import bits, tokens_of
from mamba_ssm.kernels.arguments import Direction, Ends, Lines, Projections, Taps, VisibleLines
from mamba_ssm.kernels.cpp.directions import NO_TOKENS, gradients_of_directions, kept_of_directions, told_of_directions
from mamba_ssm.kernels.cpp.library import LIBRARY
from mamba_ssm.kernels.cpp.linear import linear, linear_backward
from mamba_ssm.kernels.cpp.pooled import (
    lines_fields,
    pooled_conv,
    pooled_gate,
    pooled_scan_backward,
    pooled_scan_saving,
)
from mamba_ssm.kernels.cpp.visible import visible_conv_backward, visible_gate_backward
from torch import Tensor


def _ends_fields(x: Tensor, ends: Ends, out: Tensor) -> dict:
    """What every whole mixer is told of its outside; `ends` are float32 and contiguous, as `out`."""
    in_proj, in_bias, out_proj, out_bias = map(address, ends)
    return {
        "width": x.shape[2],
        "x": tokens_of(x),
        "in_proj": (in_proj, in_bias),
        "out_proj": (out_proj, out_bias),
        "out": address(out),
    }


def mixer(
    x: Tensor, ends: Ends, directions: Sequence[Direction], share: float, save: bool
) -> tuple[Tensor, list[Tensor]]:
    """x (batch, seqlen, width) -> the same, and what its gradient is computed from if that is to be saved: xz (batch,
    seqlen, 2*dim), y (batch, seqlen, dim) before its gate, x_dbl of each direction, saved states of each direction.
    `A` of the directions, which are of equal sizes, is log(-A)."""
    x, out, ends = channel_last(x), x.new_empty(x.shape), Ends(*map(float32, ends))
    batch, seqlen, _ = x.shape
    sizes, nothing = (batch, seqlen, ends.out_proj.shape[1]), [None] * len(directions)
    if save:
        xz, y = x.new_empty(batch, seqlen, 2 * sizes[2]), x.new_empty(sizes)
        x_dbls, states = kept_of_directions(x, sizes, directions, True)
    else:
        xz, y, x_dbls, states = None, None, nothing, nothing
    between, alive = told_of_directions(sizes, directions, x_dbls, states, share, True)
    arguments = LIBRARY.structs.MixerArgs(
        between=LIBRARY.structs.DirectionsArgs(**between), **_ends_fields(x, ends, out), xz=address(xz), y=address(y)
    )
    LIBRARY.call("mamba_mixer", arguments)
    del alive
    return out, [xz, y, *x_dbls, *states] if save else []


def mixer_backward(
    dout: Tensor,
    x: Tensor,
    ends: Ends,
    directions: Sequence[Direction],
    share: float,
    saved: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, of the ends and of each direction's tensors; of the former five, None where `wanted` is not."""
    x, dout, ends = channel_last(x), channel_last(dout), Ends(*map(float32, ends))
    (xz, y, *of_directions), structs = saved, LIBRARY.structs
    x_dbls, states = of_directions[: len(directions)], of_directions[len(directions) :]
    told, alive = told_of_directions(y.shape, directions, x_dbls, states, share, True)
    grads, written = gradients_of_directions(directions, [NO_TOKENS] * len(directions))
    outer = [like.new_empty(like.shape) if want else None for like, want in zip((x, *ends), wanted)]
    dx, *dends = map(address, outer)
    between = structs.DirectionsBackwardArgs(
        forward=structs.DirectionsArgs(**told), first=written[0], second=written[-1]
    )
    arguments = structs.MixerBackwardArgs(
        between=between,
        width=x.shape[2],
        x=tokens_of(x),
        dout=tokens_of(dout),
        in_proj=address(ends.in_proj),
        out_proj=address(ends.out_proj),
        xz=address(xz),
        y=address(y),
        dx=dx,
        din_proj=tuple(dends[:2]),
        dout_proj=tuple(dends[2:]),
    )
    LIBRARY.call("mamba_mixer_backward", arguments)
    del alive
    return [*outer, *grads]


def pooled_mixer(
    x: Tensor,
    ends: Ends,
    taps: Sequence[Taps],
    projections: Sequence[Projections],
    norm: tuple[Tensor | None, Tensor | None, float],
    lines: Lines,
    share: float,
    save: bool,
) -> tuple[Tensor, list[Tensor]]:
    """x (batch, tokens, width) -> the same, and what its gradient is computed from if that is to be saved: what the
    steps give one another, and what `pooled_scan_saving` keeps."""
    if save:
        xz = linear(x, ends.in_proj, ends.in_bias)
        signal, z = xz.chunk(2, dim=-1)
        skip, *groups = pooled_conv(signal, *taps[0], *taps[1], *lines)
        scanned, *of_scans = pooled_scan_saving(*groups, *projections[0], *projections[1])
        y = pooled_gate(skip, scanned, z, *norm, *lines[:3], share)
        return linear(y, ends.out_proj, ends.out_bias), [xz, skip, *groups, scanned, *of_scans, y]
    x, out, ends, (*norm, eps) = channel_last(x), x.new_empty(x.shape), Ends(*map(float32, ends)), norm
    taps = [[float32(tensor) for tensor in each] for each in taps]
    projections = [[float32(tensor) for tensor in each] for each in projections]
    weight, bias = map(float32, norm)
    conv_weight, (_, dt_proj, _, A_log) = taps[0][0], projections[0]
    forward, backward = (tuple(map(address, each)) for each in taps)
    forward_scan, backward_scan = (tuple(map(address, each)) for each in projections)
    arguments = LIBRARY.structs.PooledMixerArgs(
        batch=x.shape[0],
        dim=ends.out_proj.shape[1],
        taps=conv_weight.shape[1],
        rank=dt_proj.shape[1],
        dstate=A_log.shape[1],
        scale=bits(lines.scale),
        share=bits(share),
        eps=bits(eps),
        threads=torch.get_num_threads(),
        lines=lines_fields(*lines[:3]),
        forward=forward,
        backward=backward,
        forward_scan=forward_scan,
        backward_scan=backward_scan,
        norm_weight=address(weight),
        norm_bias=address(bias),
        **_ends_fields(x, ends, out),
    )
    LIBRARY.call("mamba_pooled_mixer", arguments)
    return out, []


@lru_cache(maxsize=16)
def _visible(lines: Lines, batch: int, each: bool) -> VisibleLines:
    """All tokens of the lines as visible ones, each a line of its own or not: for kernels, which only read them."""
    return (lines.each_visible if each else lines.all_visible)(batch, torch.device("cpu"))


def pooled_mixer_backward(
    dout: Tensor,
    x: Tensor,
    ends: Ends,
    taps: Sequence[Taps],
    projections: Sequence[Projections],
    norm: tuple[Tensor | None, Tensor | None, float],
    lines: Lines,
    share: float,
    saved: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, of the ends, of both directions' taps and projections, and of the norm; of the former five, None
    where `wanted` is not."""
    xz, skip, *groups, scanned, x_dbl, x_dbl_b, states, states_b, y = saved
    wants_dx, wants_in, wants_in_bias, wants_out, wants_out_bias = wanted
    dxz, batch, (weight, bias, eps) = torch.empty_like(xz), len(x), norm
    (signal, z), (dsignal, dz) = xz.chunk(2, dim=-1), dxz.chunk(2, dim=-1)
    dy, dout_proj = linear_backward(dout, y, ends.out_proj, True, wants_out)
    given = weight, bias, eps, _visible(lines, batch, False), share, dz
    dskip, dscanned, _, *dnorm = visible_gate_backward(dy, skip, scanned, z, *given)
    kept = (x_dbl, x_dbl_b), (states, states_b)
    dscans = pooled_scan_backward(dscanned, *groups, *kept, *projections[0], *projections[1])
    dgroups, dprojections = dscans[:2], dscans[2:]
    if not lines.runs:
        dgroups = [lines.spread(each).expand(-1, *lines.sizes, -1).flatten(1, 3) for each in dgroups]
    of_lines = _visible(lines, batch, not lines.runs)
    _, *dtaps = visible_conv_backward(dskip, *dgroups, signal, *taps, of_lines, dsignal)
    dx, din_proj = linear_backward(dxz, x, ends.in_proj, wants_dx, wants_in)
    outer = [
        dx if wants_dx else None,
        din_proj if wants_in else None,
        dxz.sum((0, 1)) if wants_in_bias else None,
        dout_proj if wants_out else None,
        dout.sum((0, 1)) if wants_out_bias else None,
    ]
    return [*outer, *dtaps, *dprojections, *dnorm]
