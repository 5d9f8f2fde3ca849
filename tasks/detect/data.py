"""Images and boxes for detection: COCO's layout, and large-scale jitter."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from datasets import load_image
from tasks.dense.shapes import find_shapes
from tasks.detect.coco import CocoFile
from utils import UsageError

DATA_SETS = ("COCO", "SHAPES")

Target = dict[str, Any]
Transform = Callable[[Tensor, Target], tuple[Tensor, Target]]


class Jitter(v2.ScaleJitter):
    """torchvision's scale jitter, which leaves of a very small image at least one pixel."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The size (height, width) to scale to."""
        height, width = super().make_params(flat_inputs)["size"]
        return dict(size=(max(height, 1), max(width, 1)))


class CropTo(v2.Transform):
    """A random part of at most `size` pixels, (height, width); sides that are shorter stay."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Where the part lies."""
        height, width = v2.functional.get_size(flat_inputs[0])
        sides = [min(side, most) for side, most in zip((height, width), self.size)]
        top, left = (int(torch.randint(side - part + 1, ())) for side, part in zip((height, width), sides))
        return dict(top=top, left=left, height=sides[0], width=sides[1])

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """The part of `inpt`."""
        return self._call_kernel(v2.functional.crop, inpt, **params)


class LargeScaleJitter:
    """Flip, scale by `scale_range` of what would fit `size`, a side or (height, width), crop to `size`; boxes anew from
    the cropped masks.

    Ghiasi et al. 2021 (arXiv:2012.07177). An object of which no pixel is left, is left out.
    """

    def __init__(self, size: int | tuple[int, int], scale_range: tuple[float, float] = (0.1, 2.0)) -> None:
        size = to_2tuple(size)
        self.geometry = v2.Compose([v2.RandomHorizontalFlip(), Jitter(size, scale_range), CropTo(size)])

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        image, masks = self.geometry(tv_tensors.Image(image), tv_tensors.Mask(target["masks"]))
        masks = masks.as_subclass(Tensor)
        keep = masks.flatten(1).any(1).bool()
        masks = masks[keep]
        boxes = masks_to_boxes(masks)
        boxes[:, 2:] += 1  # masks_to_boxes gives the last pixels that belong, not the edges behind them
        target = target | {"boxes": boxes, "labels": target["labels"][keep], "masks": masks}
        return image.as_subclass(Tensor), target


class CocoDetection(Dataset):
    """`annotations/instances_{part}.json` and the images of `{part}/` under `root`.

    Items are (image uint8 (3, H, W), target); a target has `boxes` float32 (T, 4) as corners in pixels, inside the
    image, `labels` (T,) of 1 to K, `masks` uint8 (T, H, W) and `image_id`. Crowds and boxes without area are left out.
    """

    def __init__(self, root: str | Path, part: str, transform: Transform | None = None) -> None:
        self.folder, self.transform = Path(root, part), transform
        self.file = CocoFile(Path(root, "annotations", f"instances_{part}.json"))
        there = {entry.name for entry in os.scandir(self.folder)} if self.folder.is_dir() else set()
        for entry in self.file.images:
            if entry["file_name"] not in there and not (self.folder / entry["file_name"]).is_file():
                raise UsageError(f"{self.folder / entry['file_name']} does not exist; {self.file.path} lists it.")

    @property
    def classes(self) -> list[str]:
        """The names of classes 1 to K."""
        return self.file.names

    def __len__(self) -> int:
        return len(self.file.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        entry = self.file.images[index]
        path = self.folder / entry["file_name"]
        image = v2.functional.pil_to_tensor(load_image(str(path), upright=False))  # boxes are of the file's pixels
        size = (entry["height"], entry["width"])
        if tuple(image.shape[1:]) != size:
            raise UsageError(
                f"{path} is {image.shape[1]} x {image.shape[2]} pixels; {self.file.path} says {size[0]} x {size[1]}."
            )
        target = self.target(index)
        return (image, target) if self.transform is None else self.transform(image, target)

    def objects(self, index: int) -> list[dict[str, Any]]:
        """The annotations of an image that are no crowds."""
        found = self.file.annotations.get(self.file.images[index]["id"], [])
        return [each for each in found if not each.get("iscrowd")]

    def target(self, index: int) -> Target:
        """What stands in the file of an image."""
        image_id, found = self.file.images[index]["id"], self.objects(index)
        height, width = self.file.sizes[image_id]
        boxes = torch.tensor([each["bbox"] for each in found], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2].clamp_(0, width)
        boxes[:, 1::2].clamp_(0, height)
        keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
        return {
            "boxes": boxes[keep],
            "labels": torch.tensor([self.file.labels[each["category_id"]] for each in found], dtype=torch.long)[keep],
            "masks": torch.from_numpy(self.file.masks(image_id, found))[keep],
            "image_id": image_id,
        }


def collate(batch: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """Items -> a list of images and a list of targets: sizes differ."""
    images, targets = zip(*batch)
    return list(images), list(targets)


def check(args: argparse.Namespace) -> None:
    """Refuse a path that cannot hold the data set, before anything is read."""
    if args.data_set == "SHAPES":
        return
    if not args.data_path:
        raise UsageError(f"--data-path is missing; wanted the folder of {args.data_set}.")
    if not Path(args.data_path, "annotations").is_dir():
        raise UsageError(f"--data-path {args.data_path} has no folder annotations; wanted that of {args.data_set}.")


def build(args: argparse.Namespace, train: bool) -> CocoDetection:
    """The training images that the flags ask for, with large-scale jitter, or the validation images as they are."""
    root = find_shapes(args.data_path) if args.data_set == "SHAPES" else Path(args.data_path)
    if train:
        return CocoDetection(root, "train2017", LargeScaleJitter(args.input_size, tuple(args.scale_range)))
    return CocoDetection(root, "val2017")
