"""How the commands of `benchmarks/` read their flags, write their files and end: as main.py does."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from utils import RunError, UsageError
from utils.flags import Parser, number
from utils.memory import keep_freed_memory

Main = Callable[[Sequence[str] | None], int | None]


def command(name: str) -> Callable[[Main], Callable[..., int]]:
    """Have `main(argv)` of the command `name` return its exit code: 0 (or what it returns), 2 for a mistake of the
    user's and 1 for what could not go on, each told in one sentence, 130 when interrupted. As in the program, what is
    freed is kept."""

    def decorate(main: Main) -> Callable[..., int]:
        @functools.wraps(main)
        def run(argv: Sequence[str] | None = None, **options: Any) -> int:
            keep_freed_memory()
            try:
                return main(argv, **options) or 0
            except UsageError as error:
                print(f"{name}: error: {error}", file=sys.stderr)
                return 2
            except RunError as error:
                print(f"{name}: {error}", file=sys.stderr)
                return 1
            except KeyboardInterrupt:
                print(f"{name}: interrupted.", file=sys.stderr)
                return 130

        return run

    return decorate


def parser(name: str, description: str | None, **options: Any) -> Parser:
    """A parser of the command `name`, whose module's docstring is its help."""
    return Parser(prog=name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **options)


def add_device(found: argparse.ArgumentParser) -> None:
    """Add --device."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    found.add_argument("--device", type=device_name, default=default, help="default: %(default)s")


def add_threads(found: argparse.ArgumentParser, threads: int | None = None) -> None:
    """Add --threads, by default as many as `threads` or as torch wants."""
    told = "torch's choice" if threads is None else threads
    found.add_argument("--threads", type=number(int, 1), default=threads, help=f"CPU threads (default: {told})")


def device_of(args: argparse.Namespace) -> torch.device:
    """What --device names, with as many threads as --threads says from here on."""
    if args.threads:
        torch.set_num_threads(args.threads)
    return torch.device(args.device)


def device_name(text: str) -> str:
    """An argparse type: a device that this machine has."""
    wanted = f"{text!r} is no device of this machine; wanted cpu, or cuda or cuda:N where there is a GPU"
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(wanted) from None
    is_there = device.type == "cuda" and torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    if device.type != "cpu" and not is_there:
        raise argparse.ArgumentTypeError(wanted)
    return text


def size(text: str) -> tuple[int, int, int]:
    """An argparse type: "BATCH,DIM,SEQLEN"."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not three whole numbers above 0, as 8,384,197")
    batch, dim, seqlen = map(int, parts)
    return batch, dim, seqlen


def write(file: Path, text: str) -> None:
    """Write `text` to `file`, in a folder that is made. Raises UsageError where that cannot be."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror or error}.") from error


def write_json(file: Path | None, value: Any) -> None:
    """Write `value` as JSON to `file`, if one is wanted."""
    if file is not None:
        write(file, json.dumps(value, indent=1) + "\n")
