"""Several layers of the C++ kernel set, float32. All calls of the library are made ready first, and then made one after
the other: what Python needs for them is not driven out of the processor's caches between one and the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from typing import Any

import torch
from mamba_ssm.kernels.cpp.merging import match_tokens_call, merge_tokens_backward_call, merge_tokens_call
from mamba_ssm.kernels.cpp.norm import norm_backward_call, norm_call
from mamba_ssm.kernels.cpp.whole import mixer_backward_call, mixer_call, pooled_mixer_backward_call, pooled_mixer_call
from torch import Tensor

_FORWARD = {"mixer": mixer_call, "pooled_mixer": pooled_mixer_call}
_BACKWARD = {"mixer": mixer_backward_call, "pooled_mixer": pooled_mixer_backward_call}


class _Memory:
    """Memory for one sequence at a time, none longer than `longest` (batch, tokens, width); none at all without it."""

    def __init__(self, longest: Tensor | None) -> None:
        self.longest, self.block = longest, None
        self.views: dict[int, Tensor] = {}

    def like(self, x: Tensor, tokens: int | None = None) -> Tensor | None:
        """A sequence like x, or of other `tokens`."""
        if self.longest is None:
            return None
        batch, own, width = x.shape
        tokens = own if tokens is None else tokens
        if self.block is None:
            self.block = self.longest.new_empty(self.longest.numel())
        if tokens not in self.views:
            self.views[tokens] = self.block[: batch * tokens * width].view(batch, tokens, width)
        return self.views[tokens]


def layers(
    x: Tensor, residual: Tensor | None, given: Sequence[Any], save: bool
) -> tuple[Tensor, Tensor, list[tuple[Tensor, ...]]]:
    """x (batch, tokens, width) and the residual behind the last of the layers `given` (`ops.layers.Layer`), and if
    `save`, of each what its gradients start from: the mixer's input, the sum, the norm's mean and scale, what the mixer
    keeps and, where tokens merge, their slots and the sizes of groups."""
    calls: list[Callable[[], Any]] = []
    kept: list[tuple[Tensor, ...]] = []
    # what nothing is saved of needs one layer's memory, and two residuals
    normed, out, scaled, merged, *totals = (_Memory(None if save else x) for _ in range(6))
    totals, rows = cycle(totals), x.numel() // x.shape[-1]
    moments = None if save else x.new_empty(2, rows).unbind()
    for weight, bias, eps, is_rms_norm, mixer, factor, merging in given:
        x = x if factor is None else _multiplied(x, factor, scaled, calls)
        into = None if save else (normed.like(x), next(totals).like(x), *moments)
        of_norm, call = norm_call(x, residual, weight, bias, eps, is_rms_norm, torch.float32, into)
        calls.append(call)
        x, of_mixer, call = _FORWARD[mixer.kernel](of_norm[0], *mixer, save, out.like(x))
        calls.append(call)
        residual, groups = of_norm[1], ()
        if merging is not None:
            (slot, _, count, _), call = match_tokens_call(x, *merging.given(x.device))
            calls.append(call)
            groups, left = (slot, count), count.shape[1]
            x, call = merge_tokens_call(x, slot, count, merged.like(x, left))
            calls.append(call)
            residual, call = merge_tokens_call(residual, slot, count, next(totals).like(residual, left))
            calls.append(call)
        if save:
            kept.append((*of_norm, *of_mixer, *groups))
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
    # the first layer's sequence is the longest
    dnormed, scaled, spread, *sums = (_Memory(kept[0][0]) for _ in range(5))
    sums = cycle(sums)
    backwards = zip(reversed(given), reversed(kept), reversed(wanted), strict=True)
    for layer, (normed, total, mean, scale, *of_mixer), wants in backwards:
        if layer.merging is not None:
            *of_mixer, slot, count = of_mixer
            is_one = dx is dresidual
            dx, call = merge_tokens_backward_call(dx, slot, count, spread.like(normed))
            calls.append(call)
            if is_one:
                dresidual = dx
            elif dresidual is not None:
                dresidual, call = merge_tokens_backward_call(dresidual, slot, count, next(sums).like(normed))
                calls.append(call)
        backward = _BACKWARD[layer.mixer.kernel]
        (dnorm, *of_parameters), call = backward(
            dx, normed, *layer.mixer, of_mixer, [True, *wants[2:6]], dnormed.like(normed)
        )
        calls.append(call)
        of_norm = total, mean, scale, layer.weight, layer.bias, layer.is_rms_norm, None, next(sums).like(normed)
        (dresidual, _, dweight, dbias), call = norm_backward_call(dnorm, dresidual, *of_norm)
        calls.append(call)
        dx = dresidual if layer.factor is None else _multiplied(dresidual, layer.factor, scaled, calls)
        grads.insert(0, [dweight, dbias, *of_parameters])
    for call in calls:
        call()
    return dx, dresidual, grads


def _multiplied(x: Tensor, factor: Tensor, memory: _Memory, calls: list[Callable[[], Any]]) -> Tensor:
    """x times its factor, in new memory if there is none for it, once `calls` are made."""
    out = memory.like(x)
    out = torch.empty_like(x) if out is None else out
    calls.append(partial(torch.mul, x, factor, out=out))
    return out
