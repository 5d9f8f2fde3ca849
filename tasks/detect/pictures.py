"""Pictures of what a detector finds: boxes, masks and scores beside the truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from tasks.dense.pictures import palette

SHOWN = 320  # least height of a picture, in pixels
_OPACITY = 0.5


def draw_detections(
    image: Tensor, target: dict[str, Any], found: dict[str, Tensor], classes: Sequence[str], least_score: float = 0.3
) -> Figure:
    """One row: the image uint8 (3, H, W), the true objects, and those found with at least `least_score`, each with its
    class's colour, its mask and, if found, its score."""
    shown = image.cpu().permute(1, 2, 0).numpy() / 255
    keep = found["scores"] >= least_score
    found = {name: values[keep].cpu() for name, values in found.items()}
    height, width = shown.shape[:2]
    figure = Figure(figsize=(3 * 3.2 * width / height, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    factor = max(1, -(-SHOWN // height))
    pictures = (
        ("image", None),
        (f"truth: {len(target['labels'])}", target),
        (f"found: {len(found['labels'])}, score from {least_score:g}", found | {"masks": found["masks"].flatten(1, 2)}),
    )
    for axis, (title, objects) in zip(axes, pictures):
        picture = shown if objects is None else _painted(shown, objects, len(classes))
        axis.imshow(picture.repeat(factor, 0).repeat(factor, 1), extent=(0, width, height, 0))
        if objects is not None:
            _frame(axis, objects, classes)
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    return figure


def _painted(image: np.ndarray, objects: dict[str, Any], num_classes: int) -> np.ndarray:
    colours = palette(num_classes) / 255
    painted = image.copy()
    # the surest comes last, on top
    for mask, label in reversed(list(zip(objects["masks"].numpy().astype(bool), objects["labels"].tolist()))):
        painted[mask] = (1 - _OPACITY) * image[mask] + _OPACITY * colours[label - 1]
    return painted


def _frame(axis: Axes, objects: dict[str, Any], classes: Sequence[str]) -> None:
    colours = palette(len(classes)) / 255
    scores = objects["scores"].tolist() if "scores" in objects else [None] * len(objects["labels"])
    for (x0, y0, x1, y1), label, score in zip(objects["boxes"].tolist(), objects["labels"].tolist(), scores):
        colour = colours[label - 1]
        axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color=colour, linewidth=1.5))
        text = classes[label - 1] if score is None else f"{classes[label - 1]} {score:.2f}"
        style = dict(facecolor=colour, edgecolor="none", pad=1)
        axis.text(x0, y0, text, fontsize=6, va="bottom", bbox=style, clip_on=True)
