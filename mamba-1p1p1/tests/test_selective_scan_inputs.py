"""The selective scan at its edges: extreme values, long sequences, bad input."""

import pytest
import torch
from causal_conv1d import backend
from mamba_ssm.kernels.registry import backends
from mamba_ssm.ops.selective_scan_interface import pooled_selective_scan_fn, selective_scan_fn, selective_scan_ref


@pytest.fixture(params=["torch", "cpp"])
def kernels(request):
    if request.param == "cpp" and backends.available("cpu") != "cpp":
        pytest.skip("the C++ kernels are not built")
    with backend.use(request.param):
        yield request.param


def arguments(batch=2, dim=4, seqlen=5, dstate=3):
    return {
        "u": torch.randn(batch, dim, seqlen),
        "delta": torch.randn(batch, dim, seqlen),
        "A": -torch.rand(dim, dstate),
        "B": torch.randn(batch, dstate, seqlen),
        "C": torch.randn(batch, dstate, seqlen),
        "D": torch.randn(dim),
        "z": torch.randn(batch, dim, seqlen),
        "delta_bias": torch.randn(dim),
    }


@pytest.mark.parametrize("scale", [1e-4, 30.0, 1e4])
@pytest.mark.parametrize("decay", [0.0, -1e-6, -1e4])
def test_extreme_steps_and_decays(scale, decay, kernels):
    torch.manual_seed(0)
    tensors = arguments(1, 20, 70, 4)
    tensors["delta"] *= scale
    tensors["A"] = torch.full((20, 4), decay)
    inputs = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    wanted = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    out = selective_scan_fn(**inputs, delta_softplus=True)
    want = selective_scan_ref(**wanted, delta_softplus=True)
    assert torch.isfinite(want).all()
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())
    out.sum().backward()
    want.sum().backward()
    for name in inputs:
        grad, reference = inputs[name].grad, wanted[name].grad
        assert torch.isfinite(reference).all()
        torch.testing.assert_close(grad, reference, rtol=1e-3, atol=1e-4 * reference.abs().max().item(), msg=name)


def test_not_a_number_only_where_the_reference_has_it(kernels):
    tensors = arguments(1, 18, 40)
    tensors["u"][0, 3, 7] = torch.nan
    tensors["delta"][0, 5, 2] = torch.nan
    tensors["delta"][0, 6, 9] = torch.inf
    tensors["z"][0, 8, 4] = torch.nan
    out, want = (fn(**tensors, delta_softplus=True) for fn in (selective_scan_fn, selective_scan_ref))
    torch.testing.assert_close(out, want, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_growing_states_overflow_as_the_reference_does(kernels):
    tensors = arguments(1, 18, 200)
    tensors["A"] = -tensors["A"]
    tensors["delta"] = tensors["delta"].abs() * 3
    out, want = (fn(**tensors) for fn in (selective_scan_fn, selective_scan_ref))
    assert torch.equal(torch.isfinite(out), torch.isfinite(want))


def test_long_sequence():
    """100,000 steps; the torch path would take most of the time of the whole suite."""
    if backends.available("cpu") != "cpp":
        pytest.skip("the C++ kernels are not built")
    torch.manual_seed(0)
    tensors = arguments(1, 3, 100_000, 2)
    u = tensors["u"].requires_grad_()
    out, last_state = selective_scan_fn(**tensors, delta_softplus=True, return_last_state=True)
    # The last thousand steps from a cold start: by then the decays have forgotten what came before.
    end = {name: t[..., -1000:] if t.dim() == 3 else t for name, t in tensors.items()}
    want, want_last_state = selective_scan_ref(**end, delta_softplus=True, return_last_state=True)
    torch.testing.assert_close(last_state, want_last_state, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out[..., -10:], want[..., -10:], rtol=1e-4, atol=1e-4)
    (grad,) = torch.autograd.grad(out[..., -1].sum(), u)
    (want_grad,) = torch.autograd.grad(want[..., -1].sum(), u)
    torch.testing.assert_close(grad[..., -1000:], want_grad[..., -1000:], rtol=1e-4, atol=1e-5)


def test_strides_beyond_32_bits_are_kept():
    """Offsets are 64-bit: rows 2^31 elements apart, in a tensor of which almost all is never touched."""
    far = (1 << 31) + 64
    try:
        memory = torch.empty(far + 64)
    except RuntimeError:
        pytest.skip("no address space for 8 GiB")
    u = torch.as_strided(memory, (2, 16, 2), (far, 1, 16))
    u.fill_(1.0)
    A, B = -torch.ones(16, 2), torch.ones(2, 2, 2)
    out = selective_scan_fn(u, torch.ones(2, 16, 2), A, B, B)
    torch.testing.assert_close(out, selective_scan_ref(u, torch.ones(2, 16, 2), A, B, B))


BAD = [
    ({"u": torch.zeros(4, 5)}, ValueError, r"u has shape \(4, 5\), wanted \(batch, dim, seqlen\)"),
    ({"u": "u"}, TypeError, "u is a str, wanted a torch.Tensor"),
    ({"u": torch.zeros(2, 4, 5, dtype=torch.int32)}, TypeError, "u has dtype int32, wanted float32 or bfloat16"),
    ({"delta": torch.zeros(2, 1, 5)}, ValueError, r"delta has shape \(2, 1, 5\), wanted .* = \(2, 4, 5\)"),
    ({"delta": None}, TypeError, "delta is a NoneType, wanted a torch.Tensor"),
    ({"delta": torch.zeros(2, 4, 5).double()}, TypeError, "delta has dtype float64, wanted float32"),
    ({"z": torch.zeros(2, 4, 6)}, ValueError, r"z has shape \(2, 4, 6\), wanted .* = \(2, 4, 5\)"),
    ({"A": torch.zeros(4)}, ValueError, r"A has shape \(4,\), wanted \(dim, dstate\)"),
    ({"A": torch.zeros(3, 3)}, ValueError, r"A has shape \(3, 3\), wanted \(dim, dstate\) = \(4, 3\)"),
    ({"A": torch.zeros(4, 3).half()}, TypeError, "A has dtype float16, wanted float32 or complex64"),
    (
        {"B": torch.zeros(2, 2, 5)},
        ValueError,
        r"B has shape \(2, 2, 5\), wanted .* = \(2, 3, 5\)",
    ),
    ({"B": torch.zeros(2, 3, 3, 5)}, ValueError, "B has 3 groups, wanted a number that divides dim = 4"),
    ({"C": torch.zeros(4, 2)}, ValueError, r"C has shape \(4, 2\), wanted \(dim, dstate\) = \(4, 3\)"),
    ({"C": torch.zeros(5)}, ValueError, r"C has shape \(5,\), wanted \(batch, dstate, seqlen\), .* or \(dim, dstate\)"),
    ({"D": torch.zeros(4, 1)}, ValueError, r"D has shape \(4, 1\), wanted \(dim,\) = \(4,\)"),
    ({"D": torch.zeros(4).bfloat16()}, TypeError, "D has dtype bfloat16, wanted float32"),
    ({"delta_bias": torch.zeros(1)}, ValueError, r"delta_bias has shape \(1,\), wanted \(dim,\) = \(4,\)"),
    ({"B": torch.zeros(2, 3, 5, device="meta")}, ValueError, "B is on meta, wanted cpu, the device of u"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[next(iter(change)) for change, *_ in BAD])
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message) as raised:
        selective_scan_fn(**arguments() | change)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("seqlen", "message"), [(9, "a whole k"), (0, "a whole k")])
def test_bad_pooled_input(seqlen, message):
    with pytest.raises(ValueError, match=message):
        pooled_selective_scan_fn(
            torch.zeros(2, 4, seqlen),
            arguments()["u"],
            **{name: tensor for name, tensor in arguments().items() if name != "u"},
        )
