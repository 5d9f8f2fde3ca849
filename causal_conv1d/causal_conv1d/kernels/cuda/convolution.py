"""The convolution of the CUDA kernel set: `csrc/conv_*.cu`."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from causal_conv1d import _nvrtc
from causal_conv1d._nvrtc import CPP_TYPES
from causal_conv1d._reduce import Sum, add_up, dense_sum
from causal_conv1d.kernels import torch as torch_kernels
from causal_conv1d.layout import address, same_dtype, slab
from torch import Tensor

# Of conv_tile.h, conv_forward.cu and conv_backward.cu.
THREADS, _FORWARD_STRIP, _COLUMNS, _STRIPS = 128, 16, 32, 4
VECTOR = 4
# Steps a backward thread walks at most, and backward blocks per multiprocessor, beyond which blocks share the batch.
_BACKWARD_STRIP, _BACKWARD_BLOCKS = 32, 8
_MAX_GRID = 65535

FORWARD_SOURCE = _nvrtc.SHARED_SOURCES / "conv_forward.cu"
BACKWARD_SOURCE = _nvrtc.SHARED_SOURCES / "conv_backward.cu"

_SIZES = struct.Struct("6i")
_MASK = "3q"
_FORWARD = struct.Struct(f"4q4q2q{_MASK}")
_BACKWARD = struct.Struct(f"4q4q4q3q{_MASK}2q")
_BACKWARD_SIZES = struct.Struct("6i3i4x")


class Conv(NamedTuple):
    """One convolution's arguments, as `causal_conv1d.kernels.registry` describes them."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    silu: bool
    reverse: bool
    mask: Tensor | None = None


def _mask_of(conv: Conv) -> tuple[int, int, int]:
    """(address, batch, time stride) of the mask (batch, seqlen) in the convolution's order; 0 where there is none."""
    if conv.mask is None:
        return 0, 0, 0
    batch, time = conv.mask.stride()
    if conv.reverse:
        return conv.mask.data_ptr() + (conv.mask.shape[1] - 1) * time * conv.mask.element_size(), batch, -time
    return conv.mask.data_ptr(), batch, time


def _vector(*tensors: Tensor) -> int:
    """How many neighbouring channels of all these (batch, dim, seqlen) tensors can be moved at once: 4 or 1."""
    for tensor in tensors:
        (batch, dim, seqlen), (batch_stride, channel_stride, time_stride) = tensor.shape, tensor.stride()
        dense = dim % VECTOR == 0 and channel_stride == 1
        aligned = tensor.data_ptr() % (VECTOR * tensor.element_size()) == 0
        steps = (seqlen == 1 or time_stride % VECTOR == 0) and (batch == 1 or batch_stride % VECTOR == 0)
        if not (dense and aligned and steps):
            return 1
    return VECTOR


def _covers(conv: Conv) -> bool:
    known = all(t.dtype in CPP_TYPES for t in (conv.weight, conv.bias) if t is not None)
    return known and conv.x.numel() > 0


def _time_fastest(x: Tensor) -> bool:
    return x.stride(2) == 1 and x.stride(1) != 1


def forward(convs: Sequence[Conv]) -> list[Tensor]:
    """The outputs of one or two convolutions of the same sizes, dtypes and activation, in one launch."""
    outs = [torch.empty_like(conv.x) for conv in convs]
    forward_into(convs, outs)
    return outs


def forward_into(convs: Sequence[Conv], outs: Sequence[Tensor]) -> None:
    """The same, into tensors of x's shape and dtype."""
    first = convs[0]
    batch, dim, seqlen = first.x.shape
    vector = min(_vector(conv.x, out) for conv, out in zip(convs, outs))
    params, kept = [], []
    for conv, out in zip(convs, outs):
        weight, bias = same_dtype(conv.weight, conv.bias)
        kept.append((weight, bias))
        addresses = address(weight), address(bias)
        slabs = *slab(conv.x, conv.reverse), *slab(out, conv.reverse)
        params.append(_FORWARD.pack(*slabs, *addresses, *_mask_of(conv)))
    strips = -(-seqlen // _FORWARD_STRIP)
    sizes = _SIZES.pack(batch, dim, seqlen, strips, first.silu, _time_fastest(first.x))
    device = _nvrtc.device(first.x.device.index)
    types = f"{CPP_TYPES[first.x.dtype]},{CPP_TYPES[kept[0][0].dtype]}"
    masked = "" if first.mask is None else ",true"
    kernel = device.kernel(FORWARD_SOURCE, f"{types},{vector},{first.weight.shape[1]}{masked}", THREADS)
    grid = (-(-(dim // vector) * strips // THREADS), min(batch, _MAX_GRID), len(convs))
    kernel(grid, b"".join(params) + bytes(len(params[0]) * (2 - len(params))) + sizes)


@_nvrtc.or_else(torch_kernels.conv_forward)
def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    conv = Conv(x, weight, bias, silu, reverse)
    return forward([conv])[0] if _covers(conv) else torch_kernels.conv_forward(*conv[:5])


@_nvrtc.or_else(torch_kernels.conv_backward)
def conv_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not _covers(Conv(x, weight, bias, silu, reverse)):
        return torch_kernels.conv_backward(dout, x, weight, bias, silu, reverse)
    dx, conv = torch.empty_like(x), Conv(x, weight, bias, silu, reverse)
    ((dweight, dbias),) = backward_into([dout], [conv], dx)
    return dx, dweight, weight.new_empty(0) if dbias is None else dbias


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    return x * mask.unsqueeze(1).to(x.dtype)


def _masked_forward_by_torch(
    x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> Tensor:
    return _masked(torch_kernels.conv_forward(_masked(x, mask), weight, bias, silu, reverse), mask)


def _masked_backward_by_torch(
    dout: Tensor, x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    seen, dout = _masked(x, mask), dout.to(x.dtype)
    out = torch_kernels.conv_forward(seen, weight, bias, silu, reverse)
    dseen, dweight, dbias = torch_kernels.conv_backward(_masked(dout, mask), seen, weight, bias, silu, reverse)
    dmask = (dout.float() * out).sum(1) + (dseen.float() * x).sum(1)
    return _masked(dseen, mask), dmask.to(mask.dtype), dweight, dbias


@_nvrtc.or_else(_masked_forward_by_torch)
def conv_forward_masked(
    x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> Tensor:
    """`mask` (batch, seqlen) times the convolution of `mask` times x."""
    conv = Conv(x, weight, bias, silu, reverse, mask.float())
    if not _covers(conv):
        return _masked_forward_by_torch(x, mask, *conv[1:5])
    return forward([conv])[0]


@_nvrtc.or_else(_masked_backward_by_torch)
def conv_backward_masked(
    dout: Tensor, x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, mask, weight and bias of `conv_forward_masked`."""
    conv = Conv(x, weight, bias, silu, reverse, mask.float())
    if not _covers(conv):
        return _masked_backward_by_torch(dout, x, mask, *conv[1:5])
    dx, dmask = torch.empty_like(x), mask.new_empty(mask.shape)
    ((dweight, dbias),) = backward_into([dout], [conv], dx, dmask)
    return dx, dmask, dweight, weight.new_empty(0) if dbias is None else dbias


def backward_into(
    douts: Sequence[Tensor], convs: Sequence[Conv], dx: Tensor, dmask: Tensor | None = None
) -> list[tuple[Tensor, Tensor | None]]:
    """The gradients of weight and bias of one or two convolutions of the same x, and in `dx` the sum of those of x, in
    one launch and one for the sums. One that is masked is alone, and leaves the mask's gradient in `dmask`."""
    x, weight, bias, silu, reverse, mask = convs[0]
    (batch, dim, seqlen), width, count = x.shape, weight.shape[1], len(convs)
    douts = [dout.to(x.dtype) for dout in douts]
    device, vector = _nvrtc.device(x.device.index), _vector(x, dx, *douts)
    blocks_along = -(-seqlen // (_STRIPS * _BACKWARD_STRIP))
    strip = -(-seqlen // (_STRIPS * blocks_along))
    blocks_across = -(-(dim // vector) // _COLUMNS)
    share = max(1, _BACKWARD_BLOCKS * device.multiprocessors // (blocks_across * blocks_along))
    rows = min(batch, share, _MAX_GRID)
    parts = blocks_along * rows
    sums = x.new_empty((count, parts, dim, width + 1), dtype=torch.float32)
    params, kept, wanted, results = b"", [], [], []
    mask_start, mask_sums = 0, None
    if mask is not None:
        mask_sums = x.new_empty((blocks_across, batch, seqlen), dtype=torch.float32)
        mask_start = mask_sums.data_ptr() + 4 * (seqlen - 1) * reverse
        wanted.append(dense_sum(mask_sums.data_ptr(), blocks_across, dmask))
    for number, (conv, dout) in enumerate(zip(convs, douts)):
        taps, shift = same_dtype(conv.weight, conv.bias)
        kept.append((taps, shift))
        start, row = sums.data_ptr() + 4 * number * parts * dim * (width + 1), dim * (width + 1)
        slabs = (slab(tensor, conv.reverse) for tensor in (x, dout, dx))
        of_mask = *_mask_of(conv), mask_start, -1 if conv.reverse else 1
        params += _BACKWARD.pack(*chain(*slabs), address(taps), address(shift), start, *of_mask)
        dweight = conv.weight.new_empty(conv.weight.shape)
        dbias = None if conv.bias is None else conv.bias.new_empty(conv.bias.shape)
        wanted.append(Sum(start, parts, row, (0, width + 1, 1), dweight, (0, width, 1), (1, dim, width)))
        if dbias is not None:
            wanted.append(Sum(start + 4 * width, parts, row, (0, 0, width + 1), dbias, (0, 0, 1), (1, 1, dim)))
        results.append((dweight, dbias))
    params += bytes(_BACKWARD.size * (2 - count)) + _BACKWARD_SIZES.pack(
        *(batch, dim, seqlen, -(-seqlen // strip), silu, mask is None and _time_fastest(x)),
        *(strip, count, convs[-1].reverse != reverse),
    )
    types = f"{CPP_TYPES[x.dtype]},{CPP_TYPES[kept[0][0].dtype]}"
    masked = "" if mask is None else ",true"
    kernel = device.kernel(BACKWARD_SOURCE, f"{types},{vector},{width}{masked}", THREADS)
    kernel((blocks_across, rows, blocks_along), params)
    add_up(device, wanted)
    return results
