"""Whole mixers of the C++ kernel set, float32, without gradients: from in_proj to out_proj in one call of the library,
image by image, so that what is between the steps stays in the cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from causal_conv1d.layout import address, channel_last, float32
from causal_conv1d.native import bits, tokens_of
from mamba_ssm.kernels.arguments import Direction, Ends, Lines, Projections, Taps
from mamba_ssm.kernels.cpp.library import LIBRARY
from mamba_ssm.kernels.cpp.pooled import lines_fields
from mamba_ssm.kernels.cpp.scan import interval_of
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


def mixer(x: Tensor, ends: Ends, directions: Sequence[Direction], share: float) -> Tensor:
    """x (batch, seqlen, width) -> the same; `A` of the directions, which are of equal sizes, is log(-A)."""
    x, out, ends = channel_last(x), x.new_empty(x.shape), Ends(*map(float32, ends))
    weights, alive, structs = [], [], LIBRARY.structs
    for *tensors, reverse in directions:
        wide = [float32(tensor) for tensor in tensors]
        # neither the tokens of one image nor its x_dbl are anywhere before the call, and no states are kept
        weights.append(structs.DirectionWeights((0, 0, 0), reverse, *map(address, wide), 0, 0))
        alive.append(wide)
    conv_weight, _, _, dt_proj, _, A_log, _ = alive[0]
    between = structs.DirectionsArgs(
        batch=x.shape[0],
        dim=ends.out_proj.shape[1],
        seqlen=x.shape[1],
        dstate=A_log.shape[1],
        rank=dt_proj.shape[1],
        width=conv_weight.shape[1],
        directions=len(directions),
        threads=torch.get_num_threads(),
        interval=interval_of(A_log.shape[1]),
        log_decay=1,
        share=bits(share),
        first=weights[0],
        second=weights[-1],
    )
    LIBRARY.call("mamba_mixer", structs.MixerArgs(between=between, **_ends_fields(x, ends, out)))
    return out


def pooled_mixer(
    x: Tensor,
    ends: Ends,
    taps: Sequence[Taps],
    projections: Sequence[Projections],
    norm: tuple[Tensor | None, Tensor | None, float],
    lines: Lines,
    share: float,
) -> Tensor:
    """x (batch, tokens, width) -> the same."""
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
    return out
