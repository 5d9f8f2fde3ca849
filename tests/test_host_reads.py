"""What a step reads back from the device, for which a GPU must be waited for: counted by a stand-in on the CPU.

Where a GPU is, torch itself is asked to refuse such reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import timm
import torch
from causal_conv1d import backend
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import engine
import models_mamba  # noqa: F401 - its models join the registry

READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim")


class _Operations(TorchDispatchMode):
    """Counts the operations whose results' sizes or values the host must know."""

    def __init__(self, found: Counter):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        masks = [index for index in tree_leaves(args[1:]) if isinstance(index, Tensor) and index.dtype == torch.bool]
        if name in READS or (name in ("index", "index_put", "index_put_") and masks):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def host_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    """Counts what is read back to the host in the `with` block, by name."""
    found: Counter = Counter()

    def counted(name, own):
        def read(self, *args, **kwargs):
            found[name] += 1
            return own(self, *args, **kwargs)

        return read

    with monkeypatch.context() as patched, _Operations(found):
        for name in ("tolist", "cpu", "numpy"):
            patched.setattr(Tensor, name, counted(name, getattr(Tensor, name)))
        yield found


def model_of(name: str, **keywords) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, depth=3, num_classes=5, **keywords)


MODELS = {
    "vim": ("vim_nano_patch4_32", {}),
    "fastvim": ("fastvim_nano_patch4_32", {}),
    "mambareg": ("mambareg_nano_patch4_32", {}),
    "merging": ("vim_nano_patch4_32", {"fusion_strategy": "all", "fusion_token": 4}),
    "pruning": ("dyvm_nano_patch4_32", {"pruning_loc": (1, 2), "token_ratio": (0.7, 0.49)}),
}


# a model that learns to prune gives more than logits in training
UNREAD = [case for case in MODELS if case != "pruning"]


@pytest.mark.parametrize("case", UNREAD)
def test_a_training_step_reads_nothing_back(case, monkeypatch):
    name, keywords = MODELS[case]
    model, images = model_of(name, **keywords).train(), torch.randn(2, 3, 32, 32)
    with backend.use("torch"):
        model(images).sum().backward()  # what is worked out once
        with host_reads(monkeypatch) as found:
            model(images).sum().backward()
    assert found == {}


@pytest.mark.parametrize("case", MODELS)
def test_evaluation_reads_back_no_more_than_who_skips_what(case, monkeypatch):
    """Directions that an image skips are left out of all work, for which the host must know how many: once a layer."""
    name, keywords = MODELS[case]
    model, images = model_of(name, **keywords).eval(), torch.randn(2, 3, 32, 32)
    with backend.use("torch"), torch.no_grad():
        model(images)
        with host_reads(monkeypatch) as found:
            model(images)
    assert found == ({"tolist": 3} if case == "pruning" else {})


def test_parts_of_a_loss_are_read_at_once(monkeypatch):
    parts = {"loss": torch.tensor(1.5, requires_grad=True), "scale": 0.25, "other": torch.tensor(2, dtype=torch.long)}
    with host_reads(monkeypatch) as found:
        assert engine._read(parts) == {"loss": 1.5, "scale": 0.25, "other": 2.0}
    assert found == {"tolist": 1}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", UNREAD)
def test_a_training_step_on_a_gpu_does_not_wait(case):
    name, keywords = MODELS[case]
    model, images = model_of(name, **keywords).cuda().train(), torch.randn(2, 3, 32, 32, device="cuda")
    model(images).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(images).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
