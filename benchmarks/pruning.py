"""Images per second of pruned models and of the plain one, in turns in one process.

    python -m benchmarks.pruning                         # DyVM-S at 0.7/0.8 and its parts, against Vim-S

Weights are random, so the gates are forced to what training aims at: the share `--block-keep` of all images and scan
directions runs, spread at random over layers, directions and the batch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import timm
import torch

from benchmarks.flops import model_flops
from models_mamba import VisionMamba


def force_gates(model: VisionMamba, batch_size: int, keep: float) -> float:
    """Let the share `keep` of the batch run each scan direction, other images each time, whatever the gates' heads,
    which still run, say. Returns the share that runs."""
    method = model.site_methods[0]
    learned, directions = method.direction_policy, len(model.layers[0].mixer.directions)
    count = model.depth * directions * batch_size
    gates = torch.zeros(count)
    gates[torch.randperm(count)[: round(keep * count)]] = 1.0
    gates = gates.view(model.depth, batch_size, directions)
    method.direction_policy = lambda layer, column: learned(layer, column) * 0 + gates[layer]
    return float(gates.mean())


def images_per_second(calls: Sequence[Callable[[], object]], batch_size: int, seconds: float) -> list[float]:
    """The median speed of each of `calls`, all run in turns for about `seconds`."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not times[0]:
        for call, taken in zip(calls, times):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [batch_size / statistics.median(taken) for taken in times]


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
        models[kind] = model.eval()
        shares[kind] = 1.0 if kind == "token" else force_gates(model, args.batch_size, args.block_keep)
    with torch.inference_mode():
        speeds = images_per_second(
            [lambda model=model: model(images) for model in models.values()], args.batch_size, args.seconds
        )
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
