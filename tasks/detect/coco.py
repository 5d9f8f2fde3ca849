"""COCO's annotation files: read, checked annotation by annotation, and masks out of them."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO

from utils import UsageError

_logger = logging.getLogger(__name__)

# polygon corners may lie outside an image, but no farther than this many times its side
_FAR = 10
_MOST = 2**63  # 64 bits hold less

_KINDS = {int: "a whole number", str: "a name", list: "four numbers x, y, width, height"}
_ENTRIES: dict[str, dict[str, type]] = {
    "images": {"id": int, "file_name": str, "height": int, "width": int},
    "categories": {"id": int},
    "annotations": {"id": int, "image_id": int, "category_id": int, "bbox": list},
}


class CocoFile:
    """One annotation file of COCO's layout (Lin et al. 2014, arXiv:1405.0312).

    `images` by rising id; `annotations[image id]` of each, in the file's order, without those whose box has no area,
    which are counted in `without_area`; `categories` by rising id, so that label k of 1 to K is `categories[k - 1]`.
    Raises UsageError, naming the file and the annotation's id, for what cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        data = self._read()
        self.info = data.get("info", {})
        self.categories = sorted(data["categories"], key=lambda entry: entry["id"])
        self.names = [str(entry.get("name", entry["id"])) for entry in self.categories]
        self.labels = {entry["id"]: place for place, entry in enumerate(self.categories, 1)}
        self.images = sorted(data["images"], key=lambda entry: entry["id"])
        self.sizes = {entry["id"]: (entry["height"], entry["width"]) for entry in self.images}
        if len(self.sizes) < len(self.images) or len(self.labels) < len(self.categories):
            raise UsageError(f"{path} has two images or two categories of one id; wanted each once.")
        self._all = data["annotations"]
        self.annotations: dict[int, list[dict[str, Any]]] = defaultdict(list)
        self.without_area = 0
        repeated = [number for number, count in Counter(each.get("id") for each in self._all).items() if count > 1]
        if repeated:
            raise UsageError(f"{path} has {repeated[0]!r} as the id of several annotations; wanted each once.")
        for annotation in self._all:
            self._check(annotation)
            if annotation["bbox"][2] > 0 and annotation["bbox"][3] > 0:
                self.annotations[annotation["image_id"]].append(annotation)
            else:
                self.without_area += 1
        if self.without_area:
            _logger.warning("%s: boxes without area, skipped: %d.", path, self.without_area)

    def _read(self) -> dict[str, Any]:
        if not self.path.is_file():
            raise UsageError(f"{self.path} does not exist; wanted COCO's annotations.")
        try:
            data = json.loads(self.path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{self.path} cannot be read: {error}.") from None
        for part, kinds in _ENTRIES.items():
            entries = data.get(part) if isinstance(data, dict) else None
            if not isinstance(entries, list):
                raise UsageError(f"{self.path} has no list {part!r}; wanted COCO's annotations.")
            for entry in entries:
                self._check_entry(part, kinds, entry)
            if not entries and part != "annotations":
                raise UsageError(f"{self.path} has no {part}; wanted at least one.")
        return data

    def _check_entry(self, part: str, kinds: dict[str, type], entry: Any) -> None:
        for key, kind in kinds.items():
            if not isinstance(entry, dict) or key not in entry:
                name = f" {entry['id']!r}" if isinstance(entry, dict) and "id" in entry else ""
                raise UsageError(f"{self.path}: entry{name} of {part!r} has no {key!r}.")
            value = entry[key]
            # a size must be above 0, ids may be anything whole that an array holds
            low = None if kind is not int else -_MOST if key.endswith("id") else 0
            if type(value) is not kind or (low is not None and not low < value < _MOST):
                wanted = "a whole number from 1" if key in ("height", "width") else _KINDS[kind]
                raise UsageError(
                    f"{self.path}: entry {entry.get('id')!r} of {part!r} has {key} {value!r}; wanted {wanted}."
                )

    def _check(self, annotation: dict[str, Any]) -> None:
        name, size = f"{self.path}: annotation {annotation['id']!r}", self.sizes.get(annotation["image_id"])
        if size is None:
            raise UsageError(f"{name} is of image {annotation['image_id']!r}, which the file does not list.")
        if annotation["category_id"] not in self.labels:
            raise UsageError(f"{name} has the unknown category {annotation['category_id']!r}.")
        if not _are_numbers(annotation["bbox"], 4):
            raise UsageError(f"{name} has the box {annotation['bbox']!r}; wanted four numbers x, y, width, height.")
        for key in ("area", "iscrowd"):
            if key in annotation and not _are_numbers([annotation[key]]):
                raise UsageError(f"{name} has {key} {annotation[key]!r}; wanted a number.")
        problem = _segmentation_problem(annotation.get("segmentation"), *size)
        if problem:
            raise UsageError(f"{name} has {problem}.")

    def masks(self, image_id: int, annotations: list[dict[str, Any]]) -> np.ndarray:
        """The masks of `annotations`, all of image `image_id`: uint8 (T, H, W)."""
        height, width = self.sizes[image_id]
        masks = np.zeros((len(annotations), height, width), np.uint8)
        for out, annotation in zip(masks, annotations):
            out[:] = rle.decode(to_rle(annotation["segmentation"], height, width))
        return masks

    def evaluation_set(self) -> COCO:
        """pycocotools' view of the whole file, boxes without area included; a copy, since evaluation writes into it."""
        filled = [{"iscrowd": 0, "area": each["bbox"][2] * each["bbox"][3], "ignore": 0} | each for each in self._all]
        if any(each["id"] == 0 for each in filled):
            _logger.warning("%s: pycocotools takes a match with annotation 0 for none; wanted ids from 1.", self.path)
        data = dict(info=self.info, images=self.images, categories=self.categories, annotations=filled)
        return index(data)


def index(data: dict[str, Any]) -> COCO:
    """pycocotools' object for `data`, which it would read from a file; it says nothing meanwhile."""
    coco = COCO()
    coco.dataset = data
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Polygons, or run lengths as a list or compressed -> compressed run lengths."""
    if isinstance(segmentation, list):
        return rle.merge(rle.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return rle.frPyObjects(segmentation, height, width)
    return segmentation


def _are_numbers(values: Any, count: int | None = None) -> bool:
    if not isinstance(values, list) or (count is not None and len(values) != count):
        return False
    return all(isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) <= sys.float_info.max for x in values)


def _segmentation_problem(segmentation: Any, height: int, width: int) -> str | None:
    """What is wrong with a segmentation, None if nothing is: pycocotools makes something of nearly everything, or
    takes all memory for it."""
    if isinstance(segmentation, list):
        if not segmentation:
            return "no polygon"
        for polygon in segmentation:
            if not _are_numbers(polygon) or len(polygon) < 6 or len(polygon) % 2:
                return "a broken polygon; wanted x and y of three corners or more"
            if max(map(abs, polygon)) > _FAR * max(height, width):
                return f"a polygon far outside its image of {width} x {height}"
        return None
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        return "no segmentation; wanted polygons or run lengths"
    if segmentation["size"] != [height, width]:
        return f"run lengths of size {segmentation['size']!r}; wanted {[height, width]}, the image's"
    counts = segmentation["counts"]
    if isinstance(counts, (str, bytes)):
        counts = _run_lengths(counts.encode("latin1", "replace") if isinstance(counts, str) else counts)
    whole = _are_numbers(counts) and all(isinstance(run, int) and run >= 0 for run in counts)
    if not whole or sum(counts) != height * width:
        return f"broken run lengths; wanted whole numbers that sum to {height * width}"
    return None


def _run_lengths(text: bytes) -> list[int] | None:
    """The run lengths in COCO's compressed form, None if it is broken: five bits a character from 48 on, the lowest
    first, bit 5 where more follow; from the fourth on a number is the difference to the one before the last."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = character - 48
        if not 0 <= bits < 64:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    return None if shift else counts
