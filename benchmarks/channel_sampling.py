"""What channel sampling in training buys when channels are missing in use: CELLS_DIGITS, with it and without.

    python -m benchmarks.channel_sampling --seeds 0 1 2 --epochs 20

Trains FastChannelVim (nano, five channels) through main.py as often as there are seeds, with and without sampling,
evaluates each on all 31 subsets of the channels, and prints mean, lowest and highest top-1 by number of channels.
Finished runs in `--out` are kept, so that a run that was interrupted goes on. Writes channel_sampling.json and .png.
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import main as program
from benchmarks.command import command, parser, write_json
from utils import RunError
from utils.flags import number

SAMPLINGS = ("hcs", "none")
MODEL = "fastchannelvim_nano_patch4_32"
# 1,437 training images, scanned at 8 x 8, are few and small: a short schedule wants a high learning rate, no
# regularisation, and no more tokens than they need
RECIPE = ("--task", "cells", "--data-set", "CELLS_DIGITS", "--input-size", "16", "--num_workers", "0", "--unscale-lr",
          "--lr", "2e-3", "--warmup-epochs", "1", "--drop-path", "0", "--weight-decay", "0.05",
          "--batch-size", "32")  # fmt: skip


def run(sampling: str, seed: int, epochs: int, folder: Path) -> dict[int, list[float]]:
    """Train and evaluate once; top-1 in percent of every subset, by number of channels."""
    output, result = folder / f"{sampling}-{seed}", folder / f"{sampling}-{seed}" / "channel_subsets.csv"
    if not result.exists():
        flags = (*RECIPE, "--model", MODEL, "--channel-sampling", sampling, "--seed", str(seed))
        train = (*flags, "--epochs", str(epochs), "--output_dir", str(output), "--resume", "auto")
        weights = (
            "--eval",
            "--resume",
            str(output / "checkpoint.pth"),
            "--channel-subsets",
            "--output_dir",
            str(output),
        )
        for command_line in (train, (*flags, *weights)):
            if program.main(list(command_line)):
                raise RunError(f"main.py {' '.join(command_line)} failed.")
    sizes: dict[int, list[float]] = {}
    with open(result, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            sizes.setdefault(int(row["size"]), []).append(float(row["acc1"]))
    return sizes


def table(results: dict[str, list[dict[int, list[float]]]]) -> str:
    """Markdown: by number of channels, mean over subsets and seeds (and its deviation over seeds), lowest, highest."""
    lines = ["| channels | " + " | ".join(f"{name}: mean | lowest | highest" for name in results) + " |"]
    lines.append("|---" * (1 + 3 * len(results)) + "|")
    for size in next(iter(results.values()))[0]:
        cells = []
        for runs in results.values():
            means = [statistics.mean(each[size]) for each in runs]
            spread = f" ± {statistics.stdev(means):.1f}" if len(means) > 1 else ""
            every = [value for each in runs for value in each[size]]
            cells += [f"{statistics.mean(means):.1f}{spread}", f"{min(every):.1f}", f"{max(every):.1f}"]
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: dict[str, list[dict[int, list[float]]]], file: Path) -> None:
    """Top-1 by number of channels, mean over subsets and seeds, with the range over both."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axis = figure.subplots()
    for name, runs in results.items():
        sizes = list(runs[0])
        every = [[value for each in runs for value in each[size]] for size in sizes]
        (line,) = axis.plot(sizes, [*map(statistics.mean, every)], marker="o", label=f"--channel-sampling {name}")
        axis.fill_between(sizes, [*map(min, every)], [*map(max, every)], alpha=0.2, color=line.get_color())
    axis.set(xlabel="channels", ylabel="top-1, %", xticks=sizes)
    axis.legend()
    figure.savefig(file, dpi=150)


@command("benchmarks.channel_sampling")
def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate, print the table, write JSON and a plot."""
    flags = parser("benchmarks.channel_sampling", __doc__)
    flags.add_argument("--seeds", type=number(int, 0), nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    flags.add_argument("--epochs", type=number(int, 1), default=20, help="default: %(default)s")
    flags.add_argument(
        "--out", type=Path, default=Path("output/channel_sampling"), help="folder (default: %(default)s)"
    )
    args = flags.parse_args(argv)
    results: dict[str, list[dict[int, list[float]]]] = {name: [] for name in SAMPLINGS}
    for seed in args.seeds:
        for sampling in SAMPLINGS:
            results[sampling].append(run(sampling, seed, args.epochs, args.out))
    print(table(results))
    rows: list[dict[str, Any]] = [
        {"sampling": name, "seed": seed, "channels": size, "acc1": values}
        for name, runs in results.items()
        for seed, each in zip(args.seeds, runs)
        for size, values in each.items()
    ]
    write_json(args.out / "channel_sampling.json", {"epochs": args.epochs, "model": MODEL, "rows": rows})
    plot(results, args.out / "channel_sampling.png")


if __name__ == "__main__":
    sys.exit(main())
