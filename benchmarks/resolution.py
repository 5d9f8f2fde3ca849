"""Images per second, peak memory and multiply-adds against image size: what pooling the scan buys as images grow.

    python -m benchmarks.resolution                                     # Vim-Ti, FastVim-T, DeiT-Ti, 224 to 2048 px
    python -m benchmarks.resolution --sizes 224 512 --seconds 20 --out output/resolution

Models of one size are timed in turns in one process, in a new random order each round; a figure is the median. Slow
sizes get as many rounds as fit in `--seconds`, at least one. Peak memory is the weights, the images and the most that
one forward pass allocates on top of them. Scan steps are the length of the sequence that the scans walk. Writes
resolution.json and resolution.png to `--out`; with `--add`, rows that are there already stay, so that a long run may be
split.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.flops import model_flops
from benchmarks.throughput import Case, build, machine, parse_spec, synchronize
from models_mamba import VisionMamba

MODELS = ("vim_tiny_patch16_224", "fastvim_tiny_patch16_224", "deit_tiny_patch16_224")
SIZES = (224, 512, 1024, 2048)


def scan_steps(model: torch.nn.Module, img_size: int) -> int | None:
    """Length of the sequence that each scan of `model` walks for images of `img_size`; None if it has no scan."""
    if not isinstance(model, VisionMamba):
        return None
    rows, cols = model.patch_embed.grid_of(img_size, img_size)
    return rows if model.methods.pooling is not None else rows * cols + model.num_prefix_tokens


def seconds_per_call(cases: Sequence[Case], device: torch.device, seconds: float) -> list[list[float]]:
    """Seconds that each of `cases`, already warm, takes: one list each, one entry a round, for about `seconds`."""
    times: list[list[float]] = [[] for _ in cases]
    order, end = list(range(len(cases))), time.perf_counter() + seconds
    shuffle = random.Random(0).shuffle
    while not times[0] or time.perf_counter() < end:
        shuffle(order)
        for number in order:
            synchronize(device)
            start = time.perf_counter()
            cases[number]()
            synchronize(device)
            times[number].append(time.perf_counter() - start)
    return times


def measure(
    models: Sequence[str], img_size: int, batch_size: int, dtype: str, device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    """One row a model: images/s, peak bytes, multiply-adds and scan steps at one image size."""
    torch.manual_seed(0)
    images = torch.randn(batch_size, 3, img_size, img_size, device=device)
    cases, rows = [], []
    for spec in models:
        model = build(spec, img_size).to(device)
        case = Case(model, images, dtype=dtype)
        rows.append(
            {
                "model": spec,
                "img_size": img_size,
                "batch_size": batch_size,
                "dtype": dtype,
                "peak_bytes": case.peak_bytes(),
                "flops": model_flops(model, img_size).full,
                "scan_steps": scan_steps(model, img_size),
            }
        )
        cases.append(case)
    for row, taken in zip(rows, seconds_per_call(cases, device, seconds)):
        row |= {"images_per_second": batch_size / statistics.median(taken), "rounds": len(taken)}
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as Markdown, with each speed over that of the first model at its size."""
    first = {row["img_size"]: row["images_per_second"] for row in reversed(rows)}
    head = "| image | model | images/s | times the first | peak, MiB | multiply-adds, G | scan steps | rounds |"
    lines = [head, "|" + "---|" * 8]
    for row in rows:
        speed = row["images_per_second"]
        lines.append(
            f"| {row['img_size']} | {row['model']} | {speed:.3f} | {speed / first[row['img_size']]:.2f} "
            f"| {row['peak_bytes'] / 2**20:.1f} | {row['flops'] / 1e9:.2f} | {row['scan_steps'] or '-'} "
            f"| {row['rounds']} |"
        )
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Cost against image size, one line a model, as a PNG: seconds an image, peak memory, multiply-adds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = (
        ("seconds an image", lambda row: 1 / row["images_per_second"]),
        ("peak memory, MiB", lambda row: row["peak_bytes"] / 2**20),
        ("multiply-adds an image, G", lambda row: row["flops"] / 1e9),
    )
    sizes = sorted({row["img_size"] for row in rows})
    for axes, (title, value) in zip(figure.subplots(1, 3), panels):
        for model in dict.fromkeys(row["model"] for row in rows):
            points = sorted((row["img_size"], value(row)) for row in rows if row["model"] == model)
            axes.plot(*zip(*points), marker="o", label=model)
        axes.set(title=title, xlabel="image side, px", xscale="log", yscale="log")
        axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a Markdown table, write JSON and a plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="MODEL", help="NAME or NAME:key=value,...")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=list(SIZES), metavar="SIDE", help="default: %(default)s"
    )
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="autocast to it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's choice)")
    parser.add_argument("--seconds", type=float, default=15.0, help="timing for each size (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("output/resolution"), help="folder (default: %(default)s)")
    parser.add_argument("--add", action="store_true", help="keep the rows that --out holds")
    args = parser.parse_args(argv)
    if min(*args.sizes, args.batch_size, args.threads or 1) < 1:
        parser.error("sizes and threads are whole numbers from 1 on")
    if args.threads:
        torch.set_num_threads(args.threads)
    device, file = torch.device(args.device), args.out / "resolution.json"
    about = machine(device)
    rows: list[dict[str, Any]] = []
    try:
        for spec in args.models:
            parse_spec(spec)
        for size in args.sizes:
            rows += measure(args.models, size, args.batch_size, args.dtype, device, args.seconds)
    except ValueError as error:
        parser.error(str(error))
    if args.add and file.exists():
        measured = {(row["model"], row["img_size"]) for row in rows}
        kept = [row for row in json.loads(file.read_text())["rows"] if (row["model"], row["img_size"]) not in measured]
        rows = sorted(kept + rows, key=lambda row: row["img_size"])
    args.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    plot(rows, args.out / "resolution.png")
    print(", ".join(f"{name} {value}" for name, value in about.items()), end="\n\n")
    print(table(rows))


if __name__ == "__main__":
    main()
