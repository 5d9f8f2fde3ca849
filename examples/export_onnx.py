"""Write a model as ONNX: `python -m examples.export_onnx vim_tiny_patch16_224 vim.onnx` (wants onnx and onnxscript).

`torch.onnx.export` is all that is called. ONNX does not know this project's operators, so while it exports they are
spelt in operators that it knows: the scan's recurrence by doubling, log2(seqlen) steps on the whole sequence. DyVM's
block pruning stays behind: how many images a scan gets there depends on the images.
"""

from __future__ import annotations

import argparse
import sys

import timm
import torch

import models_mamba  # noqa: F401 - registers the models


def main(argv: list[str] | None = None) -> int:
    """Export one registry model; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write a model as ONNX.")
    parser.add_argument("model", help="registry name")
    parser.add_argument("file", help="what to write")
    parser.add_argument("--checkpoint", default="", help="weights to load, as timm's create_model takes them")
    parser.add_argument("--batch-size", type=int, default=1)
    args = parser.parse_args(argv)
    model = timm.create_model(args.model, checkpoint_path=args.checkpoint).eval()
    images = torch.randn(args.batch_size, *model.default_cfg["input_size"])
    torch.onnx.export(model, (images,), args.file, external_data=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
