"""An epoch of the quickstart's Vim, alone and beside processes that keep cores busy, with no variable of OpenMP set.

    python -m benchmarks.busy                    # beside one busy process, on the first of the cores
    python -m benchmarks.busy --busy 2 --rounds 3

Each epoch is a run of the program in a process of its own, on the digits that scikit-learn brings; a figure is the
shortest of the rounds, in which the two take turns. Wanted: at most 2.5 times the quiet epoch beside one busy process.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.command import command, parser, write_json
from benchmarks.program import ROOT, lines
from measure.machine import in_words, machine
from utils import RunError
from utils.flags import number

# scripts/quickstart.sh's
RECIPE = (
    *("--model", "vim_nano_patch4_32", "--data-set", "DIGITS", "--num_workers", "0", "--batch-size", "32"),
    *("--unscale-lr", "--lr", "4e-3", "--drop-path", "0", "--no-model-ema", "--mixup", "0", "--cutmix", "0"),
    *("--reprob", "0", "--aa", "none", "--color-jitter", "0", "--no-repeated-aug", "--warmup-epochs", "0"),
    *("--device", "cpu", "--epochs", "1"),
)
SPIN = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that do not rest, each on a core of its own."""
    cores = sorted(os.sched_getaffinity(0))
    spinning = [
        subprocess.Popen([sys.executable, "-c", SPIN, str(cores[i % len(cores)])], start_new_session=True)
        for i in range(processes)
    ]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def epoch() -> float:
    """Seconds of training and evaluation in the epoch of one run, as its log has them."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_", "MKL_"))}
    with tempfile.TemporaryDirectory() as folder:
        order = [sys.executable, "main.py", *RECIPE, "--output_dir", folder]
        found = subprocess.run(order, cwd=ROOT, env=environment, text=True, capture_output=True)
        if found.returncode:
            raise RunError(f"the program ended with code {found.returncode}: {found.stderr.strip()[-300:]}")
        return lines(Path(folder))[-1]["seconds"]


@command("benchmarks.busy")
def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write what was asked for."""
    flags = parser("benchmarks.busy", __doc__)
    flags.add_argument("--busy", type=number(int, 1), default=1, help="busy processes (default: %(default)s)")
    flags.add_argument("--rounds", type=number(int, 1), default=2, help="default: %(default)s")
    flags.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    args = flags.parse_args(argv)
    print(in_words(machine(torch.device("cpu"))) + "\n")
    alone, beside = [], []
    for _ in range(args.rounds):
        alone.append(epoch())
        with busy(args.busy):
            beside.append(epoch())
    ratio = min(beside) / min(alone)
    print("| epoch | seconds, each round | times the quiet one |\n|---|---|---|")
    print(f"| alone | {', '.join(f'{each:.1f}' for each in alone)} | 1.00 |")
    print(f"| beside {args.busy} | {', '.join(f'{each:.1f}' for each in beside)} | {ratio:.2f} |")
    write_json(args.json, {"alone": alone, "beside": beside, "ratio": ratio, "busy": args.busy})


if __name__ == "__main__":
    sys.exit(main())
