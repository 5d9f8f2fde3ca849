"""Curves of runs, overlaid: `python -m benchmarks.plot OUTPUT_DIR... [--file curves.png]`.

Loss, accuracy, learning rate and, where a run logged any, the shares of tokens and scan directions kept, all from the
`log.txt` that each run wrote.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.command import command, parser
from benchmarks.summary import Score, read_log, score_of, score_of_task
from utils import UsageError

Log = list[dict[str, Any]]
STYLES = ("-", "--", ":", "-.")


def curves(runs: dict[str, Log], score: Score | None = None) -> Figure:
    """A figure of `runs`, which `score` (classification's if None) judges: the lines of each log.txt, by the run's
    name."""
    score = score_of_task("classify") if score is None else score
    keeps = any(_kept(line) for log in runs.values() for line in log)
    figure = Figure(figsize=(13 if keeps else 10, 3.4), layout="constrained")
    axes = figure.subplots(1, 4 if keeps else 3)
    losses: dict[str, Callable[[dict[str, Any]], Any]] = {
        "train": lambda line: line.get("train_loss"),
        "test": lambda line: line.get("test_loss"),
    }
    _draw(axes[0], runs, "loss", losses)
    _draw(axes[1], runs, f"test {score.title}", {"": lambda line: line.get(score.logged)})
    _draw(axes[2], runs, "learning rate", {"": lambda line: line.get("train_lr")})
    if keeps:
        names = sorted({name for log in runs.values() for line in log for name in _kept(line)})
        shown = {name.replace("_", " "): lambda line, name=name: line.get(f"test_{name}") for name in names}
        _draw(axes[3], runs, "kept share", shown)
        axes[3].set_ylim(0, 1.05)
    axes[1].legend(fontsize="small")
    return figure


def _kept(line: dict[str, Any]) -> list[str]:
    return [name.removeprefix("test_") for name in line if name.startswith("test_kept_")]


def _draw(axis: Axes, runs: dict[str, Log], title: str, values: dict[str, Callable[[dict[str, Any]], Any]]) -> None:
    """One colour a run, one line style a value; a legend of the styles if there are several values."""
    for number, (run, log) in enumerate(runs.items()):
        for (kind, value), style in zip(values.items(), itertools.cycle(STYLES)):
            points = [(line["epoch"] + 1, value(line)) for line in log if value(line) is not None]
            if points:
                marker = "o" if len(points) == 1 else None
                axis.plot(*zip(*points), style, marker=marker, color=f"C{number}", label="" if kind else run, lw=1.3)
    if len(values) > 1:
        styles = zip(values, itertools.cycle(STYLES))
        axis.legend([axis.plot([], [], style, color="grey")[0] for _, style in styles], values, fontsize="small")
    axis.set(xlabel="epoch", title=title)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)


def pareto(points: Sequence[dict[str, Any]], score: Score, panels: dict[str, tuple[str, bool]]) -> Figure:
    """Methods as points: `score` against each of `panels`, a key of the points with its label and whether more of it is
    better.

    A point has `title` and, for the score's key and each panel, the mean and, under `<key>_spread`, the spread. The
    line joins the methods that no other one beats in both.
    """
    figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="constrained")
    for axis, (key, (label, more_is_better)) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for number, point in enumerate(points):
            axis.errorbar(
                *(point[key], point[score.key]),
                xerr=point[f"{key}_spread"],
                yerr=point[f"{score.key}_spread"],
                **dict(fmt="o", color=f"C{number}", label=point["title"], capsize=3, elinewidth=1),
            )
        signs = [1 if more else -1 for more in (more_is_better, score.more_is_better)]
        best = front([(signs[0] * point[key], signs[1] * point[score.key]) for point in points])
        axis.plot(*zip(*[(points[i][key], points[i][score.key]) for i in best]), "--", color="grey", lw=1, zorder=0)
        axis.set(xlabel=label, ylabel=f"test {score.title}")
        axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    return figure


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point beats in one number without losing in the other, by falling first
    number."""
    best: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: points[i], reverse=True):
        if not best or points[index][1] > points[best[-1]][1]:
            best.append(index)
    return best


@command("benchmarks.plot")
def main(argv: Sequence[str] | None = None) -> None:
    """Draw the runs."""
    flags = parser("benchmarks.plot", __doc__)
    flags.add_argument("folders", nargs="+", type=Path, metavar="OUTPUT_DIR", help="what --output_dir named")
    flags.add_argument("--file", type=Path, default=Path("curves.png"), help="default: %(default)s")
    args = flags.parse_args(argv)
    paths = [folder.resolve() for folder in args.folders]
    common = Path(os.path.commonpath([path.parent for path in paths]))
    runs, scores = {str(path.relative_to(common)): read_log(path) for path in paths}, set(map(score_of, paths))
    if len(scores) > 1:
        raise UsageError("The runs are of tasks that different figures judge; wanted those of one.")
    try:
        curves(runs, scores.pop()).savefig(args.file, dpi=150)
    except (KeyError, TypeError) as error:
        raise UsageError(f"A log.txt lacks what a curve is made from: {error}.") from error
    except (OSError, ValueError) as error:  # a folder that is not there, a suffix that is no picture's
        raise UsageError(f"{args.file} cannot be written: {error}.") from error
    print(args.file)


if __name__ == "__main__":
    sys.exit(main())
