"""The convolution of the CUDA kernel set: `csrc/conv_*.cu`."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from causal_conv1d import _nvrtc
from causal_conv1d._nvrtc import CPP_TYPES
from causal_conv1d._reduce import Sum, add_up
from causal_conv1d.kernels import torch as torch_kernels
from causal_conv1d.layout import address, same_dtype, slab
from torch import Tensor

# Of conv_tile.h, conv_forward.cu and conv_backward.cu.
_THREADS, _FORWARD_STRIP, _COLUMNS, _STRIPS = 128, 16, 32, 4
_VECTOR = 4
# Steps a backward thread walks at most, and backward blocks per multiprocessor, beyond which blocks share the batch.
_BACKWARD_STRIP, _BACKWARD_BLOCKS = 32, 8
_MAX_GRID = 65535

_FORWARD_SOURCE = _nvrtc.SHARED_SOURCES / "conv_forward.cu"
_BACKWARD_SOURCE = _nvrtc.SHARED_SOURCES / "conv_backward.cu"

_SIZES = struct.Struct("6i")
_FORWARD = struct.Struct("4q4q2q")
_BACKWARD = struct.Struct("4q4q4q3q6i2i")


class Conv(NamedTuple):
    """One convolution's arguments, as `causal_conv1d.kernels.registry` describes them."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    silu: bool
    reverse: bool


def _vector(*tensors: Tensor) -> int:
    """How many neighbouring channels of all these (batch, dim, seqlen) tensors can be moved at once: 4 or 1."""
    for tensor in tensors:
        (batch, dim, seqlen), (batch_stride, channel_stride, time_stride) = tensor.shape, tensor.stride()
        dense = dim % _VECTOR == 0 and channel_stride == 1
        aligned = tensor.data_ptr() % (_VECTOR * tensor.element_size()) == 0
        steps = (seqlen == 1 or time_stride % _VECTOR == 0) and (batch == 1 or batch_stride % _VECTOR == 0)
        if not (dense and aligned and steps):
            return 1
    return _VECTOR


def _covers(conv: Conv) -> bool:
    known = all(t.dtype in CPP_TYPES for t in (conv.weight, conv.bias) if t is not None)
    return known and conv.x.numel() > 0


def _time_fastest(x: Tensor) -> bool:
    return x.stride(2) == 1 and x.stride(1) != 1


def forward(convs: Sequence[Conv]) -> list[Tensor]:
    """The outputs of one or two convolutions of the same sizes, dtypes and activation, in one launch."""
    first = convs[0]
    batch, dim, seqlen = first.x.shape
    outs = [torch.empty_like(conv.x) for conv in convs]
    vector = min(_vector(conv.x, out) for conv, out in zip(convs, outs))
    params, kept = [], []
    for conv, out in zip(convs, outs):
        weight, bias = same_dtype(conv.weight, conv.bias)
        kept.append((weight, bias))
        addresses = address(weight), address(bias)
        params.append(_FORWARD.pack(*slab(conv.x, conv.reverse), *slab(out, conv.reverse), *addresses))
    strips = -(-seqlen // _FORWARD_STRIP)
    sizes = _SIZES.pack(batch, dim, seqlen, strips, first.silu, _time_fastest(first.x))
    device = _nvrtc.device(first.x.device.index)
    types = f"{CPP_TYPES[first.x.dtype]},{CPP_TYPES[kept[0][0].dtype]}"
    kernel = device.kernel(_FORWARD_SOURCE, f"{types},{vector},{first.weight.shape[1]}", _THREADS)
    grid = (-(-(dim // vector) * strips // _THREADS), min(batch, _MAX_GRID), len(convs))
    kernel(grid, b"".join(params) + bytes(len(params[0]) * (2 - len(params))) + sizes)
    return outs


@_nvrtc.or_else(torch_kernels.conv_forward)
def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    conv = Conv(x, weight, bias, silu, reverse)
    return forward([conv])[0] if _covers(conv) else torch_kernels.conv_forward(*conv)


@_nvrtc.or_else(torch_kernels.conv_backward)
def conv_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not _covers(Conv(x, weight, bias, silu, reverse)):
        return torch_kernels.conv_backward(dout, x, weight, bias, silu, reverse)
    (batch, dim, seqlen), width = x.shape, weight.shape[1]
    dout, dx = dout.to(x.dtype), torch.empty_like(x)
    taps, shift = same_dtype(weight, bias)
    device, vector = _nvrtc.device(x.device.index), _vector(x, dout, dx)
    blocks_along = -(-seqlen // (_STRIPS * _BACKWARD_STRIP))
    strip = -(-seqlen // (_STRIPS * blocks_along))
    blocks_across = -(-(dim // vector) // _COLUMNS)
    share = max(1, _BACKWARD_BLOCKS * device.multiprocessors // (blocks_across * blocks_along))
    rows = min(batch, share, _MAX_GRID)
    sums = x.new_empty((blocks_along * rows, dim, width + 1), dtype=torch.float32)
    params = _BACKWARD.pack(
        *slab(x, reverse),
        *slab(dout, reverse),
        *slab(dx, reverse),
        *(address(taps), address(shift), address(sums)),
        *(batch, dim, seqlen, -(-seqlen // strip), silu, _time_fastest(x)),
        *(strip, 0),
    )
    types = f"{CPP_TYPES[x.dtype]},{CPP_TYPES[taps.dtype]}"
    kernel = device.kernel(_BACKWARD_SOURCE, f"{types},{vector},{width}", _THREADS)
    kernel((blocks_across, rows, blocks_along), params)
    dweight, parts, row = weight.new_empty(weight.shape), sums.data_ptr(), dim * (width + 1)
    wanted = [Sum(parts, len(sums), row, (0, width + 1, 1), dweight, (0, width, 1), (1, dim, width))]
    dbias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    if bias is not None:
        wanted.append(Sum(parts + 4 * width, len(sums), row, (0, 0, width + 1), dbias, (0, 0, 1), (1, 1, dim)))
    add_up(device, wanted)
    return dx, dweight, dbias
