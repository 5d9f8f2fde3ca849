"""The parser of every command of the program: a mistake is one line, and what was typed is known."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from utils.errors import UsageError

_logger = logging.getLogger(__name__)


class Parser(argparse.ArgumentParser):
    """An argument parser that tells a mistake in one line, knows which flags were typed, and the tilde of paths.

    A flag may be cut short as long as one flag alone begins so, which is said; `allow_abbrev=False` refuses that.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._completed: set[str] = set()

    def error(self, message: str) -> NoReturn:
        raise UsageError(message[0].upper() + message[1:].rstrip(".") + f" ({self.prog} --help lists the flags).")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        # the shell leaves the tilde of --flag=~/place as it is, and nothing but a path begins so
        return super()._get_value(action, os.path.expanduser(arg_string))

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        matches = super()._get_option_tuples(option_string)
        if matches and all(match[0] is matches[0][0] for match in matches):  # one flag, in several spellings
            typed = option_string.partition("=")[0]
            if typed not in self._completed:
                _logger.warning("%s is taken as %s.", typed, matches[0][1])
            self._completed.add(typed)
            return matches[:1]
        return matches

    def parse(self, argv: list[str] | None = None) -> tuple[argparse.Namespace, set[str]]:
        """Parse `argv`; returns the values and the names of those that were typed."""
        args = self.parse_args(argv)
        unset = object()
        typed = argparse.Namespace(**dict.fromkeys(vars(args), unset))
        self.parse_args(argv, typed)
        return args, {name for name, value in vars(typed).items() if value is not unset}


def number(
    kind: type, low: float | None = None, high: float | None = None, *, above: bool = False, below: bool = False
) -> Callable[[str], Any]:
    """An argparse type: a finite int or float from `low` to `high`, the bounds left out if `above`, `below`."""

    def parse(text: str) -> Any:
        wanted = "a whole number" if kind is int else "a number"
        if low is not None:
            wanted += f" above {low:g}" if above else f" from {low:g}"
        if high is not None:
            wanted += f"{' and' if above else ''} {'below' if below else 'to' if not above else 'at most'} {high:g}"
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
        too_low = low is not None and (value <= low if above else value < low)
        too_high = high is not None and (value >= high if below else value > high)
        if too_low or too_high or not np.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


def sides(text: str) -> int | tuple[int, int]:
    """An argparse type: the side of a square in pixels, or HEIGHTxWIDTH."""
    parts = text.lower().split("x")
    if len(parts) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a side, or HEIGHTxWIDTH")
    return _one_or_both([number(int, 1)(part) for part in parts])


def _one_or_both(lengths: list[int]) -> int | tuple[int, int]:
    return lengths[0] if len({*lengths}) == 1 else (lengths[0], lengths[1])


class Sides(argparse.Action):
    """`48`, `32 64` or `32x64` in pixels: the side of a square, an int, or (height, width) where these differ."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, nargs="+", type=sides, **kwargs)

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        if len(values) > 2 or (len(values) == 2 and not all(isinstance(value, int) for value in values)):
            told = " ".join(told_size(value) for value in values)
            raise argparse.ArgumentError(self, f"{told!r} is not a side, or height and width")
        setattr(namespace, self.dest, values[0] if len(values) == 1 else _one_or_both(values))


def told_size(size: int | tuple[int, int]) -> str:
    """A size that `Sides` read, as a flag takes it."""
    return str(size) if isinstance(size, int) else "x".join(map(str, size))


def add_switch(parser: argparse._ActionsContainer, on: list[str], off: list[str], *, default: bool, help: str) -> None:
    """Add a pair of flags that switch one value, named after the first flag, on and off."""
    dest = on[0].lstrip("-").replace("-", "_")
    text = f"{help}; {off[0]} switches it off (default: {'on' if default else 'off'})"
    parser.add_argument(*on, dest=dest, action="store_true", default=default, help=text)
    parser.add_argument(*off, dest=dest, action="store_false", default=default, help=argparse.SUPPRESS)
