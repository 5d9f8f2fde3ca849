"""Speed, memory and multiply-adds of any registry models, side by side, without training.

    python -m benchmarks.throughput vim_nano_patch4_32 fastvim_nano_patch4_32 deit_nano_patch4_32
    python -m benchmarks.throughput vim_tiny_patch16_224 deit_tiny_patch16_224 --img-size 224 512 --dtype bfloat16
    python -m benchmarks.throughput "vim_tiny_patch16_224:fusion_strategy=upper,fusion_layer=4,fusion_token=8"
    python -m benchmarks.throughput vim_tiny_patch16_224 --peers --compile --onnx      # against what one would take

A model is a registry name, with keywords behind a colon. Everything that shares an image and batch size is measured in
turns in one process, in a new random order each round, so that a machine that slows down slows down all of it; a figure
is the median over the rounds, after a warm-up. A training step is forward, backward and the AdamW that the program
trains with; no model skips layers at random, whatever its registry makes it with. dtypes other than float32 run under
autocast, as the program's AMP does. Peak memory is the model, its images and the most that a call allocates on top of
them. The gates of a model that skips scan directions are set to the share that its training aims at, since random
weights would skip none. With `--peers` the models that a user would take on a CPU come along (`benchmarks.peers`), with
`--compile` every model under torch.compile, and with `--onnx` every one as ONNX Runtime runs its export.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.layers import to_2tuple

from benchmarks.cases import DTYPES, Case, OnnxCase, build, model_spec, own_size, without_drop_path
from benchmarks.command import add_device, add_threads, command, device_of, parser, write_json
from benchmarks.peers import PEERS
from measure.flops import model_flops
from measure.machine import in_words, machine
from measure.pruning import force_gates, kept_directions
from measure.timing import Call, time_in_turns
from models_mamba import VisionMamba
from utils import UsageError
from utils.flags import number, sides, told_size

FIGURES = ("images_per_second", "peak_bytes")


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each model, image size, batch size, dtype and way of running that `args` ask for."""
    device = torch.device(args.device)
    rows: list[dict[str, Any]] = []
    for img_size in args.img_size or [None]:
        for batch_size in args.batch_size:
            rows += _measure_together(args, device, img_size, batch_size)
    return rows


def _measure_together(
    args: argparse.Namespace, device: torch.device, img_size: int | tuple[int, int] | None, batch_size: int
) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    timed: list[tuple[dict[str, Any], str, Call]] = []
    for spec in args.models:
        model = without_drop_path(build(spec, img_size)).to(device)
        size = img_size or own_size(model)
        images = torch.randn(batch_size, 3, *to_2tuple(size), device=device)
        kept = None
        if isinstance(model, VisionMamba) and kept_directions(model, images) is not None:
            force_gates(model, batch_size, model.methods.pruning.block_keep_ratio)
            kept = kept_directions(model, images)
        flops = model_flops(model, size, kept)
        shared = {
            "model": spec,
            "img_size": size,
            "batch_size": batch_size,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "flops_published": flops.published,
            "flops_full": flops.full,
        }
        for dtype in args.dtype:
            for way in ways_of(args, dtype):
                row = shared | {"dtype": dtype, "way": way, "compiled": way == "compiled"}
                rows.append(row)
                row |= {f"{kind}_{figure}": None for kind in ("eval", "train")[: 1 + args.train] for figure in FIGURES}
                if way == "ONNX Runtime":
                    try:
                        timed.append((row, "eval", OnnxCase(model, images)))
                    except UsageError as error:
                        row["note"] = str(error)
                    continue
                for kind in ("eval", "train") if args.train else ("eval",):
                    case = Case(model, images, dtype=dtype, compiled=way == "compiled", train=kind == "train")
                    try:
                        row[f"{kind}_peak_bytes"] = case.peak_bytes()
                        timed.append((row, kind, case))
                    except torch.OutOfMemoryError:
                        row["note"] = "out of memory"
                        torch.cuda.empty_cache()
    times = time_in_turns([case for _, _, case in timed], device, args.seconds) if timed else []
    for (row, kind, _), taken in zip(timed, times):
        row[f"{kind}_images_per_second"] = batch_size / statistics.median(taken)
        row[f"{kind}_seconds"] = taken
    return rows


def ways_of(args: argparse.Namespace, dtype: str) -> list[str]:
    """How every model is run."""
    ways = ["eager", *(["compiled"] if args.compile else [])]
    return [*ways, *(["ONNX Runtime"] if args.onnx and dtype == "float32" else [])]


def table(rows: Sequence[dict[str, Any]], train: bool) -> str:
    """Rows of `measure` as Markdown."""
    kinds = ("eval", "train") if train else ("eval",)
    head = ["model", "image", "batch", "dtype", "parameters, M", "FLOPs published, G", "FLOPs full, G"]
    head += [f"{kind} {what}" for kind in kinds for what in ("images/s", "peak, MiB")]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        cells = [row["model"].replace("|", "\\|"), told_size(row["img_size"]), row["batch_size"]]
        cells.append(row["dtype"] + ("" if row["way"] == "eager" else f", {row['way']}"))
        cells += [f"{row['parameters'] / 1e6:.3f}"]
        cells += [f"{row[name] / 1e9:.4f}" for name in ("flops_published", "flops_full")]
        for kind in kinds:
            speed, peak = row[f"{kind}_images_per_second"], row[f"{kind}_peak_bytes"]
            cells += [row.get("note", "-") if value is None else f"{value:.1f}" for value in (speed, _mib(peak))]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _mib(count: int | None) -> float | None:
    return None if count is None else count / 2**20


@command("benchmarks.throughput")
def main(argv: Sequence[str] | None = None) -> None:
    """Print a Markdown table, and write what it was made from as JSON."""
    flags = parser("benchmarks.throughput", __doc__)
    flags.add_argument("models", nargs="+", type=model_spec, metavar="MODEL", help="NAME or NAME:key=value,...")
    flags.add_argument("--img-size", type=sides, nargs="+", metavar="SIDE", help="or HxW (default: each model's own)")
    flags.add_argument("--batch-size", type=number(int, 1), nargs="+", default=[32], metavar="N", help="default: 32")
    flags.add_argument("--dtype", nargs="+", default=["float32"], choices=DTYPES, help="default: float32")
    flags.add_argument("--compile", action="store_true", help="measure every model under torch.compile as well")
    flags.add_argument("--train", action="store_true", help="measure a training step as well")
    flags.add_argument(
        "--onnx", action="store_true", help="measure every model in ONNX Runtime as well: inference, float32, on a CPU"
    )
    flags.add_argument("--peers", action="store_true", help=f"measure {', '.join(PEERS)} as well")
    add_device(flags)
    add_threads(flags)
    flags.add_argument(
        "--seconds",
        **dict(type=number(float, 0), default=20.0),
        help="timing for each image and batch size (default: %(default)s)",
    )
    flags.add_argument("--json", type=Path, metavar="FILE", help="write rows and machine here")
    args = flags.parse_args(argv)
    if args.onnx and torch.device(args.device).type != "cpu":
        raise UsageError("--onnx contradicts a GPU: ONNX Runtime is measured on a CPU.")
    if args.peers:
        args.models += [name for name in PEERS if name not in args.models]
    about = machine(device_of(args))
    rows = measure(args)
    print(in_words(about), end="\n\n")
    print(table(rows, args.train))
    write_json(args.json, {"machine": about, "rows": rows})


if __name__ == "__main__":
    sys.exit(main())
