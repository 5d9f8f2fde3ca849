"""Object detection and instance segmentation as a task of the program: Cascade Mask R-CNN, trained by steps and
measured by COCO's average precision."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fusion
import models_mamba
from fusion import Meter
from loading import EvalBatches
from tasks.dense.backbone import layer_scales
from tasks.dense.data import MOST_SCALE
from tasks.detect import data as sets
from tasks.detect.detector import build_detector
from tasks.detect.evaluation import CocoEvaluator
from tasks.detect.kinds import KINDS
from tasks.detect.pictures import draw_detections
from tasks.task import Data, Metric, Task
from utils import UsageError, nearest
from utils.flags import number

NUM_PICTURES = 8
# shares of all steps after which the learning rate falls: 163,889 and 177,546 of the published 184,375
_MILESTONES = (8 / 9, 26 / 27)
_COCO = dict(input_size=1024, iterations=184_375, lr=1e-4, warmup_iters=250)
_RECIPES: dict[str, dict[str, Any]] = {
    "vim": _COCO | dict(batch_size=64, weight_decay=0.1, layer_decay=0.837),
    "fastvim": _COCO | dict(batch_size=16, weight_decay=0.05, clip_grad=35.0),
    # heads for images of 64 pixels, small enough to be trained on a laptop
    "SHAPES": dict(
        input_size=64,
        iterations=300,
        lr=2e-3,
        warmup_iters=30,
        batch_size=8,
        weight_decay=0.05,
        clip_grad=35.0,
        drop_path=0.0,
        scale_range=(0.7, 1.4),
        det_channels=24,
        det_fc_channels=96,
        det_boxes=32,
        det_proposals=100,
    ),
}


def _proposals(count: int) -> dict[str, int]:
    """The numbers of proposals an image: as published for 1000 in evaluation; where fewer are wanted, since images are
    small, fewer are looked at in proportion, in training too."""
    numbers = dict(rpn_pre_nms_top_n_test=max(min(1000, 4 * count), count), rpn_post_nms_top_n_test=count)
    if count < 1000:
        numbers |= dict(rpn_pre_nms_top_n_train=min(2000, 4 * count), rpn_post_nms_top_n_train=2 * count)
    return numbers


class Detect(Task):
    """Finds objects: their boxes, classes and masks. In training `output` is the losses by name."""

    name = "detect"
    metric = Metric("box_ap", unit="%", label="box AP")
    title = "Detection"
    data_sets = sets.DATA_SETS
    default_data_set = "SHAPES"
    collate = staticmethod(sets.collate)
    written = ("predictions.json",)

    # --- before a run ---

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the flags of heads and jitter."""
        scale, count = number(float, 0, MOST_SCALE, above=True), number(int, 1)
        group = parser.add_argument_group("detection")
        group.add_argument(
            "--det-heads", default=None, choices=[*KINDS], help="released kind of heads (default: by the model's name)"
        )
        group.add_argument("--det-channels", type=count, default=256, help="of pyramid and heads (default: 256)")
        group.add_argument("--det-fc-channels", type=count, default=1024, help="of the box heads (default: 1024)")
        group.add_argument(
            "--det-boxes", type=count, default=512, help="boxes an image that each stage trains on (default: 512)"
        )
        group.add_argument(
            "--det-proposals",
            type=count,
            default=1000,
            help="proposals an image in evaluation (default: 1000; with fewer, fewer in training too)",
        )
        group.add_argument(
            "--scale-range",
            type=scale,
            nargs=2,
            default=(0.1, 2.0),
            metavar=("LOW", "HIGH"),
            help="by how much training images that would fit are scaled (default: 0.1 2)",
        )
        group.add_argument(
            "--decay-iters",
            type=count,
            nargs="+",
            default=None,
            metavar="STEP",
            help="steps after which the learning rate falls to a tenth (default: 8/9 and 26/27 of all)",
        )

    @classmethod
    def set_defaults(cls, args: argparse.Namespace, typed: set[str]) -> None:
        if args.data_set not in cls.data_sets:
            close = nearest(args.data_set.upper(), cls.data_sets)
            raise UsageError(f"--data-set {args.data_set!r} is no set of --task detect; wanted COCO or SHAPES{close}.")
        heads = args.det_heads or ("fastvim" if "fastvim" in models_mamba.registry_name(args.model) else "vim")
        recipe = dict(_RECIPES[heads if args.data_set == "COCO" else args.data_set])
        recipe |= dict(unscale_lr=True, model_ema=False, sched="multistep", decay_rate=0.1, sched_on_updates=True)
        rate = args.lr if "lr" in typed else recipe["lr"]
        recipe |= dict(warmup_lr=1e-3 * rate)
        if "epochs" in typed:
            del recipe["iterations"]
        else:
            steps = args.iterations or recipe["iterations"]
            recipe["warmup_iters"] = min(recipe["warmup_iters"], steps // 10)
            recipe["eval_interval"] = next(steps // parts for parts in (10, 5, 1) if steps % parts == 0)
        if "sched_on_updates" not in typed and typed & {"warmup_epochs", "decay_epochs"}:
            recipe |= dict(sched_on_updates=False, warmup_iters=None)
        for name, value in recipe.items():
            if name not in typed:
                setattr(args, name, value)
        # the model's own size is that of its classifier
        typed.add("input_size")

    @classmethod
    def check(cls, args: argparse.Namespace, typed: set[str]) -> None:
        low, high = args.scale_range
        if low > high:
            raise UsageError(f"--scale-range is {low:g} to {high:g}; wanted the smaller number first.")
        if args.attn_only:
            raise UsageError("--attn-only would leave the new heads as they are; wanted it with --task classify.")
        if args.decay_iters is not None and (args.sched != "multistep" or args.iterations is None):
            raise UsageError("--decay-iters wants --sched multistep and --iterations.")
        if args.sched == "multistep":
            # timm counts in epochs, which are `eval_interval` steps, and lets the rate fall a step early
            total = args.iterations or args.epochs
            steps = [round(share * total) for share in _MILESTONES] if args.decay_iters is None else args.decay_iters
            interval = (args.eval_interval or total) if args.iterations else 1
            args.decay_milestones = [(step + 0.5) / interval for step in sorted(steps)]
        sets.check(args)

    @classmethod
    def build_data(cls, args: argparse.Namespace, train: bool) -> Data:
        test = sets.build(args, False)
        train_set = sets.build(args, True) if train else None
        if train_set is not None and train_set.file.labels != test.file.labels:
            raise UsageError(f"{train_set.file.path} and {test.file.path} have other categories; wanted the same.")
        return Data(train_set, test, len(test.classes), extra=test.classes)

    @classmethod
    def build_model(cls, args: argparse.Namespace, data: Data | None, **overrides: Any) -> nn.Module:
        name = models_mamba.registry_name(args.model)
        keywords = fusion.model_keywords(args, models_mamba.registry_keywords(name)) | overrides
        if args.drop:
            keywords["drop_rate"] = args.drop
        try:
            return build_detector(
                name,
                2 if data is None else data.num_classes,
                img_size=args.input_size,
                heads=args.det_heads,
                out_channels=args.det_channels,
                fc_channels=args.det_fc_channels,
                drop_path_rate=args.drop_path,
                **_proposals(args.det_proposals),
                box_batch_size_per_image=args.det_boxes,
                **keywords,
            )
        except (ValueError, TypeError, AssertionError) as error:
            raise UsageError(f"--model {args.model}: {error}") from error

    @classmethod
    def check_model(cls, model: nn.Module, args: argparse.Namespace) -> None:
        super().check_model(model, args)
        if fusion.methods_of(model) and getattr(model.body.methods, "pruning", None) is not None and not args.eval:
            raise UsageError(
                f"--model {args.model} prunes, and no detector was published with pruning; wanted --pruning none."
            )

    @classmethod
    def varies(cls, model: nn.Module, args: argparse.Namespace, training: bool) -> str:
        return "images have sizes of their own and any number of objects"

    @classmethod
    def eval_batches(cls, data: Data, args: argparse.Namespace) -> EvalBatches:
        return EvalBatches(data.test, args, batch_size=args.batch_size, collate=cls.collate)

    # --- a run ---

    def prepare(self, batch: Any, training: bool) -> tuple[list[Tensor], list[dict[str, Any]], int]:
        images, targets = batch
        # eight bits travel, floats are made where they are needed
        images = [image.to(self.device, non_blocking=True).float() / 255 for image in images]
        if training:
            targets = [
                {name: part.to(self.device) if isinstance(part, Tensor) else part for name, part in target.items()}
                for target in targets
            ]
        return images, targets, len(images)

    def forward(self, inputs: list[Tensor], targets: list[dict[str, Any]]) -> dict[str, Any]:
        """inputs: images (3, H, W) of 0 to 1; targets as `Detector` wants them."""
        losses = self.trainable_module(inputs, targets)
        return {"loss": sum(losses.values()), "output": losses} | losses

    def predict(self, inputs: list[Tensor]) -> list[dict[str, Tensor]]:
        """The detections of each image, in its own size."""
        return self.model(inputs)

    def create_evaluator(self) -> CocoEvaluator:
        path = Path(self.args.output_dir, *self.written) if self.args.output_dir else None
        return CocoEvaluator(self.data.test.file, path)

    def tell(self, stats: dict[str, float]) -> str:
        def row(kind: str) -> str:
            named = (("AP", "ap"), *((name, f"ap{name}") for name in ("50", "75")))
            named += tuple((size, f"ap_{size}") for size in ("small", "medium", "large"))
            found = [(title, stats.get(f"{kind}_{name}")) for title, name in named]
            return f"{kind} " + ", ".join(f"{title} {value:.2f} %" for title, value in found if value is not None)

        return "; ".join(row(kind) for kind in ("box", "mask"))

    def layer_scales(self, decay: float) -> dict[str, float] | None:
        return layer_scales(self.model, "backbone.dense.body.", self.model.body, decay)

    @torch.no_grad()
    def draw(self, test_set: Iterable[Any], directory: Path, meters: Sequence[Meter] = ()) -> None:
        """Write image_N.png: a test image, what is true and what was found, with boxes, masks and scores; and what
        methods draw."""
        self.eval()
        directory.mkdir(parents=True, exist_ok=True)
        # objects first: an empty image shows little
        places = sorted(range(len(test_set)), key=lambda place: not len(test_set.objects(place)))[:NUM_PICTURES]
        images, targets = self.collate([test_set[place] for place in places])
        inputs, _, _ = self.prepare((images, targets), training=False)
        for number_, (image, target, found) in enumerate(zip(images, targets, self.predict(inputs))):
            figure = draw_detections(image, target, found, self.data.extra)
            figure.savefig(directory / f"image_{number_}.png", dpi=120)
        if self.methods:
            batch, _ = self.model.transform(inputs[:4])
            fusion.draw(self.model.body, batch.tensors, directory, meters)
