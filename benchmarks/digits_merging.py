"""Accuracy under every merging strategy and order on the digits: `python -m benchmarks.digits_merging`.

Trains the nano Vim from scratch for each setting and seed and prints a Markdown table, mean and spread over the seeds.
Runs that are finished, or begun, in the output folder go on from there, so the table can be had in pieces.
The settings are Famba-V's, scaled from 24 layers of 196 patches to 8 layers of 64: `all` and `alternate` fuse three
quarters of the patches on the way, `lower` and `upper` a quarter, in the first two layers or the last two.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import timm

import main as program
from benchmarks.summary import markdown, summarize
from fusion import config

ROOT = Path(__file__).resolve().parents[1]
STRATEGIES = {
    "all": ("--fusion-token", "6"),
    "alternate": ("--fusion-token", "12"),
    "lower": ("--fusion-layer", "2", "--fusion-token", "8"),
    "upper": ("--fusion-layer", "5", "--fusion-token", "8"),
}
SETTINGS: dict[str, tuple[str, ...]] = {"none": ("--fusion-strategy", "no")} | {
    f"{strategy} {order}": ("--fusion-strategy", strategy, *flags, "--fusion-order", order)
    for strategy, flags in STRATEGIES.items()
    for order in ("published", "raster")
}
# few images and a short schedule want plain augmentation and a high learning rate
RECIPE = (
    *("--model", "vim_nano_patch4_32", "--data-set", "DIGITS", "--num_workers", "0", "--batch-size", "32"),
    *("--unscale-lr", "--lr", "3e-3", "--warmup-epochs", "1", "--drop-path", "0", "--no-model-ema", "--mixup", "0"),
    *("--cutmix", "0", "--reprob", "0", "--aa", "none", "--color-jitter", "0", "--no-repeated-aug"),
)
COLUMNS = {
    "merging": "{setting}",
    "tokens at the end": "{tokens}",
    "seeds": "{seeds}",
    "top-1, % (mean ± standard deviation)": "{mean:.2f} ± {spread:.2f}",
    "lowest to highest": "{lowest:.2f} to {highest:.2f}",
    "training, s": "{seconds:.0f}",
}


def tokens_at_the_end(setting: str) -> int:
    """Length of the last site's sequence, class token included."""
    name, keywords = config.model_keywords(program.get_args_parser().parse_args([*RECIPE, *SETTINGS[setting]]))
    model = timm.create_model(name, **keywords)
    return model.site_methods[0].schedule[-1] if model.site_methods else model.patch_embed.num_patches + 1


def folder_of(output: Path, setting: str, seed: int) -> Path:
    """Where a run writes."""
    return output / f"{setting.replace(' ', '_')}_seed{seed}"


def train(output: Path, setting: str, seed: int, epochs: int, threads: int) -> None:
    """Run one setting with one seed to its end. Raises CalledProcessError, with the output shown, if it fails."""
    folder = folder_of(output, setting, seed)
    run = ("--seed", str(seed), "--epochs", str(epochs), "--output_dir", str(folder), "--resume", "auto")
    command = [sys.executable, str(ROOT / "main.py"), *RECIPE, *SETTINGS[setting], *run]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        done.check_returncode()
    print(f"{folder.name}: {summarize(folder)['test_acc1']:.2f} %", file=sys.stderr)


def row_of(output: Path, setting: str, seeds: int) -> dict[str, Any]:
    """One row of the table, from what the runs wrote."""
    runs = [summarize(folder_of(output, setting, seed)) for seed in range(seeds)]
    scores = [run["test_acc1"] for run in runs]
    return dict(
        setting=setting,
        tokens=tokens_at_the_end(setting),
        seeds=seeds,
        mean=statistics.mean(scores),
        spread=statistics.stdev(scores) if seeds > 1 else 0.0,
        lowest=min(scores),
        highest=max(scores),
        seconds=statistics.mean(run["seconds"] for run in runs),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, then print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.digits_merging", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/digits_merging"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1)), help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), metavar="SETTING")
    args = parser.parse_args(argv)
    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = [
            pool.submit(train, args.output, setting, seed, args.epochs, args.threads)
            for seed in range(args.seeds)
            for setting in args.settings
        ]
        for run in waiting:
            run.result()
    print(markdown([row_of(args.output, setting, args.seeds) for setting in args.settings], COLUMNS))


if __name__ == "__main__":
    main()
