"""SHAPES, ADE20K's layout and the transforms of images and masks together."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.small_data import write_shapes
from tasks.dense import shapes as shapes_module
from tasks.dense.data import NAMES_FILE, SegmentationFolder, ade20k_labels, read_names
from tasks.dense.pictures import ADE20K_COLOURS, colour_map, draw_segmentation, palette, save_prediction
from tasks.dense.shapes import BACKGROUND, CLASSES, SIDE, find_shapes, outline
from tasks.segment.transforms import TestTransform, TrainTransform, fit_size
from utils import UsageError


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("made") / "shapes")


def fill(corners: list[int]) -> np.ndarray:
    """The pixels whose centres lie inside a line, by crossings to their left."""
    mask = np.zeros((SIDE, SIDE), bool)
    points = list(zip(corners[::2], corners[1::2]))
    for (x, y), (end, below) in zip(points, [*points[1:], points[0]]):
        if x == end:
            mask[min(y, below) : max(y, below), x:] ^= True
    return mask


def decode(runs: dict) -> np.ndarray:
    values = np.repeat(np.arange(len(runs["counts"])) % 2 == 1, runs["counts"])
    return values.reshape(runs["size"][::-1]).T


def test_shapes_are_the_same_every_time_and_both_layouts_agree(shapes: Path, tmp_path: Path) -> None:
    again = write_shapes(tmp_path / "again")
    files = sorted(file.relative_to(shapes) for file in shapes.rglob("*") if file.is_file())
    assert len(files) == 3 * 17 + 3
    for file in files:
        assert (shapes / file).read_bytes() == (again / file).read_bytes(), file
    assert find_shapes(str(shapes)) == shapes
    found = {"polygon": 0, "runs": 0, "crowd": 0}
    for split, coco in (("training", "train2017"), ("validation", "val2017")):
        annotations = json.loads((shapes / "annotations" / f"instances_{coco}.json").read_text(encoding="utf-8"))
        assert [category["name"] for category in annotations["categories"]] == list(CLASSES)
        of_image = {image["id"]: image["file_name"] for image in annotations["images"]}
        painted = {name: np.full((SIDE, SIDE), BACKGROUND) for name in of_image.values()}
        for entry in annotations["annotations"]:
            runs = entry["segmentation"]
            mask = decode(runs) if isinstance(runs, dict) else fill(runs[0])
            kind = "crowd" if entry["iscrowd"] else "runs" if isinstance(runs, dict) else "polygon"
            found[kind] += 1
            assert mask.sum() == entry["area"]
            left, top, width, height = entry["bbox"]
            assert mask[top : top + height, left : left + width].sum() == entry["area"]
            painted[of_image[entry["image_id"]]][mask] = entry["category_id"] - 1
        for name, wanted in painted.items():
            annotation = np.asarray(Image.open(shapes / "annotations" / split / name.replace("jpg", "png")))
            labels = ade20k_labels(annotation)
            labelled = labels != 255
            assert np.array_equal(labels[labelled], wanted[labelled])
            # what is unlabelled is the rims' background
            assert (wanted[~labelled] == BACKGROUND).all()
            assert (shapes / coco / name).read_bytes() == (shapes / "images" / split / name).read_bytes()
        assert (painted["shapes_0001.jpg"] == BACKGROUND).all()
    assert min(found.values()) > 0


def test_outline_of_masks_that_have_none() -> None:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[3:6, 4:8] = True
    assert outline(mask) == [4, 3, 8, 3, 8, 6, 4, 6]
    ring = mask.copy()
    ring[4, 5] = False
    apart = mask.copy()
    apart[20, 20] = True
    corner = mask.copy()
    corner[6, 8] = True
    for broken in (ring, apart, corner):
        assert outline(broken) is None


def test_labels_and_names(shapes: Path, tmp_path: Path) -> None:
    raw = torch.tensor([0, 1, 150], dtype=torch.uint8)
    assert ade20k_labels(raw).tolist() == ade20k_labels(raw.numpy()).tolist() == [255, 0, 149]
    assert read_names(shapes) == [*CLASSES, "background"]
    assert len(read_names(tmp_path)) == 150
    folder = SegmentationFolder(shapes, True, read_names(shapes))
    image, labels = folder[2]
    assert (image.shape, image.dtype, labels.shape) == ((3, SIDE, SIDE), torch.uint8, (SIDE, SIDE))
    assert set(labels.unique().tolist()) <= {*range(6), 255}


def test_pictures_of_any_suffix_and_one_a_name(tmp_path: Path) -> None:
    root = write_shapes(tmp_path / "shapes", 2, 3)
    images = root / "images" / "validation"
    before = [SegmentationFolder(root, False, read_names(root))[index][0] for index in range(3)]
    jpg = images / "shapes_0002.jpg"
    (images / ".hidden.jpg").write_bytes(b"no image")
    (images / "notes.txt").write_text("no image", encoding="utf-8")
    Image.open(jpg).save(images / "shapes_0002.PNG")
    with pytest.raises(UsageError, match=r"shapes_0002\.jpg has the name of shapes_0002\.PNG"):
        SegmentationFolder(root, False, ["one"])
    jpg.unlink()
    folder = SegmentationFolder(root, False, read_names(root))
    assert [file.suffix for file in folder.files] == [".jpg", ".jpg", ".PNG"]
    assert all(torch.equal(folder[index][0], image) for index, image in enumerate(before))


def test_sizes_are_fitted() -> None:
    assert fit_size(512, 683, 2048, (512, 512)) == (512, 683)
    assert fit_size(256, 256, 2048, (512, 512)) == (512, 512)
    assert fit_size(100, 1000, 2048, (512, 512)) == (205, 2048)
    # a street's camera and its crop, and the same scene on its side
    assert fit_size(1024, 2048, 4096, (512, 1024)) == (512, 1024)
    assert fit_size(2048, 1024, 4096, (512, 1024)) == (2048, 1024)


def test_image_and_mask_move_together() -> None:
    """An image that shows its labels still does after every step that moves pixels."""
    labels = torch.zeros(60, 90, dtype=torch.uint8)
    labels[:25, :40], labels[30:, 50:], labels[:10, 60:] = 1, 2, 255
    image = torch.stack([labels.clamp(max=3) * 80] * 3)
    transform = TrainTransform(48)
    # colours stay, for once
    transform.steps.transforms[3].p = 0.0
    sizes = set()
    for seed in range(12):
        torch.manual_seed(seed)
        pixels, mask = transform(image, labels)
        assert (pixels.shape, mask.shape, mask.dtype) == ((3, 48, 48), (48, 48), torch.long)
        shown = (pixels[0] * 0.229 + 0.485) * 255
        inside = mask != 255
        agrees = ((shown - mask * 80).abs() < 2)[inside].float().mean()
        assert agrees > 0.85, seed
        sizes.add(int((pixels[0] == 0).sum()))
    assert len(sizes) > 2  # crops smaller than their frame, padded with zeros
    torch.manual_seed(3)
    first = transform(image, labels)[0]
    torch.manual_seed(3)
    assert torch.equal(first, transform(image, labels)[0])
    pixels, mask = TestTransform(48)(image, labels)
    assert pixels.shape == (3, 48, 72)
    assert torch.equal(mask, labels.long())


def test_crops_show_more_than_one_class() -> None:
    labels = torch.zeros(64, 64, dtype=torch.uint8)
    labels[:, 40:] = 1
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    transform = TrainTransform(24, (1.0, 1.0))
    transform.steps.transforms[0].size = (64, 64)
    varied = 0
    for seed in range(20):
        torch.manual_seed(seed)
        counts = torch.bincount(transform(image, labels)[1].flatten())
        varied += len(counts) == 2 and int(counts.max()) < 0.75 * 24 * 24
    # a plain crop shows both for one place in four
    assert varied > 12


def spoil(root: Path, wrong: str) -> None:
    image = root / "images" / "validation" / "shapes_0002.jpg"
    annotation = root / "annotations" / "validation" / "shapes_0002.png"
    values = np.asarray(Image.open(annotation))
    if wrong == "no annotation":
        annotation.unlink()
    elif wrong == "sizes differ":
        Image.fromarray(values[:20]).save(annotation)
    elif wrong == "RGB labels":
        Image.fromarray(np.stack([values] * 3, -1)).save(annotation)
    elif wrong == "value over":
        Image.fromarray(values + np.uint8(200)).save(annotation)
    elif wrong == "broken annotation":
        annotation.write_bytes(annotation.read_bytes()[:40])
    elif wrong == "broken image":
        image.write_bytes(b"no image")
    elif wrong == "empty set":
        for file in image.parent.iterdir():
            file.unlink()
    else:
        for file in image.parent.iterdir():
            file.unlink()
        image.parent.rmdir()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("no annotation", r"shapes_0002\.jpg has no annotation; wanted .*shapes_0002\.png"),
        ("sizes differ", r"shapes_0002\.png is 64 x 20; wanted the size of its image, 64 x 64"),
        ("RGB labels", r"shapes_0002\.png is RGB; wanted one channel"),
        ("value over", r"shapes_0002\.png has the value 20\d; wanted 0 to 6"),
        ("broken annotation", r"Annotation .*shapes_0002\.png cannot be read"),
        ("broken image", r"Image .*shapes_0002\.jpg cannot be read"),
        ("empty set", r"images/validation is empty"),
        ("no folder", r"images/validation is missing"),
    ],
)
def test_bad_annotations_are_named(wrong: str, told: str, tmp_path: Path) -> None:
    root = write_shapes(tmp_path / "shapes", 2, 3)
    names = read_names(root)
    spoil(root, wrong)

    def read_all() -> list:
        folder = SegmentationFolder(root, False, names)
        return [folder[index] for index in range(len(folder))]

    with pytest.raises(UsageError, match=told) as caught:
        read_all()
    assert re.search(r"[^.]\.$", str(caught.value))


@pytest.mark.parametrize(("content", "told"), [(b"\xff\tx", "cannot be read"), (b"Idx\tName\n1\tall\n", "1 classes")])
def test_names_that_are_none(content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / NAMES_FILE).write_bytes(content)
    with pytest.raises(UsageError, match=rf"{NAMES_FILE}.*{told}"):
        read_names(tmp_path)


def test_shapes_leave_nothing_behind_that_is_half_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(folder: Path) -> None:
        (folder / "images").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes_module, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        find_shapes(str(tmp_path / "shapes"))
    assert not list(tmp_path.iterdir())


def test_shapes_do_not_bury_other_files(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match="something else than SHAPES"):
        find_shapes(str(tmp_path))


# --- pictures ---


def test_colours_and_predictions(tmp_path: Path) -> None:
    assert palette(150).shape == (150, 3)
    assert tuple(palette(150)[2]) == ADE20K_COLOURS[2] == (6, 230, 230)
    assert len({tuple(colour) for colour in palette(6).tolist()}) == 6
    prediction = np.array([[0, 149], [2, 2]], np.uint8)
    save_prediction(prediction, tmp_path / "one.png", 150)
    image = Image.open(tmp_path / "one.png")
    assert np.array_equal(np.asarray(image), prediction + 1)
    assert np.array_equal(np.asarray(image.convert("RGB")), colour_map(prediction, 150))
    assert (colour_map(np.array([[255]]), 150) == 0).all()


def test_a_picture_has_the_image_both_maps_and_a_legend(read_axes: Callable[..., list]) -> None:
    image = np.full((8, 8, 3), 0.5)
    truth = np.zeros((8, 8), np.uint8)
    truth[0] = 255
    truth[4:] = 2
    axes, legend = read_axes(draw_segmentation(image, truth, np.ones((8, 8), np.uint8), ["one", "two", "three"]))
    assert [axis.get_title() for axis in axes] == ["image", "truth", "prediction"]
    assert legend == ["one", "two", "three"]
    shown = axes[1].get_images()[0].get_array()
    factor = len(shown) // 8
    assert not shown[:factor].any()
    wanted = 0.4 * 0.5 + 0.6 * palette(3)[2] / 255
    assert np.allclose(shown[-1, -1], wanted)


@pytest.fixture
def read_axes() -> Callable[..., tuple[list, list[str]]]:
    def read(figure: object) -> tuple[list, list[str]]:
        return figure.axes, [text.get_text() for text in figure.legends[0].get_texts()]

    return read
