"""What a run survives and what it refuses: `python -m benchmarks.reliability` writes benchmarks/RELIABILITY.md.

Runs are killed, signalled, given a full disk and a lost process, trained in mixed precision, and spread over two
network namespaces (as root); the program and the operators are given inputs that are broken at random. Everything is
drawn from `--seed`. The exit code is 1 if anything was lost, crashed or not finite. Wants the packages of the test
suite, and runs from the root of a checkout.
"""

from __future__ import annotations

import json
import math
import random
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks import bad_inputs
from benchmarks.command import command, parser, write
from benchmarks.comparisons import DIGITS_RECIPE
from benchmarks.faults import Lost, Tally, check_readable, fill_disk, lose_process, network, preempt, soak, succeed
from benchmarks.program import ROOT, lines, start
from benchmarks.summary import markdown
from benchmarks.sweeps import Sweep, bad_inputs_of_all_kinds
from measure.machine import in_words, machine
from utils.flags import number

FAULTS = {"fault": "{name}", "tried": "{tried}", "survived": "{survived}", "lost": "{lost}", "notes": "{notes}"}
SWEEPS = {
    "input": "{name}",
    "tried": "{tried}",
    "accepted": "{accepted}",
    "refused cleanly": "{refused}",
    "crashed": "{crashed}",
}
RUNS = {
    "model": "{model}",
    "arithmetic": "{dtype}",
    "optimizer steps": "{steps}",
    "non-finite losses": "{bad}",
    "steps that the scaler left out": "{scaled}",
    "first and last epoch's loss": "{first:.4f}, {last:.4f}",
    "finite": "{finite}",
}

# ---------------------------------------------------------------------------------------------------------------------
# Mixed precision

MODELS: dict[str, tuple[str, ...]] = {
    "Vim": ("--model", "vim_nano_patch4_32"),
    "Famba-V (paired), `upper`": (
        *("--model", "fambav_nano_patch4_32", "--fusion-strategy", "upper"),
        *("--fusion-layer", "2", "--fusion-token", "8"),
    ),
    "FastVim": ("--model", "fastvim_nano_patch4_32"),
    "DyVM": ("--model", "dyvm_nano_patch4_32"),
}
TRAIN_IMAGES = 1437
BATCH = 14


def mixed_precision(folder: Path, steps: int) -> list[dict[str, Any]]:
    """Train every method on DIGITS for at least `steps` steps; non-finite losses are skipped and counted."""
    epochs = math.ceil(steps / (TRAIN_IMAGES // BATCH))
    rows = []
    for dtype in ("bfloat16", "float16"):
        for model, own in MODELS.items():
            output = folder / f"{own[1]}_{dtype}"
            flags = [
                "--data-set",
                "DIGITS",
                *DIGITS_RECIPE,
                *own,
                "--batch-size",
                BATCH,
                "--lr",
                "1e-3",
                "--epochs",
                epochs,
                "--device",
                "cpu",
            ]
            flags += ["--if_amp", "--amp-dtype", dtype, "--if_continue_inf", "--output_dir", output]
            if model == "DyVM":  # it starts from a trained Vim, and learns from it
                flags += ["--model-path", folder / f"{MODELS['Vim'][1]}_{dtype}" / "checkpoint.pth"]
            try:
                told = succeed(start("main.py", *flags), 3600)
            except Lost as error:
                told = " ".join(str(error).split())
                rows.append(dict(model=model, dtype=dtype, steps=0, bad=0, scaled=0, first=math.nan, last=math.nan))
                rows[-1]["finite"] = f"no: {told}"
                continue
            state, log = check_readable(output), lines(output)
            taken = int(max(entry["step"] for entry in state["optimizer"]["state"].values()))
            bad = len(re.findall("the step is skipped", told))
            weights = all(bool(value.isfinite().all()) for value in state["model"].values())
            losses = [line["train_loss"] for line in log]
            finite = bad == 0 and weights and all(map(math.isfinite, losses))
            rows.append(
                dict(model=model, dtype=dtype, steps=taken, bad=bad, scaled=state["updates"] - taken)
                | dict(first=losses[0], last=losses[-1], finite="yes" if finite else "no")
            )
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Report


def report(
    command: str, faults: list[Tally], sweeps: list[Sweep], runs: list[dict[str, Any]], seconds: dict[str, float]
) -> str:
    """The Markdown page."""
    failures = [text for each in (*faults, *sweeps) for text in each.failures]
    total = {
        "faults": [sum(each.tried for each in faults), sum(len(each.failures) for each in faults)],
        "inputs": [sum(each.tried for each in sweeps), sum(len(each.failures) for each in sweeps)],
    }
    finite = sum(run["finite"] == "yes" for run in runs)
    parts = [
        "# What a run survives and what it refuses",
        f"Written by `{command}`. Machine: {in_words(machine(torch.device('cpu')))}, {date.today()}. Seconds: "
        + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
        + ".",
        f"Faults: {total['faults'][0]} tried, {total['faults'][0] - total['faults'][1]} survived,"
        f" {total['faults'][1]} lost. Bad inputs: {total['inputs'][0]} tried, {sum(each.refused for each in sweeps)}"
        f" refused cleanly, {sum(each.accepted for each in sweeps)} accepted (they were harmless), {total['inputs'][1]}"
        f" crashed. Mixed precision: {len(runs)} runs, {finite} finite, {len(runs) - finite} not.",
    ]
    if faults:
        parts += [
            "## Faults",
            "Survived: every checkpoint that is there loads, and the run goes on as if nothing had been.",
            markdown([each.row() for each in faults], FAULTS),
        ]
    if sweeps:
        parts += [
            "## Bad inputs",
            "Drawn by hypothesis (benchmarks/bad_inputs.py); some of them are good. Refused cleanly: the program ends"
            " with one sentence on stderr and exit code 2 (1 for a run that could not go on), an operator raises"
            " ValueError, TypeError or RuntimeError with one sentence. Crashed: a traceback, a signal, no end within"
            f" {bad_inputs.SECONDS} s, or code of a checkpoint's that ran.",
            markdown([each.row() for each in sweeps], SWEEPS),
        ]
    if runs:
        parts += [
            "## Mixed precision",
            f"DIGITS at 32 px, batches of {BATCH}; non-finite losses would be skipped and counted. float16's scaler"
            " leaves out steps while it finds its scale.",
            markdown(runs, RUNS),
        ]
    if failures:
        parts += ["## Lost and crashed", "\n".join("- " + " ".join(text.split())[:1200] for text in failures[:40])]
    return "\n\n".join(parts) + "\n"


@command("benchmarks.reliability")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections and write the page; returns 1 if anything was lost, crashed or not finite."""
    flags, count = parser("benchmarks.reliability", __doc__), number(int, 1)
    flags.add_argument("--kills", type=count, default=50, help="default: 50")
    flags.add_argument("--steps", type=count, default=500, help="of mixed precision (default: 500)")
    flags.add_argument("--inputs", type=count, default=500, help="bad inputs of each kind (default: 500)")
    flags.add_argument("--seed", type=number(int, 0), default=0, help="default: 0")
    names = ("kills", "signals", "disk", "processes", "network", "inputs", "precision")
    flags.add_argument("--sections", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    flags.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "RELIABILITY.md")
    args = flags.parse_args(argv)
    faults: list[Tally] = []
    sweeps: list[Sweep] = []
    runs: list[dict[str, Any]] = []
    seconds: dict[str, float] = {}
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="reliability_") as root:

        def run(name: str) -> None:
            folder, began = Path(root, name), time.monotonic()
            folder.mkdir()
            if name == "kills":
                faults.append(soak(folder, args.kills, chance))
            elif name == "signals":
                faults.extend(preempt(folder, chance))
            elif name == "disk":
                faults.extend(fill_disk(folder))
            elif name == "processes":
                faults.extend(lose_process(folder, 4))
            elif name == "network":
                faults.extend(network(folder))
            elif name == "inputs":
                sweeps.extend(bad_inputs_of_all_kinds(folder, args.inputs, args.seed))
            else:
                runs.extend(mixed_precision(folder, args.steps))
            seconds[name] = time.monotonic() - began
            print(f"{name}: {seconds[name]:.0f} s", file=sys.stderr, flush=True)

        # what only trains goes on beside what is killed and fuzzed
        with ThreadPoolExecutor(1) as pool:
            aside = [pool.submit(run, name) for name in args.sections if name == "precision"]
            for name in args.sections:
                if name != "precision":
                    run(name)
            for each in aside:
                each.result()
    told = " ".join(["python -m benchmarks.reliability", *(sys.argv[1:] if argv is None else argv)])
    write(args.output, report(told, faults, sweeps, runs, seconds))
    bad = any(each.failures for each in (*faults, *sweeps)) or any(run["finite"] == "no" for run in runs)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
