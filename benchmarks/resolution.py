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

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import DTYPES, Case, build, model_spec
from benchmarks.command import add_device, add_threads, command, device_of, parser, write_json
from measure.flops import model_flops
from measure.machine import in_words, machine
from measure.timing import time_in_turns
from models_mamba import VisionMamba
from utils import UsageError
from utils.flags import number

MODELS = ("vim_tiny_patch16_224", "fastvim_tiny_patch16_224", "deit_tiny_patch16_224")
SIZES = (224, 512, 1024, 2048)


def scan_steps(model: torch.nn.Module, img_size: int) -> int | None:
    """Length of the sequence that each scan of `model` walks for images of `img_size`; None if it has no scan."""
    if not isinstance(model, VisionMamba):
        return None
    rows, cols = model.patch_embed.grid_of(img_size, img_size)
    return rows if model.methods.pooling is not None else rows * cols + model.num_prefix_tokens


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
    # warm from having its memory measured; one call of a large image takes long enough
    times = time_in_turns(cases, device, seconds, min_rounds=1, warm_up=0)
    for row, taken in zip(rows, times):
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


@command("benchmarks.resolution")
def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a Markdown table, write JSON and a plot."""
    flags = parser("benchmarks.resolution", __doc__)
    flags.add_argument(
        "--models",
        **dict(nargs="+", type=model_spec, default=list(MODELS), metavar="MODEL"),
        help="NAME or NAME:key=value,...",
    )
    side = number(int, 1)
    flags.add_argument(
        "--sizes", type=side, nargs="+", default=list(SIZES), metavar="SIDE", help="default: %(default)s"
    )
    flags.add_argument("--batch-size", type=side, default=1, metavar="N", help="default: %(default)s")
    flags.add_argument("--dtype", default="float32", choices=DTYPES, help="autocast to it")
    add_device(flags)
    add_threads(flags)
    flags.add_argument(
        "--seconds", type=number(float, 0), default=15.0, help="timing for each size (default: %(default)s)"
    )
    flags.add_argument("--out", type=Path, default=Path("output/resolution"), help="folder (default: %(default)s)")
    flags.add_argument("--add", action="store_true", help="keep the rows that --out holds")
    args = flags.parse_args(argv)
    device, file = device_of(args), args.out / "resolution.json"
    before = kept_rows(file) if args.add else []
    about = machine(device)
    rows: list[dict[str, Any]] = []
    for size in args.sizes:
        rows += measure(args.models, size, args.batch_size, args.dtype, device, args.seconds)
    measured = {(row["model"], row["img_size"]) for row in rows}
    kept = [row for row in before if (row["model"], row["img_size"]) not in measured]
    rows = sorted(kept + rows, key=lambda row: row["img_size"])
    print(in_words(about), end="\n\n")
    print(table(rows))
    write_json(file, {"machine": about, "rows": rows})
    plot(rows, args.out / "resolution.png")


def kept_rows(file: Path) -> list[dict[str, Any]]:
    """The rows that `file` holds; none if it is not there. Raises UsageError if it is something else."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UsageError(f"--add wants rows in {file}, which cannot be read: {error}.") from error


if __name__ == "__main__":
    sys.exit(main())
