"""The mixer over pooled lines of the C++ kernel set; `csrc/pooled_abi.h` has the layout of what is passed."""

from __future__ import annotations

import torch
from causal_conv1d.layout import address, channel_last, float32
from causal_conv1d.native import DTYPE_CODES, bits, tokens_of
from mamba_ssm.kernels.cpp.library import LIBRARY
from torch import Tensor


def _lines(sizes: list[int], strides: list[int], pooled: list[bool]) -> tuple:
    """The fields of csrc/pooled_abi.h's Lines, the number of groups last."""
    group_strides, count = [], 1
    for size, is_pooled in zip(reversed(sizes), reversed(pooled)):
        group_strides.insert(0, 0 if is_pooled else count)
        count *= 1 if is_pooled else size
    return tuple(sizes), tuple(strides), tuple(group_strides), count


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
    lines = _lines(sizes, strides, pooled)
    skip = x.new_empty(x.shape)
    means, means_b = (x.new_empty((batch, lines[-1], dim)) for _ in range(2))
    if skip.numel():
        x, width = channel_last(x), weight.shape[1]
        taps = [float32(parameter) for parameter in (weight, bias, D, weight_b, bias_b, D_b)]
        addresses = [address(parameter) for parameter in taps]
        arguments = LIBRARY.structs.PooledConvArgs(
            batch=batch,
            dim=dim,
            dtype=DTYPE_CODES[x.dtype],
            width=width,
            scale=bits(scale),
            threads=torch.get_num_threads(),
            lines=lines,
            x=tokens_of(x),
            forward=tuple(addresses[:3]),
            backward=tuple(addresses[3:]),
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
    batch, _, dim = skip.shape
    out = skip.new_empty(skip.shape)
    if out.numel():
        z = channel_last(z)
        skip, groups, weight, bias = skip.contiguous(), groups.contiguous(), float32(weight), float32(bias)
        arguments = LIBRARY.structs.PooledGateArgs(
            batch=batch,
            dim=dim,
            dtype=DTYPE_CODES[skip.dtype],
            share=bits(share),
            eps=bits(eps),
            threads=torch.get_num_threads(),
            lines=_lines(sizes, strides, pooled),
            z=tokens_of(z),
            weight=address(weight),
            bias=address(bias),
            skip=address(skip),
            groups=address(groups),
            out=address(out),
        )
        LIBRARY.call("mamba_pooled_gate", arguments)
    return out
