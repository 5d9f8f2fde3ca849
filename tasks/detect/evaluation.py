"""Average precision, by pycocotools itself, over any number of processes."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from pycocotools import mask as rle
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from tasks.detect.coco import CocoFile, index
from utils.files import write_if_possible
from utils.processes import gather_objects, is_main_process

Result = dict[str, Any]
# places of pycocotools' summary
_STATS = {"ap": 0, "ap50": 1, "ap75": 2, "ap_small": 3, "ap_medium": 4, "ap_large": 5}


def to_results(found: dict[str, Tensor], image_id: int, category_ids: list[int]) -> list[Result]:
    """Detections of one image -> entries of COCO's results format: box as x, y, width, height in pixels, mask as
    compressed run lengths. `found` has boxes (N, 4), labels (N,) of 1 to K, scores (N,), masks (N, 1, H, W)."""
    if not len(found["boxes"]):
        return []
    boxes = found["boxes"].double().cpu()
    boxes[:, 2:] -= boxes[:, :2]
    masks = rle.encode(np.asfortranarray(found["masks"][:, 0].permute(1, 2, 0).cpu().numpy().astype(np.uint8)))
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[label - 1],
            "bbox": box,
            "score": score,
            "segmentation": {"size": mask["size"], "counts": mask["counts"].decode("ascii")},
        }
        for label, box, score, mask in zip(
            found["labels"].tolist(), boxes.tolist(), found["scores"].double().tolist(), masks
        )
    ]


def average_precision(truth: CocoFile, results: dict[int, list[Result]]) -> dict[str, float]:
    """AP in percent of `results`, by image id, over those images: `box_ap`, `box_ap50`, `box_ap75`, `box_ap_small`
    (area under 32^2 pixels), `_medium`, `_large` (over 96^2), and the same as `mask_...`.

    A size of which the images have no object is left out; without any object, AP is 0.
    """
    stats: dict[str, float] = {}
    every = [entry for image_id in sorted(results) for entry in results[image_id]]
    for name, kind, left_out in (("box", "bbox", "segmentation"), ("mask", "segm", "bbox")):
        wanted = truth.evaluation_set()
        entries = [{key: value for key, value in entry.items() if key != left_out} for entry in every]
        with contextlib.redirect_stdout(io.StringIO()):
            found = wanted.loadRes(entries) if entries else index(wanted.dataset | {"annotations": []})
            evaluation = COCOeval(wanted, found, kind)
            evaluation.params.imgIds = sorted(results)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        for stat, place in _STATS.items():
            value = float(evaluation.stats[place])
            if value >= 0:
                stats[f"{name}_{stat}"] = 100 * value
        stats.setdefault(f"{name}_ap", 0.0)
    return stats


class CocoEvaluator:
    """Collects detections image by image, and computes AP over those of all processes.

    An image that two processes saw counts once. If `path` is given, `compute` writes all detections there, in COCO's
    results format, boxes and masks in one entry.
    """

    def __init__(self, truth: CocoFile, path: Path | None = None) -> None:
        self.truth, self.path = truth, path
        self.category_ids = [entry["id"] for entry in truth.categories]
        self.results: dict[int, list[Result]] = {}

    def update(self, output: list[dict[str, Tensor]], targets: list[dict[str, Any]]) -> None:
        """Take the detections of a batch; `targets` say whose they are (`image_id`)."""
        for found, target in zip(output, targets):
            image_id = int(target["image_id"])
            self.results[image_id] = to_results(found, image_id, self.category_ids)

    def summary(self) -> dict[str, float]:
        """How many objects an image this process has found so far: AP is known in the end only."""
        return {"found": sum(map(len, self.results.values())) / max(len(self.results), 1)}

    def compute(self, distributed: bool = False) -> dict[str, float]:
        """The figures of `average_precision`, the same in every process; all must call this together if
        `distributed`."""
        shares = gather_objects(self.results) if distributed else [self.results]
        results = {image_id: found for share in shares for image_id, found in share.items()}
        stats = [None]
        if is_main_process() or not distributed:
            stats = [average_precision(self.truth, results)]
        if self.path is not None and is_main_process():
            every = [entry for image_id in sorted(results) for entry in results[image_id]]
            write_if_possible(self.path, lambda file: file.write(json.dumps(every).encode()))
        if distributed:
            dist.broadcast_object_list(stats)
        return stats[0]
