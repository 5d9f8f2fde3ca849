"""Token merging of the CUDA kernel set: `csrc/match_*.cu` and `csrc/merge_*.cu`.

Indices stay on the device, where none can raise an error: class tokens or slots outside the sequence are passed over.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from causal_conv1d import _nvrtc
from causal_conv1d._nvrtc import CPP_TYPES
from causal_conv1d.layout import address, channel_last, pack_of
from torch import Tensor

_SOURCES = Path(__file__).resolve().parents[2] / "csrc"
PAIRS_SOURCE, ARRANGE_SOURCE = _SOURCES / "match_pairs.cu", _SOURCES / "match_arrange.cu"
FORWARD_SOURCE, BACKWARD_SOURCE = _SOURCES / "merge_forward.cu", _SOURCES / "merge_backward.cu"
# Of all four.
THREADS, _WARPS = 128, 4
MOST_CLASSES = 128  # class tokens
_ROWS = 32  # tokens of set a in a block
_MAX_GRID = 65535
_PATCHES = "2q4i"
_PAIRS = struct.Struct(f"3q{_PATCHES}2q2i")
_ARRANGE = struct.Struct(f"{_PATCHES}8q3i{MOST_CLASSES}i4x")
_FORWARD = struct.Struct("6q4i")
_BACKWARD = struct.Struct("5q3i4x")


def match_tokens(
    metric: Tensor, fused: int, cls: Tensor, moved: Sequence[int], odd_first: bool, raster: bool, sort: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two launches: the best pairs, then ranks, slots and counts."""
    (batch, tokens, channels), classes = metric.shape, cls.shape[1]
    if classes > MOST_CLASSES:
        raise _nvrtc.KernelError(f"a matching passes by up to {MOST_CLASSES} class tokens, not {classes}")
    patches = tokens - classes
    in_a = (patches + 1 - odd_first) // 2
    slot, count = cls.new_empty(batch, tokens), cls.new_empty(batch, tokens - fused)
    places, kept = cls.new_empty(batch, classes), cls.new_empty(batch, tokens, dtype=torch.bool)
    if batch == 0:
        return slot, kept, count, places
    metric, cls = channel_last(metric), cls.contiguous()
    # similarities, partners, ranks, and the places of all patch tokens: four bytes each
    scratch = metric.new_empty(batch * (3 * in_a + patches), dtype=torch.float32)
    best, partner, rank, place = (scratch.data_ptr() + 4 * batch * in_a * number for number in range(4))
    own = address(cls), classes if len(cls) > 1 else 0, classes, odd_first, in_a, patches - in_a
    device = _nvrtc.device(metric.device.index)
    given = address(metric), metric.stride(0), metric.stride(1)
    kernel = device.kernel(PAIRS_SOURCE, CPP_TYPES[metric.dtype], THREADS)
    kernel((-(-in_a // _ROWS), min(batch, _MAX_GRID), 1), _PAIRS.pack(*given, *own, best, partner, batch, channels))
    targets = [*moved, *[0] * (MOST_CLASSES - classes)]
    results = (address(tensor) for tensor in (slot, kept, count, places))
    params = _ARRANGE.pack(*own, best, partner, rank, place, *results, fused, raster, sort, *targets)
    device.kernel(ARRANGE_SOURCE, "", THREADS)((batch, 1, 1), params)
    return slot, kept, count, places


def merge_tokens(x: Tensor, slot: Tensor, count: Tensor) -> Tensor:
    (batch, tokens, channels), left = x.shape, count.shape[1]
    out = x.new_empty(batch, left, channels)
    if out.numel() == 0:
        return out
    x, slot, count = channel_last(x), slot.contiguous(), count.contiguous()
    params = _FORWARD.pack(
        *(address(x), x.stride(0), x.stride(1), address(slot), address(count), address(out)),
        *(batch, tokens, left, channels),
    )
    kernel = _nvrtc.device(x.device.index).kernel(FORWARD_SOURCE, _arguments(x, out), THREADS)
    kernel((-(-left // _WARPS), min(batch, _MAX_GRID), 1), params)
    return out


def merge_tokens_backward(dout: Tensor, slot: Tensor, count: Tensor) -> Tensor:
    """The gradient of x (batch, tokens, channels) in the dtype of dout (batch, left, channels)."""
    (batch, tokens), (_, left, channels) = slot.shape, dout.shape
    dx = dout.new_empty(batch, tokens, channels)
    if dx.numel() == 0:
        return dx
    dout, slot, count = dout.contiguous(), slot.contiguous(), count.contiguous()
    params = _BACKWARD.pack(*(address(t) for t in (dout, slot, count, dx)), batch * tokens, tokens, left, channels)
    arguments = _arguments(dout, dx)
    packs = dx.numel() // int(arguments.rpartition(",")[2])
    kernel = _nvrtc.device(dx.device.index).kernel(BACKWARD_SOURCE, arguments, THREADS)
    kernel((-(-packs // THREADS), 1, 1), params)
    return dx


def _arguments(x: Tensor, other: Tensor) -> str:
    return f"{CPP_TYPES[x.dtype]},{pack_of(x.shape[2], x, other)}"
