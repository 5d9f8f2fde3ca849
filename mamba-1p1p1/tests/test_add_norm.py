"""Residual addition and normalisation: every CPU backend against autograd through the formula."""

import pytest
import torch
from causal_conv1d import backend
from mamba_ssm.kernels.registry import backends
from mamba_ssm.ops.triton.layernorm import RMSNorm, layer_norm_fn, rms_norm_fn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def formula(x, weight, bias, residual, eps, rms):
    total = x if residual is None else x + residual
    centered = total if rms else total - total.mean(-1, keepdim=True)
    out = centered / torch.sqrt(centered.square().mean(-1, keepdim=True) + eps) * weight
    return out if bias is None else out + bias, total


def assert_as_formula(shape, dtype, residual_dtype, rms, with_bias, prenorm, layout=None):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator).to(dtype) + 1
    if layout == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    residual = None if residual_dtype is None else torch.randn(shape, generator=generator).to(residual_dtype)
    weight = torch.randn(shape[-1], generator=generator)
    bias = torch.randn(shape[-1], generator=generator) if with_bias else None
    inputs = [t if t is None else t.detach().requires_grad_() for t in (x, weight, bias, residual)]
    wide = [t if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias, residual)]
    douts = [torch.randn(shape, generator=generator) for _ in range(2)]

    found = layer_norm_fn(*inputs, eps=1e-5, prenorm=prenorm, residual_in_fp32=True, is_rms_norm=rms)
    found = found if prenorm else (found,)
    wanted = formula(*wide, 1e-5, rms)[: len(found)]
    assert found[0].dtype == dtype
    assert len(found) == 1 or found[1].dtype == torch.float32
    tolerance = max(TOLERANCE[dtype], TOLERANCE[residual_dtype or dtype])
    for got, want in zip(found, wanted):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * want.abs().max().item())

    grads = torch.autograd.grad(
        found, [t for t in inputs if t is not None], [dout.to(y.dtype) for dout, y in zip(douts, found)]
    )
    douts = [dout.to(y.dtype).double() for dout, y in zip(douts, found)]
    want_grads = torch.autograd.grad(wanted, [t for t in wide if t is not None], douts)
    for got, want in zip(grads, want_grads):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=2 * tolerance * want.abs().max().item())


@pytest.mark.parametrize("shape", [(2, 7, 192), (5, 33), (1, 3), (40, 100)])
@pytest.mark.parametrize("rms", [True, False])
def test_shapes(shape, rms, kernels):
    for residual_dtype in (None, torch.float32):
        for prenorm in (True, False):
            assert_as_formula(shape, torch.float32, residual_dtype, rms, True, prenorm)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual_dtype", [*DTYPES, None], ids=str)
def test_dtypes(dtype, residual_dtype, kernels):
    for rms in (True, False):
        assert_as_formula((3, 5, 40), dtype, residual_dtype, rms, not rms, True)


def test_layout(kernels):
    assert_as_formula((3, 5, 40), torch.float32, torch.float32, True, False, True, "transposed")


def test_sum_keeps_residual_dtype():
    x, weight = torch.randn(2, 8), torch.ones(8)
    _, total = rms_norm_fn(x, weight, None, x.bfloat16(), prenorm=True)
    assert total.dtype == torch.bfloat16
    _, total = rms_norm_fn(x.half(), weight, None, prenorm=True)
    assert total.dtype == torch.float16


def test_module_equals_function():
    norm, x = RMSNorm(8), torch.randn(3, 8)
    torch.testing.assert_close(norm(x), rms_norm_fn(x, norm.weight, None, eps=1e-5))


def test_empty_batch(kernels):
    x = torch.randn(0, 8, requires_grad=True)
    weight = torch.ones(8, requires_grad=True)
    rms_norm_fn(x, weight, None).sum().backward()
    assert not weight.grad.any()


@pytest.mark.parametrize("name", ["torch", "cpp"])
def test_opcheck(name):
    x, weight = torch.randn(3, 9, requires_grad=True), torch.randn(9, requires_grad=True)
    with backend.use(name if backends.available("cpu") == name else "torch"):
        for residual, dtype in ((torch.randn(3, 9, requires_grad=True), torch.float32), (None, torch.bfloat16)):
            args = (x, residual, weight, weight, 1e-5, residual is None, dtype)
            torch.library.opcheck(torch.ops.mamba_ssm.add_norm.default, args)
            out, total, mean, scale = (t.detach() for t in torch.ops.mamba_ssm.add_norm(*args))
            args = (out, total, total, mean, scale, weight.detach(), None, True, torch.float32)
            torch.library.opcheck(torch.ops.mamba_ssm.add_norm_backward.default, args)


def test_float64():
    x, weight = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.rand(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rms_norm_fn(x, weight, None, x, prenorm=True), x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(3)}, r"weight has shape \(3,\), wanted \(size,\) = \(4,\)"),
        ({"bias": torch.ones(1)}, r"bias has shape \(1,\), wanted \(size,\) = \(4,\)"),
        ({"residual": torch.ones(1, 4)}, r"residual has shape \(1, 4\), wanted the shape of x = \(2, 4\)"),
        ({"x": torch.ones(2, 0)}, r"x has shape \(2, 0\), wanted \(..., size\)"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        layer_norm_fn(**{"x": torch.ones(2, 4), "weight": torch.ones(4), "bias": None} | change)
