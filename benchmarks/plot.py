"""Curves of runs, overlaid: `python -m benchmarks.plot OUTPUT_DIR... [--file curves.png]`.

Loss, accuracy, learning rate and, where a run logged any, the shares of tokens and scan directions kept, all from the
`log.txt` that each run wrote.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.summary import read_log

Log = list[dict[str, Any]]
STYLES = ("-", "--", ":", "-.")


def curves(runs: dict[str, Log]) -> Figure:
    """A figure of `runs`: the lines of each log.txt, by the run's name."""
    keeps = any(_kept(line) for log in runs.values() for line in log)
    figure = Figure(figsize=(13 if keeps else 10, 3.4), layout="constrained")
    axes = figure.subplots(1, 4 if keeps else 3)
    losses: dict[str, Callable[[dict[str, Any]], Any]] = {
        "train": lambda line: line["train_loss"],
        "test": lambda line: line["test_loss"],
    }
    _draw(axes[0], runs, "loss", losses)
    _draw(axes[1], runs, "test top-1, %", {"": lambda line: line["test_acc1"]})
    _draw(axes[2], runs, "learning rate", {"": lambda line: line["train_lr"]})
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


def pareto(points: Sequence[dict[str, Any]], score: str, panels: dict[str, tuple[str, bool]]) -> Figure:
    """Methods as points: `score` against each of `panels`, a key of the points with its label and whether more of it is
    better.

    A point has `title` and, for `score` and each panel, the mean and, under `<key>_spread`, the spread. The line joins
    the methods that no other one beats in both.
    """
    figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="constrained")
    for axis, (key, (label, more_is_better)) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for number, point in enumerate(points):
            axis.errorbar(
                *(point[key], point[score]),
                xerr=point[f"{key}_spread"],
                yerr=point[f"{score}_spread"],
                **dict(fmt="o", color=f"C{number}", label=point["title"], capsize=3, elinewidth=1),
            )
        best = front([((1 if more_is_better else -1) * point[key], point[score]) for point in points])
        axis.plot(*zip(*[(points[i][key], points[i][score]) for i in best]), "--", color="grey", lw=1, zorder=0)
        axis.set(xlabel=label, ylabel="test top-1, %")
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


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the runs."""
    parser = argparse.ArgumentParser(prog="benchmarks.plot", description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="OUTPUT_DIR", help="what --output_dir named")
    parser.add_argument("--file", type=Path, default=Path("curves.png"), help="default: %(default)s")
    args = parser.parse_args(argv)
    paths = [folder.resolve() for folder in args.folders]
    common = Path(os.path.commonpath([path.parent for path in paths]))
    try:
        figure = curves({str(path.relative_to(common)): read_log(path) for path in paths})
        figure.savefig(args.file, dpi=150)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(args.file)


if __name__ == "__main__":
    main()
