"""Token merging in two operators: which tokens become one, and their means.

Bolya et al. 2023 (arXiv:2210.09461), section 3; Shen et al. 2024 (arXiv:2409.09808). Both can be written in torch, in
some fifty operations on small tensors, which cost more than their work. These are for kernel sets that have them:
`has_kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mamba_ssm.kernels.registry import backends
from mamba_ssm.ops.operators import OPERATORS
from torch import Tensor


def has_kernels(x: Tensor) -> bool:
    """Whether there are kernels for `x`."""
    return backends.has(x, "match_tokens")


def match_tokens_fn(
    metric: Tensor,
    fused: int,
    cls: Tensor,
    moved: Sequence[int],
    *,
    odd_first: bool = False,
    raster: bool = False,
    sort: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose `fused` pairs of similar tokens, class tokens apart. Not differentiable.

    Set a is the patch tokens at even places among patch tokens (odd ones with `odd_first`), set b the others. Each
    a-token picks its most similar b-token by cosine; the a-tokens with the highest similarity are fused into theirs,
    ties going to the lower index. The order of what is left is `raster`, or else a before b, a in the order of its
    indices (`sort`) or the most similar first.

    Args:
        metric: (batch, tokens, channels), float32, bfloat16 or float16.
        fused: 1 to half of the patch tokens, rounded down.
        cls: (batch or 1, K), long, rising: where class tokens are.
        moved: K rising indices that class tokens go to, in the shorter sequence; -1 for all of them leaves each between
            the same patch tokens.

    Returns:
        slot (batch, tokens), long: where each token goes; kept (batch, tokens), bool: False for fused ones; count
        (batch, tokens - fused), long: the size of each group; places (batch, K), long: where class tokens went.
    """
    patches = metric.shape[1] - cls.shape[1]
    if not 1 <= fused <= patches // 2:
        raise ValueError(f"fused is {fused}; wanted 1 to {patches // 2}, half of the patch tokens")
    if len(moved) != cls.shape[1] or len(cls) not in (1, len(metric)) or cls.dtype != torch.long:
        raise ValueError(
            f"cls is {tuple(cls.shape)} of {cls.dtype} and moved has {len(moved)} indices; wanted"
            f" ({len(metric)} or 1, K) of torch.int64 and K"
        )
    length, stay = metric.shape[1] - fused, all(place == -1 for place in moved)
    if not stay and (any(not 0 <= place < length for place in moved) or list(moved) != sorted({*moved})):
        raise ValueError(f"moved is {list(moved)}; wanted rising indices from 0 to {length - 1}, or one -1 for each")
    return torch.ops.mamba_ssm.match_tokens(metric, fused, cls, list(moved), odd_first, raster, sort)


def merge_tokens_fn(x: Tensor, slot: Tensor, count: Tensor) -> Tensor:
    """The mean of each group of tokens, summed in float32; one that is alone keeps its value.

    Args:
        x: (batch, tokens, channels), float32, bfloat16 or float16.
        slot: (batch, tokens), long: the group of each token.
        count: (batch, groups), long: the size of each.

    Returns:
        (batch, groups, channels) in the dtype of `x`.
    """
    if slot.shape != x.shape[:2] or len(count) != len(x) or slot.dtype != torch.long or count.dtype != torch.long:
        raise ValueError(
            f"slot is {tuple(slot.shape)} of {slot.dtype} and count {tuple(count.shape)} of {count.dtype}; wanted"
            f" {tuple(x.shape[:2])} and ({len(x)}, groups) of torch.int64"
        )
    return torch.ops.mamba_ssm.merge_tokens(x, slot, count)


# --- registration ----------------------------------------------------------------------------------------------------


def _match(metric, fused, cls, moved, odd_first, raster, sort):
    return backends.pick(metric).match_tokens(metric, fused, cls, moved, odd_first, raster, sort)


def _merge(x, slot, count):
    return backends.pick(x).merge_tokens(x, slot, count)


def _fake_match(metric, fused, cls, moved, odd_first, raster, sort):
    batch, tokens, _ = metric.shape
    slot, count = cls.new_empty(batch, tokens), cls.new_empty(batch, tokens - fused)
    return slot, cls.new_empty(batch, tokens, dtype=torch.bool), count, cls.new_empty(batch, cls.shape[1])


def _fake_merge(x, slot, count):
    return x.new_empty(x.shape[0], count.shape[1], x.shape[2])


def _save_merge(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _differentiate_merge(ctx, dout: Tensor) -> tuple:
    slot, count = ctx.saved_tensors
    dmean = (dout.float() / count.unsqueeze(-1)).to(dout.dtype)
    return dmean.gather(1, slot.unsqueeze(-1).expand(-1, -1, dout.shape[2])), None, None


OPERATORS.register(
    "match_tokens(Tensor metric, int fused, Tensor cls, int[] moved, bool odd_first, bool raster, bool sort)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _match,
    _fake_match,
)
OPERATORS.register(
    "merge_tokens(Tensor x, Tensor slot, Tensor count) -> Tensor",
    _merge,
    _fake_merge,
    save=_save_merge,
    differentiate=_differentiate_merge,
)
