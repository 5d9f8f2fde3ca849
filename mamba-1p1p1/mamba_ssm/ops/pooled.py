"""The mixer over pooled lines of a token grid (FastVim), in two operators around the scans, and one for the scans.

The mixer can be put together from the convolution, the scan and torch's own operations for any map of tokens to groups.
Where groups are the means over the lines of a full grid, these operators do the same with one pass over the tokens
before the scans and one behind them, leave the tokens where they are whichever way the lines run, and keep nothing for
the backward pass but their arguments. The scans of so few tokens take less time than the calls around them; without
gradients they are one call. `has_kernels` says where that is so; elsewhere the references run.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from causal_conv1d._nvrtc import KernelError
from causal_conv1d.backend import KERNEL_DTYPES, tell
from causal_conv1d.checks import check_all, check_device, check_dtype, check_ndim, check_tensor
from causal_conv1d.derivatives import gradients_by_reference, wants_reference
from causal_conv1d.ops.convolution import WIDTHS, causal_conv1d_ref
from mamba_ssm.kernels.arguments import Lines, Projections, Taps
from mamba_ssm.kernels.registry import backends
from mamba_ssm.ops.operators import LINES, OPERATORS, PROJECTIONS, TAPS
from mamba_ssm.ops.scan import scan_flops, selective_scan_ref
from mamba_ssm.ops.visible import of_given
from torch import Tensor

__all__ = [
    "Lines",
    "Projections",
    "Taps",
    "has_kernels",
    "has_scan_gradients",
    "pooled_conv_fn",
    "pooled_conv_ref",
    "pooled_gate_fn",
    "pooled_gate_ref",
    "pooled_scan_fn",
    "pooled_scan_ref",
]

_DTYPES = (*KERNEL_DTYPES, torch.float64)


def has_kernels(x: Tensor) -> bool:
    """Whether there are kernels for `x`."""
    return backends.has(x, "pooled_conv")


def has_scan_gradients(groups: Tensor) -> bool:
    """Whether there are kernels for the gradients of `pooled_scan_fn`: not where autocast wants another dtype."""
    kind = groups.device.type
    if torch.is_autocast_enabled(kind) and groups.dtype != torch.get_autocast_dtype(kind):
        return False
    return groups.dtype in KERNEL_DTYPES and backends.has(groups, "pooled_scan_backward")


def pooled_conv_fn(x: Tensor, forward: Taps, backward: Taps, lines: Lines) -> tuple[Tensor, Tensor, Tensor]:
    """Both directions' causal convolutions with silu, u and u_b, seen through what the mixer needs of them.

    Args:
        x: (batch, tokens, dim), float32, bfloat16, float16 or float64, any strides; stride 1 along dim is not copied.
        forward, backward: of one width, 2, 3 or 4.
        lines: whose tokens are all of those of `x`.

    Returns:
        D * u + D_b * u_b (batch, tokens, dim), and the lines' pooled tokens of u and of u_b, (batch, lines, dim) each,
        in the dtype of `x`.

    Raises:
        ValueError: a shape, number or device that does not fit. TypeError: not a tensor, or another dtype.
    """
    forward, backward, lines = Taps(*forward), Taps(*backward), Lines(*lines)
    _check_tokens("x", x)
    check_lines("x", x, lines)
    check_tensor("weight", forward.weight)
    check_ndim("weight", forward.weight, "(dim, width)")
    dim, width = x.shape[2], forward.weight.shape[1]
    for taps in (forward, backward):
        _check_parameters(x, "x", (("weight", taps.weight, (dim, width), "(dim, width)"),))
        if width not in WIDTHS:
            raise ValueError(f"weight has shape {tuple(taps.weight.shape)}, wanted (dim, width) with width 2, 3 or 4")
        bias = () if taps.bias is None else (("bias", taps.bias, (dim,), "(dim,)"),)
        _check_parameters(x, "x", (*bias, ("D", taps.D, (dim,), "(dim,)")))
    if wants_reference(x, *forward, *backward):
        return pooled_conv_ref(x, forward, backward, lines)
    return torch.ops.mamba_ssm.pooled_conv(x, *forward, *backward, *lines)


def pooled_scan_fn(groups: Tensor, groups_b: Tensor, forward: Projections, backward: Projections) -> Tensor:
    """The projections and scans of both directions' pooled tokens, summed, without D and z; the backward one runs from
    the last line to the first. Where a gradient is wanted and `has_scan_gradients` says no, `pooled_scan_ref` runs.

    Args:
        groups, groups_b: (batch, lines, dim), of one dtype: float32, bfloat16, float16 or float64.
        forward, backward: of the same sizes.

    Returns:
        (batch, lines, dim) in their dtype.

    Raises:
        ValueError: a shape or device that does not fit. TypeError: not a tensor, or another dtype.
    """
    _check_tokens("groups", groups)
    _check_tokens("groups_b", groups_b)
    if groups.shape != groups_b.shape or groups.dtype != groups_b.dtype or groups.device != groups_b.device:
        raise ValueError(
            f"groups_b is {tuple(groups_b.shape)} of {groups_b.dtype}, wanted {tuple(groups.shape)} of {groups.dtype}"
        )
    forward, backward = Projections(*forward), Projections(*backward)
    for name in ("dt_proj", "A_log"):
        check_tensor(name, getattr(forward, name))
        check_ndim(name, getattr(forward, name), "(dim, columns)")
    dim, rank, dstate = groups.shape[2], forward.dt_proj.shape[1], forward.A_log.shape[1]
    shapes = (rank + 2 * dstate, dim), (dim, rank), (dim,), (dim, dstate)
    layouts = "(dt_rank + 2*dstate, dim)", "(dim, dt_rank)", "(dim,)", "(dim, dstate)"
    for projections in (forward, backward):
        _check_parameters(groups, "groups", zip(Projections._fields, projections, shapes, layouts))
    tensors = groups, groups_b, *forward, *backward
    wants_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if wants_reference(*tensors) or (wants_gradient and not has_scan_gradients(groups)):
        return pooled_scan_ref(groups, groups_b, forward, backward)
    return torch.ops.mamba_ssm.pooled_scan(*tensors, wants_gradient)[0]


def pooled_gate_fn(
    skip: Tensor,
    groups: Tensor,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    lines: Lines,
    share: float,
) -> Tensor:
    """`norm(share * (skip + groups)) * silu(z)`, each token with its line's group.

    Args:
        skip, z: (batch, tokens, dim), of one dtype: float32, bfloat16, float16 or float64.
        groups: (batch, lines, dim), in that dtype.
        weight, bias: (dim,) of the LayerNorm; no norm if `weight` is None.

    Returns:
        (batch, tokens, dim) in the dtype of `skip`.

    Raises:
        ValueError: a shape, number or device that does not fit. TypeError: not a tensor, or another dtype.
    """
    lines = Lines(*lines)
    for name, tensor in (("skip", skip), ("groups", groups), ("z", z)):
        _check_tokens(name, tensor)
        check_dtype(name, tensor, (skip.dtype,))
        check_device(name, tensor, skip, "skip")
    if groups.shape != (skip.shape[0], lines.count, skip.shape[2]) or z.shape != skip.shape:
        raise ValueError(
            f"groups and z have shapes {tuple(groups.shape)} and {tuple(z.shape)}, wanted (batch, {lines.count}, dim)"
            f" and {tuple(skip.shape)}"
        )
    check_lines("skip", skip, lines)
    if weight is None and bias is not None:
        raise ValueError("bias is given without weight, wanted both or no bias: there is no norm without a weight")
    norm = [(name, each, skip.shape[2:], "(dim,)") for name, each in (("weight", weight), ("bias", bias))]
    _check_parameters(skip, "skip", [given for given in norm if given[1] is not None])
    if wants_reference(skip, groups, z, weight, bias):
        return pooled_gate_ref(skip, groups, z, weight, bias, eps, lines, share)
    return torch.ops.mamba_ssm.pooled_gate(skip, groups, z, weight, bias, eps, *lines[:3], share)


def _check_tokens(name: str, x: Tensor) -> None:
    check_tensor(name, x)
    check_ndim(name, x, "(batch, tokens, dim)")
    check_dtype(name, x, _DTYPES)


def check_lines(name: str, x: Tensor, lines: Lines) -> None:
    """Raise ValueError unless the tokens of x (batch, tokens, dim) fill the grid of `lines`."""
    if min(lines.sizes) < 1 or x.shape[1] != prod(lines.sizes):
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, wanted (batch, tokens, dim) that fill a grid of {tuple(lines.sizes)}"
        )


def _check_parameters(x: Tensor, x_name: str, given) -> None:
    """`given` has a name, a tensor, the shape wanted and its layout for each parameter."""
    check_all(x, x_name, given, _DTYPES if x.dtype == torch.float64 else KERNEL_DTYPES)


# --- references ------------------------------------------------------------------------------------------------------


def pooled_conv_ref(x: Tensor, forward: Taps, backward: Taps, lines: Lines) -> tuple[Tensor, Tensor, Tensor]:
    """What `pooled_conv_fn` computes."""
    walked, skip, pooled = _walked(x, lines).flatten(1, 3).transpose(1, 2), None, []
    axes = [1 + axis for axis, is_pooled in enumerate(lines.pooled) if is_pooled]
    for (weight, bias, D), reverse in ((forward, False), (backward, True)):
        u = causal_conv1d_ref(walked, weight, bias, "silu", reverse=reverse).transpose(1, 2)
        u = u.unflatten(1, lines.sizes)
        part = D.to(u.dtype) * u
        skip = part if skip is None else skip + part
        means = u.mean(axes) if axes else u
        pooled.append(lines.scale * means.reshape(x.shape[0], lines.count, x.shape[2]))
    return _in_place(skip, lines), *pooled


def pooled_scan_ref(groups: Tensor, groups_b: Tensor, forward: Projections, backward: Projections) -> Tensor:
    """What `pooled_scan_fn` computes."""
    total = None
    for u, projections, reverse in ((groups, forward, False), (groups_b, backward, True)):
        x_proj, dt_proj, dt_bias, A_log = (parameter.to(u.dtype) for parameter in projections)
        dt, B, C = F.linear(u, x_proj).split([dt_proj.shape[1], A_log.shape[1], A_log.shape[1]], -1)
        delta, A = F.linear(dt, dt_proj), -torch.exp(A_log)
        u, delta, B, C = (each.transpose(1, 2) for each in (u, delta, B, C))
        part = selective_scan_ref(u, delta, A, B, C, None, None, dt_bias, True, reverse=reverse)
        total = part if total is None else total + part
    return total.transpose(1, 2)


def pooled_gate_ref(
    skip: Tensor,
    groups: Tensor,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    lines: Lines,
    share: float,
) -> Tensor:
    """What `pooled_gate_fn` computes."""
    total = _in_place(_walked(skip, lines) + lines.spread(groups), lines) * share
    if weight is not None:
        weight, bias = (None if parameter is None else parameter.to(total.dtype) for parameter in (weight, bias))
        total = F.layer_norm(total, total.shape[-1:], weight, bias, eps)
    return total * F.silu(z)


# --- registration ----------------------------------------------------------------------------------------------------


def _by_kernels(name, given, reference):
    """What the kernels of that name give, or where the device has none, or they fail, the reference."""
    kernels = backends.pick(given[0])
    if hasattr(kernels, name):
        try:
            return getattr(kernels, name)(*given)
        except KernelError as error:
            tell("CUDA", error)
    return reference(*given)


def _conv(x, weight, bias, D, weight_b, bias_b, D_b, sizes, strides, pooled, scale):
    given = x, weight, bias, D, weight_b, bias_b, D_b, sizes, strides, pooled, scale
    return _by_kernels("pooled_conv", given, _conv_reference)


def _scan(groups, groups_b, *arguments):
    *projections, save = arguments
    kernels = backends.pick(groups)
    if save and groups.numel() and hasattr(kernels, "pooled_scan_saving"):
        return kernels.pooled_scan_saving(groups, groups_b, *projections)
    out = _by_kernels("pooled_scan", (groups, groups_b, *projections), _scan_reference)
    return out, *(groups.new_empty(0, dtype=torch.float32) for _ in range(4))


def _scan_backward(dout, groups, groups_b, x_dbl, x_dbl_b, states, states_b, *projections):
    saved = (x_dbl, x_dbl_b), (states, states_b)
    grads = backends.pick(groups).pooled_scan_backward(dout, groups, groups_b, *saved, *projections)
    wanted = groups, groups_b, *projections
    return tuple(grad.to(like.dtype).contiguous() for grad, like in zip(grads, wanted))


def _gate(skip, groups, z, weight, bias, eps, sizes, strides, pooled, share):
    given = skip, groups, z, weight, bias, eps, sizes, strides, pooled, share
    return _by_kernels("pooled_gate", given, _gate_reference)


def _conv_reference(x, weight, bias, D, weight_b, bias_b, D_b, sizes, strides, pooled, scale):
    return pooled_conv_ref(x, Taps(weight, bias, D), Taps(weight_b, bias_b, D_b), Lines(sizes, strides, pooled, scale))


def _scan_reference(groups, groups_b, *projections):
    return pooled_scan_ref(groups, groups_b, projections[:4], projections[4:])


def _gate_reference(skip, groups, z, weight, bias, eps, sizes, strides, pooled, share):
    return pooled_gate_ref(skip, groups, z, weight, bias, eps, Lines(sizes, strides, pooled), share)


def _fake_conv(x, weight, bias, D, weight_b, bias_b, D_b, sizes, strides, pooled, scale):
    means = (x.shape[0], Lines(sizes, strides, pooled).count, x.shape[2])
    return x.new_empty(x.shape), x.new_empty(means), x.new_empty(means)


def _fake_scan(groups, groups_b, *arguments):
    (x_proj, _, _, A_log), save, kernels = arguments[:4], arguments[-1], backends.pick(groups)
    shapes = [(0,)] * 4
    if save and hasattr(kernels, "pooled_scan_saving"):
        batch, lines, dim = groups.shape
        states = kernels.states_shape(batch, dim, lines, A_log.shape[1])
        shapes = [(batch, lines, x_proj.shape[0])] * 2 + [states] * 2
    return groups.new_empty(groups.shape), *(groups.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _fake_scan_backward(dout, groups, groups_b, x_dbl, x_dbl_b, states, states_b, *projections):
    return tuple(like.new_empty(like.shape) for like in (groups, groups_b, *projections))


def _fake_gate(skip, groups, z, weight, bias, eps, sizes, strides, pooled, share):
    return skip.new_empty(skip.shape)


def _walked(x: Tensor, lines: Lines) -> Tensor:
    """(batch, tokens, dim) -> (batch, *sizes, dim), a view."""
    stored = _stored_axes(lines)
    x = x.unflatten(1, [lines.sizes[axis] for axis in stored])
    return x.permute(0, *(1 + stored.index(axis) for axis in range(3)), 4)


def _in_place(x: Tensor, lines: Lines) -> Tensor:
    """Inverse of `_walked`."""
    return x.permute(0, *(1 + axis for axis in _stored_axes(lines)), 4).flatten(1, 3)


def _stored_axes(lines: Lines) -> list[int]:
    """The axes in the order of the sequence, the last one fastest."""
    return sorted(range(3), key=lambda axis: -lines.strides[axis])


def _save_conv(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, sizes, strides, pooled, scale = inputs
    ctx.lines = Lines(tuple(sizes), tuple(strides), tuple(pooled), scale)
    ctx.save_for_backward(*tensors)


def _differentiate_conv(ctx, dskip: Tensor, dpooled: Tensor, dpooled_b: Tensor) -> tuple:
    lines = ctx.lines
    if torch.is_grad_enabled():
        given = *ctx.saved_tensors, *lines
        return gradients_by_reference(_conv_reference, given, (dskip, dpooled, dpooled_b))
    x, *taps = ctx.saved_tensors
    if backends.has(x, "visible_conv_backward"):  # one pass, instead of one of torch's for each of a dozen terms
        visible = (lines.all_visible if lines.runs else lines.each_visible)(len(x), x.device)
        if not lines.runs:
            dpooled, dpooled_b = (
                lines.spread(each).expand(-1, *lines.sizes, -1).flatten(1, 3) for each in (dpooled, dpooled_b)
            )
        dx, *grads = torch.ops.mamba_ssm.visible_conv_backward(dskip, dpooled, dpooled_b, x, *taps, *visible)
        return dx, *of_given(taps, grads), None, None, None, None
    x, dskip = _walked(x, lines), _walked(dskip, lines)
    share, walked, grads, dx = lines.scale / max(lines.length, 1), x.flatten(1, 3).transpose(1, 2), [], None
    for (weight, bias, D), dmean, reverse in ((taps[:3], dpooled, False), (taps[3:], dpooled_b, True)):
        u = torch.ops.causal_conv1d.forward(walked, weight, bias, True, reverse)
        du = torch.addcmul(lines.spread(dmean * share), dskip, D.to(dskip.dtype)).flatten(1, 3).transpose(1, 2)
        part, dweight, dbias = torch.ops.causal_conv1d.backward(du, walked, weight, bias, True, reverse)
        dD = (dskip.flatten(1, 3) * u.transpose(1, 2)).sum((0, 1), dtype=D.dtype)
        grads += [dweight, None if bias is None else dbias, dD]
        dx = part if dx is None else dx + part
    dx = _in_place(dx.transpose(1, 2).unflatten(1, lines.sizes), lines)
    return dx, *grads, None, None, None, None


def _save_scan(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # what is kept for backward has no gradient
    ctx.save_for_backward(*output[1:], *inputs[:-1])


def _differentiate_scan(ctx, dout: Tensor | None, *_) -> tuple:
    x_dbl, x_dbl_b, states, states_b, *given = ctx.saved_tensors
    if dout is None:
        return (None,) * 11
    groups, groups_b, *projections = given
    if torch.is_grad_enabled() or not x_dbl.numel() or not has_scan_gradients(groups):
        return *gradients_by_reference(_scan_reference, given, (dout,)), None
    saved = x_dbl, x_dbl_b, states, states_b
    return *torch.ops.mamba_ssm.pooled_scan_backward(dout, groups, groups_b, *saved, *projections), None


def _save_gate(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.eps, sizes, strides, pooled, ctx.share = inputs
    ctx.lines = Lines(tuple(sizes), tuple(strides), tuple(pooled))
    ctx.save_for_backward(*tensors)


def _differentiate_gate(ctx, dout: Tensor) -> tuple:
    lines, share = ctx.lines, ctx.share
    if torch.is_grad_enabled():
        given = *ctx.saved_tensors, ctx.eps, *lines[:3], share
        return gradients_by_reference(_gate_reference, given, (dout,))
    saved = skip, groups, z, weight, bias = ctx.saved_tensors
    if backends.has(skip, "visible_gate_backward"):
        order, starts, _ = lines.all_visible(len(skip), skip.device)
        grads = torch.ops.mamba_ssm.visible_gate_backward(dout, *saved, ctx.eps, order, starts, share)
        return *of_given(saved, grads), None, None, None, None, None
    total = _in_place((_walked(skip, lines) + lines.spread(groups)) * share, lines)
    dnormed, dweight, dbias = dout * F.silu(z), None, None
    if weight is None:
        dtotal, normed = dnormed, total
    else:
        size = total.shape[-1:]
        weight_t, bias_t = (None if t is None else t.to(total.dtype) for t in (weight, bias))
        normed, mean, scale = torch.native_layer_norm(total, size, weight_t, bias_t, ctx.eps)
        dtotal, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
            dnormed, total, size, mean, scale, weight_t, bias_t, [True, True, bias is not None]
        )
        dweight, dbias = dweight.to(weight.dtype), None if bias is None else dbias.to(bias.dtype)
    dz = torch.ops.aten.silu_backward(dout * normed, z)
    dskip = dtotal * share
    axes = [1 + axis for axis, is_pooled in enumerate(lines.pooled) if is_pooled]
    dgroups = _walked(dskip, lines).sum(axes) if axes else _walked(dskip, lines)
    return dskip, dgroups.reshape(groups.shape), dz, dweight, dbias, None, None, None, None, None


def pooled_conv_flops(x: Sequence[int], weight: Sequence[int], *_) -> int:
    """Both convolutions, and D."""
    return 2 * prod(x) * (2 * weight[1] + 2)


def pooled_scan_flops(
    groups: Sequence[int], groups_b: Sequence[int], x_proj: Sequence[int], dt_proj, dt_bias, A_log, *_
) -> int:
    """Both directions' projections and scans."""
    batch, lines, dim = groups
    weights = 2 * batch * lines * (prod(x_proj) + prod(dt_proj))
    return 2 * (weights + scan_flops((batch, dim, lines), None, A_log, None, None, None, None))


OPERATORS.register(
    f"pooled_conv(Tensor x, {TAPS}, {LINES}, float scale) -> (Tensor, Tensor, Tensor)",
    _conv,
    _fake_conv,
    save=_save_conv,
    differentiate=_differentiate_conv,
    flops=pooled_conv_flops,
)
OPERATORS.register(
    f"pooled_scan(Tensor groups, Tensor groups_b, {PROJECTIONS}, bool save)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _scan,
    _fake_scan,
    save=_save_scan,
    differentiate=_differentiate_scan,
    flops=pooled_scan_flops,
)
OPERATORS.register(
    "pooled_scan_backward(Tensor dout, Tensor groups, Tensor groups_b, Tensor x_dbl, Tensor x_dbl_b, Tensor states,"
    f" Tensor states_b, {PROJECTIONS}) -> ({', '.join(['Tensor'] * 10)})",
    _scan_backward,
    _fake_scan_backward,
)
OPERATORS.register(
    f"pooled_gate(Tensor skip, Tensor groups, Tensor z, Tensor? weight, Tensor? bias, float eps, {LINES},"
    " float share) -> Tensor",
    _gate,
    _fake_gate,
    save=_save_gate,
    differentiate=_differentiate_gate,
)
