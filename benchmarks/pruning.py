"""Images per second of pruned models and of the plain one, in turns in one process.

    python -m benchmarks.pruning                         # DyVM-S at 0.7/0.8 and its parts, against Vim-S

Weights are random, so the gates are forced to what training aims at: the share `--block-keep` of all images and scan
directions runs, spread at random over layers, directions and the batch.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Sequence

import timm
import torch
from torch import Tensor, nn

from benchmarks.flops import model_flops
from fusion import Meter
from models_mamba import VisionMamba


def force_gates(model: VisionMamba, batch_size: int, keep: float) -> float:
    """Let the share `keep` of the batch run each scan direction, other images each time, whatever the gates' heads,
    which still run, say. Returns the share that runs."""
    method = model.site_methods[0]
    learned, directions = method.direction_policy, len(model.layers[0].mixer.directions)
    count = model.depth * directions * batch_size
    gates = torch.zeros(count)
    gates[torch.randperm(count)[: round(keep * count)]] = 1.0
    gates = gates.view(model.depth, batch_size, directions).to(next(model.parameters()).device)
    method.direction_policy = lambda layer, column: learned(layer, column) * 0 + gates[layer]
    return float(gates.mean())


def images_per_second(
    models: Sequence[nn.Module],
    images: Tensor,
    seconds: float,
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> list[float]:
    """The median speed of each of `models` on a batch (B, C, H, W) in eval mode, run in turns for `seconds`
    or 100 rounds, whichever is less."""
    times: list[list[float]] = [[] for _ in models]

    def run(model: nn.Module) -> float:
        start = time.perf_counter()
        with autocast():
            model(images)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        return time.perf_counter() - start

    with torch.inference_mode():
        for model in models:
            run(model.eval())
        end = time.perf_counter() + seconds
        while not times[0] or (time.perf_counter() < end and len(times[0]) < 100):
            for model, taken in zip(models, times):
                taken.append(run(model))
    return [len(images) / statistics.median(taken) for taken in times]


def report(
    meter: Meter,
    student: VisionMamba,
    teacher: VisionMamba,
    images: Tensor,
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    seconds: float = 5.0,
) -> list[str]:
    """What a method does, in lines for a reader: what `meter` saw; speed of `student` and of `teacher`, which does
    without it, on `images` (B, C, H, W); multiply-adds of an image at the input's size."""
    lines, ran = meter.method.report(meter), getattr(meter, "directions", None)
    own, others = images_per_second([student, teacher], images, seconds, autocast)
    lines.append(f"Images/s at batch {len(images)}: {own:.1f}, unpruned {others:.1f}, ratio {own / others:.2f}")
    size = tuple(images.shape[2:])
    flops, before = model_flops(student, size, ran), model_flops(teacher, size)
    for name, now, then in zip(("published convention", "full"), flops, before):
        lines.append(f"GFLOPs, {name}: {now / 1e9:.3f}, unpruned {then / 1e9:.3f}, {1 - now / then:.1%} fewer")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Print a Markdown table, one row a model."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="vim_small_patch16_224", help="plain model (default: %(default)s)")
    parser.add_argument("--token-keep", type=float, default=0.7, help="default: 0.7")
    parser.add_argument("--block-keep", type=float, default=0.8, help="default: 0.8")
    parser.add_argument("--batch-size", type=int, default=16, help="default: 16")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--seconds", type=float, default=40.0, help="for all measurements together (default: 40)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    plain = timm.create_model(args.model).eval()
    images = torch.randn(args.batch_size, *plain.default_cfg["input_size"])
    keep = args.token_keep
    models, shares = {"none": plain}, {"none": 1.0}
    for kind in ("token", "block", "both"):
        model = timm.create_model(
            args.model, pruning=kind, token_ratio=(keep, keep**2, keep**3), block_keep_ratio=args.block_keep
        )
        model.load_state_dict(plain.state_dict(), strict=False)
        models[kind] = model
        shares[kind] = 1.0 if kind == "token" else force_gates(model, args.batch_size, args.block_keep)
    speeds = images_per_second(list(models.values()), images, args.seconds)
    print(f"{args.model}, batch {args.batch_size}, {args.threads} threads, torch {torch.__version__}\n")
    print("| pruning | directions run | images/s | times plain | published, G | full, G |\n|---|---|---|---|---|---|")
    for (kind, model), speed in zip(models.items(), speeds):
        flops = model_flops(model, block_keep=shares[kind])
        print(
            f"| {kind} | {shares[kind]:.3f} | {speed:.2f} | {speed / speeds[0]:.2f} "
            f"| {flops.published / 1e9:.3f} | {flops.full / 1e9:.3f} |"
        )


if __name__ == "__main__":
    main()
