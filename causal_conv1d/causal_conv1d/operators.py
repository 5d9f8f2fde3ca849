"""Registration of the convolution with `torch.library`, namespace `causal_conv1d`.

A kernel set (see `backend.py`) for this package has the three functions of `torch_kernels.py`, with those signatures:
`conv_forward`, `conv_backward`, `conv_update`. Tensors arrive checked, on one device, with any strides; `x`, `dout` and
`conv_state` may differ in dtype from `weight` and `bias`. Results: `out` and `dx` like `torch.empty_like(x)`, `dweight`
contiguous, in its parameter's dtype, `dbias` likewise, or empty where there is no bias.

A backend is a module with a function `load()` that returns the kernel set or raises why it cannot run here.
"""

from __future__ import annotations

from importlib import import_module

import torch
from causal_conv1d import torch_kernels
from causal_conv1d.backend import Backends
from torch import Tensor

backends = Backends("causal_conv1d", torch_kernels)
backends.add("cpp", "cpu", lambda: import_module("causal_conv1d.cpp_kernels").load())
backends.add("cuda", "cuda", lambda: import_module("causal_conv1d.cuda").load())

LIBRARY = torch.library.Library("causal_conv1d", "DEF")
LIBRARY.define(
    "forward(Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.define(
    "backward(Tensor dout, Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.define(
    "update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, bool silu) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    return backends.pick(x).conv_forward(x, weight, bias, silu, reverse)


def _backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return backends.pick(x).conv_backward(dout, x, weight, bias, silu, reverse)


def _update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    return backends.pick(x).conv_update(x, conv_state, weight, bias, silu)


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    return torch.empty_like(x)


def _fake_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return torch.empty_like(x), weight.new_empty(weight.shape), dbias


def _fake_update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, ctx.silu, ctx.reverse = inputs
    ctx.save_for_backward(x, weight, bias)


def _differentiate(ctx, dout: Tensor) -> tuple:
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = torch.ops.causal_conv1d.backward(dout, x, weight, bias, ctx.silu, ctx.reverse)
    return dx, dweight, None if bias is None else dbias, None, None


for _name, _kernel, _fake in (
    ("forward", _forward, _fake_forward),
    ("backward", _backward, _fake_backward),
    ("update", _update, _fake_update),
):
    LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"causal_conv1d::{_name}", _fake, lib=LIBRARY)
torch.library.register_autograd("causal_conv1d::forward", _differentiate, setup_context=_save, lib=LIBRARY)
