"""The mixer over pooled lines: every instruction set against autograd through the formulas."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from causal_conv1d import backend, causal_conv1d_ref
from mamba_ssm.kernels.registry import backends
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops.pooled import (
    Lines,
    Projections,
    Taps,
    has_kernels,
    pooled_conv_fn,
    pooled_gate_fn,
    pooled_scan_fn,
)
from mamba_ssm.ops.selective_scan_interface import selective_scan_ref

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
pytestmark = pytest.mark.skipif(backends.available("cpu") != "cpp", reason="the C++ kernels are not built")


class Grid(NamedTuple):
    """A grid of 30 tokens, the order in which its axes are walked, and the pooled ones after that."""

    shape: tuple
    axes: tuple
    pooled: tuple
    scale: float = 1.0

    @property
    def lines(self):
        return Lines.of_grid(*self)

    def walk(self, x):
        """(batch, tokens, dim) -> (batch, *axes as they are walked, dim)."""
        return x.unflatten(1, self.shape).permute(0, *(axis + 1 for axis in self.axes), len(self.shape) + 1)

    def restore(self, x):
        back = [self.axes.index(axis) + 1 for axis in range(len(self.axes))]
        return x.permute(0, *back, len(self.shape) + 1).flatten(1, -2)

    def spread(self, groups):
        walked = [self.shape[axis] for axis in self.axes]
        return groups.unflatten(1, [1 if place in self.pooled else size for place, size in enumerate(walked)])


def conv_formula(x, taps, grid):
    walked, skip, pooled = grid.walk(x), 0, []
    for (weight, bias, D), reverse in zip((taps[:3], taps[3:]), (False, True)):
        sequence = walked.flatten(1, -2).transpose(1, 2)
        u = causal_conv1d_ref(sequence, weight, bias, "silu", reverse=reverse).transpose(1, 2)
        u = u.unflatten(1, walked.shape[1:-1])
        skip = skip + D * u
        means = u.mean([place + 1 for place in grid.pooled])
        pooled.append(grid.scale * (means.flatten(1, -2) if means.ndim > 2 else means.unsqueeze(1)))
    return grid.restore(skip), *pooled


def gate_formula(skip, groups, z, weight, bias, grid, share):
    total = grid.restore(grid.walk(skip) + grid.spread(groups)) * share
    total = total if weight is None else F.layer_norm(total, total.shape[-1:], weight, bias, 1e-5)
    return total * F.silu(z)


def assert_as_formula(function, formula, tensors, dtype):
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
    return found


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


GRIDS = [
    Grid((3, 10), (0, 1), (1,)),
    Grid((5, 6), (1, 0), (1,), 0.25),
    Grid((1, 30), (0, 1), (1,)),
    Grid((30, 1), (0, 1), (1,)),
    # a third axis, such as channels, inside or in front
    Grid((2, 5, 3), (0, 1, 2), (1,)),
    Grid((2, 5, 3), (1, 0, 2), (1,), 0.5),
    Grid((3, 2, 5), (0, 1, 2), (2,)),
    Grid((3, 2, 5), (0, 2, 1), (2,)),
    # two pooled axes
    Grid((2, 5, 3), (0, 1, 2), (1, 2)),
    Grid((2, 5, 3), (1, 0, 2), (1, 2)),
    Grid((2, 5, 3), (0, 1, 2), (0, 1)),
    Grid((3, 2, 5), (0, 1, 2), (0, 2)),
    Grid((3, 2, 5), (0, 2, 1), (0, 2)),
    Grid((3, 2, 5), (0, 1, 2), (1, 2)),
    Grid((2, 5, 3), (2, 1, 0), (0, 1, 2)),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("dim", "width"), [(40, 4), (16, 3), (5, 2)])
def test_conv(grid, dim, width, isa):
    for batch, with_bias in ((2, True), (1, False)):
        taps = [
            random(dim, width),
            random(dim) if with_bias else None,
            random(dim),
            random(dim, width).flip(0),
            random(dim).flip(0) if with_bias else None,
            random(dim) + 1,
        ]
        xz = random(batch, 30, 2 * dim)
        assert_as_formula(
            lambda x, *taps: pooled_conv_fn(x, Taps(*taps[:3]), Taps(*taps[3:]), grid.lines),
            lambda x, *taps: conv_formula(x, taps, grid),
            [xz[..., :dim], *taps],
            torch.float32,
        )


@pytest.mark.parametrize("threads", [2, 3])
def test_conv_in_threads(threads, isa):
    """A long walk is shared among threads: by stretches, or by channels where it is all one stretch."""
    before = torch.get_num_threads()
    taps = Taps(random(72, 4), random(72), random(72))
    x = random(1, 4096, 72)
    for shape, pooled in (((64, 16, 4), (1,)), ((64, 16, 4), (0, 1)), ((64, 64), (1,))):
        lines = Lines.of_grid(shape, None, pooled)
        torch.set_num_threads(1)
        wanted = pooled_conv_fn(x, taps, taps, lines)
        torch.set_num_threads(threads)
        found = pooled_conv_fn(x, taps, taps, lines)
        torch.set_num_threads(before)
        assert all(map(torch.equal, found, wanted))


def test_axes_that_lie_behind_each_other_are_one():
    assert Lines.of_grid((4, 5, 6, 7), None, (2, 3)) == Lines((20, 42, 1), (42, 1, 0), (False, True, False))
    assert Lines.of_grid((4, 1, 6), (2, 1, 0), (0,)) == Lines((6, 4, 1), (1, 6, 0), (True, False, False))
    assert Lines.of_grid((2, 3, 4, 5), None, (0, 2)) is None


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("norm", ["none", "weight", "both"])
def test_gate(grid, norm, isa):
    for dim in (40, 5):
        weight = None if norm == "none" else random(dim)
        bias = random(dim) - 1 if norm == "both" else None
        z = random(2, 30, 2 * dim)[..., dim:]
        assert_as_formula(
            lambda *tensors: pooled_gate_fn(*tensors, 1e-5, grid.lines, 0.5),
            lambda *tensors: gate_formula(*tensors, grid, 0.5),
            [random(2, 30, dim), random(2, grid.lines.count, dim), z, weight, bias],
            torch.float32,
        )


def scan_formula(groups, groups_b, projections):
    total = 0
    for u, (x_proj, dt_proj, dt_bias, A_log), backward in zip((groups, groups_b), projections, (False, True)):
        dt, B, C = F.linear(u, x_proj).split([dt_proj.shape[1], A_log.shape[1], A_log.shape[1]], -1)
        delta, A = F.linear(dt, dt_proj), -torch.exp(A_log)
        arguments = [t.transpose(1, 2) for t in (u, delta, B, C)]
        u, delta, B, C = (t.flip(-1) if backward else t for t in arguments)
        y = selective_scan_ref(u, delta, A, B, C, delta_bias=dt_bias, delta_softplus=True)
        total = total + (y.flip(-1) if backward else y).transpose(1, 2)
    return total


@pytest.mark.parametrize(
    ("batch", "lines", "dim", "rank", "dstate"),
    [(2, 14, 40, 3, 16), (1, 1, 5, 1, 4), (3, 37, 16, 2, 7), (1, 9, 96, 6, 24)],
)
def test_scan(batch, lines, dim, rank, dstate, isa):
    projections = [
        Projections(
            random(rank + 2 * dstate, dim) * dim**-0.5, random(dim, rank), random(dim), random(dim, dstate) / 2
        ),
        Projections(
            random(rank + 2 * dstate, dim).flip(0) * dim**-0.5, random(dim, rank), -random(dim), random(dim, dstate)
        ),
    ]
    groups, groups_b = random(batch, lines, dim), random(lines, batch, dim).transpose(0, 1)
    wanted = scan_formula(groups.double(), groups_b.double(), [[t.double() for t in p] for p in projections])
    leaves = [t.requires_grad_() for t in (groups, groups_b, *projections[0], *projections[1])]
    function = lambda g, h, *p: pooled_scan_fn(g, h, Projections(*p[:4]), Projections(*p[4:]))  # noqa: E731
    formula = lambda g, h, *p: scan_formula(g, h, (p[:4], p[4:]))  # noqa: E731
    assert "pooled_scan" in str(function(*leaves).grad_fn)
    assert_as_formula(function, formula, leaves, torch.float32)
    projections = [Projections(*(t.detach() for t in each)) for each in projections]
    groups, groups_b = groups.detach(), groups_b.detach()
    for dtype in (torch.float32, torch.bfloat16):
        found = pooled_scan_fn(groups.to(dtype), groups_b.to(dtype), *projections)
        assert found.dtype == dtype
        tolerance = 4 * TOLERANCE[dtype] * wanted.abs().max().item()
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, isa):
    grid, dim = Grid((3, 5), (1, 0), (1,)), 33
    taps = [random(dim, 4), random(dim), random(dim), random(dim, 4).flip(0), random(dim), random(dim)]
    function = lambda x, *taps: pooled_conv_fn(x, Taps(*taps[:3]), Taps(*taps[3:]), grid.lines)  # noqa: E731
    x = random(2, 15, dim, dtype=dtype)
    skip, pooled, _ = assert_as_formula(function, lambda x, *taps: conv_formula(x, taps, grid), [x, *taps], dtype)
    assert_as_formula(
        lambda *tensors: pooled_gate_fn(*tensors, 1e-5, grid.lines, 0.5),
        lambda *tensors: gate_formula(*tensors, grid, 0.5),
        [skip, pooled, x, random(dim), random(dim)],
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_scans_have_gradients(dtype, isa):
    """Under autocast, too, whose products of float32 groups would be of another dtype."""
    groups, groups_b = random(2, 5, 8, dtype=dtype), random(2, 5, 8, dtype=dtype)
    projections = [Projections(random(9, 8), random(8, 1), random(8), random(8, 4)) for _ in range(2)]
    leaves = [groups, groups_b, *projections[0], *projections[1]]
    function = lambda g, h, *p: pooled_scan_fn(g, h, Projections(*p[:4]), Projections(*p[4:]))  # noqa: E731
    formula = lambda g, h, *p: scan_formula(g, h, (p[:4], p[4:]))  # noqa: E731
    assert_as_formula(function, formula, leaves, dtype)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    with torch.autocast("cpu", dtype):
        assert "pooled_scan" in str(function(*leaves).grad_fn)
        assert "pooled_scan" not in str(function(*(leaf.float() for leaf in leaves)).grad_fn)


def test_mixer_without_gradients_is_the_mixer_with_them():
    torch.manual_seed(0)
    model, x = PooledMixer(), random(3, 4, 8)
    with torch.no_grad():
        inference = model(x)
    torch.testing.assert_close(inference, model(x).detach())


def test_registration():
    lines, taps = Lines.of_grid((3, 5), (1, 0)), [random(8, 4), random(8), random(8), random(8, 4), None, random(8)]
    tensors = [t if t is None else t.requires_grad_() for t in (random(2, 15, 8), *taps)]
    torch.library.opcheck(torch.ops.mamba_ssm.pooled_conv.default, (*tensors, *lines))
    tensors = [random(2, 15, 8), random(2, 5, 8), random(2, 15, 8), random(8), None]
    tensors = [t if t is None else t.requires_grad_() for t in tensors]
    torch.library.opcheck(torch.ops.mamba_ssm.pooled_gate.default, (*tensors, 1e-5, *lines[:3], 0.5))
    projections = [random(9, 8), random(8, 1), random(8), random(8, 4)]
    tensors = [random(2, 5, 8), random(2, 5, 8), *projections, *projections]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.mamba_ssm.pooled_scan.default, (*tensors, False), test_utils=tests)
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    torch.library.opcheck(torch.ops.mamba_ssm.pooled_scan.default, (*tensors, True))


def test_empty_batch_and_errors():
    taps, lines = Taps(random(8, 4), None, random(8)), Lines.of_grid((3, 5), (1, 0))
    skip, pooled, _ = pooled_conv_fn(torch.empty(0, 15, 8), taps, taps, lines)
    assert skip.shape == (0, 15, 8)
    assert pooled_gate_fn(skip, pooled, skip, None, None, 0.0, lines, 1.0).shape == (0, 15, 8)
    with pytest.raises(ValueError, match="that fill a grid of"):
        pooled_conv_fn(random(2, 14, 8), taps, taps, lines)
    with pytest.raises(ValueError, match=r"groups_b is \(2, 4, 8\)"):
        pooled_scan_fn(random(2, 5, 8), random(2, 4, 8), (), ())
    with pytest.raises(ValueError, match=r"wanted \(batch, 5, dim\)"):
        pooled_gate_fn(random(2, 15, 8), random(2, 3, 8), random(2, 15, 8), None, None, 0.0, lines, 1.0)


class Rows:
    """Pools rows of two tokens."""

    lines = Lines.of_grid((2, 2))
    backward = None

    def order(self, x):
        return x

    restore = order

    def reduce(self, x):
        return x.unflatten(1, (2, 2)).mean(2)

    def expand_add(self, x, groups):
        return x + groups.repeat_interleave(2, 1)


class PooledMixer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mixer = Mamba(8, bimamba_type="v2")

    def forward(self, x):
        return self.mixer(x, pooling=Rows())


def test_kernels_are_for_eager_and_compiled_runs_only():
    x, model = random(1, 4, 8), PooledMixer()
    assert has_kernels(x)
    assert not has_kernels(x.double())
    with backend.use("torch"):
        assert not has_kernels(x)
        plain = model(x)
    torch.testing.assert_close(model(x), plain)
    exported = torch.export.export(model, (x,))
    assert not any("pooled" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), plain)
