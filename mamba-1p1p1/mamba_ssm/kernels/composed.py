"""The operators that a kernel set may lack, put together from those that every set has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from causal_conv1d.kernels.registry import backends as conv_backends
from mamba_ssm.kernels.arguments import DIRECTION_TENSORS, SCAN_TENSORS, Direction, Scan, split_matrices
from torch import Tensor


def _scan_of(
    x: Tensor, z: Tensor, factor: Tensor | None, direction: Direction, x_dbl: Tensor | None
) -> tuple[Tensor, Tensor, Scan]:
    """(x_dbl, what the convolution gives, and the scan of that times `factor`) of a direction."""
    conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_bias, A, D, reverse = direction
    convolved = conv_backends.pick(x).conv_forward(x, conv_weight, conv_bias, True, reverse)
    u = convolved if factor is None else convolved * factor
    if x_dbl is None:
        x_dbl = F.linear(u.transpose(1, 2), x_proj_weight.to(u.dtype))
    dt, B, C = split_matrices(x_dbl, A.shape[1])
    delta = F.linear(dt, dt_proj_weight.to(u.dtype)).transpose(1, 2)
    return x_dbl, convolved, Scan(u, delta, A, B, C, D, z, dt_bias, True, reverse)


def _masked(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x (batch, dim, seqlen) times mask (batch, seqlen), and the mask so that it fits x."""
    factor = None if mask is None else mask.to(x.dtype).unsqueeze(1)
    return x if factor is None else x * factor, factor


def _is_pair(kernels: Any, name: str, directions: Sequence[Direction]) -> bool:
    """Whether these are a forward and a backward direction of equal sizes, and `kernels` has a function for both."""
    if not hasattr(kernels, name) or [direction.reverse for direction in directions] != [False, True]:
        return False
    first, second = (direction[:DIRECTION_TENSORS] for direction in directions)
    return all((a is None) == (b is None) and (a is None or a.shape == b.shape) for a, b in zip(first, second))


def directions_forward(
    kernels: Any,
    xz: Tensor,
    directions: Sequence[Direction],
    share: float,
    save_states: bool,
    mask: Tensor | None = None,
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
    """(out, x_dbl of each direction, saved states of each direction), from a kernel set's `scan_forward`.

    A set that takes both scans of a bidirectional block at once is handed them so.
    """
    x, z = xz.transpose(1, 2).chunk(2, dim=1)
    x, factor = _masked(x, mask)
    x_dbls, _, scans = zip(*(_scan_of(x, z, factor, direction, None) for direction in directions))
    if _is_pair(kernels, "scan_forward_both", directions):
        first, second = (scan[:SCAN_TENSORS] for scan in scans)
        *outs, state, state_b = kernels.scan_forward_both(first, second, True, save_states)
        states = [state, state_b]
    else:
        outs, _, states = zip(*(kernels.scan_forward(*scan, save_states) for scan in scans))
    out = outs[0] if len(outs) == 1 else outs[0] + outs[1]
    out = (out if share == 1 else out * share).transpose(1, 2).contiguous()
    return out, x_dbls, states


def directions_backward(
    kernels: Any,
    dout: Tensor,
    xz: Tensor,
    directions: Sequence[Direction],
    x_dbls: Sequence[Tensor],
    states: Sequence[Tensor],
    share: float,
    mask: Tensor | None = None,
) -> list[Tensor | None]:
    """Gradients of xz, of each direction's tensors, and of the mask if there is one, from a kernel set's
    `scan_backward`."""
    plain, z = xz.transpose(1, 2).chunk(2, dim=1)
    x, factor = _masked(plain, mask)
    dout = (dout if share == 1 else dout * share).transpose(1, 2)
    given = zip(directions, x_dbls)
    _, convolved, scans = zip(*(_scan_of(x, z, factor, direction, x_dbl) for direction, x_dbl in given))
    if _is_pair(kernels, "scan_backward_both", directions):
        first, second = (scan[:SCAN_TENSORS] for scan in scans)
        both = kernels.scan_backward_both((dout, dout), first, second, states, True)
        results = [both[:SCAN_TENSORS], both[SCAN_TENSORS:]]
    else:
        results = [
            kernels.scan_backward(dout, *scan[:SCAN_TENSORS], kept, *scan[SCAN_TENSORS:])
            for scan, kept in zip(scans, states)
        ]
    dx = dz = None
    dmask = None if mask is None else torch.zeros_like(mask)
    grads: list[Tensor | None] = []
    for direction, scan, before, x_dbl, result in zip(directions, scans, convolved, x_dbls, results):
        du, ddelta, dA, dB, dC, dD, dz_part, dt_bias_grad = result
        ddelta = ddelta.transpose(1, 2)
        dt_weight, x_weight = (w.to(du.dtype) for w in (direction.dt_proj_weight, direction.x_proj_weight))
        dx_dbl = torch.cat([ddelta @ dt_weight, *(grad.squeeze(1).transpose(1, 2) for grad in (dB, dC))], dim=2)
        dt = x_dbl[..., : dt_weight.shape[1]]
        ddt_weight = ddelta.flatten(0, 1).t() @ dt.flatten(0, 1)
        dx_weight = dx_dbl.flatten(0, 1).t() @ scan.u.transpose(1, 2).flatten(0, 1)
        du = du + (dx_dbl @ x_weight).transpose(1, 2)
        if factor is not None:
            dmask += (du * before).sum(1, dtype=dmask.dtype)
            du = du * factor
        dx_part, dconv_weight, dconv_bias = conv_backends.pick(x).conv_backward(
            du, x, direction.conv_weight, direction.conv_bias, True, direction.reverse
        )
        dx, dz = (dx_part, dz_part) if dx is None else (dx + dx_part, dz + dz_part)
        grads += [dconv_weight, dconv_bias, dx_weight, ddt_weight, dt_bias_grad, dA, dD]
    if factor is not None:
        dmask += (dx * plain).sum(1, dtype=dmask.dtype)
        dx, grads = dx * factor, [*grads, dmask]
    return [torch.cat([dx, dz], dim=1).transpose(1, 2), *grads]
