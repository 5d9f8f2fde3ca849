"""Derivatives beyond the first, and other ways to them: right for every operator, by way of its reference."""

from contextlib import ExitStack

import pytest
import torch
from causal_conv1d import backend, causal_conv1d_fn, causal_conv1d_ref
from mamba_ssm import Mamba
from mamba_ssm.kernels.registry import backends
from mamba_ssm.ops import linear as linear_module
from mamba_ssm.ops.bidirectional import bidirectional_scan_fn
from mamba_ssm.ops.directions import Direction, directions_fn, directions_ref
from mamba_ssm.ops.linear import linear
from mamba_ssm.ops.merging import merge_tokens_fn, merge_tokens_ref
from mamba_ssm.ops.norm import layer_norm_fn, layer_norm_ref
from mamba_ssm.ops.pooled import (
    Lines,
    Projections,
    Taps,
    pooled_conv_fn,
    pooled_conv_ref,
    pooled_gate_fn,
    pooled_gate_ref,
    pooled_scan_fn,
    pooled_scan_ref,
)
from mamba_ssm.ops.selective_scan_interface import (
    mamba_inner_fn_no_out_proj,
    mamba_inner_fn_no_out_proj_ref,
    pooled_selective_scan_fn,
    pooled_selective_scan_ref,
    selective_scan_fn,
    selective_scan_ref,
)
from mamba_ssm.ops.visible import (
    VisibleLines,
    visible_conv_fn,
    visible_conv_ref,
    visible_gate_fn,
    visible_gate_ref,
)
from torch.func import functional_call, grad, hessian, jacrev, jvp, linearize, vmap

B, D, L, N, R = 1, 2, 4, 2, 1
LINES = Lines.of_grid((2, 2), (1, 0), scale=0.5)
VISIBLE = VisibleLines(torch.tensor([[2, 0, 3, 1]]), torch.tensor([[0, 3, 3, 4]]), 0.3)
SLOT, COUNT = torch.tensor([[0, 1, 1, 2]]), torch.tensor([[1, 2, 1]])


def rand(*shape, scale=1.0):
    generator = torch.Generator().manual_seed(sum((place + 1) * size for place, size in enumerate(shape)))
    return torch.randn(shape, generator=generator) * scale


def scan_tensors(seqlen=L):
    signals = rand(B, D, seqlen), rand(B, D, seqlen) - 1
    return *signals, -rand(D, N).abs(), rand(B, N, seqlen), rand(B, N, seqlen) + 1, rand(D), rand(B, D, seqlen), rand(D)


def direction_tensors():
    return rand(D, 3), rand(D), rand(R + 2 * N, D), rand(D, R), rand(D), -rand(D, N).abs(), rand(D)


def both_directions(fn):
    return lambda xz, *p: fn(xz, [Direction(*p[:7], False), Direction(*p[7:], True)], 0.5)


def both_scans(fn):
    return lambda *t: torch.stack(fn(t[:8], t[8:], True))


def both_by_reference(first, second, softplus):
    return selective_scan_ref(*first, softplus), selective_scan_ref(*second, softplus, reverse=True)


def inner(fn):
    def run(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D):
        return fn(xz, conv_weight.unsqueeze(1), conv_bias, x_proj, dt_proj, A, D=D, delta_bias=dt_bias)

    return run


TAPS = rand(D, 3), rand(D), rand(D)
PROJECTIONS = rand(R + 2 * N, D), rand(D, R), rand(D), rand(D, N)
# operator -> (function, reference, tensors)
CASES = {
    "causal_conv1d_fn": (
        *((lambda x, w, b, fn=fn: fn(x, w, b, "silu", reverse=True)) for fn in (causal_conv1d_fn, causal_conv1d_ref)),
        (rand(B, D, L), rand(D, 3), rand(D)),
    ),
    "selective_scan_fn": (
        *((lambda *t, fn=fn: fn(*t, True, reverse=True)) for fn in (selective_scan_fn, selective_scan_ref)),
        scan_tensors(),
    ),
    "pooled_selective_scan_fn": (
        *((lambda *t, fn=fn: fn(*t, True)) for fn in (pooled_selective_scan_fn, pooled_selective_scan_ref)),
        (rand(B, D, 2 * L), *scan_tensors()),
    ),
    "bidirectional_scan_fn": (
        both_scans(bidirectional_scan_fn),
        both_scans(both_by_reference),
        (*scan_tensors(), *(t + 0.1 for t in scan_tensors())),
    ),
    "directions_fn": (
        both_directions(directions_fn),
        both_directions(directions_ref),
        (rand(B, L, 2 * D), *direction_tensors(), *(t - 0.1 for t in direction_tensors())),
    ),
    "mamba_inner_fn_no_out_proj": (
        inner(mamba_inner_fn_no_out_proj),
        inner(mamba_inner_fn_no_out_proj_ref),
        (rand(B, 2 * D, L), *direction_tensors()),
    ),
    "layer_norm_fn": (
        *((lambda *t, fn=fn: torch.stack(fn(*t, prenorm=True))) for fn in (layer_norm_fn, layer_norm_ref)),
        (rand(B, L, 5), rand(5), rand(5) + 1, rand(B, L, 5) - 1),
    ),
    "rms norm": (
        *((lambda x, w, fn=fn: fn(x, w, None, is_rms_norm=True)) for fn in (layer_norm_fn, layer_norm_ref)),
        (rand(B, L, 5), rand(5)),
    ),
    "linear": (linear, torch.nn.functional.linear, (rand(B, L, 3), rand(5, 3), rand(5))),
    "pooled_conv_fn": (
        *(
            (lambda x, *p, fn=fn: torch.cat(fn(x, Taps(*p[:3]), Taps(*p[3:]), LINES), 1))
            for fn in (pooled_conv_fn, pooled_conv_ref)
        ),
        (rand(B, L, D), *TAPS, *(t + 0.1 for t in TAPS)),
    ),
    "pooled_scan_fn": (
        *(
            (lambda g, h, *p, fn=fn: fn(g, h, Projections(*p[:4]), Projections(*p[4:])))
            for fn in (pooled_scan_fn, pooled_scan_ref)
        ),
        (rand(B, L, D), rand(B, L, D) + 1, *PROJECTIONS, *(t + 0.1 for t in PROJECTIONS)),
    ),
    "pooled_gate_fn": (
        *((lambda *t, fn=fn: fn(*t, 1e-5, LINES, 0.5)) for fn in (pooled_gate_fn, pooled_gate_ref)),
        (rand(B, L, D), rand(B, 2, D), rand(B, L, D) + 1, rand(D), rand(D) + 1),
    ),
    "visible_conv_fn": (
        *(
            (lambda x, *p, fn=fn: torch.cat(fn(x, Taps(*p[:3]), Taps(*p[3:]), VISIBLE), 1))
            for fn in (visible_conv_fn, visible_conv_ref)
        ),
        (rand(B, L, D), *TAPS, *(t + 0.1 for t in TAPS)),
    ),
    "visible_gate_fn": (
        *((lambda *t, fn=fn: fn(*t, 1e-5, VISIBLE, 0.5)) for fn in (visible_gate_fn, visible_gate_ref)),
        (rand(B, L, D), rand(B, 3, D), rand(B, L, D) + 1, rand(D), rand(D) + 1),
    ),
    "merge_tokens_fn": (
        *((lambda x, fn=fn: fn(x, SLOT, COUNT)) for fn in (merge_tokens_fn, merge_tokens_ref)),
        (rand(B, L, 3),),
    ),
}


@pytest.fixture(params=["torch", "cpp"], autouse=True)
def kernels(request, monkeypatch):
    monkeypatch.setattr(linear_module, "_PREFER_OWN", True)
    monkeypatch.setattr(linear_module, "_MIN_MULTIPLICATIONS", 0)
    if request.param == "cpp" and backends.available("cpu") != "cpp":
        pytest.skip("the C++ kernels are not built")
    with ExitStack() as stack:
        stack.enter_context(backend.use(request.param))
        yield request.param


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives(name, kernels):
    """A gradient penalty, in float32 through the kernels, as the reference has it; gradgradcheck in float64."""
    fn, ref, tensors = CASES[name]
    found = []
    for function, dtype in ((fn, torch.float32), (ref, torch.float64)):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        first = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
        penalty = sum(each.square().sum() for each in first)
        found.append(torch.autograd.grad(penalty, inputs, allow_unused=True))
    for got, want in zip(*found):
        torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=1e-3 * want.abs().max().item() + 1e-5)
    if kernels == "torch":
        wide = [tensor.double().requires_grad_() for tensor in tensors]
        assert torch.autograd.gradcheck(fn, wide, check_forward_ad=True, fast_mode=True)
        assert torch.autograd.gradgradcheck(fn, wide, fast_mode=True)


@pytest.mark.parametrize("name", CASES)
def test_forward_mode(name):
    fn, ref, tensors = CASES[name]
    tangents = tuple(torch.ones_like(tensor) for tensor in tensors)
    out, tangent = jvp(fn, tensors, tangents)
    wanted, wanted_tangent = jvp(ref, tuple(t.double() for t in tensors), tuple(t.double() for t in tangents))
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tangent.double(), wanted_tangent, rtol=1e-4, atol=1e-4 * tangent.abs().max().item())
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(tensor, torch.ones_like(tensor)) for tensor in tensors]
        found = torch.autograd.forward_ad.unpack_dual(fn(*duals)).tangent
    torch.testing.assert_close(found, tangent)


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_each_of_many(name):
    fn, _, tensors = CASES[name]
    first = torch.stack([tensors[0], 2 * tensors[0]])

    def loss(x):
        return fn(x, *tensors[1:]).square().sum()

    found = vmap(grad(loss))(first)
    for each, got in zip(first, found):
        each = each.clone().requires_grad_()
        (want,) = torch.autograd.grad(loss(each), each)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * want.abs().max().item() + 2e-5)


@pytest.mark.parametrize("kind", ["none", "v1", "v2"])
def test_mixer(kind):
    torch.manual_seed(0)
    mixer, x = Mamba(4, d_state=2, bimamba_type=kind, if_divide_out=True), torch.randn(3, 5, 4)
    parameters = {name: parameter.detach() for name, parameter in mixer.named_parameters()}

    def loss(parameters, image):
        return functional_call(mixer, parameters, (image.unsqueeze(0),)).square().sum()

    found = vmap(grad(loss), (None, 0))(parameters, x)
    for number, image in enumerate(x):
        own = torch.autograd.grad(mixer(image.unsqueeze(0)).square().sum(), list(mixer.parameters()))
        for (name, _), want in zip(mixer.named_parameters(), own):
            torch.testing.assert_close(found[name][number], want, rtol=1e-3, atol=1e-5)
    # a linearised model, a Jacobian, and a Hessian-vector product two ways
    image, vector = x[:1], torch.randn(1, 5, 4)
    out, linear_map = linearize(mixer, image)
    torch.testing.assert_close(linear_map(vector), jvp(mixer, (image,), (vector,))[1])
    torch.testing.assert_close(torch.einsum("...ijk,ijk->...", jacrev(mixer)(image), vector), linear_map(vector))
    wanted = torch.einsum("...ijk,ijk->...", hessian(lambda x: mixer(x).square().sum())(image), vector)
    image = image.clone().requires_grad_()
    (first,) = torch.autograd.grad(mixer(image).square().sum(), image, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad((first * vector).sum(), image)[0], wanted, rtol=1e-3, atol=1e-4)
