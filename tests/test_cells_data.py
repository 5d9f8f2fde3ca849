"""The data sets of cells: every format, missing channels, splits, statistics, batches, and what is refused."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tifffile
import torch
from PIL import Image

from benchmarks import small_cells as cells_data
from tasks.cells import data, digits, jumpcp
from tasks.cells.dataset import Cells, ChannelSetSampler, Statistics, collate
from tasks.cells.images import in_range, read_header, read_image
from tasks.cells.listing import PARTS, list_index, split
from tasks.cells.tables import read_table
from utils import UsageError

BROKEN = (
    *("objects.npy", "text.npy", "words.npy", "four.npy", "cut.npy", "cut.tif", "text.tif", "stack.tif"),
    *("colour.png", "kinds.tif", "absent.npy", "long.npy"),
)
FORMATS = ("pages", "axis", "lzw", "big", "npy", "npy_last")


def flags(**changes: object) -> argparse.Namespace:
    defaults = dict(
        data_set="CELLS",
        data_path="",
        channels=None,
        channel_norm="dataset",
        index="",
        plates="BR00116991",
        perturbation=None,
        split_by="cell",
        input_size=32,
    )
    return argparse.Namespace(**defaults | {name: str(v) if isinstance(v, Path) else v for name, v in changes.items()})


# --- images ---


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_formats_give_the_same_image(tmp_path: Path, how: str, dtype: str) -> None:
    image = cells_data.cells(1, dtype=dtype)[0]
    path = str(cells_data.write_cell(tmp_path / "cell", image, how))
    found = read_image(path)
    assert found.dtype == np.dtype(dtype)
    assert found.dtype.isnative
    np.testing.assert_array_equal(found, image)
    assert read_header(path) == (3, np.dtype(dtype))


def test_depths_are_shares_of_their_range() -> None:
    assert in_range(np.array([0, 255], np.uint8)).tolist() == [0, 1]
    assert in_range(np.array([0, 65535], np.uint16)).tolist() == [0, 1]
    assert in_range(np.array([-2.5, 7.0])).tolist() == [-2.5, 7.0]


def test_rows_of_three_stay_a_grey_image(tmp_path: Path) -> None:
    np.save(tmp_path / "plane.npy", np.ones((9, 7)))
    assert read_image(str(tmp_path / "plane.npy")).shape == (1, 9, 7)


def broken_images(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files that are no image of channels, and what is said of each."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, tuple[Path, str]] = {}

    def add(name: str, said: str, write: Callable[[Path], object]) -> None:
        write(folder / name)
        files[name] = folder / name, said

    image = cells_data.cells(1)[0]
    add("objects.npy", "pickled objects", lambda path: np.save(path, np.array([{}, 1], dtype=object)))
    add("text.npy", "no NumPy array", lambda path: path.write_text("not an array", encoding="utf-8"))
    add("words.npy", "wanted whole or floating", lambda path: np.save(path, np.full((3, 4, 4), "a")))
    add("four.npy", "wanted two axes, or three", lambda path: np.save(path, np.zeros((2, 3, 4, 4))))
    add("long.npy", "is 1 x 101; wanted sides of at most 100 to 1", lambda path: np.save(path, np.zeros((1, 101))))
    add("cut.npy", "cannot be read", lambda path: _cut(path, lambda part: np.save(part, image)))
    add("cut.tif", "cannot be read", lambda path: _cut(path, lambda part: tifffile.imwrite(part, image[0])))
    add("text.tif", "cannot be read", lambda path: path.write_text("not a TIFF", encoding="utf-8"))
    add("stack.tif", "at most one more", lambda path: tifffile.imwrite(path, np.stack([image] * 4), imagej=True))
    add("colour.png", "wanted a grey one", lambda path: Image.new("RGB", (8, 8)).save(path))

    def two_kinds(path: Path) -> None:
        with tifffile.TiffWriter(path) as file:
            file.write(image[0], contiguous=False)
            file.write(image[0, :9], contiguous=False)

    add("kinds.tif", "wanted pages of one kind", two_kinds)
    files["absent.npy"] = folder / "absent.npy", "does not exist"
    return files


def _cut(path: Path, write: Callable[[Path], object]) -> None:
    write(path)
    path.write_bytes(path.read_bytes()[:-1500])


@pytest.mark.parametrize("name", BROKEN)
def test_broken_images_are_named(tmp_path: Path, name: str) -> None:
    path, said = broken_images(tmp_path)[name]
    with pytest.raises(UsageError, match=said) as caught:
        read_image(str(path))
    assert str(path) in str(caught.value)
    assert str(caught.value).count("\n") == 0


# --- tables ---


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_tables_are_told_by_their_content(tmp_path: Path, suffix: str) -> None:
    written = cells_data.write_table(tmp_path / f"table.{suffix}", [{"a": "x", "b": 1.0}, {"a": None, "b": 2.0}])
    table = read_table(written.rename(tmp_path / "table.tsv"))
    assert table.columns["a"] == ["x", ""]
    assert [float(value) for value in table.columns["b"]] == [1, 2]
    with pytest.raises(UsageError, match=r"table.tsv has no column 'aa'; the nearest names are a"):
        table.column("aa")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no rows"),
        (b"a,b\n", "no rows"),
        (b"a,b\n1,2\n3\n", "1 values in line 3"),
        (b"a,a\n1,2\n", "'a' twice"),
        (b"\xff\xfe\x00", "neither parquet nor text"),
        (b"PAR1 and no more", "no parquet file"),
    ],
)
def test_broken_tables_are_named(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "table.csv").write_bytes(content)
    with pytest.raises(UsageError, match=said) as caught:
        read_table(tmp_path / "table.csv")
    assert str(tmp_path / "table.csv") in str(caught.value)


# --- data sets ---


@pytest.mark.parametrize("how", [*FORMATS, "planes"])
def test_folders(tmp_path: Path, how: str) -> None:
    train, test, info = data.build(flags(data_path=cells_data.write_folder(tmp_path, how)), train=True)
    assert (len(train), len(test)) == (12, 6)
    assert info.classes == ("dmso", "taxol")
    assert info.channels == (("DNA", "ER", "RNA") if how == "planes" else ("0", "1", "2"))
    item = test[0]
    assert (item.image.shape, item.label, item.channels, item.well) == ((3, 32, 32), 0, (0, 1, 2), -1)
    assert item.image.dtype == torch.float32
    assert 0 <= float(item.image.min()) < 0.3 < 0.7 < float(item.image.max()) <= 1


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
@pytest.mark.parametrize("by", ["cell", "well"])
def test_cellprofiler_index(tmp_path: Path, suffix: str, by: str) -> None:
    args = flags(index=cells_data.write_index(tmp_path, suffix), split_by=by)
    train, validation, info = data.build(args, train=True)
    _, test, _ = data.build(args, train=False)
    assert info.channels == cells_data.STAINS
    wells = [set(part.source.wells) for part in (train, validation, test)]
    assert sum(map(len, (train, validation, test))) == 24
    assert all(well.startswith("P1 A0") for part in wells for well in part)
    assert any(wells[0] & wells[1]) == (by == "cell")
    image = tifffile.imread(tmp_path / "images" / f"{Path(train.source.cells[0].files[1]).stem}.tif")
    np.testing.assert_array_equal(train.stored(0)[1], in_range(image))


def test_index_of_whole_files_with_a_split(tmp_path: Path) -> None:
    rows = []
    for number, image in enumerate(cells_data.cells(6)):
        path = cells_data.write_cell(tmp_path / str(number), image, "npy")
        part = ("train", "validation", "test")[number // 2]
        rows.append({"path": path.name, "label": number % 2 + 9, "split": part, "group": f"w{number // 2}"})
    args = flags(index=cells_data.write_table(tmp_path / "index.csv", rows))
    train, validation, info = data.build(args, train=True)
    assert info.classes == ("9", "10")
    assert validation.source.wells == ["w1", "w1"]
    assert data.build(args, train=False)[1].source.wells == ["w2", "w2"]
    np.testing.assert_array_equal(train.stored(1), in_range(cells_data.cells(6)[1]))


@pytest.mark.parametrize("text", [False, True])
def test_jumpcp(tmp_path: Path, text: bool, caplog: pytest.LogCaptureFixture) -> None:
    args = flags(data_set="JUMPCP", data_path=cells_data.write_jumpcp(tmp_path, text=text))
    train, validation, info = data.build(args, train=True)
    _, test, _ = data.build(args, train=False)
    assert (len(train), len(validation), len(test)) == (7, 2, 3)
    assert info.classes == ("control", *cells_data.GENES)
    assert info.channels == jumpcp.CHANNELS
    assert info.statistics() == Statistics(list(jumpcp.MEAN), list(jumpcp.STD))
    order = np.random.RandomState(0).permutation(12)
    # three cells a well, wells in the order of their classes
    assert [train[index].label for index in range(7)] == [int(place) // 3 for place in order[:7]]
    assert test[0].image.shape == (8, 32, 32)
    assert float(test[0].image.max()) > 200
    assert "makes 4 classes" in caplog.text


@pytest.mark.parametrize(("by", "plates"), [("well", 1), ("plate", 3)])
def test_split_by_well_and_plate(tmp_path: Path, by: str, plates: int) -> None:
    names = tuple(f"BR{number}" for number in range(plates))
    cells_data.write_jumpcp(tmp_path, names, cells_a_well=2)
    args = flags(data_set="JUMPCP", data_path=tmp_path, plates=",".join(names), split_by=by)
    parts = [*data.build(args, train=True)[:2], data.build(args, train=False)[1]]
    sides = [{getattr(cell, by) for cell in part.source.cells} for part in parts]
    assert all(sides)
    assert not sides[0] & sides[1] | sides[1] & sides[2] | sides[0] & sides[2]
    assert sum(map(len, parts)) == 8 * plates


def test_published_split() -> None:
    parts = split(217)
    assert [len(parts[part]) for part in PARTS] == [130, 43, 44]
    assert sorted(index for part in parts.values() for index in part) == list(range(217))


def test_digits() -> None:
    image = np.tile(np.arange(8.0), (8, 1))
    intensity, *edges = digits.five_channels(image)
    np.testing.assert_array_equal(intensity, image)
    np.testing.assert_allclose([edge[4, 4] for edge in edges], [1, 2**-0.5, 0, 2**-0.5], atol=1e-6)
    train, test, info = data.build(flags(data_set="CELLS_DIGITS", channels="edge90,0"), train=True)
    assert (len(train), len(test), info.chosen) == (1437, 360, (3, 0))
    torch.manual_seed(0)
    assert train[3].image.shape == (2, 32, 32)
    assert torch.equal(test[5].image[1], test.stored(5)[1])


# --- missing channels, statistics, batches ---


def write_gaps(root: Path) -> Path:
    """Cells of floating planes: the first without ER, the second with an RNA that is NaN, the third whole, and so on;
    two wells, of two classes."""
    rows = []
    for number in range(12):
        row = {"label": number // 6, "split": ("train", "val")[number % 6 > 3], "DNA": f"{number}_d.tif"}
        planes = {"DNA": np.full((32, 32), float(number)), "ER": np.full((32, 32), 2.0), "RNA": np.ones((32, 32))}
        if number % 3 == 0:
            del planes["ER"]
        if number % 3 == 1:
            planes["RNA"] *= np.nan
        row |= {"ER": "", "RNA": ""} | {name: f"{number}_{name[0].lower()}.tif" for name in planes}
        for name, plane in planes.items():
            tifffile.imwrite(root / row[name], plane.astype(np.float32))
        rows.append(row)
    return cells_data.write_table(root / "index.csv", rows)


def test_missing_channels_and_statistics(tmp_path: Path) -> None:
    train, test, info = data.build(flags(index=write_gaps(tmp_path)), train=True)
    assert train.channel_sets[:3] == [(0, 2), (0, 1), (0, 1, 2)]
    assert train[1].image.shape == (2, 32, 32)
    numbers = torch.tensor([0.0, 1, 2, 3, 6, 7, 8, 9])
    found = info.statistics()
    torch.testing.assert_close(torch.tensor(found.mean), torch.tensor([numbers.mean(), 2, 1]))
    torch.testing.assert_close(torch.tensor(found.std), torch.tensor([numbers.std(correction=0), 0, 0]))
    batches = [collate([test[index] for index in batch]) for batch in ChannelSetSampler(test.channel_sets, 8)]
    assert sorted(batch.channels.tolist() for batch in batches) == [[0, 1], [0, 1, 2]]
    with pytest.raises(ValueError, match="wanted one"):
        collate([test[0], test[1]])


def test_statistics_are_the_same_from_shares(tmp_path: Path) -> None:
    train, _, info = data.build(flags(data_path=cells_data.write_folder(tmp_path)), train=True)
    images = torch.stack([train.stored(index) for index in range(len(train))]).double().transpose(0, 1).flatten(1)
    sums: list[list[float]] = []
    for rank in (1, 0):
        found = data.measure(train, 3, (rank, 2), lambda own: sums.append(own) or [sum(each) for each in zip(*sums)])
    torch.testing.assert_close(torch.tensor(found.mean).double(), images.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.tensor(info.statistics().std), images.std(1, correction=0).float())


SETS = [(0, 1, 2)] * 21 + [(0, 2)] * 9 + [(1,)] * 3 + [(2,)]


@pytest.mark.parametrize("world", [1, 2])
def test_training_batches_hold_one_channel_set(world: int) -> None:
    samplers = [ChannelSetSampler(SETS, 4, 5, rank, world, shuffle=True) for rank in range(world)]
    for sampler in samplers:
        sampler.set_epoch(3)
    shares = [list(sampler) for sampler in samplers]
    steps = 5 + 2 + 1 + 1 if world == 1 else 2 + 1 + 1
    assert {len(share) for share in shares} == {steps} == {len(sampler) for sampler in samplers}
    for parts in zip(*shares):
        assert len({len(part) for part in parts}) == 1
        assert len({SETS[index] for part in parts for index, _ in part}) == 1
    seen = [index for share in shares for batch in share for index, _ in batch]
    assert len(seen) == len(set(seen)) == (20 + 8 + 3 + 1 if world == 1 else 16 + 8 + 2)
    samplers[0].set_epoch(3, start=2)
    assert list(samplers[0]) == shares[0][2:]
    samplers[0].set_epoch(4)
    assert list(samplers[0]) != shares[0]


def test_evaluation_batches_hold_every_image_once() -> None:
    shares = [list(ChannelSetSampler(SETS, 4, rank=rank, world_size=2)) for rank in range(2)]
    assert sorted(index for share in shares for batch in share for index in batch) == list(range(len(SETS)))
    assert ChannelSetSampler(SETS, 4, rank=1, world_size=2).steps == max(map(len, shares))


# --- what is refused ---


def read_all(args: argparse.Namespace) -> None:
    for train in (True, False):
        train_set, test_set, _ = data.build(args, train)
        for part in filter(None, (train_set, test_set)):
            for index in range(len(part)):
                part[index]


def refused(args: argparse.Namespace, said: str) -> str:
    with pytest.raises(UsageError, match=said) as caught:
        read_all(args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("text", ["0,0", "DNA,0", "3", "-1", "DNX", "", "\u00b2", "9" * 5000])
def test_channels_that_are_not_there_or_twice(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--channels names"):
        data.choose(text, cells_data.STAINS)


def test_files_unlike_the_rest(tmp_path: Path) -> None:
    root = cells_data.write_folder(tmp_path / "a", "npy")
    odd = root / "val" / "taxol" / "cell1.npy"
    image = np.load(odd)
    for changed, said in (
        (image[:2], "has 2 channels; wanted 3"),
        (image.astype(np.float32), "holds float32; wanted whole"),
        (image.astype(complex), "holds complex128"),
    ):
        np.save(odd, changed)
        assert str(odd) in refused(flags(data_path=root), said)
    # another size or depth is no trouble
    np.save(odd, np.pad(image >> 8, [(0, 0), (10, 0), (0, 3)]).astype(np.uint8))
    _, test, _ = data.build(flags(data_path=root), train=True)
    assert test[4].image.shape == (3, 32, 32)
    assert float(test[4].image.max()) > 0.8


def test_planes_unlike_each_other(tmp_path: Path) -> None:
    root = cells_data.write_folder(tmp_path, "planes", train=2, test=1)
    odd = root / "train" / "dmso" / "cell0" / "ER.tif"
    tifffile.imwrite(odd, np.ones((9, 9), np.uint16))
    assert str(odd) in refused(flags(data_path=root), r"is \(9, 9\); wanted \(40, 40\)")
    tifffile.imwrite(odd, np.ones((2, 9, 9), np.uint16), photometric="minisblack")
    assert str(odd) in refused(flags(data_path=root), "has 2 channels; wanted one")
    odd.rename(odd.with_name("DNA.tif"))
    assert "DNA.tif" in refused(flags(data_path=root), "are the same channel")


def test_folders_that_are_no_data_set(tmp_path: Path) -> None:
    refused(flags(data_path=tmp_path), "has no folder train")
    for part in ("train", "val"):
        (tmp_path / part / "dmso").mkdir(parents=True)
    refused(flags(data_path=tmp_path), "holds no image")
    for part in ("train", "val"):
        np.save(tmp_path / part / "dmso" / "0.npy", np.zeros((3, 8, 8)))
    refused(flags(data_path=tmp_path), "of the class 'dmso' only")
    (tmp_path / "val" / "taxol").mkdir()
    np.save(tmp_path / "val" / "taxol" / "0.npy", np.zeros((3, 8, 8)))
    refused(flags(data_path=tmp_path), r"taxol is a class that .*train does not have")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda row: row | {"label": ""}, "has no label in row 1"),
        (lambda row: row | {"FileName_ER": "absent.tif"}, r"absent.tif, which does not exist"),
        (lambda row: row | dict.fromkeys(("FileName_DNA", "FileName_ER", "FileName_RNA"), ""), "no image in row 1"),
        (lambda row: {name: value for name, value in row.items() if name != "label"}, "has no column 'label'"),
        (lambda row: {"label": row["label"], "x": "y"}, "none of image files"),
        (lambda row: row | {"split": "elsewhere"}, "the split 'elsewhere' in row 1"),
        (lambda row: row | {"label": "same"}, "of the class 'same' only"),
        (lambda row: row | {"split": "test"}, "has no image to train on"),
    ],
)
def test_broken_indices(tmp_path: Path, change: Callable[[dict], dict], said: str) -> None:
    columns = read_table(cells_data.write_index(tmp_path)).columns
    rows = [change(dict(zip(columns, values))) for values in zip(*columns.values())]
    index = cells_data.write_table(tmp_path / "broken.csv", rows)
    assert "broken.csv" in refused(flags(index=index), said)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda root: (root / "BR00116991.pq").unlink(), "BR00116991.pq does not exist"),
        (lambda root: (root / "BR00116991" / "BR00116991_A01_f1_c0.npy").unlink(), "c0.npy, which does not exist"),
        (lambda root: (root / "BR00116991").rename(root / "other"), "cannot be listed"),
        (
            lambda root: cells_data.write_table(root / "BR00116991.pq", [{"well_loc": "A01", "path": "a\0b/c.npy"}]),
            "cannot be listed: embedded null byte",
        ),
        (
            lambda root: (root / "platemap_and_metadata" / "JUMP-Target-1_compound_platemap.tsv").unlink(),
            "platemap.tsv does not exist",
        ),
        (
            lambda root: cells_data.write_table(
                root / "platemap_and_metadata" / "JUMP-Target-1_compound_platemap.tsv",
                [{"well_position": "A02", "broad_sample": "BRD-0"}],
            ),
            "BR00116991.pq has a cell in well 'A01'",
        ),
        (
            lambda root: np.save(root / "BR00116991" / "BR00116991_A01_f1_c0.npy", np.zeros((5, 32, 32))),
            "c0.npy has 5 channels; wanted 8",
        ),
        (
            lambda root: np.save(root / "BR00116991" / "BR00116991_A01_f1_c0.npy", np.full((8, 32, 32), np.nan)),
            "c0.npy has values that are not finite",
        ),
    ],
)
def test_broken_plates(tmp_path: Path, spoil: Callable[[Path], object], said: str) -> None:
    spoil(cells_data.write_jumpcp(tmp_path))
    refused(flags(data_set="JUMPCP", data_path=tmp_path), said)


def test_labels_that_only_look_like_numbers(tmp_path: Path) -> None:
    """Figures that int() does not take, and so many of them that it does not either, are names."""
    columns = read_table(cells_data.write_index(tmp_path)).columns
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
    labels = ("\u00b2", "9" * 5000, "10", "9")
    index = cells_data.write_table(
        tmp_path / "index.csv", [row | {"label": labels[place % 4]} for place, row in enumerate(rows)]
    )
    assert list_index(index, None, "cell").classes == ("9", "10", "9" * 5000, "\u00b2")


def test_a_date_that_python_has_not(tmp_path: Path) -> None:
    """pyarrow leaves what it cannot make a Python object of to Python's own errors."""
    late = pyarrow.array([2**62], pyarrow.timestamp("ms"))
    pyarrow.parquet.write_table(pyarrow.table({"a": late}), tmp_path / "late.pq")
    with pytest.raises(UsageError, match="late.pq is no parquet file that can be read"):
        read_table(tmp_path / "late.pq")


def test_plates_that_cannot_be_split(tmp_path: Path) -> None:
    cells_data.write_jumpcp(tmp_path)
    refused(flags(data_set="JUMPCP", data_path=tmp_path, split_by="plate"), "1 wells or plates to split by")
    refused(flags(data_set="JUMPCP", data_path=tmp_path, plates="BR1"), "BR1.pq does not exist; .* has BR00116991")
    refused(flags(data_set="JUMPCP", data_path=tmp_path, plates="BR00116991,BR00116991"), "wanted every plate once")


def test_values_that_are_not_finite_in_a_part(tmp_path: Path) -> None:
    root = cells_data.write_folder(tmp_path, "npy", train=2, test=1)
    for path in root.rglob("*.npy"):
        np.save(path, np.load(path).astype(np.float32))
    odd = root / "train" / "dmso" / "cell0.npy"
    image = np.load(odd)
    image[1, 3, 4] = np.nan
    np.save(odd, image)
    assert str(odd) in refused(flags(data_path=root), "not finite in a part of a channel")
    np.save(odd, image * np.nan)
    assert str(odd) in refused(flags(data_path=root), "no channel that is not NaN")


def test_a_chosen_channel_that_an_image_lacks(tmp_path: Path) -> None:
    refused(flags(index=write_gaps(tmp_path), channels="ER"), "--channels leaves image 0 of the set without any")
    assert isinstance(data.build(flags(index=tmp_path / "index.csv", channels="DNA"), True)[0], Cells)
