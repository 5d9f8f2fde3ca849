"""Accuracy of cells: of all, the mean over classes, and of wells by the mean of their cells' answers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from utils import UsageError
from utils.processes import gather_objects


class Targets(NamedTuple):
    """What is right for a batch: labels (B,) and the numbers of the cells' wells (B,), -1 where they are not known."""

    labels: Tensor
    wells: Tensor


class CellsEvaluator:
    """Adds up answers; all figures are exact for any number of processes.

    `loss`, the mean cross-entropy; in percent `acc1`, of all cells, `balanced_acc1`, the mean over the classes that
    come up, and, where wells are known, `well_acc1`, of wells, whose answer is the mean of their cells' probabilities.
    """

    def __init__(self, num_classes: int) -> None:
        self.loss = 0.0
        self.counts, self.hits = (torch.zeros(num_classes, dtype=torch.long) for _ in range(2))
        # by well: its cells' probabilities added up, and its label
        self.wells: dict[int, tuple[Tensor, int]] = {}

    def update(self, output: Tensor, target: Targets) -> None:
        """Take in logits (B, classes)."""
        self.loss += F.cross_entropy(output, target.labels, reduction="sum").item()
        labels, hits = target.labels.cpu(), (output.argmax(1) == target.labels).cpu()
        self.counts += labels.bincount(minlength=len(self.counts))
        self.hits += labels[hits].bincount(minlength=len(self.hits))
        chances = output.softmax(1).double().cpu()
        for well, label, chance in zip(target.wells.tolist(), labels.tolist(), chances):
            if well >= 0:
                before = self.wells.get(well, (0.0, label))
                self.wells[well] = before[0] + chance, label

    def summary(self) -> dict[str, float]:
        """Loss and accuracy of this process so far."""
        count = max(int(self.counts.sum()), 1)
        return {"loss": self.loss / count, "acc1": 100 * int(self.hits.sum()) / count}

    def compute(self, distributed: bool = False) -> dict[str, float]:
        """The figures of all cells."""
        if distributed:
            self._gather()
        count = int(self.counts.sum())
        if not count:
            raise UsageError("The evaluation set holds no image.")
        present = self.counts > 0
        recalls = self.hits[present].double() / self.counts[present]
        stats = self.summary() | {"balanced_acc1": 100 * float(recalls.mean())}
        if self.wells:
            right = sum(int(chances.argmax()) == label for chances, label in self.wells.values())
            stats["well_acc1"] = 100 * right / len(self.wells)
        return stats

    def _gather(self) -> None:
        """Take in what all processes have."""
        parts = gather_objects((self.loss, self.counts, self.hits, self.wells))
        self.loss = sum(part[0] for part in parts)
        self.counts, self.hits = (torch.stack([part[place] for part in parts]).sum(0) for place in (1, 2))
        self.wells = {}
        for _, _, _, wells in parts:
            for well, (chances, label) in wells.items():
                before = self.wells.get(well, (0.0, label))
                self.wells[well] = before[0] + chances, label
