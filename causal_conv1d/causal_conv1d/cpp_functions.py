"""The functions around the extension that later releases have, for code that imports them; without gradients."""

from __future__ import annotations

import torch
from causal_conv1d.ops.convolution import causal_conv1d_fn
from causal_conv1d.ops.update import causal_conv1d_update
from torch import Tensor

__all__ = ["causal_conv1d_bwd_function", "causal_conv1d_fwd_function", "causal_conv1d_update_function"]


def _activation(silu: bool) -> str | None:
    return "silu" if silu else None


def causal_conv1d_fwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    final_states_out: Tensor | None,
    silu_activation: bool,
) -> Tensor:
    """`causal_conv1d_fn`'s result (batch, dim, seqlen); final_states_out is written to if given."""
    options = {"seq_idx": seq_idx, "initial_states": initial_states, "activation": _activation(silu_activation)}
    with torch.no_grad():
        if final_states_out is None:
            return causal_conv1d_fn(x, weight, bias, **options)
        keep = {"return_final_states": True, "final_states_out": final_states_out}
        return causal_conv1d_fn(x, weight, bias, **options, **keep)[0]


def causal_conv1d_bwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dout: Tensor,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    dfinal_states: Tensor | None,
    dx: Tensor | None,
    return_dinitial_states: bool,
    silu_activation: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias, dinitial_states) of `causal_conv1d_fn`, the last only if asked for; dx is written to."""
    tensors = x, weight, bias, initial_states if return_dinitial_states else None
    with torch.enable_grad():
        leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
        states = leaves[3] if return_dinitial_states else initial_states
        options = {"seq_idx": seq_idx, "initial_states": states, "activation": _activation(silu_activation)}
        if dfinal_states is None:
            outs, douts = causal_conv1d_fn(*leaves[:3], **options), dout
        else:
            outs, douts = causal_conv1d_fn(*leaves[:3], **options, return_final_states=True), (dout, dfinal_states)
        found = iter(torch.autograd.grad(outs, [leaf for leaf in leaves if leaf is not None], douts))
    grads = [None if leaf is None else next(found) for leaf in leaves]
    return grads[0] if dx is None else dx.copy_(grads[0]), *grads[1:]


def causal_conv1d_update_function(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu_activation: bool,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
) -> Tensor:
    """`causal_conv1d_update`."""
    given = _activation(silu_activation), cache_seqlens, conv_state_indices
    return causal_conv1d_update(x, conv_state, weight, bias, *given)
