"""Transforms of all channels of an image at once: (channels, rows, cols) of stored values, float32, random numbers from
torch's CPU generator.

What has a size in pixels has it at 224; at another side it is scaled with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

_SIDE, _PADDED, _HOLE, _HOLES, _RADII = 224, 256, 10, 10, (1.0, 3.0)
_ANGLES = 90.0, 180.0, 270.0

Transform = Callable[[Tensor], Tensor]


class TrainTransform:
    """Zero-padding at a random place and a random crop; one of two flips and three rotations, a blur, and holes, each
    with probability 1/2.

    `upright` leaves out flips and rotations, for images that have a side.
    """

    def __init__(self, size: int, upright: bool = False) -> None:
        self.size, self.scale = size, size / _SIDE
        self.turns: tuple[Transform, ...] = ()
        if not upright:
            self.turns = (partial(torch.flip, dims=(2,)), partial(torch.flip, dims=(1,)), *map(_Rotation, _ANGLES))

    def __call__(self, image: Tensor) -> Tensor:
        """(C, H, W) -> (C, size, size)."""
        image = random_crop(fit(image, self.size), self.size, round(_PADDED * self.scale))
        if self.turns and _chance():
            image = self.turns[int(torch.randint(len(self.turns), ()))](image)
        if _chance():
            low, high = _RADII
            image = blur(image, (low + (high - low) * float(torch.rand(()))) * self.scale)
        if _chance():
            image = punch(image, _HOLES, max(1, round(_HOLE * self.scale)))
        return image


class EvalTransform:
    """The shorter side resized to `size` where it is another, and the middle cut out: nothing, at the right size."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Tensor) -> Tensor:
        """(C, H, W) -> (C, size, size)."""
        image = fit(image, self.size)
        top, left = ((side - self.size) // 2 for side in image.shape[1:])
        return image[:, top : top + self.size, left : left + self.size]


class _Rotation:
    """By an angle drawn uniformly from -`limit` to `limit` degrees."""

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def __call__(self, image: Tensor) -> Tensor:
        return rotate(image, self.limit * (2 * float(torch.rand(())) - 1))


def _chance() -> bool:
    return float(torch.rand(())) < 0.5


def fit(image: Tensor, size: int) -> Tensor:
    """(C, H, W) resized bilinearly, smoothed where it shrinks, so that its shorter side is `size`."""
    shorter = min(image.shape[1:])
    if shorter == size:
        return image
    sides = [max(size, round(side * size / shorter)) for side in image.shape[1:]]
    return F.interpolate(image[None], size=sides, mode="bilinear", antialias=True, align_corners=False)[0]


def random_crop(image: Tensor, size: int, padded: int) -> Tensor:
    """Zero-pad (C, H, W) to at least `padded` a side with the image at a random place, and cut out a random square."""
    pads: list[int] = []
    for side in reversed(image.shape[1:]):
        missing = max(0, padded - side)
        before = int(torch.randint(missing + 1, ()))
        pads += [before, missing - before]
    image = F.pad(image, pads)
    top, left = (int(torch.randint(side - size + 1, ())) for side in image.shape[1:])
    return image[:, top : top + size, left : left + size]


def rotate(image: Tensor, degrees: float) -> Tensor:
    """(C, H, W) turned counter-clockwise about its middle, bilinearly, what lies outside reflected at the border."""
    height, width = image.shape[1:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    y = torch.arange(height, dtype=torch.float32).view(-1, 1) - (height - 1) / 2
    x = torch.arange(width, dtype=torch.float32) - (width - 1) / 2
    # where each pixel comes from, in grid_sample's coordinates: -1 to 1 from the first pixel's middle to the last's
    source = torch.stack([(cos * x - sin * y) / max(width - 1, 1), (sin * x + cos * y) / max(height - 1, 1)], -1) * 2
    return F.grid_sample(image[None], source[None], "bilinear", "reflection", align_corners=True)[0]


def blur(image: Tensor, radius: float) -> Tensor:
    """The mean over a disc about every pixel of (C, H, W), `radius` in pixels, reflected at the border."""
    reach = min(math.floor(radius), *(side - 1 for side in image.shape[1:]))
    if reach < 1:
        return image
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32)
    disc = (offsets.view(-1, 1).square() + offsets.square() <= radius**2).to(image.dtype)
    padded = F.pad(image[:, None], [reach] * 4, mode="reflect")
    return F.conv2d(padded, (disc / disc.sum())[None, None])[:, 0]


def punch(image: Tensor, holes: int, side: int) -> Tensor:
    """A copy of (C, H, W) with `holes` squares of `side` pixels, or what of them lies inside, set to 0."""
    image = image.clone()
    for _ in range(holes):
        top, left = (int(torch.randint(max(1, length - side + 1), ())) for length in image.shape[1:])
        image[:, top : top + side, left : left + side] = 0
    return image


def normalize(
    images: Tensor,
    how: str,
    channels: Sequence[int],
    mean: Tensor | None = None,
    std: Tensor | None = None,
    span: float = 1.0,
) -> Tensor:
    """Stored values (B, n, H, W) of `channels`, as `--channel-norm` says: "dataset" by `mean` and `std`, one for each
    channel that the data know, "self" by each image's own, "none" by `span` alone, the highest value of integers."""
    if how == "none":
        return images / span
    if how == "self":
        mean, std = images.mean((2, 3), keepdim=True), images.std((2, 3), keepdim=True, correction=0)
    else:
        index = torch.as_tensor(channels, device=images.device)
        mean, std = (values.to(images)[index].view(-1, 1, 1) for values in (mean, std))
    # a channel without any signal has no spread
    return (images - mean) / torch.where(std > 0, std, torch.ones_like(std))
