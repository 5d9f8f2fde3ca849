"""What a task is in small: runs of seconds on data in its real formats, for trials that are alike for every task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.program import SMALL
from benchmarks.small_cells import write_folder
from benchmarks.small_data import write_cifar100, write_shapes

# the heads of a detector of a second's size
SMALL_DETECTOR = ("--det-channels", "8", "--det-fc-channels", "16", "--det-boxes", "16", "--det-proposals", "20")


@dataclass(frozen=True)
class Job:
    """A task in small.

    `flags` make the model small; `write(folder, train)` makes a data set of `train` images and returns its flags; a
    step takes `batch` images over all processes. An epoch of `steps_between` steps is long enough to be stopped in.
    `models` are what is trained in mixed precision on `embedded`, the data that the program brings along, by what they
    are called, with `precision_batch` images a step; "{Vim}" stands for the checkpoint of the one called so.
    """

    name: str
    flags: tuple[str, ...]
    write: Callable[[Path, int], tuple[str, ...]]
    embedded: tuple[str, ...]
    models: dict[str, tuple[str, ...]] = field(repr=False)
    batch: int = 4
    precision_batch: int = 14
    images: int = 40
    steps_between: int = 100

    def data(self, folder: Path, train: int | None = None) -> list[str]:
        """Write a data set of `train` images under `folder`; returns the flags that name it, and the small model."""
        return [*self.flags, *self.write(folder / "data", self.images if train is None else train)]

    def batches(self, processes: int = 1) -> tuple[str, ...]:
        """The flags for a process's share of a step's images."""
        return "--batch-size", str(self.batch // processes)


def _cifar(folder: Path, train: int) -> tuple[str, ...]:
    return "--data-set", "CIFAR", "--data-path", str(write_cifar100(folder, train))


def _cells(folder: Path, train: int) -> tuple[str, ...]:
    return "--data-set", "CELLS", "--data-path", str(write_folder(folder, train=train // 2, side=32))


def _shapes(folder: Path, train: int) -> tuple[str, ...]:
    return "--data-set", "SHAPES", "--data-path", str(write_shapes(folder, train))


def _micro(family: str, *flags: str) -> tuple[str, ...]:
    return "--model", f"{family}_micro_patch8_32", *flags


def _task(name: str, family: str, *flags: str) -> tuple[str, ...]:
    return "--task", name, *SMALL, *_micro(family), *flags


_MERGING = ("--fusion-strategy", "upper", "--fusion-layer", "2")
JOBS = {
    job.name: job
    for job in (
        Job(
            "classify",
            _task("classify", "vim"),
            _cifar,
            ("--data-set", "DIGITS"),
            {
                "Vim": ("--model", "vim_nano_patch4_32"),
                "Famba-V (paired), `upper`": ("--model", "fambav_nano_patch4_32", *_MERGING, "--fusion-token", "8"),
                "FastVim": ("--model", "fastvim_nano_patch4_32"),
                "DyVM": ("--model", "dyvm_nano_patch4_32", "--model-path", "{Vim}"),
            },
        ),
        Job(
            "pretrain",
            _task("pretrain", "mae_fastvim"),
            _cifar,
            ("--data-set", "DIGITS"),
            {"Vim": _micro("mae_vim"), "FastVim": _micro("mae_fastvim")},
        ),
        Job(
            "cells",
            _task("cells", "fastchannelvim", "--input-size", "32"),
            _cells,
            ("--data-set", "CELLS_DIGITS"),
            {"ChannelVim": _micro("channelvim"), "FastChannelVim": _micro("fastchannelvim"), "Vim": _micro("vim")},
        ),
        Job(
            "segment",
            _task("segment", "vim", "--input-size", "32"),
            _shapes,
            ("--data-set", "SHAPES"),
            {
                "Vim": _micro("vim"),
                "Famba-V, `upper`": _micro("vim", *_MERGING, "--fusion-token", "2"),
                "FastVim": _micro("fastvim", "--seg-channels", "32"),
                "DyVM": _micro("dyvm", "--pruning", "token"),
            },
            precision_batch=4,
            images=16,
            steps_between=40,
        ),
        Job(
            "detect",
            _task("detect", "vim", *SMALL_DETECTOR),
            _shapes,
            ("--data-set", "SHAPES"),
            {
                "Vim": _micro("vim"),
                "Famba-V, `upper`": _micro("vim", *_MERGING, "--fusion-token", "2"),
                "FastVim": _micro("fastvim"),
            },
            batch=2,
            precision_batch=2,
            images=8,
            steps_between=40,
        ),
    )
}
