"""The selective scan: golden numbers, and every CPU backend against the reference in value and gradient."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from causal_conv1d import backend
from mamba_ssm.kernels.registry import backends
from mamba_ssm.ops.selective_scan_interface import (
    pooled_selective_scan_fn,
    pooled_selective_scan_ref,
    selective_scan_fn,
    selective_scan_ref,
)

GOLDEN = sorted((Path(__file__).parent / "golden").glob("scan_*.npz"))
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 5e-3}
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
SEQUENCES = ("u", "delta", "B", "C", "z", "dout", "out", "grad:u", "grad:delta", "grad:B", "grad:C", "grad:z")


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    if want.numel() == 0:
        return 0.0
    return ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30)).item()


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """`x` (..., dim, seqlen) in another memory layout."""
    if layout == "channel_last":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "half":  # the second half of a (..., seqlen, 2*dim) projection
        return torch.cat([x, x], -2).transpose(-1, -2).contiguous()[..., x.shape[-2] :].transpose(-1, -2)
    if layout == "strided":
        return x.repeat_interleave(2, -1)[..., ::2]
    return x


def arguments(
    batch, dim, seqlen, dstate, dtype=torch.float32, layout="channel_last", B="plain", C="plain", options=NAMES
):
    """Keyword arguments of a scan. B, C: "plain", "constant" or a number of groups; options: those of NAMES wanted."""
    generator = torch.Generator().manual_seed(batch * 1000 + dim * 10 + seqlen)

    def rand(*shape):
        return torch.randn(shape, generator=generator)

    def sequence(*shape):
        return laid_out(rand(*shape).to(dtype), layout)

    def matrix(kind):
        if kind == "constant":
            return rand(dim, dstate).to(dtype)
        return sequence(batch, *([] if kind == "plain" else [kind]), dstate, seqlen)

    found = {
        "u": sequence(batch, dim, seqlen),
        "delta": sequence(batch, dim, seqlen),
        "A": -torch.rand(dim, dstate, generator=generator) * 4 - 0.1,
        "B": matrix(B),
        "C": matrix(C),
        "D": rand(dim),
        "z": sequence(batch, dim, seqlen),
        "delta_bias": rand(dim) - 1,
    }
    return {name: tensor for name, tensor in found.items() if name in options}


REQUIRED = NAMES[:5]


def gradients(fn, tensors, dout, **options):
    """Output, last state and the gradient of every tensor, given the gradient of the output."""
    inputs = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    out, last_state = fn(**inputs, return_last_state=True, **options)
    assert not last_state.requires_grad
    return out, last_state, torch.autograd.grad(out, list(inputs.values()), dout, materialize_grads=True)


def gradient_of_output(u):
    return torch.randn(u.shape, generator=torch.Generator().manual_seed(1)).to(u.dtype)


@cache
def reference(*shape, delta_softplus=True, reverse=False, **kinds):
    """The reference's results in float64 for `arguments(*shape, **kinds)`, which do not depend on the layout."""
    tensors = arguments(*shape, **kinds)
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    dout = gradient_of_output(tensors["u"]).double()
    return gradients(selective_scan_ref, wide, dout, delta_softplus=delta_softplus, reverse=reverse)


def assert_close(tensors, got, want, tolerance):
    out, last_state, grads = got
    want_out, want_last, want_grads = want
    assert out.dtype == tensors["u"].dtype
    assert last_state.dtype == torch.float32
    assert relative_error(out, want_out) <= tolerance
    assert relative_error(last_state, want_last) <= tolerance
    for name, grad, want_grad in zip(tensors, grads, want_grads):
        assert grad.dtype == tensors[name].dtype
        assert relative_error(grad, want_grad) <= 4 * tolerance, name


def assert_as_reference(*shape, layout="channel_last", delta_softplus=True, tolerance=None, **kinds):
    """Values and gradients, in both directions."""
    tensors = arguments(*shape, layout=layout, **kinds)
    tolerance = tolerance or TOLERANCE[tensors["u"].dtype]
    for reverse in (False, True):
        options = {"delta_softplus": delta_softplus, "reverse": reverse}
        got = gradients(selective_scan_fn, tensors, gradient_of_output(tensors["u"]), **options)
        assert_close(tensors, got, reference(*shape, **options, **kinds), tolerance)
        assert got[0].stride() == torch.empty_like(tensors["u"]).stride()


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize("reverse", [False, True])
def test_golden(path, reverse, kernels):
    golden = np.load(path)
    tensors = {name: torch.from_numpy(golden[name]) for name in golden if name != "config"}
    tensors = {name: t.flip(-1) if reverse and name in SEQUENCES else t for name, t in tensors.items()}
    softplus = json.loads(str(golden["config"]))["delta_softplus"]
    for fn in (selective_scan_fn, selective_scan_ref):
        inputs = {name: tensors[name] for name in NAMES if name in tensors}
        out, last_state, grads = gradients(fn, inputs, tensors["dout"], delta_softplus=softplus, reverse=reverse)
        assert relative_error(out, tensors["out"]) <= 5e-6
        assert relative_error(last_state, tensors["last_state"]) <= 5e-6
        for name, grad in zip(inputs, grads):
            assert relative_error(grad, tensors[f"grad:{name}"]) <= 5e-6, name


@pytest.mark.parametrize("layout", ["contiguous", "channel_last", "half", "strided"])
@pytest.mark.parametrize("shape", [(2, 48, 70, 16), (3, 5, 1, 4), (1, 37, 33, 7), (1, 16, 100, 40)])
def test_shapes_and_layouts(shape, layout, kernels):
    assert_as_reference(*shape, layout=layout)


@pytest.mark.parametrize(("B", "C"), [(2, 2), (3, 1), ("constant", "plain"), (2, "constant"), ("constant", "constant")])
def test_forms_of_B_and_C(B, C, kernels):
    for dstate in (4, 13):
        assert_as_reference(2, 42, 20, dstate, B=B, C=C)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channel_last"])
def test_dtypes(dtype, layout, kernels):
    assert_as_reference(2, 21, 40, 16, layout=layout, dtype=dtype)
    assert_as_reference(1, 16, 40, 8, layout=layout, dtype=dtype, B="constant", options=REQUIRED)


def test_mixed_dtypes(kernels):
    tensors = arguments(2, 21, 40, 16)
    tensors |= {"delta": tensors["delta"].bfloat16(), "B": tensors["B"].half(), "z": tensors["z"].bfloat16()}
    got = gradients(selective_scan_fn, tensors, gradient_of_output(tensors["u"]), delta_softplus=True)
    assert_close(tensors, got, reference(2, 21, 40, 16), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("options", [(*REQUIRED, "D"), (*REQUIRED, "z"), (*REQUIRED, "delta_bias"), NAMES], ids=len)
def test_options(options, kernels):
    assert_as_reference(2, 17, 18, 8, options=options)


def test_steps_without_softplus(kernels):
    """Steps may then be negative, and states grow: a short sequence."""
    for options in (REQUIRED, NAMES):
        assert_as_reference(2, 17, 4, 8, delta_softplus=False, options=options, tolerance=2e-5)


@pytest.mark.parametrize("furthest", [20.0, 400.0])
def test_exponentials(furthest, kernels):
    """A state that is 1 and then decays is the exponential itself: within 1.6e-7, beside what rounding of its argument
    takes. A block whose arguments reach far takes another way than one whose arguments are all near."""
    dim = 4096
    exponents = torch.cat([torch.zeros(8), torch.logspace(-6, 0, dim - 8)]) * 20
    exponents[7::8] = furthest  # one lane of each vector
    delta = torch.stack([torch.ones(dim), exponents], dim=-1).unsqueeze(0)
    u = torch.tensor([1.0, 0.0]).repeat(1, dim, 1)
    ones = torch.ones(1, 1, 2)
    decayed = selective_scan_fn(u, delta, -torch.ones(dim, 1), ones, ones)[0, :, 1]
    wanted = torch.exp(-exponents.double())
    counted = (exponents <= 20) | (wanted == 0)  # beyond, results are no normal numbers
    bound = wanted * (1.6e-7 + exponents * 2.0**-23)
    assert torch.all(((decayed - wanted).abs() <= bound)[counted])
    assert torch.all(decayed[:7] == 1)
    assert torch.all(decayed[exponents == 400] < 1e-37)


@pytest.mark.parametrize("shape", [(0, 4, 5, 3), (2, 0, 5, 3), (2, 4, 0, 3)])
def test_empty(shape, kernels):
    tensors = arguments(*shape)
    out, last_state, grads = gradients(selective_scan_fn, tensors, torch.zeros(shape[:3]), delta_softplus=True)
    assert out.shape == shape[:3]
    assert last_state.shape == (shape[0], shape[1], shape[3])
    assert not last_state.any()
    assert all(not grad.any() for grad in grads)


@pytest.mark.parametrize("pool", [1, 3])
@pytest.mark.parametrize("options", [NAMES, REQUIRED], ids=len)
@pytest.mark.parametrize("reverse", [False, True])
def test_pooled(pool, options, reverse, kernels):
    tensors = arguments(2, 18, 5, 8, options=options)
    tensors = {"u": arguments(2, 18, 5 * pool, 8)["u"], "u_compressed": tensors.pop("u")} | tensors
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    dout = gradient_of_output(tensors["u"])
    got = gradients(pooled_selective_scan_fn, tensors, dout, delta_softplus=True, reverse=reverse)
    want = gradients(pooled_selective_scan_ref, wide, dout.double(), delta_softplus=True, reverse=reverse)
    assert_close(tensors, got, want, TOLERANCE[torch.float32])


def test_pooled_is_repeated_scan():
    tensors = arguments(2, 6, 4, 3)
    tokens = torch.randn(2, 6, 8)
    D = tensors.pop("D")
    out = pooled_selective_scan_fn(tokens, tensors["u"], **{k: v for k, v in tensors.items() if k != "u"}, D=D)
    want = selective_scan_fn(**tensors).repeat_interleave(2, dim=2) + D[:, None] * tokens
    torch.testing.assert_close(out, want)


def test_complex(kernels):
    generator = torch.Generator().manual_seed(0)
    batch, dim, seqlen, dstate = 2, 4, 7, 3
    u, delta, z = (torch.randn(batch, dim, seqlen, generator=generator) for _ in range(3))
    A = torch.complex(-torch.rand(dim, dstate, generator=generator), torch.randn(dim, dstate, generator=generator))
    B, C = (torch.randn(batch, dstate, seqlen, 2, generator=generator) for _ in range(2))
    out = selective_scan_fn(u, delta, A.requires_grad_(), B.flatten(2), C.flatten(2), z=z, delta_softplus=True)
    state, dt = torch.zeros(batch, dim, dstate, dtype=torch.complex64), torch.nn.functional.softplus(delta)
    B, C = torch.view_as_complex(B), torch.view_as_complex(C)
    for t in range(seqlen):
        state = torch.exp(dt[:, :, t, None] * A) * state + (dt * u)[:, :, t, None] * B[:, None, :, t]
        y = 2 * (state * C[:, None, :, t]).sum(-1).real
        torch.testing.assert_close(out[:, :, t], y * torch.nn.functional.silu(z[:, :, t]))
    out.sum().backward()
    assert A.grad.is_complex()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("form", [("plain", "plain"), (2, "constant")])
def test_reference_gradcheck(reverse, form):
    tensors = arguments(1, 4, 3, 2, B=form[0], C=form[1])
    inputs = [tensor.double().requires_grad_() for tensor in tensors.values()]
    for fn in (selective_scan_ref, selective_scan_fn):
        assert torch.autograd.gradcheck(lambda *args, fn=fn: fn(*args, True, reverse=reverse), inputs)


@pytest.mark.parametrize("name", ["torch", "cpp"])
def test_opcheck(name):
    with backend.use(name if backends.available("cpu") == name else "torch"):
        for options, B in ((NAMES, 1), (REQUIRED, "constant")):
            tensors = arguments(2, 5, 40, 3, B=B, C=1, options=options)
            tensors = [tensors.get(name) for name in NAMES]
            inputs = [tensor if tensor is None else tensor.requires_grad_() for tensor in tensors]
            torch.library.opcheck(torch.ops.mamba_ssm.selective_scan.default, (*inputs, True, True, True))
            inputs = [tensor if tensor is None else tensor.detach() for tensor in tensors]
            states = torch.ops.mamba_ssm.selective_scan(*inputs, True, True, True)[2]
            args = (inputs[0], *inputs, states, True, True)
            torch.library.opcheck(torch.ops.mamba_ssm.selective_scan_backward.default, args)


def test_same_threads_same_bits():
    tensors = arguments(3, 80, 50, 16)
    first, second = (gradients(selective_scan_fn, tensors, tensors["u"], delta_softplus=True) for _ in range(2))
    for one, other in zip((first[0], first[1], *first[2]), (second[0], second[1], *second[2])):
        assert torch.equal(one, other)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_number_of_threads(threads):
    """A batch and group may begin in one thread's share and end in another's."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert_as_reference(3, 160, 24, 16, B=2, C=2)
    finally:
        torch.set_num_threads(before)


def test_compiles_without_graph_break():
    tensors = arguments(2, 6, 9, 4)

    def step(u, delta):
        rest = {name: tensors[name] for name in NAMES[2:]}
        return selective_scan_fn(u * 2, delta, **rest, delta_softplus=True).square().sum()

    inputs = [tensors[name].clone().requires_grad_() for name in ("u", "delta")]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, want in zip(torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(step(*inputs), inputs)):
        torch.testing.assert_close(got, want)
