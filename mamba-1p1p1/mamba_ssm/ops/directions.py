"""One operator for all that stands between a mixer's input projection and its output projection, in one or two
directions: convolution -> x_proj -> dt_proj -> scan -> sum -> gate.

It keeps `xz`, the narrow projections `x_dbl` and the scan's saved states for backward, and computes the convolution and
the step sizes anew there. Channel-last throughout: xz (batch, seqlen, 2*dim) -> (batch, seqlen, dim). A kernel set that
has no `directions_forward` of its own runs it put together from others, which saves memory, not time.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from causal_conv1d.backend import KERNEL_DTYPES
from causal_conv1d.checks import check_all, check_dtype, check_ndim, check_tensor
from causal_conv1d.derivatives import gradients_by_reference, wants_reference
from causal_conv1d.ops.convolution import WIDTHS, causal_conv1d_ref
from mamba_ssm.kernels import composed
from mamba_ssm.kernels.arguments import (
    DIRECTION_TENSORS,
    OPTIONAL_OF_DIRECTION,
    Direction,
    split_directions,
    split_matrices,
    with_rates,
)
from mamba_ssm.kernels.registry import backends
from mamba_ssm.ops.operators import DIRECTIONS, OPERATORS
from mamba_ssm.ops.scan import scan_flops, selective_scan_ref
from torch import Tensor

__all__ = ["Direction", "directions_fn", "directions_ref", "has_masked"]

_DTYPES = (*KERNEL_DTYPES, torch.float64)


def directions_fn(
    xz: Tensor,
    directions: Sequence[Direction],
    share: float = 1.0,
    *,
    log_decay: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """`share * sum over directions of scan(conv(x)) * silu(z)`, differentiable in every tensor.

    Each direction computes `u = silu(conv(x))`, `dt, B, C = x_proj(u)`, `delta = dt_proj(dt)` and the selective scan of
    u with softplus(delta + dt_bias), A, B, C, D. Under autocast, `xz` and the projections are in autocast's dtype.

    Args:
        xz: (batch, seqlen, 2*dim), x first, z second, float32, bfloat16 or float16. Copied only if its last stride is
            not 1.
        directions: one or two.
        share: what the sum is multiplied with.
        log_decay: `A` of each direction holds log(-A), as a mixer's parameter does.
        mask: (batch, seqlen), which every token is multiplied with before and after the convolution.

    Returns:
        (batch, seqlen, dim) in the dtype of `xz`, contiguous.

    Raises:
        ValueError: a shape or device that does not fit. TypeError: a dtype that does not fit.
    """
    check_tensor("xz", xz)
    device_type = xz.device.type
    if torch.is_autocast_enabled(device_type):
        xz = xz.to(torch.get_autocast_dtype(device_type))
    _check(xz, directions)
    if mask is not None:
        check_all(xz, "xz", (("mask", mask, xz.shape[:2], "(batch, seqlen)"),), (torch.bool, torch.int64, *_DTYPES))
        mask = mask.to(torch.promote_types(xz.dtype, torch.float32))
    if wants_reference(xz, mask, *(tensor for direction in directions for tensor in direction)):
        return directions_ref(xz, directions, share, log_decay=log_decay, mask=mask)
    xz = xz if xz.stride(-1) == 1 else xz.contiguous()
    # a named tuple's slice is more than Dynamo before torch 2.12 can follow
    parameters = [tensor for direction in directions for tensor in tuple(direction)[:DIRECTION_TENSORS]]
    parameters += [None] * (2 * DIRECTION_TENSORS - len(parameters))
    reverse = [direction.reverse for direction in directions]
    wanted = any(tensor is not None and tensor.requires_grad for tensor in (xz, mask, *parameters))
    save_states = wanted and torch.is_grad_enabled()
    return torch.ops.mamba_ssm.directions(xz, mask, *parameters, reverse, share, save_states, log_decay)[0]


def has_masked(xz: Tensor, directions: Sequence[Direction]) -> bool:
    """Whether `directions_fn` with a mask is kernels of its own, not put together from others."""
    return backends.has(xz, "can_mask") and backends.pick(xz).can_mask(xz, directions)


def directions_ref(
    xz: Tensor,
    directions: Sequence[Direction],
    share: float = 1.0,
    *,
    log_decay: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """What `directions_fn` computes, on the reference operators."""
    x, z = xz.transpose(1, 2).chunk(2, dim=1)
    total, factor = None, None if mask is None else mask.to(xz.dtype).unsqueeze(1)
    x = x if factor is None else x * factor
    for conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_bias, A, D, reverse in directions:
        u = causal_conv1d_ref(x, conv_weight, conv_bias, "silu", reverse=reverse)
        u = u if factor is None else u * factor
        dt, B, C = split_matrices(F.linear(u.transpose(1, 2), x_proj_weight.to(u.dtype)), A.shape[1])
        delta = F.linear(dt, dt_proj_weight.to(u.dtype)).transpose(1, 2)
        A = -A.exp() if log_decay else A
        part = selective_scan_ref(u, delta, A, B, C, D, z, dt_bias, True, reverse=reverse)
        total = part if total is None else total + part
    return (total * share).transpose(1, 2)


def _check(xz: Tensor, directions: Sequence[Direction]) -> None:
    check_ndim("xz", xz, "(batch, seqlen, 2*dim)")
    check_dtype("xz", xz, _DTYPES)
    if xz.shape[2] % 2:
        raise ValueError(f"xz has shape {tuple(xz.shape)}, wanted (batch, seqlen, 2*dim)")
    if len(directions) not in (1, 2):
        raise ValueError(f"directions has {len(directions)} entries, wanted one or two")
    dim, dtypes = xz.shape[2] // 2, _DTYPES
    for each in directions:
        for name in ("conv_weight", "x_proj_weight", "dt_proj_weight", "A"):
            check_tensor(name, getattr(each, name))
            check_ndim(name, getattr(each, name), "(rows, columns)")
        if each.conv_weight.dim() != 2 or each.conv_weight.shape[1] not in WIDTHS:
            given = tuple(each.conv_weight.shape)
            raise ValueError(f"conv_weight has shape {given}, wanted (dim, width) with width 2, 3 or 4")
        rank, dstate = each.dt_proj_weight.shape[-1], each.A.shape[-1]
        shapes = {
            "conv_weight": (dim, each.conv_weight.shape[-1]),
            "conv_bias": (dim,),
            "x_proj_weight": (rank + 2 * dstate, dim),
            "dt_proj_weight": (dim, rank),
            "dt_bias": (dim,),
            "A": (dim, dstate),
            "D": (dim,),
        }
        layout = "the shape that fits xz, dt_proj_weight and A"
        given = ((name, getattr(each, name), wanted, layout) for name, wanted in shapes.items())
        check_all(xz, "xz", given, dtypes, OPTIONAL_OF_DIRECTION)
        for name in ("A", "D", "dt_bias"):
            tensor = getattr(each, name)
            if tensor is not None:
                check_dtype(name, tensor, KERNEL_DTYPES[:1] if xz.dtype != torch.float64 else (torch.float64,))


# --- registration ----------------------------------------------------------------------------------------------------


def _two(xz: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The tensors of two directions, the second empty if there is one only."""
    return (*tensors, xz.new_empty(0))[:2]


def _if_there(mask: Tensor | None) -> tuple[Tensor, ...]:
    """Kernel sets without masks are not told of one."""
    return () if mask is None else (mask,)


def _own(kernels: Any, xz: Tensor, directions: Sequence[Direction], mask: Tensor | None) -> str | None:
    """What `kernels` has that makes one of it all, if there is some: "stacked", which keeps what it saves of all
    directions in one tensor, with the weights in the place of the other's, and takes log(-A), or "plain"."""
    if xz.numel() == 0:
        return None
    if mask is not None:
        return "plain" if hasattr(kernels, "can_mask") and kernels.can_mask(xz, directions) else None
    if hasattr(kernels, "stacked_forward") and kernels.can_stack(xz, directions):
        return "stacked"
    return "plain" if hasattr(kernels, "directions_forward") else None


def _forward(xz, mask, *arguments):
    *parameters, reverse, share, save_states, log_decay = arguments
    kernels, directions = backends.pick(xz), split_directions(parameters, reverse)
    with torch.no_grad():
        own = _own(kernels, xz, directions, mask)
        if own == "stacked":
            out, x_dbl, weights, states = kernels.stacked_forward(xz, directions, share, save_states, log_decay)
            return out, x_dbl, weights, *_two(xz, [states])
        if own == "plain":
            given = xz, directions, share, save_states, log_decay
            out, x_dbls, states = kernels.directions_forward(*given, *_if_there(mask))
        else:
            directions = with_rates(directions, log_decay)
            out, x_dbls, states = composed.directions_forward(kernels, xz, directions, share, save_states, mask)
    return out, *_two(xz, x_dbls), *_two(xz, states)


def _backward(dout, xz, mask, *arguments):
    x_dbls, states, (*parameters, reverse, share, log_decay) = arguments[:2], arguments[2:4], arguments[4:]
    kernels, directions = backends.pick(xz), split_directions(parameters, reverse)
    stacked = x_dbls[0].dim() == 4  # of a forward by "stacked"
    with torch.no_grad():
        own = _own(kernels, xz, directions, mask)
        if stacked and own == "stacked":
            grads = kernels.stacked_backward(dout, xz, directions, *x_dbls, states[0], share, log_decay)
        else:
            x_dbls, states = (x_dbls[0].unbind(), ()) if stacked else (x_dbls, states)
            x_dbls, states = x_dbls[: len(directions)], states[: len(directions)]
            if own == "plain" and not stacked:
                given = dout, xz, directions, x_dbls, states, share, log_decay
                grads = kernels.directions_backward(*given, *_if_there(mask))
            else:
                # the forward may have run on another kernel set, and left nothing that this one can start from
                kernels = backends.fallback if stacked or own == "stacked" else kernels
                states, rates = states or [xz.new_empty(0)] * len(directions), with_rates(directions, log_decay)
                grads = composed.directions_backward(kernels, dout, xz, rates, x_dbls, states, share, mask)
                for number, rate in enumerate(rates if log_decay else ()):
                    place = 1 + number * DIRECTION_TENSORS + rate._fields.index("A")
                    grads[place] = grads[place] * rate.A
        dmask = None if mask is None else grads.pop()
        grads += [None] * (1 + 2 * DIRECTION_TENSORS - len(grads))
        return tuple(
            xz.new_empty(0) if like is None else grad.to(like.dtype).contiguous()
            for like, grad in zip((xz, mask, *parameters), (grads[0], dmask, *grads[1:]))
        )


def _fake_forward(xz, mask, *arguments):
    *parameters, reverse, _, save_states, _ = arguments
    (batch, seqlen, width), x_dbls, states = xz.shape, [], []
    kernels, directions = backends.pick(xz), split_directions(parameters, reverse)
    shape_of_states = kernels.states_shape
    if _own(kernels, xz, directions, mask) == "stacked":
        rows, dstate, count = directions[0].x_proj_weight.shape[0], directions[0].A.shape[1], len(directions)
        kept = (count, *shape_of_states(batch, width // 2, seqlen, dstate)) if save_states else (0,)
        weights = xz.new_empty(kernels.weights_size(directions, xz.dtype) if save_states else 0)
        x_dbl, states = xz.new_empty(count, batch, seqlen, rows), [xz.new_empty(kept, dtype=torch.float32)]
        return xz.new_empty(batch, seqlen, width // 2), x_dbl, weights, *_two(xz, states)
    for direction in directions:
        rows, dstate = direction.x_proj_weight.shape[0], direction.A.shape[1]
        x_dbls.append(xz.new_empty(batch, seqlen, rows))
        shape = shape_of_states(batch, width // 2, seqlen, dstate) if save_states else (0,)
        states.append(xz.new_empty(shape, dtype=torch.float32))
    return xz.new_empty(batch, seqlen, width // 2), *_two(xz, x_dbls), *_two(xz, states)


def _fake_backward(dout, xz, *arguments):
    wanted = (xz, arguments[0], *arguments[5:-3])
    return tuple(xz.new_empty(0) if like is None else like.new_empty(like.shape) for like in wanted)


def _reference(xz: Tensor, mask: Tensor | None, *arguments) -> Tensor:
    *parameters, reverse, share, log_decay = arguments
    return directions_ref(xz, split_directions(parameters, reverse), share, log_decay=log_decay, mask=mask)


def directions_flops(xz: Sequence[int], _mask: Sequence[int] | None, *arguments) -> int:
    """Of the operator's arguments, with shapes in the place of tensors."""
    *parameters, reverse, _, _, _ = arguments
    (batch, seqlen, width), total = xz, 0
    u = batch, width // 2, seqlen
    for conv_weight, _, x_proj_weight, dt_proj_weight, _, A, D, _ in split_directions(parameters, reverse):
        weights = conv_weight, x_proj_weight, dt_proj_weight
        total += 2 * batch * seqlen * sum(prod(weight) for weight in weights) + scan_flops(u, u, A, None, None, D, u)
    return total


def _save(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # what is kept for backward has no gradient, and zeros would have to be written
    *tensors, ctx.reverse, ctx.share, _, ctx.log_decay = inputs
    ctx.save_for_backward(*output[1:], *tensors)


def _differentiate(ctx, dout: Tensor | None, *_) -> tuple:
    x_dbl, x_dbl_b, states, states_b, *tensors = ctx.saved_tensors
    if dout is None:  # only what is kept for backward was asked of, which has no gradient
        return (None,) * (len(tensors) + 4)
    options = ctx.reverse, ctx.share, ctx.log_decay
    if torch.is_grad_enabled():
        return *gradients_by_reference(_reference, (*tensors, *options), (dout,)), None
    saved = (x_dbl, x_dbl_b, states, states_b)
    grads = torch.ops.mamba_ssm.directions_backward(dout, *tensors[:2], *saved, *tensors[2:], *options)
    return *(None if tensor is None else grad for tensor, grad in zip(tensors, grads)), None, None, None, None


_SAVED = "Tensor x_dbl, Tensor x_dbl_b, Tensor states, Tensor states_b"
_GRADIENTS = ", ".join(["Tensor"] * (2 + 2 * DIRECTION_TENSORS))
OPERATORS.register(
    f"directions(Tensor xz, Tensor? mask, {DIRECTIONS}, bool save_states, bool log_decay)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    save=_save,
    differentiate=_differentiate,
    flops=directions_flops,
)
OPERATORS.register(
    f"directions_backward(Tensor dout, Tensor xz, Tensor? mask, {_SAVED}, {DIRECTIONS}, bool log_decay)"
    f" -> ({_GRADIENTS})",
    _backward,
    _fake_backward,
)
