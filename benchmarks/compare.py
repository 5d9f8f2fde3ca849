"""Train and evaluate the methods and a DeiT of the same size, several seeds each; then one table and one plot.

    python -m benchmarks.compare                                # handwritten digits, nano models: minutes on a CPU
    python -m benchmarks.compare DATA_PATH --data-set IMNET     # tiny models, on all GPUs of this machine: days
    python -m benchmarks.compare DATA_PATH --data-set CIFAR --size nano --epochs 50 --fine-tune-epochs 10
    python -m benchmarks.compare --methods merging              # every strategy and order of Famba-V
    python -m benchmarks.compare --methods policies             # DyVM's learned decisions against random and even ones
    python -m benchmarks.compare --task segment --seeds 0       # the same under a segmentation head, by mIoU

Flags that this program does not know go to every run. In --output_dir each run has a folder of its own; a finished run
is not repeated, and one that was interrupted goes on. There are then `table.md`, `table.csv`, `pareto.png`, and
`results.json` with every run and the machine.

Training time is the median epoch times the number of epochs, evaluation left out; where a method starts from a trained
model, that one's time is in it. Speed and peak memory are measured at the end, all models in turns in one process
(`benchmarks.throughput` says how), on test images and with the weights that training left: inference at one and a half
times the training batch, as in evaluation, and one whole training step, teacher included.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import benchmarks.peers  # noqa: F401 - its models join the registry
import main as program
from benchmarks import plot
from benchmarks.command import add_device, command, parser, write, write_json
from benchmarks.comparisons import COMPARISONS, ELSEWHERE, Comparison
from benchmarks.summary import Score, markdown, read_log, score_of_task
from benchmarks.trained import Run, measure
from measure.machine import in_words, machine
from utils import RunError, UsageError
from utils.flags import number

ROOT = Path(__file__).resolve().parent.parent


def plan(args: argparse.Namespace, more: Sequence[str]) -> list[Run]:
    """All runs in the order they are made: seed after seed, so that a machine's drift meets every method alike."""
    table, is_small = COMPARISONS[args.task], args.data_set == COMPARISONS[args.task].small_data_set
    data = ["--data-set", args.data_set, *(["--data-path", str(args.data_path)] if args.data_path else [])]
    shared = ["--task", args.task, *(table.small_recipe if is_small else table.recipe), *data, "--device", args.device]
    tuning = () if is_small else table.fine_tuning
    runs: dict[str, Run] = {}
    for seed in args.seeds:
        for name in args.methods:
            method = table.methods[name]
            nano = args.size == "nano" and method.nano_flags is not None
            epochs = args.fine_tune_epochs if method.fine_tunes else args.epochs
            flags = ["--model", f"{method.family}_{table.sizes[args.size]}", *shared]
            flags += [*(method.nano_flags if nano else method.flags), *(tuning if method.fine_tunes else ()), *more]
            length, lines = table.length(epochs)
            flags += [*length, "--seed", str(seed)]
            full = f"{name}-seed{seed}"
            start = runs[f"{method.start}-seed{seed}"] if method.fine_tunes else None
            runs[full] = Run(full, name, seed, args.output_dir / full, start, lines, flags)
    return list(runs.values())


def check(runs: Sequence[Run]) -> None:
    """Refuse, before any work, flags that the program refuses and folders that hold runs with other flags."""
    for run in runs:
        # a model to start from is yet to be trained; any file will do to check the flags
        program.parse([*run.flags, *(["--model-path", __file__] if run.start else [])])
        known = run.folder / "flags.json"
        if known.exists() and known.read_text(encoding="utf-8") != json.dumps(run.flags) + "\n":
            raise UsageError(f"{run.folder} holds a run with other flags; wanted another --output_dir.")


# ---------------------------------------------------------------------------------------------------------------------
# Training

Launch = Callable[[Run, argparse.Namespace], int]


def launch(run: Run, args: argparse.Namespace) -> int:
    """Train in processes of its own, what they say in console.txt; returns the exit code.

    A signal that ends this program lets the run save itself first.
    """
    command = [sys.executable, "-m"]
    if args.gpus > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(args.gpus), "-m"]
    with open(run.folder / "console.txt", "a", encoding="utf-8") as console:
        child = subprocess.Popen(
            [*command, "benchmarks.peers", *run.command()], cwd=ROOT, stdout=console, stderr=subprocess.STDOUT
        )
        try:
            return child.wait()
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()


def train_all(runs: Sequence[Run], args: argparse.Namespace, launch: Launch) -> None:
    """Make the runs that are not finished; raises RunError for one that fails."""
    score = score_of_task(args.task)
    waiting = [run for run in runs if not run.finished()]
    if len(waiting) < len(runs):
        print(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished already.")
    began = time.perf_counter()
    for done, run in enumerate(waiting):
        write(run.folder / "flags.json", json.dumps(run.flags) + "\n")
        print(f"[{done + 1}/{len(waiting)}] {run.name} ...", end=" ", flush=True)
        code = launch(run, args)
        if code != 0 or not run.finished():
            console = run.folder / "console.txt"
            last = console.read_text(encoding="utf-8").splitlines()[-1:] if console.exists() else []
            raise RunError(f"{run.name} failed with exit code {code}: {''.join(last)} (see {console})")
        elapsed = time.perf_counter() - began
        left = elapsed / (done + 1) * (len(waiting) - done - 1)
        achieved = score.in_words(read_log(run.folder)[-1])
        print(f"{achieved}, {elapsed / 60:.1f} min gone, about {left / 60:.1f} min left", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Table and plot

# a figure's title, its unit and decimals in the Markdown table, and whether its spread is shown there
FIGURES = {
    "kept_tokens": ("tokens at the end", 1, 2, False),
    "kept_directions": ("directions run", 1, 2, False),
    "parameters": ("parameters, M", 1e6, 3, False),
    "flops_published": ("FLOPs published, M", 1e6, 2, False),
    "flops_full": ("FLOPs full, M", 1e6, 2, False),
    "flops_head": ("FLOPs of the heads, M", 1e6, 2, False),
    "train_seconds": ("training, s", 1, 1, True),
    "train_peak_bytes": ("peak training memory, MiB", 2**20, 1, False),
    "images_per_second": ("inference, images/s", 1, 0, True),
    "eval_peak_bytes": ("peak inference memory, MiB", 2**20, 1, False),
}
PANELS = {"images_per_second": ("inference, images/s", True), "train_seconds": ("training time, s", False)}


def figures_of(score: Score, entry: dict[str, Any]) -> dict[str, tuple[str, float, int, bool]]:
    """The figures of a table whose runs have those of `entry`: the score, then what it costs."""
    return {score.key: (score.title, 1, 2, True)} | {name: told for name, told in FIGURES.items() if name in entry}


def summarize(found: Sequence[dict[str, Any]], table: Comparison, score: Score) -> list[dict[str, Any]]:
    """One row a method: every figure's mean over the seeds, its standard deviation as `<name>_spread` (0 for one seed),
    lowest and highest, and as `<name>_text` what a reader sees of it."""
    rows = []
    for name in dict.fromkeys(entry["method"] for entry in found):
        entries = [entry for entry in found if entry["method"] == name]
        row: dict[str, Any] = {"method": name, "title": table.methods[name].title, "seeds": len(entries)}
        for figure, (_, unit, decimals, show_spread) in figures_of(score, entries[0]).items():
            values = [entry[figure] for entry in entries]
            mean, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
            row |= {
                figure: mean,
                f"{figure}_spread": spread,
                f"{figure}_min": min(values),
                f"{figure}_max": max(values),
            }
            shown = f" ± {spread / unit:.{decimals}f}" if show_spread and len(values) > 1 else ""
            row[f"{figure}_text"] = f"{mean / unit:.{decimals}f}{shown}"
        rows.append(row)
    return rows


def report(
    runs: Sequence[Run], found: Sequence[dict[str, Any]], about: dict[str, Any], args: argparse.Namespace
) -> str:
    """Write table.md, table.csv, pareto.png and results.json; returns the Markdown table with what it was made on."""
    table, score = COMPARISONS[args.task], score_of_task(args.task)
    rows = summarize(found, table, score)
    seeds = f"mean ± standard deviation over {len(args.seeds)} seeds" if len(args.seeds) > 1 else "one seed"
    fine_tuned = [table.methods[name].title for name in args.methods if table.methods[name].fine_tunes]
    made = f"{args.data_set}, {args.size} models, {_length(args.epochs, table)}, {seeds}"
    if fine_tuned:
        made += (
            f"; {', '.join(fine_tuned)}: {_length(args.fine_tune_epochs, table)} from the trained plain model, whose "
            "training is in their time"
        )
    made += f". {in_words(about)}.\n"
    made += _open_questions(rows, score, len(args.seeds))
    columns = {title: f"{{{figure}_text}}" for figure, (title, *_) in figures_of(score, rows[0]).items()}
    text = f"{markdown(rows, {'method': '{title}'} | columns)}\n\n{made}"
    output: Path = args.output_dir
    write(output / "table.md", text)
    with open(output / "table.csv", "w", newline="", encoding="utf-8") as file:
        kept = [name for name in rows[0] if not name.endswith("_text")]
        writer = csv.DictWriter(file, kept, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    plot.pareto(rows, score, PANELS).savefig(output / "pareto.png", dpi=150)
    results = {"machine": about, "flags": {run.name: run.flags for run in runs}, "runs": list(found)}
    write_json(output / "results.json", results)
    return text


def _open_questions(rows: Sequence[dict[str, Any]], score: Score, seeds: int) -> str:
    """Which methods the scores do not tell from the best one: what lies between them is less than both spreads."""
    best = (max if score.more_is_better else min)(rows, key=lambda row: row[score.key])
    spread = f"{score.key}_spread"
    near = [row for row in rows if abs(row[score.key] - best[score.key]) < row[spread] + best[spread]]
    if seeds == 1 or len(near) < 2:
        return ""
    others = ", ".join(row["title"] for row in near if row is not best)
    more = "" if seeds >= 5 else "; more seeds may (--seeds 0 1 2 3 4)"
    return f"The spread is as large as what lies between {best['title']} and {others}: they are not told apart{more}.\n"


def _length(count: int, table: Comparison) -> str:
    return f"{count} {'step' if table.by_steps else 'epoch'}{'s' if count > 1 else ''}"


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """This program's flags, and those that go to every run."""
    argv = list(sys.argv[1:] if argv is None else argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--task", default="classify")
    task = first.parse_known_args(argv)[0].task
    if task not in COMPARISONS:
        told = f" (the tables of this one are in {ELSEWHERE[task]})" if task in ELSEWHERE else ""
        raise UsageError(f"--task {task!r} is not compared; wanted one of {', '.join(COMPARISONS)}{told}.")
    table = COMPARISONS[task]
    flags = parser("benchmarks.compare", __doc__, allow_abbrev=False)
    flags.usage = "%(prog)s [DATA_PATH] [FLAGS...]"
    flags.add_argument("--task", default="classify", choices=[*COMPARISONS], help="default: %(default)s")
    flags.add_argument(
        "--data-set", default=None, help=f"default: {table.small_data_set}, or {table.data_set} with a DATA_PATH"
    )
    flags.add_argument("--size", default=None, choices=table.sizes, help="default: nano, or tiny with a DATA_PATH")
    flags.add_argument(
        "--methods",
        nargs="+",
        default=list(table.compared),
        choices=[*table.methods, *table.groups],
        metavar="METHOD",
        help=f"{', '.join(table.methods)}, or {' or '.join(table.groups)} (default: {' '.join(table.compared)})",
    )
    flags.add_argument("--seeds", type=number(int, 0), nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    for name, lengths in (("epochs", table.epochs), ("fine_tune_epochs", table.fine_tune_epochs)):
        flag = f"--{name.replace('epochs', table.unit).replace('_', '-')}"
        flags.add_argument(
            flag, dest=name, type=number(int, 1), default=None, help="default: {}, or {}".format(*lengths)
        )
    flags.add_argument("--output_dir", "--output-dir", type=Path, default=Path("output/compare"))
    add_device(flags)
    flags.add_argument(
        "--gpus",
        type=number(int, 1),
        default=os.environ.get("GPUS", str(torch.cuda.device_count() or 1)),
        help="processes of a run (default: $GPUS, or one a GPU)",
    )
    flags.add_argument(
        "--speed-seconds", type=number(float, 0), default=60.0, help="for timing all models (default: 60)"
    )
    # first or not at all: the value of a flag that is not known here would be taken for it
    data_path = argv.pop(0) if argv and not argv[0].startswith("--") and argv[0] != "-h" else ""
    args, more = flags.parse_known_args(argv)
    args.data_path = "" if data_path == "-" else data_path
    own_data = bool(args.data_path)
    args.data_set = args.data_set or (table.data_set if own_data else table.small_data_set)
    args.size = args.size or ("tiny" if own_data else "nano")
    args.epochs = args.epochs or table.epochs[own_data]
    args.fine_tune_epochs = args.fine_tune_epochs or table.fine_tune_epochs[own_data]
    args.output_dir = args.output_dir.resolve()
    if args.data_path:
        args.data_path = Path(args.data_path).resolve()
    args.methods = [name for given in args.methods for name in table.groups.get(given, (given,))]
    for name in args.methods:
        method = table.methods[name]
        if method.fine_tunes and method.start not in args.methods:
            start = table.methods[method.start].title
            raise UsageError(f"DyVM starts from the trained {start}: wanted {method.start} among --methods.")
    # what others start from comes first
    args.methods = [name for name in table.methods if name in args.methods]
    return args, more


@command("benchmarks.compare")
def main(argv: Sequence[str] | None = None, launch: Launch = launch) -> int:
    """Run what is missing, then write and print the table; returns the exit code."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        args, more = parse(argv)
        runs, score, device = plan(args, more), score_of_task(args.task), torch.device(args.device)
        check(runs)
        try:
            args.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--output_dir {args.output_dir} cannot be made: {error.strerror}.") from error
        train_all(runs, args, launch)
        print("Measuring speed and memory ...", flush=True)
        print(f"\n{report(runs, measure(runs, score, device, args.speed_seconds), machine(device), args)}")
        print(f"In {args.output_dir}: table.md, table.csv, pareto.png, results.json.")
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
