"""Small data sets in the real on-disk formats, for tests and trials."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from tasks.dense import shapes

FAMILIES = ("Aves", "Plantae")


def pictures(count: int, side: int = 32, seed: int = 0) -> np.ndarray:
    """Random images uint8 (count, side, side, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def write_cifar100(root: Path, train: int = 40, test: int = 15, label: int | None = None) -> Path:
    """CIFAR-100's python format under `root`/cifar-100-python; `label` replaces every class number."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, count in (("train", train), ("test", test)):
        labels = [label if label is not None else i % 100 for i in range(count)]
        entry = {
            b"batch_label": name.encode(),
            b"fine_labels": labels,
            b"coarse_labels": [i % 20 for i in labels],
            b"data": pictures(count, seed=count).transpose(0, 3, 1, 2).reshape(count, -1),
            b"filenames": [b"image_%d.png" % i for i in range(count)],
        }
        (folder / name).write_bytes(pickle.dumps(entry, protocol=2))
    names = {b"fine_label_names": [b"class_%d" % i for i in range(100)], b"coarse_label_names": []}
    (folder / "meta").write_bytes(pickle.dumps(names, protocol=2))
    return root


def write_image_folder(root: Path, classes: int = 3, train: int = 6, test: int = 3, side: int = 40) -> Path:
    """ImageNet's layout: train and val with a folder of JPEG files per class."""
    for part, count in (("train", train), ("val", test)):
        for number in range(classes):
            folder = root / part / f"n{number:08}"
            folder.mkdir(parents=True)
            for i, image in enumerate(pictures(count, side, seed=number + 10 * count)):
                Image.fromarray(image).save(folder / f"{i}.JPEG")
    return root


def write_inat(root: Path, year: int = 2019, *, families_on_disk: bool = True) -> Path:
    """iNaturalist's layout; `families_on_disk` keeps the level of the super-category, which some copies leave out."""
    categories = [
        {"id": i, "name": f"species {i}", "genus": f"genus {i // 2}", "supercategory": FAMILIES[i % 2], "kingdom": "k"}
        for i in range(4)
    ]
    root.mkdir(parents=True, exist_ok=True)
    (root / "categories.json").write_text(json.dumps(categories), encoding="utf-8")
    for part, count in (("train", 4), ("val", 2)):
        images, annotations = [], []
        for category in reversed(categories):
            for i, picture in enumerate(pictures(count, 40, seed=category["id"])):
                number = len(images)
                name = f"train_val{year}/{category['supercategory']}/{category['id']}/{part}{i}.jpg"
                images.append({"id": number, "file_name": name, "width": 40, "height": 40})
                annotations.append({"id": number, "image_id": number, "category_id": category["id"]})
                parts = name.split("/")
                file = root / name if families_on_disk else root / parts[0] / parts[2] / parts[3]
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(file)
        (root / f"{part}{year}.json").write_text(
            json.dumps({"images": images, "annotations": annotations}), encoding="utf-8"
        )
    return root


def write_shapes(folder: Path, train: int = 12, test: int = 5) -> Path:
    """SHAPES as the program makes it, with fewer canvases, in `folder`, which must be empty or new."""
    with mock.patch.object(shapes, "COUNTS", {True: train, False: test}):
        return shapes.find_shapes(str(folder))
