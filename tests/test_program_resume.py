"""A run that is stopped and resumed ends with the same bits as one that was not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import QUICK, Result, same

SETTINGS = {
    "vim": ["--num_workers", 2, "--if_amp"],
    "fambav": ["--fusion-strategy", "all", "--fusion-token", 2, "--clip-grad", 1, "--sched", "plateau"],
    "fastvim": ["--if_amp", "--amp-dtype", "float16", "--no-repeated-aug", "--cosub"],
    "dyvm": ["--mixup-mode", "elem", "--ThreeAugment", "--opt", "lamb", "--gate-noise-end", 0.2],
}


def log_lines(output: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (output / "log.txt").read_text(encoding="utf-8").splitlines()]
    return [
        {name: value for name, value in line.items() if name not in ("seconds", "peak_memory_mib")} for line in lines
    ]


@pytest.mark.parametrize("family", SETTINGS)
@pytest.mark.parametrize("stop", ["training", "evaluation"])
def test_resume_is_exact(
    family: str,
    stop: str,
    program: Callable[..., Result],
    stop_after: Callable[[int], None],
    cifar: Path,
    vim_weights: Path,
    tmp_path: Path,
) -> None:
    # 5 steps and 2 of evaluation an epoch
    flags = [*QUICK, "--model", f"{family}_micro_patch8_32", "--data-set", "CIFAR", "--data-path", cifar, "--epochs", 4]
    flags += [*SETTINGS[family], "--model-ema-decay", 0.9, "--seed", 3]
    flags += ["--model-path", vim_weights] if family == "dyvm" else []
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert program(*flags, "--output_dir", whole).code == 0

    stop_after({"training": 17, "evaluation": 13}[stop])
    stopped = program(*flags, "--output_dir", parts, "--resume", "auto")
    assert stopped.code == 0
    assert "Stopped by SIGTERM" in stopped.err
    state = torch.load(parts / "checkpoint.pth", weights_only=True)
    assert (state["epoch"], state["step"]) == {"training": (1, 3), "evaluation": (0, 5)}[stop]
    assert program(*flags, "--output_dir", parts, "--resume", "auto").code == 0

    ends = [torch.load(folder / "checkpoint.pth", weights_only=True) for folder in (whole, parts)]
    assert ends[0]["epoch"] == 3
    assert not same(state["model"], ends[0]["model"])
    assert same(*ends)
    assert len(log_lines(whole)) == 4
    assert log_lines(whole) == log_lines(parts)


def test_seed_matters(program: Callable[..., Result], cifar: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        flags = [*QUICK, "--data-set", "CIFAR", "--data-path", cifar, "--seed", seed]
        assert program(*flags, "--output_dir", tmp_path / str(seed)).code == 0
    assert log_lines(tmp_path / "0") != log_lines(tmp_path / "1")


def test_log_line_lost_or_doubled_by_a_kill(program: Callable[..., Result], cifar: Path, tmp_path: Path) -> None:
    flags = [*QUICK, "--data-set", "CIFAR", "--data-path", cifar, "--epochs", 3, "--output_dir", tmp_path]
    assert program(*flags).code == 0
    lines = (tmp_path / "log.txt").read_text(encoding="utf-8")
    # killed between checkpoint and log line, and in the middle of a line
    (tmp_path / "log.txt").write_text(
        "".join(lines.splitlines(keepends=True)[:2]) + '{"train_loss": 2.', encoding="utf-8"
    )
    assert program(*flags, "--resume", "auto").code == 0
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == lines
