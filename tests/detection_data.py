"""A small data set in COCO's layout, for the tests of detection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as rle

SIDES = {1: (40, 48), 2: (32, 32), 3: (36, 30), 4: (32, 40)}  # height, width by image id
CATEGORIES = (3, 7)  # ids, which are not the labels 1 and 2


def rectangle(x: int, y: int, width: int, height: int) -> list[list[int]]:
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def compressed(image: int, x: int, y: int, width: int, height: int) -> dict[str, Any]:
    mask = np.zeros(SIDES[image], np.uint8, order="F")
    mask[y : y + height, x : x + width] = 1
    coded = rle.encode(mask)
    return {"size": list(SIDES[image]), "counts": coded["counts"].decode()}


def annotations() -> dict[str, Any]:
    """Image 1: two objects, one without area, a crowd; 2: nothing; 3: a crowd alone; 4: an object of two polygons."""
    rows, cols = SIDES[3]
    crowd = {"size": [rows, cols], "counts": [rows * 5, rows * 10, rows * 15]}
    entries = [
        (1, 1, 3, [4, 6, 20, 12], rectangle(4, 6, 20, 12), 0),
        (2, 1, 7, [26, 20, 10, 15], compressed(1, 26, 20, 10, 15), 0),
        (3, 1, 7, [5, 5, 0, 8], rectangle(5, 5, 0, 8), 0),
        (4, 1, 3, [0, 30, 48, 10], compressed(1, 0, 30, 48, 10), 1),
        (5, 3, 7, [5, 0, 10, rows], crowd, 1),
        (6, 4, 3, [2, 2, 30, 20], rectangle(2, 2, 10, 20) + rectangle(20, 2, 12, 20), 0),
    ]
    names = ("id", "image_id", "category_id", "bbox", "segmentation", "iscrowd")
    return {
        "images": [
            {"id": number, "file_name": f"{number:03}.png", "height": height, "width": width}
            for number, (height, width) in SIDES.items()
        ],
        "categories": [{"id": number, "name": f"thing {number}"} for number in CATEGORIES],
        "annotations": [dict(zip(names, entry)) | {"area": entry[3][2] * entry[3][3]} for entry in entries],
    }


def write(root: Path, data: dict[str, Any] | None = None) -> Path:
    """Both parts, alike, under `root`."""
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for part in ("train2017", "val2017"):
        (root / part).mkdir(exist_ok=True)
        for number, (height, width) in SIDES.items():
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / part / f"{number:03}.png")
        (root / "annotations" / f"instances_{part}.json").write_text(
            json.dumps(data or annotations()), encoding="utf-8"
        )
    return root
