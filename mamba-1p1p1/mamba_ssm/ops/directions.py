"""One operator for all that stands between a mixer's input projection and its output projection, in one or two
directions: convolution -> x_proj -> dt_proj -> scan -> sum -> gate.

It keeps `xz`, the narrow projections `x_dbl` and the scan's saved states for backward, and computes the convolution and
the step sizes anew there. Channel-last throughout: xz (batch, seqlen, 2*dim) -> (batch, seqlen, dim).

A kernel set may have `directions_forward` and `directions_backward`, with the signatures of the functions here; without
them the operator is put together from the set's scan and the convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from causal_conv1d.backend import KERNEL_DTYPES
from causal_conv1d.causal_conv1d_interface import WIDTHS
from causal_conv1d.checks import check_device, check_dtype, check_ndim, check_shape, check_tensor
from mamba_ssm.ops.operators import LIBRARY, backends, has_kernel, register
from torch import Tensor


class Direction(NamedTuple):
    """The parameters of one scan direction; float32 unless said otherwise.

    `reverse` runs convolution and scan from the last position to the first.
    """

    conv_weight: Tensor  # (dim, width), any of the kernels' dtypes, as the next three
    conv_bias: Tensor | None  # (dim,)
    x_proj_weight: Tensor  # (dt_rank + 2*dstate, dim): rows for dt, B, C
    dt_proj_weight: Tensor  # (dim, dt_rank)
    dt_bias: Tensor | None  # (dim,)
    A: Tensor  # (dim, dstate)
    D: Tensor | None  # (dim,)
    reverse: bool = False


# Tensors in a Direction. The operators take those of two directions, the second's None if there is one only.
_COUNT = 7
_TENSORS = "Tensor? conv_weight{0}, Tensor? conv_bias{0}, Tensor? x_proj_weight{0}, Tensor? dt_proj_weight{0}, \
Tensor? dt_bias{0}, Tensor? A{0}, Tensor? D{0}"
_ARGUMENTS = f"{_TENSORS.format('')}, {_TENSORS.format('_b')}, bool[] reverse, float share"
_SAVED = "Tensor x_dbl, Tensor x_dbl_b, Tensor states, Tensor states_b"
LIBRARY.define(
    f"directions(Tensor xz, {_ARGUMENTS}, bool save_states) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_GRADIENTS = ", ".join(["Tensor"] * (1 + 2 * _COUNT))
LIBRARY.define(
    f"directions_backward(Tensor dout, Tensor xz, {_SAVED}, {_ARGUMENTS}) -> ({_GRADIENTS})",
    tags=torch.Tag.pt2_compliant_tag,
)


def run_as_one(x: Tensor) -> bool:
    """Whether there are kernels for `x` that make one operator of it all; put together from others it saves memory, not
    time."""
    return has_kernel(x, "directions_forward")


def directions_fn(xz: Tensor, directions: Sequence[Direction], share: float = 1.0) -> Tensor:
    """`share * sum over directions of scan(conv(x)) * silu(z)`, differentiable in every tensor.

    Each direction computes `u = silu(conv(x))`, `dt, B, C = x_proj(u)`, `delta = dt_proj(dt)` and the selective scan of
    u with softplus(delta + dt_bias), A, B, C, D. Under autocast, `xz` and the projections are in autocast's dtype.

    Args:
        xz: (batch, seqlen, 2*dim), x first, z second, float32, bfloat16 or float16. Copied only if its last stride is
            not 1.
        directions: one or two.
        share: what the sum is multiplied with.

    Returns:
        (batch, seqlen, dim) in the dtype of `xz`, contiguous.

    Raises:
        ValueError: a shape or device that does not fit. TypeError: a dtype that does not fit.
    """
    device_type = xz.device.type
    if torch.is_autocast_enabled(device_type):
        xz = xz.to(torch.get_autocast_dtype(device_type))
    _check(xz, directions)
    xz = xz if xz.stride(-1) == 1 else xz.contiguous()
    parameters = [tensor for direction in directions for tensor in direction[:_COUNT]]
    parameters += [None] * (2 * _COUNT - len(parameters))
    reverse = [direction.reverse for direction in directions]
    wanted = any(tensor is not None and tensor.requires_grad for tensor in (xz, *parameters))
    return torch.ops.mamba_ssm.directions(xz, *parameters, reverse, share, wanted and torch.is_grad_enabled())[0]


def _check(xz: Tensor, directions: Sequence[Direction]) -> None:
    check_ndim("xz", xz, "(batch, seqlen, 2*dim)")
    check_dtype("xz", xz, (*KERNEL_DTYPES, torch.float64))
    if xz.shape[2] % 2:
        raise ValueError(f"xz has shape {tuple(xz.shape)}, wanted (batch, seqlen, 2*dim)")
    if len(directions) not in (1, 2):
        raise ValueError(f"directions has {len(directions)} entries, wanted one or two")
    dim, dtypes = xz.shape[2] // 2, (*KERNEL_DTYPES, torch.float64)
    for each in directions:
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
        for (name, wanted), tensor in zip(shapes.items(), each):
            if tensor is not None:
                check_tensor(name, tensor)
                check_shape(name, tensor, wanted, "the shape that fits xz, dt_proj_weight and A")
                check_device(name, tensor, xz, "xz")
                check_dtype(name, tensor, dtypes)
        for name in ("A", "D", "dt_bias"):
            tensor = getattr(each, name)
            if tensor is not None:
                check_dtype(name, tensor, KERNEL_DTYPES[:1] if xz.dtype != torch.float64 else (torch.float64,))


def split(parameters: Sequence[Tensor | None], reverse: Sequence[bool]) -> list[Direction]:
    """The operator's flat lists as `Direction` values."""
    return [Direction(*parameters[i * _COUNT : (i + 1) * _COUNT], way) for i, way in enumerate(reverse)]


def matrices(x_dbl: Tensor, direction: Direction) -> tuple[Tensor, Tensor, Tensor]:
    """x_dbl (batch, seqlen, dt_rank + 2*dstate) -> dt (batch, seqlen, dt_rank) and B, C (batch, 1, dstate, seqlen)."""
    dstate = direction.A.shape[1]
    dt, B, C = x_dbl.split([x_dbl.shape[2] - 2 * dstate, dstate, dstate], dim=2)
    return dt, B.transpose(1, 2).unsqueeze(1), C.transpose(1, 2).unsqueeze(1)


def _scan_arguments(x: Tensor, z: Tensor, direction: Direction, x_dbl: Tensor | None) -> tuple[Tensor, tuple]:
    """(x_dbl, the arguments of the kernel set's `scan_forward` but the last)."""
    conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_bias, A, D, reverse = direction
    u = torch.ops.causal_conv1d.forward(x, conv_weight, conv_bias, True, reverse)
    if x_dbl is None:
        x_dbl = F.linear(u.transpose(1, 2), x_proj_weight.to(u.dtype))
    dt, B, C = matrices(x_dbl, direction)
    delta = F.linear(dt, dt_proj_weight.to(u.dtype)).transpose(1, 2)
    return x_dbl, (u, delta, A, B, C, D, z, dt_bias, True, reverse)


def _is_pair(kernels, name: str, directions: Sequence[Direction]) -> bool:
    """Whether these are a forward and a backward direction of equal sizes, and `kernels` has a function for both."""
    if not hasattr(kernels, name) or [direction.reverse for direction in directions] != [False, True]:
        return False
    first, second = (direction[:_COUNT] for direction in directions)
    return all((a is None) == (b is None) and (a is None or a.shape == b.shape) for a, b in zip(first, second))


def composed_forward(kernels, xz: Tensor, directions: Sequence[Direction], share: float, save_states: bool) -> tuple:
    """(out, x_dbl of each direction, saved states of each direction), from a kernel set's `scan_forward`.

    A set that takes both scans of a bidirectional block at once (see `bidirectional.py`) is handed them so.
    """
    x, z = xz.transpose(1, 2).chunk(2, dim=1)
    x_dbls, scans = zip(*(_scan_arguments(x, z, direction, None) for direction in directions))
    if _is_pair(kernels, "scan_forward_both", directions):
        *outs, state, state_b = kernels.scan_forward_both(scans[0][:8], scans[1][:8], True, save_states)
        states = [state, state_b]
    else:
        outs, _, states = zip(*(kernels.scan_forward(*scan, save_states) for scan in scans))
    out = outs[0] if len(outs) == 1 else outs[0] + outs[1]
    out = (out if share == 1 else out * share).transpose(1, 2).contiguous()
    return out, x_dbls, states


def composed_backward(
    kernels,
    dout: Tensor,
    xz: Tensor,
    directions: Sequence[Direction],
    x_dbls: Sequence[Tensor],
    states: Sequence[Tensor],
    share: float,
) -> list[Tensor | None]:
    """Gradients of xz and of each direction's tensors, from a kernel set's `scan_backward`."""
    x, z = xz.transpose(1, 2).chunk(2, dim=1)
    dout = (dout if share == 1 else dout * share).transpose(1, 2)
    scans = [_scan_arguments(x, z, direction, x_dbl)[1] for direction, x_dbl in zip(directions, x_dbls)]
    if _is_pair(kernels, "scan_backward_both", directions):
        both = kernels.scan_backward_both((dout, dout), scans[0][:8], scans[1][:8], states, True)
        results = [both[:8], both[8:]]
    else:
        results = [kernels.scan_backward(dout, *scan[:8], kept, *scan[8:]) for scan, kept in zip(scans, states)]
    dx = dz = None
    grads: list[Tensor | None] = []
    for direction, scan, x_dbl, result in zip(directions, scans, x_dbls, results):
        du, ddelta, dA, dB, dC, dD, dz_part, dt_bias_grad = result
        ddelta = ddelta.transpose(1, 2)
        dt_weight, x_weight = (w.to(du.dtype) for w in (direction.dt_proj_weight, direction.x_proj_weight))
        dx_dbl = torch.cat([ddelta @ dt_weight, *(grad.squeeze(1).transpose(1, 2) for grad in (dB, dC))], dim=2)
        dt = x_dbl[..., : dt_weight.shape[1]]
        ddt_weight = ddelta.flatten(0, 1).t() @ dt.flatten(0, 1)
        dx_weight = dx_dbl.flatten(0, 1).t() @ scan[0].transpose(1, 2).flatten(0, 1)
        du = du + (dx_dbl @ x_weight).transpose(1, 2)
        dx_part, dconv_weight, dconv_bias = torch.ops.causal_conv1d.backward(
            du, x, direction.conv_weight, direction.conv_bias, True, direction.reverse
        )
        dx, dz = (dx_part, dz_part) if dx is None else (dx + dx_part, dz + dz_part)
        grads += [dconv_weight, dconv_bias, dx_weight, ddt_weight, dt_bias_grad, dA, dD]
    return [torch.cat([dx, dz], dim=1).transpose(1, 2), *grads]


def _forward(xz, *arguments):
    *parameters, reverse, share, save_states = arguments
    kernels, directions = backends.pick(xz), split(parameters, reverse)
    with torch.no_grad():
        if hasattr(kernels, "directions_forward"):
            out, x_dbls, states = kernels.directions_forward(xz, directions, share, save_states)
        else:
            out, x_dbls, states = composed_forward(kernels, xz, directions, share, save_states)
    return out, *_two(xz, x_dbls), *_two(xz, states)


def _two(xz: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The tensors of two directions, the second empty if there is one only."""
    return (*tensors, xz.new_empty(0))[:2]


def _backward(dout, xz, *arguments):
    x_dbls, states, (*parameters, reverse, share) = arguments[:2], arguments[2:4], arguments[4:]
    kernels, directions = backends.pick(xz), split(parameters, reverse)
    x_dbls, states = x_dbls[: len(directions)], states[: len(directions)]
    with torch.no_grad():
        if hasattr(kernels, "directions_backward"):
            grads = kernels.directions_backward(dout, xz, directions, x_dbls, states, share)
        else:
            grads = composed_backward(kernels, dout, xz, directions, x_dbls, states, share)
        grads += [None] * (1 + 2 * _COUNT - len(grads))
        return tuple(
            xz.new_empty(0) if like is None else grad.to(like.dtype).contiguous()
            for like, grad in zip((xz, *parameters), grads)
        )


def _fake_forward(xz, *arguments):
    *parameters, reverse, _, save_states = arguments
    (batch, seqlen, width), x_dbls, states = xz.shape, [], []
    shape_of_states = backends.pick(xz).states_shape
    for direction in split(parameters, reverse):
        rows, dstate = direction.x_proj_weight.shape[0], direction.A.shape[1]
        x_dbls.append(xz.new_empty(batch, seqlen, rows))
        shape = shape_of_states(batch, width // 2, seqlen, dstate) if save_states else (0,)
        states.append(xz.new_empty(shape, dtype=torch.float32))
    return xz.new_empty(batch, seqlen, width // 2), *_two(xz, x_dbls), *_two(xz, states)


def _fake_backward(dout, xz, *arguments):
    wanted = (xz, *arguments[4:-2])
    return tuple(xz.new_empty(0) if like is None else like.new_empty(like.shape) for like in wanted)


def _save(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.reverse, ctx.share, _ = inputs
    ctx.save_for_backward(*output[1:], *tensors)


def _differentiate(ctx, dout: Tensor, *_) -> tuple:
    x_dbl, x_dbl_b, states, states_b, *tensors = ctx.saved_tensors
    saved = (x_dbl, x_dbl_b, states, states_b)
    grads = torch.ops.mamba_ssm.directions_backward(dout, tensors[0], *saved, *tensors[1:], ctx.reverse, ctx.share)
    return *(None if tensor is None else grad for tensor, grad in zip(tensors, grads)), None, None, None


register("directions", _forward, _fake_forward, save=_save, differentiate=_differentiate)
register("directions_backward", _backward, _fake_backward)
