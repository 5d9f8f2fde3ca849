"""Registration of operators with `torch.library`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
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
            save, differentiate: `setup_context` and `backward` of `torch.library.register_autograd`.
            flops: two for each multiply-add, of the operator's arguments with shapes in the place of tensors, for
                `torch.utils.flop_counter`.
        """
        name = schema.partition("(")[0]
        self._library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        self.kernels[name] = kernel
        self._library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{self.namespace}::{name}", fake, lib=self._library)
        if differentiate is not None:
            qualified = f"{self.namespace}::{name}"
            torch.library.register_autograd(qualified, differentiate, setup_context=save, lib=self._library)
        if flops is not None:
            operator = getattr(getattr(torch.ops, self.namespace), name)
            register_flop_formula(operator)(lambda *args, out_shape=None, **kwargs: flops(*args, **kwargs))
