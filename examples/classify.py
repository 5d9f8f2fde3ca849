"""Classify images with a trained model: `python -m examples.classify CHECKPOINT IMAGE... [--model NAME]`.

A checkpoint of this project knows its model, methods included. For weights alone, published ones for instance, name the
model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import checkpoints
import datasets
import main as program
from tasks.backbone import build_backbone
from tasks.classify import augmentation


@torch.inference_mode()
def classify(checkpoint: str, images: list[str], model_name: str | None = None) -> Tensor:
    """Class probabilities (images, classes) that the model in file `checkpoint` gives to the images in these files."""
    saved = checkpoints.read(checkpoint)
    weights, _ = checkpoints.find_weights(saved, checkpoint)
    if model_name is None:
        args = argparse.Namespace(**saved["args"])
    else:
        args = program.parse(["--model", model_name, "--eval", "--finetune", checkpoint])
    model = build_backbone(args, num_classes=len(weights["head.weight"]))
    model.load_state_dict(weights)
    transform = augmentation.build_transform(False, args)
    batch = torch.stack([transform(datasets.load_image(image)) for image in images])
    return model.eval()(batch).softmax(-1)


def main(argv: list[str] | None = None) -> None:
    """Print the three likeliest classes of each image."""
    parser = argparse.ArgumentParser(description="Classify images with a trained model.")
    parser.add_argument("checkpoint")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--model", default=None, help="registry name, for files that hold weights alone")
    args = parser.parse_args(argv)
    for image, row in zip(args.images, classify(args.checkpoint, args.images, args.model)):
        shares, classes = row.topk(min(3, len(row)))
        likeliest = ", ".join(f"class {number} {share:.1%}" for number, share in zip(classes.tolist(), shares.tolist()))
        print(f"{Path(image).name}: {likeliest}")


if __name__ == "__main__":
    main()
