"""Kernels are compiled before a model asks for them: in every family, by a stand-in that says who waits for one."""

from __future__ import annotations

import pytest
import timm
import torch
from causal_conv1d import _nvrtc
from causal_conv1d.kernels import cuda as conv_cuda
from causal_conv1d.kernels import registry as conv_registry
from mamba_ssm.kernels import cuda as cuda_kernels
from mamba_ssm.kernels import registry
from torch.utils._pytree import tree_leaves

from tests import micro_models  # noqa: F401 - its models join the registry
from tests.device_standins import Compiler, Unlaunched

FIRST = ["norm_forward", "conv_forward"]  # a model's first norm, and its first mixer
MODELS = {
    "Vim": ("vim", {}, FIRST),
    "Famba-V": ("fambav", {"fusion_strategy": "all", "fusion_token": 3}, FIRST),
    "Famba-V, weighted": ("fambav", {"fusion_strategy": "all", "fusion_token": 3, "fusion_weighted": True}, FIRST),
    "FastVim": ("fastvim", {}, ["norm_forward", "pooled_conv"]),
    # the first convolution behind a stage that drops tokens
    "DyVM": ("dyvm", {}, [*FIRST, "conv_forward"]),
    "DyVM, static": ("dyvm", {"pruning_policy": "static"}, FIRST),
    # its last norm has no residual
    "MambaReg": ("mambareg", {}, [*FIRST, "norm_forward"]),
    "MAE": ("mae_vim", {}, FIRST),
    "MAE, FastVim": ("mae_fastvim", {}, FIRST),
}


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """CPU tensors are those of a device of 132 multiprocessors."""
    compiler = Compiler()
    monkeypatch.setattr(_nvrtc, "device", lambda index: compiler)
    monkeypatch.setattr(registry.backends, "_loaded", {("cpu", None): cuda_kernels})
    monkeypatch.setattr(conv_registry.backends, "_loaded", {("cpu", None): conv_cuda})
    return compiler


@pytest.mark.filterwarnings("ignore:no CUDA kernel for the convolutions and gates of lines")
@pytest.mark.parametrize("case", MODELS)
def test_a_training_waits_for_the_compiler_at_the_first_layer_alone(case: str, compiler: Compiler) -> None:
    """Forward waits for what `MODELS` says, and backward for nothing: whatever it asks for was foretold in forward."""
    family, keywords, waits = MODELS[case]
    model = timm.create_model(f"{family}_micro_patch8_32", **keywords).train()
    with torch.autocast("cpu", torch.bfloat16), Unlaunched():
        results = tree_leaves(model(torch.randn(2, 3, 32, 32)))
    assert compiler.waits == waits
    foretold, forward = set(compiler.prepared), len(compiler.asked)
    loss = sum(each.float().sum() for each in results if torch.is_tensor(each) and each.requires_grad)
    with Unlaunched():
        loss.backward()
    assert compiler.waits == waits
    assert {"norm_backward", "scan_backward", "conv_backward", "reduce"} <= {
        name for name, _ in compiler.asked[forward:]
    }
    assert set(compiler.prepared) == foretold
    # nor is anything compiled in vain
    assert foretold <= set(compiler.asked)


@pytest.mark.filterwarnings("ignore:no CUDA kernel for the convolutions and gates of lines")
@pytest.mark.parametrize("case", MODELS)
def test_an_evaluation_compiles_nothing_of_the_way_back(case: str, compiler: Compiler) -> None:
    family, keywords, _ = MODELS[case]
    model = timm.create_model(f"{family}_micro_patch8_32", **keywords).eval()
    with torch.no_grad(), Unlaunched():
        model(torch.randn(2, 3, 32, 32))
    assert len(compiler.waits) == 2
    assert set(compiler.prepared) <= set(compiler.asked)
