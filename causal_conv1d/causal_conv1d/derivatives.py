"""What no kernel computes: derivatives beyond the first, and exports, by way of an operator's reference, which is plain
torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_exporting_onnx() -> bool:
    """Whether `torch.onnx.export` looks on, whose files know torch's operators alone."""
    return torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()


def wants_reference(*arguments: Any) -> bool:
    """Whether these arguments of an operator are seen by a transform of `torch.func`, carry the tangents of forward
    mode, or are written as ONNX: operators know none of these, so that their references are called instead."""
    if torch.compiler.is_compiling():
        return torch.onnx.is_in_onnx_export()
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def gradients_by_reference(
    reference: Callable[..., Any], arguments: Sequence[Any], douts: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients of `reference(*arguments)` in each of its arguments, differentiable in turn, as often as one likes.

    For an operator's gradient where `torch.is_grad_enabled()`, that is where a graph of it is wanted: kernels compute
    gradients that nothing can be learnt from about how they change.

    Args:
        reference: gives one result or several.
        arguments: tensors, None and options.
        douts: the gradient of each result; None for one that nothing depends on.
    """
    with torch.enable_grad():
        # views, since one tensor may be several arguments
        own = [argument.view_as(argument) if isinstance(argument, Tensor) else argument for argument in arguments]
        outs = reference(*own)
        outs = outs if isinstance(outs, tuple) else (outs,)
        places = [place for place, each in enumerate(own) if isinstance(each, Tensor) and each.requires_grad]
        known = [(out, dout) for out, dout in zip(outs, douts) if dout is not None and out.requires_grad]
        found: list[Tensor | None] = [None] * len(own)
        if known and places:
            wanted = [own[place] for place in places]
            outs, douts = ([pair[which] for pair in known] for which in (0, 1))
            grads = torch.autograd.grad(outs, wanted, douts, create_graph=True, allow_unused=True)
            for place, grad in zip(places, grads):
                found[place] = grad
    return tuple(found)
