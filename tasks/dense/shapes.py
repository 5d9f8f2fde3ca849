"""SHAPES: a small data set for dense prediction that the program makes itself, in the layouts of ADE20K and of COCO.

400 training and 100 validation canvases of 64 x 64 pixels: discs, triangles, rings, crosses and scikit-learn's
handwritten digits on a texture, in colours that say nothing about their class. Masks are exact to the pixel.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tasks.dense.data import NAMES_FILE, SPLITS
from utils import UsageError

_logger = logging.getLogger(__name__)

SIDE = 64
CLASSES = ("disc", "triangle", "ring", "cross", "digit")
BACKGROUND = len(CLASSES)  # a class of its own for segmentation, none for detection
COUNTS = {True: 400, False: 100}
CROWDED, EMPTY = 0, 1  # the canvases of each split with a crowd, and with nothing at all
_SEED = 20250
_VERSION = "shapes-1"
_COCO = {True: "train2017", False: "val2017"}

Mask = np.ndarray  # bool (SIDE, SIDE)


class Item(NamedTuple):
    """One object of a canvas: its class, the pixels where it is seen, and whether it is a crowd of many."""

    label: int
    mask: Mask
    is_crowd: bool = False


# --- drawing ---


def _grid() -> tuple[np.ndarray, np.ndarray]:
    """x and y of the pixels' centres."""
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    return x, y


def _disc(x: np.ndarray, y: np.ndarray, size: float, angle: float) -> Mask:
    return x**2 + y**2 <= (0.85 * size) ** 2


def _triangle(x: np.ndarray, y: np.ndarray, size: float, angle: float) -> Mask:
    inside = np.ones(x.shape, bool)
    for corner in range(3):
        turn = angle + corner * 2 * np.pi / 3
        inside &= x * np.cos(turn) + y * np.sin(turn) <= 0.55 * size
    return inside


def _ring(x: np.ndarray, y: np.ndarray, size: float, angle: float) -> Mask:
    distance = np.hypot(x, y)
    return (distance <= size) & (distance >= 0.55 * size)


def _cross(x: np.ndarray, y: np.ndarray, size: float, angle: float) -> Mask:
    u, v = (np.abs(x * np.cos(turn) + y * np.sin(turn)) for turn in (angle, angle + np.pi / 2))
    return (np.maximum(u, v) <= size) & (np.minimum(u, v) <= 0.3 * size)


_SHAPES: tuple[Callable[..., Mask], ...] = (_disc, _triangle, _ring, _cross)


def _digit(scan: np.ndarray, centre: np.ndarray, size: float) -> Mask:
    """An 8 x 8 scan (0 to 16) as strokes of a square of 2 * `size`, interpolated between the scan's pixels."""
    x, y = ((axis - at) / (2 * size) * 8 + 3.5 for axis, at in zip(_grid(), centre))
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    padded = np.pad(scan, 2)
    value = np.zeros(x.shape)
    for right in (0, 1):
        for down in (0, 1):
            weight = np.abs(1 - right - (x - left)) * np.abs(1 - down - (y - top))
            value += weight * padded[(top + down + 2).clip(0, 11), (left + right + 2).clip(0, 11)]
    return value > 5


def _smooth_noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Noise of `cells` x `cells` patches with soft borders, -1 to 1, (SIDE, SIDE)."""
    field = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(field.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).clip(-1, 1)


def _place(rng: np.random.Generator, digits: np.ndarray, taken: Mask) -> Item | None:
    """A new object that covers at most a tenth of what is there, or None after a few tries."""
    label = int(rng.integers(len(CLASSES)))
    for _ in range(20):
        size, centre, angle = rng.uniform(9, 14), rng.uniform(10, SIDE - 10, 2), rng.uniform(0, 2 * np.pi)
        if label < len(_SHAPES):
            x, y = (axis - at for axis, at in zip(_grid(), centre))
            mask = _SHAPES[label](x, y, size, angle)
        else:
            mask = _digit(digits[rng.integers(len(digits))], centre, size)
        if mask.any() and (mask & taken).sum() <= 0.1 * mask.sum():
            return Item(label, mask)
    return None


def _crowd(rng: np.random.Generator) -> Item:
    """Many small discs close together, as one object."""
    mask = np.zeros((SIDE, SIDE), bool)
    for centre in rng.normal(SIDE / 2, 9, (14, 2)):
        x, y = (axis - at for axis, at in zip(_grid(), centre))
        mask |= _disc(x, y, 4.0, 0.0)
    return Item(0, mask, is_crowd=True)


def draw_canvas(rng: np.random.Generator, digits: np.ndarray, number: int) -> tuple[np.ndarray, list[Item]]:
    """Canvas `number` of a split: uint8 (SIDE, SIDE, 3), and its objects, from the lowest to the topmost."""
    items: list[Item] = []
    if number == CROWDED:
        items = [_crowd(rng)]
    elif number != EMPTY:
        taken = np.zeros((SIDE, SIDE), bool)
        for _ in range(int(rng.integers(2, 5))):
            item = _place(rng, digits, taken)
            if item is not None:
                items = [other._replace(mask=other.mask & ~item.mask) for other in items] + [item]
                taken |= item.mask
    low, high = rng.uniform(40, 110, 3), rng.uniform(100, 200, 3)
    blend = 0.5 + 0.5 * _smooth_noise(rng, int(rng.integers(4, 10)))[..., None]
    canvas = low * blend + high * (1 - blend)
    for item in items:
        # dark or bright, to stand out from what it lies on
        below = canvas[item.mask].mean() if item.mask.any() else 128.0
        colour = (
            rng.uniform(0, 90, 3) if below > 128 or (below > 80 and rng.random() < 0.5) else rng.uniform(165, 255, 3)
        )
        canvas[item.mask] = colour + 12 * _smooth_noise(rng, 6)[item.mask][:, None]
    canvas = canvas + rng.normal(0, 8, canvas.shape)
    return canvas.clip(0, 255).astype(np.uint8), [item for item in items if item.mask.any()]


# --- annotations ---


def semantic_map(items: list[Item]) -> np.ndarray:
    """ADE20K's annotation uint8 (SIDE, SIDE): k + 1 for class k, the background last, 0 for a rim of one pixel around
    each object."""
    annotation = np.full((SIDE, SIDE), BACKGROUND + 1, np.uint8)
    for item in items:
        grown = np.pad(item.mask, 1)
        grown = grown[:-2, 1:-1] | grown[2:, 1:-1] | grown[1:-1, :-2] | grown[1:-1, 2:]
        annotation[grown & (annotation == BACKGROUND + 1)] = 0
    for item in items:
        annotation[item.mask] = item.label + 1
    return annotation


def outline(mask: Mask) -> list[int] | None:
    """The corners x0, y0, x1, y1, ... of the one closed line around a mask, along pixel borders; None if it has several
    parts, holes, or pixels that touch in a corner only."""
    padded = np.pad(mask, 1)
    steps: dict[tuple[int, int], tuple[int, int]] = {}
    edges = 0
    # each side of a pixel that borders on the outside, clockwise
    for (row, col), start, end in (
        ((-1, 0), (0, 0), (1, 0)),
        ((0, 1), (1, 0), (1, 1)),
        ((1, 0), (1, 1), (0, 1)),
        ((0, -1), (0, 1), (0, 0)),
    ):
        beside = padded[1 + row : SIDE + 1 + row, 1 + col : SIDE + 1 + col]
        for y, x in np.argwhere(mask & ~beside).tolist():
            steps[(x + start[0], y + start[1])] = (x + end[0], y + end[1])
            edges += 1
    if len(steps) != edges:
        return None
    first = min(steps)
    line, at = [first], steps[first]
    while at != first:
        line.append(at)
        at = steps[at]
    if len(line) != edges:
        return None
    turns = [
        point
        for before, point, after in zip([line[-1], *line], line, [*line[1:], line[0]])
        if (point[0] - before[0], point[1] - before[1]) != (after[0] - point[0], after[1] - point[1])
    ]
    return [number for point in turns for number in point]


def run_lengths(mask: Mask) -> dict[str, Any]:
    """COCO's uncompressed RLE: runs down the columns, the first of zeros."""
    flat = mask.T.ravel()
    borders = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *borders.tolist(), flat.size]).tolist()
    return dict(counts=[0, *runs] if flat[0] else runs, size=list(mask.shape))


def coco_annotation(item: Item, number: int, image: int) -> dict[str, Any]:
    """COCO's entry for an object: a polygon where its outline is one line, else RLE."""
    rows, cols = np.flatnonzero(item.mask.any(1)), np.flatnonzero(item.mask.any(0))
    left, top = int(cols[0]), int(rows[0])
    polygon = None if item.is_crowd else outline(item.mask)
    return dict(
        id=number,
        image_id=image,
        category_id=item.label + 1,
        bbox=[left, top, int(cols[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        area=int(item.mask.sum()),
        iscrowd=int(item.is_crowd),
        segmentation=run_lengths(item.mask) if polygon is None else [polygon],
    )


# --- files ---


def find_shapes(data_path: str) -> Path:
    """The folder of SHAPES, made first where it is not there yet: `data_path`, or by default the user's cache.

    It holds both layouts: images/ and annotations/ with training/ and validation/, and train2017/, val2017/ with
    annotations/instances_*.json. Raises UsageError for a folder of something else.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    root = Path(data_path) if data_path else cache / "vision-mamba" / _VERSION
    if (root / NAMES_FILE).is_file():
        return root
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UsageError(f"--data-path {root} is something else than SHAPES; wanted its folder, or an empty one.")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
        try:
            _write(made)
            made.chmod(0o755)
            os.rename(made, root)
        except OSError:
            # another process may have been as quick
            if not (root / NAMES_FILE).is_file():
                raise
        finally:  # whatever ended it; of what was renamed nothing is there
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        raise UsageError(f"SHAPES cannot be made in {root} ({error}); wanted a --data-path to write to.") from error
    _logger.info("SHAPES was made in %s.", root)
    return root


def _write(root: Path) -> None:
    from sklearn.datasets import load_digits

    scans = load_digits().images
    categories = [dict(id=number, name=name) for number, name in enumerate(CLASSES, start=1)]
    for is_train, count in COUNTS.items():
        # no digit of the one split comes in the other
        digits = scans[len(scans) // 5 :] if is_train else scans[: len(scans) // 5]
        folders = [root / "images" / SPLITS[is_train], root / "annotations" / SPLITS[is_train], root / _COCO[is_train]]
        for folder in folders:
            folder.mkdir(parents=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number in range(count):
            rng = np.random.default_rng([_SEED, int(is_train), number])
            canvas, items = draw_canvas(rng, digits, number)
            name = f"shapes_{number:04}"
            for folder in (folders[0], folders[2]):
                Image.fromarray(canvas).save(folder / f"{name}.jpg", quality=95, subsampling=0)
            Image.fromarray(semantic_map(items)).save(folders[1] / f"{name}.png")
            images.append(dict(id=number + 1, file_name=f"{name}.jpg", width=SIDE, height=SIDE))
            annotations += [
                coco_annotation(item, len(annotations) + 1 + place, number + 1) for place, item in enumerate(items)
            ]
        coco = dict(images=images, annotations=annotations, categories=categories)
        (root / "annotations" / f"instances_{_COCO[is_train]}.json").write_text(json.dumps(coco), encoding="utf-8")
    rows = ["Idx\tName", *(f"{number}\t{name}" for number, name in enumerate((*CLASSES, "background"), start=1))]
    # last, since its presence says that all is there
    (root / NAMES_FILE).write_text("\n".join(rows) + "\n", encoding="utf-8")
