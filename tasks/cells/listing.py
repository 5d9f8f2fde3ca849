"""Which cells there are: the files of each, its class, its well and plate, and on which side of the split it stands."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from tasks.cells.images import ARRAYS, PICTURES, TIFFS, is_image
from tasks.cells.tables import Table, read_table
from utils import UsageError

PARTS = ("train", "val", "test")
SPLIT_BY = ("cell", "well", "plate")
_SHARES = 0.6, 0.2  # of training and validation; the rest is for the test
# columns of an index that are no channels; CellProfiler calls what it was told of an image Metadata_...
_KNOWN = ("label", "path", "split", "group", "well", "plate")


@dataclass(frozen=True)
class Cell:
    """One cell, or one field of them.

    `files` is one file that holds all channels, or one for each channel in order, '' where it is missing. `well` names
    the well with its plate ('' where nobody says), by which answers are averaged.
    """

    files: tuple[str, ...]
    label: int
    well: str = ""
    plate: str = ""


@dataclass(frozen=True)
class Listing:
    """All cells of a data set by part of the split, the names of its classes, and those of its channels where each has
    files of its own (else none)."""

    parts: dict[str, list[Cell]]
    classes: tuple[str, ...]
    channels: tuple[str, ...] = ()

    def check(self, where: str) -> Listing:
        """Itself. Raises UsageError if there is nothing to tell apart, or nothing to train on or to test with."""
        labels = {cell.label for part in self.parts.values() for cell in part}
        if len(labels) == 1:
            only = self.classes[labels.pop()]
            raise UsageError(f"{where} holds images of the class {only!r} only; wanted two classes or more.")
        for part, why in (("train", "to train on"), ("val", "to test with")):
            if not self.parts[part] and not (part == "val" and self.parts["test"]):
                raise UsageError(f"{where} has no image {why}; wanted images in every part of the split.")
        return self


def split(count: int, keys: Sequence[str] | None = None) -> dict[str, list[int]]:
    """Indices 0..count-1 by part, 60 % for training and 20 % for validation, as FastVim's release permutes them.

    With `keys`, one for each index, those with the same key stay together, and every part gets a key.
    """
    if keys is None:
        order = np.random.RandomState(0).permutation(count)
        first, second = (int(share * count) for share in _SHARES)
        chosen = order[:first], order[first : first + second], order[first + second :]
        return {part: [int(index) for index in indices] for part, indices in zip(PARTS, chosen)}
    unique = list(dict.fromkeys(keys))
    if len(unique) < len(PARTS):
        raise UsageError(
            f"There are {len(unique)} wells or plates to split by; wanted 3 or more, or another --split-by."
        )
    order = np.random.RandomState(0).permutation(len(unique))
    first, second = (max(1, int(share * len(unique))) for share in _SHARES)
    side = {}
    for place, index in enumerate(order):
        side[unique[index]] = PARTS[(place >= first) + (place >= first + second)]
    return {part: [index for index, key in enumerate(keys) if side[key] == part] for part in PARTS}


def split_cells(cells: list[Cell], by: str) -> dict[str, list[Cell]]:
    """Cells by part, split by `by`, one of SPLIT_BY. Raises UsageError where cells do not say their well or plate."""
    keys = None
    if by != "cell":
        keys = [getattr(cell, by) for cell in cells]
        if not all(keys):
            nameless = next(cell for cell in cells if not getattr(cell, by))
            raise UsageError(f"--split-by {by}, but {next(filter(None, nameless.files))} does not say its {by}.")
    return {part: [cells[index] for index in chosen] for part, chosen in split(len(cells), keys).items()}


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def list_folder(root: Path) -> Listing:
    """`root`/{train,val[,test]}/CLASS/: a file of all channels for each cell, or a folder of grey images named by their
    channels. Classes are those of the training part."""
    entries: dict[str, list[tuple[str, Path]]] = {}
    for part in PARTS:
        folder = root / part
        if not folder.is_dir():
            if part != "test":
                raise UsageError(f"--data-path {root} has no folder {part}; wanted train and val, or --index FILE.")
            continue
        entries[part] = []
        for class_folder in _sorted(folder):
            if class_folder.is_dir():
                entries[part] += [(class_folder.name, entry) for entry in _sorted(class_folder) if _holds_cell(entry)]
    classes = tuple(sorted({name for name, _ in entries["train"]}))
    if not classes:
        raise UsageError(f"{root / 'train'} holds no image; wanted a folder of TIFF, .npy or channel folders a class.")
    found = [entry for part in entries.values() for _, entry in part]
    by_channel = found[0].is_dir()
    odd = next((entry for entry in found if entry.is_dir() != by_channel), None)
    if odd is not None:
        raise UsageError(f"{odd} is unlike {found[0]}; wanted a file for each cell, or a folder for each.")
    planes = {entry: _planes(entry) for entry in found} if by_channel else {}
    channels = tuple(sorted({name for each in planes.values() for name in each}))
    parts: dict[str, list[Cell]] = {part: [] for part in PARTS}
    for part, items in entries.items():
        for name, entry in items:
            if name not in classes:
                raise UsageError(f"{root / part / name} is a class that {root / 'train'} does not have.")
            files = tuple(planes[entry].get(channel, "") for channel in channels) if by_channel else (str(entry),)
            parts[part].append(Cell(files, classes.index(name)))
    return Listing(parts, classes, channels).check(f"--data-path {root}")


def _sorted(folder: Path) -> list[Path]:
    return sorted(Path(entry.path) for entry in os.scandir(folder) if not entry.name.startswith("."))


def _holds_cell(entry: Path) -> bool:
    return is_image(entry.name) if entry.is_file() else bool(_planes(entry))


def _planes(folder: Path) -> dict[str, str]:
    """The images of a cell's folder by the channel that they are named by."""
    planes: dict[str, str] = {}
    for path in _sorted(folder):
        if path.is_file() and is_image(path.name, ARRAYS + TIFFS + PICTURES):
            if path.stem in planes:
                raise UsageError(f"{path} and {planes[path.stem]} are the same channel; wanted one file a channel.")
            planes[path.stem] = str(path)
    return planes


# ---------------------------------------------------------------------------------------------------------------------
# Index files


def list_index(index: Path, root: Path | None, by: str) -> Listing:
    """The rows of an index: `label`, and `path` or a column for each channel, also CellProfiler's `PathName_X` and
    `FileName_X`; optional `split` (train, val, test), `group` or `well`, and `plate`, also as `Metadata_...`.

    Relative paths start from `root`, by default the folder of the index. Without `split`, cells are split by `by`.
    """
    table = read_table(index)
    names = {name: _column_called(table, name) for name in _KNOWN}
    labels = table.column(names["label"] or "label")
    rows = range(len(table))
    if "" in labels:
        raise UsageError(f"{index} has no label in row {labels.index('') + 1}; wanted one in every row.")
    classes = tuple(sorted(set(labels), key=_numbers_first))
    root = index.parent if root is None else root
    channels, files = _files(table, names["path"], root)
    empty = {name: table.columns[column] if column else [""] * len(table) for name, column in names.items()}
    wells = [group or well for group, well in zip(empty["group"], empty["well"])]
    wells = [f"{plate} {well}" if plate and well else well for plate, well in zip(empty["plate"], wells)]
    cells = [Cell(files[row], classes.index(labels[row]), wells[row], empty["plate"][row]) for row in rows]
    if names["split"] is None:
        return Listing(split_cells(cells, by), classes, channels).check(str(index))
    parts: dict[str, list[Cell]] = {part: [] for part in PARTS}
    spelled = {"validation": "val", "valid": "val", "training": "train"} | {part: part for part in PARTS}
    for row, part in enumerate(empty["split"]):
        if part.lower() not in spelled:
            raise UsageError(f"{index} has the split {part!r} in row {row + 1}; wanted train, val or test.")
        parts[spelled[part.lower()]].append(cells[row])
    return Listing(parts, classes, channels).check(str(index))


def _numbers_first(label: str) -> tuple[bool, int, str]:
    """What labels are sorted by: numbers by their value, then all else by name."""
    is_number = label.isdecimal() and len(label) < 20  # int() refuses numbers of thousands of figures
    return not is_number, int(label) if is_number else 0, label


def _column_called(table: Table, name: str) -> str | None:
    """The column `name`, in any case, or CellProfiler's Metadata_`name`."""
    for wanted in (name, f"metadata_{name}"):
        for column in table.columns:
            if column.lower() == wanted:
                return column
    return None


def _files(table: Table, path_column: str | None, root: Path) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The channels of an index, none where a file holds them all, and every row's files."""
    if path_column is not None:
        paths = table.columns[path_column]
        if "" in paths:
            raise UsageError(f"{table.path} has no path in row {paths.index('') + 1}; wanted one in every row.")
        return (), [(_existing(table, root, path),) for path in paths]
    by_channel = {name.removeprefix("FileName_"): name for name in table.columns if name.startswith("FileName_")}
    if not by_channel:
        by_channel = {name: name for name, values in table.columns.items() if _names_images(values)}
    if not by_channel:
        raise UsageError(f"{table.path} has no column path and none of image files; wanted one of the two.")
    channels, rows = tuple(by_channel), []
    for row in range(len(table)):
        files = []
        for channel, column in by_channel.items():
            name = table.columns[column][row]
            folder = table.columns.get(f"PathName_{channel}")
            path = f"{folder[row]}/{name}" if folder and folder[row] else name
            files.append(_existing(table, root, path) if name else "")
        if not any(files):
            raise UsageError(f"{table.path} has no image in row {row + 1}; wanted one channel or more.")
        rows.append(tuple(files))
    return channels, rows


def _names_images(values: list[str]) -> bool:
    named = [value for value in values if value]
    return bool(named) and all(is_image(PurePosixPath(value).name, ARRAYS + TIFFS + PICTURES) for value in named)


def _existing(table: Table, root: Path, path: str) -> str:
    """A file named by an index. Raises UsageError, naming both, if it is not there."""
    if "\\" in path:
        path = PureWindowsPath(path).as_posix()
    full = os.path.join(root, path)
    if not os.path.isfile(full):
        raise UsageError(f"{table.path} names {full}, which does not exist.")
    return full
