"""Segmentation through the program: training by steps, evaluation, resuming, processes, pictures, mistakes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import run as runs
from benchmarks.small_data import write_shapes
from tasks.segment.task import Segment
from tests.conftest import MICRO, Result, call_program, finish, lines, same, start
from utils import RunError

FLAGS = (
    *("--task", "segment", "--model", "vim_micro_patch8_32", "--input-size", "32", "--batch-size", "4", "--lr", "2e-3"),
    *("--num_workers", "0", "--device", "cpu", "--iterations", "6", "--eval-interval", "3", "--warmup-iters", "1"),
)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("made") / "shapes")


@pytest.fixture(scope="module")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run."""
    output = tmp_path_factory.mktemp("run")
    result = call_program(*FLAGS, "--data-path", shapes, "--output_dir", output, "--layer-decay", 0.9, "--clip-grad", 5)
    assert result.code == 0, result.err
    return output


def test_training_logs_and_saves(run: Path) -> None:
    log = lines(run)
    assert [line["epoch"] for line in log] == [0, 1]
    for line in log:
        assert {"train_loss", "train_decode", "train_aux", "test_mIoU", "test_mAcc", "test_aAcc"} <= line.keys()
        assert line["train_loss"] == pytest.approx(line["train_decode"] + line["train_aux"], rel=1e-4)
        assert line["n_images"] == 12
    checkpoint = torch.load(run / "checkpoint.pth", weights_only=False)
    assert checkpoint["best_metric"] == max(line["test_mIoU"] for line in log)
    # layers near the image learn less: 4 layers of patch 8
    scales = {group["lr_scale"] for group in checkpoint["optimizer"]["param_groups"]}
    assert {round(scale, 6) for scale in scales} == {round(0.9**power, 6) for power in range(6)}
    # the learning rate has come down to nothing
    assert max(group["lr"] for group in checkpoint["optimizer"]["param_groups"]) < 4e-4


def test_evaluation_writes_predictions_and_pictures(run: Path, shapes: Path, tmp_path: Path) -> None:
    flags = [*FLAGS, "--data-path", shapes, "--eval", "--resume", run / "checkpoint.pth"]
    result = call_program(*flags, "--output_dir", tmp_path, "--visualize", tmp_path / "seen")
    assert result.code == 0, result.err
    wanted = lines(run)[-1]
    told = result.out + result.err
    assert f"mIoU {wanted['test_mIoU']:.2f} %" in told
    for name in ("disc", "triangle", "ring", "cross", "digit", "background"):
        assert f"{name}: IoU" in told
    files = sorted((tmp_path / "predictions").iterdir())
    assert [file.stem for file in files] == [f"shapes_{number:04}" for number in range(5)]
    hits = pixels = 0
    for file in files:
        prediction = np.asarray(Image.open(file)).astype(int)
        truth = np.asarray(Image.open(shapes / "annotations" / "validation" / file.name)).astype(int)
        hits, pixels = hits + (prediction == truth)[truth > 0].sum(), pixels + (truth > 0).sum()
    assert 100 * hits / pixels == pytest.approx(wanted["test_aAcc"], abs=1e-6)
    assert len(list((tmp_path / "seen").glob("image_*.png"))) == 5
    whole = call_program(*flags, "--test-mode", "whole")
    assert whole.code == 0, whole.err


@pytest.mark.parametrize("family", ["fastvim", "dyvm"])
def test_resume_is_exact(family: str, shapes: Path, tmp_path: Path, stop_after: Callable[[int], None]) -> None:
    flags = [*FLAGS, "--data-path", shapes, "--model", f"{family}_micro_patch8_32", "--seed", 3]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert call_program(*flags, "--output_dir", whole).code == 0
    stop_after(5)
    assert call_program(*flags, "--output_dir", parts).code == 0
    stopped = torch.load(parts / "checkpoint.pth", weights_only=False)
    assert (stopped["epoch"], stopped["step"]) != (1, 0)
    assert call_program(*flags, "--output_dir", parts, "--resume", "auto").code == 0
    first, second = (torch.load(folder / "checkpoint.pth", weights_only=False) for folder in (whole, parts))
    for name in ("model", "optimizer", "updates", "best_metric"):
        assert same(first[name], second[name]), name
    drop = {"seconds", "peak_memory_mib"}
    logs = [[{k: v for k, v in line.items() if k not in drop} for line in lines(folder)] for folder in (whole, parts)]
    assert logs[0] == logs[1]
    if family == "dyvm":
        assert {"train_token_ratio", "train_block_ratio", "train_kept_tokens_1", "test_kept_tokens_1"} <= logs[0][
            0
        ].keys()
        seen = ["--eval", "--resume", whole / "checkpoint.pth", "--visualize", tmp_path / "seen"]
        result = call_program(*flags, *seen)
        assert result.code == 0, result.err
        assert "Kept tokens, stage by stage" in result.out + result.err
        assert len(list((tmp_path / "seen").glob("image_*_kept.png"))) == 5
        assert (tmp_path / "seen" / "directions.png").is_file()


def test_a_step_that_is_skipped_leaves_no_trace_in_statistics(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BatchNorm takes in a batch before anyone knows that its loss is not finite; one such batch would stay in the
    running figures for ever, and a model that has them is not saved."""
    plain, calls = Segment.prepare, [0]

    def prepare(self: Segment, batch: Any, training: bool) -> tuple[Any, Any, int]:
        images, labels, count = plain(self, batch, training)
        calls[0] += training
        return (images * float("nan") if training and calls[0] == 2 else images), labels, count

    monkeypatch.setattr(Segment, "prepare", prepare)
    flags = [*FLAGS, "--data-path", shapes, "--output_dir", tmp_path, "--if_continue_inf", "--no-model-ema"]
    result = call_program(*flags)
    assert result.code == 0, result.err
    assert "The loss is nan at epoch 0 step 1" in result.err
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=False)
    assert state["updates"] == 5
    assert all(bool(value.isfinite().all()) for value in state["model"].values())
    run = SimpleNamespace(model=torch.nn.BatchNorm2d(2), epoch=4)
    run.model.running_var.fill_(math.inf)
    with pytest.raises(RunError, match="running_var is not finite in epoch 4"):
        runs.save_run(run, None, tmp_path)


def test_two_processes_equal_one(shapes: Path, tmp_path: Path) -> None:
    """On the same global batch, BatchNorm and all; and the shared evaluation counts every image once."""
    command = [*FLAGS, "--data-path", shapes, "--drop-path", 0, "--drop", 0, "--opt", "sgd"]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    pair = start(*torchrun, MICRO, *command, "--batch-size", 2, "--dist-eval", "--output_dir", tmp_path / "two")
    assert call_program(*command, "--batch-size", 4, "--output_dir", tmp_path / "one").code == 0
    result = finish(pair)
    assert result.code == 0, result.err
    one, two = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=False)["model"] for name in ("one", "two"))
    for name, value in one.items():
        if value.is_floating_point():
            assert float((value - two[name]).abs().max()) <= 1e-5 * max(float(value.abs().max()), 1.0), name
    logs = [lines(tmp_path / name) for name in ("one", "two")]
    for line, other in zip(*logs):
        assert line["test_mIoU"] == pytest.approx(other["test_mIoU"], abs=0.5)


def test_starting_from_a_classifier_and_from_a_segmenter(run: Path, shapes: Path, vim_weights: Path) -> None:
    flags = [*FLAGS, "--data-path", shapes, "--iterations", 1, "--eval-interval", 1, "--warmup-iters", 0]
    result = call_program(*flags, "--finetune", vim_weights)
    assert result.code == 0, result.err
    assert "the backbone starts from it" in result.out + result.err
    result = call_program(*flags, "--finetune", run / "checkpoint.pth")
    assert result.code == 0, result.err
    result = call_program(*flags, "--model", "dyvm_micro_patch8_32", "--finetune", vim_weights)
    assert result.code == 0, result.err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--data-set", "COCO"], "--data-set 'COCO' is no set of --task segment"),
        (["--data-set", "ADE20K"], "--data-path is missing"),
        (["--data-set", "ADE20K", "--data-path", "/nowhere"], "is no folder"),
        (["--seg-classes", "disc", "ring"], "SHAPES has its own"),
        (["--seg-classes", "disc", "disc"], "names 2 classes, 1 of them apart"),
        (["--slide-stride", "33"], "--slide-stride 33 is more than --input-size 32"),
        (["--test-mode", "whole", "--slide-stride", "8"], "contradicts --test-mode whole"),
        (["--scale-range", "2", "1"], "wanted the smaller number first"),
        (["--scale-range", "1", "1e308"], "is not a number above 0 and at most 100"),
        (["--mixup", "0.8"], "--mixup belongs to --task classify"),
        (["--fsdp"], "--fsdp"),
        (["--attn-only"], "--attn-only"),
        (["--no-train-mode"], "--no-train-mode"),
        (["--model", "resnet18", "--dense-feature", "stream"], "wants a Vision Mamba"),
        (["--spatial-pool", "alternate", "--pruning", "block"], "without pruning"),
        (["--epochs", "2"], "contradicts --epochs"),
    ],
)
def test_mistakes_are_told(flags: list[str], told: str, program: Callable[..., Result]) -> None:
    result = program(*FLAGS, *flags)
    assert result.code == 2
    assert told in result.err, result.err
    assert "Traceback" not in result.err


def test_a_bad_annotation_ends_a_run_in_a_sentence(program: Callable[..., Result], tmp_path: Path) -> None:
    root = write_shapes(tmp_path / "shapes", 4, 3)
    file = root / "annotations" / "training" / "shapes_0003.png"
    Image.fromarray(np.asarray(Image.open(file)) + np.uint8(100)).save(file)
    result = program(*FLAGS, "--data-path", root, "--num_workers", 1)
    assert result.code == 2
    assert "shapes_0003.png has the value" in result.err
    result = program(*FLAGS, "--data-path", root, "--batch-size", 1)
    assert result.code == 2
    assert "wanted 2 or more" in result.err
    (root / "objectInfo150.txt").unlink()
    assert program(*FLAGS, "--data-path", root).code == 2


def test_published_layout_with_a_folder_around_it(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "ADEChallengeData2016").symlink_to(shapes)
    flags = [*FLAGS, "--data-set", "ADE20K", "--data-path", tmp_path, "--iterations", 2, "--eval-interval", 2]
    names = [f"kind {number}" for number in range(7)]
    result = call_program(*flags, "--slide-stride", 32, "--seg-classes", *names, "--output_dir", tmp_path / "out")
    assert result.code == 0, result.err
    weights = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=False)["model"]
    assert len(weights["decode_head.conv_seg.weight"]) == len(names)
    assert json.loads((tmp_path / "out" / "args.json").read_text(encoding="utf-8"))["slide_stride"] == 32
