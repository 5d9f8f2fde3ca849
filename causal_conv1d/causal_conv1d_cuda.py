"""The published extension's name and calls, for code that imports it; on `causal_conv1d`'s operators, on any device."""

from __future__ import annotations

from causal_conv1d import cpp_functions
from torch import Tensor

# told apart from the extension by this
PORTABLE = True


def causal_conv1d_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, *rest) -> Tensor:
    """`rest` is (silu,) as in 1.0, (seq_idx, silu) as in 1.1, (seq_idx, initial_states, final_states_out, silu) as from
    1.2 on, or the same with `out` before final_states_out, as from 1.5 on."""
    *states, silu = rest
    out = states.pop(2) if len(states) == 4 else None
    result = cpp_functions.causal_conv1d_fwd_function(x, weight, bias, *(*states, None, None, None)[:3], silu)
    return result if out is None else out.copy_(result)


def causal_conv1d_bwd(x: Tensor, weight: Tensor, bias: Tensor | None, dout: Tensor, *rest) -> tuple:
    """(dx, dweight, dbias), and dinitial_states from 1.2 on; what is given of them is written to.

    `rest` is (dx, silu) as in 1.0, (seq_idx, dx, silu) as in 1.1, (seq_idx, initial_states, dfinal_states, dx,
    return_dinitial_states, silu) as from 1.2 on, or (seq_idx, initial_states, dfinal_states, dx, dweight, dbias,
    dinitial_states, silu) as from 1.5 on.
    """
    *given, silu = rest
    places = [None, None, None]
    if len(given) > 5:
        *given, places[0], places[1], places[2] = given
        given.append(places[2] is not None)
    elif len(given) < 3:
        given = [*[None] * (2 - len(given)), *given, False]
        given[1:1] = [None, None]
    dx, *grads = cpp_functions.causal_conv1d_bwd_function(x, weight, bias, dout, *given, silu)
    grads = [grad if place is None or grad is None else place.copy_(grad) for grad, place in zip(grads, places)]
    return (dx, *grads) if len(rest) > 3 else (dx, *grads[:2])


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, *rest
) -> Tensor:
    """`rest` is nothing, (cache_seqlens,) or (cache_seqlens, conv_state_indices)."""
    return cpp_functions.causal_conv1d_update_function(x, conv_state, weight, bias, silu, *(*rest, None, None)[:2])
