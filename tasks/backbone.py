"""The backbone of every task: flags, and models from timm's registry with the methods that the flags switch on."""

from __future__ import annotations

import argparse
from typing import Any

import timm
from torch import nn

import fusion
import models_mae  # noqa: F401 - its names join the registry
import models_mamba
from utils import UsageError, nearest
from utils.flags import Sides, number

OWN_MODULES = ("models_mamba", "models_mae")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the model."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="vim_nano_patch4_32", metavar="NAME", help="a name of timm's registry")
    group.add_argument(
        "--input-size",
        action=Sides,
        default=224,
        metavar="SIDE",
        help="image side, or height and width, in pixels (default: the model's own, 224 for published names)",
    )
    group.add_argument("--drop", type=number(float, 0, 1, below=True), default=0.0, metavar="RATE", help="default: 0")
    group.add_argument(
        "--drop-path", type=number(float, 0, 1, below=True), default=0.1, metavar="RATE", help="default: 0.1"
    )


def own_models() -> list[str]:
    """The names that this project has added to timm's registry."""
    return [name for module in OWN_MODULES for name in timm.list_models(module=module)]


def check(args: argparse.Namespace, typed: set[str]) -> None:
    """Refuse an unknown model and methods that contradict each other; an image size that was not typed becomes the
    model's own."""
    name = models_mamba.registry_name(args.model)
    try:
        fusion.check(args, typed)
        fusion.model_keywords(args, models_mamba.registry_keywords(name))
    except ValueError as error:
        raise UsageError(str(error)) from error
    if not timm.is_model(name):
        close = nearest(name, own_models()) or nearest(name, timm.list_models())
        raise UsageError(f"--model {name!r} is unknown{close}.")
    if "input_size" not in typed:
        args.input_size = timm.get_pretrained_cfg(name).input_size[-1]


def build_backbone(args: argparse.Namespace, num_classes: int, **overrides: Any) -> nn.Module:
    """The model that the flags ask for, from timm's registry; `overrides` are keywords that come before the flags."""
    name = models_mamba.registry_name(args.model)
    own = name in own_models()
    keywords = fusion.model_keywords(args, models_mamba.registry_keywords(name)) | overrides
    if own or timm.get_pretrained_cfg(name).fixed_input_size:
        keywords.setdefault("img_size", args.input_size)
    rates = {"drop_rate": args.drop, "drop_path_rate": args.drop_path}
    if not own:
        # not every model knows these two, and timm leaves out what is None
        rates = {key: rate or None for key, rate in rates.items()}
    try:
        return timm.create_model(name, num_classes=num_classes, **(rates | keywords))
    except (ValueError, TypeError) as error:
        raise UsageError(f"--model {name}: {error}") from error
