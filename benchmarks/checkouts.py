"""Models on two checkouts of this project, in turns: whether a change made them slower.

    git worktree add ../before COMMIT       # and build its kernels there, as scripts/setup.sh does
    python -m benchmarks.checkouts ../before . --models vim_tiny_patch16_224 fastvim_tiny_patch16_224 --train

A process for each checkout holds the model and waits; each in turn is asked for a few calls, so that a machine whose
speed wanders does so for both. A figure is the median over all calls, and how far the fastest lies from it says how
much the machine wandered.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.command import add_threads, command, parser, write_json
from measure.machine import in_words, machine
from utils import RunError, UsageError
from utils.flags import number

CALLS = 4  # in one turn
PACKAGES = ("causal_conv1d", "mamba-1p1p1")
# Reads how many calls to time, a line each; writes their seconds. Any checkout will do: only timm's names are used.
WORKER = """
import sys, time, timm, torch
import models_mamba, mamba_ssm
name, kind, batch, threads, folder = sys.argv[1:]
assert mamba_ssm.__file__.startswith(folder), mamba_ssm.__file__ + " is not of " + folder
if int(threads):
    torch.set_num_threads(int(threads))
torch.manual_seed(0)
model = timm.create_model(name).train(kind == "train")
images = torch.randn(int(batch), *model.default_cfg["input_size"])
adamw = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
def call():
    if kind == "eval":
        with torch.inference_mode():
            return model(images)
    adamw.zero_grad()
    out = model(images)
    (out if isinstance(out, torch.Tensor) else out[0]).float().square().mean().backward()
    adamw.step()
for _ in range(3):
    call()
print("ready", flush=True)
for line in sys.stdin:
    seconds = []
    for _ in range(int(line)):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    print(*seconds, flush=True)
"""


@contextlib.contextmanager
def waiting(folder: Path, name: str, kind: str, batch: int, threads: int) -> Iterator[subprocess.Popen[str]]:
    """A process that has built the model of the checkout `folder` and waits to be asked."""
    paths = (folder, *(folder / package for package in PACKAGES))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    order = [sys.executable, "-c", WORKER, name, kind, str(batch), str(threads), str(folder)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen(order, cwd=folder, env=environment, text=True, **pipes)
    try:
        if process.stdout.readline().strip() != "ready":
            told = process.stderr.read().strip().rpartition("\n")[2]
            raise RunError(f"{name} does not run in {folder}: {told}")
        yield process
    finally:
        process.kill()
        process.communicate()


def ask(process: subprocess.Popen[str], calls: int) -> list[float]:
    """Seconds of each of so many calls."""
    process.stdin.write(f"{calls}\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RunError(f"a process ended while it was asked: {process.stderr.read().strip().rpartition(chr(10))[2]}")
    return [float(each) for each in line.split()]


def compare(
    folders: Sequence[Path], name: str, kind: str, batch: int, threads: int, seconds: float
) -> list[list[float]]:
    """Seconds of the calls on each of `folders`, asked in turns for about `seconds`, at least twice."""
    with contextlib.ExitStack() as held:
        processes = [held.enter_context(waiting(folder, name, kind, batch, threads)) for folder in folders]
        taken: list[list[float]] = [[] for _ in folders]
        end, rounds = time.perf_counter() + seconds, 0
        while rounds < 2 or time.perf_counter() < end:
            for process, own in zip(processes, taken):
                own += ask(process, CALLS)
            rounds += 1
    return taken


@command("benchmarks.checkouts")
def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write what was asked for."""
    flags = parser("benchmarks.checkouts", __doc__)
    flags.add_argument("folders", type=Path, nargs=2, metavar="CHECKOUT", help="the one before, and the one now")
    flags.add_argument("--models", nargs="+", default=["vim_tiny_patch16_224"], help="default: vim_tiny_patch16_224")
    flags.add_argument("--batch-size", type=number(int, 1), default=4, help="default: %(default)s")
    flags.add_argument("--train", action="store_true", help="measure a training step as well")
    add_threads(flags)
    flags.add_argument("--seconds", type=number(float, 0), default=30.0, help="of each row (default: %(default)s)")
    flags.add_argument("--json", type=Path, metavar="FILE", help="write the seconds of every call here")
    args = flags.parse_args(argv)
    folders = [folder.expanduser().resolve() for folder in args.folders]
    for folder in folders:
        if not (folder / "models_mamba.py").is_file():
            raise UsageError(f"{folder} is no checkout of this project: it has no models_mamba.py.")
    print(in_words(machine(torch.device("cpu"))) + "\n")
    print("| model | what | before, median (fastest), ms | now, median (fastest), ms | time now over before |")
    print("|---|---|---|---|---|")
    rows = []
    for name in args.models:
        for kind in ("eval", "train") if args.train else ("eval",):
            taken = compare(folders, name, kind, args.batch_size, args.threads or 0, args.seconds)
            before, now = (statistics.median(own) for own in taken)
            told = [f"{1e3 * statistics.median(own):.1f} ({1e3 * min(own):.1f})" for own in taken]
            print(f"| {name} | {kind} | {' | '.join(told)} | {now / before:.3f} |", flush=True)
            rows.append({"model": name, "kind": kind, "seconds": taken, "ratio": now / before})
    write_json(args.json, {"batch_size": args.batch_size, "rows": rows})


if __name__ == "__main__":
    sys.exit(main())
