"""What the tests of the program share: running it in this process or in others, and small data."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.program import MICRO, QUICK, ROOT, Result, call_program, finish, lines, ranks_of, start
from tests import micro_models, program_data
from utils import telling

__all__ = ["MICRO", "QUICK", "ROOT", "Result", "call_program", "finish", "lines", "ranks_of", "same", "start"]

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
with_onnx = pytest.mark.skipif(TORCH < (2, 9), reason="torch.onnx.export goes by torch.export from torch 2.9 on")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread: what the micro models have to compute is less than threads need to meet."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def program(one_thread: None) -> Callable[..., Result]:
    """Call the program in this process: `program(*flags)`."""
    return call_program


def same(first: Any, second: Any) -> bool:
    """Whether two checkpoints agree bit for bit; the seconds that an epoch took may differ."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(
            same(first[key], second[key]) for key in first if key not in ("seconds", "peak_memory_mib", "args")
        )
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second or (first != first and second != second)


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have a signal arrive once so many steps, of training and evaluation, are done."""

    def arrange(steps: int) -> None:
        plain, left = telling.Progress.step, [steps]

        def step(self: telling.Progress, *args: Any) -> None:
            plain(self, *args)
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(telling.Progress, "step", step)

    return arrange


@pytest.fixture(scope="session")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CIFAR-100."""
    return program_data.write_cifar100(tmp_path_factory.mktemp("cifar"))


@pytest.fixture(scope="session")
def vim_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of an untrained micro Vim for CIFAR-100."""
    torch.manual_seed(0)
    model = micro_models.timm.create_model("vim_micro_patch8_32", num_classes=100)
    path = tmp_path_factory.mktemp("weights") / "vim.pth"
    torch.save({"model": model.state_dict()}, path)
    return path
