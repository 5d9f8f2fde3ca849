"""Pictures of what pruning decides: the patches that each stage keeps, and the scan directions that each layer runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from fusion.method import Meter, methods_of
from fusion.token_state import ClassTokens
from fusion.visualize import patch_cells

_logger = logging.getLogger(__name__)


# a colour that photographs and digits alike hardly have
DROPPED = (0.25, 0.45, 0.9)


def visualize_pruning(
    model: nn.Module,
    images: Tensor,
    directory: str | Path,
    meter: Meter | None = None,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> None:
    """Write what a pruned `model` keeps of `images` (N, 3, H, W), normalised by `mean` and `std`.

    Image n gets the folder `directory`/image_n with `kept.png`, the image and beside it, for every stage, what is left
    of it (dropped patches are blue, class tokens and registers white dots behind the patch that they follow), and
    `kept.npz`: `kept` (stages, rows, cols) of bool and `class_tokens` (stages, K), raster indices of those patches, -1
    for one in front of all. `directory`/directions.png
    shows the share of images that each layer ran each scan direction on, over everything that `meter` saw, or over
    `images` without one; directions.npz holds the same as `share` (depth, directions). The model is run in eval mode
    and left in the mode it was in.
    """
    directory, training = Path(directory), model.training
    directory.mkdir(parents=True, exist_ok=True)
    if meter is None:
        meter = next(method for method in methods_of(model) if method.name == "pruning").meter()
    model.eval()
    try:
        with torch.no_grad():
            output = model.forward_with_decisions(images)
            if not meter.sums[0]:
                meter(images)
    finally:
        model.train(training)
    if output.decisions:
        rows, cols = patch_cells(model, images.shape[-2:])
        shown = images.float().cpu() * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
        kept = torch.stack(output.decisions, 1).bool().cpu().numpy()
        kept = kept.reshape(*kept.shape[:2], int(rows.max()) + 1, int(cols.max()) + 1)
        for number, image in enumerate(shown.clamp(0, 1).permute(0, 2, 3, 1).numpy()):
            folder = directory / f"image_{number}"
            folder.mkdir(exist_ok=True)
            marks = [class_marks(stage, model.class_tokens) for stage in kept[number]]
            np.savez_compressed(folder / "kept.npz", kept=kept[number], class_tokens=np.array(marks, dtype=int))
            masks = kept[number][:, rows[:, None], cols[None]]
            dots = [[_behind(mark, rows, cols) for mark in stage] for stage in marks]
            draw_kept(image, masks, model.methods.pruning.pruning_loc, dots).savefig(folder / "kept.png")
    if meter.directions is not None:
        np.savez_compressed(directory / "directions.npz", share=meter.directions.numpy())
        draw_directions(meter.directions.numpy(), int(meter.sums[0])).savefig(directory / "directions.png")
    _logger.info("Pictures of what pruning keeps of %d images are in %s.", len(images), directory)


def class_marks(kept: np.ndarray, class_tokens: ClassTokens) -> list[int]:
    """The raster index of the kept patch that each class token stands behind, -1 in front of all; kept (rows, cols)."""
    patches = np.flatnonzero(kept)
    before = [at - number for number, at in enumerate(class_tokens.places(len(patches)))]
    return [int(patches[count - 1]) if count else -1 for count in before]


def _behind(mark: int, rows: np.ndarray, cols: np.ndarray) -> tuple[float, float]:
    """The point (x, y) between a patch and the next, in pixels; -1 is before the first."""
    row, col = divmod(max(mark, 0), int(cols.max()) + 1)
    across, down = np.flatnonzero(cols == col), np.flatnonzero(rows == row)
    return (across[-1] + 0.5 if mark >= 0 else across[0] - 0.5), down.mean()


def draw_kept(
    image: np.ndarray,
    masks: np.ndarray,
    layers: Sequence[int],
    dots: Sequence[Sequence[tuple[float, float]]] = (),
) -> Figure:
    """One row: the image (H, W, 3) in 0..1, then what each of `masks` (stages, H, W), True for kept, leaves of it, with
    each stage's `dots` (x, y) upon it."""
    figure = Figure(figsize=(2.4 * (len(masks) + 1), 2.7), layout="constrained")
    titles = ["image", *(f"from layer {layer} on: {mask.mean():.0%}" for layer, mask in zip(layers, masks))]
    pictures = [image, *(np.where(mask[..., None], image, DROPPED) for mask in masks)]
    for axis, picture, title, points in zip_longest(
        figure.subplots(1, len(pictures)), pictures, titles, [[], *dots], fillvalue=()
    ):
        axis.imshow(picture)
        if points:
            axis.scatter(*zip(*points), s=9, c="white", edgecolors="black", linewidths=0.5)
        axis.set_title(title, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    return figure


def draw_directions(shares: np.ndarray, images: int) -> Figure:
    """Bars: the share of `images` images on which each layer ran each scan direction, (depth, directions)."""
    depth, directions = shares.shape
    figure = Figure(figsize=(max(4.0, 0.4 * depth), 3.0), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / directions
    for direction, name in zip(range(directions), ("forward", "backward")):
        places = np.arange(depth) - 0.4 + (direction + 0.5) * width
        axis.bar(places, shares[:, direction], width, label=name)
    axis.axhline(shares.mean(), color="0.4", linewidth=1, linestyle="--", label=f"mean {shares.mean():.2f}")
    axis.set_xticks(range(depth))
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("layer")
    axis.set_ylabel("share of images")
    axis.set_title(f"Scan directions that ran, {images} images", fontsize=10)
    figure.legend(ncols=3, fontsize=8, loc="outside lower center")
    return figure
