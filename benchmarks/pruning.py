"""Images per second of pruned models and of the plain one, in turns in one process.

    python -m benchmarks.pruning                         # DyVM-S at 0.7/0.8 and its parts, against Vim-S

Weights are random, so the gates are forced to what training aims at: the share `--block-keep` of all images and scan
directions runs, spread at random over layers, directions and the batch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from benchmarks.cases import build, model_spec
from benchmarks.command import add_threads, command, parser
from measure.against import images_per_second
from measure.flops import model_flops
from measure.machine import in_words, machine
from measure.pruning import force_gates
from models_mamba import VisionMamba
from utils import UsageError
from utils.flags import number


@command("benchmarks.pruning")
def main(argv: Sequence[str] | None = None) -> None:
    """Print a Markdown table, one row a model."""
    flags = parser("benchmarks.pruning", __doc__)
    flags.add_argument(
        "--model", type=model_spec, default="vim_small_patch16_224", help="plain model (default: %(default)s)"
    )
    share = number(float, 0, 1, above=True)
    flags.add_argument("--token-keep", type=share, default=0.7, help="default: 0.7")
    flags.add_argument("--block-keep", type=share, default=0.8, help="default: 0.8")
    flags.add_argument("--batch-size", type=number(int, 1), default=16, help="default: 16")
    add_threads(flags, threads=2)
    flags.add_argument(
        "--seconds", type=number(float, 0), default=40.0, help="for all measurements together (default: 40)"
    )
    args = flags.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    plain = build(args.model, None)
    if not isinstance(plain, VisionMamba) or plain.methods.pruning is not None:
        raise UsageError(f"--model {args.model} is not a Vision Mamba without pruning, which is what can be pruned.")
    images = torch.randn(args.batch_size, *plain.default_cfg["input_size"])
    keep = args.token_keep
    models, shares = {"none": plain}, {"none": 1.0}
    for kind in ("token", "block", "both"):
        ratios = dict(token_ratio=(keep, keep**2, keep**3), block_keep_ratio=args.block_keep)
        model = build(args.model, None, pruning=kind, **ratios)
        model.load_state_dict(plain.state_dict(), strict=False)
        models[kind] = model
        shares[kind] = 1.0 if kind == "token" else force_gates(model, args.batch_size, args.block_keep)
    speeds = images_per_second(list(models.values()), images, args.seconds)
    print(f"{args.model}, batch {args.batch_size}, {in_words(machine(images.device))}\n")
    print("| pruning | directions run | images/s | times plain | published, G | full, G |\n|---|---|---|---|---|---|")
    for (kind, model), speed in zip(models.items(), speeds):
        flops = model_flops(model, block_keep=shares[kind])
        print(
            f"| {kind} | {shares[kind]:.3f} | {speed:.2f} | {speed / speeds[0]:.2f} "
            f"| {flops.published / 1e9:.3f} | {flops.full / 1e9:.3f} |"
        )


if __name__ == "__main__":
    sys.exit(main())
