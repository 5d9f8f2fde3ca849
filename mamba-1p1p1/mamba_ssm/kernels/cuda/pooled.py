"""The mixer over pooled lines of the CUDA kernel set: `csrc/pooled_*.cu`, a pass over the tokens each side of scans."""

from __future__ import annotations

import struct
from math import prod
from pathlib import Path

import torch
from causal_conv1d import _nvrtc
from causal_conv1d._nvrtc import CPP_TYPES
from causal_conv1d.layout import address, channel_last, pack_of
from mamba_ssm.kernels.cuda.norm import MAX_SIZE, layout_arguments, team_for
from torch import Tensor

_SOURCES = Path(__file__).resolve().parents[2] / "csrc"
CONV_SOURCE, GATE_SOURCE = _SOURCES / "pooled_conv.cu", _SOURCES / "pooled_gate.cu"
# Of both.
THREADS = 128
_BLOCKS, _MAX_GRID = 16, 65535
_LINES = "11i"
_CONV = struct.Struct(f"3q3q6q{_LINES}2if")
_GATE = struct.Struct(f"6q2q{_LINES}4xqi2f4x")


def _lines(sizes: list[int], strides: list[int], pooled: list[bool]) -> tuple[int, ...]:
    """`struct Lines` of pooled_tile.h."""
    group_strides, count = [], 1
    for size, is_pooled in zip(reversed(sizes), reversed(pooled)):
        group_strides.insert(0, 0 if is_pooled else count)
        count *= 1 if is_pooled else size
    return *sizes, *strides, *group_strides, count, prod(sizes)


def _alike(*parameters: Tensor | None) -> list[Tensor | None]:
    """The parameters, dense and of one dtype."""
    dtypes = {parameter.dtype for parameter in parameters if parameter is not None}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return [None if parameter is None else parameter.to(dtype).contiguous() for parameter in parameters]


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
    (batch, tokens, dim), lines = x.shape, _lines(sizes, strides, pooled)
    groups = lines[-2]
    skip = x.new_empty(x.shape)
    means, means_b = (x.new_empty((batch, groups, dim)) for _ in range(2))
    if skip.numel() == 0:
        return skip, means, means_b
    x = channel_last(x)
    taps = _alike(weight, bias, D, weight_b, bias_b, D_b)
    vector, device = pack_of(dim, x), _nvrtc.device(x.device.index)
    params = _CONV.pack(
        *(address(x), x.stride(0), x.stride(1)),
        *(address(each) for each in (skip, means, means_b, *taps)),
        *(*lines, batch, dim, scale * groups / tokens),
    )
    arguments = f"{CPP_TYPES[x.dtype]},{CPP_TYPES[taps[0].dtype]},{vector},{weight.shape[1]}"
    blocks = -(-(dim // vector) * groups // THREADS)
    device.kernel(CONV_SOURCE, arguments, THREADS)((blocks, min(batch, _MAX_GRID), 1), params)
    return skip, means, means_b


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
    batch, tokens, dim = skip.shape
    if dim > MAX_SIZE:
        raise _nvrtc.KernelError(f"the gate of pooled lines holds up to {MAX_SIZE:,} channels, not {dim:,}")
    out = skip.new_empty(skip.shape)
    if out.numel() == 0:
        return out
    skip, groups, z = skip.contiguous(), groups.contiguous(), channel_last(z)
    weight, bias = _alike(weight, bias)
    device, vector = _nvrtc.device(skip.device.index), pack_of(dim, skip, groups, z, weight, bias)
    params = _GATE.pack(
        *(address(each) for each in (skip, groups, z, weight, bias, out)),
        *(z.stride(0), z.stride(1)),
        *(*_lines(sizes, strides, pooled), batch * tokens, dim, eps, share),
    )
    own = torch.float32 if weight is None else weight.dtype
    arguments = f"{CPP_TYPES[skip.dtype]},{CPP_TYPES[own]},{layout_arguments(dim, vector)}"
    blocks = min(-(-batch * tokens // (THREADS // team_for(dim))), _BLOCKS * device.multiprocessors)
    device.kernel(GATE_SOURCE, arguments, THREADS)((blocks, 1, 1), params)
    return out
