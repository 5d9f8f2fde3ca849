"""COCO's files, jitter and average precision."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from tasks.detect import evaluation
from tasks.detect.coco import CocoFile, _run_lengths
from tasks.detect.data import CocoDetection, LargeScaleJitter
from tasks.detect.evaluation import CocoEvaluator
from tests import detection_data
from utils import UsageError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return detection_data.write(tmp_path_factory.mktemp("coco"))


def test_items(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = CocoDetection(root, "val2017")
    assert data.file.without_area == 1
    assert "boxes without area, skipped: 1." in caplog.text
    assert data.classes == ["thing 3", "thing 7"]
    image, target = data[0]
    assert image.dtype == torch.uint8
    assert image.shape == (3, 40, 48)
    assert target["boxes"].tolist() == [[4, 6, 24, 18], [26, 20, 36, 35]]
    assert target["labels"].tolist() == [1, 2]
    for mask, (x0, y0, x1, y1) in zip(target["masks"], target["boxes"].int().tolist()):
        wanted = torch.zeros_like(mask)
        wanted[y0:y1, x0:x1] = 1
        assert torch.equal(mask, wanted)
    # nothing, and a crowd alone
    for index in (1, 2):
        _, target = data[index]
        assert target["boxes"].shape == (0, 4)
        assert target["masks"].shape == (0, *detection_data.SIDES[index + 1])
    assert int(data[3][1]["masks"].sum()) == 22 * 20


def test_jitter_takes_boxes_from_masks(root: Path) -> None:
    data = CocoDetection(root, "train2017", LargeScaleJitter(32, (0.1, 2.0)))
    kept = 0
    for seed in range(30):
        torch.manual_seed(seed)
        image, target = data[0]
        assert max(image.shape[1:]) <= 32
        assert target["masks"].shape[1:] == image.shape[1:]
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
        for mask, (x0, y0, x1, y1) in zip(target["masks"], target["boxes"].int().tolist()):
            rows, cols = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
            assert [x0, y0, x1, y1] == [int(cols[0]), int(rows[0]), int(cols[-1]) + 1, int(rows[-1]) + 1]
            kept += 1
        torch.manual_seed(seed)
        assert torch.equal(data[0][0], image)
    assert 10 < kept < 60  # crops lose some


def test_run_lengths_are_pycocotools_own() -> None:
    rng = np.random.default_rng(0)
    for share in (0.02, 0.5, 1.0):
        mask = np.asfortranarray(rng.random((40, 70)) < share).astype(np.uint8)
        counts = _run_lengths(rle.encode(mask)["counts"])
        borders = np.flatnonzero(np.diff(mask.T.ravel())) + 1
        runs = np.diff([0, *borders, mask.size]).tolist()
        assert counts == ([0, *runs] if mask[0, 0] else runs)


def edit(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


POLYGON = ("annotations", 0, "segmentation")
RUNS = ("annotations", 1, "segmentation")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (edit("annotations", 0, "category_id", value=5), "annotation 1 has the unknown category 5"),
        (edit("annotations", 0, "image_id", value=9), "annotation 1 is of image 9"),
        (edit("annotations", 0, "bbox", value=[1, 2, 3]), "annotation 1 has the box [1, 2, 3]"),
        (edit("annotations", 0, "bbox", value=[1, 2, float("nan"), 3]), "annotation 1 has the box"),
        (edit("annotations", 1, "id", value=1), "1 as the id of several annotations"),
        (edit(*POLYGON, value=[]), "annotation 1 has no polygon"),
        (edit(*POLYGON, value=None), "annotation 1 has no segmentation"),
        (edit(*POLYGON, value=[[1, 2, 3, 4]]), "annotation 1 has a broken polygon"),
        (edit(*POLYGON, value=[[1, 2, 3, 4, 5, 6, 7]]), "annotation 1 has a broken polygon"),
        (edit(*POLYGON, value=[[1, 2, 3, 4, 5, float("nan")]]), "annotation 1 has a broken polygon"),
        (edit(*POLYGON, value=[[1, 2, 3, 4, 5, "6"]]), "annotation 1 has a broken polygon"),
        (edit(*POLYGON, value=[[1, 2, 3, 4, 5, 1e9]]), "annotation 1 has a polygon far outside"),
        (edit(*RUNS, "size", value=[3, 4]), "annotation 2 has run lengths of size [3, 4]"),
        (edit(*RUNS, "counts", value="hello"), "annotation 2 has broken run lengths"),
        (edit(*RUNS, "counts", value="\x01"), "annotation 2 has broken run lengths"),
        (edit(*RUNS, "counts", value=[40 * 48 + 1]), "annotation 2 has broken run lengths"),
        (edit(*RUNS, "counts", value=[10, -10, 40 * 48]), "annotation 2 has broken run lengths"),
        (edit(*RUNS, "counts", value=5), "annotation 2 has broken run lengths"),
        (edit("images", value=[]), "has no images"),
        (edit("categories", value=[]), "has no categories"),
        (edit("annotations", value=None), "has no list 'annotations'"),
        (edit("annotations", 0, value={"id": 1}), "entry 1 of 'annotations' has no 'image_id'"),
        (edit("annotations", 1, "category_id", value=[7]), "entry 2 of 'annotations' has category_id [7]"),
        (edit("annotations", 0, "area", value="big"), "annotation 1 has area 'big'; wanted a number"),
        (edit("annotations", 0, "area", value=10**400), "annotation 1 has area 1000"),
        (edit("annotations", 0, "bbox", value=[1, 2, 10**400, 3]), "annotation 1 has the box"),
        (edit("annotations", 1, "id", value=2**63), "has id 9223372036854775808; wanted a whole number"),
        (edit("images", 0, "height", value=0), "entry 1 of 'images' has height 0"),
        (lambda data: data.update(annotations=[]) or data["images"][0].update(width=47), "is 40 x 48 pixels"),
        (edit("images", 0, "file_name", value="none.png"), "none.png does not exist"),
    ],
)
def test_bad_files_are_told(tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str) -> None:
    data = detection_data.annotations()
    del data["annotations"][2:]  # what the polygons and boxes of others would hide
    change(data)
    root = detection_data.write(tmp_path, data)
    with pytest.raises(UsageError) as caught:
        CocoDetection(root, "val2017")[0]
    assert words in str(caught.value)
    assert "instances_val2017.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    with pytest.raises(UsageError, match=r"instances.json does not exist"):
        CocoFile(path)
    for text in ('{"images": [', "[" * 100_000):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UsageError, match=r"instances.json cannot be read"):
            CocoFile(path)


# --- average precision ---


def detections(data: CocoDetection, shift: float = 0.0) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
    """The truth as if it was found, boxes and masks moved to the right by `shift` pixels."""
    pairs = []
    for index in range(len(data)):
        _, target = data[index]
        boxes = target["boxes"] + torch.tensor([shift, 0, shift, 0])
        masks = target["masks"].bool().roll(int(shift), 2)
        scores = torch.linspace(0.9, 0.5, len(boxes))
        found = {"boxes": boxes, "labels": target["labels"], "scores": scores, "masks": masks[:, None]}
        pairs.append((found, target))
    return pairs


def without_flaws(data: CocoDetection) -> CocoDetection:
    """The same without the box that has no area, which nothing can find."""
    data.file._all = [entry for entry in data.file._all if entry["bbox"][2] > 0]
    return data


def test_perfect_predictions_have_ap_100(root: Path) -> None:
    data = without_flaws(CocoDetection(root, "val2017"))
    evaluator = CocoEvaluator(data.file)
    for found, target in detections(data):
        evaluator.update([found], [target])
    stats = evaluator.compute()
    assert {name: round(value, 9) for name, value in stats.items()} == {
        f"{kind}_{name}": 100.0 for kind in ("box", "mask") for name in ("ap", "ap50", "ap75", "ap_small")
    }


def test_shifted_predictions_have_what_pycocotools_gives(root: Path, tmp_path: Path) -> None:
    data = without_flaws(CocoDetection(root, "val2017"))
    evaluator = CocoEvaluator(data.file, tmp_path / "out" / "predictions.json")
    for found, target in detections(data, 2.0):
        evaluator.update([found], [target])
    stats = evaluator.compute()
    # by hand: boxes as x, y, width, height, and category ids
    by_hand = [
        {"image_id": 1, "category_id": 3, "bbox": [6, 6, 20, 12], "score": 0.9},
        {"image_id": 1, "category_id": 7, "bbox": [28, 20, 10, 15], "score": 0.5},
        {"image_id": 4, "category_id": 3, "bbox": [4, 2, 30, 20], "score": 0.9},
    ]
    (tmp_path / "by_hand.json").write_text(json.dumps(by_hand), encoding="utf-8")
    (tmp_path / "truth.json").write_text(
        json.dumps(detection_data.annotations() | {"annotations": data.file._all}), encoding="utf-8"
    )
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(tmp_path / "truth.json"))
        wanted = COCOeval(truth, truth.loadRes(str(tmp_path / "by_hand.json")), "bbox")
        wanted.evaluate()
        wanted.accumulate()
        wanted.summarize()
    assert stats["box_ap"] == pytest.approx(100 * wanted.stats[0])
    assert stats["box_ap50"] == pytest.approx(100 * wanted.stats[1])
    assert stats["box_ap75"] == pytest.approx(100 * wanted.stats[2])
    assert 0 < stats["box_ap"] < 100
    assert 0 < stats["mask_ap"] < 100
    # the file that is written is in the same format
    written = json.loads((tmp_path / "out" / "predictions.json").read_text(encoding="utf-8"))
    assert [{key: entry[key] for key in ("image_id", "category_id", "bbox")} for entry in written] == [
        {key: entry[key] for key in ("image_id", "category_id", "bbox")} for entry in by_hand
    ]


def test_nothing_found(root: Path) -> None:
    data = CocoDetection(root, "val2017")
    evaluator = CocoEvaluator(data.file)
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)}
    for index in range(len(data)):
        _, target = data[index]
        evaluator.update([none | {"masks": torch.zeros(0, 1, 8, 8, dtype=torch.bool)}], [target])
    stats = evaluator.compute()
    assert stats["box_ap"] == stats["mask_ap"] == 0


def test_shares_of_two_processes_are_one(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = CocoDetection(root, "val2017")
    pairs = detections(data, 1.0)
    whole = CocoEvaluator(data.file)
    shares = [CocoEvaluator(data.file), CocoEvaluator(data.file)]
    for number, (found, target) in enumerate(pairs):
        whole.update([copy.deepcopy(found)], [target])
        shares[number % 2].update([found], [target])
    shares[1].update([pairs[0][0]], [pairs[0][1]])  # an image that both saw
    monkeypatch.setattr(evaluation, "gather_objects", lambda _: [each.results for each in shares])
    monkeypatch.setattr(evaluation.dist, "broadcast_object_list", lambda _: None)
    assert shares[0].compute(distributed=True) == whole.compute()
