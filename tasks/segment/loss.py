"""What a segmenter is trained with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion.pruning_loss import ratio_terms
from fusion.pruning_settings import PruningSettings
from tasks.dense.necks import resize
from tasks.segment.models import SegmenterOutput


class SegmentationLoss(nn.Module):
    """Cross-entropy of both heads at the labels' size and, for a pruned model, DyVM's two keep targets; no teacher.

    The cross-entropy is summed and divided by the number of *all* pixels, those of `ignore_index` included, as
    published. `parts` holds the terms of the last call, weighted: decode, aux, token_ratio, block_ratio.
    """

    def __init__(
        self,
        pruning: PruningSettings | None = None,
        aux_weight: float = 0.4,
        ignore_index: int = 255,
        token_weight: float = 20,
        block_weight: float = 20,
    ) -> None:
        super().__init__()
        self.pruning, self.aux_weight, self.ignore_index = pruning, aux_weight, ignore_index
        self.token_weight, self.block_weight = token_weight, block_weight
        self.parts: dict[str, Tensor] = {}

    def forward(self, output: SegmenterOutput, labels: Tensor) -> Tensor:
        """The scalar loss of a batch: what the segmenter made of it, labels (B, H, W) long."""
        parts = {"decode": self._cross_entropy(output.logits, labels)}
        if output.aux is not None:
            parts["aux"] = self.aux_weight * self._cross_entropy(output.aux, labels)
        if self.pruning is not None:
            parts |= ratio_terms(
                output.decisions, output.block_policy, self.pruning, self.token_weight, self.block_weight
            )
        self.parts = {name: part.detach() for name, part in parts.items()}
        return torch.stack(list(parts.values())).sum()

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits = resize(logits.float(), labels.shape[-2:])
        return F.cross_entropy(logits, labels, ignore_index=self.ignore_index, reduction="sum") / labels.numel()
