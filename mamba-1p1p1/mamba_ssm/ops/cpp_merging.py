"""Token merging of the C++ kernel set; `csrc/merging_abi.h` has the layout of what is passed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from causal_conv1d.native import DTYPE_CODES, call, channel_last
from torch import Tensor

MATCH_FIELDS = 5 + 5 + 3 + 2 + 1 + 4
MERGE_FIELDS = 6 + 3 + 3


def match_tokens(
    library, metric: Tensor, fused: int, cls: Tensor, moved: Sequence[int], odd_first: bool, raster: bool, sort: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, tokens, channels), classes = metric.shape, cls.shape[1]
    slot = cls.new_empty(batch, tokens)
    kept = torch.empty(batch, tokens, dtype=torch.bool)
    count = cls.new_empty(batch, tokens - fused)
    places = cls.new_empty(batch, classes)
    metric, described = channel_last(metric)
    cls, targets = cls.contiguous(), torch.tensor(moved, dtype=torch.long)
    fields = (
        *(batch, tokens, channels, DTYPE_CODES[metric.dtype], torch.get_num_threads()),
        *(fused, classes, odd_first, raster, sort),
        *described,
        *(cls.data_ptr(), classes if len(cls) > 1 else 0),
        targets.data_ptr(),
        *(slot.data_ptr(), kept.data_ptr(), count.data_ptr(), places.data_ptr()),
    )
    if call(library.mamba_match_tokens, fields):
        raise IndexError(f"cls holds other than rising indices; wanted such from 0 to {tokens - 1}")
    return slot, kept, count, places


def merge_tokens(library, x: Tensor, slot: Tensor, count: Tensor) -> Tensor:
    (batch, tokens, channels), left = x.shape, count.shape[1]
    out = x.new_empty(batch, left, channels)
    (x, described), slot, count = channel_last(x), slot.contiguous(), count.contiguous()
    fields = (
        *(batch, tokens, left, channels, DTYPE_CODES[x.dtype], torch.get_num_threads()),
        *described,
        *(slot.data_ptr(), count.data_ptr(), out.data_ptr()),
    )
    if call(library.mamba_merge_tokens, fields):
        raise IndexError(f"slot holds a place outside the merged sequence; wanted 0 to {left - 1}")
    return out
