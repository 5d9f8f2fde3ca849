"""Masked pre-training (MAE): rebuild the hidden patches of images, without labels.

He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners" (arXiv:2111.06377), with the encoders of Vim and
FastVim (`models_mae`).
"""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import datasets
from fusion import Meter
from loading import TrainBatches
from models_mae import DEFAULT_RATIO, masked_name, visible_count
from tasks import augmentation, backbone
from tasks.pretrain.data import SeededImages, noise_from
from tasks.pretrain.pictures import draw_grid
from tasks.task import Data, Metric, Task
from utils import UsageError
from utils.flags import add_switch, number
from utils.processes import sum_over_processes

_logger = logging.getLogger(__name__)

NUM_PICTURES = 8


class _Evaluator:
    """The mean over images of their loss, and of that of a prediction that knows each patch's mean alone."""

    def __init__(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64)

    def update(self, output: Tensor, target: Any) -> None:
        """Take in losses (B, 2)."""
        self.sums = self.sums.to(output.device)
        self.sums[:2] += output.double().sum(0)
        self.sums[2] += len(output)

    def _means(self, sums: list[float]) -> dict[str, float]:
        if not sums[2]:
            raise UsageError("The evaluation set holds no image.")
        return {"loss": sums[0] / sums[2], "loss_of_means": sums[1] / sums[2]}

    def summary(self) -> dict[str, float]:
        """The means so far."""
        return self._means(self.sums.tolist())

    def compute(self, distributed: bool = False) -> dict[str, float]:
        """The means of all."""
        sums = self.sums.tolist()
        return self._means(sum_over_processes(sums) if distributed else sums)


class Pretrain(Task):
    """Rebuilds hidden patches; `output` is pred (B, L, patch * patch * C), inputs are images and the masks' noise."""

    name = "pretrain"
    metric = Metric("loss", higher_is_better=False)
    title = "Loss"
    data_sets = datasets.DATA_SETS
    default_data_set = "DIGITS"
    # what the published recipe has instead of the classifier's defaults
    defaults: ClassVar[dict[str, Any]] = dict(
        opt_betas=[0.9, 0.95],
        scale=[0.2, 1.0],
        drop_path=0.0,
        model_ema=False,
        mixup=0.0,
        cutmix=0.0,
        reprob=0.0,
        color_jitter=0.0,
        aa="none",
        repeated_aug=False,
    )

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the flags of masks, augmentation and image sets."""
        group = parser.add_argument_group("masked pre-training")
        group.add_argument("--pretrain", default="mae", choices=("mae",), help="--task pretrain (default: mae)")
        group.add_argument(
            "--mask-ratio",
            type=number(float, 0, 1, above=True, below=True),
            default=DEFAULT_RATIO,
            metavar="RATIO",
            help=f"share of the patches that are hidden (default: {DEFAULT_RATIO})",
        )
        add_switch(
            group,
            ["--norm-pix-loss"],
            ["--no-norm-pix-loss"],
            default=True,
            help="rebuild each patch less its mean and over its deviation",
        )
        group.add_argument(
            "--published-rows",
            action="store_true",
            help="pool as FastVim's release does, which mixes the rows of the backward direction, to go on from it",
        )
        for owner in (augmentation, datasets):
            owner.add_arguments(parser)
        add_switch(
            group, ["--repeated-aug"], ["--no-repeated-aug"], default=False, help="repeat each image 3 times in a row"
        )

    @classmethod
    def set_defaults(cls, args: argparse.Namespace, typed: set[str]) -> None:
        for name, value in cls.defaults.items():
            if name not in typed:
                setattr(args, name, value)
        name = masked_name(args.model)
        if name is None:
            raise UsageError(
                f"--model {args.model} has no masked autoencoder; wanted a Vim, a FastVim or a mae_* name."
            )
        args.model = name

    @classmethod
    def check(cls, args: argparse.Namespace, typed: set[str]) -> None:
        for owner in (augmentation, datasets):
            owner.check(args)
        for flag, wrong in (
            ("--attn-only", args.attn_only),
            ("--label-share", args.label_share < 1),
            ("--model-path", args.model_path),
        ):
            if wrong:
                raise UsageError(
                    f"{flag} contradicts masked pre-training, which trains all of the model on all images."
                )

    @classmethod
    def build_data(cls, args: argparse.Namespace, train: bool) -> Data:
        def build(is_train: bool) -> SeededImages:
            transform = augmentation.build_transform(is_train, args, flip=args.data_set != "DIGITS")
            return SeededImages(datasets.build_dataset(is_train, args, transform)[0], is_train)

        return Data(build(True) if train else None, build(False))

    @classmethod
    def build_model(cls, args: argparse.Namespace, data: Data | None, **overrides: Any) -> nn.Module:
        keywords = {"norm_pix_loss": args.norm_pix_loss, "published_rows": args.published_rows}
        return backbone.build_backbone(args, 0, **(keywords | overrides))

    @classmethod
    def check_model(cls, model: nn.Module, args: argparse.Namespace) -> None:
        super().check_model(model, args)
        try:
            visible_count(model.patch_embed.num_patches, args.mask_ratio)
        except ValueError as error:
            raise UsageError(f"--mask-ratio: {error}") from error

    @classmethod
    def train_batches(cls, data: Data, args: argparse.Namespace) -> TrainBatches:
        return augmentation.train_batches(data.train, args)

    def set_up(self) -> None:
        self.mixup = augmentation.build_mixup(argparse.Namespace(**vars(self.args), smoothing=0.0), 1)

    def prepare(self, batch: Any, training: bool) -> tuple[tuple[Tensor, Tensor], None, int]:
        images, seeds = batch
        noise = noise_from(seeds, self.model.patch_embed.num_patches)
        images, noise = images.to(self.device, non_blocking=True), noise.to(self.device, non_blocking=True)
        if training and self.mixup is not None:
            images, _ = self.mixup(images, torch.zeros(len(images), dtype=torch.long, device=self.device))
        return (images, noise), None, len(images)

    def forward(self, inputs: tuple[Tensor, Tensor], targets: None) -> dict[str, Any]:
        """inputs: images (B, C, H, W) and noise (B, L)."""
        images, noise = inputs
        loss, pred, _ = self.trainable_module(images, self.args.mask_ratio, noise)
        return {"loss": loss, "output": pred}

    def predict(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        """Each image's loss, and that of its patches' means: (B, 2), float32."""
        images, noise = inputs
        _, pred, mask = self.model(images, self.args.mask_ratio, noise)
        losses = [self.model.patch_losses(images, each) for each in (pred, self.model.mean_prediction(images))]
        return torch.stack([(loss * mask).sum(1) / mask.sum(1) for loss in losses], 1)

    def create_evaluator(self) -> _Evaluator:
        return _Evaluator()

    def tell(self, stats: dict[str, float]) -> str:
        return f"loss {stats['loss']:.4f}, that of predicting each patch's mean {stats['loss_of_means']:.4f}"

    def draw(self, test_set: Iterable[Any], directory: Path, meters: Sequence[Meter] = ()) -> None:
        items = list(itertools.islice(iter(test_set), NUM_PICTURES))
        (images, noise), _, _ = self.prepare(torch.utils.data.default_collate(items), training=False)
        file = directory / "rebuilt.png"
        draw_grid(self.model, images, noise, self.args.mask_ratio, file)
        _logger.info("Image, what was visible of it, and what was rebuilt: %s.", file)
