"""Tensors as kernels want them: dense where they must be, and described by addresses and strides."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

Slab = tuple[int, int, int, int]
PACK = 4


def address(x: Tensor | None) -> int:
    """Address of the first element; 0 for None."""
    return 0 if x is None else x.data_ptr()


def float32(x: Tensor | None) -> Tensor | None:
    """`x` in contiguous float32, copied only if it is not."""
    if x is None or (x.dtype == torch.float32 and x.is_contiguous()):
        return x
    return x.to(torch.float32).contiguous()


def addresses(tensors: Iterable[Tensor | None]) -> list[int]:
    """`address` of each."""
    return [0 if x is None else x.data_ptr() for x in tensors]


def all_float32(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """`float32` of each."""
    return [x if x is None or (x.dtype == torch.float32 and x.is_contiguous()) else float32(x) for x in tensors]


def channel_last(x: Tensor) -> Tensor:
    """`x` (batch, tokens, dim) with stride 1 along dim, copied only if it has another."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def pack_of(dim: int, *tensors: Tensor | None) -> int:
    """How many neighbouring channels of all these tensors, whose last dimension is `dim`, can be moved at once: 4 or
    1."""
    for tensor in tensors:
        if tensor is not None:
            steps = [stride for size, stride in zip(tensor.shape[:-1], tensor.stride()) if size > 1]
            if any(stride % PACK for stride in steps) or tensor.data_ptr() % (PACK * tensor.element_size()):
                return 1
    return PACK if dim % PACK == 0 else 1


def rows(x: Tensor) -> Tensor:
    """(..., size) as (rows, size) with stride 1 along size, copied only if there is no such view."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def slab(x: Tensor | None, reverse: bool) -> Slab:
    """(address, batch, channel, time stride) of a (batch, dim, seqlen) tensor in a direction's order; 0 for None."""
    if x is None:
        return 0, 0, 0, 0
    batch, channel, time = x.stride()
    if reverse:
        return x.data_ptr() + (x.shape[2] - 1) * time * x.element_size(), batch, channel, -time
    return x.data_ptr(), batch, channel, time


def same_dtype(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, contiguous and of one dtype."""
    if bias is not None and bias.dtype != weight.dtype:
        weight, bias = weight.float(), bias.float()
    return weight.contiguous(), None if bias is None else bias.contiguous()
