"""What a step reads back from the device, for which a GPU must be waited for: counted by a stand-in on the CPU.

Where a GPU is, torch itself is asked to refuse such reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from causal_conv1d import backend
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import engine
import fusion
import models_mae  # noqa: F401 - its models join the registry
from fusion.pruning_loss import PruningLoss
from tasks.classify.losses import Classification
from tasks.classify.task import _Evaluator
from tests.conftest import QUICK, TORCH, Result
from tests.device_standins import host_reads

MODELS = {
    "vim": ("vim_nano_patch4_32", {}),
    "fastvim": ("fastvim_nano_patch4_32", {}),
    "mambareg": ("mambareg_nano_patch4_32", {}),
    "merging": ("vim_nano_patch4_32", {"fusion_strategy": "all", "fusion_token": 4}),
    "mae": ("mae_vim_nano_patch4_32", {"num_classes": 0}),
    "pruning": ("dyvm_nano_patch4_32", {"pruning_loc": (1, 2), "token_ratio": (0.7, 0.49)}),
    "tokens": (
        "dyvm_nano_patch4_32",
        {"pruning_loc": (1, 2), "token_ratio": (0.7, 0.49), "pruning": "token"},
    ),
    "static": (
        "dyvm_nano_patch4_32",
        {"pruning_loc": (1, 2), "token_ratio": (0.7, 0.49), "pruning_policy": "static"},
    ),
}


def model_of(case: str) -> nn.Module:
    torch.manual_seed(0)
    name, keywords = MODELS[case]
    return timm.create_model(name, **({"depth": 3, "num_classes": 5} | keywords))


def training_step(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """The loss of a step as training has it, with what methods measure, and its gradients."""
    criterion: Callable[..., Tensor] = lambda samples, outputs, targets: outputs.square().sum()  # noqa: E731
    targets = torch.zeros(len(images), dtype=torch.long, device=images.device)
    if model.methods.get("pruning") is not None:
        teacher = timm.create_model("vim_nano_patch4_32", depth=1, num_classes=5).to(images.device)
        criterion = PruningLoss(Classification(0.1), teacher, model.methods["pruning"])
    meters = fusion.meters_of(model)

    def step() -> Tensor:
        with engine._active(meters):
            outputs = model(images)
        outputs = outputs[0] if isinstance(outputs, tuple) and not hasattr(outputs, "logits") else outputs
        return criterion(images, outputs, targets)

    return step


@pytest.mark.parametrize("case", MODELS)
def test_a_training_step_reads_nothing_back(case, monkeypatch):
    model, images = model_of(case).train(), torch.randn(2, 3, 32, 32)
    step = training_step(model, images)
    with backend.use("torch"):
        step().backward()  # what is worked out once
        with host_reads(monkeypatch) as found:
            step().backward()
    assert found == {}


@pytest.mark.parametrize("case", MODELS)
def test_evaluation_reads_back_no_more_than_who_skips_what(case, monkeypatch):
    """Directions that an image skips are left out of all work, for which the host must know how many: once a layer."""
    model, images = model_of(case).eval(), torch.randn(2, 3, 32, 32)
    with backend.use("torch"), torch.no_grad():
        model(images)
        with host_reads(monkeypatch) as found:
            model(images)
    assert found == ({"tolist": 3} if case == "pruning" else {})


class _Crossings(TorchDispatchMode):
    """Counts what goes from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given, made = (
            {leaf.device.type for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)} for tree in (args, out)
        )
        if given and made and not made <= given:
            self.found[func._schema.name] += 1
        return out


@pytest.mark.skipif(TORCH < (2, 7), reason="fake tensors of torch 2.6 call the driver")
@pytest.mark.parametrize("case", ["fastvim", "merging", "pruning", "static"])
def test_nothing_comes_from_the_host_either(case, monkeypatch):
    """Tensors that seem to be on a GPU: the host makes none of its own that a forward pass would have to wait for."""
    made: list[object] = []
    plain = torch.tensor
    with FakeTensorMode(), backend.use("torch"), torch.device("cuda"):
        model, images = model_of(case), torch.randn(2, 3, 32, 32)
        step = training_step(model.train(), images)
        monkeypatch.setattr(torch, "tensor", lambda *args, **kwargs: made.append(args) or plain(*args, **kwargs))
        with _Crossings() as crossings:
            step()
            if case != "pruning":  # who skips what is read back
                model.eval()(images)
    assert crossings.found == {}
    assert made == []


def test_what_the_loop_reads(program: Callable[..., Result], cifar: Path, monkeypatch) -> None:
    """Beside the numbers that come by themselves (`Reading`), nothing: not in a step, an update, or an evaluation."""
    found: Counter[str] = Counter()

    def counted(place: object, name: str) -> None:
        own = getattr(place, name)

        def call(*args: object, **kwargs: object) -> object:
            with host_reads(monkeypatch, found):
                return own(*args, **kwargs)

        monkeypatch.setattr(place, name, call)

    asked: list[int] = []
    counted(engine._Passes, "__call__")
    counted(engine, "_update")
    counted(_Evaluator, "update")
    plain = _Evaluator.summary
    monkeypatch.setattr(_Evaluator, "summary", lambda self: asked.append(1) or plain(self))
    flags = (*QUICK, "--data-set", "CIFAR", "--data-path", cifar, "--batch-size", 2, "--opt", "sgd", "--clip-grad", 1)
    with backend.use("torch"):
        assert program(*flags).code == 0
    assert found == {}
    assert len(asked) == 2  # of 5 batches: after the first and the last


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", MODELS)
def test_a_training_step_on_a_gpu_does_not_wait(case):
    model, images = model_of(case).cuda().train(), torch.randn(2, 3, 32, 32, device="cuda")
    step = training_step(model, images)
    step().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
