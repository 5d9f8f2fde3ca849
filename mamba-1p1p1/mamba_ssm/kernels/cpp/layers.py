"""Several layers of the C++ kernel set, float32. All calls of the library are made ready first, and then made one after
the other: what Python needs for them is not driven out of the processor's caches between one and the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from mamba_ssm.kernels.cpp.norm import norm_backward_call, norm_call
from mamba_ssm.kernels.cpp.whole import mixer_backward_call, mixer_call, pooled_mixer_backward_call, pooled_mixer_call
from torch import Tensor

_FORWARD = {"mixer": mixer_call, "pooled_mixer": pooled_mixer_call}
_BACKWARD = {"mixer": mixer_backward_call, "pooled_mixer": pooled_mixer_backward_call}


def layers(
    x: Tensor, residual: Tensor | None, given: Sequence[Any], save: bool
) -> tuple[Tensor, Tensor, list[tuple[Tensor, ...]]]:
    """x (batch, tokens, width) and the residual behind the last of the layers `given` (`ops.layers.Layer`), and if
    `save`, of each what its gradients start from: the mixer's input, the sum, the norm's mean and scale, and what the
    mixer keeps."""
    calls: list[Callable[[], Any]] = []
    kept, rows, new = [], x.numel() // x.shape[-1], partial(torch.empty_like, x, memory_format=torch.contiguous_format)
    # what nothing is saved of needs one layer's memory, and two residuals
    normed, out, scaled, moments = (None,) * 4 if save else (new(), new(), new(), x.new_empty(2, rows).unbind())
    totals = None if save else (new(), new())
    for number, (weight, bias, eps, is_rms_norm, mixer, factor) in enumerate(given):
        x = x if factor is None else _multiplied(x, factor, scaled, calls)
        into = None if save else (normed, totals[number % 2], *moments)
        of_norm, call = norm_call(x, residual, weight, bias, eps, is_rms_norm, torch.float32, into)
        calls.append(call)
        x, of_mixer, call = _FORWARD[mixer.kernel](of_norm[0], *mixer, save, out)
        calls.append(call)
        residual = of_norm[1]
        if save:
            kept.append((*of_norm, *of_mixer))
    for call in calls:
        call()
    return x, residual, kept


def layers_backward(
    dx: Tensor,
    dresidual: Tensor | None,
    given: Sequence[Any],
    kept: Sequence[Sequence[Tensor]],
    wanted: Sequence[Sequence[bool]],
) -> tuple[Tensor, Tensor, list[list[Tensor | None]]]:
    """The gradients of x and of the residual, which differ by the first layer's factor alone; and those of each layer's
    tensors, of the mixer's outer ones where they are `wanted`."""
    calls: list[Callable[[], Any]] = []
    grads: list[list[Tensor | None]] = []
    new = partial(torch.empty_like, dx, memory_format=torch.contiguous_format)
    dnormed, scaled, sums = new(), new(), (new(), new())
    backwards = zip(reversed(given), reversed(kept), reversed(wanted), strict=True)
    for number, (layer, (normed, total, mean, scale, *of_mixer), wants) in enumerate(backwards):
        backward = _BACKWARD[layer.mixer.kernel]
        (_, *of_parameters), call = backward(dx, normed, *layer.mixer, of_mixer, [True, *wants[2:6]], dnormed)
        calls.append(call)
        of_norm = total, mean, scale, layer.weight, layer.bias, layer.is_rms_norm, None, sums[number % 2]
        (dresidual, _, dweight, dbias), call = norm_backward_call(dnormed, dresidual, *of_norm)
        calls.append(call)
        dx = dresidual if layer.factor is None else _multiplied(dresidual, layer.factor, scaled, calls)
        grads.insert(0, [dweight, dbias, *of_parameters])
    for call in calls:
        call()
    return dx, dresidual, grads


def _multiplied(x: Tensor, factor: Tensor, out: Tensor | None, calls: list[Callable[[], Any]]) -> Tensor:
    """x times its factor, in new memory or in that of `out`, once `calls` are made."""
    out = torch.empty_like(x) if out is None else out
    calls.append(partial(torch.mul, x, factor, out=out))
    return out
