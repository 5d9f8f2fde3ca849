"""Colours of classes, and pictures of what a segmenter makes of an image."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from fusion.dynamic_pruning import DynamicPruning
from fusion.visualize import patch_cells
from fusion.visualize_pruning import draw_kept
from tasks.dense.backbone import DenseBackbone
from utils.files import write_if_possible

IGNORED = 255
SHOWN = 320  # least height of a picture, in pixels

# The colours of ADE20K's 150 classes, as published with the data set.
_ADE20K = """
    787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d 787846 08ff33 ff0652
    8fff8c ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0 0907e6 dcdcdc ff095c 7009ff 08ffd6 07ffe0
    ffb806 0aff47 ff290a 07ffff e0ff08 6608ff ff3d06 ffc207 ff7a08 00ff14 ff0829 ff0599 0633ff eb0cff a09614 00a3ff
    8c8c8c fa0a0f 14ff00 1fff00 ff1f00 ffe000 99ff00 0000ff ff4700 00ebff 00adff 1f00ff 0bc8c8 ff5200 00fff5 003dff
    00ff70 00ff85 ff0000 ffa300 ff6600 c2ff00 008fff 33ff00 0052ff 00ff29 00ffad 0a00ff adff00 00ff99 ff5c00 ff00ff
    ff00f5 ff0066 ffad00 ff0014 ffb8b8 001fff 00ff3d 0047ff ff00cc 00ffc2 00ff52 000aff 0070ff 3300ff 00c2ff 007aff
    00ffa3 ff9900 00ff0a ff7000 8fff00 5200ff a3ff00 ffeb00 08b8aa 8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070
    5cff00 00e0ff 70e0ff 46b8a0 a300ff 9900ff 47ff00 ff00a3 ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff ff007a fff500
    0abed4 d6ff00 00ccff 1400ff ffff00 0099ff 0029ff 00ffcc 2900ff 29ff00 ad00ff 00f5ff 4700ff 7a00ff 00ffb8 005cff
    b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff
"""
ADE20K_COLOURS = tuple(tuple(bytes.fromhex(colour)) for colour in _ADE20K.split())
_UNLABELLED = (0, 0, 0)


def palette(num_classes: int) -> np.ndarray:
    """A colour for each class, uint8 (num_classes, 3): ADE20K's for 150 classes, else evenly spaced hues."""
    if num_classes == len(ADE20K_COLOURS):
        return np.array(ADE20K_COLOURS, np.uint8)
    hues = [colorsys.hsv_to_rgb(number / num_classes, 0.85, 0.95) for number in range(num_classes)]
    return np.round(255 * np.array(hues)).astype(np.uint8)


def save_prediction(prediction: np.ndarray, path: Path, num_classes: int) -> bool:
    """Write a map of classes (H, W) as an annotation: a PNG with class k as value k + 1, in its colour. False, with a
    warning, if that fails."""
    image = Image.fromarray((prediction + 1).astype(np.uint8))
    image.putpalette([*_UNLABELLED, *palette(num_classes).ravel().tolist()])
    return write_if_possible(path, lambda file: image.save(file, "PNG"))


def colour_map(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Labels (H, W), 255 for unlabelled -> uint8 (H, W, 3)."""
    colours = np.zeros((256, 3), np.uint8)
    colours[:num_classes] = palette(num_classes)
    return colours[labels.astype(np.uint8)]


def denormalise(image: Tensor) -> np.ndarray:
    """An image as models see it (3, H, W) -> float (H, W, 3) in 0..1."""
    pixels = image.float().cpu().permute(1, 2, 0).numpy()
    return (pixels * np.array(IMAGENET_DEFAULT_STD) + np.array(IMAGENET_DEFAULT_MEAN)).clip(0, 1)


@torch.no_grad()
def draw_kept_patches(backbone: DenseBackbone, image: Tensor) -> Figure | None:
    """An image (1, 3, H, W), as models see it, and beside it what each stage of token pruning keeps of it; None for a
    backbone that prunes no tokens."""
    if backbone.pruning is None or not backbone.pruning.tokens:
        return None
    _, state = backbone.forward_with_state(image)
    decisions = state.entry(DynamicPruning.name).decisions
    rows, cols = patch_cells(backbone.body, image.shape[-2:])
    kept = torch.cat(decisions).bool().cpu().unflatten(1, state.grid).numpy()
    return draw_kept(denormalise(image[0]), kept[:, rows[:, None], cols[None]], backbone.pruning.pruning_loc)


def draw_segmentation(
    image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, classes: Sequence[str], opacity: float = 0.6
) -> Figure:
    """One row: the image (H, W, 3) in 0..1, and over it the true and the predicted classes (H, W), with a legend of the
    classes that are there. Unlabelled pixels are black."""
    factor = max(1, -(-SHOWN // len(image)))
    figure = Figure(figsize=(3 * 3.2 * image.shape[1] / image.shape[0] + 1.8, 3.5), layout="constrained")
    axes = figure.subplots(1, 3)
    pictures = [("image", image)]
    for title, labels in (("truth", truth), ("prediction", prediction)):
        colours = colour_map(labels, len(classes)) / 255
        mixed = (1 - opacity) * image + opacity * colours
        pictures.append((title, np.where((labels == IGNORED)[..., None], 0.0, mixed)))
    for axis, (title, picture) in zip(axes, pictures):
        axis.imshow(picture.repeat(factor, 0).repeat(factor, 1))
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    present = np.union1d(truth[truth != IGNORED], prediction)
    colours = palette(len(classes)) / 255
    handles = [Patch(color=colours[number], label=classes[number]) for number in present.tolist()]
    figure.legend(handles=handles, loc="outside right center", fontsize=8)
    return figure
