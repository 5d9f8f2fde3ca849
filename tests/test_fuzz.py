"""Random flags, checkpoint bytes, image bytes and operator arguments: a result or one sentence, never a traceback."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_conv1d import causal_conv1d_fn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, mamba_inner_ref

from benchmarks import bad_calls, bad_inputs
from benchmarks.bad_files import Place, places
from benchmarks.bad_inputs import ACCEPTED, REFUSED, Checkpoints, File
from benchmarks.jobs import JOBS
from benchmarks.program import QUICK


def bounded(examples: int) -> settings:
    """The same inputs in every run of the suite."""
    health = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=health)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints.make(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Place:
    (place,) = places(JOBS["classify"], tmp_path_factory.mktemp("images"))
    return place


@bounded(60)
@given(flags=bad_inputs.flags_of())
def test_flags(flags: list[str], one_thread: None, cifar: Path, vim_weights: Path, tmp_path: Path) -> None:
    common = [*QUICK, "--data-set", "CIFAR", "--data-path", cifar, "--teacher-path", vim_weights]
    verdict = bad_inputs.judge_program(*common, *flags, "--output_dir", tmp_path / "output")
    assert verdict in (ACCEPTED, REFUSED)


@pytest.mark.parametrize("kind", ["damaged", "with_code", "odd"])
@bounded(40)
@given(data=st.data(), use=bad_inputs.USES)
def test_checkpoints(kind: str, data: Any, use: str, one_thread: None, checkpoints: Checkpoints) -> None:
    file: File = data.draw(getattr(checkpoints, kind)())
    verdict = checkpoints.judge(file, "--resume" if kind == "odd" else use)
    assert verdict in ((REFUSED,) if kind == "with_code" else (ACCEPTED, REFUSED))


@bounded(60)
@given(data=st.data())
def test_images(data: Any, one_thread: None, images: Place) -> None:
    assert images.judge(data.draw(images.files())) in (ACCEPTED, REFUSED)


@pytest.mark.parametrize("operator", bad_calls.OPERATORS)
@bounded(int(os.environ.get("FUZZED_CALLS", "70")))
@given(data=st.data())
def test_operators(operator: str, data: Any, one_thread: None) -> None:
    call: bad_calls.Call = data.draw(bad_calls.calls(operator))
    assert bad_calls.judge_call(call) in (ACCEPTED, REFUSED)


@pytest.mark.parametrize("width", [1, 5])
def test_inner_takes_other_widths(width: int) -> None:
    """They were written out of bounds once."""
    shapes = [(2, 8, 5), (4, 1, width), (4,), (8, 4), (4, 2), (3, 4), (3,), (4, 3)]
    tensors = [torch.linspace(0.1, 1, torch.Size(shape).numel()).reshape(shape) for shape in shapes]
    torch.testing.assert_close(mamba_inner_fn(*tensors), mamba_inner_ref(*tensors))


def test_convolution_of_a_single_number_goes_back() -> None:
    """A gradient that is expanded from a scalar has strides of 0, which contiguous() keeps for one number."""
    x = torch.ones(1, 1, 1, requires_grad=True)
    causal_conv1d_fn(x, torch.full((1, 4), 2.0)).sum().backward()
    assert x.grad.item() == 2
