"""The mixer over pooled lines of the C++ kernel set; `csrc/pooled_abi.h` has the layout of what is passed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from causal_conv1d.layout import address, channel_last, float32
from causal_conv1d.native import DTYPE_CODES, bits, tokens_of
from mamba_ssm.kernels.arguments import Direction, Projections
from mamba_ssm.kernels.cpp.directions import backward_in_one, forward_in_one
from mamba_ssm.kernels.cpp.library import LIBRARY
from torch import Tensor


def lines_fields(sizes: list[int], strides: list[int], pooled: list[bool]) -> tuple:
    """The fields of csrc/pooled_abi.h's Lines, the number of groups last."""
    group_strides, count = [], 1
    for size, is_pooled in zip(reversed(sizes), reversed(pooled)):
        group_strides.insert(0, 0 if is_pooled else count)
        count *= 1 if is_pooled else size
    return tuple(sizes), tuple(strides), tuple(group_strides), count


def conv_fields(x: Tensor, taps: Sequence[Tensor | None], lines: tuple) -> dict[str, Any]:
    """What every pass over the tokens before the scans is told; `x` is channel-last, `taps` are float32."""
    addresses = [address(tap) for tap in taps]
    return {
        "batch": x.shape[0],
        "dim": x.shape[2],
        "dtype": DTYPE_CODES[x.dtype],
        "width": taps[0].shape[1],
        "threads": torch.get_num_threads(),
        "lines": lines,
        "x": tokens_of(x),
        "forward": tuple(addresses[:3]),
        "backward": tuple(addresses[3:]),
    }


def gate_fields(
    z: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, lines: tuple, share: float
) -> dict[str, Any]:
    """What every pass over the tokens behind the scans is told; `z` is channel-last, weight and bias are float32."""
    return {
        "batch": z.shape[0],
        "dim": z.shape[2],
        "dtype": DTYPE_CODES[z.dtype],
        "share": bits(share),
        "eps": bits(eps),
        "threads": torch.get_num_threads(),
        "lines": lines,
        "z": tokens_of(z),
        "weight": address(weight),
        "bias": address(bias),
    }


def pooled_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    D: Tensor,
    weight_b: Tensor,
    bias_b: Tensor | None,
    D_b: Tensor,
    sizes: list[int],
    strides: list[int],
    pooled: list[bool],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, dim = x.shape
    lines = lines_fields(sizes, strides, pooled)
    skip = x.new_empty(x.shape)
    means, means_b = (x.new_empty((batch, lines[-1], dim)) for _ in range(2))
    if skip.numel():
        x, taps = channel_last(x), [float32(tap) for tap in (weight, bias, D, weight_b, bias_b, D_b)]
        arguments = LIBRARY.structs.PooledConvArgs(
            **conv_fields(x, taps, lines),
            scale=bits(scale),
            skip=address(skip),
            pooled_forward=address(means),
            pooled_backward=address(means_b),
        )
        LIBRARY.call("mamba_pooled_conv", arguments)
    return skip, means, means_b


def pooled_scan(groups: Tensor, groups_b: Tensor, *projections: Tensor) -> Tensor:
    groups, groups_b = groups.contiguous(), groups_b.contiguous()
    wide = [float32(parameter) for parameter in projections]
    (batch, lines, dim), rank, dstate = groups.shape, wide[1].shape[1], wide[3].shape[1]
    out = groups.new_empty(groups.shape)
    if out.numel():
        addresses = [address(parameter) for parameter in wide]
        arguments = LIBRARY.structs.PooledScanArgs(
            batch=batch,
            dim=dim,
            lines=lines,
            dtype=DTYPE_CODES[groups.dtype],
            rank=rank,
            dstate=dstate,
            threads=torch.get_num_threads(),
            forward=tuple(addresses[:4]),
            backward=tuple(addresses[4:]),
            groups_forward=address(groups),
            groups_backward=address(groups_b),
            out=address(out),
        )
        LIBRARY.call("mamba_pooled_scan", arguments)
    return out


def scans_of(projections: Sequence[Projections]) -> list[Direction]:
    """Both directions' scans as those of a mixer without convolution, D and gate."""
    pairs = zip(projections, (False, True))
    return [Direction(None, None, x_proj, dt, bias, A_log, None, way) for (x_proj, dt, bias, A_log), way in pairs]


def pooled_scan_saving(groups: Tensor, groups_b: Tensor, *projections: Tensor) -> tuple[Tensor, ...]:
    """`pooled_scan`, and for `pooled_scan_backward` both directions' x_dbl and saved states; in float32, whatever the
    groups are."""
    xs = float32(groups), float32(groups_b)
    out, x_dbls, states = forward_in_one(xs, None, scans_of((projections[:4], projections[4:])), 1.0, True, True)
    return out.to(groups.dtype), *x_dbls, *states


def pooled_scan_backward(
    dout: Tensor,
    groups: Tensor,
    groups_b: Tensor,
    x_dbls: Sequence[Tensor],
    states: Sequence[Tensor],
    *projections: Tensor,
) -> list[Tensor]:
    """Gradients of both directions' groups, then of their projections."""
    xs = float32(groups), float32(groups_b)
    dxs = [torch.empty_like(x) for x in xs]
    directions = scans_of((projections[:4], projections[4:]))
    found = backward_in_one(dout.float(), xs, None, directions, x_dbls, states, 1.0, True, dxs, None)
    return [*dxs, *(grad for grad in found if grad is not None)]


def pooled_gate(
    skip: Tensor,
    groups: Tensor,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    sizes: list[int],
    strides: list[int],
    pooled: list[bool],
    share: float,
) -> Tensor:
    out = skip.new_empty(skip.shape)
    if out.numel():
        z = channel_last(z)
        skip, groups, weight, bias = skip.contiguous(), groups.contiguous(), float32(weight), float32(bias)
        arguments = LIBRARY.structs.PooledGateArgs(
            **gate_fields(z, weight, bias, eps, lines_fields(sizes, strides, pooled), share),
            skip=address(skip),
            groups=address(groups),
            out=address(out),
        )
        LIBRARY.call("mamba_pooled_gate", arguments)
    return out
