"""CELLS_DIGITS: scikit-learn's handwritten digits with five channels, for trying out without any file."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from tasks.cells.dataset import ArraySource

ANGLES = 0, 45, 90, 135
CHANNELS = ("intensity", *(f"edge{angle}" for angle in ANGLES))
CLASSES = tuple(map(str, range(10)))


def five_channels(image: np.ndarray) -> np.ndarray:
    """Intensity (rows, cols) -> (5, rows, cols) float32: itself, and the size of its derivative along 0, 45, 90 and 135
    degrees, counted from the rows' direction towards their top."""
    down, right = np.gradient(image.astype(np.float32))
    along = [np.abs(math.cos(angle) * right - math.sin(angle) * down) for angle in map(math.radians, ANGLES)]
    return np.stack([image, *along]).astype(np.float32)


def read_digits(is_train: bool, size: int) -> ArraySource:
    """The 1,437 training digits or the 360 others, those of DIGITS, at `size` pixels a side, in 0 to 255."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    train, test = train_test_split(np.arange(len(images)), test_size=360, stratify=digits.target, random_state=0)
    chosen = train if is_train else test
    resized = [Image.fromarray(images[index]).resize((size, size), Image.Resampling.BICUBIC) for index in chosen]
    stacked = np.stack([five_channels(np.asarray(image)) for image in resized])
    return ArraySource(stacked, digits.target[chosen].tolist())
