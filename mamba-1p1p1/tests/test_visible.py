"""The mixer over visible tokens: every instruction set against autograd through the formulas."""

import pytest
import torch
from mamba_ssm.kernels.registry import backends
from mamba_ssm.ops.visible import (
    Taps,
    VisibleLines,
    visible_conv_fn,
    visible_conv_ref,
    visible_gate_fn,
    visible_gate_ref,
)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
pytestmark = pytest.mark.skipif(backends.available("cpu") != "cpp", reason="the C++ kernels are not built")


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def visible_lines(batch, tokens, count, walked):
    """Lines of a random part of a grid, some of them empty."""
    generator = torch.Generator().manual_seed(tokens)
    line = torch.randint(count, (batch, tokens), generator=generator).sort(1).values
    starts = torch.searchsorted(line, torch.arange(count + 1).expand(batch, -1).contiguous())
    order = torch.rand(batch, tokens, generator=generator).argsort(1) if walked else None
    return VisibleLines(order, starts, 0.3)


def as_formula(function, formula, tensors, dtype=torch.float32):
    """Values and gradients of `function`, whose results have `dtype`, against `formula` in float64."""
    found_in = [None if t is None else t.detach().requires_grad_() for t in tensors]
    wanted_in = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    found, wanted = function(*found_in), formula(*wanted_in)
    found, wanted = (y if isinstance(y, tuple) else (y,) for y in (found, wanted))
    generator = torch.Generator().manual_seed(7)
    douts = [torch.randn(y.shape, generator=generator) for y in wanted]
    grads = torch.autograd.grad(found, [t for t in found_in if t is not None], [d.to(dtype) for d in douts])
    wanted_grads = torch.autograd.grad(wanted, [t for t in wanted_in if t is not None], [d.double() for d in douts])
    for got, want in zip((*found, *grads), (*wanted, *wanted_grads)):
        tolerance = 4 * TOLERANCE[dtype] * want.detach().abs().max().item()
        torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)
    assert all(y.dtype == dtype for y in found)


def taps_of(dim, width, with_bias, dtype=torch.float32):
    forward = random(dim, width), random(dim) if with_bias else None, random(dim)
    backward = random(dim, width).flip(0), random(dim).flip(0) if with_bias else None, random(dim) + 1
    return [None if t is None else t.to(dtype) for t in (*forward, *backward)]


def split(taps):
    return Taps(*taps[:3]), Taps(*taps[3:])


SHAPES = [(2, 13, 4), (3, 1, 5), (1, 9, 1), (2, 3, 8)]


@pytest.mark.parametrize("walked", [False, True])
@pytest.mark.parametrize(("batch", "tokens", "count"), SHAPES)
@pytest.mark.parametrize(("dim", "width"), [(40, 4), (16, 3), (5, 2)])
def test_conv(batch, tokens, count, walked, dim, width, isa):
    lines, xz = visible_lines(batch, tokens, count, walked), random(batch, tokens, 2 * dim)
    as_formula(
        lambda x, *taps: visible_conv_fn(x, *split(taps), lines),
        lambda x, *taps: visible_conv_ref(x, *split(taps), lines),
        [xz[..., :dim], *taps_of(dim, width, width != 3)],
    )


@pytest.mark.parametrize("walked", [False, True])
@pytest.mark.parametrize(("batch", "tokens", "count"), SHAPES)
@pytest.mark.parametrize("norm", ["none", "weight", "both"])
def test_gate(batch, tokens, count, walked, norm, isa):
    lines = visible_lines(batch, tokens, count, walked)
    for dim in (40, 5):
        weight, bias = None if norm == "none" else random(dim), random(dim) - 1 if norm == "both" else None
        z = random(batch, tokens, 2 * dim)[..., dim:]
        as_formula(
            lambda *tensors: visible_gate_fn(*tensors, 1e-5, lines, 0.5),
            lambda *tensors: visible_gate_ref(*tensors, 1e-5, lines, 0.5),
            [random(batch, tokens, dim), random(batch, count, dim), z, weight, bias],
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, isa):
    lines, x = visible_lines(2, 13, 4, True), random(2, 13, 40, dtype=dtype)
    taps = taps_of(40, 4, True, dtype)
    as_formula(
        lambda x, *taps: visible_conv_fn(x, *split(taps), lines),
        lambda x, *taps: visible_conv_ref(x, *split(taps), lines),
        [x, *taps],
        dtype,
    )
    as_formula(
        lambda *tensors: visible_gate_fn(*tensors, 1e-5, lines, 0.5),
        lambda *tensors: visible_gate_ref(*tensors, 1e-5, lines, 0.5),
        [x.flip(1), random(2, 4, 40, dtype=dtype), x, random(40), random(40) - 1],
        dtype,
    )


def test_threads_change_nothing_but_the_norms_sums():
    lines, x, taps = visible_lines(4, 200, 16, True), random(4, 200, 64), taps_of(64, 4, True)
    groups, grads = random(4, 16, 64), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            leaves = [t.detach().requires_grad_() for t in (x, *taps)]
            skip, pooled, pooled_b = visible_conv_fn(leaves[0], *split(leaves[1:]), lines)
            out = visible_gate_fn(skip, groups + pooled + pooled_b, x, random(64), random(64), 1e-5, lines, 0.5)
            grads.append((out, *torch.autograd.grad(out, leaves, torch.ones_like(out))))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*grads):
        assert torch.equal(one, three)


def test_operators_are_whole():
    lines, x, taps = visible_lines(2, 13, 4, True), random(2, 13, 8), taps_of(8, 4, True)
    tensors = [t.requires_grad_() for t in (x, *taps)]
    torch.library.opcheck(torch.ops.mamba_ssm.visible_conv.default, (*tensors, *lines))
    tensors = [t.requires_grad_() for t in (random(2, 13, 8), random(2, 4, 8), random(2, 13, 8), random(8), random(8))]
    torch.library.opcheck(torch.ops.mamba_ssm.visible_gate.default, (*tensors, 1e-5, *lines[:2], 0.5))


def test_what_does_not_fit_is_refused():
    lines, x = visible_lines(2, 13, 4, True), random(2, 13, 8)
    taps = split(taps_of(8, 4, True))
    assert visible_conv_fn(x[:0], *taps, VisibleLines(None, lines.starts[:0], 1.0))[1].shape == (0, 4, 8)
    with pytest.raises(ValueError, match="order"):
        visible_conv_fn(x, *taps, lines._replace(order=lines.order[:, 1:]))
    with pytest.raises(ValueError, match="starts"):
        visible_conv_fn(x, *taps, lines._replace(starts=lines.starts.int()))
    with pytest.raises(ValueError, match="width"):
        visible_conv_fn(x, *split(taps_of(8, 5, True)), lines)
    with pytest.raises(ValueError, match="outside"):
        visible_conv_fn(x, *taps, lines._replace(order=lines.order + 1))
    with pytest.raises(ValueError, match="outside"):
        visible_conv_fn(x, *taps, lines._replace(starts=lines.starts.flip(1)))
    groups = random(2, 4, 8)
    with pytest.raises(ValueError, match="groups and z"):
        visible_gate_fn(x, groups[:, 1:], x, None, None, 0.0, lines, 1.0)
    with pytest.raises(ValueError, match="one dtype"):
        visible_gate_fn(x, groups, x.bfloat16(), None, None, 0.0, lines, 1.0)
    with pytest.raises(ValueError, match="outside"):
        visible_gate_fn(x, groups, x, None, None, 0.0, lines._replace(starts=lines.starts + 1), 1.0)
