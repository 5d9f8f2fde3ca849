"""Detection through the program: training by steps, evaluation, resuming, processes, precision, pictures, mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.small_data import write_shapes
from tests import detection_data
from tests.conftest import MICRO, Result, call_program, finish, lines, same, start

FLAGS = (
    *("--task", "detect", "--model", "vim_micro_patch8_32", "--batch-size", "2", "--lr", "2e-3", "--device", "cpu"),
    *("--det-channels", "8", "--det-fc-channels", "16", "--det-boxes", "16", "--det-proposals", "20"),
    *("--num_workers", "0", "--iterations", "4", "--eval-interval", "2", "--warmup-iters", "1"),
)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("made") / "shapes", 6, 4)


@pytest.fixture(scope="module")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run."""
    output = tmp_path_factory.mktemp("run")
    result = call_program(*FLAGS, "--data-path", shapes, "--output_dir", output, "--layer-decay", 0.9, "--seed", 3)
    assert result.code == 0, result.err
    return output


def test_training_logs_and_saves(run: Path) -> None:
    log = lines(run)
    assert [line["epoch"] for line in log] == [0, 1]
    for line in log:
        assert {"test_box_ap", "test_box_ap50", "test_box_ap75", "test_mask_ap", "test_box_ap_small"} <= line.keys()
        parts = [value for name, value in line.items() if name.startswith("train_loss_")]
        assert len(parts) == 9
        assert line["train_loss"] == pytest.approx(sum(parts), rel=1e-4)
    checkpoint = torch.load(run / "checkpoint.pth", weights_only=False)
    groups = checkpoint["optimizer"]["param_groups"]
    # layers near the image learn less: 4 layers of patch 8
    assert {round(group["lr_scale"], 6) for group in groups} == {round(0.9**power, 6) for power in range(6)}
    # 8/9 and 26/27 of four steps are behind it
    assert max(group["lr"] for group in groups) == pytest.approx(2e-5)


def test_evaluation_writes_predictions_and_pictures(run: Path, shapes: Path, tmp_path: Path) -> None:
    flags = [*FLAGS, "--data-path", shapes, "--eval", "--resume", run / "checkpoint.pth"]
    result = call_program(*flags, "--output_dir", tmp_path, "--visualize", tmp_path / "seen")
    assert result.code == 0, result.err
    assert f"box AP {lines(run)[-1]['test_box_ap']:.2f} %" in result.out + result.err
    predictions = json.loads((tmp_path / "predictions.json").read_text(encoding="utf-8"))
    assert {"image_id", "category_id", "bbox", "score", "segmentation"} == predictions[0].keys()
    assert {entry["image_id"] for entry in predictions} <= {1, 2, 3, 4}
    assert len(list((tmp_path / "seen").glob("image_*.png"))) == 4


def test_resume_is_exact(run: Path, shapes: Path, tmp_path: Path, stop_after: Callable[[int], None]) -> None:
    flags = [*FLAGS, "--data-path", shapes, "--layer-decay", 0.9, "--seed", 3, "--output_dir", tmp_path]
    stop_after(1)
    assert call_program(*flags).code == 0
    stopped = torch.load(tmp_path / "checkpoint.pth", weights_only=False)
    assert (stopped["epoch"], stopped["step"]) == (-1, 1)
    assert call_program(*flags, "--resume", "auto").code == 0
    first, second = (torch.load(folder / "checkpoint.pth", weights_only=False) for folder in (run, tmp_path))
    for name in ("model", "optimizer", "updates", "best_metric"):
        assert same(first[name], second[name]), name


def test_two_processes_equal_one(run: Path, shapes: Path, tmp_path: Path) -> None:
    """They train together, here without moving, and share the evaluation, in which each image counts once."""
    flags = [*FLAGS, "--data-path", shapes, "--lr", 0, "--iterations", 1, "--eval-interval", 1, "--warmup-iters", 0]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    flags += ["--finetune", run / "checkpoint.pth", "--dist-eval", "--output_dir", tmp_path]
    result = finish(start(*torchrun, MICRO, *flags))
    assert result.code == 0, result.err
    (line,), wanted = lines(tmp_path), lines(run)[-1]
    for name in ("test_box_ap", "test_box_ap50", "test_mask_ap"):
        assert line[name] == pytest.approx(wanted[name], abs=1e-3), name
    one, two = (json.loads((folder / "predictions.json").read_text(encoding="utf-8")) for folder in (run, tmp_path))
    assert [entry["image_id"] for entry in one] == [entry["image_id"] for entry in two]
    assert sum(first["category_id"] == second["category_id"] for first, second in zip(one, two)) > 0.95 * len(one)


def test_bfloat16_with_an_image_without_boxes(tmp_path: Path) -> None:
    """COCO's layout, a process of mixed precision, and images that are empty, crowded, or hold a box of no area."""
    root = detection_data.write(tmp_path)
    flags = ["--data-set", "COCO", "--data-path", root, "--input-size", 48, "--amp", "bfloat16"]
    result = call_program(*FLAGS, *flags, "--model", "fastvim_micro_patch8_32", "--output_dir", tmp_path / "out")
    assert result.code == 0, result.err
    assert "boxes without area, skipped: 1." in result.out + result.err
    for line in lines(tmp_path / "out"):
        assert line["train_loss"] < 100


def test_starting_from_a_classifier_and_from_a_detector(run: Path, shapes: Path, vim_weights: Path) -> None:
    flags = [*FLAGS, "--data-path", shapes, "--iterations", 1, "--eval-interval", 1, "--warmup-iters", 0]
    for file, told in ((vim_weights, "the backbone starts from it"), (run / "checkpoint.pth", "Weights from")):
        result = call_program(*flags, "--finetune", file)
        assert result.code == 0, result.err
        assert told in result.out + result.err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--data-set", "ADE20K"], "--data-set 'ADE20K' is no set of --task detect"),
        (["--data-set", "COCO"], "--data-path is missing"),
        (["--data-set", "COCO", "--data-path", "/nowhere"], "has no folder annotations"),
        (["--scale-range", "2", "1"], "wanted the smaller number first"),
        (["--scale-range", "1", "1e308"], "is not a number above 0 and at most 100"),
        (["--mixup", "0.8"], "--mixup belongs to --task classify"),
        (["--test-mode", "whole"], "--test-mode belongs to --task segment"),
        (["--fsdp"], "--fsdp"),
        (["--attn-only"], "--attn-only"),
        (["--decay-iters", "3", "--sched", "cosine"], "--decay-iters wants --sched multistep"),
        (["--model", "dyvm_micro_patch8_32"], "prunes"),
        (["--epochs", "2"], "contradicts --epochs"),
    ],
)
def test_mistakes_are_told(flags: list[str], told: str, program: Callable[..., Result]) -> None:
    result = program(*FLAGS, *flags)
    assert result.code == 2
    assert told in result.err, result.err
    assert "Traceback" not in result.err


def test_a_bad_annotation_ends_a_run_in_a_sentence(program: Callable[..., Result], tmp_path: Path) -> None:
    data = detection_data.annotations()
    data["annotations"][1]["category_id"] = 9
    root = detection_data.write(tmp_path, data)
    result = program(*FLAGS, "--data-set", "COCO", "--data-path", root)
    assert result.code == 2
    assert "instances_val2017.json: annotation 2 has the unknown category 9" in result.err
    other = detection_data.annotations() | {"categories": [{"id": 3}, {"id": 7}, {"id": 8}]}
    (root / "annotations" / "instances_val2017.json").write_text(
        json.dumps(detection_data.annotations()), encoding="utf-8"
    )
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(other), encoding="utf-8")
    assert "have other categories" in program(*FLAGS, "--data-set", "COCO", "--data-path", root).err
