"""Linear layers on the fastest matrix product at hand.

torch multiplies float32 matrices with MKL, which leaves AVX-512 unused on processors that are not Intel's: this
package's own product takes half the time there. oneDNN is as fast, but torch has no public way to it for float32, and
it keeps code for every sequence length that it has met, more than a method that shortens sequences saves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mamba_ssm.ops.operators import backends
from torch import Tensor
from torch.autograd.function import once_differentiable

# Smaller products are over before ours has been called.
_MIN_MULTIPLICATIONS = 1 << 20


def _mkl_is_slow_here() -> bool:
    """Whether torch's products leave half of this processor's vector units unused."""
    info = Path("/proc/cpuinfo")
    amd = info.is_file() and "AuthenticAMD" in info.read_text()
    return torch.backends.mkl.is_available() and amd and "AVX512" in torch.backends.cpu.get_cpu_capability()


_PREFER_OWN = _mkl_is_slow_here()


def _kernels(*tensors: Tensor) -> Any | None:
    """The kernel set whose product these tensors take; None for torch's."""
    if not _PREFER_OWN or any(x.dtype != torch.float32 or x.device.type != "cpu" for x in tensors):
        return None
    kernels = backends.pick(tensors[0])
    return kernels if hasattr(kernels, "gemm") else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: x (..., in) times weight (out, in), plus bias (out,)."""
    # compilers and tracers have their own ways with a product, autocast another dtype
    other = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu")
    kernels = None if other or x.numel() * weight.shape[0] < _MIN_MULTIPLICATIONS else _kernels(x, weight)
    if kernels is None:
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Linear.apply(kernels, x, weight, bias)
    return _product(kernels, x, weight, bias)


def linear_into(out: Tensor, x: Tensor, weight: Tensor, *, accumulate: bool = False) -> None:
    """Write (or add) `linear(x, weight)` to `out` (..., out_features), with stride 1 along its last dimension and the
    others evenly spaced; not differentiable."""
    kernels = _kernels(out, x, weight)
    if kernels is not None:
        kernels.gemm(x.reshape(-1, x.shape[-1]), weight.t(), None, out.view(-1, out.shape[-1]), accumulate)
    elif accumulate:
        out += F.linear(x, weight)
    else:
        out.copy_(F.linear(x, weight))


def weight_gradient(dout: Tensor, x: Tensor) -> Tensor:
    """dout (..., out), x (..., in) -> (out, in), the sum of their outer products; not differentiable."""
    dout, x = dout.reshape(-1, dout.shape[-1]), x.reshape(-1, x.shape[-1])
    kernels = _kernels(dout, x)
    if kernels is None:
        return dout.t() @ x
    # the product is computed in columns of some ten numbers: a narrow x is better the rows
    if x.shape[1] < min(32, dout.shape[1]):
        out = x.new_empty(x.shape[1], dout.shape[1])
        kernels.gemm(x.t(), dout, None, out, False)
        return out.t()
    out = x.new_empty(dout.shape[1], x.shape[1])
    kernels.gemm(dout.t(), x, None, out, False)
    return out


def _product(kernels: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    bias = None if bias is None else bias.contiguous()
    kernels.gemm(x.reshape(-1, x.shape[-1]), weight.t(), bias, out.view(-1, out.shape[-1]), False)
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _product(kernels, x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[None, Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = dweight = dbias = None
        if ctx.needs_input_grad[1]:
            kernels = _kernels(dout, weight)
            dx = dout @ weight if kernels is None else _product(kernels, dout, weight.t())
        if ctx.needs_input_grad[2]:
            dweight = weight_gradient(dout, x)
        if ctx.has_bias and ctx.needs_input_grad[3]:
            dbias = dout.sum(tuple(range(dout.dim() - 1)))
        return None, dx, dweight, dbias
