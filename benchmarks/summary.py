"""One table row for each finished run: `python -m benchmarks.summary OUTPUT_DIR...`.

Everything is read from what the runs wrote: `args.json` and `log.txt`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.command import command, parser
from tasks import TASKS
from utils import UsageError


class Score(NamedTuple):
    """What a task's runs are judged by: its key in the program's log, its name and unit, its key in tables, and whether
    more of it is better."""

    logged: str
    name: str
    unit: str
    key: str
    more_is_better: bool = True

    @property
    def title(self) -> str:
        """What tables call it."""
        return f"{self.name}, {self.unit}" if self.unit else self.name

    def in_words(self, line: dict[str, Any]) -> str:
        """The score in a line of log.txt."""
        return f"{self.name} {line[self.logged]:.2f} {self.unit}".rstrip()


def score_of_task(name: str) -> Score:
    """What the runs of the task `name` are judged by. Raises UsageError for a task that there is not."""
    if name not in TASKS:
        raise UsageError(f"There is no task {name!r}; wanted one of {', '.join(TASKS)}.")
    metric = TASKS[name].metric
    label = metric.label or metric.name
    return Score(f"test_{metric.name}", label, metric.unit, label.replace("-", ""), metric.higher_is_better)


# {score} stands for the score's title
COLUMNS = {
    "run": "{name}",
    "model": "{model}",
    "test {score}": "{score:.2f}",
    "epochs": "{epochs}",
    "parameters, M": "{parameters:.3f}",
    "training, s": "{seconds:.1f}",
    "training, images/s": "{images_per_second}",
    "peak memory, MiB": "{peak_memory_mib:.0f}",
}


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of `log.txt` in `folder`, an epoch each. Raises UsageError if it is not there or something else."""
    file = folder / "log.txt"
    if not file.is_file():
        raise UsageError(f"{folder} holds no log.txt; wanted the --output_dir of a run that finished an epoch.")
    try:
        found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read: {error}.") from error
    if not found or not all(isinstance(line, dict) for line in found):
        raise UsageError(f"{file} does not hold an object a line; wanted the log of a run that finished an epoch.")
    return found


def read_flags(folder: Path) -> dict[str, Any]:
    """The flags of the run in `folder`. Raises UsageError if they cannot be read."""
    file = folder / "args.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read: {error}.") from error
    if not isinstance(found, dict):
        raise UsageError(f"{file} does not hold a run's flags.")
    return found


def score_of(folder: Path) -> Score:
    """What the run in `folder` is judged by; one that does not say its task is of before there were several."""
    flags = read_flags(folder) if (folder / "args.json").exists() else {}
    return score_of_task(flags.get("task", "classify"))


def summarize(folder: Path) -> dict[str, Any]:
    """The last epoch's figures of the run in `folder`, its time summed over epochs and its memory at the peak."""
    log, flags, score = read_log(folder), read_flags(folder), score_of(folder)
    seconds, images = sum(line["seconds"] for line in log), sum(line.get("n_images", 0) for line in log)
    return log[-1] | {
        "name": folder.name,
        "model": flags["model"],
        "score": log[-1][score.logged],
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


@command("benchmarks.summary")
def main(argv: Sequence[str] | None = None) -> None:
    """Print a table of each task."""
    flags = parser("benchmarks.summary", __doc__)
    flags.add_argument("folders", nargs="+", type=Path, metavar="OUTPUT_DIR")
    tables: dict[Score, list[dict[str, Any]]] = {}
    for folder in flags.parse_args(argv).folders:
        try:
            tables.setdefault(score_of(folder), []).append(summarize(folder))
        except KeyError as error:
            raise UsageError(f"{folder} is no whole run: {error} is missing in what it wrote.") from error
    for score, rows in tables.items():
        print(markdown(rows, {title.format(score=score.title): cell for title, cell in COLUMNS.items()}))


if __name__ == "__main__":
    sys.exit(main())
