"""The loop's own: accumulation, rates by layer and by update, decay that ramps, epochs of a fixed number of steps."""

from __future__ import annotations

import argparse
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import TensorDataset

import datasets
import engine
import main
from loading import SeededSampler, TrainBatches
from tasks.cells.images import read_picture
from tasks.dense.data import read_annotation
from tests import micro_models  # noqa: F401 - its names
from tests.conftest import QUICK, Result, lines
from utils import RunError, UsageError
from utils.signals import StopRequest

PLAIN = (
    *("--mixup", 0, "--cutmix", 0, "--smoothing", 0, "--drop-path", 0, "--aa", "none", "--reprob", 0),
    *("--color-jitter", 0, "--no-repeated-aug", "--no-model-ema"),
)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pth", weights_only=True)["model"]


def test_accumulated_batches_make_the_step_of_the_whole(
    program: Callable[..., Result], cifar: Path, tmp_path: Path
) -> None:
    common = (*QUICK, "--data-set", "CIFAR", "--data-path", cifar, *PLAIN, "--opt", "sgd", "--unscale-lr")
    assert program(*common, "--batch-size", 8, "--output_dir", tmp_path / "whole").code == 0
    parts = program(*common, "--batch-size", 4, "--accum-iter", 2, "--output_dir", tmp_path / "parts")
    assert parts.code == 0, parts.err
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    start = timm.create_model("vim_micro_patch8_32", num_classes=100).state_dict()
    assert not torch.allclose(whole["head.weight"], start["head.weight"], atol=1e-3)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-3, atol=1e-5, msg=name)
    assert torch.load(tmp_path / "parts" / "checkpoint.pth", weights_only=True)["updates"] == 5


def test_a_stop_waits_for_the_step_that_gathers(
    program: Callable[..., Result], cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is stopped in the middle of accumulation and goes on ends as one that was not stopped, bit by bit."""
    common = (*QUICK, "--data-set", "CIFAR", "--data-path", cifar, "--batch-size", 4, "--accum-iter", 3)
    assert program(*common, "--output_dir", tmp_path / "whole").code == 0
    saved = torch.load(tmp_path / "whole" / "checkpoint.pth", weights_only=True)["optimizer"]["param_groups"]
    assert all(group["fused"] for group in saved)  # AdamW on a CPU, in one pass over the weights
    fetch, fetched = engine._fetch, []

    def stopping(batches, stop, may_stop=True):
        fetched.append(stop)
        if len(fetched) > 4 and (len(fetched) - 1) % 3 == 0:
            stop.name = "a test"
        return fetch(batches, stop, may_stop)

    monkeypatch.setattr(engine, "_fetch", stopping)
    stopped = program(*common, "--output_dir", tmp_path / "parts")
    monkeypatch.undo()
    assert "step 6" in stopped.err
    assert program(*common, "--output_dir", tmp_path / "parts", "--resume").code == 0
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(parts[name], value) for name, value in whole.items())


def test_layer_scales() -> None:
    model = timm.create_model("vim_micro_patch8_32")  # depth 4: n = 5
    scales = engine.layer_scales(model, 0.5)
    assert scales.keys() == dict(model.named_parameters()).keys()
    wanted = {"patch_embed.proj.weight": 3, "pos_embed": 3, "cls_token": 3, "layers.0.mixer.D": 2}
    wanted |= {"layers.1.norm.weight": 2, "layers.2.mixer.D": 1, "layers.3.mixer.D": 1, "head.weight": 0}
    for name, power in wanted.items():
        assert scales[name] == 0.5**power, name
    vit = timm.create_model("deit_tiny_patch16_224", depth=2)
    assert engine.layer_scales(vit, 0.5)["head.weight"] == 1
    assert engine.layer_scales(vit, 0.5)["cls_token"] < 1


def test_layer_decay_keeps_marks_and_scales_rates(program: Callable[..., Result], cifar: Path, tmp_path: Path) -> None:
    flags = (*QUICK, "--data-set", "CIFAR", "--data-path", cifar, "--layer-decay", 0.5, "--output_dir", tmp_path)
    assert program(*flags).code == 0
    groups = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["optimizer"]["param_groups"]
    fastest = max(group["lr"] for group in groups)
    for group in groups:
        assert group["lr"] == pytest.approx(fastest * group["lr_scale"])
        assert group["weight_decay"] in (0.0, 0.05)
    count = sum(1 for _ in timm.create_model("vim_micro_patch8_32").parameters())
    assert sum(len(group["params"]) for group in groups) == count


def test_rates_by_update_and_decay_that_ramps(program: Callable[..., Result], cifar: Path, tmp_path: Path) -> None:
    flags = (
        *(*QUICK[: QUICK.index("--lr")], "--data-set", "CIFAR", "--data-path", cifar, "--output_dir", tmp_path),
        *("--blr", 0.032),
        *("--sched-on-updates", "--warmup-iters", 2, "--warmup-lr", 0, "--min-lr", 0, "--weight-decay-end", 0.4),
    )
    assert program(*flags).code == 0
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert state["updates"] == 5
    decays = sorted({group["weight_decay"] for group in state["optimizer"]["param_groups"]})
    assert decays == [0, pytest.approx(0.4)]
    # two steps of warm-up from 0, then half a cosine over five: 0, 1/2, then cos at 2, 3, 4 of 5
    base = 0.032 * 8 / 256
    rates = [0, base / 2, *(base * (1 + math.cos(math.pi * t / 5)) / 2 for t in (2, 3, 4))]
    assert lines(tmp_path)[0]["train_lr"] == pytest.approx(sum(rates) / 5)


def test_iterations_are_steps_of_an_endless_stream(program: Callable[..., Result], cifar: Path, tmp_path: Path) -> None:
    flags = [*QUICK[: QUICK.index("--epochs")], "--warmup-epochs", 0, "--data-set", "CIFAR", "--data-path", cifar]
    result = program(*flags, "--iterations", 14, "--eval-interval", 7, "--output_dir", tmp_path)
    assert result.code == 0, result.err
    assert [line["n_images"] for line in lines(tmp_path)] == [56, 56]
    result = program(*flags, "--iterations", 15, "--eval-interval", 7)
    assert (result.code, result.err) == (2, "main.py: error: --eval-interval 7 does not divide --iterations 15.\n")

    sampler = SeededSampler(range(10), seed=1, rank=0, world_size=1, length=7)
    seen: list[int] = []
    for epoch in range(10):
        sampler.set_epoch(epoch)
        seen += [index for index, _ in sampler]
    for start in range(0, 70, 10):
        assert sorted(seen[start : start + 10]) == list(range(10))
    sampler.set_epoch(4, 3)
    assert [index for index, _ in sampler] == seen[4 * 7 + 3 : 5 * 7]


@pytest.mark.parametrize(
    ("flags", "epochs", "by_update", "warmup"),
    [
        ((), 1, True, 5 / 300),
        (("--eval-interval", 50), 5, True, 5 * 5 / 300),
        (("--sched", "plateau"), 1, False, 0),
        (("--warmup-epochs", 2, "--eval-interval", 50), 5, False, 2),
        (("--task", "cells", "--eval-interval", 50), 5, True, 0.5),
        (("--task", "pretrain", "--eval-interval", 125), 2, True, 2 * 5 / 300),
        (("--model", "dyvm_micro_patch8_32", "--model-path", "FILE"), 1, True, 5 / 300),
        (("--model", "dyvm_micro_patch8_32", "--model-path", "FILE", "--eval-interval", 25), 10, True, 10 * 5 / 300),
        (("--task", "segment", "--eval-interval", 50), 5, True, None),
        (("--task", "detect", "--eval-interval", 50), 5, True, None),
    ],
)
def test_iterations_outdo_every_recipe(
    flags: tuple[object, ...], epochs: int, by_update: bool, warmup: float | None, tmp_path: Path
) -> None:
    """So many steps and no more, whatever epochs a task's or a method's recipe has; the warm-up, where it is not in
    steps, keeps its share of them."""
    weights = tmp_path / "weights.pth"
    torch.save({}, weights)
    given = [str(weights) if flag == "FILE" else str(flag) for flag in flags]
    args = main.parse(["--iterations", "250", "--device", "cpu", *given])
    assert args.epochs * args.steps_per_epoch == 250
    assert (args.epochs, args.sched_on_updates) == (epochs, by_update)
    if warmup is None:
        assert 0 < args.warmup_iters <= 25
    else:
        assert args.warmup_epochs == pytest.approx(warmup)


def test_a_worker_that_dies_ends_the_run_in_a_sentence() -> None:
    class Deadly(TensorDataset):
        def __getitem__(self, index: int):
            import os

            os._exit(3)

    args = argparse.Namespace(seed=0, batch_size=2, num_workers=1, pin_mem=False)
    batches = TrainBatches(Deadly(torch.zeros(4, 1)), args)
    with pytest.raises(Exception, match="A loader worker died"):
        engine._fetch(batches.epoch(0), None)


def test_a_worker_that_gives_nothing_does_not_keep_a_signal_waiting() -> None:
    def stalled() -> Iterator[int]:
        time.sleep(60)
        yield 1

    began = time.monotonic()
    with StopRequest() as stop:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert engine._fetch(stalled(), stop) == (None, True)
        # nor does one after it; in the middle of an optimiser's step the rest of it is still wanted
        assert engine._fetch(stalled(), stop) == (None, True)
        assert engine._fetch(iter([1]), stop, may_stop=False) == (1, False)
    assert stop.name == "SIGTERM"
    assert time.monotonic() - began < 30


def test_a_signal_while_an_image_is_read_is_no_fault_of_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Image.open

    def interrupted(*args: object, **kwargs: object) -> Image.Image:
        os.kill(os.getpid(), signal.SIGTERM)
        return opened(*args, **kwargs)

    file = tmp_path / "a.png"
    Image.new("L", (8, 8)).save(file)
    monkeypatch.setattr(Image, "open", interrupted)
    for read in (datasets.load_image, lambda file: read_annotation(file, 3, (8, 8)), read_picture):
        with StopRequest() as stop:
            assert engine._fetch((read(file) for _ in range(1)), stop) == (None, True)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("unable to open file </torch_1_2> in read mode")]
)
def test_shared_memory_that_is_full_is_said(error: Exception) -> None:
    def full() -> Iterator[int]:
        raise error
        yield 1

    with pytest.raises(RunError, match="A loader worker died .*wanted more memory"):
        engine._fetch(full(), None)
    bug = RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback")
    error = bug
    with pytest.raises(RuntimeError, match="Caught"):  # a bug keeps its traceback
        engine._fetch(full(), None)


def test_flags_cut_short_are_completed_and_said(caplog: pytest.LogCaptureFixture) -> None:
    parser = main.get_args_parser()
    args, typed = parser.parse(["--batch", "128", "--world", "2"])
    assert (args.batch_size, args.world_size) == (128, 2)
    assert typed == {"batch_size", "world_size"}
    assert caplog.text.count("--batch is taken as --batch-size") == 1
    with pytest.raises(UsageError, match="--fusion could match --fusion-strategy, --fusion-layer"):
        parser.parse(["--fusion", "all"])


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (("--task", "clasify"), "--task 'clasify' is unknown; wanted classify"),
        (("--blr", 1e-3, "--lr", 1e-3), "--blr contradicts --lr"),
        (("--iterations", 5, "--epochs", 3), "--iterations contradicts --epochs"),
        (("--eval-interval", 5), "--eval-interval wants --iterations"),
        (("--warmup-iters", 5), "--warmup-iters wants --sched-on-updates"),
        (("--sched-on-updates", "--sched", "plateau"), "contradicts --sched plateau"),
        (("--amp", "bfloat16", "--no_amp"), "--amp bfloat16 contradicts"),
        (("--fsdp", "--accum-iter", 2), "--accum-iter contradicts --fsdp"),
    ],
)
def test_contradictions(flags: tuple[object, ...], wanted: str, program: Callable[..., Result]) -> None:
    result = program(*flags)
    assert result.code == 2
    assert wanted in result.err
    assert result.err.count("\n") == 1
