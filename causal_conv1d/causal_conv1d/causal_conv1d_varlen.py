"""States of sequences that lie one behind the other, under the published import path."""

from __future__ import annotations

import torch
from causal_conv1d.checks import check_device, check_dtype, check_ndim, check_tensor
from torch import Tensor

__all__ = ["causal_conv1d_varlen_states"]


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last tokens of each sequence, as `causal_conv1d_update` wants them: (batch, dim, state_len) in x's dtype.

    Args:
        x: (tokens, dim), the sequences one behind the other.
        cu_seqlens: (batch + 1,), whole numbers: where each begins, and where the last one ends.
        state_len: how many tokens; of a shorter sequence the first of them are zeros.

    Raises:
        ValueError: a shape or device that does not fit. TypeError: not a tensor, or a dtype that does not fit.
    """
    check_tensor("x", x)
    check_ndim("x", x, "(tokens, dim)")
    check_tensor("cu_seqlens", cu_seqlens)
    check_ndim("cu_seqlens", cu_seqlens, "(batch + 1)")
    check_dtype("cu_seqlens", cu_seqlens, (torch.int32, torch.int64))
    check_device("cu_seqlens", cu_seqlens, x, "x")
    starts, ends = cu_seqlens.long()[:-1, None], cu_seqlens.long()[1:, None]
    places = ends + torch.arange(-state_len, 0, device=x.device)
    states = x[places.clamp(min=0)].masked_fill((places < starts).unsqueeze(2), 0)
    return states.transpose(1, 2).contiguous()
