"""The published extension's name and calls, for code that imports it; on `causal_conv1d`'s operators, on any device."""

from __future__ import annotations

import torch
from causal_conv1d import causal_conv1d_fn
from causal_conv1d import causal_conv1d_update as _update
from torch import Tensor

# told apart from the extension by this
PORTABLE = True


def _activation(silu: bool) -> str | None:
    return "silu" if silu else None


def causal_conv1d_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, *rest) -> Tensor:
    """`rest` is (silu,) as in 1.0, (seq_idx, silu) as in 1.1, or (seq_idx, initial_states, out, final_states_out, silu)
    as later."""
    *states, silu = rest
    seq_idx, initial_states, out, final_states_out = (*states, None, None, None, None)[:4]
    options = {"seq_idx": seq_idx, "initial_states": initial_states, "activation": _activation(silu)}
    if final_states_out is None:
        result = causal_conv1d_fn(x, weight, bias, **options)
    else:
        keep = {"return_final_states": True, "final_states_out": final_states_out}
        result, _ = causal_conv1d_fn(x, weight, bias, **options, **keep)
    return result if out is None else out.copy_(result)


def causal_conv1d_bwd(x: Tensor, weight: Tensor, bias: Tensor | None, dout: Tensor, *rest) -> tuple:
    """(dx, dweight, dbias), as in 1.0 and 1.1: `rest` is (dx, silu) or (seq_idx, dx, silu), dx written to if given.

    Raises:
        NotImplementedError: called as later releases are, with gradients of states.
    """
    if len(rest) > 3:
        raise NotImplementedError("called with states, wanted causal_conv1d_fn, which autograd knows")
    *seq_idx, dx, silu = rest
    with torch.enable_grad():
        leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
        out = causal_conv1d_fn(*leaves, seq_idx=seq_idx[0] if seq_idx else None, activation=_activation(silu))
        grads = torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], dout)
    found = grads[0] if dx is None else dx.copy_(grads[0])
    return found, grads[1], grads[2] if bias is not None else None


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, *rest
) -> Tensor:
    """`rest` is nothing, (cache_seqlens,) or (cache_seqlens, conv_state_indices)."""
    return _update(x, conv_state, weight, bias, _activation(silu), *rest)
