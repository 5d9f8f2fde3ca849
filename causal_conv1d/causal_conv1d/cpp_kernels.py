"""The C++ kernel set for CPUs: `operators.py` has its contract, `csrc/conv1d_abi.h` the layout of what it passes."""

from __future__ import annotations

import sys
from types import ModuleType

import torch
from causal_conv1d.native import ABSENT_SIGNAL, DTYPE_CODES, address, call, load_library, signal
from torch import Tensor

_CONV_FIELDS = 9 + 2 * 5 + 2 + 2 * 5 + 2
_UPDATE_FIELDS = 4 + 4 + 5 + 3
_library = None


def load() -> ModuleType:
    """This module, with its library loaded; ImportError if there is none."""
    global _library
    if _library is None:
        sizes = {"causal_conv1d_args_bytes": _CONV_FIELDS, "causal_conv1d_one_step_args_bytes": _UPDATE_FIELDS}
        _library = load_library(__file__, sizes)
    return sys.modules[__name__]


def _float32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()


def _is_channel_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and (x.stride(2) != 1 or x.shape[2] == 1)


def _readable(x: Tensor, channel_last: bool) -> Tensor:
    """`x` itself if it has stride 1 along the dimension wanted, else a copy that has."""
    # clone, since contiguous() takes the strides of a single number as they are
    if channel_last:
        return x if x.stride(1) == 1 else x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
    return x if x.stride(2) == 1 else x.clone(memory_format=torch.contiguous_format)


def _sizes(x: Tensor, weight: Tensor, silu: bool, reverse: bool, accumulate: bool = False) -> tuple[int, ...]:
    return (*x.shape, weight.shape[1], silu, reverse, torch.get_num_threads(), _is_channel_last(x), accumulate)


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    channel_last = _is_channel_last(x)
    seen, target = _readable(x, channel_last), _readable(out, channel_last)
    weight, bias = _float32(weight), _float32(bias)
    fields = (
        *_sizes(seen, weight, silu, reverse),
        *signal(seen),
        *signal(target),
        weight.data_ptr(),
        address(bias),
        *(ABSENT_SIGNAL * 2),
        *(0, 0),
    )
    call(_library.causal_conv1d, fields)
    return out if target is out else out.copy_(target)


def conv_backward_into(
    dx: Tensor,
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    reverse: bool,
    *,
    accumulate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias, float32, and of x into `dx`, added to what it holds if `accumulate`.

    `dx`, `dout` and `x` are of one dtype, and have stride 1 along the same dimension, seqlen or dim.
    """
    along = 1 if _is_channel_last(x) else 2
    for tensor in (dx, dout, x):
        if tensor.shape != x.shape or tensor.dtype != x.dtype or tensor.stride(along) != 1:
            raise ValueError(
                f"a convolution's gradients have strides {tensor.stride()}, wanted those of x, {x.stride()}"
            )
    dweight = weight.new_empty(weight.shape, dtype=torch.float32)
    dbias = weight.new_empty(0 if bias is None else bias.shape, dtype=torch.float32)
    weight, bias = _float32(weight), _float32(bias)
    fields = (
        *_sizes(x, weight, silu, reverse, accumulate),
        *signal(x),
        *ABSENT_SIGNAL,
        weight.data_ptr(),
        address(bias),
        *signal(dout),
        *signal(dx),
        dweight.data_ptr(),
        0 if bias is None else dbias.data_ptr(),
    )
    call(_library.causal_conv1d, fields)
    return dweight, dbias


def conv_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x)
    if dx.numel() == 0:
        dweight, dbias = torch.zeros_like(weight), weight.new_zeros(0) if bias is None else torch.zeros_like(bias)
    else:
        channel_last = _is_channel_last(x)
        seen, target = _readable(x, channel_last), _readable(dx, channel_last)
        dout = _readable(dout.to(x.dtype), channel_last)
        dweight, dbias = conv_backward_into(target, dout, seen, weight, bias, silu, reverse)
        dx = dx if target is dx else dx.copy_(target)
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype if bias is None else bias.dtype)


def conv_update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    out = x.new_empty(x.shape)
    if out.numel() == 0:
        return out
    weight, bias = _float32(weight), _float32(bias)
    fields = (
        *(*x.shape, weight.shape[1], silu),
        *(x.data_ptr(), DTYPE_CODES[x.dtype], *x.stride()),
        *(conv_state.data_ptr(), DTYPE_CODES[conv_state.dtype], *conv_state.stride()),
        *(out.data_ptr(), weight.data_ptr(), address(bias)),
    )
    call(_library.causal_conv1d_one_step, fields)
    return out
