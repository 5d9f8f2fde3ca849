"""Residual addition and normalisation on CUDA: `csrc/norm_*.cu`, one read and one write of every tensor each way."""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from causal_conv1d import _nvrtc
from causal_conv1d._nvrtc import CPP_TYPES
from causal_conv1d._reduce import Sum, add_up
from causal_conv1d.backend import tell_of
from causal_conv1d.layout import address, rows, same_dtype
from mamba_ssm.kernels.torch import norm as torch_norm
from torch import Tensor

_SOURCES = Path(__file__).resolve().parents[2] / "csrc"
FORWARD_SOURCE, BACKWARD_SOURCE = _SOURCES / "norm_forward.cu", _SOURCES / "norm_backward.cu"
THREADS, _WARP = 128, 32  # of norm_tile.h
MAX_PER_THREAD = 32  # elements of a row, in registers
# A warp has a row of up to 1,024 elements, a block a longer one.
MAX_SIZE = THREADS * MAX_PER_THREAD
_BLOCKS = 8  # per multiprocessor, at most
_FORWARD = struct.Struct("4q2q2q2qq2if4x")
_BACKWARD = struct.Struct("4q2q2qq3qq2i")


def _covers(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernels run on these arguments; if not, the torch kernel set does."""
    known = all(t.dtype in CPP_TYPES for t in (x, residual, weight, bias) if t is not None)
    if x.shape[-1] > MAX_SIZE:
        tell_of(f"a norm over more than {MAX_SIZE:,} channels")
    return known and 0 < x.shape[-1] <= MAX_SIZE and x.numel() > 0


def team_for(size: int) -> int:
    """Threads that share a row of `size` elements."""
    return _WARP if size <= _WARP * MAX_PER_THREAD else THREADS


def layout_arguments(size: int, vector: int) -> str:
    """The kernels' last three arguments: elements per pack, packs per thread and threads per row."""
    return f"{vector},{-(-size // (team_for(size) * vector))},{team_for(size)}"


def _layout(size: int, *tensors: Tensor | None) -> str:
    """The same, for rows of these tensors."""
    there = [tensor for tensor in tensors if tensor is not None]
    whole = size % 4 == 0 and all(t.data_ptr() % (4 * t.element_size()) == 0 for t in there)
    vector = 4 if whole and all(t.dim() == 1 or t.shape[0] == 1 or t.stride(0) % 4 == 0 for t in there) else 1
    return layout_arguments(size, vector)


def kernels_for(dtype: torch.dtype, size: int, trains: bool) -> list[tuple[Path, str]]:
    """The kernels of a model's norms over `size` channels, with residuals and weights in float32."""
    if size % 4 or size > MAX_SIZE:
        return []
    arguments = f"{CPP_TYPES[dtype]},float,float,float,{layout_arguments(size, 4)}"
    return [(source, arguments) for source in (FORWARD_SOURCE, BACKWARD_SOURCE)[: 1 + trains]]


@_nvrtc.or_else(torch_norm.norm_forward)
def norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    is_rms_norm: bool,
    total_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual (..., size) -> out in x's dtype, x + residual in `total_dtype`, both contiguous, and what backward
    needs: mean and scale, float32, one per row."""
    if not _covers(x, residual, weight, bias):
        return torch_norm.norm_forward(x, residual, weight, bias, eps, is_rms_norm, total_dtype)
    size = x.shape[-1]
    x_rows, residual_rows = rows(x), None if residual is None else rows(residual)
    scaling, shift = same_dtype(weight, bias)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.empty_like(x, dtype=total_dtype, memory_format=torch.contiguous_format)
    mean, scale = (x.new_empty(x_rows.shape[0], dtype=torch.float32) for _ in range(2))
    device = _nvrtc.device(x.device.index)
    types = ",".join(CPP_TYPES[t] for t in (x.dtype, (x if residual is None else residual).dtype, total_dtype))
    layout = _layout(size, x_rows, residual_rows, scaling, shift, out, total)
    arguments = f"{types},{CPP_TYPES[scaling.dtype]},{layout}"
    params = _FORWARD.pack(
        *(address(t) for t in (x_rows, residual_rows, scaling, shift, out, total, mean, scale)),
        *(x_rows.stride(0), 0 if residual_rows is None else residual_rows.stride(0), x_rows.shape[0]),
        *(size, is_rms_norm, eps),
    )
    blocks = min(-(-x_rows.shape[0] // (THREADS // team_for(size))), _BLOCKS * device.multiprocessors)
    device.kernel(FORWARD_SOURCE, arguments, THREADS)((blocks, 1, 1), params)
    return out, total, mean, scale


@_nvrtc.or_else(torch_norm.norm_backward)
def norm_backward(
    dout: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    is_rms_norm: bool,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (in dout's dtype), residual, weight and bias of `norm_forward`; empty where there is no argument.

    `dtotal` is the gradient that reaches x + residual as an output of its own.
    """
    if not _covers(dout, None, weight, bias):
        given = dout, dtotal, total, mean, scale, weight, bias
        return torch_norm.norm_backward(*given, is_rms_norm, residual_dtype)
    size = total.shape[-1]
    dout_rows, total_rows = rows(dout), rows(total)
    dtotal_rows = None if dtotal is None else rows(dtotal.to(total.dtype))
    scaling = weight.contiguous()
    dx = torch.empty_like(dout, memory_format=torch.contiguous_format)
    dresidual = None
    if residual_dtype is not None:
        dresidual = torch.empty_like(dout, dtype=residual_dtype, memory_format=torch.contiguous_format)
    device = _nvrtc.device(total.device.index)
    blocks = min(-(-total_rows.shape[0] // (THREADS // team_for(size))), _BLOCKS * device.multiprocessors)
    sums = total.new_empty((blocks, 2, size), dtype=torch.float32)
    types = ",".join(CPP_TYPES[t] for t in (dout.dtype, residual_dtype or dout.dtype, total.dtype, scaling.dtype))
    arguments = f"{types},{_layout(size, dout_rows, dtotal_rows, total_rows, scaling, dx, dresidual)}"
    params = _BACKWARD.pack(
        *(address(t) for t in (dout_rows, dtotal_rows, total_rows, scaling, mean, scale, dx, dresidual, sums)),
        *(dout_rows.stride(0), 0 if dtotal_rows is None else dtotal_rows.stride(0), total_rows.stride(0)),
        *(total_rows.shape[0], size, is_rms_norm),
    )
    device.kernel(BACKWARD_SOURCE, arguments, THREADS)((blocks, 1, 1), params)
    dweight, parts = weight.new_empty(weight.shape), sums.data_ptr()
    wanted = [Sum(parts, blocks, 2 * size, (0, 0, 1), dweight, (0, 0, 1), (1, 1, size))]
    dbias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    if bias is not None:
        wanted.append(Sum(parts + 4 * size, blocks, 2 * size, (0, 0, 1), dbias, (0, 0, 1), (1, 1, size)))
    add_up(device, wanted)
    return dx, dout.new_empty(0) if dresidual is None else dresidual, dweight, dbias
