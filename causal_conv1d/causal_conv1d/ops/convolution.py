"""Causal depthwise 1-D convolution of a sequence: the function, its obvious version, and the operator."""

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


def uses_silu(activation: str | None) -> bool:
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation is {activation!r}, wanted None, 'silu' or 'swish'")
    return activation is not None


def check_parameters(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_tensor("weight", weight)
    check_ndim("weight", weight, "(dim, width)")
    if weight.shape[0] != x.shape[1] or weight.shape[1] < 1:
        given = tuple(weight.shape)
        raise ValueError(f"weight has shape {given}, wanted (dim, width) with dim {x.shape[1]} and width 1 or more")
    check_dtype("weight", weight, _DTYPES)
    check_device("weight", weight, x, "x")
    if bias is not None:
        check_tensor("bias", bias)
        check_shape("bias", bias, (x.shape[1],), "(dim,)")
        check_dtype("bias", bias, _DTYPES)
        check_device("bias", bias, x, "x")


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | str | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    *,
    reverse: bool = False,
    mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal depthwise convolution along the sequence, differentiable.

    `out[b, d, t] = act(bias[d] + sum_w weight[d, w] * x[b, d, t - (width - 1) + w])`, with zeros left of the sequence.

    Args:
        x: (batch, dim, seqlen), any strides; float32, bfloat16, float16 or float64. Channel-last memory (stride 1 along
            dim) is as fast as contiguous and is not copied.
        weight: (dim, width); there are kernels for widths of 2, 3 and 4.
        bias: (dim,) or None.
        seq_idx: (batch, seqlen), whole numbers: tokens are seen by tokens of the same number only. In the first
            releases the activation stood in this place; a string here is one.
        initial_states: (batch, dim, width - 1), what stands left of the sequence instead of zeros.
        return_final_states: also return the last width - 1 tokens (batch, dim, width - 1).
        final_states_out: where to write those.
        activation: None, "silu" or "swish".
        reverse: run against the sequence, that is `flip(conv(flip(x)))`, without the flipped copies.
        mask: (batch, seqlen), what x is multiplied with, and out after all else; differentiable. Not with states or
            `seq_idx`.

    Returns:
        (batch, dim, seqlen) in the dtype and memory layout of `x`; sums are taken in float32 (float64 for float64 `x`).
        With `return_final_states`, that and the final states.

    Raises:
        ValueError: a shape, device or activation that does not fit.
        TypeError: not a tensor, or a dtype that does not fit.
    """
    if isinstance(seq_idx, str):
        seq_idx, activation = None, seq_idx
    check_tensor("x", x)
    check_ndim("x", x, "(batch, dim, seqlen)")
    check_dtype("x", x, _DTYPES)
    check_parameters(x, weight, bias)
    silu = uses_silu(activation)
    if seq_idx is None and initial_states is None and not return_final_states:
        return (
            _convolve(x, weight, bias, silu, reverse) if mask is None else _mask(x, mask, weight, bias, silu, reverse)
        )
    if mask is not None:
        raise ValueError("mask is given beside seq_idx or states, wanted one of them: states are of what is not masked")
    _check_states(x, weight, seq_idx, initial_states, return_final_states, reverse)
    if seq_idx is not None:
        return _convolve_packed(x, weight, bias, silu, seq_idx)
    before = weight.shape[1] - 1
    states = x.new_zeros(*x.shape[:2], before) if initial_states is None else initial_states.to(x.dtype)
    seen = torch.cat([states, x], dim=-1)
    out = _convolve(seen, weight, bias, silu, reverse)[..., before:]
    if not return_final_states:
        return out
    last = seen[..., seen.shape[-1] - before :].contiguous()
    return out, last if final_states_out is None else final_states_out.copy_(last)


def _check_states(
    x: Tensor,
    weight: Tensor,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    return_final_states: bool,
    reverse: bool,
) -> None:
    if reverse:
        raise ValueError("reverse is True beside seq_idx or states, wanted one of them: states are left of a sequence")
    if seq_idx is not None:
        if initial_states is not None or return_final_states:
            raise ValueError("seq_idx is given beside states, wanted one of them: of which sequence would they be?")
        check_tensor("seq_idx", seq_idx)
        check_shape("seq_idx", seq_idx, (x.shape[0], x.shape[2]), "(batch, seqlen)")
        check_dtype("seq_idx", seq_idx, (torch.int32, torch.int64))
        check_device("seq_idx", seq_idx, x, "x")
    if initial_states is not None:
        check_tensor("initial_states", initial_states)
        check_shape("initial_states", initial_states, (*x.shape[:2], weight.shape[1] - 1), "(batch, dim, width - 1)")
        check_dtype("initial_states", initial_states, _DTYPES)
        check_device("initial_states", initial_states, x, "x")


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    if weight.shape[1] not in WIDTHS or wants_reference(x, weight, bias):
        return _reference(x, weight, bias, silu, reverse)
    return torch.ops.causal_conv1d.forward(x, weight, bias, silu, reverse)


def _mask(x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    check_tensor("mask", mask)
    check_shape("mask", mask, (x.shape[0], x.shape[2]), "(batch, seqlen)")
    check_dtype("mask", mask, _DTYPES)
    check_device("mask", mask, x, "x")
    plain = weight.shape[1] not in WIDTHS or wants_reference(x, mask, weight, bias)
    if plain or not backends.has(x, "conv_forward_masked"):
        factor = mask.unsqueeze(1).to(x.dtype)
        return _convolve(x * factor, weight, bias, silu, reverse) * factor
    return torch.ops.causal_conv1d.masked(x, mask, weight, bias, silu, reverse)


def _convolve_packed(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, seq_idx: Tensor) -> Tensor:
    """Sequences one behind the other, as `seq_idx` (batch, seqlen) tells them apart."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    out, width = torch.zeros_like(wide), weight.shape[1]
    for shift in range(min(width, x.shape[2])):
        same = seq_idx[:, shift:] == seq_idx[:, : x.shape[2] - shift]
        part = wide[..., : x.shape[2] - shift] * same.unsqueeze(1) * weight[:, width - 1 - shift, None].to(wide.dtype)
        out = out + F.pad(part, (shift, 0))
    out = out if bias is None else out + bias.to(wide.dtype)[:, None]
    return (F.silu(out) if silu else out).to(x.dtype)


def causal_conv1d_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, *, reverse: bool = False
) -> Tensor:
    """What `causal_conv1d_fn` computes, as one padded `conv1d`; also the version for other widths."""
    silu, (dim, width) = uses_silu(activation), weight.shape
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


# --- registration ----------------------------------------------------------------------------------------------------


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    return backends.pick(x).conv_forward(x, weight, bias, silu, reverse)


def _backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return backends.pick(x).conv_backward(dout, x, weight, bias, silu, reverse)


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    return torch.empty_like(x)


def _fake_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return torch.empty_like(x), weight.new_empty(weight.shape), dbias


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


def _masked_reference(
    x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> Tensor:
    factor = mask.unsqueeze(1).to(x.dtype)
    return _reference(x * factor, weight, bias, silu, reverse) * factor


def _masked(x: Tensor, *given) -> Tensor:
    return getattr(backends.pick(x), "conv_forward_masked", _masked_reference)(x, *given)


def _masked_backward(dout: Tensor, x: Tensor, *given) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = backends.pick(x)
    if hasattr(kernels, "conv_backward_masked"):
        return kernels.conv_backward_masked(dout, x, *given)
    grads = gradients_by_reference(_masked_reference, (x, *given), (dout,))[:4]
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


def _fake_masked(x: Tensor, *given) -> Tensor:
    return torch.empty_like(x)


def _fake_masked_backward(dout: Tensor, x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, *_) -> tuple:
    dbias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return torch.empty_like(x), mask.new_empty(mask.shape), weight.new_empty(weight.shape), dbias


def _save_masked(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.silu, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_masked(ctx, dout: Tensor) -> tuple:
    tensors = ctx.saved_tensors
    if torch.is_grad_enabled():
        return gradients_by_reference(_masked_reference, (*tensors, ctx.silu, ctx.reverse), (dout,))
    grads = torch.ops.causal_conv1d.masked_backward(dout, *tensors, ctx.silu, ctx.reverse)
    return *(None if tensor is None else grad for tensor, grad in zip(tensors, grads)), None, None


def _masked_flops(x: Sequence[int], mask: Sequence[int], weight: Sequence[int], *_) -> int:
    return _flops(x, weight)


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
    "masked(Tensor x, Tensor mask, Tensor weight, Tensor? bias, bool silu, bool reverse) -> Tensor",
    _masked,
    _fake_masked,
    save=_save_masked,
    differentiate=_differentiate_masked,
    flops=_masked_flops,
)
OPERATORS.register(
    "masked_backward(Tensor dout, Tensor x, Tensor mask, Tensor weight, Tensor? bias, bool silu, bool reverse)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _masked_backward,
    _fake_masked_backward,
)
