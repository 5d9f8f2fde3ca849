"""Semantic segmentation as a task of the program: UPerNet, trained by steps and measured by mean IoU."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

import fusion
import models_mamba
from fusion import Meter
from fusion.visualize_pruning import draw_directions
from loading import EvalBatches
from tasks.dense.backbone import FEATURES, layer_scales
from tasks.dense.data import MOST_SCALE
from tasks.dense.measure import SegmentationMeter
from tasks.dense.necks import resize, synchronise_batch_norm
from tasks.dense.pictures import denormalise, draw_kept_patches, draw_segmentation, save_prediction
from tasks.segment import data as sets
from tasks.segment.inference import slide_inference
from tasks.segment.loss import SegmentationLoss
from tasks.segment.models import build_segmenter
from tasks.task import Data, Metric, Task
from utils import UsageError, nearest
from utils.flags import number, told_size
from utils.processes import sum_over_processes, world_size

NUM_PICTURES = 8
IGNORED = 255
# by data set: image side, steps, learning rate
_RECIPES = {"ADE20K": (512, 160_000, 6e-5), "SHAPES": (64, 1000, 1e-3)}
_WARMUP = 1500  # steps, at most a tenth of all


class _Evaluator:
    """A `SegmentationMeter` as the engine wants one; writes predictions to `folder`, if it is given, for as long as
    they find room."""

    def __init__(self, classes: Sequence[str], folder: Path | None) -> None:
        self.classes, self.folder = classes, folder
        self.meter = SegmentationMeter(len(classes))
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(f"--output_dir: {folder} cannot be written: {error}.") from error

    def update(self, output: list[Tensor], target: list[tuple[Tensor, str]]) -> None:
        """Take in the predicted classes of one batch, (H, W) each."""
        for prediction, (labels, name) in zip(output, target):
            self.meter.update(prediction, labels)
            if self.folder is None:
                continue
            # where one finds no room the others would not either
            if not save_prediction(prediction.numpy(), self.folder / f"{name}.png", len(self.classes)):
                self.folder = None

    def summary(self) -> dict[str, float]:
        """The figures so far, of this process."""
        return self.meter.stats()

    def compute(self, distributed: bool = False) -> dict[str, float]:
        """mIoU, mAcc and aAcc of all."""
        counts = self.meter.counts
        if distributed:
            summed = sum_over_processes(counts.flatten().tolist())
            self.meter.counts = torch.tensor(summed, dtype=torch.float64).to(torch.int64).view_as(counts)
        if not int(self.meter.counts.sum()):
            raise UsageError("The evaluation set has no labelled pixel.")
        return self.meter.stats()


class Segment(Task):
    """Gives every pixel a class; `output` is a `SegmenterOutput`."""

    name = "segment"
    metric = Metric("mIoU", unit="%")
    title = "Segmentation"
    data_sets = sets.DATA_SETS
    default_data_set = "SHAPES"
    collate = staticmethod(sets.collate)
    with_teacher = False

    # --- before a run ---

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the flags of maps, crops and windows."""
        scale = number(float, 0, MOST_SCALE, above=True)
        group = parser.add_argument_group("segmentation")
        group.add_argument(
            "--scale-range",
            type=scale,
            nargs=2,
            default=(0.5, 2.0),
            metavar=("LOW", "HIGH"),
            help="by how much training images are enlarged (default: 0.5 2)",
        )
        group.add_argument(
            "--test-mode",
            default="slide",
            choices=("slide", "whole"),
            help="windows of --input-size, or whole images at once (default: slide)",
        )
        group.add_argument(
            "--slide-stride",
            type=number(int, 1),
            default=None,
            metavar="PIXELS",
            help="from window to window (default: two thirds of --input-size)",
        )
        group.add_argument(
            "--dense-feature",
            default="hidden",
            choices=FEATURES,
            help="what of a layer is a map: its mixer's output, or that and the residual (default: hidden)",
        )
        group.add_argument(
            "--seg-classes",
            nargs="+",
            default=None,
            metavar="NAME",
            help="of your own images: the classes 1, 2, ... of the annotations (default: those of objectInfo150.txt "
            "beside them, or as many as ADE20K has)",
        )
        group.add_argument(
            "--seg-channels",
            type=number(int, 1),
            default=None,
            help="of the decoder (default: the backbone's width; 512 where its maps go to the decoder as they are)",
        )

    @classmethod
    def set_defaults(cls, args: argparse.Namespace, typed: set[str]) -> None:
        if args.data_set not in cls.data_sets:
            close = nearest(args.data_set.upper(), cls.data_sets)
            raise UsageError(
                f"--data-set {args.data_set!r} is no set of --task segment; wanted ADE20K or SHAPES{close}."
            )
        size, iterations, rate = _RECIPES[args.data_set]
        recipe: dict[str, Any] = dict(
            drop=0.1,
            batch_size=16,
            lr=rate,
            unscale_lr=True,
            weight_decay=0.01,
            sched="poly",
            decay_rate=1.0,
            min_lr=0.0,
            model_ema=False,
            sched_on_updates=True,
            token_pruning_weight=20.0,
            block_pruning_weight=20.0,
        )
        if "epochs" not in typed:
            steps = args.iterations or iterations
            recipe |= dict(iterations=steps, eval_interval=steps // 10 if steps % 10 == 0 else steps)
            if args.sched_on_updates or "sched_on_updates" not in typed:
                recipe["warmup_iters"] = min(_WARMUP, steps // 10)
        for name, value in recipe.items():
            if name not in typed:
                setattr(args, name, value)
        if "input_size" not in typed:
            # the model's own size is that of its classifier
            args.input_size = size
            typed.add("input_size")

    @classmethod
    def check(cls, args: argparse.Namespace, typed: set[str]) -> None:
        low, high = args.scale_range
        if low > high:
            raise UsageError(f"--scale-range is {low:g} to {high:g}; wanted the smaller number first.")
        if args.test_mode == "whole" and args.slide_stride is not None:
            raise UsageError("--slide-stride contradicts --test-mode whole, which has no windows.")
        sides = to_2tuple(args.input_size)
        if args.slide_stride is None:
            strides = [max(side * 2 // 3, 1) for side in sides]
            args.slide_stride = strides[0] if sides[0] == sides[1] else tuple(strides)
        elif args.slide_stride > min(sides):
            raise UsageError(
                f"--slide-stride {args.slide_stride} is more than --input-size {told_size(args.input_size)}; windows "
                "that do not leave gaps wanted it at most that."
            )
        if "dense_feature" in typed and not models_mamba.registry_keywords(args.model):
            raise UsageError(f"--dense-feature wants a Vision Mamba; {args.model} has maps of its own.")
        if not args.train_mode:
            raise UsageError("--no-train-mode leaves out the auxiliary head, which only training has; wanted it on.")
        if args.attn_only:
            raise UsageError("--attn-only would leave the new heads as they are; wanted it with --task classify.")
        sets.check(args)

    @classmethod
    def build_data(cls, args: argparse.Namespace, train: bool) -> Data:
        test = sets.build(args, False)
        return Data(sets.build(args, True) if train else None, test, len(test.classes), extra=test.classes)

    @classmethod
    def build_model(cls, args: argparse.Namespace, data: Data | None, **overrides: Any) -> nn.Module:
        name = models_mamba.registry_name(args.model)
        keywords = fusion.model_keywords(args, models_mamba.registry_keywords(name)) | overrides
        try:
            return build_segmenter(
                name,
                2 if data is None else data.num_classes,
                img_size=args.input_size,
                feature=args.dense_feature,
                channels=args.seg_channels,
                aux_channels=args.seg_channels or 256,
                dropout=args.drop,
                drop_path_rate=args.drop_path,
                **keywords,
            )
        except (ValueError, TypeError, AssertionError) as error:
            raise UsageError(f"--model {args.model}: {error}") from error

    @classmethod
    def varies(cls, model: nn.Module, args: argparse.Namespace, training: bool) -> str:
        return super().varies(model, args, training) if training else "images are segmented at sizes of their own"

    # --- a run ---

    def set_up(self) -> None:
        self.criterion: SegmentationLoss | None = None
        self._evaluator: _Evaluator | None = None

    def begin_training(self) -> None:
        if self.args.batch_size * world_size() < 2:
            raise UsageError("--batch-size 1 leaves BatchNorm a single value of a pooled image; wanted 2 or more.")
        # DyVM's segmenters learn from no teacher, only from its two keep targets
        weights = self.args.token_pruning_weight, self.args.block_pruning_weight
        self.criterion = SegmentationLoss(self.model.backbone.pruning, token_weight=weights[0], block_weight=weights[1])

    def prepare_distributed(self, device_ids: list[int] | None = None, **ddp_kwargs: Any) -> Task:
        """Share gradients and the statistics of BatchNorm among the processes."""
        self.trainable_module = synchronise_batch_norm(self.trainable_module)
        return super().prepare_distributed(device_ids, **ddp_kwargs)

    def prepare(self, batch: Any, training: bool) -> tuple[Any, Any, int]:
        if training:
            images, labels = (part.to(self.device, non_blocking=True) for part in batch)
            return images, labels, len(images)
        inputs = [(item.image.to(self.device, non_blocking=True), item.labels.shape) for item in batch]
        return inputs, [(item.labels, item.name) for item in batch], len(batch)

    def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Any]:
        """inputs (B, 3, H, W); targets (B, H, W), 255 where unlabelled."""
        output = self.trainable_module(inputs)
        loss = self.criterion(output, targets)
        return {"loss": loss, "output": output} | self.criterion.parts

    def predict(self, inputs: list[tuple[Tensor, Sequence[int]]]) -> list[Tensor]:
        """Images (3, h, w), each with the size (H, W) of its labels -> classes (H, W), uint8, on the CPU."""
        classes: list[Tensor] = []
        start = 0
        while start < len(inputs):
            # images of one shape in a row go through the model together
            shape, end = inputs[start][0].shape, start + 1
            while end < len(inputs) and inputs[end][0].shape == shape:
                end += 1
            logits = self.logits(torch.stack([image for image, _ in inputs[start:end]]))
            for one, (_, size) in zip(logits, inputs[start:end]):
                classes.append(resize(one[None].float(), size).argmax(1)[0].to(torch.uint8).cpu())
            start = end
        return classes

    def logits(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) of any size -> logits (B, classes, H, W), as --test-mode says."""
        if self.args.test_mode == "whole":
            return self.model(images)
        return slide_inference(
            lambda window: self.model(window).float(), images, self.args.input_size, self.args.slide_stride
        )

    def create_evaluator(self) -> _Evaluator:
        writes = self.args.eval and self.args.output_dir
        folder = Path(self.args.output_dir, "predictions") if writes else None
        self._evaluator = _Evaluator(self.data.extra, folder)
        return self._evaluator

    def tell(self, stats: dict[str, float]) -> str:
        return f"mIoU {stats['mIoU']:.2f} %, mAcc {stats['mAcc']:.2f} %, aAcc {stats['aAcc']:.2f} %"

    def report(self, batches: EvalBatches, meters: Sequence[Meter], autocast: Any) -> list[str]:
        """The classes' own figures, and what the methods' meters saw."""
        meter = self._evaluator.meter
        rows = zip(self.data.extra, meter.iou.tolist(), meter.accuracy.tolist())
        lines = [f"{name}: IoU {iou:.2f} %, accuracy {accuracy:.2f} %" for name, iou, accuracy in rows]
        if self._evaluator.folder is not None:
            lines.append(f"Predictions of all test images are in {self._evaluator.folder}.")
        return lines + super().report(batches, meters, autocast)

    def layer_scales(self, decay: float) -> dict[str, float] | None:
        return layer_scales(self.model, "backbone.body.", self.model.backbone.body, decay)

    @torch.no_grad()
    def draw(self, test_set: Iterable[Any], directory: Path, meters: Sequence[Meter] = ()) -> None:
        """Write image_N.png: a test image, the truth and the prediction side by side, with the classes' colours; where
        patches are pruned, image_N_kept.png; where scan directions are, directions.png."""
        self.eval()
        directory.mkdir(parents=True, exist_ok=True)
        items = [test_set[place] for place in range(min(NUM_PICTURES, len(test_set)))]
        for index, item in enumerate(items):
            prediction = self.predict([(item.image.to(self.device), item.labels.shape)])[0]
            shown = denormalise(resize(item.image[None], item.labels.shape)[0])
            figure = draw_segmentation(shown, item.labels.numpy(), prediction.numpy(), self.data.extra)
            figure.savefig(directory / f"image_{index}.png", dpi=120)
            if kept := draw_kept_patches(self.model.backbone, item.image[None].to(self.device)):
                kept.savefig(directory / f"image_{index}_kept.png")
        directions = next(
            (meter.directions for meter in meters if getattr(meter, "directions", None) is not None), None
        )
        if directions is not None:
            draw_directions(directions.numpy(), len(test_set)).savefig(directory / "directions.png")
