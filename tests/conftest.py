"""What the tests of the program share: running it in this process or in others, and small data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.program import MICRO, QUICK, ROOT, Result, call_program, finish, lines, ranks_of, start
from tests import micro_models, program_data

__all__ = ["MICRO", "QUICK", "ROOT", "Result", "call_program", "finish", "lines", "ranks_of", "start"]


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
