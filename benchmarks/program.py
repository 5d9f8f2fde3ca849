"""The program, run in this process or in others: what its tests and trials share."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import benchmarks.micro_models  # noqa: F401 - their names join the registry

ROOT = Path(__file__).resolve().parents[1]
MICRO = str(ROOT / "benchmarks" / "micro_models.py")
# what makes an epoch on the small data short, and every step of it a step that trains
SMALL = ("--batch-size", "8", "--num_workers", "0", "--device", "cpu")
EPOCH = ("--epochs", "1", "--warmup-epochs", "0", "--lr", "0.05")
QUICK = ("--model", "vim_micro_patch8_32", *SMALL, *EPOCH)


@dataclass
class Result:
    """How a run of the program ended."""

    code: int
    out: str
    err: str


def call_program(*flags: object) -> Result:
    """Run the program in this process."""
    import main

    handlers, level = logging.root.handlers[:], logging.root.level
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main.main([str(flag) for flag in flags])
    finally:
        logging.root.handlers[:], logging.root.level = handlers, level
    return Result(code, out.getvalue(), err.getvalue())


def start(*command: object, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a python command in a process group of its own, on one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | (env or {})
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def go_on(process: subprocess.Popen[str], seconds: float) -> None:
    """Let what `start` started go on for `seconds`, and take what it says: a pipe that nobody reads gets full, and then
    who writes to it waits for ever."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=seconds)


def finish(process: subprocess.Popen[str], timeout: float = 240) -> Result:
    """Wait for what `start` started, as many seconds as `timeout` says without those in which all are stopped. Raises
    subprocess.TimeoutExpired after them."""
    for left in range(math.ceil(timeout), 0, -1):
        try:
            out, err = process.communicate(timeout=1)
            break
        except subprocess.TimeoutExpired:
            if left == 1:
                raise
    return Result(process.returncode, out, err)


def lines(output: Path) -> list[dict[str, float]]:
    """What log.txt of a run's `output` folder holds."""
    return [json.loads(line) for line in (output / "log.txt").read_text(encoding="utf-8").splitlines()]


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """The process ids of the ranks that a launcher started, by rank."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
                variables = (entry / "environ").read_text(encoding="utf-8").split("\0")
            except (OSError, ValueError):
                continue
            rank = [int(text[5:]) for text in variables if text.startswith("RANK=")]
            if parent == process.pid and rank:
                found[rank[0]] = int(entry.name)
    return [found[rank] for rank in sorted(found)]
