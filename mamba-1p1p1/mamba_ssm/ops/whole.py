"""A whole mixer, from in_proj to out_proj, in one operator.

What is between the steps of one image is less than what a processor keeps beside it, while that of a batch is not; and
a small model's time is in the calls around the steps. For gradients, what the steps keep is kept. Without kernels the
references run.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from causal_conv1d.checks import check_all, check_dtype, check_ndim, check_tensor
from causal_conv1d.derivatives import gradients_by_reference, wants_reference
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
from mamba_ssm.ops.operators import DIRECTIONS, ENDS, FACTORS, LINES, OPERATORS, PROJECTIONS, TAPS
from mamba_ssm.ops.pooled import (
    check_lines,
    pooled_conv_flops,
    pooled_conv_ref,
    pooled_gate_ref,
    pooled_scan_flops,
    pooled_scan_ref,
)
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "Ends",
    "WholeMixer",
    "WholePooledMixer",
    "alike",
    "has_skipping",
    "has_whole",
    "is_watched",
    "mixer_fn",
    "mixer_ref",
    "pooled_mixer_fn",
    "pooled_mixer_ref",
    "skipping_mixer_fn",
    "skipping_mixer_ref",
]

_DTYPES = (torch.float32,)
_SCAN_LAYOUTS = ("(dt_rank + 2*dstate, dim)", "(dim, dt_rank)", "(dim,)", "(dim, dstate)")
_DIRECTION_LAYOUTS = ("(dim, width)", "(dim,)", *_SCAN_LAYOUTS, "(dim,)")
_BRANCH_LAYOUTS = ("(dim, width)", "(dim,)", "(dim,)", *_SCAN_LAYOUTS)


def has_whole(x: Tensor, name: str) -> bool:
    """Whether the operator `name` of this module has a kernel for x, and is the fastest way: in float32, where the own
    products are preferred, and where there are gradients, too, or none are wanted."""
    if torch.compiler.is_compiling() or x.dtype not in _DTYPES:
        return False
    if torch.is_grad_enabled() and not backends.has(x, f"{name}_backward"):
        return False
    own = products.PREFER_OWN or products.PREFER_OWN_NARROW
    # not every device that tensors can be on has autocast
    return own and backends.has(x, name) and not torch.is_autocast_enabled(x.device.type)


def is_watched() -> bool:
    """Whether something looks on that would miss what is no operator: a mode of dispatch, or tangents."""
    modes = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
    return bool(modes) or forward_ad._current_level >= 0


def has_skipping(x: Tensor) -> bool:
    """Whether `skipping_mixer_fn` is there for x, and is the fastest way."""
    return not torch.is_grad_enabled() and has_whole(x, "skipping_mixer") and not is_watched()


def alike(given: Sequence[Direction | Taps | Projections]) -> bool:
    """Whether the directions' parameters have the same shapes, as the operators want them."""
    shapes = [[each.shape for each in one if isinstance(each, Tensor)] for one in given]
    return all(one == shapes[0] for one in shapes)


class WholeMixer(NamedTuple):
    """What `mixer_fn` is given beside x, which this is called with."""

    ends: Ends
    directions: Sequence[Direction]
    share: float = 1.0
    mask: Tensor | None = None
    gates: Tensor | None = None

    kernel = "mixer"

    def __call__(self, x: Tensor) -> Tensor:
        return mixer_fn(x, *self)

    @property
    def tensors(self) -> list[Tensor | None]:
        """In the order in which kernels give their gradients, behind that of x."""
        of_directions = (tensor for each in self.directions for tensor in each[:DIRECTION_TENSORS])
        return [*self.ends, self.mask, self.gates, *of_directions]

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> WholeMixer:
        """The same with other `tensors`."""
        return _mixer_parts(tensors, [each.reverse for each in self.directions], self.share)

    def check(self, x: Tensor) -> None:
        """Raise what `mixer_fn` does unless all of this fits x and itself."""
        dim = _check_ends(x, self.ends)
        if len(self.directions) not in (1, 2):
            raise ValueError(f"directions has {len(self.directions)} entries, wanted one or two")
        width, rank, dstate = _columns(self.directions[0], "conv_weight", "dt_proj_weight", "A")
        if width not in WIDTHS:
            raise ValueError(f"conv_weight has {width} columns, wanted 2, 3 or 4")
        gates = ("gates", self.gates, (len(x), len(self.directions)), "(batch, directions)")
        factors = ("mask", self.mask, x.shape[:2], "(batch, seqlen)"), gates
        check_all(x, "x", factors, _DTYPES, ("mask", "gates"))
        shapes = (dim, width), (dim,), (rank + 2 * dstate, dim), (dim, rank), (dim,), (dim, dstate), (dim,)
        for each in self.directions:
            given = zip(Direction._fields, each, shapes, _DIRECTION_LAYOUTS)
            check_all(x, "x", given, _DTYPES, OPTIONAL_OF_DIRECTION)


class WholePooledMixer(NamedTuple):
    """What `pooled_mixer_fn` is given beside x, as `WholeMixer` is for `mixer_fn`."""

    ends: Ends
    taps: Sequence[Taps]
    projections: Sequence[Projections]
    norm: tuple[Tensor | None, Tensor | None, float]
    lines: Lines
    share: float = 1.0

    kernel = "pooled_mixer"

    def __call__(self, x: Tensor) -> Tensor:
        return pooled_mixer_fn(x, *self)

    @property
    def tensors(self) -> list[Tensor | None]:
        """In the order in which kernels give their gradients, behind that of x."""
        return [*self.ends, *(tensor for each in (*self.taps, *self.projections) for tensor in each), *self.norm[:2]]

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> WholePooledMixer:
        """The same with other `tensors`."""
        taps, projections, norm, lines = _pooled_parts(tensors[4:], self.norm[2], *self.lines)
        return WholePooledMixer(Ends(*tensors[:4]), taps, projections, norm, lines, self.share)

    def check(self, x: Tensor) -> None:
        """Raise what `pooled_mixer_fn` does unless all of this fits x and itself."""
        dim = _check_ends(x, self.ends)
        check_lines("x", x, self.lines)
        (width,), (rank, dstate) = _columns(self.taps[0], "weight"), _columns(self.projections[0], "dt_proj", "A_log")
        if width not in WIDTHS:
            raise ValueError(f"weight has {width} columns, wanted 2, 3 or 4")
        shapes = (dim, width), (dim,), (dim,), (rank + 2 * dstate, dim), (dim, rank), (dim,), (dim, dstate)
        names = Taps._fields + Projections._fields
        for own, scanned in zip(self.taps, self.projections, strict=True):
            check_all(x, "x", zip(names, own + scanned, shapes, _BRANCH_LAYOUTS), _DTYPES, ("bias",))
        weight, bias, _ = self.norm
        if weight is None and bias is not None:
            raise ValueError("the norm has a bias without weight, wanted both or no bias")
        given = ("weight", weight, (dim,), "(dim,)"), ("bias", bias, (dim,), "(dim,)")
        check_all(x, "x", given, _DTYPES, ("weight", "bias"))


def mixer_fn(
    x: Tensor,
    ends: Ends,
    directions: Sequence[Direction],
    share: float = 1.0,
    mask: Tensor | None = None,
    gates: Tensor | None = None,
) -> Tensor:
    """`out_proj(directions_fn(in_proj(x), directions, share, log_decay=True, mask=mask))`, differentiable in every
    tensor; with gates, each direction's part of that times its own (Wu et al. 2025, DyVM).

    Args:
        x: (batch, seqlen, width), float32, as all parameters. Copied only if its last stride is not 1.
        ends: in_proj and out_proj.
        directions: one or two, of equal sizes, each with log(-A) in the place of A.
        share: what the sum of both is multiplied with.
        mask: (batch, seqlen), float32, which every token is multiplied with before and after the convolutions.
        gates: (batch, directions), float32.

    Returns:
        (batch, seqlen, width), contiguous.

    Raises:
        ValueError: a shape or device that does not fit. TypeError: not a tensor, or another dtype.
    """
    whole = WholeMixer(ends, directions, share, mask, gates)
    whole.check(x)
    if wants_reference(x, *whole.tensors):
        return mixer_ref(x, *whole)
    save, tensors = _wants_gradients(x, *whole.tensors), whole.tensors
    tensors += [None] * (6 + 2 * DIRECTION_TENSORS - len(tensors))
    return torch.ops.mamba_ssm.mixer(x, *tensors, [each.reverse for each in directions], share, save)[0]


def mixer_ref(
    x: Tensor,
    ends: Ends,
    directions: Sequence[Direction],
    share: float = 1.0,
    mask: Tensor | None = None,
    gates: Tensor | None = None,
) -> Tensor:
    """What `mixer_fn` computes."""
    xz = F.linear(x, ends.in_proj, ends.in_bias)
    parts = (directions_ref(xz, [each], share, log_decay=True, mask=mask) for each in directions)
    factors = [1.0] * len(directions) if gates is None else gates[..., None, None].unbind(1)
    y = sum(part * factor for part, factor in zip(parts, factors))
    return F.linear(y, ends.out_proj, ends.out_bias)


def skipping_mixer_fn(x: Tensor, mixer: WholeMixer, runs: Tensor) -> Tensor:
    """`mixer(x)` where each image does without the directions for which its `runs` is False, as DyVM's do (Wu et al.
    2025): no work is done for these. Not differentiable.

    Args:
        x: (batch, seqlen, width), float32.
        mixer: what is done, without gates of its own.
        runs: (batch, directions), bool.

    Returns:
        (batch, seqlen, width), zeros for an image without directions.

    Raises:
        ValueError: a shape or device that does not fit. TypeError: not a tensor, or another dtype.
    """
    mixer.check(x)
    if mixer.gates is not None:
        raise ValueError("the mixer has gates; wanted none where directions are left out")
    given = ("runs", runs, (len(x), len(mixer.directions)), "(batch, directions)")
    check_all(x, "x", [given], (torch.bool,))
    kernels = backends.pick(x)
    with torch.no_grad():
        if x.numel() == 0:
            return x.new_empty(x.shape)
        if hasattr(kernels, "skipping_mixer"):
            return kernels.skipping_mixer(x, *mixer[:-1], runs)
    return skipping_mixer_ref(x, mixer, runs)


@torch.no_grad()
def skipping_mixer_ref(x: Tensor, mixer: WholeMixer, runs: Tensor) -> Tensor:
    """What `skipping_mixer_fn` computes, one image at a time."""
    out = torch.zeros_like(x)
    for image, own in enumerate(runs.tolist()):
        directions = [each for each, is_run in zip(mixer.directions, own) if is_run]
        mask = None if mixer.mask is None else mixer.mask[image : image + 1]
        if directions:
            out[image] = mixer_ref(x[image : image + 1], mixer.ends, directions, mixer.share, mask)[0]
    return out


def pooled_mixer_fn(
    x: Tensor,
    ends: Ends,
    taps: Sequence[Taps],
    projections: Sequence[Projections],
    norm: tuple[Tensor | None, Tensor | None, float],
    lines: Lines,
    share: float = 1.0,
) -> Tensor:
    """`pooled_conv_fn`, `pooled_scan_fn` and `pooled_gate_fn` between in_proj and out_proj, differentiable in every
    tensor.

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
    whole = WholePooledMixer(ends, taps, projections, norm, Lines(*lines), share)
    whole.check(x)
    tensors = whole.tensors
    if wants_reference(x, *tensors):
        return pooled_mixer_ref(x, *whole)
    save = _wants_gradients(x, *tensors)
    return torch.ops.mamba_ssm.pooled_mixer(x, *tensors, norm[2], *whole.lines, share, save)[0]


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


def _wants_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors)


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


_KEPT = 6  # xz, y, and x_dbl and states of two directions


def _mixer_parts(tensors: Sequence[Tensor | None], reverse: Sequence[bool], share: float) -> WholeMixer:
    """What operators are given, beside x, in the order of `WholeMixer.tensors`."""
    return WholeMixer(Ends(*tensors[:4]), split_directions(tensors[6:], reverse), share, *tensors[4:6])


def _mixer(x, *arguments):
    *tensors, reverse, share, save = arguments
    whole, kernels = _mixer_parts(tensors, reverse, share), backends.pick(x)
    out, kept = x.new_empty(x.shape), ()
    if x.numel() and hasattr(kernels, "mixer"):
        out, kept = kernels.mixer(x, *whole, save)
    elif x.numel():
        # a result of its own memory, as operators' must be
        out = mixer_ref(x, *whole).contiguous()
    return out, *_kept(x, kept)


def _kept(x: Tensor, kept: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """As many tensors as the operator has, of what one direction or both keep, or nothing."""
    if len(kept) == 4:
        kept = *kept[:3], x.new_empty(0), kept[3], x.new_empty(0)
    return tuple(kept) or tuple(x.new_empty(0) for _ in range(_KEPT))


def _fake_mixer(x, *arguments):
    *tensors, reverse, share, save = arguments
    (ends, directions, _, _, gates), kernels = _mixer_parts(tensors, reverse, share), backends.pick(x)
    if not save or x.numel() == 0 or not hasattr(kernels, "mixer"):
        return x.new_empty(x.shape), *_kept(x, ())
    (batch, seqlen, _), dim = x.shape, ends.out_proj.shape[1]
    parts = () if gates is None else (len(directions),)
    shapes = [(batch, seqlen, 2 * dim), (batch, *parts, seqlen, dim)]
    shapes += [(batch, seqlen, each.x_proj_weight.shape[0]) for each in directions]
    shapes += [kernels.states_shape(batch, dim, seqlen, each.A.shape[1]) for each in directions]
    return x.new_empty(x.shape), *_kept(x, [x.new_empty(shape) for shape in shapes])


def _save_mixer(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # what is kept has no gradient, and zeros would have to be written
    *tensors, ctx.reverse, ctx.share, _ = inputs
    ctx.save_for_backward(*output[1:], *tensors)


def _differentiate_mixer(ctx, dout: Tensor | None, *_: Any) -> tuple:
    saved = ctx.saved_tensors  # once: where activations are computed anew, they are given once
    kept, tensors = saved[:_KEPT], saved[_KEPT:]
    if dout is None:  # only what is kept was asked of
        return (None,) * (len(tensors) + 3)
    if dout.numel() == 0:
        return *_nothing(tensors), None, None, None
    if torch.is_grad_enabled() or not _is_kept(kept, tensors[0], "mixer_backward"):
        grads = gradients_by_reference(_reference, (*tensors, ctx.reverse, ctx.share), (dout,))[:-2]
    else:
        options = ctx.reverse, ctx.share, list(ctx.needs_input_grad[:5])
        grads = torch.ops.mamba_ssm.mixer_backward(dout, *tensors[:7], *kept, *tensors[7:], *options)
        given = zip(grads, tensors, ctx.needs_input_grad)
        grads = [grad if want and tensor is not None else None for grad, tensor, want in given]
    return *grads, None, None, None


def _reference(x: Tensor, *arguments: Any) -> Tensor:
    *tensors, reverse, share = arguments
    return mixer_ref(x, *_mixer_parts(tensors, reverse, share))


def _nothing(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients of no tokens."""
    return [None if tensor is None else torch.zeros_like(tensor) for tensor in tensors]


def _is_kept(kept: Sequence[Tensor], x: Tensor, name: str) -> bool:
    """Whether the kernels `name` can start from what is kept, which is nothing if the forward ran without kernels."""
    return kept[0].numel() > 0 and backends.has(x, name)


def _mixer_backward(dout, x, *arguments):
    kept, (*parameters, reverse, share, wanted) = arguments[6 : 6 + _KEPT], arguments[6 + _KEPT :]
    whole = _mixer_parts((*arguments[:6], *parameters), reverse, share)
    saved = [each for number, each in enumerate(kept) if len(reverse) == 2 or number not in (3, 5)]
    grads = backends.pick(x).mixer_backward(dout, x, *whole, saved, _there(wanted, x, whole.ends))
    grads += [None] * (7 + 2 * DIRECTION_TENSORS - len(grads))
    return tuple(x.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


def _there(wanted: Sequence[bool], x: Tensor, ends: Ends) -> list[bool]:
    """Which gradients are wanted of what is there."""
    return [want and like is not None for want, like in zip(wanted, (x, *ends))]


def _fake_mixer_backward(dout, x, *arguments):
    *parameters, _, _, wanted = arguments[6 + _KEPT :]
    likes = zip((x, *arguments[:6], *parameters), (*wanted, *[True] * (2 + len(parameters))))
    return tuple(x.new_empty(like.shape if want and like is not None else 0) for like, want in likes)


_POOLED_TENSORS = 16  # taps and projections of two directions, and the norm
_POOLED_KEPT = 9  # see `pooled_mixer` of kernels/cpp/whole.py


def _pooled_parts(tensors, eps, sizes, strides, pooled, scale):
    """Taps, projections, norm and lines."""
    taps, projections = (
        (Taps(*tensors[:3]), Taps(*tensors[3:6])),
        (Projections(*tensors[6:10]), Projections(*tensors[10:14])),
    )
    return taps, projections, (*tensors[14:], eps), Lines(tuple(sizes), tuple(strides), tuple(pooled), scale)


def _pooled_mixer(x, *arguments):
    ends, tensors, (*options, share, save) = Ends(*arguments[:4]), arguments[4:20], arguments[20:]
    out, kept, kernels = x.new_empty(x.shape), (), backends.pick(x)
    if x.numel() and hasattr(kernels, "pooled_mixer"):
        out, kept = kernels.pooled_mixer(x, ends, *_pooled_parts(tensors, *options), share, save)
    elif x.numel():
        out = pooled_mixer_ref(x, ends, *_pooled_parts(tensors, *options), share).contiguous()
    return out, *(kept or (x.new_empty(0) for _ in range(_POOLED_KEPT)))


def _fake_pooled(x, *arguments):
    out_proj, x_proj, A_log, (*options, _, save) = arguments[2], arguments[10], arguments[13], arguments[20:]
    kernels, shapes = backends.pick(x), [(0,)] * _POOLED_KEPT
    if save and x.numel() and hasattr(kernels, "pooled_mixer"):
        (batch, tokens, _), dim, count = x.shape, out_proj.shape[1], _pooled_parts((None,) * 16, *options)[-1].count
        groups, x_dbl = (batch, count, dim), (batch, count, x_proj.shape[0])
        states = kernels.states_shape(batch, dim, count, A_log.shape[1])
        skip = batch, tokens, dim
        shapes = (batch, tokens, 2 * dim), skip, groups, groups, groups, x_dbl, x_dbl, states, states
    return x.new_empty(x.shape), *(x.new_empty(shape) for shape in shapes)


def _save_pooled(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    *ctx.options, _ = inputs[5 + _POOLED_TENSORS :]
    ctx.save_for_backward(*output[1:], *inputs[: 5 + _POOLED_TENSORS])


def _differentiate_pooled(ctx, dout: Tensor | None, *_: Any) -> tuple:
    saved = ctx.saved_tensors
    kept, tensors = saved[:_POOLED_KEPT], saved[_POOLED_KEPT:]
    nothing = (None,) * (len(ctx.options) + 1)
    if dout is None:
        return *(None for _ in tensors), *nothing
    if dout.numel() == 0:
        return *_nothing(tensors), *nothing
    if torch.is_grad_enabled() or not _is_kept(kept, tensors[0], "pooled_mixer_backward"):
        grads = gradients_by_reference(_pooled_reference, (*tensors, *ctx.options), (dout,))[: len(tensors)]
    else:
        options = *ctx.options, list(ctx.needs_input_grad[:5])
        grads = torch.ops.mamba_ssm.pooled_mixer_backward(dout, *tensors[:5], *kept, *tensors[5:], *options)
        given = zip(grads, tensors, ctx.needs_input_grad)
        grads = [grad if want and tensor is not None else None for grad, tensor, want in given]
    return *grads, *nothing


def _pooled_reference(x: Tensor, *arguments: Any) -> Tensor:
    ends, tensors, (*options, share) = Ends(*arguments[:4]), arguments[4:20], arguments[20:]
    return pooled_mixer_ref(x, ends, *_pooled_parts(tensors, *options), share)


def _pooled_backward(dout, x, *arguments):
    ends, kept, arguments = Ends(*arguments[:4]), arguments[4 : 4 + _POOLED_KEPT], arguments[4 + _POOLED_KEPT :]
    tensors, (*options, share, wanted) = arguments[:_POOLED_TENSORS], arguments[_POOLED_TENSORS:]
    parts, call = _pooled_parts(tensors, *options), backends.pick(x).pooled_mixer_backward
    grads = call(dout, x, ends, *parts, share, kept, _there(wanted, x, ends))
    return tuple(x.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


def _fake_pooled_backward(dout, x, *arguments):
    tensors, wanted = arguments[4 + _POOLED_KEPT : 4 + _POOLED_KEPT + _POOLED_TENSORS], arguments[-1]
    likes = zip((x, *arguments[:4], *tensors), (*wanted, *[True] * len(tensors)))
    return tuple(x.new_empty(like.shape if want and like is not None else 0) for like, want in likes)


def _ends_flops(x: Sequence[int], in_proj: Sequence[int], out_proj: Sequence[int]) -> int:
    return 2 * prod(x[:2]) * (prod(in_proj) + prod(out_proj))


def _mixer_flops(x, in_proj, _, out_proj, __, mask, gates, *arguments) -> int:
    *parameters, reverse, share, _ = arguments
    between = directions_flops((*x[:2], in_proj[0]), None, *parameters, reverse, share, False, True)
    return between + _ends_flops(x, in_proj, out_proj)


def _pooled_mixer_flops(x, in_proj, _, out_proj, __, weight, *arguments) -> int:
    projections, (sizes, strides, pooled, scale, _, _) = arguments[5:9], arguments[16:]
    batch, tokens, _ = x
    dim, lines = out_proj[1], Lines(sizes, strides, pooled, scale)
    groups = batch, lines.count, dim
    between = pooled_conv_flops((batch, tokens, dim), weight) + pooled_scan_flops(groups, groups, *projections)
    return between + _ends_flops(x, in_proj, out_proj)


_SAVED = "Tensor xz, Tensor y, Tensor x_dbl, Tensor x_dbl_b, Tensor states, Tensor states_b"
_GRADIENTS = ", ".join(["Tensor"] * (7 + 2 * DIRECTION_TENSORS))
OPERATORS.register(
    f"mixer(Tensor x, {ENDS}, {FACTORS}, {DIRECTIONS}, bool save) -> (Tensor, {', '.join(['Tensor'] * _KEPT)})",
    _mixer,
    _fake_mixer,
    save=_save_mixer,
    differentiate=_differentiate_mixer,
    flops=_mixer_flops,
)
OPERATORS.register(
    f"mixer_backward(Tensor dout, Tensor x, {ENDS}, {FACTORS}, {_SAVED}, {DIRECTIONS}, bool[] wanted)"
    f" -> ({_GRADIENTS})",
    _mixer_backward,
    _fake_mixer_backward,
)
_POOLED = f"{TAPS}, {PROJECTIONS}, Tensor? norm_weight, Tensor? norm_bias, float eps, {LINES}, float scale, float share"
_POOLED_SAVED = (
    "Tensor xz, Tensor skip, Tensor groups, Tensor groups_b, Tensor scanned, Tensor x_dbl, Tensor x_dbl_b,"
    " Tensor states, Tensor states_b"
)
OPERATORS.register(
    f"pooled_mixer(Tensor x, {ENDS}, {_POOLED}, bool save) -> (Tensor, {', '.join(['Tensor'] * _POOLED_KEPT)})",
    _pooled_mixer,
    _fake_pooled,
    save=_save_pooled,
    differentiate=_differentiate_pooled,
    flops=_pooled_mixer_flops,
)
OPERATORS.register(
    f"pooled_mixer_backward(Tensor dout, Tensor x, {ENDS}, {_POOLED_SAVED}, {_POOLED}, bool[] wanted)"
    f" -> ({', '.join(['Tensor'] * (5 + _POOLED_TENSORS))})",
    _pooled_backward,
    _fake_pooled_backward,
)
