"""What happens to an image and its map of classes together, in training and in test.

The pipeline of the published segmenters, on torchvision's transforms: images are uint8 `tv_tensors.Image`, labels
`tv_tensors.Mask`, so that one call moves both. Sizes are resized bilinearly without antialiasing, as published.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

IGNORED = 255
ASPECT = 4  # the longer side may be as many times the crop's: 2048 for 512
TRIES = 10
LARGEST_SHARE = 0.75  # of one class in a crop


def fit_size(height: int, width: int, longer: float, least: Sequence[float]) -> tuple[int, int]:
    """The smallest size of the same shape that covers `least`, (height, width), but with no side above `longer`."""
    scale = min(longer / max(height, width), max(side / own for side, own in zip(least, (height, width))))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


class Fit(v2.Transform):
    """Resize to cover `size` * s, a side or (height, width), but with no side above 4 times its longer one; s is drawn
    from `scale_range`."""

    def __init__(self, size: int | tuple[int, int], scale_range: tuple[float, float] = (1.0, 1.0)) -> None:
        super().__init__()
        self.size, self.scale_range = to_2tuple(size), scale_range

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        low, high = self.scale_range
        scale = low + (high - low) * float(torch.rand(())) if high > low else low
        height, width = flat_inputs[0].shape[-2:]
        least = [side * scale for side in self.size]
        return dict(size=fit_size(height, width, ASPECT * max(self.size) * scale, least))

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        # a mask is resized to the nearest, which its own kernel sees to
        return F.resize(inpt, list(params["size"]), antialias=False)


class VariedCrop(v2.Transform):
    """A random crop of `size`, less where the image is smaller, drawn anew while one class fills more than three
    quarters of what is labelled, ten times at most."""

    def __init__(self, size: int | tuple[int, int]) -> None:
        super().__init__()
        self.size = to_2tuple(size)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        mask = next(x for x in flat_inputs if isinstance(x, tv_tensors.Mask))
        height, width = mask.shape[-2:]
        for _ in range(TRIES):
            top, left = (
                int(torch.randint(max(own - side, 0) + 1, ())) for own, side in zip((height, width), self.size)
            )
            crop = mask[..., top : top + self.size[0], left : left + self.size[1]]
            counts = torch.bincount(crop[crop != IGNORED].flatten().long())
            if (counts > 0).sum() > 1 and counts.max() < LARGEST_SHARE * counts.sum():
                break
        return dict(top=top, left=left, height=min(self.size[0], height), width=min(self.size[1], width))

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.crop(inpt, **params)


class PhotometricDistort(v2.RandomPhotometricDistort):
    """Brightness, contrast, saturation, hue, each with one chance in two; colours keep their channels."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return super().make_params(flat_inputs) | {"channel_permutation": None}


class PadTo(v2.Transform):
    """Pad at the right and bottom to `size`: images with 0, masks with the ignored label."""

    def __init__(self, size: int | tuple[int, int]) -> None:
        super().__init__()
        self.size = to_2tuple(size)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        height, width = inpt.shape[-2:]
        padding = [0, 0, max(self.size[1] - width, 0), max(self.size[0] - height, 0)]
        return F.pad(inpt, padding, fill=IGNORED if isinstance(inpt, tv_tensors.Mask) else 0)


def normalise() -> nn.Module:
    """uint8 images -> float32 with ImageNet's mean and deviation."""
    return v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]
    )


class TrainTransform:
    """(image uint8 (3, H, W), labels uint8 (H, W)) -> (normalised image (3, size, size), labels (size, size) long), or
    of the height and width that `size` is."""

    def __init__(self, size: int | tuple[int, int], scale_range: tuple[float, float] = (0.5, 2.0)) -> None:
        self.steps = v2.Compose(
            [
                Fit(size, scale_range),
                VariedCrop(size),
                v2.RandomHorizontalFlip(),
                PhotometricDistort(hue=(-0.1, 0.1)),
                normalise(),
                PadTo(size),
            ]
        )

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        image, labels = self.steps(tv_tensors.Image(image), tv_tensors.Mask(labels))
        return image.as_subclass(Tensor), labels.as_subclass(Tensor).long()


class TestTransform:
    """(image uint8 (3, H, W), labels uint8 (H, W)) -> (normalised image that covers `size`, as `Fit` has it, labels
    (H, W) long, at their own size)."""

    __test__ = False

    def __init__(self, size: int | tuple[int, int]) -> None:
        self.steps = v2.Compose([Fit(size), normalise()])

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.steps(tv_tensors.Image(image)).as_subclass(Tensor), labels.long()
