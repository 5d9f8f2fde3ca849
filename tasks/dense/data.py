"""Images with a class for every pixel, in the layout that ADE20K was published in (SceneParsing, Zhou et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from datasets import load_image
from utils import UsageError, first_line

NAMES_FILE = "objectInfo150.txt"
ADE20K_CLASSES = 150
MOST_SCALE = 100  # of training images: memory grows with its square
SPLITS = {True: "training", False: "validation"}


def ade20k_labels(png: Any) -> Any:
    """Annotations uint8, 0 for unlabelled and k for class k - 1 -> labels uint8, 255 for unlabelled; a tensor for a
    tensor, else an array."""
    values = png if isinstance(png, Tensor) else np.asarray(png)
    wide = values.to(torch.int32) if isinstance(values, Tensor) else values.astype(np.int32)
    labels = (wide - 1) % 256
    return labels.to(torch.uint8) if isinstance(labels, Tensor) else labels.astype(np.uint8)


class SegmentationFolder(Dataset):
    """`root`/images/SPLIT/NAME.jpg, or another suffix of pictures, with `root`/annotations/SPLIT/NAME.png, SPLIT
    `training` or `validation`.

    Items are what `transform` makes of an image uint8 (3, H, W) and its labels uint8 (H, W), by default both as they
    are. `files` are the images, by name; `classes` the names of the classes. Raises UsageError, naming the file, for an
    image without annotation or of another size, for two of one name, for annotations that are no map of classes, and
    for an empty set.
    """

    def __init__(
        self,
        root: Path,
        is_train: bool,
        classes: Sequence[str],
        transform: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        images, annotations = (root / part / SPLITS[is_train] for part in ("images", "annotations"))
        for folder in (images, annotations):
            if not folder.is_dir():
                raise UsageError(f"{folder} is missing; wanted a folder of ADE20K's layout.")
        self.files = sorted(file for file in images.glob("[!.]*") if file.suffix.lower() in IMG_EXTENSIONS)
        if not self.files:
            raise UsageError(f"{images} is empty; wanted *.jpg images, or others with a picture's suffix.")
        for file, after in zip(self.files, self.files[1:]):
            if file.stem == after.stem:
                raise UsageError(f"{after} has the name of {file.name}; wanted one image an annotation.")
        self.annotations = [annotations / f"{file.stem}.png" for file in self.files]
        for file, annotation in zip(self.files, self.annotations):
            if not annotation.is_file():
                raise UsageError(f"Image {file} has no annotation; wanted {annotation}.")
        self.classes, self.transform = list(classes), transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = load_image(str(self.files[index]))
        labels = read_annotation(self.annotations[index], len(self.classes), image.size)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return (pixels, labels) if self.transform is None else self.transform(pixels, labels)


def read_annotation(file: Path, num_classes: int, size: tuple[int, int]) -> Tensor:
    """The labels uint8 (H, W) in an annotation `file`, for an image of `size` (width, height)."""
    try:
        with Image.open(file) as png:
            png.load()
            mode, found, values = png.mode, png.size, np.asarray(png)
    except Exception as error:  # Pillow's readers raise whatever a broken file makes them trip over
        raise UsageError(f"Annotation {file} cannot be read: {str(error) or type(error).__name__}.") from error
    if values.ndim != 2 or mode not in ("L", "P", "I", "I;16", "1"):
        raise UsageError(f"Annotation {file} is {mode}; wanted one channel with a class number at each pixel.")
    if found != size:
        raise UsageError(
            f"Annotation {file} is {found[0]} x {found[1]}; wanted the size of its image, {size[0]} x {size[1]}."
        )
    if int(values.max()) > num_classes:
        raise UsageError(f"Annotation {file} has the value {int(values.max())}; wanted 0 to {num_classes}.")
    return torch.from_numpy(ade20k_labels(values))


def find_root(path: Path, wanted: str, parts: Sequence[str] = ()) -> Path:
    """`path` itself or the one folder below it (as ADE20K's archive unpacks) that has a folder `wanted`."""
    candidates = [path, *(path / part for part in parts)]
    for folder in candidates:
        if (folder / wanted).is_dir():
            return folder
    raise UsageError(f"--data-path {path} has no folder {wanted}; wanted the data set in its published layout.")


def read_names(root: Path, num_classes: int = ADE20K_CLASSES) -> list[str]:
    """The class names of `root`/objectInfo150.txt (tab-separated, the name last, a heading first), or plain numbers
    where there is no such file. Raises UsageError for one that names no classes."""
    file = root / NAMES_FILE
    if not file.exists():
        return [f"class {number}" for number in range(1, num_classes + 1)]
    try:
        rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeError) as error:
        raise UsageError(f"{file} cannot be read: {first_line(error)}; wanted the names of the classes.") from None
    names = [row[-1].split(",")[0].strip() for row in rows[1:]]
    if not 2 <= len(names) < 256:
        raise UsageError(f"{file} names {len(names)} classes; wanted 2 to 255, a line each below a heading.")
    return names
