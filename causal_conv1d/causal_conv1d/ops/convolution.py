"""Causal depthwise 1-D convolution: one operator for a sequence, one for a step, and their obvious versions."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from causal_conv1d.backend import KERNEL_DTYPES
from causal_conv1d.checks import check_device, check_dtype, check_ndim, check_shape, check_tensor
from causal_conv1d.derivatives import gradients_by_reference, wants_reference
from causal_conv1d.kernels.registry import backends
from causal_conv1d.registration import Operators
from torch import Tensor

WIDTHS = (2, 3, 4)
_DTYPES = (*KERNEL_DTYPES, torch.float64)


def _uses_silu(activation: str | None) -> bool:
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation is {activation!r}, wanted None, 'silu' or 'swish'")
    return activation is not None


def _check_parameters(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_tensor("weight", weight)
    check_ndim("weight", weight, "(dim, width)")
    if weight.shape[0] != x.shape[1] or weight.shape[1] not in WIDTHS:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, wanted (dim, width) with dim {x.shape[1]} and width 2, 3 or 4"
        )
    check_dtype("weight", weight, _DTYPES)
    check_device("weight", weight, x, "x")
    if bias is not None:
        check_tensor("bias", bias)
        check_shape("bias", bias, (x.shape[1],), "(dim,)")
        check_dtype("bias", bias, _DTYPES)
        check_device("bias", bias, x, "x")


def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, *, reverse: bool = False
) -> Tensor:
    """Causal depthwise convolution along the sequence, differentiable.

    `out[b, d, t] = act(bias[d] + sum_w weight[d, w] * x[b, d, t - (width - 1) + w])`, with zeros left of the sequence.

    Args:
        x: (batch, dim, seqlen), any strides; float32, bfloat16, float16 or float64. Channel-last memory (stride 1 along
            dim) is as fast as contiguous and is not copied.
        weight: (dim, width) with width 2, 3 or 4.
        bias: (dim,) or None.
        activation: None, "silu" or "swish".
        reverse: run against the sequence, that is `flip(conv(flip(x)))`, without the flipped copies.

    Returns:
        (batch, dim, seqlen) in the dtype and memory layout of `x`; sums are taken in float32 (float64 for float64 `x`).

    Raises:
        ValueError: a shape, device or activation that does not fit.
        TypeError: not a tensor, or a dtype that does not fit.
    """
    check_tensor("x", x)
    check_ndim("x", x, "(batch, dim, seqlen)")
    check_dtype("x", x, _DTYPES)
    _check_parameters(x, weight, bias)
    if wants_reference(x, weight, bias):
        return causal_conv1d_ref(x, weight, bias, activation, reverse=reverse)
    return torch.ops.causal_conv1d.forward(x, weight, bias, _uses_silu(activation), reverse)


def causal_conv1d_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, *, reverse: bool = False
) -> Tensor:
    """What `causal_conv1d_fn` computes, as one padded `conv1d`; also the version for other widths."""
    silu, (dim, width) = _uses_silu(activation), weight.shape
    wide = x if x.dtype == torch.float64 else x.float()
    wide = wide.flip(-1) if reverse else wide
    out = F.conv1d(
        F.pad(wide, (width - 1, 0)),
        weight.to(wide.dtype).unsqueeze(1),
        None if bias is None else bias.to(wide.dtype),
        groups=dim,
    )
    out = F.silu(out) if silu else out
    return (out.flip(-1) if reverse else out).to(x.dtype)


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """One step of the convolution, for decoding token by token; not differentiated.

    Args:
        x: (batch, dim), the new token.
        conv_state: (batch, dim, width), the last `width` tokens; moved on by one in place.
        weight, bias, activation: as for `causal_conv1d_fn`.

    Returns:
        (batch, dim) in the dtype of `x`.

    Raises:
        ValueError, TypeError: as for `causal_conv1d_fn`.
    """
    check_tensor("x", x)
    check_ndim("x", x, "(batch, dim)")
    check_dtype("x", x, _DTYPES)
    _check_parameters(x, weight, bias)
    check_tensor("conv_state", conv_state)
    check_shape("conv_state", conv_state, (*x.shape, weight.shape[1]), "(batch, dim, width)")
    check_dtype("conv_state", conv_state, (torch.float64,) if x.dtype == torch.float64 else KERNEL_DTYPES)
    check_device("conv_state", conv_state, x, "x")
    _check_writable(conv_state, x)
    if wants_reference(x, conv_state, weight, bias):
        return causal_conv1d_update_ref(x, conv_state, weight, bias, activation)
    bias = None if bias is None else bias.detach()
    return torch.ops.causal_conv1d.update(x.detach(), conv_state, weight.detach(), bias, _uses_silu(activation))


def _check_writable(conv_state: Tensor, x: Tensor) -> None:
    """Raise what torch's own in-place operations raise: one sentence, unless `conv_state` can be written to."""
    if conv_state.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("conv_state requires a gradient, wanted a state without: it is written to")
    if torch.compiler.is_compiling():
        return
    if conv_state.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError("conv_state was made in inference mode, wanted that it is written to in inference mode too")
    if _may_overlap(conv_state):
        given = f"strides {conv_state.stride()} and shape {tuple(conv_state.shape)}"
        raise RuntimeError(f"conv_state has {given}, wanted a place in memory of its own for each element")
    if x.numel() and x.untyped_storage().data_ptr() == conv_state.untyped_storage().data_ptr():
        raise RuntimeError("x shares its memory with conv_state, wanted a tensor of its own: conv_state is written to")


def _may_overlap(x: Tensor) -> bool:
    """Whether two elements of `x` may be at one place: where a dimension's step is shorter than all of those inside."""
    reach = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape) if size > 1):
        if stride < reach:
            return True
        reach = stride * (size - 1) + reach
    return False


def causal_conv1d_update_ref(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """What `causal_conv1d_update` computes."""
    silu = _uses_silu(activation)
    conv_state.copy_(torch.roll(conv_state, shifts=-1, dims=-1))
    conv_state[:, :, -1] = x
    out = torch.sum(conv_state * weight, dim=-1)
    out = out if bias is None else out + bias
    return (F.silu(out) if silu else out).to(x.dtype)


# --- registration ----------------------------------------------------------------------------------------------------


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    return backends.pick(x).conv_forward(x, weight, bias, silu, reverse)


def _backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return backends.pick(x).conv_backward(dout, x, weight, bias, silu, reverse)


def _update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    out = backends.pick(x).conv_update(x, conv_state, weight, bias, silu)
    # kernels write past torch: what has saved the state for its gradient is to know
    torch.autograd.graph.increment_version(conv_state)
    return out


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    return torch.empty_like(x)


def _fake_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return torch.empty_like(x), weight.new_empty(weight.shape), dbias


def _fake_update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    return x.new_empty(x.shape)


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    return causal_conv1d_ref(x, weight, bias, "silu" if silu else None, reverse=reverse)


def _flops(x: Sequence[int], weight: Sequence[int], *_) -> int:
    return 2 * prod(x) * weight[1]


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, ctx.silu, ctx.reverse = inputs
    ctx.save_for_backward(x, weight, bias)


def _differentiate(ctx, dout: Tensor) -> tuple:
    x, weight, bias = ctx.saved_tensors
    if torch.is_grad_enabled():
        return gradients_by_reference(_reference, (x, weight, bias, ctx.silu, ctx.reverse), (dout,))
    dx, dweight, dbias = torch.ops.causal_conv1d.backward(dout, x, weight, bias, ctx.silu, ctx.reverse)
    return dx, dweight, None if bias is None else dbias, None, None


OPERATORS = Operators("causal_conv1d")
OPERATORS.register(
    "forward(Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse) -> Tensor",
    _forward,
    _fake_forward,
    save=_save,
    differentiate=_differentiate,
    flops=_flops,
)
OPERATORS.register(
    "backward(Tensor dout, Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
OPERATORS.register(
    "update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, bool silu) -> Tensor", _update, _fake_update
)
