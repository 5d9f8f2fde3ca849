"""What is minimised: classification losses, co-sub-training, and distillation from a timm teacher.

Every criterion is called as `criterion(samples, outputs, targets)` and returns a scalar; `parts`, where it has one,
names what the scalar is made of.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import timm
import torch
from timm.layers import to_2tuple
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

import checkpoints
from utils import UsageError, first_line, nearest
from utils.files import is_url
from utils.flags import number, told_size

_logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of loss and distillation."""
    group = parser.add_argument_group("loss and distillation")
    group.add_argument("--bce-loss", action="store_true", help="binary cross-entropy on every class that is present")
    group.add_argument(
        "--smoothing", type=number(float, 0, 1, below=True), default=0.1, help="label smoothing (default: 0.1)"
    )
    group.add_argument(
        "--cosub", action="store_true", help="co-sub-training: two drop-path subnetworks teach each other"
    )
    group.add_argument(
        "--teacher-model", default="regnety_160", metavar="NAME", help="timm model (default: %(default)s)"
    )
    group.add_argument(
        "--teacher-path", default="", metavar="FILE", help="the teacher's weights: a file or an https URL"
    )
    group.add_argument("--distillation-type", default="none", choices=("none", "soft", "hard"))
    group.add_argument("--distillation-alpha", type=number(float, 0, 1), default=0.5, help="weight of the teacher")
    group.add_argument(
        "--distillation-tau", type=number(float, 0, above=True), default=1.0, help="temperature of 'soft'"
    )


def check(args: argparse.Namespace) -> None:
    """Refuse loss flags that contradict each other or name no teacher."""
    if args.bce_loss and args.smoothing > 0:
        _logger.warning(
            "--smoothing %g changes nothing: --bce-loss only asks which classes are present.", args.smoothing
        )
    if args.distillation_type == "none":
        return
    if args.cosub:
        raise UsageError("--cosub and --distillation-type both replace the targets; wanted one of the two.")
    if not timm.is_model(args.teacher_model):
        close = nearest(args.teacher_model, timm.list_models())
        raise UsageError(f"--teacher-model {args.teacher_model!r} is no timm model{close}.")
    if not args.eval:
        if not args.teacher_path:
            raise UsageError(
                f"--distillation-type {args.distillation_type} wants the teacher's weights in --teacher-path."
            )
        if not is_url(args.teacher_path) and not Path(args.teacher_path).is_file():
            raise UsageError(f"--teacher-path {args.teacher_path} is no file.")


class Classification(nn.Module):
    """Cross-entropy in the form that the targets have: soft (B, classes) or class numbers (B,); `bce` is DeiT III's.

    A model that returns several heads in training (DeiT's distilled ones) is trained on its first.
    """

    def __init__(self, smoothing: float = 0.0, *, bce: bool = False) -> None:
        super().__init__()
        self.smoothing, self.bce = smoothing, bce
        self._soft = SoftTargetCrossEntropy()
        self._hard = LabelSmoothingCrossEntropy(smoothing) if smoothing > 0 else nn.CrossEntropyLoss()

    def forward(self, samples: Tensor, outputs: Tensor | tuple[Tensor, ...], targets: Tensor) -> Tensor:
        outputs = outputs if isinstance(outputs, Tensor) else outputs[0]
        if self.bce:
            return F.binary_cross_entropy_with_logits(outputs, self.present(outputs, targets))
        return self._soft(outputs, targets) if targets.ndim == 2 else self._hard(outputs, targets)

    def present(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """1 for every class that has a share in an image and 0 for the others, as (B, classes)."""
        if targets.ndim == 1:
            return F.one_hot(targets, outputs.shape[1]).to(outputs.dtype)
        # mixup smooths before it mixes, so a class that is absent still holds smoothing / classes
        return (targets > 1.001 * self.smoothing / outputs.shape[1]).to(outputs.dtype)


class Cosub(nn.Module):
    """Co-sub-training (Touvron et al., 2022, "Co-training 2^L Submodels"): both halves of the batch hold the same
    images, and each half, under its own drop-path, learns from the targets and from the other half's prediction."""

    def __init__(self, base: Classification) -> None:
        super().__init__()
        self.base = base

    def forward(self, samples: Tensor, outputs: Tensor | tuple[Tensor, ...], targets: Tensor) -> Tensor:
        outputs = outputs if isinstance(outputs, Tensor) else outputs[0]
        first, second = outputs.chunk(2)
        if targets.ndim == 1:
            targets = F.one_hot(targets, outputs.shape[1]).to(outputs.dtype)
        if self.base.bce:
            targets = self.base.present(first, targets)
        pairs = (
            (first, targets),
            (second, targets),
            (first, second.detach().sigmoid()),
            (second, first.detach().sigmoid()),
        )
        return sum(F.binary_cross_entropy_with_logits(logits, wanted) for logits, wanted in pairs) / 4


class Distillation(nn.Module):
    """DeiT's distillation (Touvron et al., 2021): `(1 - alpha) * base + alpha * teacher's part`.

    `soft`: KL divergence to the teacher at temperature tau, times tau^2; `hard`: cross-entropy to its decision. Of two
    heads the second learns from the teacher; a single head learns from both.
    """

    def __init__(self, base: nn.Module, teacher: nn.Module, kind: str, alpha: float, tau: float) -> None:
        super().__init__()
        self.base, self.teacher, self.kind, self.alpha, self.tau = base, teacher, kind, alpha, tau
        self.parts: dict[str, Tensor] = {}

    def forward(self, samples: Tensor, outputs: Tensor | tuple[Tensor, ...], targets: Tensor) -> Tensor:
        student = outputs if isinstance(outputs, Tensor) else outputs[1]
        base = self.base(samples, outputs, targets)
        with torch.no_grad():
            teacher = self.teacher(samples)
        if self.kind == "soft":
            wanted, own = F.log_softmax(teacher / self.tau, dim=1), F.log_softmax(student / self.tau, dim=1)
            # the mean over all logits, as DeiT takes it, not over images alone
            part = F.kl_div(own, wanted, reduction="sum", log_target=True) * self.tau**2 / student.numel()
        else:
            part = F.cross_entropy(student, teacher.argmax(dim=1))
        self.parts = {"base": base.detach(), "teacher": part.detach()}
        return (1 - self.alpha) * base + self.alpha * part


def build_criterion(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """The criterion that the flags ask for, its teacher loaded and frozen."""
    base = Classification(args.smoothing, bce=args.bce_loss)
    if args.cosub:
        return Cosub(base)
    if args.distillation_type == "none":
        return base
    teacher = timm.create_model(args.teacher_model, num_classes=num_classes)
    weights, _ = checkpoints.find_weights(checkpoints.read(args.teacher_path), args.teacher_path)
    checkpoints.load_strictly(teacher, weights, args.teacher_path, args.teacher_model)
    teacher = teacher.eval().requires_grad_(False)
    return Distillation(base, teacher, args.distillation_type, args.distillation_alpha, args.distillation_tau)


def check_size(criterion: nn.Module, size: int | tuple[int, int]) -> None:
    """Refuse images of `size`, a side or (height, width), that the teacher of `criterion` does not take."""
    if not isinstance(criterion, Distillation):
        return
    try:
        with torch.no_grad():
            criterion.teacher(torch.zeros(1, 3, *to_2tuple(size)))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"--input-size {told_size(size)} does not fit --teacher-model: {first_line(error)}."
        ) from error
