"""Reading images of many channels: TIFF, NumPy arrays, and a grey picture for each channel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from datasets import MOST_ASPECT
from utils import UsageError

ARRAYS = (".npy",)
TIFFS = (".tif", ".tiff")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".pgm")  # what Pillow reads, for one channel


class Header(NamedTuple):
    """What a file says of its image before it is read: its number of channels and its dtype, in this machine's byte
    order."""

    channels: int
    dtype: np.dtype


def is_image(name: str, suffixes: Sequence[str] = ARRAYS + TIFFS) -> bool:
    """Whether a file of this name holds an image of one of the formats."""
    return name.lower().endswith(tuple(suffixes)) and not name.startswith(".")


def read_header(path: str) -> Header:
    """The header of an image of one or several channels. Raises UsageError, naming the file."""
    if is_image(Path(path).name, ARRAYS):
        image = _load_array(path, mmap_mode="r")
        channels = 1 if image.ndim == 2 else image.shape[_channel_axis(path, image.shape)]
        return Header(channels, image.dtype.newbyteorder("="))
    if is_image(Path(path).name, TIFFS):
        return _read_tiff(path, header_only=True)
    plane = read_picture(path)
    return Header(1, plane.dtype)


def read_image(path: str) -> np.ndarray:
    """The image in `path`, (channels, rows, cols), as it is stored but in this machine's byte order.

    The smallest axis of an array is its channels (the first of equal ones); a TIFF holds them as pages or as an axis.
    Raises UsageError, naming the file, for what is broken, holds pickled objects, has other axes, or one
    side much longer than the other.
    """
    if is_image(Path(path).name, ARRAYS):
        image = _load_array(path)
        image = image[None] if image.ndim == 2 else np.moveaxis(image, _channel_axis(path, image.shape), 0)
    elif is_image(Path(path).name, TIFFS):
        image = _read_tiff(path)
    else:
        image = read_picture(path)[None]
    if not image.size:
        raise UsageError(f"Image {path} has no pixels: its shape is {image.shape}.")
    rows, cols = image.shape[1:]
    if max(rows, cols) > MOST_ASPECT * min(rows, cols):  # which would take all memory once the shorter side fits
        raise UsageError(f"Image {path} is {rows} x {cols}; wanted sides of at most {MOST_ASPECT} to 1.")
    return np.ascontiguousarray(image, dtype=image.dtype.newbyteorder("="))


def read_plane(path: str) -> np.ndarray:
    """The image of one channel in `path`, (rows, cols), as it is stored. Raises UsageError, naming the file."""
    image = read_image(path)
    if len(image) != 1:
        raise UsageError(f"Image {path} has {len(image)} channels; wanted one, since each channel has its own file.")
    return image[0]


def read_picture(path: str) -> np.ndarray:
    """A grey picture that Pillow reads, (rows, cols), 8 or 16 bits deep or more."""
    with _told(path), Image.open(path) as picture:
        if picture.mode not in ("1", "L", "I", "F") and not picture.mode.startswith("I;16"):
            raise UsageError(f"Image {path} is a picture of mode {picture.mode}; wanted a grey one for its channel.")
        plane = np.asarray(picture)
        # Pillow 12 reads a 16-bit PNG as I;16, older ones as 32 bits
        return plane.astype(np.uint16) if plane.dtype == np.int32 and picture.format in ("PNG", "PPM") else plane


def in_range(image: np.ndarray) -> np.ndarray:
    """Whole numbers as shares of their dtype's range, float32, so that depths can be compared; floats as they are."""
    if image.dtype.kind in "ui":
        return image.astype(np.float32) / np.float32(np.iinfo(image.dtype).max)
    return image.astype(np.float32)


class _told:
    """Turns what readers raise into one sentence that names the file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, UsageError) or not isinstance(error, Exception):
            return
        if isinstance(error, FileNotFoundError):
            raise UsageError(f"Image {self.path} does not exist.") from None
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        if "imagecodecs" in reason:
            raise UsageError(
                f"Image {self.path} is compressed in a way that wants imagecodecs; wanted pip install imagecodecs."
            ) from None
        raise UsageError(f"Image {self.path} cannot be read: {reason}.") from error


def _load_array(path: str, mmap_mode: str | None = None) -> np.ndarray:
    with _told(path):
        with open(path, "rb") as file:
            if file.read(len(np.lib.format.MAGIC_PREFIX)) != np.lib.format.MAGIC_PREFIX:
                raise UsageError(f"Image {path} is no NumPy array, whatever its name says.")
        try:
            image = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
        except ValueError as error:
            if "object" not in str(error).lower():
                raise
            raise UsageError(f"Image {path} holds pickled objects, which are not read; wanted numbers.") from None
    _number_type(path, image.dtype)
    return image


def _number_type(path: str, dtype: np.dtype) -> np.dtype:
    if dtype.kind not in "buif":
        raise UsageError(f"Image {path} holds {dtype}; wanted whole or floating numbers.")
    return dtype.newbyteorder("=")


def _channel_axis(path: str, shape: tuple[int, ...]) -> int:
    if len(shape) != 3:
        raise UsageError(
            f"Image {path} has shape {shape}; wanted two axes, or three of which the smallest is channels."
        )
    return int(np.argmin(shape))


def _read_tiff(path: str, header_only: bool = False) -> Header | np.ndarray:
    """Pages or one more axis of a TIFF as channels; every page must be like the first."""
    try:
        import tifffile
    except ImportError:
        raise UsageError(f"Image {path} wants tifffile; wanted pip install tifffile imagecodecs.") from None
    with _told(path), tifffile.TiffFile(path) as file:
        parts = file.series
        if not parts:
            raise UsageError(f"Image {path} holds no image.")
        for part in parts[1:]:
            if part.shape != parts[0].shape or part.dtype != parts[0].dtype:
                raise UsageError(
                    f"Image {path} has pages of {parts[0].shape} {parts[0].dtype} and {part.shape} {part.dtype}; "
                    "wanted pages of one kind, a channel each."
                )
        axes, shape, dtype = parts[0].axes, parts[0].shape, _number_type(path, parts[0].dtype)
        more = [place for place, axis in enumerate(axes) if axis not in "YX" and shape[place] > 1]
        if "Y" not in axes or "X" not in axes or len(more) + (len(parts) > 1) > 1:
            raise UsageError(f"Image {path} has axes {axes} of {shape}; wanted rows, columns and at most one more.")
        if header_only:
            return Header(len(parts) if len(parts) > 1 else shape[more[0]] if more else 1, dtype)
        planes = []
        for part in parts:
            image = part.asarray()
            order = [*more, axes.index("Y"), axes.index("X")]
            rest = [place for place in range(image.ndim) if place not in order]
            planes.append(image.transpose(*rest, *order).reshape(-1, *(image.shape[place] for place in order[-2:])))
        return np.concatenate(planes)
