"""torch.compile, torch.export and ONNX: in eval mode each gives what eager execution gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from examples import export_onnx
from tests import micro_models

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


def build(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = micro_models.timm.create_model(**({"depth": 2} | MODELS[kind]))
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval(), torch.randn(3, 3, 32, 32)


@pytest.mark.parametrize("kind", MODELS)
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


@torch.no_grad()
def test_program_in_plain_operators_equals_eager() -> None:
    model, images = build("vim merging upper")
    program = export_onnx.plain_program(model, images)
    torch.testing.assert_close(program.module()(images), model(images), rtol=1e-4, atol=1e-5)
    own = [str(node.target) for node in program.graph.nodes if str(node.target).startswith(("mamba_ssm", "causal"))]
    assert not own


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_plain_operators_equal_the_kernels(reverse: bool, groups: int) -> None:
    torch.manual_seed(0)
    u, delta, z = torch.randn(3, 2, 6, 9).unbind(0)
    B, C = torch.randn(2, 2, groups, 4, 9).unbind(0)
    A, D, bias = -torch.rand(6, 4) - 0.1, torch.randn(6), torch.randn(6)
    arguments = (u, delta, A, B, C, D, z, bias, True, reverse, False)
    for plain, kernel in zip(export_onnx.plain_scan(*arguments)[:2], torch.ops.mamba_ssm.selective_scan(*arguments)):
        torch.testing.assert_close(plain, kernel, rtol=1e-4, atol=1e-5)
    weight = torch.randn(6, 4)
    for silu in (False, True):
        arguments = (u, weight, bias, silu, reverse)
        torch.testing.assert_close(
            export_onnx.plain_convolution(*arguments), torch.ops.causal_conv1d.forward(*arguments), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("kind", PUBLISHED)
def test_onnx_file_equals_eager(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, images = build(kind)
    torch.onnx.export(
        export_onnx.plain_program(model, images), (images,), str(tmp_path / "model.onnx"), external_data=False
    )
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    logits = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-4, atol=1e-5)
