"""The C++ kernel set for CPUs: `operators.py` has its contract, `csrc/scan_abi.h` the layout of what it passes."""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from causal_conv1d.native import ABSENT_SIGNAL, DTYPE_CODES, address, call, load_library, signal
from causal_conv1d.operators import backends as conv_backends
from mamba_ssm.ops import cpp_directions, cpp_gemm, cpp_merging, cpp_norm, cpp_pooled, directions
from torch import Tensor

_ABSENT_MATRIX = (0,) * 7
_SCAN_FIELDS = 11 + 4 * 5 + 2 * 7 + 5 + 4 * 5 + 2 * 7 + 3
# The backward half of the fields.
_NO_GRADIENTS = (*(ABSENT_SIGNAL * 4), *(_ABSENT_MATRIX * 2), *(0, 0, 0))
_library = None


def load() -> ModuleType:
    """This module, with its library loaded; ImportError if there is none."""
    global _library
    if _library is None:
        package = Path(__file__).resolve().parent.parent / "__init__.py"
        sizes = {
            "mamba_scan_args_bytes": _SCAN_FIELDS,
            "mamba_norm_args_bytes": cpp_norm.NORM_FIELDS,
            "mamba_gemm_args_bytes": cpp_gemm.GEMM_FIELDS,
            "mamba_pooled_conv_args_bytes": cpp_pooled.CONV_FIELDS,
            "mamba_pooled_scan_args_bytes": cpp_pooled.SCAN_FIELDS,
            "mamba_pooled_gate_args_bytes": cpp_pooled.GATE_FIELDS,
            "mamba_match_args_bytes": cpp_merging.MATCH_FIELDS,
            "mamba_merge_args_bytes": cpp_merging.MERGE_FIELDS,
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


def _bits(value: float) -> int:
    """The bits of a double as an integer."""
    return struct.unpack("q", struct.pack("d", value))[0]


def _sizes(
    u: Tensor, A: Tensor, B: Tensor, C: Tensor, delta_softplus: bool, reverse: bool, accumulate: bool, share: float
) -> tuple[int, ...]:
    groups = B.shape[1] if B.dim() == 4 else C.shape[1] if C.dim() == 4 else 1
    dstate = A.shape[1]
    options = delta_softplus, reverse, torch.get_num_threads(), _interval(dstate), accumulate, _bits(share)
    return (*u.shape, dstate, groups, *options)


def scan_into(
    out: Tensor,
    last_state: Tensor | None,
    states: Tensor,
    scan: Sequence,
    *,
    accumulate: bool = False,
    share: float = 1.0,
) -> None:
    """A forward scan of `scan`, the arguments of `scan_forward` but the last, into tensors that are there.

    With `accumulate` the result is added to what `out` holds; then both are multiplied with the gate and with `share`.
    States are saved unless `states` is empty.
    """
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse = scan
    A, D, delta_bias, B, C = _float32(A), _float32(D), _float32(delta_bias), _input_matrix(B), _input_matrix(C)
    fields = (
        *_sizes(u, A, B, C, delta_softplus, reverse, accumulate, share),
        *signal(u),
        *signal(delta),
        *signal(z),
        *signal(out),
        *_matrix(B),
        *_matrix(C),
        *(A.data_ptr(), address(D), address(delta_bias), address(last_state), address(states)),
        *_NO_GRADIENTS,
    )
    call(_library.mamba_scan_forward, fields)


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
        last_state.zero_()
    else:
        scan_into(out, last_state, states, (u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse))
    return out, last_state, states


class ScanGradients(NamedTuple):
    """Where a backward scan writes: like the arguments, of any strides.

    Those of A, D and delta_bias, and of B and C that do not depend on the input, are contiguous float32.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None


def scan_backward_into(
    grads: ScanGradients,
    dout: Tensor,
    scan: Sequence,
    states: Tensor,
    *,
    accumulate: bool = False,
    share: float = 1.0,
) -> None:
    """Backward of `scan_into`. `accumulate` adds the gradient of z to what is there."""
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse = scan
    A, D, delta_bias, B, C = _float32(A), _float32(D), _float32(delta_bias), _input_matrix(B), _input_matrix(C)
    fields = (
        *_sizes(u, A, B, C, delta_softplus, reverse, accumulate, share),
        *signal(u),
        *signal(delta),
        *signal(z),
        *ABSENT_SIGNAL,
        *_matrix(B),
        *_matrix(C),
        *(A.data_ptr(), address(D), address(delta_bias), 0, address(states)),
        *signal(dout),
        *signal(grads.u),
        *signal(grads.delta),
        *signal(grads.z),
        *_matrix(grads.B),
        *_matrix(grads.C),
        *(address(grads.A), address(grads.D), address(grads.delta_bias)),
    )
    call(_library.mamba_scan_backward, fields)


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
    grads = ScanGradients(
        *(torch.empty_like(u), torch.empty_like(delta), A.new_empty(A.shape, dtype=torch.float32)),
        *(x.new_empty(x.shape, dtype=torch.float32 if x.dim() == 2 else x.dtype) for x in (B, C)),
        None if D is None else D.new_empty(D.shape, dtype=torch.float32),
        None if z is None else torch.empty_like(z),
        None if delta_bias is None else delta_bias.new_empty(delta_bias.shape, dtype=torch.float32),
    )
    if u.numel():
        scan_backward_into(grads, dout, (u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse), states)
    else:
        for grad in grads:
            if grad is not None:
                grad.zero_()
    arguments = u, delta, A, B, C, D, z, delta_bias
    return tuple(u.new_empty(0) if x is None else grad.to(x.dtype) for grad, x in zip(grads, arguments))


def norm_forward(*args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return cpp_norm.norm_forward(_library, *args)


def norm_backward(*args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return cpp_norm.norm_backward(_library, *args)


def gemm(*args) -> None:
    cpp_gemm.gemm(_library, *args)


def pooled_conv(*args) -> tuple[Tensor, Tensor, Tensor]:
    return cpp_pooled.pooled_conv(_library, *args)


def pooled_scan(*args) -> Tensor:
    return cpp_pooled.pooled_scan(_library, *args)


def pooled_gate(*args) -> Tensor:
    return cpp_pooled.pooled_gate(_library, *args)


def match_tokens(*args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return cpp_merging.match_tokens(_library, *args)


def merge_tokens(*args) -> Tensor:
    return cpp_merging.merge_tokens(_library, *args)


def _convolution(x: Tensor) -> ModuleType | None:
    """The convolution's C++ kernel set, if it is there."""
    kernels = conv_backends.pick(x)
    return kernels if hasattr(kernels, "conv_backward_into") else None


def directions_forward(xz: Tensor, *args) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
    conv = _convolution(xz)
    if conv is None or xz.numel() == 0:
        return directions.composed_forward(sys.modules[__name__], xz, *args)
    return cpp_directions.forward(sys.modules[__name__], conv, xz, *args)


def directions_backward(dout: Tensor, xz: Tensor, *args) -> list[Tensor | None]:
    conv = _convolution(xz)
    if conv is None or xz.numel() == 0:
        return directions.composed_backward(sys.modules[__name__], dout, xz, *args)
    return cpp_directions.backward(sys.modules[__name__], conv, dout, xz, *args)
