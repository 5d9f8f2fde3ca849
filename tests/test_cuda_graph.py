"""Steps replayed from a CUDA graph, by a stand-in that does the recorded operations again; no GPU has run them yet."""

from __future__ import annotations

import argparse
import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
from causal_conv1d import backend
from torch import Tensor

import engine
import fusion
import main
from tests.conftest import QUICK, Result, lines, same
from tests.device_standins import Recorder
from utils import RunError, UsageError, graphs

CPU = torch.device("cpu")


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[graphs.Replayed]]:
    """What is replayed, on a machine that seems to have a GPU; a call is recorded after one that runs as it is."""
    made: list[graphs.Replayed] = []
    plain = graphs.Replayed.__init__

    def init(self: graphs.Replayed, *args: object) -> None:
        plain(self, *args)
        made.append(self)

    monkeypatch.setattr(graphs.Replayed, "__init__", init)
    monkeypatch.setattr(graphs, "Recorder", Recorder)
    monkeypatch.setattr(graphs, "available", lambda device: True)
    monkeypatch.setattr(graphs, "WARM_UP", 1)
    with backend.use("torch"):
        yield made


def test_replays_do_what_was_recorded() -> None:
    weight, calls = torch.ones(3, requires_grad=True), []

    def call(given: dict[str, Tensor], factor: int) -> list[Tensor]:
        calls.append(factor)
        loss = factor * (weight * given["x"]).sum()
        loss.backward()
        return [loss.detach(), torch.rand(())]

    replayed = graphs.Replayed(call, Recorder(CPU))
    torch.manual_seed(0)
    wanted = [float(torch.rand(())) for _ in range(8)]
    torch.manual_seed(0)
    for step in range(6):
        loss, drawn = replayed({"x": torch.full((3,), float(step))}, 2)
        assert (float(loss), float(drawn)) == (6 * step, wanted[step])
    assert weight.grad.tolist() == [2.0 * sum(range(6))] * 3  # recording itself added none
    assert (replayed.replays, len(calls)) == (3, graphs.WARM_UP + 1)
    # what is not as recorded runs as it is: another factor, another shape
    assert float(replayed({"x": torch.ones(3)}, 3)[0]) == 9
    weight.grad = None
    assert float(replayed({"x": torch.ones(2, 3)}, 2)[0]) == 12
    assert (replayed.replays, len(calls)) == (3, graphs.WARM_UP + 3)


def test_what_waits_cannot_be_recorded() -> None:
    replayed = graphs.Replayed(lambda x: x[x > 0].sum(), Recorder(CPU))
    for _ in range(graphs.WARM_UP):
        assert float(replayed(torch.ones(3))) == 3
    with pytest.raises(RunError, match=r"^No CUDA graph could be recorded \(operation not permitted"):
        replayed(torch.ones(3))


def test_numbers_arrive() -> None:
    tensors = [
        torch.tensor(1.5, requires_grad=True),
        torch.tensor([[2, 3]]),
        torch.tensor([0.25], dtype=torch.bfloat16),
    ]
    arrived = graphs.Reading(tensors).arrived()
    assert [part.tolist() for part in arrived] == [1.5, [[2.0, 3.0]], [0.25]]
    assert {part.dtype for part in arrived} == {torch.float64}


def test_a_graph_goes_with_its_epoch(recorders: list[graphs.Replayed]) -> None:
    """At once, not when Python next looks for circles: the next one wants the memory."""
    task = argparse.Namespace(meters=list)
    passes = engine._Passes(argparse.Namespace(task=task, device=CPU), argparse.Namespace(cuda_graph=True))
    recorders.clear()
    left = weakref.ref(passes._pass)
    assert left() is not None
    gc.disable()
    try:
        del passes
        assert left() is None
    finally:
        gc.enable()


FLAGS = (*QUICK, "--epochs", 2, "--batch-size", 4, "--drop-path", 0.2, "--sched-on-updates")


@pytest.mark.parametrize(
    "more",
    [("--accum-iter", 3, "--clip-grad", 1, "--model-ema-decay", 0.9), ("--amp", "float16", "--weight-decay-end", 0.3)],
    ids=["accumulated", "float16"],
)
def test_a_replayed_training_is_the_plain_one(
    more: tuple[object, ...],
    program: Callable[..., Result],
    cifar: Path,
    tmp_path: Path,
    recorders: list[graphs.Replayed],
) -> None:
    """Bit by bit: weights, averages, optimiser, scaler, log; with mixup, drop-path, and a last step of fewer."""
    common = (*FLAGS, *more, "--data-set", "CIFAR", "--data-path", cifar)
    for folder, flags in (("plain", ()), ("replayed", ("--cuda-graph",))):
        result = program(*common, *flags, "--output_dir", tmp_path / folder)
        assert result.code == 0, result.err
    plain, replayed = (
        torch.load(tmp_path / folder / "checkpoint.pth", weights_only=True) for folder in ("plain", "replayed")
    )
    assert same(plain, replayed)
    assert plain["updates"] == (8 if "--accum-iter" in more else 20)
    steps = [each.replays for each in recorders]
    # of 10 batches in an epoch the first is warmed up with; 3, 3, 3 and 1 of them make a step, the last an odd one
    assert steps[::2] == 2 * [8 if "--accum-iter" in more else 9]
    assert all(count >= 1 for count in steps[1::2]), steps  # the evaluations


def test_pruning_trains_from_a_graph(
    program: Callable[..., Result],
    cifar: Path,
    vim_weights: Path,
    tmp_path: Path,
    recorders: list[graphs.Replayed],
) -> None:
    """The teacher, the keep targets and what meters add up are in it; evaluations, which skip directions, are not."""
    common = (
        *("--model", "vim_micro_patch8_32", "--pruning", "both", "--pruning-loc", 1, 2, "--model-path", vim_weights),
        *("--epochs", 2, "--gate-noise-end", 0, *FLAGS[2:6], "--batch-size", 8, "--warmup-epochs", 0, "--no-model-ema"),
        *("--data-set", "CIFAR", "--data-path", cifar),
    )
    for folder, flags in (("plain", ()), ("replayed", ("--cuda-graph",))):
        result = program(
            *common, *flags, "--data-set", "CIFAR", "--data-path", cifar, "--output_dir", tmp_path / folder
        )
        assert result.code == 0, result.err
    assert "Evaluations are not replayed from a CUDA graph: learned pruning leaves out" in result.out
    assert [each.replays for each in recorders] == [4, 4]
    plain, replayed = (lines(tmp_path / folder) for folder in ("plain", "replayed"))
    assert same(plain, replayed)
    assert {"train_kept_tokens_1", "train_kept_directions", "train_logit_kl"} <= plain[0].keys()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ((), ""),
        (("--task", "pretrain", "--model", "mae_vim_nano_patch4_32"), ""),
        (("--task", "segment", "--model", "vim_nano_patch4_32"), ""),
        (("--fusion-strategy", "all"), ""),
        (("--fusion-strategy", "all", "--fusion-matching", "random"), "the host chooses which tokens are fused"),
        (("--if_random_token_rank",), "the host draws where tokens stand"),
        (("--task", "cells"), "every batch of cells has the channels"),
        (("--task", "detect", "--model", "vim_nano_patch4_32"), "images have sizes of their own"),
        (("--task", "segment", "--model", "vim_nano_patch4_32", "--eval"), "at sizes of their own"),
        (("--model", "dyvm_nano_patch4_32", "--eval"), "learned pruning leaves out what an image skips"),
        (("--model", "dyvm_nano_patch4_32", "--eval", "--pruning-policy", "static"), ""),
        (("--fsdp",), "--cuda-graph contradicts --fsdp"),
    ],
)
def test_what_varies_is_refused(
    flags: tuple[str, ...], told: str, recorders: list[graphs.Replayed], vim_weights: Path
) -> None:
    weights = ("--finetune", str(vim_weights)) if "--eval" in flags else ()
    argv = ["--cuda-graph", *("--model", "vim_nano_patch4_32")[: 0 if "--model" in flags or "cells" in flags else 2]]
    if not told:
        assert main.parse([*argv, *flags, *weights]).cuda_graph
        return
    with pytest.raises(UsageError) as caught:
        main.parse([*argv, *flags, *weights])
    assert told in str(caught.value)
    assert str(caught.value).endswith((".", "it without."))


def test_who_cannot_record_says_so(program: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = program("--cuda-graph", *QUICK)
    wanted = "main.py: error: --cuda-graph wants a CUDA device, and this run is on the CPU; wanted it without.\n"
    assert (result.code, result.err) == (2, wanted)
    with pytest.raises(UsageError, match="trains in one process"):
        engine.check_processes(argparse.Namespace(cuda_graph=True, distributed=True, eval=False))
    engine.check_processes(argparse.Namespace(cuda_graph=True, distributed=True, eval=True))


def test_a_model_says_what_the_host_draws() -> None:
    assert fusion.varies(timm.create_model("vim_micro_patch8_32", flip_img_sequences_ratio=0.5), True)
    assert not fusion.varies(timm.create_model("vim_micro_patch8_32", flip_img_sequences_ratio=0.5), False)
    channels = timm.create_model("fastchannelvim_nano_patch4_32", depth=2)
    assert fusion.varies(channels, True) == "the host draws which channels are seen"
    assert not fusion.varies(channels, False)


def test_numbers_that_are_looked_at_late(
    program: Callable[..., Result], cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: a loss that is none is found two steps on, with its own step and batch."""
    common = (*QUICK, "--data-set", "CIFAR", "--data-path", cifar)
    monkeypatch.setitem(engine.LATE, "cpu", 2)
    plain, steps = engine._Passes.__call__, []

    def third_is_none(self, inputs, targets, group):
        steps.append(inputs)
        if len(steps) == 3:
            inputs.fill_(float("nan"))
        return plain(self, inputs, targets, group)

    monkeypatch.setattr(engine._Passes, "__call__", third_is_none)
    result = program(*common, "--output_dir", tmp_path / "nan")
    assert (result.code, len(steps)) == (1, 5)
    assert "The loss is nan at epoch 0 step 2; its batch is in" in result.err
    batch = torch.load(tmp_path / "nan" / "nonfinite_epoch0_step2_rank0.pt", weights_only=True)
    assert bool(batch["samples"].isnan().all())
    assert not (tmp_path / "nan" / "checkpoint.pth").exists()
    # where steps are left out, they are looked at before the next
    steps.clear()
    result = program(*common, "--if_continue_inf", "--output_dir", tmp_path / "left_out")
    assert result.code == 0
    assert torch.load(tmp_path / "left_out" / "checkpoint.pth", weights_only=True)["updates"] == 4


def test_an_epoch_that_a_signal_ends_has_all_its_late_numbers(
    program: Callable[..., Result],
    cifar: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_after: Callable[[int], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The log of a run whose numbers are looked at in time, and of one that is late and stopped."""
    common = (*QUICK, "--data-set", "CIFAR", "--data-path", cifar)
    assert program(*common, "--output_dir", tmp_path / "whole").code == 0
    monkeypatch.setitem(engine.LATE, "cpu", 2)
    caplog.set_level(logging.ERROR)
    stop_after(3)
    program(*common, "--output_dir", tmp_path / "parts")
    monkeypatch.undo()
    assert program(*common, "--resume", "--output_dir", tmp_path / "parts").code == 0
    assert same(lines(tmp_path / "whole"), lines(tmp_path / "parts"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_gpu_trains_from_a_graph(program: Callable[..., Result], cifar: Path, tmp_path: Path, dtype: str) -> None:
    more = ("--device", "cuda", "--amp", dtype, "--accum-iter", 2)
    common = (*FLAGS, *more, "--data-set", "CIFAR", "--data-path", cifar)
    for folder, flags in (("plain", ()), ("replayed", ("--cuda-graph",))):
        result = program(*common, *flags, "--output_dir", tmp_path / folder)
        assert result.code == 0, result.err
    for plain, replayed in zip(lines(tmp_path / "plain"), lines(tmp_path / "replayed")):
        assert replayed["train_loss"] == pytest.approx(plain["train_loss"], rel=2e-2)
        assert replayed["test_loss"] == pytest.approx(plain["test_loss"], rel=5e-2)
