"""Classification of cells: any subset of the channels, and what each channel is worth."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models_mamba
from embeddings import SCAN_ORDERS, sample_places
from fusion import Meter
from loading import EvalBatches, TrainBatches
from models_mamba import VisionMamba
from tasks import backbone
from tasks.cells import data as cells_data
from tasks.cells.dataset import Batch, ChannelSet, ChannelSetSampler, Statistics, collate
from tasks.cells.metrics import CellsEvaluator, Targets
from tasks.cells.subsets import evaluate_subsets, subsets_of, table, write_csv
from tasks.cells.transforms import normalize
from tasks.task import Data, Metric, Task
from utils import UsageError
from utils.flags import told_size
from utils.processes import rank, sum_over_processes, world_size
from utils.states import check_like

_DEFAULT_MODELS = {"CELLS_DIGITS": "fastchannelvim_nano_patch4_32"}
NUM_PICTURES = 4
IMPORTANCE_IMAGES = 512  # a channel's worth is measured on at most so many


class Inputs(NamedTuple):
    """What a model is given: images (B, n, H, W), normalised, and which channels the n are."""

    images: Tensor
    channels: ChannelSet


class CrossEntropy(nn.Module):
    """The mean cross-entropy of logits (B, classes), called as every criterion is."""

    def forward(self, samples: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.float(), targets)


class ClassifyCells(Task):
    """Classifies images of many channels, of which every image may lack some.

    A model that knows channels is told which it is given. Any other sees all channels that the data know, the missing
    ones zero, and the k present of n times n / k, as ChannelViT's baseline does (Bao et al. 2024, arXiv:2309.16108).
    """

    name = "cells"
    metric = Metric("acc1", unit="%", label="top-1")
    title = "Accuracy"
    data_sets = cells_data.DATA_SETS
    default_data_set = "CELLS_DIGITS"
    collate = staticmethod(collate)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        cells_data.add_arguments(parser)
        group = parser.add_argument_group("cells: model and evaluation")
        group.add_argument(
            "--channel-sampling",
            default=None,
            choices=("hcs", "none"),
            help="train each step on channels drawn at random (default: hcs for models that know channels)",
        )
        group.add_argument(
            "--scan-order",
            default=None,
            choices=SCAN_ORDERS,
            help="whether a patch's channels or a channel's patches stand together (default: the model's)",
        )
        group.add_argument(
            "--pool-dims", type=int, default=None, choices=(1, 2), help="how many axes of the grid a layer pools"
        )
        group.add_argument(
            "--channel-subsets", action="store_true", help="with --eval: accuracy on every subset of the channels"
        )

    @classmethod
    def set_defaults(cls, args: argparse.Namespace, typed: set[str]) -> None:
        """The published recipe; its warm-up of 10 in 100 epochs is a tenth of any number."""
        published = dict(
            model=_DEFAULT_MODELS.get(args.data_set, "fastchannelvim_small_patch16_224"),
            epochs=100,
            batch_size=32,
            lr=2e-3,
            warmup_lr=0.0,
            min_lr=1e-6,
            weight_decay=0.04,
            weight_decay_end=0.4,
            drop_path=0.05,
            model_ema=False,
            sched_on_updates=args.sched != "plateau",
        )
        if "weight_decay" in typed:  # a decay that was asked for stays, unless its end was, too
            del published["weight_decay_end"]
        if not typed & {"if_amp", "amp", "amp_dtype"}:
            args.if_amp = False
        for name, value in published.items():
            if name not in typed:
                setattr(args, name, value)
        if "warmup_epochs" not in typed:
            args.warmup_epochs = args.epochs // 10

    @classmethod
    def check(cls, args: argparse.Namespace, typed: set[str]) -> None:
        cells_data.check(args, typed)
        if not isinstance(args.input_size, int):
            raise UsageError(
                f"--input-size {told_size(args.input_size)}: cells are turned by quarters in training; wanted one side."
            )
        if args.channel_subsets and not args.eval:
            raise UsageError("--channel-subsets wants --eval, since it evaluates every subset of the channels.")

    @classmethod
    def build_data(cls, args: argparse.Namespace, train: bool) -> Data:
        train_set, test_set, info = cells_data.build(args, train)
        return Data(train_set, test_set, len(info.classes), len(info.channels), info)

    @classmethod
    def build_model(cls, args: argparse.Namespace, data: Data | None, **overrides: Any) -> nn.Module:
        keywords: dict[str, Any] = {"in_chans": 8 if data is None else data.in_chans}
        known = models_mamba.registry_keywords(models_mamba.registry_name(args.model))
        if known.get("channel_tokens"):
            keywords["hcs"] = args.channel_sampling != "none"
            if args.scan_order is not None:
                keywords["scan_order"] = args.scan_order
        elif args.scan_order is not None:
            raise UsageError(f"--scan-order orders channels' patches; {args.model} has none; wanted a ChannelVim.")
        if args.pool_dims is not None:
            if not known.get("channel_tokens") or not (known.get("spatial_pool") or args.spatial_pool):
                raise UsageError(f"--pool-dims is for FastChannelVim; {args.model} does not pool channels.")
            keywords["pool_dims"] = args.pool_dims
        return backbone.build_backbone(args, 2 if data is None else data.num_classes, **keywords, **overrides)

    @classmethod
    def check_model(cls, model: nn.Module, args: argparse.Namespace) -> None:
        super().check_model(model, args)
        if any(method.needs_teacher for method in getattr(model, "site_methods", ())):
            raise UsageError("Learned pruning wants a teacher, which --task cells has not; wanted --task classify.")
        if isinstance(model, VisionMamba):
            return
        try:
            model.eval()(torch.empty(2, 8, args.input_size, args.input_size))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise UsageError(f"--input-size {args.input_size} does not fit {args.model}: {error}") from error

    @classmethod
    def varies(cls, model: nn.Module, args: argparse.Namespace, training: bool) -> str:
        return "every batch of cells has the channels that its images have, or that the host draws"

    @classmethod
    def train_batches(cls, data: Data, args: argparse.Namespace) -> TrainBatches:
        sampler = None
        if len(set(data.train.channel_sets)) > 1:
            sampler = ChannelSetSampler(
                data.train.channel_sets, args.batch_size, args.seed, rank(), world_size(), True, args.steps_per_epoch
            )
        return TrainBatches(data.train, args, steps=args.steps_per_epoch, collate=cls.collate, batch_sampler=sampler)

    @classmethod
    def eval_batches(cls, data: Data, args: argparse.Namespace) -> EvalBatches:
        sampler = None
        if len(set(data.test.channel_sets)) > 1:
            share = (rank(), world_size()) if args.dist_eval else (0, 1)
            sampler = ChannelSetSampler(data.test.channel_sets, int(1.5 * args.batch_size), 0, *share)
        return EvalBatches(data.test, args, collate=cls.collate, batch_sampler=sampler)

    # --- a run ---

    def set_up(self) -> None:
        self.info: cells_data.CellsInfo = self.data.extra
        self.knows_channels = isinstance(self.model, VisionMamba) and self.model.knows_channels
        self.statistics: Statistics | None = None
        self.criterion: nn.Module | None = None

    def begin_training(self) -> None:
        self.criterion = self.with_methods(CrossEntropy())
        if self.args.channel_norm == "dataset":
            self.statistics = self.info.statistics((rank(), world_size()), sum_over_processes)

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        state: dict[str, Any] = {"channels": list(self.info.channels), "classes": list(self.info.classes)}
        state["channel_norm"] = self.args.channel_norm
        if self.statistics is not None:
            state |= {"mean": list(self.statistics.mean), "std": list(self.statistics.std)}
        return state

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Take the statistics that the model was trained with. Raises UsageError if its data were others, or for what
        no run of this task writes."""
        if state is None:
            return
        names = [state.get(what, ()) for what in ("channels", "classes")] if isinstance(state, dict) else [None]
        if not all(isinstance(each, (list, tuple)) for each in names):
            raise UsageError("The checkpoint's task_state names no channels and classes; wanted one of --task cells.")
        for what, own in (("channels", self.info.channels), ("classes", self.info.classes)):
            if list(state.get(what, own)) != list(own):
                raise UsageError(
                    f"The checkpoint was trained on the {what} {_listed(state[what])}; these data have {_listed(own)}."
                )
        how = state.get("channel_norm", self.args.channel_norm)
        if how != self.args.channel_norm:
            raise UsageError(f"--channel-norm is {self.args.channel_norm}; the checkpoint was trained with {how}.")
        if "mean" in state:
            like = [0.0] * len(self.info.channels)
            try:
                check_like(state, {"mean": like, "std": like}, "task_state")
            except ValueError as error:
                raise UsageError(f"The checkpoint cannot be used: {error}.") from error
            self.statistics = Statistics(list(state["mean"]), list(state["std"]))

    def prepare(self, batch: Batch, training: bool) -> tuple[Inputs, Targets, int]:
        images, labels, wells = (part.to(self.device, non_blocking=True) for part in (batch[0], batch[1], batch[3]))
        channels = tuple(batch.channels.tolist())
        return Inputs(self._normalized(images, channels), channels), Targets(labels, wells), len(labels)

    def _normalized(self, images: Tensor, channels: ChannelSet) -> Tensor:
        mean = std = None
        if self.args.channel_norm == "dataset":
            if self.statistics is None:  # weights of another program, evaluated
                self.statistics = self.info.statistics()
            mean, std = torch.tensor(self.statistics.mean), torch.tensor(self.statistics.std)
        return normalize(images, self.args.channel_norm, channels, mean, std, self.info.span)

    def forward(self, inputs: Inputs, targets: Targets) -> dict[str, Any]:
        output = self._call(self.trainable_module, *inputs)
        return {"loss": self.criterion(inputs.images, output, targets.labels), "output": output}

    def predict(self, inputs: Inputs) -> Tensor:
        """Logits (B, classes), float32."""
        return self._call(self.model, *inputs).float()

    def _call(self, model: nn.Module, images: Tensor, channels: ChannelSet) -> Tensor:
        if self.knows_channels:
            return model(images, channels=channels)
        if self.training and self.args.channel_sampling == "hcs":
            places = sample_places(len(channels))
            images, channels = images[:, places], tuple(channels[place] for place in places)
        return model(spread(images, channels, self.data.in_chans))

    def create_evaluator(self) -> CellsEvaluator:
        return CellsEvaluator(self.data.num_classes)

    def tell(self, stats: dict[str, float]) -> str:
        wells = f", by well {stats['well_acc1']:.2f} %" if "well_acc1" in stats else ""
        balanced = f"balanced {stats['balanced_acc1']:.2f} %"
        return f"top-1 {stats['acc1']:.2f} %, {balanced}{wells}, loss {stats['loss']:.4f}"

    # --- what channels are worth ---

    def report(self, batches: EvalBatches, meters: Sequence[Meter], autocast: Any) -> list[str]:
        lines = super().report(batches, meters, autocast)
        if not self.args.channel_subsets:
            return lines
        whole = self.eval_batches(self.data, argparse.Namespace(**vars(self.args) | {"dist_eval": False}))
        self.eval()
        with torch.no_grad(), autocast():
            results = evaluate_subsets(self._predict_some, self._prepared(whole), subsets_of(self.info.chosen))
        if self.args.output_dir:
            write_csv(results, self.info.channels, Path(self.args.output_dir, "channel_subsets.csv"))
        if self.args.visualize:
            from tasks.cells import pictures

            pictures.draw_subsets({self.args.model: results}, Path(self.args.visualize, "channel_subsets.png"))
        return [*lines, "Top-1 in % by number of channels:", *table(results, self.info.channels)]

    def draw(self, test_set: Iterable[Any], directory: Path, meters: Sequence[Meter] = ()) -> None:
        """`channels.png`: the first images, a channel beside the other, and the accuracy lost without each."""
        from tasks.cells import pictures

        limited = torch.utils.data.Subset(self.data.test, self._evenly(IMPORTANCE_IMAGES))
        limited.channel_sets = [self.data.test.channel_sets[index] for index in limited.indices]
        chosen = self.info.chosen
        subsets = [chosen, *(tuple(each for each in chosen if each != left) for left in chosen if len(chosen) > 1)]
        whole = argparse.Namespace(**vars(self.args) | {"dist_eval": False})
        batches = self.eval_batches(Data(None, limited), whole)
        self.eval()
        with torch.no_grad():
            results = evaluate_subsets(self._predict_some, self._prepared(batches), subsets)
        accuracy = {result.channels: result.accuracy for result in results}
        lost = {}
        for subset in subsets[1:]:
            if subset in accuracy and chosen in accuracy:
                lost[next(iter(set(chosen) - set(subset)))] = accuracy[chosen] - accuracy[subset]
        items = list(itertools.islice(iter(test_set), NUM_PICTURES))
        pictures.draw_channels(items, self.info, accuracy.get(chosen), lost, len(limited), directory / "channels.png")

    def _evenly(self, most: int) -> list[int]:
        """The indices of at most so many test images, evenly spread."""
        count = len(self.data.test)
        return sorted({place * count // min(most, count) for place in range(min(most, count))})

    def _prepared(self, batches: EvalBatches) -> Iterator[tuple[Batch, Tensor]]:
        for batch in batches:
            yield batch, self._normalized(batch.images.to(self.device), tuple(batch.channels.tolist()))

    def _predict_some(self, images: Tensor, channels: ChannelSet) -> Tensor:
        return self.predict(Inputs(images, channels))


def spread(images: Tensor, channels: Sequence[int], num_channels: int) -> Tensor:
    """Images (B, k, H, W) of k of the n `num_channels` -> (B, n, H, W), the others zero, these times n / k."""
    whole = images.new_zeros(len(images), num_channels, *images.shape[2:])
    whole[:, list(channels)] = images * (num_channels / len(channels))
    return whole


def _listed(names: Iterable[str]) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
