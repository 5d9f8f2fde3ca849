"""Image classification, DeiT's recipe: mixup and cutmix, repeated augmentation, distillation, co-sub-training."""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.task.evaluator import ClassificationEvaluator
from torch import Tensor, nn

import datasets
import fusion
from fusion import Meter
from loading import EvalBatches, TrainBatches
from measure import against
from models_mae import MaskedAutoencoder, linear_probe
from models_mamba import VisionMamba
from tasks import augmentation, backbone
from tasks.classify import losses
from tasks.task import Data, Metric, Task
from utils import UsageError
from utils.flags import add_switch, told_size

_logger = logging.getLogger(__name__)

NUM_PICTURES = 4


class _Evaluator(ClassificationEvaluator):
    """timm's evaluator; its figures bear the names that DeiT logs."""

    def _summary(self, loss_sum: Tensor, counts: Tensor) -> dict[str, float]:
        if not int(counts[0]):
            raise UsageError("The evaluation set holds no image.")
        stats = super()._summary(loss_sum, counts)
        return {"loss": stats["loss"], "acc1": stats["top1"], "acc5": stats["top5"]}


class Classify(Task):
    """Classifies images; `output` are logits (B, classes), or what a method puts in their place in training."""

    name = "classify"
    metric = Metric("acc1", unit="%", label="top-1")
    title = "Accuracy"
    data_sets = datasets.DATA_SETS
    default_data_set = "DIGITS"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the flags of loss, augmentation and image sets."""
        for owner in (losses, augmentation, datasets):
            owner.add_arguments(parser)
        group = parser.add_argument_group("classification")
        add_switch(
            group, ["--repeated-aug"], ["--no-repeated-aug"], default=True, help="repeat each image 3 times in a row"
        )
        group.add_argument(
            "--linear-probe", action="store_true", help="train a new head alone, on --finetune's weights as they are"
        )
        add_switch(
            group, ["--if_nan2num"], ["--no_nan2num"], default=False, help="replace non-finite outputs by numbers"
        )
        add_switch(
            group,
            ["--if_random_cls_token_position"],
            ["--no_random_cls_token_position"],
            default=False,
            help="put the class token anywhere in training",
        )
        add_switch(
            group,
            ["--if_random_token_rank"],
            ["--no_random_token_rank"],
            default=False,
            help="shuffle the tokens in training",
        )

    @classmethod
    def check(cls, args: argparse.Namespace, typed: set[str]) -> None:
        for owner in (losses, augmentation, datasets):
            owner.check(args)
        if args.linear_probe:
            for flag, wrong in (
                ("--distillation-type", args.distillation_type != "none"),
                ("--cosub", args.cosub),
                ("--attn-only", args.attn_only),
                ("--layer-decay", args.layer_decay is not None),
                ("--fsdp", args.fsdp),
            ):
                if wrong:
                    raise UsageError(
                        f"{flag} contradicts --linear-probe, which trains one new layer by the labels alone."
                    )
            if not (args.finetune or args.resume):
                raise UsageError("--linear-probe wants the weights that it probes: --finetune FILE.")
        if not args.train_mode and (args.if_random_cls_token_position or args.if_random_token_rank):
            raise UsageError("--no-train-mode contradicts random token positions, which belong to training.")

    @classmethod
    def build_data(cls, args: argparse.Namespace, train: bool) -> Data:
        flip = args.data_set != "DIGITS"  # a mirrored digit is none
        test, classes = datasets.build_dataset(False, args, augmentation.build_transform(False, args))
        train_set = None
        if train:
            transform = augmentation.build_transform(True, args, flip=flip)
            train_set, classes = datasets.build_dataset(True, args, transform)
        return Data(train_set, test, classes)

    @classmethod
    def build_model(cls, args: argparse.Namespace, data: Data | None, **overrides: Any) -> nn.Module:
        model = backbone.build_backbone(args, 1 if data is None else data.num_classes, **overrides)
        if args.linear_probe:
            try:
                linear_probe(model)
            except ValueError as error:
                raise UsageError(f"--linear-probe: --model {args.model}: {error}") from error
        return model

    @classmethod
    def check_model(cls, model: nn.Module, args: argparse.Namespace) -> None:
        if isinstance(model, MaskedAutoencoder):
            raise UsageError(f"--model {args.model} has no head to classify with; wanted --task pretrain.")
        if args.fsdp and not isinstance(model, VisionMamba):
            raise UsageError(f"--model {args.model} contradicts --fsdp, which trains Vision Mambas without pruning.")
        if isinstance(model, VisionMamba):
            return
        try:
            model.eval()(torch.empty(2, 3, *to_2tuple(args.input_size)))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise UsageError(f"--input-size {told_size(args.input_size)} does not fit {args.model}: {error}") from error
        for name in ("if_random_cls_token_position", "if_random_token_rank", "visualize"):
            if getattr(args, name):
                raise UsageError(f"--{name} wants a Vision Mamba; {args.model} does not know it.")

    @classmethod
    def varies(cls, model: nn.Module, args: argparse.Namespace, training: bool) -> str:
        if training and (args.if_random_cls_token_position or args.if_random_token_rank):
            return "the host draws where tokens stand"
        return super().varies(model, args, training)

    @classmethod
    def train_batches(cls, data: Data, args: argparse.Namespace) -> TrainBatches:
        return augmentation.train_batches(data.train, args)

    def set_up(self) -> None:
        self.criterion: nn.Module | None = None
        self.mixup = augmentation.build_mixup(self.args, self.data.num_classes)
        names = ("if_random_cls_token_position", "if_random_token_rank")
        self.options = {name: True for name in names if getattr(self.args, name)}

    def begin_training(self) -> None:
        criterion = losses.build_criterion(self.args, self.data.num_classes)
        losses.check_size(criterion, self.args.input_size)
        self.criterion = self.with_methods(criterion).to(self.device)

    def prepare(self, batch: Any, training: bool) -> tuple[Tensor, Tensor, int]:
        images, targets = batch[0], batch[1]
        datasets.check_labels(targets, self.data.num_classes, "training" if training else "evaluation")
        count = len(images)
        images, targets = (part.to(self.device, non_blocking=True) for part in (images, targets))
        if training and self.mixup is not None:
            images, targets = self.mixup(images, targets)
        if training and self.args.cosub:
            images = torch.cat([images, images])
        return images, targets, count

    def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Any]:
        """inputs (B, C, H, W); targets (B,) or, mixed, (B, classes)."""
        output = self.trainable_module(inputs, **self.options)
        if self.args.if_nan2num:
            output = _nan_to_num(output)
        loss = self.criterion(inputs, output, targets)
        return {"loss": loss, "output": output} | getattr(self.criterion, "parts", {})

    def predict(self, inputs: Tensor) -> Tensor:
        """Logits (B, classes), float32."""
        output = self.model(inputs)
        return (output if isinstance(output, Tensor) else output[0]).float()

    def tell(self, stats: dict[str, float]) -> str:
        return f"top-1 {stats['acc1']:.2f} %, top-5 {stats['acc5']:.2f} %, loss {stats['loss']:.4f}"

    def filler(self) -> Tensor:
        return torch.zeros(1, self.data.in_chans, *self.model.patch_embed.img_size, device=self.device)

    def create_evaluator(self) -> ClassificationEvaluator:
        return _Evaluator(self.device)

    def draw(self, test_set: Iterable[Any], directory: Path, meters: Sequence[Meter] = ()) -> None:
        images = [item[0] for item in itertools.islice(iter(test_set), NUM_PICTURES)]
        fusion.draw(self.model, torch.stack(images).to(self.device), directory, meters)

    def report(self, batches: EvalBatches, meters: Sequence[Meter], autocast: Any) -> list[str]:
        if not meters:
            return []
        # speed and size do not depend on the weights
        plain = self.teacher if self.teacher is not None else self.plain_model(self.args, self.model, self.data)
        images = next(iter(batches))[0].to(self.device)
        ran = next((meter.directions for meter in meters if getattr(meter, "directions", None) is not None), None)
        lines = super().report(batches, meters, autocast)
        return lines + against.report(self.model, plain.to(self.device), images, autocast, ran=ran)


def _nan_to_num(outputs: Any) -> Any:
    if isinstance(outputs, Tensor):
        return torch.nan_to_num(outputs)
    if hasattr(outputs, "_replace"):  # a named tuple of a method's: the logits are what the loss sees
        return outputs._replace(logits=torch.nan_to_num(outputs.logits))
    return tuple(torch.nan_to_num(output) for output in outputs)
