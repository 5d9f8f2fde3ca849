"""The package's matrix product and the mixer's linear layers against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from causal_conv1d import backend, native
from mamba_ssm.kernels import products
from mamba_ssm.kernels.registry import backends
from mamba_ssm.modules.linear import Linear
from mamba_ssm.ops import linear as module
from mamba_ssm.ops.linear import linear

compiled = pytest.mark.skipif(backends.available("cpu") != "cpp", reason="no C++ kernels")


@pytest.fixture
def own(monkeypatch):
    """Every product is the package's."""
    for place, prefix in ((module, "_"), (products, "")):
        monkeypatch.setattr(place, f"{prefix}PREFER_OWN", True)
        monkeypatch.setattr(place, f"{prefix}MIN_MULTIPLICATIONS", 0)


def is_own(out: torch.Tensor) -> bool:
    """Whether `out` is the product of the package's operator."""
    return "mamba_ssm" in type(out.grad_fn).__name__


def spread(rows: int, columns: int, layout: str) -> torch.Tensor:
    """Random numbers of a layout."""
    if layout == "slice":
        return torch.randn(rows, columns + 9)[:, 4 : columns + 4]
    return torch.randn(columns, rows).t() if layout == "transposed" else torch.randn(rows, columns)


@compiled
@pytest.mark.parametrize("isa", native.ISA_LEVELS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("layouts", [("rows", "rows"), ("slice", "transposed"), ("transposed", "slice")])
def test_product(isa, threads, layouts):
    """Sizes around a tile, a panel and a block in every direction, and none at all."""
    kernels, before = backends.pick(torch.empty(0)), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with native.isa(isa):
            sizes = [(1, 1, 1), (5, 15, 3), (6, 64, 17), (97, 65, 33), (200, 130, 7), (13, 44, 1100)]
            for rows, columns, depth in [*sizes, (7, 5, 0), (0, 3, 2)]:
                a, b, bias = spread(rows, depth, layouts[0]), spread(depth, columns, layouts[1]), torch.randn(columns)
                # whatever lies beside the result stays as it is
                out = torch.full((rows + 1, columns + 5), 7.0)
                kernels.gemm(a, b, bias, out[:rows, :columns], False)
                wanted = a.double() @ b.double() + bias.double()
                torch.testing.assert_close(out[:rows, :columns].double(), wanted, rtol=1e-5, atol=1e-4)
                kernels.gemm(a, b, None, out[:rows, :columns], True)
                wanted += a.double() @ b.double()
                torch.testing.assert_close(out[:rows, :columns].double(), wanted, rtol=1e-5, atol=2e-4)
                assert (out[rows:] == 7).all()
                assert (out[:, columns:] == 7).all()
    finally:
        torch.set_num_threads(before)


@compiled
def test_product_does_not_depend_on_the_threads():
    a, b, kernels, before = torch.randn(300, 900), torch.randn(900, 150), backends.pick(torch.empty(0)), []
    threads = torch.get_num_threads()
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        out = torch.empty(300, 150)
        kernels.gemm(a, b, None, out, False)
        before.append(out)
    torch.set_num_threads(threads)
    assert all(torch.equal(out, before[0]) for out in before)


@compiled
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "slice", "transposed"])
def test_values_and_gradients(bias, layout, own):
    x = torch.randn(3, 7, 40)
    x = {"contiguous": x, "slice": torch.randn(3, 7, 90)[..., 10:50], "transposed": x.mT.contiguous().mT}[layout]
    tensors = [x, torch.randn(24, 40), torch.randn(24) if bias else None]
    ours = [None if t is None else t.detach().requires_grad_() for t in tensors]
    wanted = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    out, reference = linear(*ours), F.linear(*wanted)
    assert is_own(out)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, [t for t in ours if t is not None], dout)
    reference_grads = torch.autograd.grad(reference, [t for t in wanted if t is not None], dout.double())
    for got, want in zip((out, *grads), (reference, *reference_grads)):
        torch.testing.assert_close(got.detach().double(), want, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(linear(*tensors), F.linear(*tensors), rtol=1e-4, atol=1e-4)


@compiled
@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        ((4, 30), (64, 40), None, r"weight has shape \(64, 40\), wanted \(out, in\) with x \(4, 30\)"),
        ((4, 40), (64, 40, 1), None, r"weight has shape \(64, 40, 1\)"),
        ((4, 40), (64, 40), (63,), r"bias has shape \(63,\), wanted \(out,\) = \(64,\)"),
        ((4, 40), (64, 40), torch.ones(64, dtype=torch.int64), "bias has dtype int64, wanted float32"),
        ((4, 40), (64, 40), torch.ones(64, device="meta"), "bias is on meta, wanted cpu"),
        ((4, 40), torch.ones(64, 40).half(), None, "weight has dtype float16, wanted float32"),
    ],
)
def test_what_does_not_fit_is_refused(x, weight, bias, message, own):
    x, weight, bias = (torch.ones(each) if isinstance(each, tuple) else each for each in (x, weight, bias))
    with pytest.raises((ValueError, TypeError), match=message):
        linear(x, weight, bias)


@compiled
def test_dispatch(own):
    """Compilers, tracers, counters and views that are not yet computed see one operator."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils.flop_counter import FlopCounterMode

    x, weight, bias = torch.randn(3, 40), torch.randn(24, 40), torch.randn(24)
    for tensors in ((x, weight, bias), (x, weight, None)):
        tensors = [None if t is None else t.requires_grad_() for t in tensors]
        torch.library.opcheck(torch.ops.mamba_ssm.linear.default, tuple(tensors))
    detached = x.detach(), weight.detach(), bias.detach()
    torch.testing.assert_close(
        make_fx(linear)(*detached)(2 * detached[0], *detached[1:]), F.linear(2 * x, weight, bias)
    )
    with FlopCounterMode(display=False) as counter:
        linear(*detached)
    assert counter.get_total_flops() == 2 * 3 * 40 * 24
    negated = torch.randn(3, 40, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    torch.testing.assert_close(linear(negated, *detached[1:]), F.linear(negated, *detached[1:]))
    with FakeTensorMode():
        assert linear(torch.empty(3, 40), torch.empty(24, 40)).shape == (3, 24)


@compiled
@pytest.mark.parametrize("prefer", [False, True])
def test_into_and_weight_gradients(prefer, own, monkeypatch):
    """A slice of a wider tensor takes the result; narrow and wide inputs both have their weight's gradient."""
    from mamba_ssm.kernels.cpp.linear import product, product_into, weight_gradient

    monkeypatch.setattr(products, "PREFER_OWN", prefer)
    for features in (12, 40):
        x, dout, whole = torch.randn(2, 9, features), torch.randn(2, 9, 48), torch.zeros(2, 9, 60)
        weight = torch.randn(48, features)
        product_into(whole[..., 6:54], x, weight)
        product_into(whole[..., 6:54], x, weight, accumulate=True)
        torch.testing.assert_close(whole[..., 6:54], 2 * product(x, weight), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(whole[..., 6:54], 2 * F.linear(x, weight), rtol=1e-4, atol=1e-4)
        assert not whole[..., :6].any()
        assert not whole[..., 54:].any()
        wanted = torch.einsum("blo,bli->oi", dout, x)
        torch.testing.assert_close(weight_gradient(dout, x), wanted, rtol=1e-4, atol=1e-4)


@compiled
@pytest.mark.parametrize("narrow", [False, True])
def test_narrow_products_have_their_own_preference(narrow, monkeypatch):
    """Where the whole product is torch's, that of a matrix that is narrow on one side may still be ours."""
    from mamba_ssm.kernels.cpp.linear import product, weight_gradient

    calls = []
    monkeypatch.setattr(products, "PREFER_OWN", False)
    monkeypatch.setattr(products, "PREFER_OWN_NARROW", narrow)
    monkeypatch.setattr(products, "MIN_MULTIPLICATIONS", 0)
    own = product.__globals__["gemm"]
    monkeypatch.setitem(product.__globals__, "gemm", lambda *arguments: (calls.append(arguments), own(*arguments)))
    product(torch.randn(3, 12), torch.randn(384, 12))
    weight_gradient(torch.randn(3, 44), torch.randn(3, 384))
    assert len(calls) == 2 * narrow
    product(torch.randn(3, 192), torch.randn(384, 192))
    assert len(calls) == 2 * narrow


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_products_of_16_bits_that_are_not_multiplied(dtype, bias, monkeypatch):
    """In float32, rounded once: under autocast, which hands on what is not rounded yet, and of rounded numbers."""
    monkeypatch.setattr(products, "WIDENED", {dtype})
    layer, x = Linear(40, 24, bias), torch.randn(3, 5, 40, requires_grad=True)
    wanted = F.linear(x, layer.weight, layer.bias)
    with torch.autocast("cpu", dtype):
        out = layer(x)
    assert torch.equal(out, wanted.to(dtype))
    given = torch.autograd.grad(out, [x, layer.weight], torch.ones_like(out))
    for grad, want in zip(given, torch.autograd.grad(wanted, [x, layer.weight], torch.ones_like(wanted))):
        torch.testing.assert_close(grad, want)
    narrow, x = layer.to(dtype), x.to(dtype)
    parameters = (None if each is None else each.float() for each in (narrow.weight, narrow.bias))
    assert torch.equal(narrow(x), F.linear(x.float(), *parameters).to(dtype))


def test_other_products_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(products, "WIDENED", {torch.bfloat16})
    x, weight = torch.randn(3, 40), torch.randn(24, 40)
    assert torch.equal(linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))
    assert linear(x.half(), weight.half()).dtype == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x.double(), weight.double()).dtype == torch.float64
    with pytest.raises(RuntimeError, match="dtype"):
        linear(x.bfloat16(), weight)
    traced = torch.jit.trace(lambda x: linear(x, weight.bfloat16()), x.bfloat16())
    assert "aten::linear" in str(traced.graph)


@compiled
def test_only_float32_products_worth_it_in_eager_mode(monkeypatch):
    monkeypatch.setattr(module, "_PREFER_OWN", True)
    layer = Linear(1024, 1024)
    assert is_own(layer(torch.randn(2, 1, 1024)))
    monkeypatch.setattr(module, "_MIN_MULTIPLICATIONS", 1 << 40)
    assert not is_own(layer(torch.randn(2, 1024)))
    monkeypatch.setattr(module, "_MIN_MULTIPLICATIONS", 0)
    assert layer.double()(torch.randn(2, 1024).double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(torch.randn(2, 1024)).dtype == torch.bfloat16
    with backend.use("torch"):
        assert not is_own(layer(torch.randn(2, 1024)))
    exported = torch.export.export(layer, (torch.randn(2, 1, 1024),))
    assert not any("mamba_ssm" in str(node.target) for node in exported.graph.nodes)
    frozen = layer.requires_grad_(False)
    x = torch.randn(4, 1024, requires_grad=True)
    frozen(x).sum().backward()
    torch.testing.assert_close(x.grad, frozen.weight.sum(0).expand(4, -1), rtol=1e-4, atol=1e-4)
