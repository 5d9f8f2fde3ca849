"""The matrix product of the C++ kernel set, float32; `csrc/gemm_abi.h` has the layout of what is passed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from causal_conv1d.layout import address
from mamba_ssm.kernels import products
from mamba_ssm.kernels.cpp.library import LIBRARY
from torch import Tensor


def _factor(x: Tensor) -> Tensor:
    """x with stride 1 along one of its two dimensions, copied only if it has none."""
    rows, columns = x.shape
    return x if x.stride(1) == 1 or columns <= 1 or x.stride(0) == 1 or rows <= 1 else x.contiguous()


def _described(x: Tensor) -> tuple[int, int, int]:
    """Address and strides of x, 1 along the dimension that has it or that has one element."""
    row_stride, column_stride = x.stride()
    if column_stride == 1 or x.shape[1] <= 1:
        return x.data_ptr(), row_stride, 1
    return x.data_ptr(), 1, column_stride


def gemm(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, accumulate: bool) -> None:
    """out = a @ b + bias, or out += a @ b: float32 a (rows, depth), b (depth, columns), contiguous bias (columns,), out
    (rows, columns) with stride 1 along a row."""
    if out.numel() == 0:
        return
    a, b = _factor(a), _factor(b)
    (rows, columns), depth = out.shape, a.shape[1]
    arguments = LIBRARY.structs.GemmArgs(
        rows=rows,
        columns=columns,
        depth=depth,
        threads=torch.get_num_threads(),
        accumulate=accumulate,
        a=_described(a),
        b=_described(b),
        bias=address(bias),
        c=address(out),
        c_stride=out.stride(0),
    )
    LIBRARY.call("mamba_gemm", arguments)


def _flat(x: Tensor) -> Tensor:
    """(..., size) -> (rows, size); of nothing, rows could not be inferred."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in) times weight (out, in), plus bias (out,): checked, float32."""
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    bias = None if bias is None else bias.contiguous()
    gemm(_flat(x), weight.t(), bias, _flat(out), False)
    return out


def linear_backward(dout: Tensor, x: Tensor, weight: Tensor, wants_dx: bool, wants_dweight: bool) -> tuple:
    """Gradients of x and weight, (0,)-shaped where they are not wanted."""
    dx, dweight = x.new_empty(0), weight.new_empty(0)
    if wants_dx:
        dx = linear(dout, weight.t(), None)
    if wants_dweight:
        dweight = _outer(_flat(dout), _flat(x))
    return dx, dweight


def _outer(dout: Tensor, x: Tensor) -> Tensor:
    """dout.t() @ x."""
    # the product is computed in columns of some ten numbers: a narrow x is better the rows
    if x.shape[1] < min(32, dout.shape[1]):
        out = x.new_empty(x.shape[1], dout.shape[1])
        gemm(x.t(), dout, None, out, False)
        return out.t()
    out = x.new_empty(dout.shape[1], x.shape[1])
    gemm(dout.t(), x, None, out, False)
    return out


# --- the faster of the two products, for the kernels of this set ---


def _takes_own(x: Tensor, weight_shape: Sequence[int]) -> bool:
    prefers = products.PREFER_OWN or (products.PREFER_OWN_NARROW and min(weight_shape) <= products.NARROW)
    return prefers and x.dtype == torch.float32


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., in) times weight (out, in), of one dtype."""
    large = x.numel() * len(weight) >= products.MIN_MULTIPLICATIONS
    return linear(x, weight, None) if large and _takes_own(x, weight.shape) else F.linear(x, weight)


def product_into(out: Tensor, x: Tensor, weight: Tensor, *, accumulate: bool = False) -> None:
    """Write (or add) `product(x, weight)` to `out` (..., out_features), with stride 1 along its last dimension and the
    others evenly spaced."""
    if _takes_own(x, weight.shape):
        gemm(_flat(x), weight.t(), None, out.view(out.shape[:-1].numel(), out.shape[-1]), accumulate)
    elif accumulate:
        out += F.linear(x, weight)
    else:
        out.copy_(F.linear(x, weight))


def weight_gradient(dout: Tensor, x: Tensor) -> Tensor:
    """dout (..., out), x (..., in) -> (out, in), the sum of their outer products."""
    dout, x = _flat(dout), _flat(x)
    return _outer(dout, x) if _takes_own(x, (dout.shape[1], x.shape[1])) else dout.t() @ x
