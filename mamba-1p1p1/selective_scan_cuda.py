"""The published extension's name and calls, for code that imports it; on `mamba_ssm`'s operators, on any device."""

from __future__ import annotations

import torch
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from torch import Tensor

# told apart from the extension by this
PORTABLE = True


def fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    """[out without the gate, x, out with it if there is z]; x (batch, dim, 1, 2*dstate) holds the last state at the odd
    places of its last dimension, as `x[:, :, -1, 1::2]` reads it."""
    tensors = u, delta, A, B, C, D
    out, last_state = selective_scan_fn(*tensors, None, delta_bias, delta_softplus, return_last_state=True)
    x = torch.stack([torch.ones_like(last_state), last_state], dim=-1).flatten(2).unsqueeze(2)
    return [out, x] if z is None else [out, x, selective_scan_fn(*tensors, z, delta_bias, delta_softplus)]


def bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    dz: Tensor | None,
    delta_softplus: bool,
    recompute_out_z: bool = False,
) -> list[Tensor | None]:
    """[du, ddelta, dA, dB, dC, dD, ddelta_bias, dz if there is z, out with the gate if `recompute_out_z`]."""
    tensors = u, delta, A, B, C, D, z, delta_bias
    with torch.enable_grad():
        leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
        result = selective_scan_fn(*leaves, delta_softplus)
        grads = iter(torch.autograd.grad(result, [leaf for leaf in leaves if leaf is not None], dout))
    du, ddelta, dA, dB, dC, dD, found_dz, dbias = (None if leaf is None else next(grads) for leaf in leaves)
    found = [du, ddelta, dA, dB, dC, dD, dbias]
    if z is None:
        return found
    found.append(found_dz if dz is None else dz.copy_(found_dz))
    return [*found, result.detach()] if recompute_out_z else found
