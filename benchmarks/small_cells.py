"""Small data sets of cells in the real on-disk formats, for tests and trials."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import tifffile
from PIL import Image

STAINS = ("DNA", "ER", "RNA")
GENES = ("ABL1", "BRD4", "CDK2")


def cells(count: int, channels: int = 3, side: int = 40, seed: int = 0, dtype: str = "uint16") -> np.ndarray:
    """Random images (count, channels, side, side) of whole numbers over the dtype's range."""
    highest = np.iinfo(dtype).max
    return np.random.default_rng(seed).integers(0, highest, (count, channels, side, side), dtype=dtype, endpoint=True)


def write_cell(path: Path, image: np.ndarray, how: str) -> Path:
    """One cell (channels, rows, cols): `pages`, `axis`, `lzw` and `big` (endian) of TIFF, `npy`, `npy_last` (channels
    last), or `planes`, a folder of a grey image a channel."""
    if how == "npy":
        np.save(path.with_suffix(".npy"), image)
        return path.with_suffix(".npy")
    if how == "npy_last":
        np.save(path.with_suffix(".npy"), np.moveaxis(image, 0, -1))
        return path.with_suffix(".npy")
    if how == "planes":
        path.mkdir(parents=True)
        for name, plane in zip(STAINS, image):
            tifffile.imwrite(path / f"{name}.tif", plane) if name == "ER" else _write_png(path / f"{name}.png", plane)
        return path
    path = path.with_suffix(".tif")
    if how == "pages":
        with tifffile.TiffWriter(path) as file:
            for plane in image:
                file.write(plane, contiguous=False)
    else:
        options = {
            "axis": dict(imagej=True, metadata={"axes": "CYX"}),
            "lzw": dict(compression="lzw", photometric="minisblack"),
            "big": dict(byteorder=">", photometric="minisblack"),
        }[how]
        tifffile.imwrite(path, image, **options)
    return path


def _write_png(path: Path, plane: np.ndarray) -> None:
    Image.fromarray(plane).save(path)


def write_folder(root: Path, how: str = "pages", train: int = 6, test: int = 3, side: int = 40) -> Path:
    """CELLS' folders, {train,val}/CLASS/."""
    for part, count in (("train", train), ("val", test)):
        for number, name in enumerate(("dmso", "taxol")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for place, image in enumerate(cells(count, side=side, seed=number + 10 * count)):
                write_cell(folder / f"cell{place}", image, how)
    return root


def write_index(root: Path, suffix: str = "csv", wells: int = 8) -> Path:
    """A CellProfiler export: grey images, an index with a file name and folder a channel, plates and wells."""
    rows = []
    for number, image in enumerate(cells(3 * wells)):
        row = {"ImageNumber": number, "Count_Cells": 7, "Metadata_Plate": "P1", "Metadata_Well": f"A{number // 3:02}"}
        row["label"] = ("dmso", "taxol")[number // 3 % 2]
        folder = root / "images"
        folder.mkdir(parents=True, exist_ok=True)
        for name, plane in zip(STAINS, image):
            tifffile.imwrite(folder / f"{number}_{name}.tif", plane)
            row |= {f"FileName_{name}": f"{number}_{name}.tif", f"PathName_{name}": str(folder)}
        rows.append(row)
    return write_table(root / f"index.{suffix}", rows)


def write_table(path: Path, rows: list[dict[str, object]]) -> Path:
    """Rows as CSV, TSV, or parquet for any other name."""
    if path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
        return path
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_jumpcp(
    root: Path, plates: tuple[str, ...] = ("BR00116991",), text: bool = False, cells_a_well: int = 3, side: int = 32
) -> Path:
    """JUMP-CP's layout: plates of cells (8, side, side), and plate map and metadata as parquet or as text."""
    folder = root / "platemap_and_metadata"
    folder.mkdir(parents=True)
    metadata = [{"broad_sample": None, "target": None}]
    metadata += [{"broad_sample": f"BRD-{number}", "target": gene} for number, gene in enumerate(GENES)]
    plate_map = [{"well_position": "A01", "broad_sample": None}]
    plate_map += [{"well_position": f"A{number + 2:02}", "broad_sample": f"BRD-{number}"} for number in range(3)]
    for kind, rows in (("platemap", plate_map), ("metadata", metadata)):
        file = folder / f"JUMP-Target-1_compound_{kind}.tsv"
        if text:
            write_table(file, rows)
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    for plate in plates:
        (root / plate).mkdir()
        rows = []
        for row in plate_map:
            well = row["well_position"]
            for number, image in enumerate(cells(cells_a_well, 8, side, seed=len(rows), dtype="uint8")):
                name = f"{plate}_{well}_f1_c{number}.npy"
                np.save(root / plate / name, image)
                path = f"s3://somewhere/else/{plate}/{name}"
                rows.append({"ID": len(rows), "well_loc": well, "path": path, "plate_id": plate})
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / f"{plate}.pq")
    return root


def read(path: Path) -> np.ndarray:
    """The pages of a TIFF of `write_cell`."""
    with tifffile.TiffFile(path) as file:
        return np.stack([page.asarray() for page in file.pages])
