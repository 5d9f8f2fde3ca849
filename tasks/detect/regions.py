"""Between images and the boxes in them: pooling maps and masks inside boxes, pasting masks back."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align
from torchvision.ops.boxes import box_area

LEVELS = ("p2", "p3", "p4", "p5")  # the maps that boxes are pooled from; p6 only proposes
MASK_SIZE = 28
_MASKS_AT_ONCE = 16


def box_levels(boxes: Tensor, stride: int = 16) -> Tensor:
    """Boxes (N, 4) in pixels -> the level 2 to 5 that each is pooled from (N,), of a pyramid whose level 4 has
    `stride`.

    Lin et al. 2017 (arXiv:1612.03144), equation 1: floor(4 + log2(side / 224)); a box without area gets 2.
    """
    side = box_area(boxes).sqrt()
    return torch.floor(4 + torch.log2(side / (14 * stride) + 1e-8)).clamp(2, 5).long()


class AlignedPool(nn.Module):
    """RoI align over the levels of a pyramid, aligned: a pixel's value stands at its centre.

    torchvision's MultiScaleRoIAlign cannot be told so, and reads the scales off the first batch that it sees.
    """

    def __init__(self, output_size: int, stride: int = 16) -> None:
        super().__init__()
        self.output_size, self.stride = output_size, stride

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: object = None) -> Tensor:
        """Maps (B, C, rows, cols) by name and the boxes (N, 4) of each image -> (all boxes, C, size, size).

        `image_shapes` is torchvision's third argument, which the strides of a pyramid make needless.
        """
        rows = torch.cat([F.pad(each, (1, 0), value=float(image)) for image, each in enumerate(boxes)])
        levels = box_levels(rows[:, 1:], self.stride)
        size, channels = self.output_size, features[LEVELS[0]].shape[1]
        pooled = features[LEVELS[0]].new_zeros(len(rows), channels, size, size)
        for level, name in enumerate(LEVELS, 2):
            chosen = (levels == level).nonzero().squeeze(1)
            # a level without boxes is pooled too: every process of a run then reaches the same parameters
            values = roi_align(features[name], rows[chosen], size, 16 / self.stride / 2**level, 0, aligned=True)
            pooled = pooled.index_copy(0, chosen, values.to(pooled.dtype))
        return pooled


def pool_masks(masks: Tensor, boxes: Tensor, matched: Tensor) -> Tensor:
    """What a mask head should say: masks (T, H, W), of which `matched` (N,) belong to boxes (N, 4), cut out and
    resampled to (N, 28, 28), 1 where at least half is covered, else 0."""
    targets = boxes.new_zeros(len(boxes), MASK_SIZE, MASK_SIZE)
    # masks as floats are four times as large: a few at a time
    for first in range(0, len(masks), _MASKS_AT_ONCE):
        chosen = ((matched >= first) & (matched < first + _MASKS_AT_ONCE)).nonzero().squeeze(1)
        if len(chosen):
            rows = torch.cat([(matched[chosen] - first).to(boxes)[:, None], boxes[chosen]], 1)
            part = masks[first : first + _MASKS_AT_ONCE, None].to(boxes.dtype)
            targets[chosen] = roi_align(part, rows, MASK_SIZE, 1.0, 0, aligned=True)[:, 0]
    return (targets >= 0.5).to(boxes.dtype)


def paste_masks(masks: Tensor, boxes: Tensor, image_size: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """Probabilities (N, 28, 28) inside boxes (N, 4) -> masks (N, H, W), bool: whether a pixel's centre has at least
    `threshold`, by bilinear interpolation, zero outside the box."""
    height, width = image_size
    pasted = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    for mask, box, out in zip(masks.float(), boxes.float(), pasted):
        x0, y0, x1, y1 = box.tolist()
        if not (x1 > x0 and y1 > y0):
            continue
        # interpolation reaches half a mask's cell over the box's edge
        reach_x, reach_y = (x1 - x0) / mask.shape[1] / 2, (y1 - y0) / mask.shape[0] / 2
        left, right = max(int(x0 - reach_x) - 1, 0), min(int(x1 + reach_x) + 2, width)
        top, bottom = max(int(y0 - reach_y) - 1, 0), min(int(y1 + reach_y) + 2, height)
        if left >= right or top >= bottom:
            continue
        xs = torch.arange(left, right, device=masks.device) + 0.5
        ys = torch.arange(top, bottom, device=masks.device) + 0.5
        xs, ys = (xs - box[0]) / (box[2] - box[0]) * 2 - 1, (ys - box[1]) / (box[3] - box[1]) * 2 - 1
        grid = torch.stack([xs.expand(len(ys), -1), ys[:, None].expand(-1, len(xs))], -1)
        values = F.grid_sample(mask[None, None], grid[None], align_corners=False)
        out[top:bottom, left:right] = values[0, 0] >= threshold
    return pasted
