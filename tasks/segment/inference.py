"""Logits of images larger than a segmenter's own size."""

from __future__ import annotations

from collections.abc import Callable

from timm.layers import to_2tuple
from torch import Tensor


def slide_inference(
    predict: Callable[[Tensor], Tensor],
    images: Tensor,
    crop: int | tuple[int, int],
    stride: int | tuple[int, int],
) -> Tensor:
    """Mean logits of overlapping windows: images (B, C, H, W) -> (B, classes, H, W).

    Windows of `crop` (height, width) begin at the top left and step by `stride`; the last of a row or column is moved
    inside the image. `predict` gives logits (B, classes, h, w) of a window (B, C, h, w), which is smaller than `crop`
    only where the image is. Raises ValueError for a stride above the crop, which would leave gaps.
    """
    size, crop, stride = images.shape[-2:], to_2tuple(crop), to_2tuple(stride)
    if any(not 0 < step <= side for step, side in zip(stride, crop)):
        raise ValueError(f"stride is {stride}; wanted it from 1 to the crop's {crop}.")
    rows, cols = (_starts(*sides) for sides in zip(size, crop, stride))
    total, count = None, images.new_zeros(size)
    for top in rows:
        for left in cols:
            at = (..., slice(top, top + crop[0]), slice(left, left + crop[1]))
            logits = predict(images[at])
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], *size)
            total[at] += logits
            count[at[1:]] += 1
    return total / count


def _starts(side: int, crop: int, stride: int) -> list[int]:
    """Where the windows over one axis begin."""
    last = max(side - crop, 0)
    return [min(step * stride, last) for step in range(-(-last // stride) + 1)]
