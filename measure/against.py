"""A model beside another: images per second, multiply-adds."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from measure.flops import model_flops
from measure.timing import time_in_turns

Autocast = Callable[[], contextlib.AbstractContextManager]


def images_per_second(
    models: Sequence[nn.Module],
    images: Tensor,
    seconds: float,
    autocast: Autocast = contextlib.nullcontext,
) -> list[float]:
    """The median speed of each of `models` on a batch (B, C, H, W) in eval mode, run in turns for `seconds`
    or 100 rounds, whichever is less."""

    def call(model: nn.Module) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.inference_mode(), autocast():
                return model(images)

        return run

    times = time_in_turns(
        [call(model.eval()) for model in models],
        *(images.device, seconds),
        **dict(min_rounds=1, max_rounds=100, warm_up=1, block_seconds=0.0),
    )
    return [len(images) / statistics.median(taken) for taken in times]


def report(
    model: nn.Module,
    peer: nn.Module,
    images: Tensor,
    autocast: Autocast = contextlib.nullcontext,
    seconds: float = 5.0,
    ran: Tensor | None = None,
    title: str = "unpruned",
) -> list[str]:
    """How fast and how large `model` is beside `peer`, whom the lines call `title`: speed on `images` (B, C, H, W), and
    the multiply-adds of an image of their size; `ran` is the share of `model`'s scan directions that run, as
    `model_flops` takes it."""
    own, others = images_per_second([model, peer], images, seconds, autocast)
    lines = [f"Images/s at batch {len(images)}: {own:.1f}, {title} {others:.1f}, ratio {own / others:.2f}"]
    size = tuple(images.shape[2:])
    flops, before = model_flops(model, size, ran), model_flops(peer, size)
    for name, now, then in zip(("published convention", "full"), flops, before):
        lines.append(f"GFLOPs, {name}: {now / 1e9:.3f}, {title} {then / 1e9:.3f}, {1 - now / then:.1%} fewer")
    return lines
