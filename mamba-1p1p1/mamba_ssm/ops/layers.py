"""Several layers, each an add, a norm and a whole mixer, with tokens that merge behind some, in one step of the graph
of gradients.

Between the kernels of one layer and those of the next there is nothing but a loop: of a small model's time on two
cores, a fifth is otherwise in checks, dispatch and autograd around them, each time with what a processor keeps beside
itself just used for something else. Kernels and numbers are those of the operators one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from causal_conv1d.checks import check_all
from causal_conv1d.derivatives import gradients_by_reference
from mamba_ssm.kernels.registry import backends
from mamba_ssm.ops.merging import Merging
from mamba_ssm.ops.norm import layer_norm_fn
from mamba_ssm.ops.whole import WholeMixer, WholePooledMixer, has_whole, is_watched
from torch import Tensor

__all__ = ["Layer", "has_layers", "layers_fn", "layers_ref"]

_PLAIN = (Tensor, torch.nn.Parameter)


class Layer(NamedTuple):
    """What one layer does with the sum of its input and the residual: its norm, weight and bias (width,) or None, and
    the mixer behind it. `factor` (batch, 1, 1) is what the input is multiplied with before, as where images skip the
    last mixer at random; it has no gradient. `merging` is how tokens become one behind the mixer, if any do."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    is_rms_norm: bool
    mixer: WholeMixer | WholePooledMixer
    factor: Tensor | None = None
    merging: Merging | None = None

    @property
    def tensors(self) -> list[Tensor | None]:
        """In the order in which their gradients are found."""
        return [self.weight, self.bias, *self.mixer.tensors]

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> Layer:
        """The same with other `tensors`."""
        return self._replace(weight=tensors[0], bias=tensors[1], mixer=self.mixer.with_tensors(tensors[2:]))


def has_layers(x: Tensor, residual: Tensor | None) -> bool:
    """Whether `layers_fn` is there for x and a residual, and nothing looks on that would miss operators: no subclass of
    tensors, no mode of dispatch, no tangents."""
    if x.numel() == 0 or not has_whole(x, "layers") or is_watched():
        return False
    return all(each is None or (type(each) in _PLAIN and each.dtype == torch.float32) for each in (x, residual))


def layers_fn(x: Tensor, residual: Tensor | None, layers: Sequence[Layer]) -> tuple[Tensor, Tensor]:
    """One layer after the other: residual = residual + factor * x, x = mixer(norm(residual)), and where a layer is told
    so, tokens of both become one; differentiable in every other tensor.

    Args:
        x: (batch, tokens, width), float32, as all tensors.
        residual: like x, or None, which counts as zeros.
        layers: at least one.

    Returns:
        x and the residual behind the last layer, (batch, tokens left, width).

    Raises:
        ValueError: a shape or device that does not fit. TypeError: another dtype.
    """
    _check(x, residual, layers)
    if not torch.is_grad_enabled():
        return backends.pick(x).layers(x, residual, layers, False)[:2]
    # what comes before the first layer that learns keeps nothing
    learn = [any(each is not None and each.requires_grad for each in (x, residual))]
    learn += [any(each is not None and each.requires_grad for each in layer.tensors) for layer in layers]
    first = next((number for number, wants in enumerate(learn) if wants), len(layers) + 1)
    before = max(first - 1, 0)
    if before:
        with torch.no_grad():
            x, residual, _ = backends.pick(x).layers(x, residual, layers[:before], False)
    if before == len(layers):
        return x, residual
    layers = layers[before:]
    return _Layers.apply(layers, x, residual, *(each for layer in layers for each in layer.tensors))


def layers_ref(x: Tensor, residual: Tensor | None, layers: Sequence[Layer]) -> tuple[Tensor, Tensor]:
    """What `layers_fn` computes."""
    for layer in layers:
        x = x if layer.factor is None else x * layer.factor
        normed, residual = layer_norm_fn(
            x, layer.weight, layer.bias, residual, layer.eps, True, True, is_rms_norm=layer.is_rms_norm
        )
        x = layer.mixer(normed)
        if layer.merging is not None:
            x, residual = layer.merging(x, residual)
    return x, residual


def _check(x: Tensor, residual: Tensor | None, layers: Sequence[Layer]) -> None:
    check_all(x, "x", (("residual", residual, x.shape, "the shape of x"),), (torch.float32,), ("residual",))
    size, x = x.shape[-1:], x.detach()
    for layer in layers:
        layer.mixer.check(x)
        given = ("weight", layer.weight, size, "(width,)"), ("bias", layer.bias, size, "(width,)")
        check_all(x, "x", given, (torch.float32,), ("bias",))
        factor = ("factor", layer.factor, (len(x), 1, 1), "(batch, 1, 1)")
        check_all(x, "x", (factor,), (torch.float32,), ("factor",))
        if layer.merging is not None:
            layer.merging.check(x)
            x = x[:, layer.merging.fused :]


class _Layers(torch.autograd.Function):
    """Layers, x, the residual, and the tensors of all layers, in their order, which are given for their gradients."""

    @staticmethod
    def forward(ctx, layers: Sequence[Layer], x: Tensor, residual: Tensor | None, *tensors: Tensor | None):
        out, total, kept = backends.pick(x).layers(x, residual, layers, True)
        ctx.set_materialize_grads(False)
        ctx.layers, ctx.sizes, ctx.has_residual = layers, [len(each) for each in kept], residual is not None
        # only second derivatives want what was added up, and start from the sum where that is a result
        ctx.sums_up = len(layers) == 1 and layers[0].merging is None
        added = (None, None) if ctx.sums_up else (x, residual)
        # the tensors of the layers, too, which are compared with what they were
        ctx.save_for_backward(*(each for of_layer in kept for each in of_layer), *added, *tensors)
        return out, total

    @staticmethod
    def backward(ctx, dx: Tensor | None, dresidual: Tensor | None) -> tuple:
        saved, wanted = ctx.saved_tensors, ctx.needs_input_grad[3:]
        kept, (x, residual, *tensors) = saved[: sum(ctx.sizes)], saved[sum(ctx.sizes) :]
        if dx is None and dresidual is None:
            return (None,) * (3 + len(tensors))
        total = kept[1]
        if torch.is_grad_enabled() or not backends.has(total, "layers_backward"):
            if not ctx.sums_up:
                given = x, residual, *tensors
                return None, *gradients_by_reference(_reference(ctx.layers), given, (dx, dresidual))
            (layer,) = ctx.layers
            reference = _reference([layer._replace(factor=None)])
            dtotal, _, *grads = gradients_by_reference(reference, (total, None, *tensors), (dx, dresidual))
            dx = dtotal if layer.factor is None else dtotal * layer.factor
            return None, dx, dtotal if ctx.has_residual else None, *grads
        dx = torch.zeros_like(dresidual) if dx is None else dx
        kept, of_layers = _parts(kept, ctx.sizes), _parts(wanted, [len(layer.tensors) for layer in ctx.layers])
        dx, dresidual, found = backends.pick(total).layers_backward(dx, dresidual, ctx.layers, kept, of_layers)
        grads = [each for of_layer in found for each in of_layer]
        grads = [grad if wants else None for grad, wants in zip(grads, wanted, strict=True)]
        return None, dx, dresidual if ctx.has_residual else None, *grads


def _reference(layers: Sequence[Layer]) -> Any:
    """`layers_ref` of x, the residual and the tensors of all layers."""

    def reference(x: Tensor, residual: Tensor | None, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        given = iter(tensors)
        return layers_ref(x, residual, [layer.with_tensors([next(given) for _ in layer.tensors]) for layer in layers])

    return reference


def _parts(every: Sequence[Any], sizes: Sequence[int]) -> list[Sequence[Any]]:
    """`every` in parts of these sizes."""
    return [every[end - size : end] for end, size in zip(accumulate(sizes), sizes)]
