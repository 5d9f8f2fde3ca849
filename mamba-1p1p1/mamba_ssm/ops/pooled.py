"""The mixer over pooled lines of a token grid (FastVim), in two operators around the scans, and one for the scans.

The mixer can be put together from the convolution, the scan and torch's own operations for any map of tokens to groups.
Where groups are the means over the lines of a full grid, these operators do the same with one pass over the tokens
before the scans and one behind them, leave the tokens where they are whichever way the lines run, and keep nothing for
the backward pass but their arguments. The scans of so few tokens take less time than the calls around them; without
gradients they are one call. All need a kernel set that has them: `has_kernels`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from mamba_ssm.kernels.arguments import Lines, Projections, Taps
from mamba_ssm.kernels.registry import backends
from mamba_ssm.ops.operators import OPERATORS
from torch import Tensor

__all__ = ["Lines", "Projections", "Taps", "has_kernels", "pooled_conv_fn", "pooled_gate_fn", "pooled_scan_fn"]


def has_kernels(x: Tensor) -> bool:
    """Whether there are kernels for `x`."""
    return backends.has(x, "pooled_conv")


def pooled_conv_fn(x: Tensor, forward: Taps, backward: Taps, lines: Lines) -> tuple[Tensor, Tensor, Tensor]:
    """Both directions' causal convolutions with silu, u and u_b, seen through what the mixer needs of them.

    Args:
        x: (batch, tokens, dim), float32, bfloat16 or float16, any strides; stride 1 along dim is not copied.

    Returns:
        D * u + D_b * u_b (batch, tokens, dim), and the lines' pooled tokens of u and of u_b, (batch, lines, dim) each,
        in the dtype of `x`.
    """
    if x.dim() != 3 or x.shape[1] != math.prod(lines.sizes):
        raise ValueError(f"x has shape {tuple(x.shape)}, wanted (batch, tokens, dim) that fill a grid of {lines.sizes}")
    return torch.ops.mamba_ssm.pooled_conv(x, *forward, *backward, *lines)


def pooled_scan_fn(groups: Tensor, groups_b: Tensor, forward: Projections, backward: Projections) -> Tensor:
    """The projections and scans of both directions' pooled tokens, (batch, lines, dim) each, summed; the backward one
    runs from the last line to the first. Without D, z and gradients. Returns (batch, lines, dim) in their dtype."""
    if groups.shape != groups_b.shape or groups.dtype != groups_b.dtype:
        raise ValueError(
            f"groups_b is {tuple(groups_b.shape)} of {groups_b.dtype}, wanted {tuple(groups.shape)} of {groups.dtype}"
        )
    return torch.ops.mamba_ssm.pooled_scan(groups, groups_b, *forward, *backward)


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
        skip, z: (batch, tokens, dim), of one dtype.
        groups: (batch, lines, dim), in that dtype.
        weight, bias: (dim,) of the LayerNorm; no norm if `weight` is None.

    Returns:
        (batch, tokens, dim) in the dtype of `skip`.
    """
    if groups.shape != (skip.shape[0], lines.count, skip.shape[2]) or z.shape != skip.shape:
        raise ValueError(
            f"groups and z have shapes {tuple(groups.shape)} and {tuple(z.shape)}, wanted (batch, {lines.count}, dim)"
            f" and {tuple(skip.shape)}"
        )
    return torch.ops.mamba_ssm.pooled_gate(skip, groups, z, weight, bias, eps, *lines[:3], share)


# --- registration ----------------------------------------------------------------------------------------------------


def _conv(x, weight, bias, D, weight_b, bias_b, D_b, sizes, strides, pooled, scale):
    return backends.pick(x).pooled_conv(x, weight, bias, D, weight_b, bias_b, D_b, sizes, strides, pooled, scale)


def _scan(groups, groups_b, *projections):
    return backends.pick(groups).pooled_scan(groups, groups_b, *projections)


def _gate(skip, groups, z, weight, bias, eps, sizes, strides, pooled, share):
    return backends.pick(skip).pooled_gate(skip, groups, z, weight, bias, eps, sizes, strides, pooled, share)


def _fake_conv(x, weight, bias, D, weight_b, bias_b, D_b, sizes, strides, pooled, scale):
    means = (x.shape[0], Lines(sizes, strides, pooled).count, x.shape[2])
    return x.new_empty(x.shape), x.new_empty(means), x.new_empty(means)


def _fake_scan(groups, groups_b, *projections):
    return groups.new_empty(groups.shape)


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


def _spread(groups: Tensor, lines: Lines) -> Tensor:
    """(batch, groups, dim) -> (batch, *sizes, dim), with 1 for the sizes of pooled axes."""
    return groups.unflatten(1, [1 if is_pooled else size for size, is_pooled in zip(lines.sizes, lines.pooled)])


def _save_conv(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, sizes, strides, pooled, scale = inputs
    ctx.lines = Lines(tuple(sizes), tuple(strides), tuple(pooled), scale)
    ctx.save_for_backward(*tensors)


def _differentiate_conv(ctx, dskip: Tensor, dpooled: Tensor, dpooled_b: Tensor) -> tuple:
    x, *taps = ctx.saved_tensors
    lines = ctx.lines
    x, dskip = _walked(x, lines), _walked(dskip, lines)
    share, walked, grads, dx = lines.scale / lines.length, x.flatten(1, 3).transpose(1, 2), [], None
    for (weight, bias, D), dmean, reverse in ((taps[:3], dpooled, False), (taps[3:], dpooled_b, True)):
        u = torch.ops.causal_conv1d.forward(walked, weight, bias, True, reverse)
        du = torch.addcmul(_spread(dmean * share, lines), dskip, D.to(dskip.dtype)).flatten(1, 3).transpose(1, 2)
        part, dweight, dbias = torch.ops.causal_conv1d.backward(du, walked, weight, bias, True, reverse)
        dD = (dskip.flatten(1, 3) * u.transpose(1, 2)).sum((0, 1), dtype=D.dtype)
        grads += [dweight, None if bias is None else dbias, dD]
        dx = part if dx is None else dx + part
    dx = _in_place(dx.transpose(1, 2).unflatten(1, lines.sizes), lines)
    return dx, *grads, None, None, None, None


def _save_gate(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.eps, sizes, strides, pooled, ctx.share = inputs
    ctx.lines = Lines(tuple(sizes), tuple(strides), tuple(pooled))
    ctx.save_for_backward(*tensors)


def _differentiate_gate(ctx, dout: Tensor) -> tuple:
    skip, groups, z, weight, bias = ctx.saved_tensors
    lines, share = ctx.lines, ctx.share
    total = _in_place((_walked(skip, lines) + _spread(groups, lines)) * share, lines)
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


_LINES = "int[3] sizes, int[3] strides, bool[3] pooled"
_TAPS = "Tensor weight, Tensor? bias, Tensor D, Tensor weight_b, Tensor? bias_b, Tensor D_b"
_PROJECTIONS = ", ".join(f"Tensor x_proj{b}, Tensor dt_proj{b}, Tensor dt_bias{b}, Tensor A_log{b}" for b in ("", "_b"))
OPERATORS.register(
    f"pooled_conv(Tensor x, {_TAPS}, {_LINES}, float scale) -> (Tensor, Tensor, Tensor)",
    _conv,
    _fake_conv,
    save=_save_conv,
    differentiate=_differentiate_conv,
)
OPERATORS.register(f"pooled_scan(Tensor groups, Tensor groups_b, {_PROJECTIONS}) -> Tensor", _scan, _fake_scan)
OPERATORS.register(
    f"pooled_gate(Tensor skip, Tensor groups, Tensor z, Tensor? weight, Tensor? bias, float eps, {_LINES},"
    " float share) -> Tensor",
    _gate,
    _fake_gate,
    save=_save_gate,
    differentiate=_differentiate_gate,
)
