"""Linear layers on the fastest matrix product at hand (see `mamba_ssm.kernels.products`)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from causal_conv1d.backend import KERNEL_DTYPES
from causal_conv1d.checks import check_device, check_dtype, check_tensor
from causal_conv1d.derivatives import wants_reference
from mamba_ssm.kernels import products
from mamba_ssm.kernels.products import MIN_MULTIPLICATIONS as _MIN_MULTIPLICATIONS
from mamba_ssm.kernels.products import PREFER_OWN as _PREFER_OWN
from mamba_ssm.kernels.registry import backends
from mamba_ssm.ops.operators import OPERATORS
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: x (..., in) times weight (out, in), plus bias (out,); of 16 bits that the processor
    does not multiply, in float32, rounded once."""
    narrow = _widened(x, weight, bias)
    if narrow is not None:
        with torch.autocast("cpu", enabled=False):
            return linear(*(None if each is None else each.float() for each in (x, weight, bias))).to(narrow)
    if _takes_own(x, weight, bias):
        return torch.ops.mamba_ssm.linear(x, weight, bias)
    # torch takes what is empty from two devices, and then fails in the backward pass
    if isinstance(x, Tensor) and isinstance(weight, Tensor) and x.device != weight.device:
        check_device("weight", weight, x, "x")
    return F.linear(x, weight, bias)


def _is_eager(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether tensors are multiplied here and now: compilers and tracers have their own ways with a product."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return all(isinstance(each, Tensor) for each in (x, weight, x if bias is None else bias))


def _widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype | None:
    """The dtype of the result, if it is one of `products.WIDENED`."""
    if not products.WIDENED or not _is_eager(x, weight, bias) or not x.is_cpu:
        return None
    dtype, given = x.dtype, (x.dtype,)
    if torch.is_autocast_enabled("cpu"):
        dtype, given = torch.get_autocast_dtype("cpu"), KERNEL_DTYPES
    fits = all(each is None or each.dtype in given for each in (x, weight, bias))
    return dtype if fits and dtype in products.WIDENED else None


def _takes_own(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether this package's operator takes the product; autocast wants another dtype."""
    if not _PREFER_OWN or not _is_eager(x, weight, bias) or torch.is_autocast_enabled("cpu"):
        return False
    if wants_reference(x, weight, bias) or weight.dim() == 0:
        return False
    if x.dtype != torch.float32 or x.numel() * len(weight) < _MIN_MULTIPLICATIONS:
        return False
    return backends.has(x, "linear")


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_tensor(name, tensor)
            check_dtype(name, tensor, (x.dtype,))
            check_device(name, tensor, x, "x")
    if x.dim() == 0 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, wanted (out, in) with x {tuple(x.shape)} (..., in)")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, wanted (out,) = {tuple(weight.shape[:1])}")


# --- registration ----------------------------------------------------------------------------------------------------


def _forward(x, weight, bias):
    _check(x, weight, bias)
    kernels = backends.pick(x)
    own = hasattr(kernels, "linear") and x.dtype == torch.float32
    # a result of its own memory, as operators' must be
    return kernels.linear(x, weight, bias) if own else F.linear(x, weight, bias).contiguous()


def _backward(dout, x, weight, wants_dx, wants_dweight):
    kernels = backends.pick(x)
    if hasattr(kernels, "linear_backward") and dout.dtype == x.dtype == weight.dtype == torch.float32:
        dx, dweight = kernels.linear_backward(dout, x, weight, wants_dx, wants_dweight)
    else:
        dx, dweight = _gradients(dout, x, weight)
    return (dx if wants_dx else x.new_empty(0)), (dweight.contiguous() if wants_dweight else x.new_empty(0))


def _gradients(dout: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight in torch's own operations."""
    return dout @ weight, _rows(dout).t() @ _rows(x)


def _rows(x: Tensor) -> Tensor:
    """(..., size) -> (rows, size)."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _fake_forward(x, weight, bias):
    _check(x, weight, bias)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_backward(dout, x, weight, wants_dx, wants_dweight):
    return x.new_empty(x.shape if wants_dx else 0), weight.new_empty(weight.shape if wants_dweight else 0)


def _flops(x: Sequence[int], weight: Sequence[int], bias: Sequence[int] | None) -> int:
    return 2 * prod(x) * weight[0]


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _differentiate(ctx, dout: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    wants_dx, wants_dweight, wants_dbias = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled():
        dx, dweight = _gradients(dout, x, weight)
    else:
        dx, dweight = torch.ops.mamba_ssm.linear_backward(dout, x, weight, wants_dx, wants_dweight)
    dbias = _rows(dout).sum(0) if ctx.has_bias and wants_dbias else None
    return dx if wants_dx else None, dweight if wants_dweight else None, dbias


OPERATORS.register(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _forward,
    _fake_forward,
    save=_save,
    differentiate=_differentiate,
    flops=_flops,
)
OPERATORS.register(
    "linear_backward(Tensor dout, Tensor x, Tensor weight, bool wants_dx, bool wants_dweight) -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
)
