"""Token merging of the C++ kernel set; `csrc/merging_abi.h` has the layout of what is passed."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from causal_conv1d.layout import address, channel_last
from causal_conv1d.native import DTYPE_CODES, tokens_of
from mamba_ssm.kernels.cpp.library import LIBRARY
from torch import Tensor


def match_tokens(
    metric: Tensor, fused: int, cls: Tensor, moved: Sequence[int], odd_first: bool, raster: bool, sort: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, tokens, channels), classes = metric.shape, cls.shape[1]
    slot = cls.new_empty(batch, tokens)
    kept = torch.empty(batch, tokens, dtype=torch.bool)
    count = cls.new_empty(batch, tokens - fused)
    places = cls.new_empty(batch, classes)
    metric, cls, targets = channel_last(metric), cls.contiguous(), torch.tensor(moved, dtype=torch.long)
    arguments = LIBRARY.structs.MatchArgs(
        batch=batch,
        tokens=tokens,
        channels=channels,
        dtype=DTYPE_CODES[metric.dtype],
        threads=torch.get_num_threads(),
        fused=fused,
        classes=classes,
        odd_first=odd_first,
        raster=raster,
        sorted=sort,
        x=tokens_of(metric),
        cls=address(cls),
        cls_stride=classes if len(cls) > 1 else 0,
        moved=address(targets),
        slot=address(slot),
        kept=address(kept),
        count=address(count),
        places=address(places),
    )
    if LIBRARY.call("mamba_match_tokens", arguments):
        raise IndexError(f"cls holds other than rising indices; wanted such from 0 to {tokens - 1}")
    return slot, kept, count, places


def merge_tokens(x: Tensor, slot: Tensor, count: Tensor) -> Tensor:
    left = count.shape[1]
    out = x.new_empty(len(x), left, x.shape[2])
    x, slot, count = channel_last(x), slot.contiguous(), count.contiguous()
    told = _told(x, slot, count)
    _call("mamba_merge_tokens", LIBRARY.structs.MergeArgs(**told, x=tokens_of(x), out=address(out)), left)
    return out


def merge_tokens_backward(dout: Tensor, slot: Tensor, count: Tensor) -> Tensor:
    left = count.shape[1]
    dx = dout.new_empty(*slot.shape, dout.shape[2])
    dout, slot, count = channel_last(dout), slot.contiguous(), count.contiguous()
    arguments = LIBRARY.structs.MergeBackwardArgs(**_told(dout, slot, count), dout=tokens_of(dout), dx=address(dx))
    _call("mamba_merge_tokens_backward", arguments, left)
    return dx


def _told(of_tokens: Tensor, slot: Tensor, count: Tensor) -> dict[str, int]:
    """What both ways are told of groups, slot (batch, tokens) and count (batch, left), and of what goes in."""
    return dict(
        batch=len(slot),
        tokens=slot.shape[1],
        left=count.shape[1],
        channels=of_tokens.shape[2],
        dtype=DTYPE_CODES[of_tokens.dtype],
        threads=torch.get_num_threads(),
        slot=address(slot),
        count=address(count),
    )


def _call(function: str, arguments: ctypes.Structure, left: int) -> None:
    if LIBRARY.call(function, arguments):
        raise IndexError(f"slot holds no place of the merged sequence, or count no size; wanted 0 to {left - 1}")
