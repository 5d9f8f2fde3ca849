"""The data sets of cells: what the flags ask for, as one value for the task."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.cells import digits, jumpcp
from tasks.cells.dataset import Cells, FileSource, PlateSource, Source, Statistics, measure
from tasks.cells.listing import SPLIT_BY, Cell, list_folder, list_index
from tasks.cells.transforms import EvalTransform, TrainTransform
from utils import UsageError, nearest

DATA_SETS = ("CELLS_DIGITS", "CELLS", "JUMPCP")
CHANNEL_NORMS = ("dataset", "self", "none")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of cells' data."""
    group = parser.add_argument_group("cells: data")
    group.add_argument(
        "--channels", default=None, metavar="C,C", help="use these channels only: numbers from 0, or names"
    )
    group.add_argument(
        "--channel-norm",
        default="dataset",
        choices=CHANNEL_NORMS,
        help="normalise a channel by the training set, by its own image, or by its number type's range only",
    )
    group.add_argument("--index", default="", metavar="FILE", help="CSV, TSV or parquet that lists CELLS' images")
    group.add_argument("--plates", default="BR00116991", metavar="P,P", help="JUMPCP's plates (default: BR00116991)")
    group.add_argument(
        "--perturbation",
        default=None,
        choices=tuple(jumpcp.PERTURBATIONS),
        help="what the plates' wells differ in (default: what a published plate is known for, else compound)",
    )
    group.add_argument(
        "--split-by",
        default="cell",
        choices=SPLIT_BY,
        help="what stays on one side of the split; published figures split a well's cells (default: cell)",
    )


def check(args: argparse.Namespace, typed: set[str]) -> None:
    """Refuse flags of one data set with another, before anything is read."""
    for flag, of in (("index", "CELLS"), ("plates", "JUMPCP"), ("perturbation", "JUMPCP")):
        if flag in typed and args.data_set != of:
            raise UsageError(f"--{flag} belongs to --data-set {of}; this is {args.data_set}.")
    if "split_by" in typed and (args.data_set == "CELLS_DIGITS" or (args.data_set == "CELLS" and not args.index)):
        raise UsageError("--split-by splits JUMPCP or the rows of --index; this data set says its split itself.")
    if args.data_set == "CELLS_DIGITS":
        return
    if not args.data_path and not args.index:
        raise UsageError(f"--data-path is missing; wanted the folder of {args.data_set}.")
    if args.data_path and not Path(args.data_path).is_dir():
        raise UsageError(f"--data-path {args.data_path} is no folder; wanted that of {args.data_set}.")


@dataclass
class CellsInfo:
    """What the data say beside their items.

    `channels` and `classes` are all that they know, by name; `chosen` indexes the channels that are used. `span` is the
    highest stored value of whole numbers. `known` are statistics that need no measuring; else `statistics` measures
    them.
    """

    channels: tuple[str, ...]
    classes: tuple[str, ...]
    chosen: tuple[int, ...]
    span: float
    known: Statistics | None
    open_train: Callable[[], Cells]

    def statistics(
        self, share: tuple[int, int] = (0, 1), add_up: Callable[[list[float]], list[float]] = list
    ) -> Statistics:
        """Mean and deviation of every channel, read from the training images where they are not known; `share` and
        `add_up` as in `measure`."""
        if self.known is None:
            self.known = measure(self.open_train(), len(self.channels), share, add_up)
        return self.known


def choose(text: str | None, names: Sequence[str]) -> tuple[int, ...]:
    """The channels that `--channels` names, as indices into `names` in the order given; all by default."""
    if text is None:
        return tuple(range(len(names)))
    chosen = []
    for part in (part.strip() for part in text.split(",")):
        if part in names:
            chosen.append(list(names).index(part))
        elif part.isdecimal() and len(part) < 20 and int(part) < len(names):
            chosen.append(int(part))
        else:
            known = f"0 to {len(names) - 1}, or {', '.join(names)}"
            raise UsageError(
                f"--channels names {part!r}, which the data do not have; wanted {known}{nearest(part, names)}."
            )
    twice = next((each for each in chosen if chosen.count(each) > 1), None)
    if twice is not None:
        raise UsageError(f"--channels names channel {names[twice]!r} twice; wanted each once.")
    return tuple(chosen)


def build(args: argparse.Namespace, train: bool) -> tuple[Cells | None, Cells, CellsInfo]:
    """The training set (None unless `train`), the set to evaluate on, and what else the data say.

    While training that is the validation part, else the test part where there is one.
    """
    names, classes, span, known, open_part = _open(args)
    chosen = choose(args.channels, names)
    upright = args.data_set == "CELLS_DIGITS"

    def open_cells(part: str, transform: Callable) -> Cells:
        return Cells(open_part(part), transform, chosen)

    info = CellsInfo(
        names, classes, chosen, span, known, open_train=lambda: open_cells("train", EvalTransform(args.input_size))
    )
    train_set = open_cells("train", TrainTransform(args.input_size, upright)) if train else None
    if train_set is not None:
        info.open_train = lambda: train_set
    return train_set, open_cells("val" if train else "test", EvalTransform(args.input_size)), info


def _open(
    args: argparse.Namespace,
) -> tuple[tuple[str, ...], tuple[str, ...], float, Statistics | None, Callable[[str], Source]]:
    """Channel and class names, the highest stored value, known statistics, and a part's images."""
    if args.data_set == "CELLS_DIGITS":
        return (
            *(digits.CHANNELS, digits.CLASSES, 255.0, None),
            lambda part: digits.read_digits(part == "train", args.input_size),
        )
    if args.data_set == "JUMPCP":
        plates = [plate.strip() for plate in args.plates.split(",")]
        listing = jumpcp.list_jumpcp(Path(args.data_path), plates, args.perturbation, args.split_by)
        known = Statistics(list(jumpcp.MEAN), list(jumpcp.STD))
        channels = len(jumpcp.CHANNELS)
        return (
            *(jumpcp.CHANNELS, listing.classes, 255.0, known),
            lambda part: PlateSource(_part(listing.parts, part), channels),
        )
    root = Path(args.data_path) if args.data_path else None
    listing = list_index(Path(args.index), root, args.split_by) if args.index else list_folder(root)
    everyone = [cell for part in listing.parts.values() for cell in part]
    channels, kinds = FileSource.look(everyone)
    names = listing.channels or tuple(map(str, range(channels)))
    return (
        *(names, listing.classes, 1.0, None),
        lambda part: FileSource(_part(listing.parts, part), channels, kinds),
    )


def _part(parts: dict[str, list[Cell]], part: str) -> list[Cell]:
    """The cells of a part; validation and test stand for each other where one is empty."""
    return parts[part] or parts["val" if part == "test" else "test"]
