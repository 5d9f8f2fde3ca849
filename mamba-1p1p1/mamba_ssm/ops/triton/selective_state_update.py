"""One step of the selective scan, under the import path that decoders use. Nothing here needs Triton."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from causal_conv1d.checks import check_device, check_dtype, check_ndim, check_shape, check_tensor
from torch import Tensor

__all__ = ["selective_state_update", "selective_state_update_ref"]


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """`h = exp(dt A) h + dt B x`, `y = <C, h> + D x`, times silu(z): Gu and Dao 2023, equation 2, for the next token.

    Args:
        state: (batch, dim, dstate), or with heads (batch, nheads, dim, dstate); moved on in place.
        x, dt, z: (batch, dim) or (batch, nheads, dim).
        A: (dim, dstate) or (nheads, dim, dstate).
        B, C: (batch, dstate) or (batch, ngroups, dstate), ngroups dividing nheads.
        D, dt_bias: (dim,) or (nheads, dim).
        dt_softplus: pass `dt + dt_bias` through softplus.
        state_batch_indices: (batch,), whole numbers: `state` has more sequences, and these are the ones of `x`.

    Returns:
        The shape and dtype of `x`; computed in float32 (float64 for float64 `x`).

    Raises:
        ValueError: a shape or device that does not fit. TypeError: not a tensor. IndexError: `state_batch_indices`
        holds what is no sequence of `state`.
    """
    if state_batch_indices is not None:
        check_tensor("state", state)
        check_tensor("state_batch_indices", state_batch_indices)
        check_ndim("state_batch_indices", state_batch_indices, "(batch)")
        check_dtype("state_batch_indices", state_batch_indices, (torch.int32, torch.int64))
        check_device("state_batch_indices", state_batch_indices, state, "state")
        rows = state_batch_indices.long()
        moved = state[rows]
        y = selective_state_update(moved, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
        state.index_copy_(0, rows, moved)
        return y
    heads = state.dim() == 4 if isinstance(state, Tensor) else False
    tensors = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    check_tensor("state", state)
    for name, tensor in tensors.items():
        if tensor is not None or name in ("x", "dt", "A", "B", "C"):
            check_tensor(name, tensor)
            check_device(name, tensor, state, "state")
    if state.dim() not in (3, 4):
        raise ValueError(f"state has shape {tuple(state.shape)}, wanted (batch, dim, dstate) or one with heads")
    signal, parameter = state.shape[:-1], state.shape[1:-1]
    layouts = ("(batch, nheads, dim)", "(nheads, dim)") if heads else ("(batch, dim)", "(dim,)")
    for name in ("x", "dt", "z"):
        if tensors[name] is not None:
            check_shape(name, tensors[name], signal, layouts[0])
    for name in ("D", "dt_bias"):
        if tensors[name] is not None:
            check_shape(name, tensors[name], parameter, layouts[1])
    check_shape("A", A, state.shape[1:], "(nheads, dim, dstate)" if heads else "(dim, dstate)")
    for name in ("B", "C"):
        groups = tensors[name].shape[1:2] if heads and tensors[name].dim() == 3 else ()
        layout = "(batch, ngroups, dstate)" if heads else "(batch, dstate)"
        check_shape(name, tensors[name], (len(state), *groups, state.shape[-1]), layout)
        if heads and (len(groups) != 1 or groups[0] == 0 or state.shape[1] % groups[0]):
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, wanted {layout} that divide nheads")
    return selective_state_update_ref(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


def selective_state_update_ref(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """What `selective_state_update` computes."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide, step = x.to(dtype), dt.to(dtype)
    step = step if dt_bias is None else step + dt_bias.to(dtype)
    step = F.softplus(step) if dt_softplus else step
    B, C = (matrix.to(dtype) for matrix in (B, C))
    if state.dim() == 4:
        B, C = (matrix.repeat_interleave(state.shape[1] // matrix.shape[1], dim=1) for matrix in (B, C))
    B, C = B.unsqueeze(-2), C.unsqueeze(-2)
    before = state.detach().clone() if torch.is_grad_enabled() else state
    moved = before.to(dtype) * torch.exp(step.unsqueeze(-1) * A.to(dtype)) + (step * wide).unsqueeze(-1) * B
    state.copy_(moved.detach())
    y = (moved * C).sum(-1)
    y = y if D is None else y + D.to(dtype) * wide
    return (y if z is None else y * F.silu(z.to(dtype))).to(x.dtype)
