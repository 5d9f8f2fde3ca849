"""The mixer over the visible tokens of a grid (FastMaskVim, Kapse et al. 2025), in two operators around the scans.

What `mamba_ssm.ops.pooled` does for lines whose tokens are all there, for lines of which each image shows other tokens:
one pass over the tokens before the scans and one behind them, wherever they stand, and both again for the gradient.
Where a kernel set has none of it the references run, and the mixer is put together from the convolution, the scan and
torch's own operations instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

import torch
import torch.nn.functional as F
from causal_conv1d.backend import KERNEL_DTYPES
from causal_conv1d.checks import check_device, check_dtype, check_ndim, check_shape, check_tensor
from causal_conv1d.derivatives import gradients_by_reference, wants_reference
from causal_conv1d.ops.convolution import WIDTHS
from mamba_ssm.kernels.arguments import Taps, VisibleLines
from mamba_ssm.kernels.registry import backends
from mamba_ssm.ops.operators import OPERATORS, TAPS
from torch import Tensor

__all__ = ["Taps", "VisibleLines", "visible_conv_fn", "visible_conv_ref", "visible_gate_fn", "visible_gate_ref"]

_DTYPES = (*KERNEL_DTYPES, torch.float64)


def visible_conv_fn(x: Tensor, forward: Taps, backward: Taps, lines: VisibleLines) -> tuple[Tensor, Tensor, Tensor]:
    """Both directions' causal convolutions with silu, u and u_b, seen through what the mixer needs of them.

    Args:
        x: (batch, V, dim), float32, bfloat16, float16 or float64, any strides; stride 1 along dim is not copied.

    Returns:
        D * u + D_b * u_b (batch, V, dim), and the lines' pooled tokens of u and of u_b, (batch, lines, dim) each, zero
        where a line shows none, in the dtype of `x`. Differentiable in `x` and the taps.

    Raises:
        ValueError: a shape or device that does not fit, or lines that name other tokens than those of `x`. TypeError:
            not a tensor, or another dtype.
    """
    forward, backward, lines = Taps(*forward), Taps(*backward), VisibleLines(*lines)
    _check("x", x, lines)
    check_tensor("weight", forward.weight)
    check_ndim("weight", forward.weight, "(dim, width)")
    dim, width = x.shape[2], forward.weight.shape[1]
    if width not in WIDTHS:
        raise ValueError(f"weight has width {width}, wanted 2 to 4")
    for taps in (forward, backward):
        check_tensor("D", taps.D)
        shapes = (dim, width), (dim,), (dim,)
        _check_parameters(x, zip(Taps._fields, taps, shapes))
    if wants_reference(x, *forward, *backward):
        return visible_conv_ref(x, forward, backward, lines)
    return torch.ops.mamba_ssm.visible_conv(x, *forward, *backward, *lines)


def visible_gate_fn(
    skip: Tensor,
    groups: Tensor,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    lines: VisibleLines,
    share: float,
) -> Tensor:
    """`norm(share * (skip + groups)) * silu(z)`, each token with its line's group.

    Args:
        skip, z: (batch, V, dim), of one dtype.
        groups: (batch, lines, dim), in that dtype.
        weight, bias: (dim,) of the LayerNorm; no norm if `weight` is None.

    Returns:
        (batch, V, dim) in the dtype of `skip`. Differentiable in every tensor but those of `lines`.

    Raises:
        ValueError: a shape or device that does not fit, or lines that name other tokens than those of `skip`.
            TypeError: not a tensor, or another dtype.
    """
    lines = VisibleLines(*lines)
    _check("skip", skip, lines)
    for name, tensor in (("groups", groups), ("z", z)):
        check_tensor(name, tensor)
        check_device(name, tensor, skip, "skip")
    if groups.shape != (skip.shape[0], lines.count, skip.shape[2]) or z.shape != skip.shape:
        raise ValueError(
            f"groups and z have shapes {tuple(groups.shape)} and {tuple(z.shape)}, wanted (batch, {lines.count}, dim)"
            f" and {tuple(skip.shape)}"
        )
    if not skip.dtype == groups.dtype == z.dtype:
        raise ValueError(f"skip, groups and z are {skip.dtype}, {groups.dtype} and {z.dtype}, wanted one dtype")
    if weight is None and bias is not None:
        raise ValueError("bias is given without weight, wanted both or no bias: there is no norm without a weight")
    _check_parameters(skip, [("weight", weight, skip.shape[2:]), ("bias", bias, skip.shape[2:])])
    if wants_reference(skip, groups, z, weight, bias):
        return visible_gate_ref(skip, groups, z, weight, bias, eps, lines, share)
    order, starts, _ = lines
    return torch.ops.mamba_ssm.visible_gate(skip, groups, z, weight, bias, eps, order, starts, share)


def _check(name: str, x: Tensor, lines: VisibleLines) -> None:
    check_tensor(name, x)
    check_ndim(name, x, "(batch, V, dim)")
    check_dtype(name, x, _DTYPES)
    for given, tensor in (("order", lines.order), ("starts", lines.starts)):
        if given == "starts" or tensor is not None:
            check_tensor(given, tensor)
            check_device(given, tensor, x, name)
    if lines.starts.dim() != 2 or len(lines.starts) != len(x) or lines.count < 1 or lines.starts.dtype != torch.int64:
        raise ValueError(
            f"starts is {tuple(lines.starts.shape)} of {lines.starts.dtype}, wanted ({len(x)}, lines + 1) of "
            "torch.int64"
        )
    if lines.order is not None and (lines.order.shape != x.shape[:2] or lines.order.dtype != torch.int64):
        raise ValueError(
            f"order is {tuple(lines.order.shape)} of {lines.order.dtype}, wanted {tuple(x.shape[:2])} of torch.int64"
        )


def _check_parameters(x: Tensor, given: Iterable[tuple[str, Tensor | None, Sequence[int]]]) -> None:
    """`given` has a name, a tensor or None, and the shape wanted, for each parameter."""
    for name, parameter, shape in given:
        if parameter is not None:
            check_tensor(name, parameter)
            check_shape(name, parameter, shape, "(dim, width)" if len(shape) == 2 else "(dim,)")
            check_dtype(name, parameter, _DTYPES)
            check_device(name, parameter, x, "x")


# --- reference -------------------------------------------------------------------------------------------------------


def _line_of(lines: VisibleLines, tokens: int) -> Tensor:
    """The line of every place of the walk, (batch, V)."""
    places = torch.arange(tokens, device=lines.starts.device).expand(len(lines.starts), -1).contiguous()
    return torch.searchsorted(lines.starts.contiguous(), places, right=True) - 1


def _walk(x: Tensor, lines: VisibleLines) -> Tensor:
    return x if lines.order is None else x.gather(1, lines.order.unsqueeze(-1).expand_as(x))


def _unwalk(x: Tensor, lines: VisibleLines) -> Tensor:
    return x if lines.order is None else x.gather(1, lines.order.argsort(1).unsqueeze(-1).expand_as(x))


def visible_conv_ref(x: Tensor, forward: Taps, backward: Taps, lines: VisibleLines) -> tuple[Tensor, Tensor, Tensor]:
    """`visible_conv_fn` by its formulas, one token after the other."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    walked, line = _walk(wide, lines), _line_of(lines, x.shape[1]).unsqueeze(-1).expand_as(x)
    skip, pooled = torch.zeros_like(wide), []
    for taps, reverse in ((forward, False), (backward, True)):
        weight, bias, D = (None if tap is None else tap.to(wide.dtype) for tap in taps)
        before = F.pad((walked.flip(1) if reverse else walked).transpose(1, 2), (weight.shape[1] - 1, 0))
        u = F.silu(F.conv1d(before, weight.unsqueeze(1), bias, groups=x.shape[2])).transpose(1, 2)
        u = u.flip(1) if reverse else u
        skip = skip + D * u
        pooled.append(u.new_zeros(len(x), lines.count, x.shape[2]).scatter_add(1, line, u) * lines.factor)
    return tuple(each.to(x.dtype) for each in (_unwalk(skip, lines), *pooled))


def visible_gate_ref(
    skip: Tensor,
    groups: Tensor,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    lines: VisibleLines,
    share: float,
) -> Tensor:
    """`visible_gate_fn` by its formula."""
    dtype = skip.dtype
    skip, groups, z = (each.to(torch.promote_types(dtype, torch.float32)) for each in (skip, groups, z))
    weight, bias = (None if each is None else each.to(skip.dtype) for each in (weight, bias))
    spread = groups.gather(1, _line_of(lines, skip.shape[1]).unsqueeze(-1).expand_as(skip))
    total = (skip + _unwalk(spread, lines)) * share
    normed = total if weight is None else F.layer_norm(total, total.shape[-1:], weight, bias, eps)
    return (normed * F.silu(z)).to(dtype)


# --- registration ----------------------------------------------------------------------------------------------------


def _conv(x, weight, bias, D, weight_b, bias_b, D_b, order, starts, factor):
    kernels, lines = backends.pick(x), VisibleLines(order, starts, factor)
    run = getattr(kernels, "visible_conv", visible_conv_ref)
    return run(x, Taps(weight, bias, D), Taps(weight_b, bias_b, D_b), lines)


def _conv_backward(dskip, dpooled, dpooled_b, x, weight, bias, D, weight_b, bias_b, D_b, order, starts, factor):
    kernels = backends.pick(x)
    if not hasattr(kernels, "visible_conv_backward"):
        given = x, weight, bias, D, weight_b, bias_b, D_b
        return _by_reference(_conv_reference, given, (order, starts, factor), (dskip, dpooled, dpooled_b))
    taps, lines = (Taps(weight, bias, D), Taps(weight_b, bias_b, D_b)), VisibleLines(order, starts, factor)
    return kernels.visible_conv_backward(dskip, dpooled, dpooled_b, x, *taps, lines)


def _gate(skip, groups, z, weight, bias, eps, order, starts, share):
    run = getattr(backends.pick(skip), "visible_gate", visible_gate_ref)
    return run(skip, groups, z, weight, bias, eps, VisibleLines(order, starts, 1.0), share)


def _gate_backward(dout, skip, groups, z, weight, bias, eps, order, starts, share):
    kernels, lines = backends.pick(skip), VisibleLines(order, starts, 1.0)
    if not hasattr(kernels, "visible_gate_backward"):
        return _by_reference(_gate_reference, (skip, groups, z, weight, bias), (eps, order, starts, share), (dout,))
    return kernels.visible_gate_backward(dout, skip, groups, z, weight, bias, eps, lines, share)


def _by_reference(reference, tensors, rest, douts) -> tuple[Tensor, ...]:
    """The gradients of `reference` in `tensors`, for each an empty one where it is None."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
    grads = gradients_by_reference(reference, (*leaves, *rest), douts)
    return tuple(tensors[0].new_empty(0) if grad is None else grad.detach() for grad in grads[: len(tensors)])


def _fake_conv(x, weight, bias, D, weight_b, bias_b, D_b, order, starts, factor):
    pooled = (x.shape[0], starts.shape[1] - 1, x.shape[2])
    return x.new_empty(x.shape), x.new_empty(pooled), x.new_empty(pooled)


def _like(parameter: Tensor | None, other: Tensor) -> Tensor:
    return other.new_empty(0) if parameter is None else parameter.new_empty(parameter.shape)


def _fake_conv_backward(dskip, dpooled, dpooled_b, x, *arguments):
    return x.new_empty(x.shape), *(_like(parameter, x) for parameter in arguments[:6])


def _fake_gate(skip, groups, z, weight, bias, eps, order, starts, share):
    return skip.new_empty(skip.shape)


def _fake_gate_backward(dout, skip, groups, z, weight, bias, eps, order, starts, share):
    like = skip.new_empty(0, dtype=torch.float32)
    return (*(x.new_empty(x.shape) for x in (skip, groups, z)), _like(weight, like), _like(bias, like))


def _conv_reference(x, weight, bias, D, weight_b, bias_b, D_b, order, starts, factor):
    lines = VisibleLines(order, starts, factor)
    return visible_conv_ref(x, Taps(weight, bias, D), Taps(weight_b, bias_b, D_b), lines)


def _gate_reference(skip, groups, z, weight, bias, eps, order, starts, share):
    return visible_gate_ref(skip, groups, z, weight, bias, eps, VisibleLines(order, starts, 1.0), share)


def _conv_flops(x: Sequence[int], weight: Sequence[int], *_) -> int:
    """Both convolutions, and D."""
    return 2 * prod(x) * (2 * weight[1] + 2)


def of_given(tensors: Iterable[Tensor | None], grads: Iterable[Tensor]) -> list[Tensor | None]:
    """The gradients of those tensors that there are, None for the others."""
    return [None if tensor is None else grad for tensor, grad in zip(tensors, grads)]


def _save_conv(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.factor = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_conv(ctx, dskip: Tensor, dpooled: Tensor, dpooled_b: Tensor) -> tuple:
    x, *taps, order, starts = ctx.saved_tensors
    if torch.is_grad_enabled():
        given = x, *taps, order, starts, ctx.factor
        return gradients_by_reference(_conv_reference, given, (dskip, dpooled, dpooled_b))
    dx, *grads = torch.ops.mamba_ssm.visible_conv_backward(
        dskip, dpooled, dpooled_b, x, *taps, order, starts, ctx.factor
    )
    return dx, *of_given(taps, grads), None, None, None


def _save_gate(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.eps, order, starts, ctx.share = inputs
    ctx.save_for_backward(*tensors, order, starts)


def _differentiate_gate(ctx, dout: Tensor) -> tuple:
    *tensors, order, starts = ctx.saved_tensors
    if torch.is_grad_enabled():
        return gradients_by_reference(_gate_reference, (*tensors, ctx.eps, order, starts, ctx.share), (dout,))
    grads = torch.ops.mamba_ssm.visible_gate_backward(dout, *tensors, ctx.eps, order, starts, ctx.share)
    return *of_given(tensors, grads), None, None, None, None


_LINES = "Tensor? order, Tensor starts"
_GATE = "Tensor skip, Tensor groups, Tensor z, Tensor? weight, Tensor? bias, float eps"
OPERATORS.register(
    f"visible_conv(Tensor x, {TAPS}, {_LINES}, float factor) -> (Tensor, Tensor, Tensor)",
    _conv,
    _fake_conv,
    save=_save_conv,
    differentiate=_differentiate_conv,
    flops=_conv_flops,
)
OPERATORS.register(
    f"visible_conv_backward(Tensor dskip, Tensor dpooled, Tensor dpooled_b, Tensor x, {TAPS}, {_LINES}, float factor)"
    f" -> ({', '.join(['Tensor'] * 7)})",
    _conv_backward,
    _fake_conv_backward,
)
OPERATORS.register(
    f"visible_gate({_GATE}, {_LINES}, float share) -> Tensor",
    _gate,
    _fake_gate,
    save=_save_gate,
    differentiate=_differentiate_gate,
)
OPERATORS.register(
    f"visible_gate_backward(Tensor dout, {_GATE}, {_LINES}, float share) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _gate_backward,
    _fake_gate_backward,
)
