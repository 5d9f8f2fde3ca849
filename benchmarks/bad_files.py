"""Files of a data set that may be anything, drawn by hypothesis, and the judge of what training makes of them.

See `benchmarks.bad_inputs`, which does the same for checkpoints and command lines.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from hypothesis import strategies as st
from PIL import Image

from benchmarks.bad_inputs import File, damaged, judge_program
from benchmarks.jobs import Job
from benchmarks.program import EPOCH
from benchmarks.small_cells import cells, write_cell, write_folder, write_index, write_jumpcp
from benchmarks.small_data import pictures, write_image_folder, write_shapes
from tasks.dense.data import NAMES_FILE
from tasks.dense.shapes import SIDE

SUFFIXES = (".JPEG", ".jpg", ".png", ".webp", ".bmp", ".tiff", ".ppm", ".pgm")


def _encoded(side: int = 24) -> dict[str, bytes]:
    """An image of `side` x `side` pixels in every format that is likely to be met, and in odd modes."""
    picture = Image.fromarray(pictures(1, side)[0])
    grey16 = Image.fromarray((np.arange(side**2).reshape(side, side) * 100).astype(np.uint16))
    modes = {
        "": picture,
        "_grey": picture.convert("L"),
        "_palette": picture.quantize(16),
        "_alpha": picture.convert("RGBA"),
    }
    modes |= {
        "_cmyk": picture.convert("CMYK"),
        "_16": grey16,
        "_bits": picture.convert("1"),
        "_float": picture.convert("F"),
    }
    found = {}
    for form in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF"):
        for mode, image in modes.items():
            stream = io.BytesIO()
            with contextlib.suppress(OSError, ValueError):  # a mode that the format does not have
                image.save(stream, form)
                found[form + mode] = stream.getvalue()
    png = found["PNG"]
    for side in (0, 12_000, 60_000, 2**31 - 1):
        found[f"PNG_{side}"] = png[:16] + struct.pack(">II", side, side) + png[24:]
    return found


@dataclass
class Place:
    """A data set of which one file of the training part, `folder`/one of `names`, may be anything.

    `title` says what the file is; what it may hold is one of `wholes`, that with its bytes damaged, or what `others`
    draws.
    """

    title: str
    flags: list[str] = field(repr=False)
    folder: Path = field(repr=False)
    names: tuple[str, ...] = field(repr=False)
    wholes: dict[str, bytes] = field(repr=False)
    others: tuple[st.SearchStrategy[bytes], ...] = field(repr=False, default=())

    def files(self) -> st.SearchStrategy[File]:
        """A file, broken or not, whose name may belong to another format."""
        whole = st.sampled_from(list(self.wholes)).map(self.wholes.__getitem__)
        data = st.one_of(whole, whole.flatmap(damaged), whole.flatmap(damaged), *self.others)
        return st.builds(File, st.sampled_from(self.names), data)

    def judge(self, file: File) -> str:
        """Train on it; what stood in its place is put back."""
        path = self.folder / file.name
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(file.data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, of what it repairs
                return judge_program(*self.flags)
        finally:
            path.unlink()
            if before is not None:
                path.write_bytes(before)


def _flags(job: Job, *data: object) -> list[str]:
    """Every training image is read, in two steps."""
    return [*job.flags, *EPOCH, "--batch-size", "2", *map(str, data)]


def _pictures(job: Job, folder: Path) -> list[Place]:
    root = write_image_folder(folder / "images", classes=2, train=2, test=1, side=32)
    place = root / "train" / "n00000000"
    (place / "0.JPEG").unlink()  # the odd one takes its place: all four are read in every epoch
    flags = _flags(job, "--data-set", "IMNET", "--data-path", root, "--no-repeated-aug", "--aa", "none")
    names = tuple(f"odd{suffix}" for suffix in SUFFIXES)
    return [Place("image files", [*flags, "--no-model-ema"], place, names, _encoded())]


def _cells(job: Job, folder: Path) -> list[Place]:
    root = write_folder(folder / "folders", train=2, test=1, side=32)
    place = root / "train" / "dmso"
    (place / "cell0.tif").unlink()
    image, wholes = cells(1, side=32)[0], {}
    for how in ("pages", "axis", "lzw", "big", "npy", "npy_last"):
        wholes[how] = write_cell(folder / how, image, how).read_bytes()
    for name, odd in (("floats", image / 65535.0), ("whole", image.astype("int64")), ("flat", image[0]), ("none", [])):
        stream = io.BytesIO()
        np.save(stream, np.asarray(odd))
        wholes[name] = stream.getvalue()
    names = ("odd.tif", "odd.tiff", "odd.npy", "odd.png")
    index = write_index(folder / "tables", wells=4)
    table = index.read_bytes()
    return [
        Place(
            *("files of cells", _flags(job, "--data-set", "CELLS", "--data-path", root), place, names),
            wholes | {"png": _encoded()["PNG_16"], "jpeg": _encoded()["JPEG"]},
        ),
        Place(
            *("tables of cells", _flags(job, "--data-set", "CELLS", "--index", index, "--split-by", "well")),
            *(index.parent, (index.name,), {"table": table}, (odd_table(table),)),
        ),
        _plates(job, folder / "plates"),
    ]


def _plates(job: Job, folder: Path) -> Place:
    root = write_jumpcp(folder)
    flags = _flags(job, "--data-set", "JUMPCP", "--data-path", root)
    plate = root / "BR00116991.pq"
    columns = pyarrow.parquet.read_table(plate).to_pydict()
    wholes = {"own": plate.read_bytes()}
    for name, junk in (("nul", "a\0b/c"), ("bytes", b"\xff/\xfe"), ("list", ["a"]), ("long", "x" * 5000)):
        stream = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(columns | {"path": [junk] * len(columns["path"])}), stream)
        wholes[name] = stream.getvalue()
    return Place("tables of plates (parquet)", flags, root, (plate.name,), wholes)


def _segments(job: Job, folder: Path) -> list[Place]:
    root = write_shapes(folder / "shapes", 4, 2)
    flags = _flags(job, "--data-set", "SHAPES", "--data-path", root)
    maps = root / "annotations" / "training"
    return [
        Place("image files", flags, root / "images" / "training", ("shapes_0002.jpg",), _encoded(SIDE)),
        Place(
            *("annotations of pixels", flags, maps, ("shapes_0002.png",)),
            _encoded(SIDE) | {"own": (maps / "shapes_0003.png").read_bytes()},
        ),
        Place("names of classes", flags, root, (NAMES_FILE,), {"own": (root / NAMES_FILE).read_bytes()}),
    ]


def _objects(job: Job, folder: Path) -> list[Place]:
    root = write_shapes(folder / "shapes", 4, 2)
    flags = _flags(job, "--data-set", "SHAPES", "--data-path", root)
    name = "instances_train2017.json"
    whole = (root / "annotations" / name).read_bytes()
    return [
        Place("image files", flags, root / "train2017", ("shapes_0002.jpg",), _encoded(SIDE)),
        Place(
            *("annotations of objects", flags, root / "annotations", (name,), {"own": whole, "deep": b"[" * 10**5}),
            (odd_json(whole), odd_json(whole), odd_json(whole)),
        ),
    ]


PLACES: dict[str, Callable[[Job, Path], list[Place]]] = {
    "classify": _pictures,
    "pretrain": _pictures,
    "cells": _cells,
    "segment": _segments,
    "detect": _objects,
}


def places(job: Job, folder: Path) -> list[Place]:
    """The kinds of file that a data set of `job` has, each in a small set under `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    return PLACES[job.name](job, folder)


# ---------------------------------------------------------------------------------------------------------------------
# Annotations that are whole, but odd

_NUMBERS = [-1, 0, 10**12, 10**400, 2.5, 1e308, float("nan"), True]
_JUNK = [*_NUMBERS, None, "x", "", [], {}, [1], {"x": 1}, [[]], [1.0, 2.0, 3.0]]


@st.composite
def odd_json(draw: st.DrawFn, whole: bytes) -> bytes:
    """JSON `whole` in which one to three entries, at any depth, are missing, twice there, or something else."""
    content = json.loads(whole)
    for _ in range(draw(st.integers(1, 3))):
        part: Any = content
        while True:
            places = list(part) if isinstance(part, dict) else list(range(len(part)))
            if not places:
                break
            place = draw(st.sampled_from(places))
            if isinstance(part[place], (dict, list)) and part[place] and draw(st.integers(0, 3)):
                part = part[place]
                continue
            way = draw(st.sampled_from(["junk", "junk", "junk", "pop", "twice"]))
            if way == "pop":
                part.pop(place)
            elif way == "twice" and isinstance(part, list):
                part.append(part[place])
            else:
                part[place] = draw(st.sampled_from(_JUNK))
            break
    return json.dumps(content).encode()


@st.composite
def odd_table(draw: st.DrawFn, whole: bytes) -> bytes:
    """A table `whole` (CSV) in which one to three fields are something else, or a column or a row is missing or twice
    there."""
    rows = list(csv.reader(io.StringIO(whole.decode())))
    words = ["", "x", "-1", "1e308", "nan", "/", "..", "\0", "0" * 300, "9" * 5000, "\u0661", "\u00b2", ";", '"', "\n"]
    for _ in range(draw(st.integers(1, 3))):
        row, column = draw(st.integers(0, len(rows) - 1)), draw(st.integers(0, min(map(len, rows)) - 1))
        way = draw(st.sampled_from(["field", "field", "row", "column", "twice", "names"]))
        if way == "row" and len(rows) > 1:
            del rows[row]
        elif way == "column" and min(map(len, rows)) > 1:
            for each in rows:
                del each[column]
        elif way == "twice":
            rows.append(rows[row])
        else:
            rows[0 if way == "names" else row][column] = draw(st.sampled_from(words))
    stream = io.StringIO()
    csv.writer(stream).writerows(rows)
    return stream.getvalue().encode()
