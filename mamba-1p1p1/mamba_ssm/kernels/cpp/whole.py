"""Whole mixers of the C++ kernel set, float32: from in_proj to out_proj in one call of the library, and back in
another, image by image, so that what is between the steps stays in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure
from functools import lru_cache

import torch
from causal_conv1d.layout import address, addresses, all_float32, channel_last, float32
from causal_conv1d.native import Call, bits, tokens_of
from mamba_ssm.kernels.arguments import Direction, Ends, Lines, Projections, Taps, VisibleLines
from mamba_ssm.kernels.cpp.directions import NO_TOKENS, gradients_of_directions, kept_of_directions, told_of_directions
from mamba_ssm.kernels.cpp.library import LIBRARY
from mamba_ssm.kernels.cpp.pooled import lines_fields, scans_of
from mamba_ssm.kernels.cpp.visible import visible_fields
from torch import Tensor


def _ends_fields(x: Tensor, ends: Ends, out: Tensor) -> dict:
    """What every whole mixer is told of its outside; `ends` are float32 and contiguous, as `out`."""
    in_proj, in_bias, out_proj, out_bias = addresses(ends)
    return {
        "width": x.shape[2],
        "x": tokens_of(x),
        "in_proj": (in_proj, in_bias),
        "out_proj": (out_proj, out_bias),
        "out": address(out),
    }


def _told_of_ends_backward(
    dout: Tensor, x: Tensor, ends: Ends, wanted: Sequence[bool], dx: Tensor | None
) -> tuple[list[Tensor | None], Structure, tuple]:
    """New gradients of x, unless it is `dx`, and of the ends, None where they are not `wanted`; the library's arguments
    for them; and what has to live as long as it works with these."""
    x, dout, ends = channel_last(x), channel_last(dout), Ends(*all_float32(ends))
    outer = [like.new_empty(like.shape) if want else None for like, want in zip(ends, wanted[1:])]
    outer.insert(0, x.new_empty(x.shape) if wanted[0] and dx is None else dx)
    of_x, *dends = addresses(outer)
    told = LIBRARY.structs.EndsBackward(
        width=x.shape[2],
        x=tokens_of(x),
        dout=tokens_of(dout),
        in_proj=address(ends.in_proj),
        out_proj=address(ends.out_proj),
        dx=of_x,
        din_proj=tuple(dends[:2]),
        dout_proj=tuple(dends[2:]),
    )
    return outer, told, (x, dout, ends, outer)


def mixer_call(
    x: Tensor,
    ends: Ends,
    directions: Sequence[Direction],
    share: float,
    mask: Tensor | None,
    gates: Tensor | None,
    save: bool,
    out: Tensor | None = None,
    runs: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], Call]:
    """x (batch, seqlen, width) -> the same, in new memory or in that of `out`, and what its gradient is computed from
    if that is to be saved: xz (batch, seqlen, 2*dim), y (batch, seqlen, dim) before silu(z), or with gates
    (batch, directions) each direction's part of it (batch, directions, seqlen, dim), x_dbl of each direction, saved
    states of each direction; and the call that fills these. `A` of the directions, which are of equal sizes, is
    log(-A). `runs` (batch, directions), bool, without gates and with nothing to be saved: see `skipping_mixer`."""
    out = x.new_empty(x.shape) if out is None else out
    x, ends = channel_last(x), Ends(*all_float32(ends))
    batch, seqlen, _ = x.shape
    sizes, nothing = (batch, seqlen, ends.out_proj.shape[1]), [None] * len(directions)
    if save:
        parts = () if gates is None else (len(directions),)
        xz, y = x.new_empty(batch, seqlen, 2 * sizes[2]), x.new_empty(batch, *parts, *sizes[1:])
        x_dbls, states = kept_of_directions(x, sizes, directions, True)
    else:
        xz, y, x_dbls, states = None, None, nothing, nothing
    between, alive = told_of_directions(sizes, directions, x_dbls, states, share, True, mask=mask)
    gates = float32(gates)
    arguments = LIBRARY.structs.MixerArgs(
        between=LIBRARY.structs.DirectionsArgs(**between),
        **_ends_fields(x, ends, out),
        xz=address(xz),
        y=address(y),
        gates=address(gates),
        runs=address(runs),
    )
    kept = [xz, y, *x_dbls, *states] if save else []
    return out, kept, Call(LIBRARY, "mamba_mixer", arguments, (x, ends, alive, out, kept, gates, runs))


def mixer(*given) -> tuple[Tensor, list[Tensor]]:
    """The first two of what `mixer_call` returns, filled."""
    out, kept, call = mixer_call(*given)
    call()
    return out, kept


def skipping_mixer(
    x: Tensor, ends: Ends, directions: Sequence[Direction], share: float, mask: Tensor | None, runs: Tensor
) -> Tensor:
    """The first of what `mixer` returns, where each image does without the directions for which its `runs` (batch,
    directions), bool, is False; zeros for one without any."""
    out, _, call = mixer_call(x, ends, directions, share, mask, None, False, runs=runs.contiguous())
    call()
    return out


def mixer_backward_call(
    dout: Tensor,
    x: Tensor,
    ends: Ends,
    directions: Sequence[Direction],
    share: float,
    mask: Tensor | None,
    gates: Tensor | None,
    saved: Sequence[Tensor],
    wanted: Sequence[bool],
    dx: Tensor | None = None,
) -> tuple[list[Tensor | None], Call]:
    """Gradients of x, in new memory or in that of `dx`, of the ends, the mask, the gates and each direction's tensors;
    of the former five, None where `wanted` is not; and the call that fills these."""
    (xz, y, *of_directions), structs = saved, LIBRARY.structs
    x_dbls, states = of_directions[: len(directions)], of_directions[len(directions) :]
    sizes = len(y), *y.shape[-2:]
    told, alive = told_of_directions(sizes, directions, x_dbls, states, share, True, mask=mask)
    gates = float32(gates)
    # the mask's gradient is added to
    dmask = None if mask is None else y.new_zeros(mask.shape)
    dgates = None if gates is None else torch.empty_like(gates)
    grads, written = gradients_of_directions(directions, [NO_TOKENS] * len(directions))
    outer, told_of_ends, outer_alive = _told_of_ends_backward(dout, x, ends, wanted, dx)
    arguments = structs.MixerBackwardArgs(
        between=structs.DirectionsBackwardArgs(
            forward=structs.DirectionsArgs(**told),
            dmask=address(dmask),
            gates=address(gates),
            first=written[0],
            second=written[-1],
        ),
        ends=told_of_ends,
        xz=address(xz),
        y=address(y),
        dgates=address(dgates),
    )
    grads = [*outer, dmask, dgates, *grads]
    return grads, Call(LIBRARY, "mamba_mixer_backward", arguments, (alive, outer_alive, saved, gates, grads))


def mixer_backward(*given) -> list[Tensor | None]:
    """The former of what `mixer_backward_call` returns, filled."""
    grads, call = mixer_backward_call(*given)
    call()
    return grads


def pooled_mixer_call(
    x: Tensor,
    ends: Ends,
    taps: Sequence[Taps],
    projections: Sequence[Projections],
    norm: tuple[Tensor | None, Tensor | None, float],
    lines: Lines,
    share: float,
    save: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], Call]:
    """x (batch, tokens, width) -> the same, in new memory or in that of `out`, and what its gradient is computed from
    if that is to be saved: xz (batch, tokens, 2*dim), both convolutions' sum (batch, tokens, dim), both
    directions' means and the sum of their scans (batch, groups, dim), x_dbl of each direction, saved states of
    each direction; and the call that fills these."""
    out = x.new_empty(x.shape) if out is None else out
    x, ends, directions = channel_last(x), Ends(*all_float32(ends)), scans_of(projections)
    batch, tokens, _ = x.shape
    dim = ends.out_proj.shape[1]
    sizes, nothing = (batch, lines.count, dim), (None, None)
    if save:
        xz, skip = x.new_empty(batch, tokens, 2 * dim), x.new_empty(batch, tokens, dim)
        *groups, scanned = (x.new_empty(sizes) for _ in range(3))
        x_dbls, states = kept_of_directions(x, sizes, directions, True)
    else:
        xz = skip = scanned = groups = None
        x_dbls = states = nothing
    between, alive = told_of_directions(sizes, directions, x_dbls, states, 1.0, True, groups)
    told, also_alive = _told_of_pooled(taps, norm, lines, share)
    arguments = LIBRARY.structs.PooledMixerArgs(
        between=LIBRARY.structs.DirectionsArgs(**between, out=address(scanned)),
        scale=bits(lines.scale),
        xz=address(xz),
        skip=address(skip),
        **told,
        **_ends_fields(x, ends, out),
    )
    kept = [xz, skip, *groups, scanned, *x_dbls, *states] if save else []
    return out, kept, Call(LIBRARY, "mamba_pooled_mixer", arguments, (x, ends, alive, also_alive, out, kept))


def pooled_mixer(*given) -> tuple[Tensor, list[Tensor]]:
    """The first two of what `pooled_mixer_call` returns, filled."""
    out, kept, call = pooled_mixer_call(*given)
    call()
    return out, kept


def pooled_mixer_backward_call(
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
    dx: Tensor | None = None,
) -> tuple[list[Tensor | None], Call]:
    """Gradients of x, in new memory or in that of `dx`, of the ends, of both directions' taps and projections, and of
    the norm; of the former five, None where `wanted` is not; and the call that fills these."""
    (xz, skip, *groups, scanned, x_dbl, x_dbl_b, states, states_b), structs = saved, LIBRARY.structs
    directions = scans_of(projections)
    x_dbls, states = (x_dbl, x_dbl_b), (states, states_b)
    between, alive = told_of_directions(scanned.shape, directions, x_dbls, states, 1.0, True, groups)
    grads, written = gradients_of_directions(directions, [NO_TOKENS] * 2)
    outer, told_of_ends, outer_alive = _told_of_ends_backward(dout, x, ends, wanted, dx)
    told, also_alive = _told_of_pooled(taps, norm, lines, share)
    inner = [None if like is None else like.new_empty(like.shape) for like in (*taps[0], *taps[1], *norm[:2])]
    *of_taps, dweight, dbias = addresses(inner)
    walked = _visible(lines, False), _visible(lines, not lines.runs)
    arguments = structs.PooledMixerBackwardArgs(
        between=structs.DirectionsBackwardArgs(
            forward=structs.DirectionsArgs(**between), first=written[0], second=written[1]
        ),
        ends=told_of_ends,
        of_gate=visible_fields(walked[0], skip.shape[1]),
        of_taps=visible_fields(walked[1], skip.shape[1]),
        factor=bits(walked[1].factor),
        xz=address(xz),
        skip=address(skip),
        scanned=address(scanned),
        dforward=tuple(of_taps[:3]),
        dbackward=tuple(of_taps[3:]),
        dnorm_weight=dweight,
        dnorm_bias=dbias,
        **told,
    )
    grads = [*outer, *inner[:6], *(grad for grad in grads if grad is not None), *inner[6:]]
    alive = alive, outer_alive, also_alive, saved, grads
    return grads, Call(LIBRARY, "mamba_pooled_mixer_backward", arguments, alive)


def pooled_mixer_backward(*given) -> list[Tensor | None]:
    """The former of what `pooled_mixer_backward_call` returns, filled."""
    grads, call = pooled_mixer_backward_call(*given)
    call()
    return grads


def _told_of_pooled(
    taps: Sequence[Taps], norm: tuple[Tensor | None, Tensor | None, float], lines: Lines, share: float
) -> tuple[dict, list[Sequence[Tensor | None]]]:
    """What is around the scans, and what has to live as long as the library works with it."""
    weight, bias, eps = norm
    alive = [all_float32(each) for each in (*taps, (weight, bias))]
    forward, backward, (norm_weight, norm_bias) = (tuple(addresses(each)) for each in alive)
    told = dict(
        taps=taps[0].weight.shape[1],
        share=bits(share),
        eps=bits(eps),
        lines=lines_fields(*lines[:3]),
        forward=forward,
        backward=backward,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
    )
    return told, alive


@lru_cache(maxsize=32)
def _visible(lines: Lines, each: bool) -> VisibleLines:
    """All tokens of the lines as visible ones of one image, each a line of its own or not: for kernels, which only read
    them."""
    visible = (lines.each_visible if each else lines.all_visible)(1, torch.device("cpu"))
    return visible._replace(order=visible.order.contiguous(), starts=visible.starts.contiguous())
