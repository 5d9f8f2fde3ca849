"""What a pruned model returns in training, and what its fine-tuning minimises.

Wu et al. 2025, "Dynamic Vision Mamba" (DyVM, arXiv:2504.04787).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion.pruning_settings import PruningSettings


class PruningOutput(NamedTuple):
    """What a pruned model computed and decided, for B images of M patches.

    `logits` (B, classes); `tokens` (B, M, D): the final patch tokens, kept ones first (inference: only those);
    `token_policy` (B, M, 1): 1 where a token is still kept; `decisions`: a stage's keep decision (B, M) each, in
    training in the order the stage found the tokens in, in inference in raster order; `positions` (B, M): raster index
    of every token, None where merging has mixed them; `block_policy` (depth, B, 1, directions), None without block
    pruning.
    """

    logits: Tensor
    tokens: Tensor
    token_policy: Tensor
    decisions: list[Tensor]
    positions: Tensor | None
    block_policy: Tensor | None


def ratio_terms(
    decisions: Sequence[Tensor],
    block_policy: Tensor | None,
    settings: PruningSettings,
    token_weight: float,
    block_weight: float,
) -> dict[str, Tensor]:
    """The two keep targets, weighted: `token_ratio`, the mean over stages and images of (kept share - target)^2, from
    `decisions`, (B, M) a stage; `block_ratio`, (mean gate - target)^2. What is not pruned has no term."""
    terms = {}
    if decisions:
        missed = torch.stack([decision.mean(1) - ratio for decision, ratio in zip(decisions, settings.token_ratio)])
        terms["token_ratio"] = token_weight * missed.square().mean()
    if block_policy is not None:
        terms["block_ratio"] = block_weight * (block_policy.mean() - settings.block_keep_ratio).square()
    return terms


class PruningLoss(nn.Module):
    """Classification, the two keep targets, and the frozen teacher's logits and tokens.

    `base(samples, logits, targets)` + token_weight * mean over stages and images of (kept share - target)^2
    + block_weight * (mean(block policy) - target)^2 + distill_weight * (KL + MSE). `teacher` is the model that
    fine-tuning started from, without pruning. Without `compare_tokens` there is no MSE, as in the release where scan
    directions alone are pruned. `parts` holds the terms of the last call, weighted.
    """

    def __init__(
        self,
        base: nn.Module,
        teacher: nn.Module,
        settings: PruningSettings,
        token_weight: float = 10.0,
        block_weight: float = 10.0,
        distill_weight: float = 0.5,
        compare_tokens: bool = True,
    ) -> None:
        super().__init__()
        self.base, self.teacher, self.settings = base, teacher.eval().requires_grad_(False), settings
        self.token_weight, self.block_weight, self.distill_weight = token_weight, block_weight, distill_weight
        self.compare_tokens = compare_tokens
        self.parts: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> PruningLoss:
        """Switch the rest; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, samples: Tensor, outputs: PruningOutput, targets: Tensor) -> Tensor:
        """The scalar loss of one batch: samples (B, C, H, W), what the student made of them, the base's targets."""
        with torch.no_grad():
            teacher_tokens = self.teacher.forward_features(samples)
            teacher_logits = self.teacher.forward_head(teacher_tokens)
        parts = self.terms(outputs, teacher_logits, teacher_tokens[:, self.teacher.num_prefix_tokens :])
        parts = {"classification": self.base(samples, outputs.logits, targets)} | parts
        self.parts = {name: part.detach() for name, part in parts.items()}
        return sum(parts.values())

    def terms(self, outputs: PruningOutput, teacher_logits: Tensor, teacher_tokens: Tensor) -> dict[str, Tensor]:
        """The weighted terms beside classification; teacher_tokens (B, M, D) in raster order."""
        terms = ratio_terms(
            outputs.decisions, outputs.block_policy, self.settings, self.token_weight, self.block_weight
        )
        student, teacher = (logits.float().log_softmax(-1) for logits in (outputs.logits, teacher_logits))
        terms["logit_kl"] = self.distill_weight * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        # merged tokens are no one patch's, and have no counterpart
        if self.compare_tokens and outputs.positions is not None:
            index = outputs.positions.unsqueeze(-1).expand(-1, -1, teacher_tokens.shape[-1])
            distance = (outputs.tokens.float() - teacher_tokens.float().gather(1, index)).square().mean(-1)
            kept = (outputs.token_policy.squeeze(-1) > 0.5).to(distance.dtype)
            terms["token_mse"] = self.distill_weight * (distance * kept).sum() / kept.sum().clamp(min=1)
        return terms
