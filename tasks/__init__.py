"""The jobs that the program does, by name. A task is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module

from tasks.task import Task
from utils.flags import Parser


class _Tasks(Mapping[str, "type[Task]"]):
    """Names -> classes; others may be added by `TASKS.add`."""

    def __init__(self, places: dict[str, str]) -> None:
        self._places = places
        self._classes: dict[str, type[Task]] = {}

    def __getitem__(self, name: str) -> type[Task]:
        if name not in self._classes:
            module, _, class_name = self._places[name].partition(":")
            self._classes[name] = getattr(import_module(module), class_name)
        return self._classes[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**self._places, **self._classes})

    def __len__(self) -> int:
        return len({**self._places, **self._classes})

    def add(self, task: type[Task]) -> type[Task]:
        """Make `task` known by its name; a decorator."""
        self._classes[task.name] = task
        return task

    def remove(self, name: str) -> None:
        """Take a task that was added out again."""
        self._classes.pop(name, None)


TASKS = _Tasks(
    {
        "classify": "tasks.classify.task:Classify",
        "pretrain": "tasks.pretrain.task:Pretrain",
        "segment": "tasks.segment.task:Segment",
        "detect": "tasks.detect.task:Detect",
        "cells": "tasks.cells.task:ClassifyCells",
    }
)


def implied_task(argv: list[str] | None = None) -> str:
    """The task of a command line without --task: pre-training if it has --pretrain or a masked autoencoder's name."""
    parser = Parser(prog="main.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--pretrain")
    parser.add_argument("--model", default="")
    known = parser.parse_known_args(argv)[0]
    return "pretrain" if known.pretrain or known.model.startswith("mae_") else "classify"
