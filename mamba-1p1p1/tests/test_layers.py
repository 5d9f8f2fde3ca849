"""Layers in one step of the graph: every instruction set against the formulas in float64, and what may be frozen, left
out or asked for."""

from contextlib import ExitStack

import pytest
import torch
from causal_conv1d import backend
from mamba_ssm.kernels import products
from mamba_ssm.kernels.arguments import Lines
from mamba_ssm.kernels.registry import backends
from mamba_ssm.ops.layers import Layer, has_layers, layers_fn, layers_ref
from mamba_ssm.ops.merging import Merging, match_tokens_ref, merge_tokens_ref
from mamba_ssm.ops.norm import layer_norm_ref
from mamba_ssm.ops.whole import WholeMixer, WholePooledMixer, mixer_ref, pooled_mixer_ref
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from whole_parts import Parts, assert_same, double

pytestmark = pytest.mark.skipif(backends.available("cpu") != "cpp", reason="the C++ kernels are not built")

BATCH, TOKENS = 3, 30
MERGINGS = Merging(4, (15,), (13,)), Merging(5, (13,), (10,), raster=True), Merging(3, (10,), (0,), odd_first=True)


@pytest.fixture(autouse=True)
def preferred(monkeypatch):
    """The own products, on any processor."""
    monkeypatch.setattr(products, "PREFER_OWN_NARROW", True)


def layers_of(count=3, rms=False, optional=True, factors=False, merging=False, masked=False):
    """Layers of all kinds, in turns: both directions, one, pooled lines; pooled lines first, which take whole grids,
    where tokens merge behind each."""
    mask = (torch.arange(BATCH * TOKENS).view(BATCH, TOKENS) % 4 > 0).float() if masked else None
    gates = torch.tensor([[1.0, 0.5], [0.0, 2.0], [0.0, 0.0]]) if masked else None
    generator, found = torch.Generator().manual_seed(count), []
    for number in range(count):
        # other sizes of what a layer has for itself
        parts = Parts(taps=2 + number % 3, dstate=5 + number, optional=optional)
        kinds = (
            WholeMixer(parts.ends, parts.directions, 0.5, mask, gates),
            WholeMixer(parts.ends, parts.directions[:1], 1.0, mask),
            WholePooledMixer(
                parts.ends,
                parts.taps,
                parts.projections,
                parts.norm,
                Lines.of_grid((5, 6), (number % 2, 1 - number % 2)),
            ),
        )
        weight, bias = (torch.randn(parts.width, generator=generator) for _ in range(2))
        factor = torch.tensor([0.0, 2.0, 1.5]).view(BATCH, 1, 1) if factors and number else None
        kind = kinds[(number + 2 * merging) % 3]
        behind = MERGINGS[number] if merging else None
        found.append(Layer(weight, None if rms or not optional else bias, 1e-5, rms, kind, factor, behind))
    return found


def tokens(seed, width=20, count=TOKENS):
    return torch.randn(BATCH, count, width, generator=torch.Generator().manual_seed(seed))


def douts_of(layers):
    """Gradients of both results."""
    left = TOKENS - sum(layer.merging.fused for layer in layers if layer.merging is not None)
    return tokens(3, count=left), tokens(4, count=left)


def formulas(x, residual, layers):
    """`layers_fn` in any dtype."""
    for layer in layers:
        x = x if layer.factor is None else x * layer.factor
        normed, residual = layer_norm_ref(
            x, layer.weight, layer.bias, residual, layer.eps, True, False, layer.is_rms_norm
        )
        reference = mixer_ref if isinstance(layer.mixer, WholeMixer) else pooled_mixer_ref
        x = reference(normed, *layer.mixer)
        if layer.merging is not None:
            slot, _, count, _ = match_tokens_ref(x.detach(), *layer.merging.given(x.device))
            x, residual = (merge_tokens_ref(each, slot, count) for each in (x, residual))
    return x, residual


def leaves_of(x, residual, layers, dtype=torch.float32, frozen=()):
    """The same as leaves that learn, but for what is frozen (by number, x and the residual first); and these."""
    tensors = [x, residual, *(each for layer in layers for each in layer.tensors)]
    tensors = [None if each is None else each.detach().to(dtype, copy=True) for each in tensors]
    for number, each in enumerate(tensors):
        if each is not None and number not in frozen:
            each.requires_grad_()
    given, again = iter(tensors[2:]), []
    for layer in layers:
        layer = layer.with_tensors([next(given) for _ in layer.tensors])
        again.append(layer._replace(factor=double(layer.factor) if dtype == torch.float64 else layer.factor))
    return tensors, again


def gradients_of(call, x, residual, layers, douts, dtype=torch.float32, frozen=()):
    """Of x, the residual and all tensors; None where there is none."""
    tensors, layers = leaves_of(x, residual, layers, dtype, frozen)
    outs = call(*tensors[:2], layers)
    loss = sum((out * dout.to(dtype)).sum() for out, dout in zip(outs, douts) if dout is not None)
    loss.backward()
    return [None if each is None else each.grad for each in tensors]


def assert_all_same(found, wanted, within=4e-5):
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_same(one, other.double(), within)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"rms": True}, {"optional": False}, {"factors": True}, {"merging": True, "factors": True}, {"masked": True}],
    ids=str,
)
def test_values_and_gradients(options, with_residual, isa):
    layers, x, residual = layers_of(**options), tokens(1), tokens(2) if with_residual else None
    wide = [each._replace(factor=double(each.factor), mixer=double(each.mixer)) for each in layers]
    wide = [each._replace(weight=double(each.weight), bias=double(each.bias)) for each in wide]
    for found, wanted in zip(layers_fn(x, residual, layers), formulas(double(x), double(residual), wide)):
        assert_same(found, wanted, 4e-5)
    dout, dtotal = douts_of(layers)
    for douts in ((dout, dtotal), (dout, None), (None, dtotal)):
        found = gradients_of(layers_fn, x, residual, layers, douts)
        wanted = gradients_of(formulas, x, residual, layers, douts, torch.float64)
        # the reference knows what no loss depends on
        found = [torch.zeros_like(w) if f is None and w is not None else f for f, w in zip(found, wanted)]
        wanted = [torch.zeros_like(f) if w is None and f is not None else w for f, w in zip(found, wanted)]
        assert_all_same(found, wanted)


@pytest.mark.parametrize("options", [{"count": 5}, {"merging": True}, {"masked": True}], ids=str)
@pytest.mark.parametrize("factors", [False, True])
def test_bit_by_bit_the_operators_one_by_one(options, factors):
    layers, x, residual = layers_of(**options, factors=factors), tokens(1), tokens(2)
    douts = douts_of(layers)
    assert all(map(torch.equal, layers_fn(x, residual, layers), layers_ref(x, residual, layers)))
    found, wanted = (gradients_of(call, x, residual, layers, douts) for call in (layers_fn, layers_ref))
    assert all(one is other is None or torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_what_is_frozen_has_no_gradient_and_keeps_nothing():
    layers, x, residual, douts = layers_of(4), tokens(1), tokens(2), (tokens(3), tokens(4))
    every = gradients_of(layers_ref, x, residual, layers, douts)
    # all of the first two layers; then in_proj and a bias of the third
    count = 2 + sum(len(layer.tensors) for layer in layers[:2])
    frozen = {*range(count), count + 2, count + 3}
    found = gradients_of(layers_fn, x, residual, layers, douts, frozen=frozen)
    # masks and gates are not there
    absent = {number for number, each in enumerate(every) if each is None}
    assert {number for number, each in enumerate(found) if each is None} == frozen | absent
    there = [number for number in range(len(every)) if number not in frozen | absent]
    assert_all_same([found[number] for number in there], [every[number] for number in there])
    tensors, learned = leaves_of(x, residual, layers, frozen=frozen)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        layers_fn(*tensors[:2], learned)
    assert not any(each is tensors[0] for each in kept), "a layer that learns nothing kept its input"
    tensors, learned = leaves_of(x, residual, layers, frozen=range(1000))
    assert not layers_fn(*tensors[:2], learned)[0].requires_grad


@pytest.mark.parametrize("merging", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_second_gradients(count, merging):
    layers = layers_of(3, factors=True, merging=merging)[-count:]
    layers[-1] = layers[-1]._replace(merging=MERGINGS[0] if merging and count == 1 else layers[-1].merging)
    x, residual = tokens(1), tokens(2)

    def second(call, x, residual, layers):
        given = [each.detach().requires_grad_() for each in (x, residual)]
        out, total = call(*given, layers)
        weight = layers[0].weight
        grads = torch.autograd.grad(out.square().sum() + total.sin().sum(), (*given, weight), create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), (*given, weight))

    _, learned = leaves_of(x, residual, layers)
    _, wide = leaves_of(x, residual, layers, torch.float64)
    wanted = second(formulas, double(x), double(residual), wide)
    # three layers in float32, either way, are as far from those in float64
    assert_all_same(second(layers_fn, x, residual, learned), wanted, 4e-4)
    assert_all_same(second(layers_fn, x, residual, learned), second(layers_ref, x, residual, learned), 1e-5)


@pytest.mark.parametrize("merging", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_kernels_that_change_before_the_gradient(count, merging):
    layers, x, residual = layers_of(3, factors=True, merging=merging)[:count], tokens(1), tokens(2)
    douts = douts_of(layers)
    wanted = gradients_of(layers_fn, x, residual, layers, douts)

    def changed(*given):
        outs = layers_fn(*given)
        stack.enter_context(backend.use("torch"))
        return outs

    with ExitStack() as stack:
        assert_all_same(gradients_of(changed, x, residual, layers, douts), wanted)


def test_a_weight_that_changes_before_the_gradient_is_said():
    tensors, layers = leaves_of(tokens(1), None, layers_of())
    out, _ = layers_fn(tensors[0], None, layers)
    with torch.no_grad():
        layers[1].mixer.ends.in_proj.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("merging", [False, True])
def test_checkpointed(merging):
    layers, x = layers_of(merging=merging), tokens(1)
    douts = douts_of(layers)

    def again(x, residual, layers):
        return checkpoint(layers_fn, x, residual, layers, use_reentrant=False)

    found, wanted = (gradients_of(call, x, None, layers, douts) for call in (again, layers_fn))
    assert all(one is other is None or torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_where_it_is_there():
    x = tokens(1)
    assert has_layers(x, None)
    assert has_layers(torch.nn.Parameter(x), x)
    assert not has_layers(x.double(), None)
    assert not has_layers(x, x.double())
    assert not has_layers(x.as_subclass(type("Marked", (torch.Tensor,), {})), None)
    with backend.use("torch"):
        assert not has_layers(x, None)
    with FlopCounterMode(display=False):
        assert not has_layers(x, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not has_layers(x, None)
    with torch.autograd.forward_ad.dual_level():
        assert not has_layers(x, None)
    assert not torch.func.vmap(lambda one: one * has_layers(one.unsqueeze(0), None))(x).any()


def test_wrong_arguments_are_said():
    layers, x = layers_of(), tokens(1)
    first = layers[0]

    def merged(*given):
        return layers_fn(x, None, [first._replace(merging=Merging(*given))])

    wrong = [
        (lambda: layers_fn(x, x[:1], layers), "residual has shape"),
        (lambda: layers_fn(x, x.double(), layers), "residual has dtype"),
        (lambda: layers_fn(x[..., 1:], None, layers), "in_proj has shape"),
        (lambda: layers_fn(x, None, [first._replace(weight=first.weight[1:])]), "weight has shape"),
        (lambda: layers_fn(x, None, [first._replace(bias=first.bias.double())]), "bias has dtype"),
        (lambda: layers_fn(x, None, [first._replace(factor=torch.ones(BATCH))]), "factor has shape"),
        (lambda: layers_fn(x, None, [first._replace(mixer=first.mixer._replace(directions=[]))]), "0 entries"),
        (lambda: merged(16, (0,), (0,)), "fused is 16; wanted 1 to 14"),
        (lambda: merged(4.0, (0,), (0,)), "whole numbers"),
        (lambda: merged(4, (30,), (0,)), "cls is \\[30\\]; wanted 1 rising"),
        (lambda: merged(4, (3, 2), (0, 1)), "cls is \\[3, 2\\]"),
        (lambda: merged(4, (1, 2), (0,)), "cls is \\[1, 2\\]; wanted 1"),
        (lambda: merged(4, (1,), (-1,)), "moved is \\[-1\\]; wanted 1 rising"),
        (lambda: merged(4, (1,), (26,)), "moved is \\[26\\]"),
    ]
    for call, said in wrong:
        with pytest.raises((ValueError, TypeError), match=said):
            call()
