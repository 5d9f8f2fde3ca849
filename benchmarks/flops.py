"""Multiply-adds of one image through a model, counted two ways, side by side; `measure.flops` says how.

python -m benchmarks.flops                                            # the published settings
python -m benchmarks.flops vim_tiny_patch16_224 deit_tiny_patch16_224 --img-size 512
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.cases import build, model_spec
from benchmarks.command import command, parser
from measure.flops import model_flops
from utils.flags import Sides

PUBLISHED: dict[str, dict[str, Any]] = {
    "vim_tiny_patch16_224": {},
    "vim_small_patch16_224": {},
    "vim_base_patch16_224": {},
    "dyvm_tiny_patch16_224": dict(token_ratio=(0.9, 0.9**2, 0.9**3), block_keep_ratio=0.8),
    "dyvm_small_patch16_224": dict(token_ratio=(0.7, 0.7**2, 0.7**3), block_keep_ratio=0.8),
    "dyvm_base_patch16_224": dict(token_ratio=(0.7, 0.7**2, 0.7**3), block_keep_ratio=0.7),
}


@command("benchmarks.flops")
def main(argv: Sequence[str] | None = None) -> None:
    """Print a Markdown table of models and their multiply-adds."""
    flags = parser("benchmarks.flops", __doc__)
    flags.add_argument(
        "models",
        **dict(nargs="*", type=model_spec, default=list(PUBLISHED), metavar="MODEL"),
        help="NAME or NAME:key=value,... (default: DyVM's settings)",
    )
    flags.add_argument(
        "--img-size",
        **dict(action=Sides, default=None, metavar="SIDE"),
        help="image side, or height and width (default: the model's own)",
    )
    args = flags.parse_args(argv)
    print("| model | parameters, M | published, G | full, G |\n|---|---|---|---|")
    for spec in args.models:
        model = build(spec, args.img_size, **PUBLISHED.get(spec, {}))
        flops = model_flops(model, args.img_size)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"| {spec} | {parameters / 1e6:.2f} | {flops.published / 1e9:.3f} | {flops.full / 1e9:.3f} |")


if __name__ == "__main__":
    sys.exit(main())
