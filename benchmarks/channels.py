"""Speed of models whose tokens are the patches of every channel: FastChannelVim, ChannelVim, and timm's ViT.

    python -m benchmarks.channels --patch 16                # also against ViT-S on the same 1,568 tokens
    python -m benchmarks.channels --patch 8 --models channelvim fastchannelvim --train

Images of 224 px and 8 channels, in eval mode (default) or as training steps without channel sampling, in turns in one
process; a figure is the median. The ViT gets a picture whose patches are as many tokens.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from torch import nn

from benchmarks.cases import Case
from benchmarks.command import add_device, add_threads, command, device_of, parser, write_json
from measure.machine import in_words, machine
from measure.timing import time_in_turns
from utils.flags import number

SIDE, CHANNELS, CLASSES = 224, 8, 161
MODELS = ("channelvim", "fastchannelvim", "fastchannelvim_maxpool", "fastchannelvim_2dcompress", "vit")


def build(model: str, patch: int) -> tuple[nn.Module, tuple[int, int, int]]:
    """A small model and the (channels, rows, cols) of its images, so that there are 8 channels' patches of tokens."""
    if model == "vit":
        # a grid of 2 x 4 grids instead of 8 channels
        side = SIDE // patch * 16
        shape = 3, 2 * side, 4 * side
        return timm.create_model(
            "vit_small_patch16_224", img_size=shape[1:], num_classes=CLASSES, class_token=False, global_pool="avg"
        ), shape
    family, _, kind = model.partition("_")
    name = f"{family}_small_patch{patch}_224{'_' + kind if kind else ''}"
    built = timm.create_model(name, num_classes=CLASSES, in_chans=CHANNELS, hcs=False, drop_path_rate=0.0)
    return built, (CHANNELS, SIDE, SIDE)


@command("benchmarks.channels")
def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a Markdown table, write JSON."""
    flags = parser("benchmarks.channels", __doc__)
    flags.add_argument("--models", nargs="+", default=["channelvim", "fastchannelvim", "vit"], choices=MODELS)
    flags.add_argument("--patch", type=int, default=16, choices=(16, 8), help="default: %(default)s")
    flags.add_argument("--batch-size", type=number(int, 1), default=2, metavar="N", help="default: %(default)s")
    flags.add_argument("--train", action="store_true", help="time forward and backward instead of inference")
    flags.add_argument("--rounds", type=number(int, 1), default=3, help="timings of each (default: %(default)s)")
    flags.add_argument("--out", type=Path, default=None, metavar="FILE", help="write the figures here, as JSON")
    add_device(flags)
    add_threads(flags)
    args = flags.parse_args(argv)
    device = device_of(args)
    torch.manual_seed(0)
    calls = []
    for name in args.models:
        model, shape = build(name, args.patch)
        images = torch.randn(args.batch_size, *shape, device=device)
        calls.append(Case(model.to(device), images, train=args.train))
    times = time_in_turns(calls, device, min_rounds=args.rounds, max_rounds=args.rounds, warm_up=1)
    medians = [statistics.median(taken) for taken in times]
    rows = [
        {"model": name, "patch": args.patch, "train": args.train, "seconds": median, "first_over": medians[0] / median}
        for name, median in zip(args.models, medians)
    ]
    print(in_words(machine(device)), end="\n\n")
    doing = "training step" if args.train else "inference"
    print(f"| model, S/{args.patch}, {doing} | seconds | {args.models[0]} over it |")
    print("|---|---|---|")
    for row in rows:
        print(f"| {row['model']} | {row['seconds']:.3f} | {row['first_over']:.2f} |")
    if args.out is not None:
        write_json(args.out, {"machine": machine(device), "rows": rows})


if __name__ == "__main__":
    sys.exit(main())
