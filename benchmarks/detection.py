"""Images per second and peak memory of detectors on several backbones under the same heads, whole and in parts.

    python -m benchmarks.detection                                         # 1,024 px, batch 1
    python -m benchmarks.detection --size 512 --models fastvim_tiny_patch16_224 vit_tiny_patch16_224 --seconds 60

Cascade Mask R-CNN with `--heads` on each of `--models`, in eval mode: 1,000 proposals, 100 detections with masks. The
body is the backbone up to its map; pyramid and heads are timed on that map. All are timed in turns in one process, in
a new random order each round; a figure is the median. Peak memory is weights, input and the most that one call
allocates on top of them. Writes JSON to `--out`.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from benchmarks.cases import Case, model_spec
from benchmarks.command import add_device, add_threads, command, device_of, parser, write_json
from measure.machine import in_words, machine
from measure.timing import time_in_turns
from tasks.detect import Detector, build_detector
from tasks.detect.kinds import KINDS
from utils.flags import number

MODELS = ("vim_tiny_patch16_224", "fastvim_tiny_patch16_224", "vit_tiny_patch16_224")
CLASSES = 80
PARTS = ("whole", "body", "heads")


class _Heads(nn.Module):
    """A detector from its body's map (1, D, rows, cols) on."""

    def __init__(self, model: Detector, size: int) -> None:
        super().__init__()
        self.pyramid, self.rpn, self.roi_heads = model.backbone.pyramid, model.rpn, model.roi_heads
        self.shown = ImageList(torch.zeros(1, 3, size, size), [(size, size)])

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        maps = self.pyramid(x)
        proposals, _ = self.rpn(self.shown, maps)
        return self.roi_heads(maps, proposals, self.shown.image_sizes)[0]


def build(name: str, size: int, heads: str) -> Detector:
    """An untrained detector that is sure enough of one class to have its 100 detections, as a trained one may have."""
    model = build_detector(name, CLASSES, img_size=size, heads=heads).eval()
    with torch.no_grad():
        for predictor in model.roi_heads.box_predictor:
            predictor.cls_score.bias[0] = 3
    return model


@torch.no_grad()
def measure(
    models: Sequence[str], size: int, heads: str, device: torch.device, seconds: float, proposals: int = 1000
) -> list[dict[str, Any]]:
    """One row a model: seconds and peak bytes of the whole and of its parts, at one image size."""
    torch.manual_seed(0)
    image = torch.rand(1, 3, size, size, device=device)
    cases: list[Case] = []
    rows: list[dict[str, Any]] = []
    for name in models:
        model = build(name, size, heads).to(device)
        model.rpn._post_nms_top_n["testing"] = proposals
        parts = (
            Case(model, image),
            Case(model.backbone.dense, image),
            Case(_Heads(model, size), model.backbone.dense(image)[0]),
        )
        parameters = sum(parameter.numel() for parameter in model.parameters())
        peaks = {f"{part}_peak_bytes": case.peak_bytes() for part, case in zip(PARTS, parts)}
        rows.append(dict(model=name, img_size=size, heads=heads, parameters=parameters) | peaks)
        cases += parts
    # warm from having its memory measured
    times = time_in_turns(cases, device, seconds, min_rounds=1, warm_up=0)
    for number_, row in enumerate(rows):
        own = times[len(PARTS) * number_ :]
        row |= {f"{part}_seconds": statistics.median(each) for part, each in zip(PARTS, own)}
        row["rounds"] = len(own[0])
    return rows


def table(rows: Sequence[dict[str, Any]], peer: str = "vit_tiny_patch16_224") -> str:
    """Rows as Markdown, with each speed over that of `peer`, or of the first model where it is missing."""
    base = next((row for row in rows if row["model"] == peer), rows[0])["whole_seconds"]
    lines = [
        "| image | detector on | parameters, M | images/s | times the peer | body, s | pyramid and heads, s "
        "| peak, MiB | of the body, MiB | of the heads, MiB |",
        "|" + "---|" * 10,
    ]
    for row in rows:
        peaks = " | ".join(f"{row[f'{part}_peak_bytes'] / 2**20:.0f}" for part in PARTS)
        lines.append(
            f"| {row['img_size']} | {row['model']} | {row['parameters'] / 1e6:.2f} | {1 / row['whole_seconds']:.3f} "
            f"| {base / row['whole_seconds']:.2f} | {row['body_seconds']:.2f} | {row['heads_seconds']:.2f} | {peaks} |"
        )
    return "\n".join(lines)


@command("benchmarks.detection")
def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a Markdown table, write JSON."""
    flags = parser("benchmarks.detection", __doc__)
    count = number(int, 1)
    flags.add_argument(
        "--models", nargs="+", type=model_spec, default=list(MODELS), metavar="NAME", help="default: %(default)s"
    )
    flags.add_argument("--size", type=number(int, 64), default=1024, metavar="SIDE", help="default: 1024")
    flags.add_argument("--heads", default="fastvim", choices=[*KINDS], help="of all models (default: %(default)s)")
    flags.add_argument("--proposals", type=count, default=1000, help="an image (default: %(default)s)")
    add_device(flags)
    add_threads(flags)
    flags.add_argument("--seconds", type=number(float, 0), default=30.0, help="of timing (default: %(default)s)")
    flags.add_argument("--out", type=Path, default=None, metavar="FILE", help="JSON file")
    args = flags.parse_args(argv)
    device = device_of(args)
    about = machine(device)
    rows = measure(args.models, args.size, args.heads, device, args.seconds, args.proposals)
    print(in_words(about), end="\n\n")
    print(table(rows))
    write_json(args.out, {"machine": about, "rows": rows})


if __name__ == "__main__":
    sys.exit(main())
