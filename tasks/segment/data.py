"""The data sets of segmentation, by name, and how their items become batches."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tasks.dense.data import ADE20K_CLASSES, SegmentationFolder, find_root, read_names
from tasks.dense.shapes import BACKGROUND, find_shapes
from tasks.segment.transforms import TestTransform, TrainTransform
from utils import UsageError

DATA_SETS = ("ADE20K", "SHAPES")
_ARCHIVE = "ADEChallengeData2016"


class TestItem(NamedTuple):
    """An image as the model sees it (3, h, w), its labels at their own size (H, W), and its name."""

    __test__ = False

    image: Tensor
    labels: Tensor
    name: str


class TestSet(Dataset):
    """The items of a `SegmentationFolder` with their names."""

    __test__ = False

    def __init__(self, folder: SegmentationFolder) -> None:
        self.folder, self.classes = folder, folder.classes

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> TestItem:
        return TestItem(*self.folder[index], self.folder.files[index].stem)


def collate(items: list[Any]) -> Any:
    """Training items -> (images (B, 3, H, W), labels (B, H, W)); test items, whose sizes differ, stay a list."""
    if isinstance(items[0], TestItem):
        return items
    images, labels = zip(*items)
    return torch.stack(images), torch.stack(labels)


def check(args: argparse.Namespace) -> None:
    """Refuse a path that cannot hold the data set, before anything is read."""
    names = args.seg_classes
    if names and (len(set(names)) < len(names) or not 2 <= len(names) < 256):
        raise UsageError(f"--seg-classes names {len(names)} classes, {len(set(names))} of them apart; wanted 2 to 255.")
    if args.data_set == "SHAPES":
        if names:
            raise UsageError("--seg-classes names the classes of your own images; SHAPES has its own.")
        return
    if not args.data_path:
        raise UsageError(f"--data-path is missing; wanted the folder of {args.data_set}.")
    if not Path(args.data_path).is_dir():
        raise UsageError(f"--data-path {args.data_path} is no folder; wanted that of {args.data_set}.")
    find_root(Path(args.data_path), "images", (_ARCHIVE,))


def build(args: argparse.Namespace, is_train: bool) -> Dataset:
    """The training or the evaluation set that the flags ask for. Raises UsageError, naming the file, for what is not
    there."""
    if args.data_set == "SHAPES":
        root = find_shapes(args.data_path)
        names = read_names(root, BACKGROUND + 1)
    else:
        root = find_root(Path(args.data_path), "images", (_ARCHIVE,))
        names = args.seg_classes or read_names(root, ADE20K_CLASSES)
    transform = TrainTransform(args.input_size, tuple(args.scale_range)) if is_train else TestTransform(args.input_size)
    folder = SegmentationFolder(root, is_train, names, transform)
    return folder if is_train else TestSet(folder)
