"""Classify images with a trained model: `python -m examples.classify CHECKPOINT IMAGE... [--model NAME]`.

A checkpoint of this project knows its model, methods included. For weights alone, published ones for instance, name the
model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

import checkpoints
import datasets
import main as program
from tasks import augmentation
from tasks.backbone import build_backbone
from utils import UsageError
from utils.flags import Parser


@torch.inference_mode()
def classify(checkpoint: str, images: list[str], model_name: str | None = None) -> Tensor:
    """Class probabilities (images, classes) that the model in file `checkpoint` gives to the images in these files."""
    saved = checkpoints.read(checkpoint)
    weights, _ = checkpoints.find_weights(saved, checkpoint)
    if model_name is None:
        known = saved.get("args") if isinstance(saved, dict) else None
        if not isinstance(known, dict):
            raise UsageError(f"{checkpoint} holds weights and not what they are of; wanted --model NAME.")
        args = argparse.Namespace(**known)
    else:
        args = program.parse(["--model", model_name, "--eval", "--finetune", checkpoint])
    head = weights.get("head.weight")
    model = build_backbone(args, num_classes=1 if head is None or not head.ndim else len(head))
    checkpoints.load_strictly(model, weights, checkpoint, args.model)
    transform = augmentation.build_transform(False, args)
    batch = torch.stack([transform(datasets.load_image(image)) for image in images])
    return model.eval()(batch).softmax(-1)


def main(argv: list[str] | None = None) -> int:
    """Print the three likeliest classes of each image; returns the exit code, 2 for a mistake, told in a sentence."""
    parser = Parser(description="Classify images with a trained model.")
    parser.add_argument("checkpoint")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--model", default=None, help="registry name, for files that hold weights alone")
    try:
        args = parser.parse_args(argv)
        shares = classify(args.checkpoint, args.images, args.model)
    except UsageError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    for image, row in zip(args.images, shares):
        best = row.topk(min(3, len(row)))
        told = zip(best.indices.tolist(), best.values.tolist())
        likeliest = ", ".join(f"class {number} {share:.1%}" for number, share in told)
        print(f"{Path(image).name}: {likeliest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
