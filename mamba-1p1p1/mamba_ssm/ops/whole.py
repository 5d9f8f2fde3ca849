"""A whole mixer, from in_proj to out_proj, in one operator: for inference, where nothing in between is kept.

What is between the steps of one image is less than what a processor keeps beside it, while that of a batch is not; and
a small model's time is in the calls around the steps. Without kernels the references run.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from causal_conv1d.checks import check_all, check_dtype, check_ndim, check_tensor
from causal_conv1d.derivatives import wants_reference
from causal_conv1d.ops.convolution import WIDTHS
from mamba_ssm.kernels import products
from mamba_ssm.kernels.arguments import (
    DIRECTION_TENSORS,
    OPTIONAL_OF_DIRECTION,
    Direction,
    Ends,
    Lines,
    Projections,
    Taps,
    split_directions,
)
from mamba_ssm.kernels.registry import backends
from mamba_ssm.ops.directions import directions_flops, directions_ref
from mamba_ssm.ops.operators import DIRECTIONS, ENDS, LINES, OPERATORS, PROJECTIONS, TAPS
from mamba_ssm.ops.pooled import (
    check_lines,
    pooled_conv_flops,
    pooled_conv_ref,
    pooled_gate_ref,
    pooled_scan_flops,
    pooled_scan_ref,
)
from torch import Tensor

__all__ = ["Ends", "alike", "has_whole", "mixer_fn", "mixer_ref", "pooled_mixer_fn", "pooled_mixer_ref"]

_DTYPES = (torch.float32,)
_SCAN_LAYOUTS = ("(dt_rank + 2*dstate, dim)", "(dim, dt_rank)", "(dim,)", "(dim, dstate)")
_DIRECTION_LAYOUTS = ("(dim, width)", "(dim,)", *_SCAN_LAYOUTS, "(dim,)")
_BRANCH_LAYOUTS = ("(dim, width)", "(dim,)", "(dim,)", *_SCAN_LAYOUTS)


def has_whole(x: Tensor, name: str) -> bool:
    """Whether the operator `name` of this module has a kernel for x, and is the fastest way: without gradients, in
    float32, where the own products are preferred."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.dtype not in _DTYPES:
        return False
    own = products.PREFER_OWN or products.PREFER_OWN_NARROW
    return own and not torch.is_autocast_enabled(x.device.type) and backends.has(x, name)


def alike(given: Sequence[Direction | Taps | Projections]) -> bool:
    """Whether the directions' parameters have the same shapes, as the operators want them."""
    shapes = [[each.shape for each in one if isinstance(each, Tensor)] for one in given]
    return all(one == shapes[0] for one in shapes)


def mixer_fn(x: Tensor, ends: Ends, directions: Sequence[Direction], share: float = 1.0) -> Tensor:
    """`out_proj(directions_fn(in_proj(x), directions, share, log_decay=True))`, not differentiable.

    Args:
        x: (batch, seqlen, width), float32, as all parameters. Copied only if its last stride is not 1.
        ends: in_proj and out_proj.
        directions: one or two, of equal sizes, each with log(-A) in the place of A.
        share: what the sum of both is multiplied with.

    Returns:
        (batch, seqlen, width), contiguous.

    Raises:
        ValueError: a shape or device that does not fit. TypeError: not a tensor, or another dtype.
    """
    dim = _check_ends(x, ends)
    if len(directions) not in (1, 2):
        raise ValueError(f"directions has {len(directions)} entries, wanted one or two")
    first = directions[0]
    width, rank, dstate = _columns(first, "conv_weight", "dt_proj_weight", "A")
    if width not in WIDTHS:
        raise ValueError(f"conv_weight has {width} columns, wanted 2, 3 or 4")
    shapes = (dim, width), (dim,), (rank + 2 * dstate, dim), (dim, rank), (dim,), (dim, dstate), (dim,)
    for each in directions:
        given = zip(Direction._fields, each, shapes, _DIRECTION_LAYOUTS)
        check_all(x, "x", given, _DTYPES, OPTIONAL_OF_DIRECTION)
    parameters = [tensor for each in directions for tensor in tuple(each)[:DIRECTION_TENSORS]]
    if wants_reference(x, *ends, *parameters):
        return mixer_ref(x, ends, directions, share)
    parameters += [None] * (2 * DIRECTION_TENSORS - len(parameters))
    return torch.ops.mamba_ssm.mixer(x, *ends, *parameters, [each.reverse for each in directions], share)


def mixer_ref(x: Tensor, ends: Ends, directions: Sequence[Direction], share: float = 1.0) -> Tensor:
    """What `mixer_fn` computes."""
    y = directions_ref(F.linear(x, ends.in_proj, ends.in_bias), directions, share, log_decay=True)
    return F.linear(y, ends.out_proj, ends.out_bias)


def pooled_mixer_fn(
    x: Tensor,
    ends: Ends,
    taps: Sequence[Taps],
    projections: Sequence[Projections],
    norm: tuple[Tensor | None, Tensor | None, float],
    lines: Lines,
    share: float = 1.0,
) -> Tensor:
    """`pooled_conv_fn`, `pooled_scan_fn` and `pooled_gate_fn` between in_proj and out_proj, not differentiable.

    Args:
        x: (batch, tokens, width), float32, as all parameters. Copied only if its last stride is not 1.
        ends: in_proj and out_proj.
        taps, projections: of the forward and the backward direction.
        norm: weight and bias (dim,) of the LayerNorm before the gate, each or both None, and its eps.
        lines: whose tokens are all of those of `x`.
        share: what the sum of both directions is multiplied with.

    Returns:
        (batch, tokens, width), contiguous.

    Raises:
        ValueError: a shape or device that does not fit. TypeError: not a tensor, or another dtype.
    """
    dim, lines = _check_ends(x, ends), Lines(*lines)
    check_lines("x", x, lines)
    (width,), (rank, dstate) = _columns(taps[0], "weight"), _columns(projections[0], "dt_proj", "A_log")
    if width not in WIDTHS:
        raise ValueError(f"weight has {width} columns, wanted 2, 3 or 4")
    shapes = (dim, width), (dim,), (dim,), (rank + 2 * dstate, dim), (dim, rank), (dim,), (dim, dstate)
    names = Taps._fields + Projections._fields
    for own, scanned in zip(taps, projections, strict=True):
        check_all(x, "x", zip(names, own + scanned, shapes, _BRANCH_LAYOUTS), _DTYPES, ("bias",))
    weight, bias, eps = norm
    if weight is None and bias is not None:
        raise ValueError("the norm has a bias without weight, wanted both or no bias")
    given = ("weight", weight, (dim,), "(dim,)"), ("bias", bias, (dim,), "(dim,)")
    check_all(x, "x", given, _DTYPES, ("weight", "bias"))
    tensors = *taps[0], *taps[1], *projections[0], *projections[1], weight, bias
    if wants_reference(x, *ends, *tensors):
        return pooled_mixer_ref(x, ends, taps, projections, norm, lines, share)
    return torch.ops.mamba_ssm.pooled_mixer(x, *ends, *tensors, eps, *lines, share)


def pooled_mixer_ref(
    x: Tensor,
    ends: Ends,
    taps: Sequence[Taps],
    projections: Sequence[Projections],
    norm: tuple[Tensor | None, Tensor | None, float],
    lines: Lines,
    share: float = 1.0,
) -> Tensor:
    """What `pooled_mixer_fn` computes."""
    x, z = F.linear(x, ends.in_proj, ends.in_bias).chunk(2, dim=-1)
    skip, *groups = pooled_conv_ref(x, *taps, lines)
    y = pooled_gate_ref(skip, pooled_scan_ref(*groups, *projections), z, *norm, lines, share)
    return F.linear(y, ends.out_proj, ends.out_bias)


def _check_ends(x: Tensor, ends: Ends) -> int:
    """The mixer's dim."""
    check_tensor("x", x)
    check_ndim("x", x, "(batch, seqlen, width)")
    check_dtype("x", x, _DTYPES)
    (dim,) = _columns(ends, "out_proj")
    width = x.shape[2]
    shapes = (2 * dim, width), (2 * dim,), (width, dim), (width,)
    layouts = "(2*dim, width)", "(2*dim,)", "(width, dim)", "(width,)"
    check_all(x, "x", zip(Ends._fields, ends, shapes, layouts), _DTYPES, ("in_bias", "out_bias"))
    return dim


def _columns(given: Ends | Direction | Taps | Projections, *names: str) -> list[int]:
    """How many columns its tensors of those names have, from which all shapes follow."""
    for name in names:
        check_tensor(name, getattr(given, name))
        check_ndim(name, getattr(given, name), "(rows, columns)")
    return [getattr(given, name).shape[1] for name in names]


# --- registration ----------------------------------------------------------------------------------------------------


def _mixer(x, *arguments):
    ends, (*parameters, reverse, share) = Ends(*arguments[:4]), arguments[4:]
    return _run("mixer", mixer_ref, x, ends, split_directions(parameters, reverse), share)


def _pooled_mixer(x, *arguments):
    ends, tensors, (eps, sizes, strides, pooled, scale, share) = Ends(*arguments[:4]), arguments[4:20], arguments[20:]
    taps, projections = (
        (Taps(*tensors[:3]), Taps(*tensors[3:6])),
        (Projections(*tensors[6:10]), Projections(*tensors[10:14])),
    )
    lines = Lines(tuple(sizes), tuple(strides), tuple(pooled), scale)
    return _run("pooled_mixer", pooled_mixer_ref, x, ends, taps, projections, (*tensors[14:], eps), lines, share)


def _pair(kind, tensors):
    half = len(tensors) // 2
    return kind(*tensors[:half]), kind(*tensors[half:])


def _run(name, reference, x, *arguments):
    if x.numel() == 0:
        return x.new_empty(x.shape)
    call = getattr(backends.pick(x), name, reference)
    # a result of its own memory, as operators' must be
    return call(x, *arguments).contiguous()


def _fake(x, *_):
    return x.new_empty(x.shape)


def _ends_flops(x: Sequence[int], in_proj: Sequence[int], out_proj: Sequence[int]) -> int:
    return 2 * prod(x[:2]) * (prod(in_proj) + prod(out_proj))


def _mixer_flops(x, in_proj, _, out_proj, __, *arguments) -> int:
    *parameters, reverse, share = arguments
    between = directions_flops((*x[:2], in_proj[0]), None, *parameters, reverse, share, False, True)
    return between + _ends_flops(x, in_proj, out_proj)


def _pooled_mixer_flops(x, in_proj, _, out_proj, __, weight, *arguments) -> int:
    projections, (sizes, strides, pooled, scale, _) = arguments[5:9], arguments[16:]
    batch, tokens, _ = x
    dim, lines = out_proj[1], Lines(sizes, strides, pooled, scale)
    groups = batch, lines.count, dim
    between = pooled_conv_flops((batch, tokens, dim), weight) + pooled_scan_flops(groups, groups, *projections)
    return between + _ends_flops(x, in_proj, out_proj)


OPERATORS.register(
    f"mixer(Tensor x, {ENDS}, {DIRECTIONS}) -> Tensor",
    _mixer,
    _fake,
    flops=_mixer_flops,
)
OPERATORS.register(
    f"pooled_mixer(Tensor x, {ENDS}, {TAPS}, {PROJECTIONS}, Tensor? norm_weight, Tensor? norm_bias, float eps, {LINES},"
    " float scale, float share) -> Tensor",
    _pooled_mixer,
    _fake,
    flops=_pooled_mixer_flops,
)
