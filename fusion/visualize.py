"""Pictures of what happens between the sites: hidden states, their similarities, and which patches became one token."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imsave
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from fusion.token_state import TokenState

_logger = logging.getLogger(__name__)

NUM_IMAGES = 4
DROPPED = -1
SIDE = 256  # least height of a picture, in pixels


def visualize_merging(
    model: nn.Module,
    images: Tensor,
    directory: str | Path,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> None:
    """Write what every site of `model` (a `VisionMamba`) makes of `images` (N, 3, H, W), normalised by `mean` and
    `std`.

    Image n gets the folder `directory`/image_n with `hidden_states.npz`: float32 (L_i, D) under `layer_{i}` for site i;
    `groups.npz`: the patch token that each patch now lives in (`DROPPED` if it was pruned), int (rows, cols) under
    `layer_{i}`, and under `class_tokens_{i}` the patch that each class token or register stands behind (`class_marks`);
    `similarity_{i}.png`: the cosine similarity between all tokens in sequence order; `groups_{i}.png`: the image with
    each token's patches in their mean colour and one border, and a white square for each class token; and
    `overview.png`: all of it on one sheet. The model is run in eval mode without gradients and left in the mode it was
    in.
    """
    states = trace(model, images)
    rows, cols = patch_cells(model, images.shape[-2:])
    shown = images.float().cpu() * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    for number, image in enumerate(shown.clamp(0, 1).permute(0, 2, 3, 1).numpy()):
        folder = Path(directory, f"image_{number}")
        folder.mkdir(parents=True, exist_ok=True)
        hidden = [state.hidden[number].float().cpu() for state in states]
        groups = [patch_groups(state)[number].cpu().view(int(rows.max()) + 1, -1).numpy() for state in states]
        similarity = [cosine_similarity(tokens).numpy() for tokens in hidden]
        marks = [class_marks(state, number) for state in states]
        overlays = [draw_groups(image, group, rows, cols, at) for group, at in zip(groups, marks)]
        np.savez_compressed(folder / "hidden_states.npz", **{f"layer_{i}": x.numpy() for i, x in enumerate(hidden)})
        places = {f"class_tokens_{i}": np.array(at, dtype=int) for i, at in enumerate(marks)}
        np.savez_compressed(folder / "groups.npz", **{f"layer_{i}": x for i, x in enumerate(groups)}, **places)
        for index, (overlay, heat) in enumerate(zip(overlays, similarity)):
            imsave(folder / f"groups_{index}.png", overlay)
            imsave(folder / f"similarity_{index}.png", _enlarge(heat), cmap="viridis", vmin=-1, vmax=1)
        _overview(image, overlays, similarity, [len(tokens) for tokens in hidden]).savefig(folder / "overview.png")
    _logger.info("Pictures of %d sites for %d images are in %s.", len(states), len(images), directory)


@torch.no_grad()
def trace(model: nn.Module, images: Tensor) -> list[TokenState]:
    """The token sequences after every site, with `groups` kept: images (N, 3, H, W) -> one state a site."""
    states: list[TokenState] = []
    training = model.training
    model.eval()
    try:
        state = model.embed(images)
        groups = torch.arange(state.num_patches, device=images.device).expand(len(images), -1)
        model.encode(state.replace(groups=groups), lambda index, state: states.append(state))
    finally:
        model.train(training)
    return states


def patch_groups(state: TokenState) -> Tensor:
    """The patch token that each original patch lives in, `DROPPED` if it was pruned: (B, M0) long."""
    if state.positions is None:
        return state.groups
    # pruning writes down which patches are left
    left = torch.arange(state.positions.shape[1], device=state.positions.device).expand_as(state.positions)
    return torch.full_like(state.groups, DROPPED).scatter(1, state.positions, left)


def class_marks(state: TokenState, image: int) -> list[int]:
    """The raster index of the patch that each class token of one image stands behind: the last one that lives in the
    patch token before it; -1 for one in front of all."""
    index = state.cls.index
    index = index[image].tolist() if isinstance(index, Tensor) else index
    groups = patch_groups(state)[image]
    tokens = [at - number - 1 for number, at in enumerate(index)]
    return [-1 if token < 0 else int((groups == token).nonzero().max()) for token in tokens]


def cosine_similarity(tokens: Tensor) -> Tensor:
    """Tokens (L, D) -> (L, L), -1 to 1."""
    tokens = F.normalize(tokens.float(), dim=-1)
    return tokens @ tokens.T


def draw_groups(
    image: np.ndarray, groups: np.ndarray, rows: np.ndarray, cols: np.ndarray, marks: Sequence[int] = ()
) -> np.ndarray:
    """Paint the patches of each token in their mean colour, with a border around them.

    image (H, W, 3) in 0..1; groups (R, C) int, the token of each patch; rows (H,) and cols (W,) say which patch a pixel
    belongs to. Returns the picture, enlarged by a whole factor to at least `SIDE` pixels of height. Tokens of several
    patches have borders in a colour of their own, so that patches far from each other are seen to belong together; the
    others have grey ones. Patches labelled `DROPPED` are white. Behind each patch of `marks`, a raster index or -1 for
    in front of all, is a small white square.
    """
    parts = groups - groups.min()
    several = np.bincount(parts.ravel()) > 1
    if groups.min() == DROPPED:
        several[0] = False
    labels, parts = groups[rows[:, None], cols[None]], parts[rows[:, None], cols[None]]
    sums = [np.bincount(parts.ravel(), image[..., channel].ravel(), len(several)) for channel in range(3)]
    colour = np.stack(sums, -1) / np.maximum(np.bincount(parts.ravel(), minlength=len(several)), 1)[:, None]
    painted = np.where(labels[..., None] == DROPPED, 1.0, colour[parts])
    factor = _factor(painted)
    painted, labels, parts = (_enlarge(array) for array in (painted, labels, parts))

    # a pixel is on a border if one within the border's width, up, down, left or right, is of another group
    border = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        there, marked = np.moveaxis(labels, axis, 0), np.moveaxis(border, axis, 0)
        for step in range(1, max(1, len(labels) // SIDE) + 1):
            differs = there[step:] != there[:-step]
            marked[step:] |= differs
            marked[:-step] |= differs
    # hues that follow one another by the golden ratio are far apart
    hues = np.arange(len(several)) * 0.618034 % 1
    bright = hsv_to_rgb(np.stack([hues, np.full_like(hues, 0.9), np.ones_like(hues)], -1))
    edges = np.where(several[:, None], bright, 0.35)
    picture = np.where(border[..., None], edges[parts], painted)
    for mark in marks:
        row, col = divmod(max(mark, 0), groups.shape[1])
        (top, bottom), (left, right) = (_span(cells, at, factor) for cells, at in ((rows, row), (cols, col)))
        side = max(2, (bottom - top) // 8)
        middle, edge = (top + bottom) // 2, right if mark >= 0 else left
        for half, shade in ((side, 0.0), (side - 1, 1.0)):
            picture[max(middle - half, 0) : middle + half, max(edge - half, 0) : edge + half] = shade
    return picture


def _span(cells: np.ndarray, at: int, factor: int) -> tuple[int, int]:
    """The first pixel of cell `at`, and the one behind its last, in a picture enlarged by `factor`."""
    pixels = np.flatnonzero(cells == at)
    return int(pixels[0]) * factor, (int(pixels[-1]) + 1) * factor


def _factor(array: np.ndarray) -> int:
    return -(-SIDE // len(array))


def _enlarge(array: np.ndarray) -> np.ndarray:
    factor = _factor(array)
    return array.repeat(factor, 0).repeat(factor, 1)


def patch_cells(model: nn.Module, size: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Which row of the token grid each row of pixels belongs to, and which column each column.

    Where patches overlap, a pixel belongs to the patch whose middle is nearest.
    """
    embed = model.patch_embed
    cells = []
    for pixels, count, patch, stride in zip(size, embed.grid_of(*size), embed.patch_size, embed.stride):
        nearest = (np.arange(pixels) - (patch - stride) / 2) // stride
        cells.append(nearest.clip(0, count - 1).astype(int))
    return cells[0], cells[1]


def _overview(
    image: np.ndarray, overlays: list[np.ndarray], similarity: list[np.ndarray], lengths: list[int]
) -> Figure:
    """One sheet: the image, then for every site its groups and below them its similarities."""
    blocks = -(-(len(overlays) + 1) // 9)
    columns = -(-(len(overlays) + 1) // blocks)
    figure = Figure(figsize=(1.6 * columns, 3.6 * blocks), layout="constrained")
    axes = figure.subplots(2 * blocks, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    axes[0, 0].imshow(image)
    axes[0, 0].set_title("image", fontsize=8)
    shades = colormaps["viridis"]
    for index, (overlay, heat, length) in enumerate(zip(overlays, similarity, lengths)):
        block, column = divmod(index + 1, columns)
        axes[2 * block, column].imshow(overlay)
        axes[2 * block, column].set_title(f"site {index}: {length} tokens", fontsize=8)
        drawn = axes[2 * block + 1, column].imshow(heat, cmap=shades, vmin=-1, vmax=1)
    figure.colorbar(drawn, ax=axes[1, 0], location="left", label="cosine similarity", fraction=0.8)
    return figure
