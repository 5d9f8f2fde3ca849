"""Pictures of what happens between the sites: hidden states, their similarities, and which patches became one token.

`python -m fusion.visualize FILE.npz` draws what was saved again: `hidden_states.npz`, `mixer_outputs.npz`, or any file
of token sequences under `layer_{i}`.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
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
from utils import UsageError, first_line
from utils.flags import Parser
from utils.telling import setup_logging

_logger = logging.getLogger(__name__)

DROPPED = -1
SIDE = 256  # least height of a picture, in pixels
HIDDEN_STATES, MIXER_OUTPUTS, GROUPS = "hidden_states.npz", "mixer_outputs.npz", "groups.npz"


def visualize_merging(
    model: nn.Module,
    images: Tensor,
    directory: str | Path,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> None:
    """Write what every site of `model` (a `VisionMamba`) makes of `images` (N, 3, H, W), normalised by `mean` and
    `std`.

    Image n gets the folder `directory`/image_n with what `save` writes there, drawn by `draw_saved`. The model is run
    in eval mode without gradients and left in the mode it was in.
    """
    with mixer_outputs(model) as mixed:
        states = trace(model, images)
    rows, cols = patch_cells(model, images.shape[-2:])
    shown = images.float().cpu() * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    for number, image in enumerate(shown.clamp(0, 1).permute(0, 2, 3, 1).numpy()):
        folder = Path(directory, f"image_{number}")
        save(folder, image, (rows, cols), states, mixed, number)
        draw_saved(folder / HIDDEN_STATES, folder)
    _logger.info("Pictures of %d sites for %d images are in %s.", len(states), len(images), directory)


def save(
    folder: Path,
    image: np.ndarray,
    cells: tuple[np.ndarray, np.ndarray],
    states: Sequence[TokenState],
    mixed: Sequence[Tensor],
    number: int,
) -> None:
    """Write what was seen of image `number` of a batch into `folder`, with `layer_{i}` for site i in every file.

    `hidden_states.npz`: the tokens behind the site, merged where it merges, float32 (L_i, D). `mixer_outputs.npz`: what
    the mixer of the site's first layer gave, before any merging, which is what the release saves, float32 (L, D).
    `groups.npz`: the patch token that each patch now lives in (`DROPPED` if it was pruned), int (rows, cols); under
    `class_tokens_{i}` the patch that each class token or register stands behind (`class_marks`); and the `image`, uint8
    (H, W, 3), with the row of patches of each of its rows of pixels (`rows`), and the column of each column (`cols`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, cols = cells
    hidden = {f"layer_{i}": state.hidden[number].float().cpu().numpy() for i, state in enumerate(states)}
    np.savez_compressed(folder / HIDDEN_STATES, **hidden)
    outputs = {f"layer_{i}": output[number].float().cpu().numpy() for i, output in enumerate(mixed)}
    np.savez_compressed(folder / MIXER_OUTPUTS, **outputs)
    height = int(rows.max()) + 1
    groups = {f"layer_{i}": patch_groups(x)[number].cpu().view(height, -1).numpy() for i, x in enumerate(states)}
    groups |= {f"class_tokens_{i}": np.array(class_marks(x, number), dtype=int) for i, x in enumerate(states)}
    pixels = (image * 255).round().astype(np.uint8)
    np.savez_compressed(folder / GROUPS, **groups, image=pixels, rows=rows, cols=cols)


def draw_saved(file: str | Path, directory: str | Path | None = None) -> Path:
    """Draw what `file`, an npz of token sequences (L_i, D) or (1, L_i, D) under `layer_{i}`, holds; returns the folder.

    `similarity_{i}.png` is the cosine similarity between all tokens of site i in sequence order, `overview.png` has all
    of it on one sheet. With `groups.npz` beside the file, of tokens that it fits, `groups_{i}.png` is the image with
    each token's patches in their mean colour and one border, and a white square for each class token. The pictures go
    to `directory`, or else to a folder beside the file that is named like it. Raises UsageError for a file that is
    none.
    """
    file = Path(file)
    arrays, beside = _layers(_read(file)), file.with_name(GROUPS)
    if not arrays:
        raise UsageError(
            f"{file} holds no token sequence; wanted arrays of (tokens, channels) under layer_0, layer_1, ..."
        )
    folder = file.with_suffix("") if directory is None else Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    similarity = {i: cosine_similarity(torch.from_numpy(tokens)).numpy() for i, tokens in arrays.items()}
    overlays, image = {}, None
    seen = _read(beside) if beside.is_file() else {}
    if "image" in seen and all(_fits(tokens, seen, i) for i, tokens in arrays.items()):
        image = seen["image"] / 255
        for i in arrays:
            marks = seen[f"class_tokens_{i}"].tolist()
            overlays[i] = draw_groups(image, seen[f"layer_{i}"], seen["rows"], seen["cols"], marks)
    for i, heat in similarity.items():
        imsave(folder / f"similarity_{i}.png", _enlarge(heat), cmap="viridis", vmin=-1, vmax=1)
    for i, overlay in overlays.items():
        imsave(folder / f"groups_{i}.png", overlay)
    _overview(image, overlays, similarity).savefig(folder / "overview.png")
    return folder


def _read(file: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz."""
    try:
        with np.load(file) as found:
            return dict(found.items())
    except (OSError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UsageError(f"{file} cannot be read as an npz of arrays: {first_line(error)}.") from error


def _layers(arrays: Mapping[str, np.ndarray]) -> dict[int, np.ndarray]:
    """The token sequences among `arrays`, float32 (L, D), by their site, rising."""
    found = {}
    for name, array in arrays.items():
        site = name.removeprefix("layer_")
        if site.isdecimal() and array.ndim in (2, 3) and array.dtype.kind == "f" and array.size:
            found[int(site)] = (array if array.ndim == 2 else array[0]).astype(np.float32)
    return dict(sorted(found.items()))


def _fits(tokens: np.ndarray, seen: Mapping[str, np.ndarray], site: int) -> bool:
    """Whether `tokens` are those that the groups of `site` make."""
    if f"layer_{site}" not in seen:
        return False
    return len(tokens) == seen[f"layer_{site}"].max() + 1 + len(seen[f"class_tokens_{site}"])


@contextlib.contextmanager
def mixer_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list that is given what the mixer of each site's first layer puts out, (B, L, D), whenever `model` runs."""
    found: list[Tensor] = []
    per_site = model.depth // model.num_sites
    hooks = [
        layer.mixer.register_forward_hook(lambda module, inputs, output: found.append(output.detach()))
        for layer in model.layers[::per_site]
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


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
    image: np.ndarray | None, overlays: Mapping[int, np.ndarray], similarity: Mapping[int, np.ndarray]
) -> Figure:
    """One sheet: the image, then for every site its groups and below them its similarities, or these alone."""
    first = 0 if image is None else 1
    places = len(similarity) + first
    blocks = -(-places // 9)
    columns = -(-places // blocks)
    height = 1 + first
    figure = Figure(figsize=(1.6 * columns, 1.8 * height * blocks), layout="constrained")
    axes = figure.subplots(height * blocks, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    if image is not None:
        axes[0, 0].imshow(image)
        axes[0, 0].set_title("image", fontsize=8)
    for number, (site, heat) in enumerate(similarity.items()):
        block, column = divmod(number + first, columns)
        above = axes[height * block, column]
        if image is not None:
            above.imshow(overlays[site])
        drawn = axes[height * (block + 1) - 1, column].imshow(heat, cmap=colormaps["viridis"], vmin=-1, vmax=1)
        above.set_title(f"site {site}: {len(heat)} tokens", fontsize=8)
    figure.colorbar(drawn, ax=axes[height - 1, 0], location="left", label="cosine similarity", fraction=0.8)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Draw a saved file again."""
    parser = Parser(prog="python -m fusion.visualize", description="Draw a file that --visualize saved.")
    parser.add_argument("file", metavar="FILE.npz", help="hidden_states.npz, mixer_outputs.npz, or another of layers")
    parser.add_argument("--output", metavar="DIR", help="where the pictures go (default: a folder named like the file)")
    args = parser.parse_args(argv)
    try:
        folder = draw_saved(args.file, args.output)
    except OSError as error:
        raise UsageError(f"The pictures cannot be written: {error}.") from error
    _logger.info("Pictures of %s are in %s.", args.file, folder)


if __name__ == "__main__":
    setup_logging()
    try:
        main()
    except UsageError as error:
        _logger.error("python -m fusion.visualize: error: %s", error)
        sys.exit(2)
