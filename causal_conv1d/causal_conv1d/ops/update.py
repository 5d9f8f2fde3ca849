"""Causal depthwise 1-D convolution of the next tokens, with a state of the last ones: for decoding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from causal_conv1d.backend import KERNEL_DTYPES
from causal_conv1d.checks import check_device, check_dtype, check_shape, check_tensor
from causal_conv1d.derivatives import wants_reference
from causal_conv1d.kernels.registry import backends
from causal_conv1d.ops.convolution import OPERATORS, check_parameters, uses_silu
from torch import Tensor

_DTYPES = (*KERNEL_DTYPES, torch.float64)
_INDICES = (torch.int32, torch.int64)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The convolution of the next token, or tokens, whose state moves on in place.

    Args:
        x: (batch, dim), the next token, or (batch, dim, steps).
        conv_state: (batch, dim, length), the last tokens, at least width - 1 of them; not differentiated.
        weight, bias, activation: as for `causal_conv1d_fn`.
        cache_seqlens: (batch,), whole numbers: `conv_state` is a ring into which so many tokens have gone.
        conv_state_indices: (batch,), whole numbers: `conv_state` has more sequences, and these are the ones of `x`.

    Returns:
        The shape and dtype of `x`.

    Raises:
        ValueError, TypeError: as for `causal_conv1d_fn`. RuntimeError: `conv_state` cannot be written to as torch's own
        in-place operations demand. IndexError: `conv_state_indices` holds what is no sequence of `conv_state`.
    """
    silu = uses_silu(activation)
    _check(x, conv_state, weight, bias, cache_seqlens, conv_state_indices)
    _check_writable(conv_state, x)
    tensors = x, conv_state, weight, bias
    plain = x.dim() == 2 and conv_state.shape[2] == weight.shape[1] and cache_seqlens is conv_state_indices is None
    wants_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if plain and not wants_gradient and not wants_reference(*tensors):
        return torch.ops.causal_conv1d.update(x, conv_state, weight, bias, silu)
    return causal_conv1d_update_ref(*tensors, activation, cache_seqlens, conv_state_indices)


def causal_conv1d_update_ref(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """What `causal_conv1d_update` computes."""
    (dim, width), steps = weight.shape, 1 if x.dim() == 2 else x.shape[2]
    state = conv_state if conv_state_indices is None else conv_state[conv_state_indices.long()]
    length, new = state.shape[2], x.reshape(*x.shape[:2], steps)
    state = state.detach()
    if cache_seqlens is None:
        seen = torch.cat([state.to(new.dtype), new], dim=2)
        moved = seen[..., seen.shape[2] - length :].detach().to(state.dtype)
        seen = seen[..., seen.shape[2] - steps - (width - 1) :]
    else:
        written = cache_seqlens.long()[:, None]
        before = (written + torch.arange(1 - width, 0, device=x.device)) % length
        places = (written + torch.arange(steps, device=x.device)) % length
        read = state.gather(2, before.unsqueeze(1).expand(-1, dim, -1))
        seen = torch.cat([read.to(new.dtype), new], dim=2)
        # of more tokens than there is room for, the last stay
        kept = slice(max(0, steps - length), None)
        places = places[:, kept].unsqueeze(1).expand(-1, dim, -1)
        moved = state.scatter(2, places, new[..., kept].detach().to(state.dtype))
    if conv_state_indices is None:
        conv_state.copy_(moved)
    else:
        conv_state.index_copy_(0, conv_state_indices.long(), moved)
    wide = seen.to(torch.promote_types(x.dtype, torch.float32))
    taps = weight.to(wide.dtype).unsqueeze(1)
    out = F.conv1d(wide, taps, None if bias is None else bias.to(wide.dtype), groups=dim)
    return (F.silu(out) if uses_silu(activation) else out).to(x.dtype).reshape(x.shape)


def _check(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
) -> None:
    check_tensor("x", x)
    if x.dim() not in (2, 3):
        raise ValueError(f"x has shape {tuple(x.shape)}, wanted (batch, dim) or (batch, dim, steps)")
    check_dtype("x", x, _DTYPES)
    check_parameters(x, weight, bias)
    check_tensor("conv_state", conv_state)
    batch, dim, width = *x.shape[:2], weight.shape[1]
    if conv_state.dim() != 3 or conv_state.shape[1] != dim or conv_state.shape[2] < width - 1:
        given = tuple(conv_state.shape)
        raise ValueError(f"conv_state has shape {given}, wanted (batch, dim, width) = {(batch, dim, width)} or longer")
    if conv_state_indices is None and conv_state.shape[0] != batch:
        given = tuple(conv_state.shape)
        raise ValueError(f"conv_state has shape {given}, wanted (batch, dim, width) = {(batch, dim, width)} or longer")
    check_dtype("conv_state", conv_state, (torch.float64,) if x.dtype == torch.float64 else KERNEL_DTYPES)
    check_device("conv_state", conv_state, x, "x")
    for name, indices in (("cache_seqlens", cache_seqlens), ("conv_state_indices", conv_state_indices)):
        if indices is not None:
            check_tensor(name, indices)
            check_shape(name, indices, (batch,), "(batch,)")
            check_dtype(name, indices, _INDICES)
            check_device(name, indices, x, "x")
    if cache_seqlens is not None and conv_state.shape[2] == 0:
        raise ValueError("conv_state has no length, wanted one of at least 1 beside cache_seqlens")


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


# --- registration ----------------------------------------------------------------------------------------------------


def _update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    out = backends.pick(x).conv_update(x, conv_state, weight, bias, silu)
    # kernels write past torch: what has saved the state for its gradient is to know
    torch.autograd.graph.increment_version(conv_state)
    return out


def _fake_update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    return x.new_empty(x.shape)


OPERATORS.register(
    "update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, bool silu) -> Tensor", _update, _fake_update
)
