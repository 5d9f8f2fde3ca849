"""How well maps of classes fit the truth."""

from __future__ import annotations

import torch
from torch import Tensor


class SegmentationMeter:
    """Counts, over a whole data set, which class was predicted where which was true.

    `counts` (classes, classes), int64 on the CPU: true class by predicted class; several meters' counts may be added.
    Pixels labelled `ignore_index` count nowhere.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Add predicted and true classes, integers of one shape. Raises ValueError for a class that is none."""
        pred, target = torch.as_tensor(pred), torch.as_tensor(target)
        if pred.shape != target.shape:
            raise ValueError(f"Predictions are {tuple(pred.shape)}; wanted the labels' shape {tuple(target.shape)}.")
        known = target != self.ignore_index
        pred, target = pred[known].long(), target[known].long()
        for what, classes in (("prediction", pred), ("label", target)):
            if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < self.num_classes:
                raise ValueError(f"A {what} is class {int(classes.max())}; wanted 0 to {self.num_classes - 1}.")
        pairs = torch.bincount(target * self.num_classes + pred, minlength=self.num_classes**2)
        self.counts += pairs.view(self.num_classes, self.num_classes).cpu()

    @property
    def iou(self) -> Tensor:
        """Intersection over union of every class in percent, float64; NaN where a class is neither true nor
        predicted."""
        hits = self.counts.diagonal().double()
        return 100 * hits / (self.counts.sum(0) + self.counts.sum(1) - hits)

    @property
    def accuracy(self) -> Tensor:
        """Of every class's true pixels, how many percent were found, float64; NaN where there are none."""
        return 100 * self.counts.diagonal().double() / self.counts.sum(1)

    def stats(self) -> dict[str, float]:
        """mIoU and mAcc, the means over the classes that have a value, and aAcc, over all pixels; in percent."""
        hits, pixels = self.counts.diagonal().sum().double(), self.counts.sum()
        return dict(
            mIoU=float(self.iou.nanmean()), mAcc=float(self.accuracy.nanmean()), aAcc=float(100 * hits / pixels)
        )
