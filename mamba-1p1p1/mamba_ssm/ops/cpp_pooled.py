"""The mixer over pooled lines of the C++ kernel set; `csrc/pooled_abi.h` has the layout of what is passed."""

from __future__ import annotations

import struct

import torch
from causal_conv1d.native import DTYPE_CODES, address, call, channel_last
from torch import Tensor

LINES_FIELDS = 3 * 3 + 1
CONV_FIELDS = 6 + LINES_FIELDS + 3 + 2 * 3 + 3
SCAN_FIELDS = 7 + 2 * 4 + 3
GATE_FIELDS = 6 + LINES_FIELDS + 3 + 2 + 3


def _bits(value: float) -> int:
    return struct.unpack("q", struct.pack("d", value))[0]


def _float32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()


def _lines(sizes: list[int], strides: list[int], pooled: list[bool]) -> tuple[int, ...]:
    """The fields of csrc/pooled_abi.h's Lines, the number of groups last."""
    group_strides, count = [], 1
    for size, is_pooled in zip(reversed(sizes), reversed(pooled)):
        group_strides.insert(0, 0 if is_pooled else count)
        count *= 1 if is_pooled else size
    return (*sizes, *strides, *group_strides, count)


def pooled_conv(
    library,
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
        x, described = channel_last(x)
        taps = [_float32(parameter) for parameter in (weight, bias, D, weight_b, bias_b, D_b)]
        fields = (
            *(batch, dim, DTYPE_CODES[x.dtype], weight.shape[1], _bits(scale), torch.get_num_threads()),
            *lines,
            *described,
            *(address(parameter) for parameter in taps),
            *(skip.data_ptr(), means.data_ptr(), means_b.data_ptr()),
        )
        call(library.mamba_pooled_conv, fields)
    return skip, means, means_b


def pooled_scan(library, groups: Tensor, groups_b: Tensor, *projections: Tensor) -> Tensor:
    groups, groups_b = groups.contiguous(), groups_b.contiguous()
    wide = [_float32(parameter) for parameter in projections]
    (batch, lines, dim), rank, dstate = groups.shape, wide[1].shape[1], wide[3].shape[1]
    out = groups.new_empty(groups.shape)
    if out.numel():
        fields = (
            *(batch, dim, lines, DTYPE_CODES[groups.dtype], rank, dstate, torch.get_num_threads()),
            *(parameter.data_ptr() for parameter in wide),
            *(groups.data_ptr(), groups_b.data_ptr(), out.data_ptr()),
        )
        call(library.mamba_pooled_scan, fields)
    return out


def pooled_gate(
    library,
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
        z, described = channel_last(z)
        skip, groups, weight, bias = skip.contiguous(), groups.contiguous(), _float32(weight), _float32(bias)
        fields = (
            *(batch, dim, DTYPE_CODES[skip.dtype], _bits(share), _bits(eps), torch.get_num_threads()),
            *_lines(sizes, strides, pooled),
            *described,
            *(address(weight), address(bias)),
            *(skip.data_ptr(), groups.data_ptr(), out.data_ptr()),
        )
        call(library.mamba_pooled_gate, fields)
    return out
