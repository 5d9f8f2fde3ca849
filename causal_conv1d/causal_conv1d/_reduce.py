"""Launches `csrc/reduce.cu`: sums over what the blocks of another kernel wrote, in a fixed order."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from causal_conv1d import _nvrtc
from torch import Tensor

_THREADS, _MANY_ROWS, _SHARERS = 256, 16, 8  # of reduce.cu
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SOURCE = _nvrtc.SHARED_SOURCES / "reduce.cu"
_SUM = struct.Struct("2q2q3q3q3ii")

Triple = tuple[int, int, int]


class Sum(NamedTuple):
    """`to[i, j, k] = sum over rows of parts[row, i, j, k]`, as addresses and strides: making views would take longer.

    `parts` is the address of float32 values; strides count elements.
    """

    parts: int
    rows: int
    row_stride: int
    strides: Triple
    to: Tensor
    to_strides: Triple
    sizes: Triple


def dense_sum(parts: int, rows: int, to: Tensor) -> Sum:
    """The sum of `rows` dense rows, each laid out as the contiguous tensor `to`."""
    size = to.numel()
    return Sum(parts, rows, size, (0, 0, 1), to, (0, 0, 1), (1, 1, size))


def add_up(device: _nvrtc.Device, sums: Sequence[Sum]) -> None:
    """Take all sums in one launch on the current stream of `device`."""
    blocks, packed = 1, []
    for parts, rows, row_stride, strides, to, to_strides, sizes in sums:
        packed.append(
            _SUM.pack(parts, to.data_ptr(), rows, row_stride, *strides, *to_strides, *sizes, _TYPES[to.dtype])
        )
        columns = _THREADS // (_SHARERS if rows > _MANY_ROWS else 1)
        blocks = max(blocks, -(-prod(sizes) // columns))
    kernel = device.kernel(SOURCE, str(len(sums)), _THREADS)
    kernel((blocks, len(sums), 1), b"".join(packed))
