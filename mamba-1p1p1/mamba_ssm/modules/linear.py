"""Linear layers that run on the fastest matrix product at hand."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Smaller products are over before oneDNN has set up; measured on one and two threads.
_MIN_MULTIPLICATIONS = 1 << 21


def _mkl_is_slow_here() -> bool:
    """Whether torch multiplies float32 matrices with MKL on a processor that is not Intel's, where MKL leaves AVX-512
    unused; oneDNN, which torch brings too, does not: half the time on an AVX-512 AMD EPYC."""
    mkldnn = torch.ops.mkldnn
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    info = Path("/proc/cpuinfo")
    amd = info.is_file() and "AuthenticAMD" in info.read_text()
    return amd and "AVX512" in torch.backends.cpu.get_cpu_capability() and hasattr(mkldnn, "_linear_pointwise")


_PREFER_ONEDNN = _mkl_is_slow_here()


class Linear(nn.Linear):
    """`nn.Linear` through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: x (..., in) times weight (out, in), plus bias (out,)."""
    if not (_PREFER_ONEDNN and x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"):
        return F.linear(x, weight, bias)
    # compilers and tracers have their own ways with a product, autocast another dtype
    other = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu")
    if other or x.numel() * weight.shape[0] < _MIN_MULTIPLICATIONS:
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _OneDNNLinear.apply(x, weight, bias)
    return _product(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def weight_gradient(dout: Tensor, x: Tensor) -> Tensor:
    """dout (..., out), x (..., in) -> (out, in), the sum of their outer products; not differentiable."""
    dout, x = dout.reshape(-1, dout.shape[-1]), x.reshape(-1, x.shape[-1])
    if not (_PREFER_ONEDNN and x.dtype == dout.dtype == torch.float32 and x.device.type == "cpu"):
        return dout.t() @ x
    # oneDNN is faster with the narrower matrix first, and falls back to a plain loop where a transposed one has gaps
    if x.shape[1] < dout.shape[1]:
        return _product(x.contiguous().t(), dout.contiguous().t()).t()
    return _product(dout.contiguous().t(), x.contiguous().t())


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = _product(dout, weight.t()) if ctx.needs_input_grad[0] else None
        dweight = dbias = None
        if ctx.needs_input_grad[1]:
            dweight = weight_gradient(dout, x)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            dbias = dout.sum(tuple(range(dout.dim() - 1)))
        return dx, dweight, dbias
