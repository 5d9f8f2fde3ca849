"""What a run survives and what it refuses: `python -m benchmarks.reliability` writes benchmarks/RELIABILITY.md.

Runs of every `--task` are killed, signalled, given a full disk and a lost process, spread over two network namespaces
(as root), trained in mixed precision, and run for thousands of steps with an eye on memory and open files; the program
and the operators are given inputs that are broken at random. Everything is drawn from `--seed`. A section that is run
again takes the place of the same one in `--results`, of which the page is made. The exit code is 1 if anything was
lost, crashed, not finite or not flat. Wants the packages of the test suite, and runs from the root of a checkout.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks import bad_inputs, faults
from benchmarks.command import command, parser, write, write_json
from benchmarks.comparisons import DIGITS_RECIPE
from benchmarks.faults import Lost, check_readable, succeed
from benchmarks.jobs import JOBS, Job
from benchmarks.program import MICRO, ROOT, lines, start
from benchmarks.soak import COLUMNS as SOAKS
from benchmarks.soak import soak
from benchmarks.summary import markdown
from benchmarks.sweeps import bad_inputs_of_all_kinds
from measure.machine import in_words, machine
from utils.flags import number

# of a program of its own, scripts/asan.sh, which writes no rows
ASAN = (
    "Under AddressSanitizer, `bash scripts/asan.sh` (2026-11-26, g++ 12, AVX2): 23 operators, 6,900 calls, 0 reports."
)
FAULTS = {
    "task": "{task}",
    "fault": "{name}",
    "tried": "{tried}",
    "survived": "{survived}",
    "lost": "{lost}",
    "notes": "{notes}",
    "measured": "{day}",
}
SWEEPS = {
    "task": "{task}",
    "input": "{name}",
    "tried": "{tried}",
    "accepted": "{accepted}",
    "refused cleanly": "{refused}",
    "crashed": "{crashed}",
    "measured": "{day}",
}
RUNS = {
    "task": "{task}",
    "model": "{model}",
    "arithmetic": "{dtype}",
    "optimizer steps": "{steps}",
    "non-finite losses": "{bad}",
    "steps that the scaler left out": "{scaled}",
    "first and last fifth's loss": "{first:.4f}, {last:.4f}",
    "finite": "{finite}",
    "measured": "{day}",
}
# a section's kind says which table it is in
SECTIONS = {
    **dict.fromkeys(("kills", "signals", "disk", "processes", "network"), "faults"),
    **{"inputs": "sweeps", "precision": "runs", "soak": "soaks"},
}

# ---------------------------------------------------------------------------------------------------------------------
# Mixed precision

BATCH = 14


def mixed_precision(job: Job, folder: Path, steps: int) -> list[dict[str, Any]]:
    """Train every model of `job` for at least `steps` steps; non-finite losses are skipped and counted."""
    interval = math.ceil(steps / 5)
    recipe = DIGITS_RECIPE if job.name == "classify" else ()
    rows = []
    for dtype in ("bfloat16", "float16"):
        for model, own in job.models.items():
            output = folder / f"{model}_{dtype}"
            others = {name: folder / f"{name}_{dtype}" / "checkpoint.pth" for name in job.models}
            own = [flag.format(**others) for flag in own]
            flags = [*job.flags, *job.embedded, *recipe, *own, "--batch-size", job.precision_batch, "--lr", "1e-3"]
            flags += ["--iterations", 5 * interval, "--eval-interval", interval, "--output_dir", output]
            flags += ["--if_amp", "--amp-dtype", dtype, "--if_continue_inf"]
            row = dict(task=job.name, model=model, dtype=dtype, steps=0, bad=0, scaled=0, first=math.nan, last=math.nan)
            rows.append(row)
            try:
                told = succeed(start(MICRO, *flags), 3600)
            except Lost as error:
                row["finite"] = "no: " + " ".join(str(error).split())
                continue
            state, log = check_readable(output), lines(output)
            taken = int(max(entry["step"] for entry in state["optimizer"]["state"].values()))
            bad = len(re.findall("the step is skipped", told))
            weights = all(bool(value.isfinite().all()) for value in state["model"].values())
            losses = [line.get("train_loss", math.nan) for line in log]  # none where every step was left out
            finite = bad == 0 and weights and all(map(math.isfinite, losses))
            row |= dict(steps=taken, bad=bad, scaled=state["updates"] - taken)
            row |= dict(first=losses[0], last=losses[-1], finite="yes" if finite else "no")
            print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# One section


def run_section(name: str, job: Job, folder: Path, args: Any) -> dict[str, Any]:
    """The entry of section `name` for `job`: its `rows`, what was lost in words, seconds, day and machine."""
    began, chance = time.monotonic(), random.Random(args.seed)
    if name == "inputs":
        found: list[Any] = bad_inputs_of_all_kinds(job, folder, args.inputs, args.seed)
    elif name == "precision":
        found = mixed_precision(job, folder, args.steps)
    elif name == "soak":
        found = [soak(job, folder, args.soak_steps)]
    else:
        found = {
            "kills": lambda: [faults.kill(job, folder, args.kills, chance)],
            "signals": lambda: faults.preempt(job, folder, chance),
            "disk": lambda: faults.fill_disk(job, folder),
            "processes": lambda: faults.lose_process(job, folder, args.losses),
            "network": lambda: faults.network(job, folder),
        }[name]()
    rows = [each if isinstance(each, dict) else dict(task=job.name) | each.row() for each in found]
    failures = [text for each in found if not isinstance(each, dict) for text in each.failures]
    seconds = round(time.monotonic() - began)
    about = in_words(machine(torch.device("cpu")))
    return dict(rows=rows, failures=failures, seconds=seconds, machine=about, day=str(date.today()))


def is_bad(results: dict[str, dict[str, Any]]) -> bool:
    """Whether anything in `results` was lost, crashed, not finite or not flat."""
    rows = [row for sections in results.values() for entry in sections.values() for row in entry["rows"]]
    lost = any(entry["failures"] for sections in results.values() for entry in sections.values())
    return lost or any(row.get(name, "yes") != "yes" for row in rows for name in ("finite", "flat"))


# ---------------------------------------------------------------------------------------------------------------------
# Page


def page(results: dict[str, dict[str, Any]]) -> str:
    """The Markdown page of `results`: entries of `run_section`, by task and section."""
    tables: dict[str, list[dict[str, Any]]] = {kind: [] for kind in SECTIONS.values()}
    failures, seconds = [], dict.fromkeys(SECTIONS, 0)
    machines: dict[str, None] = {}
    for task in (name for name in JOBS if name in results):
        for name in (name for name in SECTIONS if name in results[task]):
            entry = results[task][name]
            tables[SECTIONS[name]] += [row | {"day": entry["day"]} for row in entry["rows"]]
            failures += [f"{task}, {text}" for text in entry["failures"]]
            seconds[name] += entry["seconds"]
            machines[entry["machine"]] = None
    lost = {
        kind: sum(row[column] for row in tables[kind]) for kind, column in (("faults", "lost"), ("sweeps", "crashed"))
    }
    tried = {kind: sum(row["tried"] for row in tables[kind]) for kind in ("faults", "sweeps")}
    good = {kind: sum(row[kind_of] == "yes" for row in tables[kind]) for kind, kind_of in YES.items()}
    whole = [
        "# What a run survives and what it refuses",
        f"Written by `{COMMAND}`, section by section: {'; '.join(machines)}. Seconds of all tasks: "
        + ", ".join(f"{name} {value}" for name, value in seconds.items())
        + ".",
        f"Faults: {tried['faults']} tried, {tried['faults'] - lost['faults']} survived, {lost['faults']} lost."
        f" Bad inputs: {tried['sweeps']} tried, {sum(row['refused'] for row in tables['sweeps'])} refused cleanly,"
        f" {sum(row['accepted'] for row in tables['sweeps'])} accepted (they were harmless), {lost['sweeps']} crashed."
        f" Mixed precision: {len(tables['runs'])} runs, {good['runs']} finite,"
        f" {len(tables['runs']) - good['runs']} not. Long runs: {len(tables['soaks'])}, {good['soaks']} flat.",
    ]
    missing = {task: [name for name in SECTIONS if name not in results.get(task, {})] for task in JOBS}
    if any(missing.values()):
        told = "; ".join(f"{task}: {', '.join(names)}" for task, names in missing.items() if names)
        whole.append(f"Not run yet: {told}.")
    for kind, (title, text, columns) in TABLES.items():
        if tables[kind]:
            whole += [f"## {title}", text, markdown(tables[kind], columns)]
    if failures:
        whole += ["## Lost and crashed", "\n".join("- " + " ".join(text.split())[:1200] for text in failures[:40])]
    return "\n\n".join(whole) + "\n"


COMMAND = "python -m benchmarks.reliability --task TASK"
YES = {"runs": "finite", "soaks": "flat"}
TABLES = {
    "faults": (
        "Faults",
        "Survived: every checkpoint that is there loads, and the run goes on as if nothing had been. Models of a"
        " second's size on small data in each task's own format (benchmarks/jobs.py).",
        FAULTS,
    ),
    "sweeps": (
        "Bad inputs",
        "Drawn by hypothesis (benchmarks/bad_inputs.py, bad_files.py, bad_calls.py); some of them are good. Refused"
        " cleanly: the program ends with one sentence on stderr and exit code 2 (1 for a run that could not go on), an"
        " operator raises ValueError, TypeError or RuntimeError with one sentence. Crashed: a traceback, a signal, no"
        f" end within {bad_inputs.SECONDS} s, or code of a checkpoint's that ran. {ASAN}",
        SWEEPS,
    ),
    "runs": (
        "Mixed precision",
        "On the data that the program brings along (DIGITS, CELLS_DIGITS, SHAPES); non-finite losses would be skipped"
        " and counted. float16's scaler leaves out steps while it finds its scale.",
        RUNS,
    ),
    "soaks": (
        "Long runs",
        "`python -m benchmarks.soak`: one process, thirty evaluations and checkpoints on the way, after each of which"
        " it was looked at from outside; of five looks memory is the median and open files the second fewest, since an"
        " image may be being read. Flat: at most 3 % more memory at the end than after the first third, and no more"
        " open files.",
        SOAKS | {"measured": "{day}"},
    ),
}


@command("benchmarks.reliability")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections and write the page; returns 1 if anything was lost, crashed, not finite or not flat."""
    flags, count = parser("benchmarks.reliability", __doc__), number(int, 1)
    flags.add_argument("--task", nargs="+", choices=[*JOBS], default=[*JOBS], help="default: all")
    flags.add_argument("--kills", type=count, default=50, help="default: 50")
    flags.add_argument("--losses", type=count, default=4, help="processes lost (default: 4)")
    flags.add_argument("--steps", type=count, default=500, help="of mixed precision (default: 500)")
    flags.add_argument("--soak-steps", type=count, default=3000, help="of the long run (default: 3000)")
    flags.add_argument("--inputs", type=count, default=500, help="bad inputs of each kind (default: 500)")
    flags.add_argument("--seed", type=number(int, 0), default=0, help="default: 0")
    flags.add_argument(
        "--sections", nargs="*", choices=[*SECTIONS], default=[*SECTIONS], metavar="NAME", help=", ".join(SECTIONS)
    )
    flags.add_argument("--results", type=Path, default=ROOT / "docs" / "results" / "reliability.json")
    flags.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "RELIABILITY.md")
    args = flags.parse_args(argv)
    ran: dict[str, dict[str, Any]] = {}
    # ended early, it takes the runs that it started along: they would go on for a million epochs
    with faults.exit_on_sigterm(), faults.ended(), tempfile.TemporaryDirectory(prefix="reliability_") as root:
        for task in args.task:
            for name in args.sections:
                folder = Path(root, task, name)
                folder.mkdir(parents=True)
                entry = run_section(name, JOBS[task], folder, args)
                ran.setdefault(task, {})[name] = entry
                print(
                    f"{task} {name}: {entry['seconds']} s, {len(entry['failures'])} lost", file=sys.stderr, flush=True
                )
                keep(args.results, task, name, entry)
    write(args.output, page(read(args.results)))
    return int(is_bad(ran))


def read(file: Path) -> dict[str, dict[str, Any]]:
    """What was found before; nothing where there is no `file`."""
    with contextlib.suppress(FileNotFoundError):
        return json.loads(file.read_text(encoding="utf-8"))
    return {}


def keep(file: Path, task: str, name: str, entry: dict[str, Any]) -> None:
    """Put `entry` into `file` at once, so that what comes after it may fail."""
    results = read(file)
    results.setdefault(task, {})[name] = entry
    write_json(file, results)


if __name__ == "__main__":
    sys.exit(main())
