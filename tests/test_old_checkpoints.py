"""Checkpoints that the program wrote before it had tasks: evaluated and gone on from as they were then.

`tests/fixtures/before_tasks` holds one of each method after the first of two epochs on the digits, and the log of both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Result, lines

FOLDER = Path(__file__).parent / "fixtures" / "before_tasks"
RUNS = json.loads((FOLDER / "logs.json").read_text(encoding="utf-8"))
COMMON = (
    *("--input-size", 32, "--batch-size", 128, "--num_workers", 0, "--device", "cpu", "--warmup-epochs", 0),
    *("--lr", 0.01, "--epochs", 2, "--no-repeated-aug"),
)


@pytest.mark.parametrize("name", RUNS)
def test_old_checkpoints_are_evaluated_and_resumed(name: str, program: Callable[..., Result], tmp_path: Path) -> None:
    flags = [FOLDER / flag if flag.endswith(".pth") else flag for flag in RUNS[name]["flags"]]
    first, second = RUNS[name]["epochs"]
    checkpoint = FOLDER / f"{name}.pth"
    result = program(*COMMON, *flags, "--eval", "--resume", checkpoint)
    assert result.code == 0, result.err
    loss = re.search(r"Accuracy on the 360 test images: top-1 [\d.]+ %, top-5 [\d.]+ %, loss ([\d.]+)", result.out)
    assert float(loss[1]) == pytest.approx(first["test_loss"], rel=1e-3)
    result = program(*COMMON, *flags, "--resume", checkpoint, "--output_dir", tmp_path / "run")
    assert result.code == 0, result.err
    log = lines(tmp_path / "run")
    assert [line["epoch"] for line in log] == [0, 1]
    assert log[0]["test_loss"] == first["test_loss"]
    for figure in ("train_loss", "train_lr", "test_loss"):
        assert log[1][figure] == pytest.approx(second[figure], rel=2e-3)
