"""The C++ kernel set for CPUs: `operators.py` has its contract, `csrc/scan_abi.h` the layout of what it passes."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import torch
from causal_conv1d.native import ABSENT_SIGNAL, DTYPE_CODES, address, call, load_library, signal
from mamba_ssm.ops import cpp_norm, cpp_pooled
from torch import Tensor

_ABSENT_MATRIX = (0,) * 7
_SCAN_FIELDS = 9 + 4 * 5 + 2 * 7 + 5 + 4 * 5 + 2 * 7 + 3
_library = None


def load() -> ModuleType:
    """This module, with its library loaded; ImportError if there is none."""
    global _library
    if _library is None:
        package = Path(__file__).resolve().parent.parent / "__init__.py"
        sizes = {
            "mamba_scan_args_bytes": _SCAN_FIELDS,
            "mamba_norm_args_bytes": cpp_norm.NORM_FIELDS,
            "mamba_pooled_conv_args_bytes": cpp_pooled.CONV_FIELDS,
            "mamba_pooled_gate_args_bytes": cpp_pooled.GATE_FIELDS,
        }
        _library = load_library(str(package), sizes)
    return sys.modules[__name__]


def _interval(dstate: int) -> int:
    """Steps from one saved state to the next: so many that the saved states take no more room than half of `u`."""
    return max(32, 2 * dstate)


def states_shape(batch: int, dim: int, seqlen: int, dstate: int) -> tuple[int, ...]:
    """Shape of the saved states: none are needed before the first interval or after the last."""
    return batch, max(0, -(-seqlen // _interval(dstate)) - 1), dstate, dim


def _matrix(matrix: Tensor) -> tuple[int, ...]:
    if matrix.dim() == 2:
        return (0, matrix.data_ptr(), 0, 0, 0, 0, 0)
    return (1, matrix.data_ptr(), DTYPE_CODES[matrix.dtype], *matrix.stride())


def _float32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()


def _input_matrix(matrix: Tensor) -> Tensor:
    return _float32(matrix) if matrix.dim() == 2 else matrix


def _sizes(u: Tensor, A: Tensor, B: Tensor, C: Tensor, delta_softplus: bool, reverse: bool) -> tuple[int, ...]:
    groups = B.shape[1] if B.dim() == 4 else C.shape[1] if C.dim() == 4 else 1
    dstate = A.shape[1]
    return (*u.shape, dstate, groups, delta_softplus, reverse, torch.get_num_threads(), _interval(dstate))


def scan_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, dim, seqlen = u.shape
    out = torch.empty_like(u)
    last_state = u.new_empty((batch, *A.shape), dtype=torch.float32)
    saved_shape = states_shape(batch, dim, seqlen, A.shape[1]) if save_states else (0,)
    states = u.new_empty(saved_shape, dtype=torch.float32)
    if out.numel() == 0:
        return out, last_state.zero_(), states
    A, D, delta_bias, B, C = _float32(A), _float32(D), _float32(delta_bias), _input_matrix(B), _input_matrix(C)
    fields = (
        *_sizes(u, A, B, C, delta_softplus, reverse),
        *signal(u),
        *signal(delta),
        *signal(z),
        *signal(out),
        *_matrix(B),
        *_matrix(C),
        A.data_ptr(),
        address(D),
        address(delta_bias),
        last_state.data_ptr(),
        states.data_ptr() if states.numel() else 0,
        *(ABSENT_SIGNAL * 4),
        *(_ABSENT_MATRIX * 2),
        *(0, 0, 0),
    )
    call(_library.mamba_scan_forward, fields)
    return out, last_state, states


def scan_backward(
    dout: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    states: Tensor,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    dz = u.new_empty(0) if z is None else torch.empty_like(z)
    dA, dD, dbias = (
        u.new_empty(0) if x is None else x.new_empty(x.shape, dtype=torch.float32) for x in (A, D, delta_bias)
    )
    dB, dC = (x.new_empty(x.shape, dtype=torch.float32 if x.dim() == 2 else x.dtype) for x in (B, C))
    if du.numel() == 0:
        for grad in (dA, dB, dC, dD, dbias):
            grad.zero_()
    else:
        wide = [_float32(A), _float32(D), _float32(delta_bias), _input_matrix(B), _input_matrix(C)]
        fields = (
            *_sizes(u, A, B, C, delta_softplus, reverse),
            *signal(u),
            *signal(delta),
            *signal(z),
            *ABSENT_SIGNAL,
            *_matrix(wide[3]),
            *_matrix(wide[4]),
            *(address(x) for x in wide[:3]),
            0,
            address(states),
            *signal(dout),
            *signal(du),
            *signal(ddelta),
            *signal(None if z is None else dz),
            *_matrix(dB),
            *_matrix(dC),
            *(address(x) for x in (dA, dD, dbias)),
        )
        call(_library.mamba_scan_backward, fields)
    dD, dbias = (x if like is None else x.to(like.dtype) for x, like in ((dD, D), (dbias, delta_bias)))
    return du, ddelta, dA.to(A.dtype), dB.to(B.dtype), dC.to(C.dtype), dD, dz, dbias


def norm_forward(*args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return cpp_norm.norm_forward(_library, *args)


def norm_backward(*args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return cpp_norm.norm_backward(_library, *args)


def pooled_conv(*args) -> tuple[Tensor, Tensor, Tensor]:
    return cpp_pooled.pooled_conv(_library, *args)


def pooled_gate(*args) -> Tensor:
    return cpp_pooled.pooled_gate(_library, *args)
