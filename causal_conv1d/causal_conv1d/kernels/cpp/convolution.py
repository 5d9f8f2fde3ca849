"""The convolution of the C++ kernel set; `csrc/conv1d_abi.h` has the layout of what is passed."""

from __future__ import annotations

import torch
from causal_conv1d.kernels.cpp.library import LIBRARY
from causal_conv1d.layout import address, float32
from causal_conv1d.native import DTYPE_CODES, signal
from torch import Tensor


def _is_channel_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and (x.stride(2) != 1 or x.shape[2] == 1)


def _readable(x: Tensor, channel_last: bool) -> Tensor:
    """`x` itself if it has stride 1 along the dimension wanted, else a copy that has."""
    # clone, since contiguous() takes the strides of a single number as they are
    if channel_last:
        return x if x.stride(1) == 1 else x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
    return x if x.stride(2) == 1 else x.clone(memory_format=torch.contiguous_format)


def _sizes(x: Tensor, weight: Tensor, silu: bool, reverse: bool) -> dict[str, int]:
    batch, dim, seqlen = x.shape
    sizes = {"batch": batch, "dim": dim, "seqlen": seqlen, "width": weight.shape[1], "silu": silu, "reverse": reverse}
    return sizes | {"threads": torch.get_num_threads(), "channel_last": _is_channel_last(x)}


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    channel_last = _is_channel_last(x)
    seen, target = _readable(x, channel_last), _readable(out, channel_last)
    weight, bias = float32(weight), float32(bias)
    arguments = LIBRARY.structs.ConvArgs(
        **_sizes(seen, weight, silu, reverse),
        x=signal(seen),
        out=signal(target),
        weight=address(weight),
        bias=address(bias),
    )
    LIBRARY.call("causal_conv1d", arguments)
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
    weight, wide_bias = float32(weight), float32(bias)
    arguments = LIBRARY.structs.ConvArgs(
        **_sizes(x, weight, silu, reverse),
        accumulate=accumulate,
        x=signal(x),
        weight=address(weight),
        bias=address(wide_bias),
        dout=signal(dout),
        dx=signal(dx),
        dweight=address(dweight),
        dbias=0 if bias is None else address(dbias),
    )
    LIBRARY.call("causal_conv1d", arguments)
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
    weight, bias = float32(weight), float32(bias)
    (batch, dim), (x_batch, x_channel), (state_batch, state_channel, state_step) = (
        x.shape,
        x.stride(),
        conv_state.stride(),
    )
    arguments = LIBRARY.structs.ConvUpdateArgs(
        batch=batch,
        dim=dim,
        width=weight.shape[1],
        silu=silu,
        x=address(x),
        x_dtype=DTYPE_CODES[x.dtype],
        x_batch_stride=x_batch,
        x_channel_stride=x_channel,
        state=address(conv_state),
        state_dtype=DTYPE_CODES[conv_state.dtype],
        state_batch_stride=state_batch,
        state_channel_stride=state_channel,
        state_step_stride=state_step,
        out=address(out),
        weight=address(weight),
        bias=address(bias),
    )
    LIBRARY.call("causal_conv1d_one_step", arguments)
    return out
