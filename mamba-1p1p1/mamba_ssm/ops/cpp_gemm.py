"""The matrix product of the C++ kernel set; `csrc/gemm_abi.h` has the layout of what is passed."""

from __future__ import annotations

import torch
from causal_conv1d.native import address, call
from torch import Tensor

GEMM_FIELDS = 5 + 3 * 2 + 3


def _factor(x: Tensor) -> Tensor:
    """x with stride 1 along one of its two dimensions, copied only if it has none."""
    rows, columns = x.shape
    return x if x.stride(1) == 1 or columns <= 1 or x.stride(0) == 1 or rows <= 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int]:
    """The strides of x, 1 along the dimension that has it or that has one element."""
    row_stride, column_stride = x.stride()
    if column_stride == 1 or x.shape[1] <= 1:
        return row_stride, 1
    return 1, column_stride


def gemm(library, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, accumulate: bool) -> None:
    """out = a @ b + bias, or out += a @ b: float32 a (rows, depth), b (depth, columns), contiguous bias (columns,), out
    (rows, columns) with stride 1 along a row."""
    if out.numel() == 0:
        return
    a, b = _factor(a), _factor(b)
    fields = (
        *(*out.shape, a.shape[1], torch.get_num_threads(), accumulate),
        *(a.data_ptr(), *_strides(a)),
        *(b.data_ptr(), *_strides(b)),
        *(address(bias), out.data_ptr(), out.stride(0)),
    )
    call(library.mamba_gemm, fields)
