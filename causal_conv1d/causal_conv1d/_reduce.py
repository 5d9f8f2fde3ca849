"""Launches `csrc/reduce.cu`: sums over what the blocks of another kernel wrote, in a fixed order."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from causal_conv1d import _nvrtc
from torch import Tensor

_THREADS, _MANY_ROWS, _SHARERS = 256, 16, 8  # of reduce.cu
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_SUM = struct.Struct("2q2q3q3q3ii")


class Sum(NamedTuple):
    """`to = rows.sum(0)`: `rows` (n, a, b, c) float32 with any strides, `to` (a, b, c) with any strides."""

    rows: Tensor
    to: Tensor


def add_up(device: _nvrtc.Device, sums: Sequence[Sum]) -> None:
    """Take all sums in one launch on the current stream of `device`."""
    blocks, packed = 1, []
    for rows, to in sums:
        count, *sizes = rows.shape
        row_stride, *strides = rows.stride()
        addresses = rows.data_ptr(), to.data_ptr()
        packed.append(_SUM.pack(*addresses, count, row_stride, *strides, *to.stride(), *sizes, _TYPES[to.dtype]))
        columns = _THREADS // (_SHARERS if count > _MANY_ROWS else 1)
        blocks = max(blocks, -(-to.numel() // columns))
    kernel = device.kernel(_nvrtc.SHARED_SOURCES / "reduce.cu", str(len(sums)), _THREADS)
    kernel((blocks, len(sums), 1), b"".join(packed))
