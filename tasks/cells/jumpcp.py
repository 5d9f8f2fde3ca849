"""JUMP-CP's cells as FastVim, ChannelViT and ContextViT cut them out: s3://insitro-research-2023-context-vit/jumpcp.

A plate is `PLATE.pq`, which lists its cells, and the folder `PLATE` of arrays (8, 224, 224) of values from 0 to 255;
what stands in a well says `platemap_and_metadata/`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from tasks.cells.listing import Cell, Listing, split_cells
from tasks.cells.tables import Table, read_table
from utils import UsageError, first_line

_logger = logging.getLogger(__name__)

CHANNELS = ("Mito", "AGP", "RNA", "ER", "DNA", "HighZBF", "LowZBF", "Brightfield")
MEAN = (4.03174, 1.56594, 3.77368, 3.46053, 4.17232, 6.78053, 6.78739, 6.77812)
STD = (17.3184, 12.0159, 16.9661, 15.0648, 17.9641, 21.6388, 21.6706, 21.6395)
CLASSES = 161
# what a plate's wells differ in
PERTURBATIONS = {"compound": "target", "crispr": "gene", "orf": "gene"}
PLATES = {"BR00116991": "compound", "BR00117000": "crispr"}
CONTROL = "control"


def labels_of_wells(root: Path, perturbation: str) -> tuple[dict[str, int], tuple[str, ...]]:
    """The class of every well, and the names of the classes.

    Plate map and metadata are joined on `broad_sample`, where empty equals empty; targets are numbered from 1 as they
    first come in the metadata, and 0 is no target, the control. A well whose sample the metadata do not have is not
    among the wells.
    """
    folder = root / "platemap_and_metadata"
    plate_map, metadata = (
        read_table(_existing(folder / f"JUMP-Target-1_{perturbation}_{kind}.tsv")) for kind in ("platemap", "metadata")
    )
    target_column = PERTURBATIONS[perturbation]
    targets: dict[str, str] = {}
    classes = {"": 0}
    for sample, target in zip(metadata.column("broad_sample"), metadata.column(target_column)):
        targets.setdefault(sample, target)
        classes.setdefault(target, len(classes))
    if perturbation == "compound" and len(classes) != CLASSES:
        later = ", as those with a target_list do" if "target_list" in metadata.columns else ""
        _logger.warning(
            "%s makes %d classes%s; published figures are for %d.", metadata.path, len(classes), later, CLASSES
        )
    labels = {
        well: classes[targets[sample]]
        for well, sample in zip(plate_map.column("well_position"), plate_map.column("broad_sample"))
        if sample in targets
    }
    return labels, (CONTROL, *list(classes)[1:])


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UsageError(f"{path} does not exist; wanted it, to know what stands in the wells of a plate.")
    return path


def list_jumpcp(root: Path, plates: Sequence[str], perturbation: str | None, by: str) -> Listing:
    """The cells of `plates` with the classes of their wells, in the order of the plates' lists, split by `by`.

    `perturbation` is that of the plates' wells, by default what the published plates are known for. Raises UsageError,
    naming the file, for a plate without list, map or cells, and for a cell whose well has no label.
    """
    if len(set(plates)) < len(plates):
        raise UsageError(f"--plates is {','.join(plates)}; wanted every plate once.")
    perturbation = perturbation or PLATES.get(plates[0], "compound")
    labels, classes = labels_of_wells(root, perturbation)
    cells: list[Cell] = []
    for plate in plates:
        path = root / f"{plate}.pq"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in root.glob("*.pq"))[:10]) or "none"
            raise UsageError(f"--plates {plate}: {path} does not exist; {root} has {known}.")
        cells += _cells_of_plate(root, plate, read_table(path), labels)
    return Listing(split_cells(cells, by), classes, CHANNELS).check(f"--data-path {root}")


def _cells_of_plate(root: Path, plate: str, table: Table, labels: dict[str, int]) -> list[Cell]:
    present: dict[str, set[str]] = {}
    cells = []
    for well, path in zip(table.column("well_loc"), table.column("path")):
        # the rest of a path is where the publishers kept it
        folder, _, name = "/".join(path.split("/")[-2:]).rpartition("/")
        if folder not in present:
            try:
                present[folder] = set(os.listdir(root / folder))
            except (OSError, ValueError) as error:  # the latter for a name that no file can have
                raise UsageError(
                    f"{table.path} names {str(root / folder)!r}, which cannot be listed: {first_line(error)}."
                ) from None
        if name not in present[folder]:
            raise UsageError(f"{table.path} names {root / folder / name}, which does not exist.")
        if well not in labels:
            raise UsageError(f"{table.path} has a cell in well {well!r}, whose label the plate map does not give.")
        cells.append(Cell((str(root / folder / name),), labels[well], f"{plate} {well}", plate))
    return cells
