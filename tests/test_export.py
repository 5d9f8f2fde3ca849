"""torch.compile, torch.export and ONNX: in eval mode each gives what eager execution gives."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from mamba_ssm.ops.exporting import scan_by_doubling
from mamba_ssm.ops.scan import selective_scan_fn
from torch import Tensor, nn

from tests import micro_models
from tests.conftest import TORCH, with_onnx

MODELS: dict[str, dict[str, Any]] = {
    "vim": dict(model_name="vim_micro_patch8_32"),
    "fambav": dict(model_name="fambav_micro_patch8_32", fusion_strategy="all", fusion_token=2),
    "vim merging upper": dict(
        model_name="vim_micro_patch8_32", fusion_strategy="upper", fusion_layer=0, fusion_token=2, fusion_order="raster"
    ),
    "fastvim": dict(model_name="fastvim_micro_patch8_32"),
    "dyvm token": dict(model_name="dyvm_micro_patch8_32", pruning="token", pruning_loc=(0, 1), token_ratio=(0.7, 0.5)),
}
PUBLISHED = ("vim", "fambav", "fastvim")
NO_TUPLES = "torch.export of torch 2.6 does not know a named tuple's _replace"


def build(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = micro_models.timm.create_model(**({"depth": 2} | MODELS[kind]))
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval(), torch.randn(3, 3, 32, 32)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.skipif(kind == "dyvm token" and TORCH < (2, 7), reason=NO_TUPLES))
        for kind in MODELS
    ],
)
@torch.no_grad()
def test_exported_program_equals_eager_at_any_batch_size_and_from_a_file(kind: str, tmp_path: Path) -> None:
    model, images = build(kind)
    program = torch.export.export(model, (images,), dynamic_shapes={"x": {0: torch.export.Dim("batch", max=64)}})
    torch.export.save(program, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    for batch in (images, torch.randn(1, 3, 32, 32), torch.randn(7, 3, 32, 32)):
        torch.testing.assert_close(program.module()(batch), model(batch))
    called = {str(node.target) for node in program.graph.nodes}
    assert "mamba_ssm.selective_scan.default" in called, "the kernel is one operator of the graph"


@pytest.mark.parametrize("kind", PUBLISHED)
@torch.no_grad()
def test_compiled_model_is_one_graph_and_equals_eager(kind: str) -> None:
    torch.compiler.reset()
    model, images = build(kind)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("groups", [None, 1, 2])
def test_scan_by_doubling_is_the_scan(reverse: bool, groups: int | None) -> None:
    torch.manual_seed(0)
    u, delta, z = torch.randn(3, 2, 6, 9).unbind(0)
    B, C = (torch.randn(2, 6, 4) if groups is None else torch.randn(2, 2, groups, 4, 9)).unbind(0)
    A, D, bias = -torch.rand(6, 4) - 0.1, torch.randn(6), torch.randn(6)
    wanted = selective_scan_fn(u, delta, A, B, C, D, z, bias, True, True, reverse=reverse)
    for got, want in zip(scan_by_doubling(u, delta, A, B, C, D, z, bias, True, reverse), wanted):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@with_onnx
@pytest.mark.parametrize("kind", [*PUBLISHED, "vim merging upper"])
def test_plain_onnx_export_equals_eager(kind: str, tmp_path: Path) -> None:
    """With gradients on, as a user calls it."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, images = build(kind)
    torch.onnx.export(model, (images,), str(tmp_path / "model.onnx"), external_data=False)
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    logits = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", PUBLISHED)
def test_traced_model_passes_the_tracer_s_own_check(kind: str) -> None:
    """The check runs without gradients, the trace with them."""
    model, images = build(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and tells of every shape that becomes a constant
        traced = torch.jit.trace(model, (images,))
    torch.testing.assert_close(traced(images), model(images))
    parameter = next(model.parameters())
    grads = [torch.autograd.grad(each(images).square().sum(), parameter)[0] for each in (traced, model)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)
