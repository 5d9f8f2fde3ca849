"""Images per second and peak memory of segmenters against image size, all under one decoder, and of their bodies alone.

    python -m benchmarks.segmentation                                      # 512 and 1,024 px, batch 1
    python -m benchmarks.segmentation --sizes 1024 --models fastvim_tiny_patch16_224 vit_tiny_patch16_224 --seconds 60

UPerNet of `--channels` on each of `--models`, in eval mode. FastVim's maps go to it at stride 16, as published; those
of other backbones of one stride by the adapter to strides 4 to 32, Swin's as they are. All are timed in turns in one
process, in a new random order each round; a figure is the median. Peak memory is weights, image and the most that one
call allocates on top of them. Writes JSON to `--out`.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case, model_spec
from benchmarks.command import add_device, add_threads, command, device_of, parser, write_json
from measure.machine import in_words, machine
from measure.timing import time_in_turns
from tasks.segment import build_segmenter
from utils.flags import number

MODELS = (
    "vim_tiny_patch16_224",
    "fastvim_tiny_patch16_224",
    "dyvm_tiny_patch16_224",
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
)
CLASSES = 150


def measure(
    models: Sequence[str], size: int, channels: int, device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    """One row a model: images/s of the whole and of its body, peak bytes of the whole, at one image size."""
    torch.manual_seed(0)
    image = torch.randn(1, 3, size, size, device=device)
    cases: list[Case] = []
    rows: list[dict[str, Any]] = []
    for name in models:
        model = build_segmenter(name, CLASSES, img_size=size, channels=channels).eval().to(device)
        cases += [Case(model, image), Case(model.backbone, image)]
        parameters = sum(parameter.numel() for parameter in model.parameters())
        rows.append(dict(model=name, img_size=size, parameters=parameters, peak_bytes=cases[-2].peak_bytes()))
    # warm from having its memory measured
    times = time_in_turns(cases, device, seconds, min_rounds=1, warm_up=0)
    for row, whole, body in zip(rows, times[::2], times[1::2]):
        row |= dict(
            images_per_second=1 / statistics.median(whole),
            body_images_per_second=1 / statistics.median(body),
            rounds=len(whole),
        )
    return rows


def table(rows: Sequence[dict[str, Any]], peer: str = "vit_tiny_patch16_224") -> str:
    """Rows as Markdown, with each speed over that of `peer` at its size, or of the first model where it is missing."""
    base = {row["img_size"]: row["images_per_second"] for row in reversed(rows)}
    base |= {row["img_size"]: row["images_per_second"] for row in rows if row["model"] == peer}
    lines = ["| image | segmenter on | parameters, M | images/s | times the peer | body alone, images/s | peak, MiB |"]
    lines.append("|" + "---|" * 7)
    for row in rows:
        speed = row["images_per_second"]
        lines.append(
            f"| {row['img_size']} | {row['model']} | {row['parameters'] / 1e6:.2f} | {speed:.3f} "
            f"| {speed / base[row['img_size']]:.2f} | {row['body_images_per_second']:.3f} "
            f"| {row['peak_bytes'] / 2**20:.0f} |"
        )
    return "\n".join(lines)


@command("benchmarks.segmentation")
def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a Markdown table, write JSON."""
    flags = parser("benchmarks.segmentation", __doc__)
    side = number(int, 16)
    flags.add_argument(
        "--models", nargs="+", type=model_spec, default=list(MODELS), metavar="NAME", help="default: %(default)s"
    )
    flags.add_argument("--sizes", type=side, nargs="+", default=[512, 1024], metavar="SIDE", help="default: 512 1024")
    flags.add_argument("--channels", type=number(int, 1), default=192, help="of the decoder (default: %(default)s)")
    add_device(flags)
    add_threads(flags)
    flags.add_argument(
        "--seconds", type=number(float, 0), default=30.0, help="timing for each size (default: %(default)s)"
    )
    flags.add_argument("--out", type=Path, default=None, metavar="FILE", help="JSON file")
    args = flags.parse_args(argv)
    device = device_of(args)
    about = machine(device)
    rows: list[dict[str, Any]] = []
    for size in args.sizes:
        rows += measure(args.models, size, args.channels, device, args.seconds)
    print(in_words(about), end="\n\n")
    print(table(rows))
    write_json(args.out, {"machine": about, "rows": rows})


if __name__ == "__main__":
    sys.exit(main())
