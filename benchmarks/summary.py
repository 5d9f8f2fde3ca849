"""One table row for each finished run: `python -m benchmarks.summary OUTPUT_DIR...`.

Everything is read from what the runs wrote: `args.json` and `log.txt`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = {
    "run": "{name}",
    "model": "{model}",
    "test top-1, %": "{test_acc1:.2f}",
    "epochs": "{epochs}",
    "parameters, M": "{parameters:.3f}",
    "training, s": "{seconds:.1f}",
    "training, images/s": "{images_per_second}",
    "peak memory, MiB": "{peak_memory_mib:.0f}",
}


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of `log.txt` in `folder`, an epoch each. Raises ValueError if there is none."""
    file = folder / "log.txt"
    if not file.is_file():
        raise ValueError(f"{folder} holds no log.txt; wanted the --output_dir of a run that finished an epoch.")
    return [json.loads(line) for line in file.read_text().splitlines()]


def summarize(folder: Path) -> dict[str, Any]:
    """The last epoch's figures of the run in `folder`, its time summed over epochs and its memory at the peak."""
    log = read_log(folder)
    args = json.loads((folder / "args.json").read_text())
    seconds, images = sum(line["seconds"] for line in log), sum(line.get("n_images", 0) for line in log)
    return log[-1] | {
        "name": folder.name,
        "model": args["model"],
        "epochs": len(log),
        "parameters": log[-1]["n_parameters"] / 1e6,
        "seconds": seconds,
        "images_per_second": f"{images / seconds:.0f}" if images else "unknown",
        "peak_memory_mib": max(line["peak_memory_mib"] for line in log),
    }


def markdown(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> str:
    """A Markdown table: each column's cells are its format string filled from a row."""
    lines = [
        list(columns),
        ["---"] * len(columns),
        *([cell.format(**row) for cell in columns.values()] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.summary", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="OUTPUT_DIR")
    args = parser.parse_args(argv)
    try:
        rows = [summarize(folder) for folder in args.folders]
    except ValueError as error:
        parser.error(str(error))
    print(markdown(rows, COLUMNS))


if __name__ == "__main__":
    main()
