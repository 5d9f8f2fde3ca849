"""Token merging of the C++ kernel set; `csrc/merging_abi.h` has the layout of what is passed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from causal_conv1d.layout import address, channel_last
from causal_conv1d.native import DTYPE_CODES, Call, tokens_of
from mamba_ssm.kernels.cpp.library import LIBRARY
from torch import Tensor


def match_tokens_call(
    metric: Tensor, fused: int, cls: Tensor, moved: Sequence[int], odd_first: bool, raster: bool, sort: bool
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Call]:
    """What `match_tokens` returns, and the call that fills it, whose code is 2 where `cls` does not rise."""
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
    results = slot, kept, count, places
    return results, Call(LIBRARY, "mamba_match_tokens", arguments, (metric, cls, targets, results))


def match_tokens(metric: Tensor, *given) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results, call = match_tokens_call(metric, *given)
    if call():
        raise IndexError(f"cls holds other than rising indices; wanted such from 0 to {metric.shape[1] - 1}")
    return results


def merge_tokens_call(x: Tensor, slot: Tensor, count: Tensor, out: Tensor | None = None) -> tuple[Tensor, Call]:
    """What `merge_tokens` returns, in new memory or in that of `out`, and the call that fills it, whose code is 2 where
    there are no such groups."""
    out = x.new_empty(*count.shape, x.shape[2]) if out is None else out
    x, slot, count = channel_last(x), slot.contiguous(), count.contiguous()
    arguments = LIBRARY.structs.MergeArgs(**_told(x, slot, count), x=tokens_of(x), out=address(out))
    return out, Call(LIBRARY, "mamba_merge_tokens", arguments, (x, slot, count, out))


def merge_tokens(x: Tensor, slot: Tensor, count: Tensor) -> Tensor:
    return _made(*merge_tokens_call(x, slot, count), count)


def merge_tokens_backward_call(
    dout: Tensor, slot: Tensor, count: Tensor, dx: Tensor | None = None
) -> tuple[Tensor, Call]:
    """What `merge_tokens_backward` returns, as `merge_tokens_call`."""
    dx = dout.new_empty(*slot.shape, dout.shape[2]) if dx is None else dx
    dout, slot, count = channel_last(dout), slot.contiguous(), count.contiguous()
    arguments = LIBRARY.structs.MergeBackwardArgs(**_told(dout, slot, count), dout=tokens_of(dout), dx=address(dx))
    return dx, Call(LIBRARY, "mamba_merge_tokens_backward", arguments, (dout, slot, count, dx))


def merge_tokens_backward(dout: Tensor, slot: Tensor, count: Tensor) -> Tensor:
    return _made(*merge_tokens_backward_call(dout, slot, count), count)


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


def _made(result: Tensor, call: Call, count: Tensor) -> Tensor:
    if call():
        left = count.shape[1]
        raise IndexError(f"slot holds no place of the merged sequence, or count no size; wanted 0 to {left - 1}")
    return result
