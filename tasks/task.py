"""What a run needs to know of its job: the contract between the program, its one engine, and every task.

A task is timm's `TrainingTask` (called with a batch it gives the loss, the output and the parts of the loss) with what
comes before a run beside it: flags, data sets, the model around a backbone, what decides which checkpoint is best.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

import fusion
from fusion import Meter, SiteMethod
from loading import Collate, EvalBatches, TrainBatches
from utils import UsageError


class Metric(NamedTuple):
    """A figure of `Evaluator.compute` that decides which weights are best."""

    name: str
    higher_is_better: bool = True
    unit: str = ""
    label: str = ""

    def is_better(self, value: float, best: float | None) -> bool:
        """Whether `value` is better than the `best` so far; the first always is, and any is better than NaN."""
        return best is None or math.isnan(best) or (value > best if self.higher_is_better else value < best)

    def told(self, value: float) -> str:
        """`value` as a reader wants it."""
        return f"{value:.2f} %" if self.unit == "%" else f"{value:.4f}"


@dataclass
class Data:
    """The data sets of a run and what they say of the model: `num_classes`, `in_chans`, and whatever the task alone
    understands (`extra`)."""

    train: Dataset | None
    test: Dataset
    num_classes: int = 0
    in_chans: int = 3
    extra: Any = None


class Evaluator(Protocol):
    """Adds up an evaluation; timm's evaluators are some."""

    def update(self, output: Any, target: Any) -> None:
        """Take in what the model makes of one batch."""

    def summary(self) -> dict[str, float]:
        """The figures so far, of this process, for the console; cheap."""

    def compute(self, distributed: bool = False) -> dict[str, float]:
        """The figures of all; `distributed` says that the batches were shared among the processes."""


class Task(TrainingTask):
    """One job: its flags, data and model before a run (class methods), and its loss and evaluation in it.

    `model` is the network as it is saved; `trainable_module` the same, or the wrapper that shares its gradients.
    """

    name: ClassVar[str]
    metric: ClassVar[Metric]
    data_sets: ClassVar[tuple[str, ...]]
    default_data_set: ClassVar[str]
    title: ClassVar[str] = "Result"  # of a line with the figures of an evaluation
    collate: ClassVar[Collate | None] = None
    with_teacher: ClassVar[bool] = True  # whether methods that learn from one get a teacher
    written: ClassVar[tuple[str, ...]] = ()  # files that its evaluator writes into --output_dir

    # --- before a run ---

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the flags that only this task has."""

    @classmethod
    def set_defaults(cls, args: argparse.Namespace, typed: set[str]) -> None:
        """Give shared flags that are not among the `typed` ones the values that this task wants."""

    @classmethod
    def check(cls, args: argparse.Namespace, typed: set[str]) -> None:
        """Raise UsageError for flags that contradict each other or name what is not there, before any work."""

    @classmethod
    def build_data(cls, args: argparse.Namespace, train: bool) -> Data:
        """The data sets that the flags ask for; the training set only if `train`."""
        raise NotImplementedError

    @classmethod
    def build_model(cls, args: argparse.Namespace, data: Data | None, **overrides: Any) -> nn.Module:
        """The model that the flags ask for; `overrides` are keywords that come before the flags. Without `data`, one of
        the same shape that serves to check the flags."""
        raise NotImplementedError

    @classmethod
    def check_model(cls, model: nn.Module, args: argparse.Namespace) -> None:
        """Raise UsageError for flags that do not fit `model`, which is on the meta device."""
        if args.fsdp:
            raise UsageError(f"--fsdp divides classifiers among processes; wanted --task {cls.name} without it.")

    @classmethod
    def varies(cls, model: nn.Module, args: argparse.Namespace, training: bool) -> str:
        """What differs from batch to batch beside numbers on the device (shapes, what the host draws), in `training` or
        in evaluation, so that a CUDA graph cannot be replayed for the next; "" if nothing does."""
        return fusion.varies(model, training)

    @classmethod
    def train_batches(cls, data: Data, args: argparse.Namespace) -> TrainBatches:
        """The training set in batches."""
        return TrainBatches(data.train, args, steps=args.steps_per_epoch, collate=cls.collate)

    @classmethod
    def eval_batches(cls, data: Data, args: argparse.Namespace) -> EvalBatches:
        """The evaluation set in batches."""
        return EvalBatches(data.test, args, collate=cls.collate)

    @classmethod
    def plain_model(cls, args: argparse.Namespace, model: nn.Module, data: Data) -> nn.Module:
        """`model` built anew without the methods that learn from a teacher, which such a teacher is."""
        off = {method.switch: method.off for method in fusion.methods_of(model) if method.needs_teacher}
        return cls.build_model(args, data, **off)

    # --- a run ---

    def __init__(
        self,
        args: argparse.Namespace,
        model: nn.Module,
        data: Data,
        device: torch.device,
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__(device=device, verbose=False)
        self.args, self.data = args, data
        self.trainable_module = model
        # in a tuple, so that the teacher is no part of what is trained or saved
        self._teacher = (teacher,)
        self.set_up()

    def set_up(self) -> None:
        """Make what a run of this task needs beside the model: called once `args`, `data` and `model` are there."""

    @property
    def model(self) -> nn.Module:
        """The network without wrappers."""
        return unwrap_model(self.trainable_module)

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen network that a method learns from, where there is one."""
        return self._teacher[0]

    @property
    def methods(self) -> list[SiteMethod]:
        """The efficiency methods at work in the model, outermost first."""
        return fusion.methods_of(self.model)

    def train(self, mode: bool = True) -> Task:
        """Switch the model; criterion, teachers and averages stay as they are."""
        self.training = mode
        self.trainable_module.train(mode)
        return self

    def prepare_distributed(self, device_ids: list[int] | None = None, **ddp_kwargs: Any) -> Task:
        """Share the gradients of the model among the processes."""
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def with_methods(self, criterion: nn.Module) -> nn.Module:
        """`criterion` with the terms around it that the model's methods are trained by."""
        for method in self.methods:
            criterion = method.criterion(criterion, self.teacher, self.args)
        return criterion

    def begin_training(self) -> None:
        """Load what training alone needs, such as the loss and a teacher; called once, before the first epoch."""

    def begin_epoch(self, epoch: int) -> None:
        """Called before the first step of `epoch`, or where it is resumed."""
        for method in self.methods:
            method.begin_epoch(epoch, self.args.epochs, self.args)

    def prepare(self, batch: Any, training: bool) -> tuple[Any, Any, int]:
        """A batch of the loader -> inputs, targets and the number of images, checked and on the device."""
        raise NotImplementedError

    def forward(self, inputs: Any, targets: Any) -> dict[str, Any]:
        """`loss`, a scalar to go down on; `output`; and by other names the parts of the loss, for the log."""
        raise NotImplementedError

    def predict(self, inputs: Any) -> Any:
        """What the evaluator is given for `inputs`."""
        raise NotImplementedError

    def filler(self) -> Any:
        """Inputs for a process that has run out of them while others need its share of the model."""
        raise NotImplementedError

    def create_evaluator(self) -> Evaluator:
        """A fresh evaluator."""
        raise NotImplementedError

    def tell(self, stats: dict[str, float]) -> str:
        """The figures of an evaluation for a reader."""
        others = (f"{name} {value:.4f}" for name, value in stats.items() if name != self.metric.name)
        label = self.metric.label or self.metric.name
        return ", ".join([f"{label} {self.metric.told(stats[self.metric.name])}", *others])

    def meters(self) -> list[Meter]:
        """A fresh meter of every method that has one."""
        return fusion.meters_of(self.model)

    def layer_scales(self, decay: float) -> dict[str, float] | None:
        """The share of the learning rate of every parameter, by name; None leaves it to the engine's rule."""
        return None

    def draw(self, test_set: Iterable[Any], directory: Path, meters: Sequence[Meter] = ()) -> None:
        """Write pictures of what the model does to the first items of `test_set`."""

    def report(self, batches: EvalBatches, meters: Sequence[Meter], autocast: Any) -> list[str]:
        """More lines for the reader of an evaluation: what the methods' `meters` saw."""
        return [line for meter in meters for line in meter.method.report(meter)]
