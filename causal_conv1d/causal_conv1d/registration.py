"""Registration of operators with `torch.library`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


class Operators:
    """The operators of one namespace of `torch.ops`."""

    def __init__(self, namespace: str):
        self.namespace = namespace
        self._library = torch.library.Library(namespace, "DEF")
        self.kernels: dict[str, Callable] = {}  # by an operator's name

    def register(
        self,
        schema: str,
        kernel: Callable,
        fake: Callable,
        *,
        save: Callable[[Any, tuple, Any], None] | None = None,
        differentiate: Callable[..., tuple] | None = None,
        flops: Callable[..., int] | None = None,
    ) -> None:
        """Give the operator of `schema` its kernel, its fake and, if it is differentiable, its gradient.

        Args:
            schema: as `torch.library.define` takes it, without the namespace.
            kernel: computes it on every device.
            fake: the shapes and dtypes of its results.
            save, differentiate: `setup_context` and `backward` of `torch.library.register_autograd`, but that
                `needs_input_grad` of their context has one place more.
            flops: two for each multiply-add, of the operator's arguments with shapes in the place of tensors, for
                `torch.utils.flop_counter`.
        """
        name = schema.partition("(")[0]
        self._library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        self.kernels[name] = kernel
        self._library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{self.namespace}::{name}", fake, lib=self._library)
        operator = getattr(getattr(torch.ops, self.namespace), name)
        if differentiate is not None:
            with_gradient = _with_gradient(operator.default, save, differentiate)
            self._library.impl(name, with_gradient, "Autograd", with_keyset=True)
        if flops is not None:
            register_flop_formula(operator)(lambda *args, out_shape=None, **kwargs: flops(*args, **kwargs))


def _with_gradient(operator: torch._ops.OpOverload, save: Callable, differentiate: Callable) -> Callable:
    """What `torch.library.register_autograd` registers, for operators without defaults or keywords: it looks for these
    in every call, reading the whole schema anew for each argument, which for twenty of them is a tenth of a
    millisecond."""

    def below(keyset: Any, arguments: Sequence[Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    def forward(ctx: Any, *given: Any) -> Any:
        *arguments, keyset = given
        output = below(keyset, arguments)
        save(ctx, tuple(arguments), output)
        return output

    def backward(ctx: Any, *grads: Any) -> tuple:
        found = differentiate(ctx, *grads)
        return *(found if isinstance(found, tuple) else (found,)), None

    ways = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    # graphs of gradients show its name, "Backward" behind it
    function = type(operator.name().replace("::", "_"), (torch.autograd.Function,), ways)

    def call(keyset: Any, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in arguments):
            return function.apply(*arguments, keyset)
        return below(keyset, arguments)

    return call
