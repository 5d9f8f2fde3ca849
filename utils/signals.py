"""Signals: a run is asked to end, and loader workers end with it."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import multiprocessing.util  # noqa: F401 - registers what it does at exit
import os
import signal
from collections.abc import Iterator
from typing import Any


class StopWaiting(BaseException):
    """A run that waits is to stop. No Exception, like KeyboardInterrupt: it comes in the midst of anything, and must
    not be taken for a fault of the file that is just read."""


class StopRequest:
    """Notes SIGTERM, SIGUSR1 (SLURM's) and SIGUSR2 (submitit's): the run is to save itself and end at the next step."""

    # Windows knows SIGTERM alone
    signals = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[int, Any] = {}
        self._waits = False

    def __bool__(self) -> bool:
        return self.name is not None

    def _note(self, number: int, frame: object) -> None:
        self.name = signal.Signals(number).name
        if self._waits:
            raise StopWaiting

    @contextlib.contextmanager
    def ends_waiting(self) -> Iterator[None]:
        """Have a signal, also one that came before, end the block by StopWaiting: what is waited for may never come."""
        self._waits = True
        try:
            if self:
                raise StopWaiting
            yield
        finally:
            self._waits = False

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in self.signals}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


# Shared with forked workers. multiprocessing ends them with SIGTERM too, from a function that runs at exit; functions
# registered after it run before it.
_program_ends = multiprocessing.RawValue("b", 0)
atexit.register(lambda: setattr(_program_ends, "value", 1))


def _end_with_program(number: int, frame: object) -> None:
    if _program_ends.value:
        os._exit(0)


def ignore_stop_signals(worker_id: int = 0) -> None:
    """For data-loader workers: signals to the whole job are for the process that trains, and workers end with it."""
    for number in StopRequest.signals:
        signal.signal(number, _end_with_program)
