"""What a run tells while it goes: meters, progress, TensorBoard, and where messages go."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from utils.errors import first_line
from utils.memory import peak_memory_mib
from utils.processes import is_main_process, sum_over_processes

_logger = logging.getLogger(__name__)


class Meters:
    """Running values of an epoch: a short window for the console, and exact sums that survive a resume."""

    window = 20

    def __init__(self) -> None:
        self._recent: dict[str, deque[float]] = {}
        self._sums: dict[str, list[float]] = {}

    def update(self, count: int = 1, **values: float) -> None:
        """Add `values`, each the mean of `count` things."""
        for name, value in values.items():
            self._recent.setdefault(name, deque(maxlen=self.window)).append(value)
            total = self._sums.setdefault(name, [0.0, 0])
            total[0] += value * count
            total[1] += count

    def averages(self) -> dict[str, float]:
        """Means over the epoch and over all processes; every process must call this together."""
        names = list(self._sums)
        sums = sum_over_processes([number for name in names for number in self._sums[name]])
        return {name: sums[2 * i] / max(sums[2 * i + 1], 1) for i, name in enumerate(names)}

    def __str__(self) -> str:
        return "  ".join(
            f"{name}: {sorted(values)[len(values) // 2]:.4f} ({self._sums[name][0] / max(self._sums[name][1], 1):.4f})"
            for name, values in self._recent.items()
        )

    def state_dict(self) -> dict[str, list[float]]:
        """The exact sums."""
        return {name: list(total) for name, total in self._sums.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Go on from the sums of an interrupted epoch."""
        self._sums = {name: list(total) for name, total in state.items()}


class Progress:
    """Tells how far a loop is: a tqdm bar on a terminal, else DeiT's meter line every `every` steps; rank 0 only."""

    def __init__(self, title: str, total: int | None, device: torch.device, *, start: int = 0, every: int = 10) -> None:
        self.title, self.total, self.device, self.start, self.every = title, total, device, start, every
        self.began = time.perf_counter()
        self.images = 0
        self._quiet = not is_main_process()
        self._bar = None
        if not self._quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, desc=title, leave=False, dynamic_ncols=True)

    def step(self, done: int, images: int, text: str | Callable[[], str]) -> None:
        """Tell that `done` steps are through, the last one with `images` images over all processes; a `text` that has
        to be asked for is, every so many steps."""
        self.images += images
        if self._quiet:
            return
        is_told = (done - 1) % self.every == 0 or done == self.total
        if is_told and not isinstance(text, str):
            text = text()
        if self._bar is not None:
            if isinstance(text, str):
                self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)
        elif is_told:
            seconds = self.elapsed()
            each = seconds / max(done - self.start, 1)
            left = "?" if self.total is None else _clock(each * (self.total - done))
            _logger.info(
                "%s  [%d/%s]  eta: %s  %s  time: %.4f  images/s: %.1f  max mem: %.0f MiB",
                *(self.title, done, "?" if self.total is None else self.total, left, text, each),
                *(self.images / max(seconds, 1e-9), peak_memory_mib(self.device)),
            )

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.began

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


class Board:
    """Curves of a run: TensorBoard events in a folder, and MLflow metrics where `settings`, the run's flags, are given.

    Nothing is written for a folder of None. Points after `updates` steps, of a run that was killed, are replaced.
    """

    every = 20  # steps between two points of the training loss

    def __init__(self, folder: Path | None, updates: int = 0, settings: dict[str, Any] | None = None) -> None:
        self._writer = self._mlflow = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=updates + 1 if updates else None)
        if settings is not None:
            import mlflow

            self._mlflow = mlflow
            self._tell_mlflow(lambda mlflow: mlflow.start_run(run_name=folder.name if folder is not None else None))
            flags = {name: str(value) for name, value in settings.items()}
            self._tell_mlflow(lambda mlflow: mlflow.log_params(flags))

    def add(self, values: dict[str, float], step: int) -> None:
        """Add a point to each curve. A disk that is full, or a server that is gone, ends the curves, not the run."""
        self._tell_mlflow(lambda mlflow: mlflow.log_metrics(values, step=step))
        if self._writer is None:
            return
        try:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()
        except OSError as error:
            _logger.warning("TensorBoard's events could not be written (%s): no more are.", error)
            self._writer = None

    def close(self) -> None:
        """End the curves."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
        self._tell_mlflow(lambda mlflow: mlflow.end_run())

    def _tell_mlflow(self, act: Callable[[Any], None]) -> None:
        if self._mlflow is None:
            return
        try:
            act(self._mlflow)
        except Exception as error:  # its own, and those of whatever carries it to a server or a file
            _logger.warning("MLflow could not be reached (%s): no more goes there.", first_line(error))
            self._mlflow = None


def setup_logging() -> None:
    """Send notices to stdout and warnings to stderr, on the main process only."""
    info = logging.StreamHandler(sys.stdout)
    info.addFilter(lambda record: record.levelno < logging.WARNING)
    warning = logging.StreamHandler(sys.stderr)
    warning.setLevel(logging.WARNING)
    level = logging.INFO if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", handlers=[info, warning], force=True)
