"""The mixer over visible tokens of the C++ kernel set; `csrc/visible_abi.h` has the layout of what is passed."""

from __future__ import annotations

import ctypes

import torch
from causal_conv1d.layout import address, channel_last, float32
from causal_conv1d.native import bits, tokens_of
from mamba_ssm.kernels.arguments import Taps, VisibleLines
from mamba_ssm.kernels.cpp.library import LIBRARY
from mamba_ssm.kernels.cpp.pooled import conv_fields, gate_fields
from torch import Tensor


def _call(function: str, arguments: ctypes.Structure) -> None:
    if LIBRARY.call(function, arguments):
        raise ValueError("order or starts point outside the tokens; wanted places of the walk, rising from 0 to V")


def visible_fields(lines: VisibleLines, tokens: int) -> tuple[int, int, int, int]:
    """The fields of csrc/visible_abi.h's VisibleLines; `lines` are contiguous."""
    return lines.count, tokens, address(lines.order), address(lines.starts)


def _lines_of(lines: VisibleLines, tokens: int) -> tuple[VisibleLines, tuple[int, int, int, int]]:
    """The lines in dense memory, to be held until the call is over, and their fields."""
    order = None if lines.order is None else lines.order.contiguous()
    lines = lines._replace(order=order, starts=lines.starts.contiguous())
    return lines, visible_fields(lines, tokens)


def visible_conv(x: Tensor, forward: Taps, backward: Taps, lines: VisibleLines) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, dim = x.shape
    skip = x.new_empty(x.shape)
    pooled, pooled_b = (x.new_zeros((batch, lines.count, dim)) for _ in range(2))
    if skip.numel():
        x, taps = channel_last(x), [float32(parameter) for parameter in (*forward, *backward)]
        lines, fields = _lines_of(lines, tokens)
        arguments = LIBRARY.structs.VisibleConvArgs(
            **conv_fields(x, taps, fields),
            factor=bits(lines.factor),
            skip=address(skip),
            pooled_forward=address(pooled),
            pooled_backward=address(pooled_b),
        )
        _call("mamba_visible_conv", arguments)
    return skip, pooled, pooled_b


def visible_conv_backward(
    dskip: Tensor,
    dpooled: Tensor,
    dpooled_b: Tensor,
    x: Tensor,
    forward: Taps,
    backward: Taps,
    lines: VisibleLines,
) -> tuple[Tensor, ...]:
    """Gradients of x, and of both directions' taps."""
    batch, tokens, dim = x.shape
    dx = x.new_empty(x.shape)
    taps = [float32(parameter) for parameter in (*forward, *backward)]
    grads = [None if tap is None else torch.zeros_like(tap) for tap in taps]
    if dx.numel():
        x, targets = channel_last(x), [address(grad) for grad in grads]
        dskip, dpooled, dpooled_b = (grad.to(x.dtype).contiguous() for grad in (dskip, dpooled, dpooled_b))
        lines, fields = _lines_of(lines, tokens)
        arguments = LIBRARY.structs.VisibleConvBackwardArgs(
            **conv_fields(x, taps, fields),
            factor=bits(lines.factor),
            dskip=address(dskip),
            dpooled_forward=address(dpooled),
            dpooled_backward=address(dpooled_b),
            dx=tokens_of(dx),
            dforward=tuple(targets[:3]),
            dbackward=tuple(targets[3:]),
        )
        _call("mamba_visible_conv_backward", arguments)
    parameters = (*forward, *backward)
    return dx, *(
        dx.new_empty(0) if grad is None else grad.to(parameter.dtype) for grad, parameter in zip(grads, parameters)
    )


def visible_gate(
    skip: Tensor,
    groups: Tensor,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    lines: VisibleLines,
    share: float,
) -> Tensor:
    out = skip.new_empty(skip.shape)
    if out.numel():
        z, skip, groups = channel_last(z), skip.contiguous(), groups.contiguous()
        weight, bias = float32(weight), float32(bias)
        lines, fields = _lines_of(lines, z.shape[1])
        arguments = LIBRARY.structs.VisibleGateArgs(
            **gate_fields(z, weight, bias, eps, fields, share),
            skip=address(skip),
            groups=address(groups),
            out=address(out),
        )
        _call("mamba_visible_gate", arguments)
    return out


def visible_gate_backward(
    dout: Tensor,
    skip: Tensor,
    groups: Tensor,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    lines: VisibleLines,
    share: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of skip, groups, z, weight and bias; no token is in no line."""
    dskip, dgroups = skip.new_empty(skip.shape), (groups.new_empty if skip.numel() else groups.new_zeros)(groups.shape)
    dz = z.new_empty(z.shape)
    wide, wide_bias = float32(weight), float32(bias)
    dweight, dbias = (skip.new_zeros(0 if x is None else x.shape, dtype=torch.float32) for x in (wide, wide_bias))
    if skip.numel():
        z, skip, groups, dout = channel_last(z), skip.contiguous(), groups.contiguous(), dout.to(z.dtype).contiguous()
        lines, fields = _lines_of(lines, z.shape[1])
        arguments = LIBRARY.structs.VisibleGateBackwardArgs(
            **gate_fields(z, wide, wide_bias, eps, fields, share),
            skip=address(skip),
            groups=address(groups),
            dout=address(dout),
            dskip=address(dskip),
            dgroups=address(dgroups),
            dz=tokens_of(dz),
            dweight=address(dweight) if weight is not None else 0,
            dbias=address(dbias) if bias is not None else 0,
        )
        _call("mamba_visible_gate_backward", arguments)
    return (
        dskip,
        dgroups,
        dz,
        dweight if weight is None else dweight.to(weight.dtype),
        dbias if bias is None else dbias.to(bias.dtype),
    )
