"""Whole mixers in one operator: every instruction set against the formulas in float64, and modules that take it."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from causal_conv1d import backend
from mamba_ssm.kernels import products
from mamba_ssm.kernels.arguments import Ends, Lines
from mamba_ssm.kernels.registry import backends
from mamba_ssm.modules import mamba_simple
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops import whole
from mamba_ssm.ops.directions import directions_fn
from mamba_ssm.ops.pooled import pooled_conv_fn, pooled_scan_fn
from mamba_ssm.ops.whole import (
    WholeMixer,
    has_skipping,
    mixer_fn,
    mixer_ref,
    pooled_mixer_fn,
    pooled_mixer_ref,
    skipping_mixer_fn,
    skipping_mixer_ref,
)
from torch.utils.flop_counter import FlopCounterMode
from whole_parts import Parts, assert_same, double, gradients

needs_cpp = pytest.mark.skipif(backends.available("cpu") != "cpp", reason="the C++ kernels are not built")


def assert_formulas(call, reference, given, within=1e-5):
    """Value and gradients of `call`, against those of `reference` in float64."""
    assert_same(call(*given), reference(*double(given)))
    dout = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(len(given[0])))
    wanted = gradients(reference, double(given), dout.double())
    of_gates = given[-1].shape if isinstance(given[-1], torch.Tensor) else None
    for found, one in zip(gradients(call, given, dout), wanted, strict=True):
        # a gate's is a sum over all of an image, of terms that cancel
        assert_same(found, one, 1e-3 if one.shape == of_gates else within)


# more than a tile or a panel of the product, less than one, and a depth that takes two passes
SIZES = [
    {},
    {"width": 70, "dim": 140, "rank": 5, "dstate": 16},
    {"width": 520, "dim": 24},
    {"width": 3, "dim": 5, "taps": 2},
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("ways", [1, 2])
def test_mixer(sizes, optional, ways, isa):
    parts = Parts(**sizes, optional=optional)
    for batch, seqlen in ((3, 21), (1, 100), (2, 1)):
        assert_formulas(mixer_fn, mixer_ref, (parts.tokens(batch, seqlen), parts.ends, parts.directions[:ways], 0.5))


def mask_and_gates(batch, seqlen, ways):
    """What tokens and directions are multiplied with: mostly 0 and 1, as methods have them."""
    generator = torch.Generator().manual_seed(batch + seqlen)
    mask = (torch.rand(batch, seqlen, generator=generator) > 0.3).float()
    gates = torch.tensor([[1.0, 0.0], [0.5, -2.0], [0.0, 0.0], [1.0, 1.0]]).repeat(2, 1)[:batch, :ways].contiguous()
    return mask + 0.25 * (torch.arange(seqlen) % 7 == 3), gates


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("ways", [1, 2])
@pytest.mark.parametrize("given", ["mask", "gates", "both"])
def test_masked_and_gated_mixer(sizes, optional, ways, given, isa):
    parts = Parts(**sizes, optional=optional)
    for batch, seqlen in ((3, 21), (1, 100), (2, 1)):
        mask, gates = mask_and_gates(batch, seqlen, ways)
        factors = None if given == "gates" else mask, None if given == "mask" else gates
        whole = parts.ends, parts.directions[:ways], 0.5, *factors
        # gates leave out what gradients of single tokens are otherwise large by
        assert_formulas(mixer_fn, mixer_ref, (parts.tokens(batch, seqlen), *whole), within=4e-5)


def masked(call):
    """`call` of x, ends and two directions, with some mask and gates."""
    return lambda x, ends, directions: call(x, ends, directions, 1.0, *mask_and_gates(*x.shape[:2], 2))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("optional", [True, False])
def test_directions_that_images_do_without(optional, threads, isa):
    parts = Parts(optional=optional)
    mixer, before = WholeMixer(parts.ends, parts.directions, 0.5), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for kinds in ([3, 1, 0, 2], [2], [0], [1, 1, 3, 0, 0, 2, 3]):
            runs = torch.tensor([[kind & 1, kind >> 1] for kind in kinds]).bool().view(-1, 2)
            x = parts.tokens(len(kinds), 21)
            found = skipping_mixer_fn(x, mixer, runs)
            assert_same(found, skipping_mixer_ref(double(x), double(mixer), runs))
            assert not found[~runs.any(1)].any()
            masked = mixer._replace(mask=mask_and_gates(len(kinds), 21, 2)[0])
            for one, own in ((WholeMixer(parts.ends, parts.directions[1:]), runs[:, 1:]), (masked, runs)):
                assert_same(skipping_mixer_fn(x, one, own), skipping_mixer_ref(double(x), double(one), own))
    finally:
        torch.set_num_threads(before)
    for nothing, own in ((x[:0], runs[:0]), (x[:, :0], runs)):
        assert skipping_mixer_fn(nothing, mixer, own).shape == nothing.shape
    for wrong, said in ((runs[:, :1], "runs has shape"), (runs.float(), "runs has dtype")):
        with pytest.raises((ValueError, TypeError), match=said):
            skipping_mixer_fn(x, mixer, wrong)
    with pytest.raises(ValueError, match="has gates; wanted none"):
        skipping_mixer_fn(x, mixer._replace(gates=runs.float()), runs)


GRIDS = [
    ((5, 6), (0, 1), (1,)),
    ((5, 6), (1, 0), (1,)),
    ((30, 1), (0, 1), (0,)),
    ((2, 5, 3), (1, 0, 2), (1,)),
    ((2, 5, 3), (2, 1, 0), (0, 1, 2)),
]


@pytest.fixture(params=["mixer", "masked mixer", "pooled mixer"])
def whole_mixer(request):
    """(parts, operator of x and ends, its reference), of (5, 6) tokens."""
    parts, lines = Parts(), Lines.of_grid((5, 6), (1, 0), (1,))
    pooled = {"taps": parts.taps, "projections": parts.projections, "norm": parts.norm, "lines": lines}
    if request.param != "pooled mixer":
        calls = [masked(call) if request.param == "masked mixer" else call for call in (mixer_fn, mixer_ref)]
        more = {"directions": parts.directions}
        return parts, partial(calls[0], **more), calls[1], more
    return parts, partial(pooled_mixer_fn, **pooled), pooled_mixer_ref, pooled


@pytest.mark.parametrize("frozen", ["in_proj", "out_proj", "x"])
def test_gradients_that_are_not_wanted(frozen, kernels, whole_mixer):
    parts, mixer, _, _ = whole_mixer
    x, ends, names = parts.tokens(3, 30), parts.ends, ("x", *Ends._fields)
    every = dict(zip(names, gradients(mixer, (x, ends), x)))
    given = {name: tensor.detach().clone() for name, tensor in zip(names, (x, *ends))}
    for name, tensor in given.items():
        tensor.requires_grad_(name != frozen)
    mixer(given["x"], Ends(*list(given.values())[1:])).backward(x)
    assert given[frozen].grad is None
    assert all(torch.equal(given[name].grad, grad) for name, grad in every.items() if name != frozen)


@pytest.mark.parametrize("strided", [lambda x: x[::2], lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)])
def test_strides_of_gradients(strided, kernels, whole_mixer):
    parts, mixer, _, _ = whole_mixer
    x, dout = strided(parts.tokens(4, 30)), strided(parts.tokens(4, 30) + 1)
    found = gradients(mixer, (x, parts.ends), dout)
    wanted = gradients(mixer, (x.contiguous(), parts.ends), dout.contiguous())
    for grad, one in zip(found, wanted, strict=True):
        assert_same(grad, one.double())
    nothing = gradients(mixer, (x[:0], parts.ends), dout[:0])
    assert [each.count_nonzero().item() for each in nothing] == [0] * 5


def test_gradients_of_no_tokens(kernels):
    parts = Parts()
    x = parts.tokens(2, 6)[:, :0]
    nothing = gradients(mixer_fn, (x, parts.ends, parts.directions), x)
    assert nothing[1].shape == parts.ends.in_proj.shape
    assert [each.count_nonzero().item() for each in nothing] == [0] * len(nothing)


@needs_cpp
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_gradients_for_any_number_of_threads(batch):
    parts, before, found = Parts(width=96, dim=192, dstate=16), torch.get_num_threads(), []
    x = parts.tokens(batch, 196)
    pooled = x, parts.ends, parts.taps, parts.projections, parts.norm, Lines.of_grid((14, 14))
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            of_pooled = gradients(pooled_mixer_fn, pooled, x)
            whole = x, parts.ends, parts.directions, 1.0, *mask_and_gates(batch, 196, 2)
            found.append((*gradients(mixer_fn, whole, x), *gradients(mixer_fn, whole[:3], x), *of_pooled))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(found[1], found[2]))
    for one in found[1:]:
        for grad, wanted in zip(one, found[0]):
            assert_same(grad, wanted.double())


def test_second_gradients(kernels, whole_mixer):
    parts, mixer, reference, more = whole_mixer

    def second(call, x, ends):
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(call(x, ends).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    x = parts.tokens(2, 30)
    wanted = second(
        partial(reference, **{name: double(part) for name, part in more.items()}), x.double(), double(parts.ends)
    )
    assert_same(second(mixer, x, parts.ends), wanted)


def test_kernels_that_change_before_the_gradient(whole_mixer):
    parts, mixer, _, _ = whole_mixer
    x = parts.tokens(2, 30)
    wanted = gradients(mixer, (x, parts.ends), x)
    for before, behind in (("torch", "auto"), ("auto", "torch")):
        leaf = x.detach().requires_grad_()
        with backend.use(before):
            out = mixer(leaf, parts.ends)
        with backend.use(behind):
            out.backward(x)
        assert_same(leaf.grad, wanted[0].double())


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_pooled_mixer(sizes, optional, grid, isa):
    parts, lines = Parts(**sizes, optional=optional), Lines.of_grid(*grid, 0.75)
    for batch in (1, 3):
        given = parts.tokens(batch, 30), parts.ends, parts.taps, parts.projections, parts.norm, lines, 0.5
        # the norm divides rounding by what may be a small deviation
        assert_formulas(pooled_mixer_fn, pooled_mixer_ref, given, within=4e-5)


@needs_cpp
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_threads_change_nothing(batch):
    parts, lines = Parts(width=96, dim=192, dstate=16), Lines.of_grid((14, 14))
    x, before, found = parts.tokens(batch, 196), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            whole = x, parts.ends, parts.directions, 1.0, *mask_and_gates(batch, 196, 2)
            mixed = mixer_fn(*whole[:3]), mixer_fn(*whole)
            found.append((*mixed, pooled_mixer_fn(x, parts.ends, parts.taps, parts.projections, parts.norm, lines)))
    finally:
        torch.set_num_threads(before)
    for one in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(one, found[0]))


@needs_cpp
def test_any_strides_and_nothing():
    parts, lines = Parts(), Lines.of_grid((5, 6))
    x = parts.tokens(4, 30)
    for strided in (x[::2], x.flip(1)[:2], x.transpose(1, 2).contiguous().transpose(1, 2)[:2]):
        dense = strided.contiguous()
        assert torch.equal(
            mixer_fn(strided, parts.ends, parts.directions), mixer_fn(dense, parts.ends, parts.directions)
        )
        pooled = parts.ends, parts.taps, parts.projections, parts.norm, lines
        assert torch.equal(pooled_mixer_fn(strided, *pooled), pooled_mixer_fn(dense, *pooled))
    for empty in (x[:0], x[:, :0]):
        assert mixer_fn(empty, parts.ends, parts.directions).shape == empty.shape
    assert pooled_mixer_fn(x[:0], parts.ends, parts.taps, parts.projections, parts.norm, lines).shape == x[:0].shape


def test_opcheck(kernels):
    parts, lines = Parts(), Lines.of_grid((5, 6))
    x, tests = parts.tokens(2, 30), ("test_schema", "test_faketensor")
    tensors = [tensor for each in parts.directions for tensor in each[:-1]]
    for ways, factors in itertools.product(([False], [False, True]), (False, True)):
        of_ways = [*tensors[: 7 * len(ways)], *[None] * (14 - 7 * len(ways))]
        factors = mask_and_gates(2, 30, len(ways)) if factors else (None, None)
        for save in (False, True):
            given = x, *parts.ends, *factors, *of_ways, ways, 1.0, save
            torch.library.opcheck(torch.ops.mamba_ssm.mixer.default, given, test_utils=tests)
        out, *kept = torch.ops.mamba_ssm.mixer(*given)
        for wanted in ([True] * 5, [True, False, False, True, True]) if kept[0].numel() else ():
            given = out, x, *parts.ends, *factors, *kept, *of_ways, ways, 1.0, wanted
            torch.library.opcheck(torch.ops.mamba_ssm.mixer_backward.default, given, test_utils=tests)
    tensors = [tensor for each in (*parts.taps, *parts.projections) for tensor in each]
    for save in (False, True):
        given = x, *parts.ends, *tensors, *parts.norm, *lines, 1.0, save
        torch.library.opcheck(torch.ops.mamba_ssm.pooled_mixer.default, given, test_utils=tests)
    out, *kept = torch.ops.mamba_ssm.pooled_mixer(*given)
    for wanted in ([True] * 5, [False, False, True, False, False]) if kept[0].numel() else ():
        given = out, x, *parts.ends, *kept, *tensors, *parts.norm, *lines, 1.0, wanted
        torch.library.opcheck(torch.ops.mamba_ssm.pooled_mixer_backward.default, given, test_utils=tests)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda parts: {"x": parts.tokens(2, 30).double()}, "x has dtype float64, wanted float32"),
        (lambda parts: {"x": parts.tokens(2)}, "x has shape"),
        (lambda parts: {"x": [1.0]}, "x is a list"),
        (lambda parts: {"ends": parts.ends._replace(in_proj=parts.ends.in_proj[1:])}, "in_proj has shape"),
        (lambda parts: {"ends": parts.ends._replace(out_proj=None)}, "out_proj is a NoneType"),
        (lambda parts: {"ends": parts.ends._replace(out_bias=parts.ends.in_bias)}, "out_bias has shape"),
        (lambda parts: {"ends": parts.ends._replace(in_bias=parts.ends.in_bias.half())}, "in_bias has dtype float16"),
    ],
)
def test_bad_ends_are_said(change, said):
    parts = Parts()
    given = {"x": parts.tokens(2, 30), "ends": parts.ends} | change(parts)
    with pytest.raises((TypeError, ValueError), match=said):
        mixer_fn(**given, directions=parts.directions)
    pooled = {"taps": parts.taps, "projections": parts.projections, "norm": parts.norm, "lines": Lines.of_grid((5, 6))}
    with pytest.raises((TypeError, ValueError), match=said):
        pooled_mixer_fn(**given, **pooled)


def test_bad_insides_are_said():
    parts, lines = Parts(), Lines.of_grid((5, 6))
    x, (first, second) = parts.tokens(2, 30), parts.directions

    def pooled(x=x, taps=parts.taps, projections=parts.projections, norm=parts.norm, lines=lines):
        return pooled_mixer_fn(x, parts.ends, taps, projections, norm, lines)

    wrong = [
        (lambda: mixer_fn(x, parts.ends, []), "directions has 0 entries"),
        (lambda: mixer_fn(x, parts.ends, [first], mask=torch.ones(2, 29)), "mask has shape"),
        (lambda: mixer_fn(x, parts.ends, [first], mask=torch.ones(2, 30).bool()), "mask has dtype bool"),
        (lambda: mixer_fn(x, parts.ends, [first], gates=torch.ones(2, 2)), "gates has shape"),
        (lambda: mixer_fn(x, parts.ends, [first, second._replace(A=second.A[:, 1:])]), "A has shape"),
        (lambda: mixer_fn(x, parts.ends, [first._replace(conv_weight=first.D)]), "conv_weight has shape"),
        (lambda: mixer_fn(x, parts.ends, [first._replace(conv_weight=first.conv_weight[:, :1])]), "1 columns"),
        (lambda: pooled(x=x[:, 1:]), "fill a grid"),
        (lambda: pooled(taps=[each._replace(weight=each.weight[:, :1]) for each in parts.taps]), "1 columns"),
        (lambda: pooled(projections=[parts.projections[0], parts.projections[1]._replace(dt_bias=first.A)]), "dt_bias"),
        (
            lambda: pooled(projections=[each._replace(x_proj=None) for each in parts.projections]),
            "x_proj is a NoneType",
        ),
        (lambda: mixer_fn(x, parts.ends, [first._replace(x_proj_weight=None)]), "x_proj_weight is a NoneType"),
        (lambda: pooled(norm=(None, parts.norm[1], 1e-5)), "bias without weight"),
        (lambda: pooled(norm=(parts.norm[0][1:], None, 1e-5)), "weight has shape"),
    ]
    for call, said in wrong:
        with pytest.raises((TypeError, ValueError), match=said):
            call()


# --- modules that take them -------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """The names of the operators that modules call, while they are taken on any processor."""
    called = []
    monkeypatch.setattr(products, "PREFER_OWN_NARROW", True)

    def spy(name, call, *given):
        called.append(name)
        return call(*given)

    for name in ("mixer_fn", "pooled_mixer_fn"):
        monkeypatch.setattr(whole, name, partial(spy, name, getattr(whole, name)))
    return called


class Pooling:
    """Lines of a grid, as `mix_pooled` asks for them."""

    lines, backward = Lines.of_grid((5, 6)), None


def pooled_or_not(pooled):
    return {"pooling": Pooling()} if pooled else {}


@needs_cpp
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"bimamba_type": "v2"},
        {"bimamba_type": "v2", "if_divide_out": True, "init_layer_scale": 0.1, "bias": True, "conv_bias": False},
    ],
    ids=str,
)
def test_inference_and_training_are_the_steps_to_rounding(pooled, options, calls, monkeypatch):
    torch.manual_seed(0)
    mixer, x, more = Mamba(24, **options), torch.randn(3, 30, 24), pooled_or_not(pooled)
    with torch.no_grad():
        found = mixer(x, **more)
    assert calls == ["pooled_mixer_fn" if pooled else "mixer_fn"]
    trained = mixer(x, **more)
    assert calls == ["pooled_mixer_fn" if pooled else "mixer_fn"] * 2
    monkeypatch.setattr("mamba_ssm.ops.mixer.has_whole", lambda *_: False)
    wanted = mixer(x, **more)
    for one in (found, trained):
        assert_same(one, wanted.detach().double())
    parameters = [each for each in mixer.parameters() if each.requires_grad]
    grads, wanted = (torch.autograd.grad(out.square().sum(), parameters) for out in (trained, wanted))
    for grad, one in zip(grads, wanted, strict=True):
        assert_same(grad, one.double())


@needs_cpp
@pytest.mark.parametrize("part", ["in_proj", "out_proj", "x_proj_b", "conv1d"])
def test_hooks_are_called(part, calls):
    mixer, x, seen = Mamba(24, bimamba_type="v2"), torch.randn(2, 30, 24), []
    getattr(mixer, part).register_forward_hook(lambda *_: seen.append(part))
    ways = (False, True) if part in ("in_proj", "out_proj") else (False,)
    with torch.no_grad():
        for pooled in ways:
            mixer(x, **pooled_or_not(pooled))
    assert seen == [part] * len(ways)
    assert not calls


@needs_cpp
def test_not_where_something_looks_on(calls):
    mixer, x = Mamba(24, bimamba_type="v2"), torch.randn(2, 30, 24)
    looks = [
        {"observe": lambda *_, **__: None},
        {"observe": lambda *_, **__: None, "token_mask": torch.ones(2, 30)},
    ]
    with torch.no_grad():
        for more in looks:
            mixer(x, **more)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert mixer(x).dtype == torch.bfloat16
        mixer.double()(x.double())
        mixer.bfloat16()(x.bfloat16())
        with backend.use("torch"):
            mixer.float()(x)
        torch.func.vmap(lambda one: mixer(one.unsqueeze(0)))(x)
        assert not calls
        mixer(x)
    assert calls == ["mixer_fn"]


@needs_cpp
def test_directions_of_other_sizes_are_not_one_operator(calls):
    mixer, x = Mamba(24, bimamba_type="v2"), torch.randn(2, 30, 24)
    other = Mamba(24, d_state=8)
    mixer.x_proj_b, mixer.A_b_log = other.x_proj, other.A_log
    with torch.no_grad():
        found = mixer(x)
    torch.testing.assert_close(found, mixer(x).detach())
    assert not calls


def flops(call):
    # the counter looks on with hooks of all modules, which would be called
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@needs_cpp
def test_as_many_flops_as_its_steps():
    parts, lines = Parts(optional=False), Lines.of_grid((5, 6))
    x = parts.tokens(2, 30)
    xz, y = x @ parts.ends.in_proj.t(), parts.tokens(2, 30) @ parts.ends.out_proj
    outside = flops(lambda: (F.linear(x, parts.ends.in_proj), F.linear(y, parts.ends.out_proj)))
    inside = flops(lambda: directions_fn(xz, parts.directions, log_decay=True))
    assert flops(lambda: mixer_fn(x, parts.ends, parts.directions)) == outside + inside > outside > 0
    groups = torch.randn(2, lines.count, 40)
    inside = flops(lambda: (pooled_conv_fn(y, *parts.taps, lines), pooled_scan_fn(groups, groups, *parts.projections)))
    pooled = parts.ends, parts.taps, parts.projections, parts.norm, lines
    assert flops(lambda: pooled_mixer_fn(x, *pooled)) == outside + inside > outside


@needs_cpp
def test_skipped_directions(calls, monkeypatch):
    """Images that run one direction alone, as DyVM's do in inference: kind by kind, or in one call."""
    name, call = "skipping_mixer_fn", skipping_mixer_fn
    monkeypatch.setattr(mamba_simple, name, lambda *given: calls.append(name) or call(*given))
    mixer = Mamba(24, bimamba_type="v2", if_divide_out=True).eval()
    x, gates = torch.randn(4, 30, 24), torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    run = partial(mixer, x, direction_gate=lambda hidden: gates)
    found = run().detach()
    assert calls == ["mixer_fn"] * 3
    with torch.no_grad():
        calls.clear()
        assert_same(run(), found.double())
        assert calls == [name]
        assert has_skipping(x)
        calls.clear()
        mask = mask_and_gates(4, 30, 2)[0]
        masked = run(token_mask=mask)
        assert calls == [name]
        calls.clear()
        # what is looked at is done step by step
        assert_same(run(token_mask=mask, observe=lambda *_, **images: None), masked.double())
        with FlopCounterMode(display=False):
            assert not has_skipping(x)
            run()
        mixer.in_proj.register_forward_hook(lambda *_: None)
        assert_same(run(), found.double())
        assert name not in calls
    assert not has_skipping(x)
    # in training each image runs both, and the gates are factors
    assert_same(found, mixer.train()(x, direction_gate=lambda hidden: gates).detach().double())


@needs_cpp
@pytest.mark.parametrize("options", [{"if_divide_out": True}, {"init_layer_scale": 0.1, "bias": True}], ids=str)
def test_training_with_mask_and_gates(options, calls, monkeypatch):
    """What learned pruning trains with is one operator, and the steps to rounding."""
    torch.manual_seed(0)
    mixer, x = Mamba(24, bimamba_type="v2", **options), torch.randn(4, 30, 24)
    mask, gates = (each.requires_grad_() for each in mask_and_gates(4, 30, 2))
    parameters = [each for each in mixer.parameters() if each.requires_grad]

    def run():
        out = mixer(x, token_mask=mask, direction_gate=lambda hidden: gates)
        return out.detach(), *torch.autograd.grad(out.square().sum(), [mask, gates, *parameters])

    found = run()
    assert calls == ["mixer_fn"]
    monkeypatch.setattr("mamba_ssm.ops.mixer.has_whole", lambda *_: False)
    for one, wanted in zip(found, run(), strict=True):
        assert_same(one, wanted.double())
    assert calls == ["mixer_fn"]
