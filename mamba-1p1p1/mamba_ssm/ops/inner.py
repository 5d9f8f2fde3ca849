"""Everything between a mixer's input projection and its output: conv -> x_proj -> dt_proj -> scan [-> out_proj].

The published names. `xz` is (batch, 2*dim, seqlen), x first, z second; conv1d_weight (dim, 1, width); x_proj_weight
(dt_rank + 2*dstate, dim), its rows giving dt, B, C in that order; delta_proj_weight (dim, dt_rank).
"""

from __future__ import annotations

import torch.nn.functional as F
from causal_conv1d import causal_conv1d_fn, causal_conv1d_ref
from mamba_ssm.ops.reference import selective_scan_ref
from torch import Tensor


def _matrix(x_dbl: Tensor, rows: slice, bias: Tensor | None) -> Tensor:
    """Rows of x_dbl (batch, seqlen, dt_rank + 2*dstate) -> (batch, dstate, seqlen), channel-last."""
    matrix = x_dbl[..., rows]
    return (matrix if bias is None else matrix + bias.to(matrix.dtype)).transpose(1, 2)


def _inner(
    conv,
    scan,
    xz,
    conv1d_weight,
    conv1d_bias,
    x_proj_weight,
    delta_proj_weight,
    A,
    A_b,
    B,
    C,
    D,
    delta_bias,
    B_proj_bias,
    C_proj_bias,
    delta_softplus,
) -> Tensor:
    """(batch, dim, seqlen): the gated scan, plus the backward scan with A_b if there is one."""
    dstate, dt_rank = A.shape[1], delta_proj_weight.shape[1]
    x, z = xz.chunk(2, dim=1)
    x = conv(x, conv1d_weight.squeeze(1), conv1d_bias, "silu")
    x_dbl = F.linear(x.transpose(1, 2), x_proj_weight)
    delta = F.linear(x_dbl[..., :dt_rank], delta_proj_weight).transpose(1, 2)
    if B is None:
        B = _matrix(x_dbl, slice(dt_rank, dt_rank + dstate), B_proj_bias)
    if C is None:
        C = _matrix(x_dbl, slice(x_dbl.shape[-1] - dstate, None), C_proj_bias)
    D, delta_bias = (None if parameter is None else parameter.float() for parameter in (D, delta_bias))
    y = scan(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
    if A_b is not None:
        y = y + scan(x, delta, A_b, B, C, D, z, delta_bias, delta_softplus, reverse=True)
    return y


def _project_out(y: Tensor, out_proj_weight: Tensor, out_proj_bias: Tensor | None) -> Tensor:
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def _scan(*args, **kwargs) -> Tensor:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn(*args, **kwargs)


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """A one-directional mixer from `xz` to its output, (batch, seqlen, d_model)."""
    y = mamba_inner_fn_no_out_proj(
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        A,
        B,
        C,
        D,
        delta_bias,
        B_proj_bias,
        C_proj_bias,
        delta_softplus,
    )
    return _project_out(y, out_proj_weight, out_proj_bias)


def bimamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """`mamba_inner_fn` plus the reversed scan, with `A_b`, of what the shared convolution and projections give."""
    y = _inner(
        causal_conv1d_fn,
        _scan,
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        A,
        A_b,
        B,
        C,
        D,
        delta_bias,
        B_proj_bias,
        C_proj_bias,
        delta_softplus,
    )
    return _project_out(y, out_proj_weight, out_proj_bias)


def mamba_inner_fn_no_out_proj(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """`mamba_inner_fn` without the output projection: (batch, dim, seqlen)."""
    return _inner(
        causal_conv1d_fn,
        _scan,
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        A,
        None,
        B,
        C,
        D,
        delta_bias,
        B_proj_bias,
        C_proj_bias,
        delta_softplus,
    )


def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """What `mamba_inner_fn` computes, on the reference operators."""
    y = mamba_inner_fn_no_out_proj_ref(
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        A,
        B,
        C,
        D,
        delta_bias,
        B_proj_bias,
        C_proj_bias,
        delta_softplus,
    )
    return _project_out(y, out_proj_weight, out_proj_bias)


def bimamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """What `bimamba_inner_fn` computes, on the reference operators."""
    y = _inner(
        causal_conv1d_ref,
        selective_scan_ref,
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        A,
        A_b,
        B,
        C,
        D,
        delta_bias,
        B_proj_bias,
        C_proj_bias,
        delta_softplus,
    )
    return _project_out(y, out_proj_weight, out_proj_bias)


def mamba_inner_fn_no_out_proj_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """What `mamba_inner_fn_no_out_proj` computes, on the reference operators."""
    return _inner(
        causal_conv1d_ref,
        selective_scan_ref,
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        A,
        None,
        B,
        C,
        D,
        delta_bias,
        B_proj_bias,
        C_proj_bias,
        delta_softplus,
    )
