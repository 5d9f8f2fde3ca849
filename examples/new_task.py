"""A task added from outside: learn, without labels, by which quarter turns a digit was rotated (Gidaris et al. 2018).

python -m examples.new_task --task rotate --epochs 2            # main.py with the new task
"""

import argparse
import sys
from typing import Any

import torch
from timm.task.evaluator import ClassificationEvaluator
from torch import Tensor, nn
from torch.nn import functional as F

import datasets
import main as program
from tasks import TASKS, augmentation, backbone
from tasks.task import Data, Metric, Task
from utils.flags import number


@TASKS.add
class Rotate(Task):
    """Tells which of `--turns` quarter turns an image was rotated by."""

    name, title = "rotate", "Turns told right"
    metric = Metric("top1", unit="%")
    data_sets, default_data_set = ("DIGITS",), "DIGITS"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        for owner in (augmentation, datasets):
            owner.add_arguments(parser)
        parser.add_argument("--turns", type=number(int, 2, 4), default=4, help="how many there are (default: 4)")

    @classmethod
    def build_data(cls, args: argparse.Namespace, train: bool) -> Data:
        sets = [datasets.build_dataset(part, args, augmentation.build_transform(False, args)) for part in (True, False)]
        return Data(sets[0][0], sets[1][0], args.turns)

    @classmethod
    def build_model(cls, args: argparse.Namespace, data: Data | None, **overrides: Any) -> nn.Module:
        return backbone.build_backbone(args, args.turns, **overrides)

    def prepare(self, batch: Any, training: bool) -> tuple[Tensor, Tensor, int]:
        images = batch[0].to(self.device)
        # in evaluation the turns go by the place in the batch, so that it can be repeated
        turns = torch.arange(len(images)) if not training else torch.randint(self.args.turns, (len(images),))
        turns = turns % self.args.turns
        rotated = torch.stack([image.rot90(int(turn), (1, 2)) for image, turn in zip(images, turns)])
        return rotated, turns.to(self.device), len(images)

    def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        output = self.trainable_module(inputs)
        return {"loss": F.cross_entropy(output, targets), "output": output}

    def predict(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)

    def create_evaluator(self) -> ClassificationEvaluator:
        return ClassificationEvaluator(self.device)


if __name__ == "__main__":
    sys.exit(program.main())
