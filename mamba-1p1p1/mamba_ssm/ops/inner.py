"""Everything between a mixer's input projection and its output: conv -> x_proj -> dt_proj -> scan [-> out_proj].

The published names. `xz` is (batch, 2*dim, seqlen), x first, z second; conv1d_weight (dim, 1, width); x_proj_weight
(dt_rank + 2*dstate, dim), its rows giving dt, B, C in that order; delta_proj_weight (dim, dt_rank). B and C, where
given, stand in for those of x_proj; B_proj_bias and C_proj_bias (dstate,) are added to them. Channel-last memory, that
is a transposed view of (batch, seqlen, 2*dim), is the fast layout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from causal_conv1d import causal_conv1d_fn, causal_conv1d_ref
from causal_conv1d.checks import check_device, check_ndim, check_tensor
from causal_conv1d.ops.convolution import WIDTHS
from mamba_ssm.ops.directions import Direction, directions_fn
from mamba_ssm.ops.norm import rms_norm_fn
from mamba_ssm.ops.scan import pooled_selective_scan_fn, selective_scan_fn, selective_scan_ref
from torch import Tensor


class _Inner(NamedTuple):
    """The arguments that all published functions share."""

    xz: Tensor
    conv1d_weight: Tensor
    conv1d_bias: Tensor | None
    x_proj_weight: Tensor
    delta_proj_weight: Tensor
    A: Tensor
    A_b: Tensor | None
    B: Tensor | None
    C: Tensor | None
    D: Tensor | None
    delta_bias: Tensor | None
    B_proj_bias: Tensor | None
    C_proj_bias: Tensor | None
    delta_softplus: bool
    b_rms_weight: Tensor | None
    c_rms_weight: Tensor | None
    dt_rms_weight: Tensor | None
    b_c_dt_rms_eps: float

    @property
    def columns(self) -> int:
        """Rows of x_proj_weight for B, and for C."""
        return self.A.shape[1] * (2 if self.A.is_complex() else 1)

    def check(self) -> _Inner:
        """Itself; raises one sentence where the operators' own checks would name tensors that the caller never gave."""
        layouts = {
            "xz": "(batch, 2*dim, seqlen)",
            "conv1d_weight": "(dim, 1, width)",
            "x_proj_weight": "(dt_rank + 2*dstate, dim)",
            "delta_proj_weight": "(dim, dt_rank)",
            "A": "(dim, dstate)",
        }
        for name, layout in layouts.items():
            check_tensor(name, getattr(self, name))
            check_ndim(name, getattr(self, name), layout)
            check_device(name, getattr(self, name), self.xz, "xz")
        optional = (
            "A_b",
            "D",
            "delta_bias",
            "B_proj_bias",
            "C_proj_bias",
            "b_rms_weight",
            "c_rms_weight",
            "dt_rms_weight",
        )
        for name in optional:
            if getattr(self, name) is not None:
                check_tensor(name, getattr(self, name))
                check_device(name, getattr(self, name), self.xz, "xz")
        if self.conv1d_weight.shape[1] != 1:
            raise ValueError(f"conv1d_weight has shape {tuple(self.conv1d_weight.shape)}, wanted (dim, 1, width)")
        if self.xz.shape[1] % 2:
            raise ValueError(f"xz has shape {tuple(self.xz.shape)}, wanted (batch, 2*dim, seqlen)")
        rows = self.delta_proj_weight.shape[1] + ((self.B is None) + (self.C is None)) * self.columns
        if self.x_proj_weight.shape[0] < rows:
            given = tuple(self.x_proj_weight.shape)
            raise ValueError(f"x_proj_weight has shape {given}, wanted (dt_rank + 2*dstate, dim) with {rows} rows")
        return self

    @property
    def is_one_operator(self) -> bool:
        """Whether `directions_fn` computes it: the usual mixer, whose B and C come from x_proj as they are."""
        given = self.A_b, self.B, self.C, self.B_proj_bias, self.C_proj_bias
        given += self.b_rms_weight, self.c_rms_weight, self.dt_rms_weight
        width = self.delta_proj_weight.shape[1] + 2 * self.A.shape[-1]
        usual = (
            self.conv1d_weight.shape[2] in WIDTHS
            and self.delta_softplus
            and not self.A.is_complex()
            and self.x_proj_weight.shape[0] == width
        )
        return usual and all(tensor is None for tensor in given)

    def composed(self, conv, scan) -> Tensor:
        """(batch, dim, seqlen): the gated scan, plus the backward scan with A_b if there is one."""
        dt_rank, pairs = self.delta_proj_weight.shape[1], self.A.is_complex()
        x, z = self.xz.chunk(2, dim=1)
        x = conv(x, self.conv1d_weight.squeeze(1), self.conv1d_bias, activation="silu")
        x_dbl = F.linear(x.transpose(1, 2), self.x_proj_weight)
        dt = self._normalised(x_dbl[..., :dt_rank], "dt_rms_weight")
        delta = F.linear(dt, self.delta_proj_weight).transpose(1, 2)
        B, C = self.B, self.C
        if B is None:
            rows = x_dbl[..., dt_rank : dt_rank + self.columns]
            B = _matrix(self._normalised(rows, "b_rms_weight"), self.B_proj_bias, pairs)
        if C is None:
            rows = x_dbl[..., x_dbl.shape[-1] - self.columns :]
            C = _matrix(self._normalised(rows, "c_rms_weight"), self.C_proj_bias, pairs)
        D, bias = _parameter(self.D, x), _parameter(self.delta_bias, x)
        y = scan(x, delta, self.A, B, C, D, z, bias, self.delta_softplus)
        if self.A_b is not None:
            y = y + scan(x, delta, self.A_b, B, C, D, z, bias, self.delta_softplus, reverse=True)
        return y

    def _normalised(self, rows: Tensor, name: str) -> Tensor:
        """Rows (batch, seqlen, size), each over its root mean square if there is a weight of that name.

        Of a longer weight the first count, as in the published kernels: FalconMamba gives dt's one for each channel.
        """
        weight, size = getattr(self, name), rows.shape[-1]
        if weight is None:
            return rows
        if weight.dim() != 1 or len(weight) < size:
            raise ValueError(f"{name} has shape {tuple(weight.shape)}, wanted ({size},), or longer: the first count")
        return rms_norm_fn(rows, weight[:size], None, eps=self.b_c_dt_rms_eps)

    def computed(self) -> Tensor:
        """(batch, dim, seqlen), on the operators."""
        self.check()
        if not self.is_one_operator:
            return self.composed(causal_conv1d_fn, selective_scan_fn)
        direction = Direction(
            self.conv1d_weight.squeeze(1),
            self.conv1d_bias,
            self.x_proj_weight,
            self.delta_proj_weight,
            _parameter(self.delta_bias, self.xz),
            self.A,
            _parameter(self.D, self.xz),
        )
        return directions_fn(self.xz.transpose(1, 2), [direction]).transpose(1, 2)

    def reference(self) -> Tensor:
        """(batch, dim, seqlen), on the reference operators."""
        return self.check().composed(causal_conv1d_ref, selective_scan_ref)


# How a published function goes about its work: `_Inner.computed`, or `_Inner.reference`.
_Evaluate = Callable[[_Inner], Tensor]


def _parameter(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """D or the bias of dt in float32, or in float64 beside float64 signals."""
    return parameter if parameter is None or x.dtype == parameter.dtype == torch.float64 else parameter.float()


def _matrix(rows: Tensor, bias: Tensor | None, pairs: bool) -> Tensor:
    """Rows (batch, seqlen, dstate) of x_dbl -> (batch, dstate, seqlen), channel-last; with `pairs`, (batch, seqlen,
    2*dstate) -> (batch, dstate, 2*seqlen), real and imaginary parts beside each other along the sequence."""
    rows = rows if bias is None else rows + bias.to(rows.dtype)
    if pairs:
        return rows.unflatten(2, (-1, 2)).transpose(1, 2).flatten(2)
    return rows.transpose(1, 2)


def _project_out(y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    for name, tensor in (("out_proj_weight", weight), ("out_proj_bias", bias)):
        if name == "out_proj_weight" or tensor is not None:
            check_tensor(name, tensor)
            check_device(name, tensor, y, "xz")
    return F.linear(y.transpose(1, 2), weight, bias)


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
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
    *,
    _evaluate: _Evaluate = _Inner.computed,
) -> Tensor:
    """A one-directional mixer from `xz` to its output, (batch, seqlen, d_model)."""
    inner = _Inner(
        *(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight),
        *(A, None, B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus),
        *(b_rms_weight, c_rms_weight, dt_rms_weight, b_c_dt_rms_eps),
    )
    return _project_out(_evaluate(inner), out_proj_weight, out_proj_bias)


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
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
    *,
    _evaluate: _Evaluate = _Inner.computed,
) -> Tensor:
    """`mamba_inner_fn` plus the reversed scan, with `A_b`, of what the shared convolution and projections give."""
    inner = _Inner(
        *(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight),
        *(A, A_b, B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus),
        *(b_rms_weight, c_rms_weight, dt_rms_weight, b_c_dt_rms_eps),
    )
    return _project_out(_evaluate(inner), out_proj_weight, out_proj_bias)


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
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
    *,
    _evaluate: _Evaluate = _Inner.computed,
) -> Tensor:
    """`mamba_inner_fn` without the output projection: (batch, dim, seqlen)."""
    inner = _Inner(
        *(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight),
        *(A, None, B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus),
        *(b_rms_weight, c_rms_weight, dt_rms_weight, b_c_dt_rms_eps),
    )
    return _evaluate(inner)


def FastVim_mamba_inner_fn_no_out_proj_withoutZ(
    x: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    *,
    line: int,
    scale: float = 1.0,
) -> Tensor:
    """One direction of a FastVim mixer without gate and output projection (Kapse et al. 2025): conv, the mean over each
    `line` tokens in a row times `scale`, x_proj, dt_proj, the scan of those means, each repeated over its line, plus D
    times the unpooled tokens.

    x (batch, dim, seqlen), of which `line` divides seqlen; B and C, where given, (batch, dstate, seqlen/line); the
    others as for `mamba_inner_fn`. Returns (batch, dim, seqlen). How the release tells the line's length could not be
    learnt from its name, so that it is a keyword here, and wanted.
    """
    check_tensor("x", x)
    check_ndim("x", x, "(batch, dim, seqlen)")
    if line < 1 or x.shape[2] % line:
        raise ValueError(f"line is {line}, wanted one that divides the {x.shape[2]} tokens of x")
    for name, tensor, layout in (
        ("conv1d_weight", conv1d_weight, "(dim, 1, width)"),
        ("x_proj_weight", x_proj_weight, "(dt_rank + 2*dstate, dim)"),
        ("delta_proj_weight", delta_proj_weight, "(dim, dt_rank)"),
        ("A", A, "(dim, dstate)"),
    ):
        check_tensor(name, tensor)
        check_ndim(name, tensor, layout)
        check_device(name, tensor, x, "x")
    dt_rank, dstate = delta_proj_weight.shape[1], A.shape[1]
    u = causal_conv1d_fn(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    groups = u.unflatten(2, (-1, line)).mean(3) * scale
    rows = F.linear(groups.transpose(1, 2), x_proj_weight)
    if rows.shape[2] < dt_rank + 2 * dstate:
        given = tuple(x_proj_weight.shape)
        raise ValueError(f"x_proj_weight has shape {given}, wanted (dt_rank + 2*dstate, dim)")
    dt, own_B, own_C = rows.split([dt_rank, dstate, rows.shape[2] - dt_rank - dstate], dim=2)
    delta = F.linear(dt, delta_proj_weight).transpose(1, 2)
    B = own_B.transpose(1, 2) if B is None else B
    C = own_C[..., -dstate:].transpose(1, 2) if C is None else C
    D, bias = _parameter(D, x), _parameter(delta_bias, x)
    return pooled_selective_scan_fn(u, groups, delta, A, B, C, D, None, bias, delta_softplus)


def _reference_of(function: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    """`function`, with its signature, on the reference operators."""

    @functools.wraps(function)
    def reference(*args: Any, **keywords: Any) -> Tensor:
        return function(*args, **keywords, _evaluate=_Inner.reference)

    reference.__name__ = reference.__qualname__ = name
    reference.__doc__ = f"What `{function.__name__}` computes, on the reference operators."
    return reference


mamba_inner_ref = _reference_of(mamba_inner_fn, "mamba_inner_ref")
bimamba_inner_ref = _reference_of(bimamba_inner_fn, "bimamba_inner_ref")
mamba_inner_fn_no_out_proj_ref = _reference_of(mamba_inner_fn_no_out_proj, "mamba_inner_fn_no_out_proj_ref")
