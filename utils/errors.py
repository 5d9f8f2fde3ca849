"""The three ways a run ends early: a mistake of the user's, a run that cannot go on, a process that follows another."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """A mistake of the user's, told in one sentence; `main` prints it and exits with code 2.

    A data-loader worker hands its exception over as the text of a traceback; the sentence is what that text ends with.
    `is_own` is set where only this process of a run has met the mistake.
    """

    is_own = False

    def __init__(self, message: str) -> None:
        super().__init__(
            message.strip().rpartition(f"{__name__}.UsageError: ")[2] if "Traceback" in message else message
        )


class RunError(RuntimeError):
    """A run that cannot go on, told in one sentence; `main` prints it and exits with code 1."""


class PeerError(RuntimeError):
    """Another process of the run has failed and says why; this one only ends."""


def nearest(wanted: str, names: Iterable[str]) -> str:
    """The end of a sentence that offers the names closest to `wanted`, or the empty string if none is close."""
    close = difflib.get_close_matches(wanted, list(names), n=3, cutoff=0.5)
    return f"; the nearest names are {', '.join(close)}" if close else ""


def first_line(error: Exception) -> str:
    """What `error` says, cut to one line without its full stop; its kind where it says nothing."""
    lines = str(error).splitlines()
    return lines[0].rstrip(" .") if lines else type(error).__name__
