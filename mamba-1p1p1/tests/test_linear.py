"""The mixer's linear layers against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from mamba_ssm.modules import linear as module
from mamba_ssm.modules.linear import Linear, linear

onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="torch without oneDNN",
)


@onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "slice", "transposed"])
def test_values_and_gradients(bias, layout, monkeypatch):
    monkeypatch.setattr(module, "_PREFER_ONEDNN", True)
    monkeypatch.setattr(module, "_MIN_MULTIPLICATIONS", 0)
    x = torch.randn(3, 7, 40)
    x = {"contiguous": x, "slice": torch.randn(3, 7, 90)[..., 10:50], "transposed": x.mT.contiguous().mT}[layout]
    tensors = [x, torch.randn(24, 40), torch.randn(24) if bias else None]
    ours = [None if t is None else t.detach().requires_grad_() for t in tensors]
    wanted = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    out, reference = linear(*ours), F.linear(*wanted)
    assert "OneDNN" in type(out.grad_fn).__name__
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, [t for t in ours if t is not None], dout)
    reference_grads = torch.autograd.grad(reference, [t for t in wanted if t is not None], dout.double())
    for got, want in zip((out, *grads), (reference, *reference_grads)):
        torch.testing.assert_close(got.detach().double(), want, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(linear(*tensors), F.linear(*tensors), rtol=1e-4, atol=1e-4)


@onednn
def test_only_float32_products_worth_it_in_eager_mode(monkeypatch):
    monkeypatch.setattr(module, "_PREFER_ONEDNN", True)
    layer = Linear(1024, 1024)
    assert "OneDNN" in type(layer(torch.randn(2, 1, 1024)).grad_fn).__name__
    assert "OneDNN" not in type(layer(torch.randn(1, 1024)).grad_fn).__name__
    assert layer.double()(torch.randn(2, 1024).double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(torch.randn(2, 1024)).dtype == torch.bfloat16
    exported = torch.export.export(layer, (torch.randn(2, 1, 1024),))
    assert not any("mkldnn" in str(node.target) for node in exported.graph.nodes)
    frozen = layer.requires_grad_(False)
    x = torch.randn(4, 1024, requires_grad=True)
    frozen(x).sum().backward()
    torch.testing.assert_close(x.grad, frozen.weight.sum(0).expand(4, -1), rtol=1e-4, atol=1e-4)
