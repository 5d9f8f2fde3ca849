"""What happens to an image and its map of classes together, in training and in test.

The pipeline of the published segmenters, on torchvision's transforms: images are uint8 `tv_tensors.Image`, labels
`tv_tensors.Mask`, so that one call moves both. Sizes are resized bilinearly without antialiasing, as published.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

IGNORED = 255
ASPECT = 4  # the longer side may be as many times the crop: 2048 for 512
TRIES = 10
LARGEST_SHARE = 0.75  # of one class in a crop


def fit_size(height: int, width: int, longer: float, shorter: float) -> tuple[int, int]:
    """The largest size of the same shape whose sides are at most `longer` and `shorter`."""
    scale = min(longer / max(height, width), shorter / min(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


class Fit(v2.Transform):
    """Resize to fit (4 * size * s, size * s), s drawn from `scale_range`."""

    def __init__(self, size: int, scale_range: tuple[float, float] = (1.0, 1.0)) -> None:
        super().__init__()
        self.size, self.scale_range = size, scale_range

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        low, high = self.scale_range
        scale = low + (high - low) * float(torch.rand(())) if high > low else low
        height, width = flat_inputs[0].shape[-2:]
        return dict(size=fit_size(height, width, ASPECT * self.size * scale, self.size * scale))

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        # a mask is resized to the nearest, which its own kernel sees to
        return F.resize(inpt, list(params["size"]), antialias=False)


class VariedCrop(v2.Transform):
    """A random crop of `size`, less where the image is smaller, drawn anew while one class fills more than three
    quarters of what is labelled, ten times at most."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        mask = next(x for x in flat_inputs if isinstance(x, tv_tensors.Mask))
        height, width = mask.shape[-2:]
        for _ in range(TRIES):
            top = int(torch.randint(max(height - self.size, 0) + 1, ()))
            left = int(torch.randint(max(width - self.size, 0) + 1, ()))
            crop = mask[..., top : top + self.size, left : left + self.size]
            counts = torch.bincount(crop[crop != IGNORED].flatten().long())
            if (counts > 0).sum() > 1 and counts.max() < LARGEST_SHARE * counts.sum():
                break
        return dict(top=top, left=left, height=min(self.size, height), width=min(self.size, width))

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.crop(inpt, **params)


class PhotometricDistort(v2.RandomPhotometricDistort):
    """Brightness, contrast, saturation, hue, each with one chance in two; colours keep their channels."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return super().make_params(flat_inputs) | {"channel_permutation": None}


class PadTo(v2.Transform):
    """Pad at the right and bottom to `size`: images with 0, masks with the ignored label."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        height, width = inpt.shape[-2:]
        padding = [0, 0, max(self.size - width, 0), max(self.size - height, 0)]
        return F.pad(inpt, padding, fill=IGNORED if isinstance(inpt, tv_tensors.Mask) else 0)


def normalise() -> nn.Module:
    """uint8 images -> float32 with ImageNet's mean and deviation."""
    return v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]
    )


class TrainTransform:
    """(image uint8 (3, H, W), labels uint8 (H, W)) -> (normalised image (3, size, size), labels (size, size) long)."""

    def __init__(self, size: int, scale_range: tuple[float, float] = (0.5, 2.0)) -> None:
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
    """(image uint8 (3, H, W), labels uint8 (H, W)) -> (normalised image fitted into (4 * size, size), labels (H, W)
    long, at their own size)."""

    __test__ = False

    def __init__(self, size: int) -> None:
        self.steps = v2.Compose([Fit(size), normalise()])

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.steps(tv_tensors.Image(image)).as_subclass(Tensor), labels.long()
