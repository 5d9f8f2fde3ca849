"""The selective scan of the C++ kernel set; `csrc/scan_abi.h` has the layout of what is passed."""

from __future__ import annotations

import torch
from causal_conv1d.layout import address, float32
from causal_conv1d.native import DTYPE_CODES, bits, signal
from mamba_ssm.kernels.arguments import Scan, ScanGradients
from mamba_ssm.kernels.cpp.library import LIBRARY
from torch import Tensor


def interval_of(dstate: int) -> int:
    """Steps from one saved state to the next: so many that the saved states take no more room than half of `u`."""
    return max(32, 2 * dstate)


def states_shape(batch: int, dim: int, seqlen: int, dstate: int) -> tuple[int, ...]:
    """Shape of the saved states: none are needed before the first interval or after the last."""
    return batch, max(0, -(-seqlen // interval_of(dstate)) - 1), dstate, dim


def _matrix(matrix: Tensor) -> tuple[int, ...]:
    """B or C, as `Matrix` of scan_abi.h."""
    if matrix.dim() == 2:
        return 0, matrix.data_ptr()
    return 1, matrix.data_ptr(), DTYPE_CODES[matrix.dtype], *matrix.stride()


def _prepared(scan: Scan) -> Scan:
    """The same arguments with contiguous float32 parameters."""
    B, C = (float32(matrix) if matrix.dim() == 2 else matrix for matrix in (scan.B, scan.C))
    D, bias = float32(scan.D), float32(scan.delta_bias)
    return scan._replace(A=float32(scan.A), B=B, C=C, D=D, delta_bias=bias)


def _arguments(scan: Scan, states: Tensor, accumulate: bool, share: float) -> dict:
    """What both ways of a prepared scan are told."""
    (batch, dim, seqlen), dstate = scan.u.shape, scan.A.shape[1]
    arguments = {
        "batch": batch,
        "dim": dim,
        "seqlen": seqlen,
        "dstate": dstate,
        "groups": next((matrix.shape[1] for matrix in (scan.B, scan.C) if matrix.dim() == 4), 1),
        "softplus": scan.delta_softplus,
        "reverse": scan.reverse,
        "threads": torch.get_num_threads(),
        "interval": interval_of(dstate),
        "accumulate": accumulate,
        "share": bits(share),
        "u": signal(scan.u),
        "delta": signal(scan.delta),
        "B": _matrix(scan.B),
        "C": _matrix(scan.C),
        "A": address(scan.A),
        "D": address(scan.D),
        "delta_bias": address(scan.delta_bias),
        "states": address(states),
    }
    return arguments if scan.z is None else arguments | {"z": signal(scan.z)}


def scan_into(
    out: Tensor, last_state: Tensor | None, states: Tensor, scan: Scan, *, accumulate: bool = False, share: float = 1.0
) -> None:
    """A forward scan into tensors that are there.

    With `accumulate` the result is added to what `out` holds; then both are multiplied with the gate and with `share`.
    States are saved unless `states` is empty.
    """
    scan = _prepared(scan)
    arguments = LIBRARY.structs.ScanArgs(
        **_arguments(scan, states, accumulate, share), out=signal(out), last_state=address(last_state)
    )
    LIBRARY.call("mamba_scan_forward", arguments)


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
        scan = Scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
        scan_into(out, last_state, states, scan)
    return out, last_state, states


def scan_backward_into(
    grads: ScanGradients,
    dout: Tensor,
    scan: Scan,
    states: Tensor,
    *,
    accumulate: bool = False,
    share: float = 1.0,
) -> None:
    """Backward of `scan_into`. `accumulate` adds the gradient of z to what is there."""
    scan = _prepared(scan)
    written = {} if grads.z is None else {"dz": signal(grads.z)}
    arguments = LIBRARY.structs.ScanArgs(
        **_arguments(scan, states, accumulate, share),
        **written,
        dout=signal(dout),
        du=signal(grads.u),
        ddelta=signal(grads.delta),
        dB=_matrix(grads.B),
        dC=_matrix(grads.C),
        dA=address(grads.A),
        dD=address(grads.D),
        ddelta_bias=address(grads.delta_bias),
    )
    LIBRARY.call("mamba_scan_backward", arguments)


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
        scan = Scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
        scan_backward_into(grads, dout, scan, states)
    else:
        for grad in grads:
            if grad is not None:
                grad.zero_()
    arguments = u, delta, A, B, C, D, z, delta_bias
    return tuple(u.new_empty(0) if x is None else grad.to(x.dtype) for grad, x in zip(grads, arguments))
