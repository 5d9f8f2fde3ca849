"""What `benchmarks.compare` compares, task by task: methods, sizes, recipes, and the score that judges them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """What is compared: its title, its model's name without the size, its flags at sizes other than nano and at nano,
    and whether it starts from trained weights: those of the method `start`."""

    title: str
    family: str
    flags: tuple[str, ...] = ()
    nano_flags: tuple[str, ...] | None = None
    fine_tunes: bool = False
    start: str = "none"


def _merging(strategy: str, tokens: int, layer: int = 0) -> tuple[str, ...]:
    return "--fusion-strategy", strategy, "--fusion-layer", str(layer), "--fusion-token", str(tokens)


# twelve epochs do not make a gate sure of itself: without noise in the end, it decides as it does in inference
_SURE = ("--gate-noise-end", "0")
_KEEP = (
    *("--block-keep-ratio", "0.8", "--token-pruning-weight", "10", "--block-pruning-weight", "10"),
    *("--warmup-lr", "1e-6"),
)
_BLOCK, _BOTH = ("--pruning", "block", *_KEEP), ("--pruning", "both", *_KEEP)
_METHODS = {
    "none": Method("Vim", "vim"),
    "upper": Method("Famba-V (upper)", "vim", _merging("upper", 8, 4), _merging("upper", 8, 2)),
    "fastvim": Method("FastVim", "fastvim"),
    "dyvm-token": Method("DyVM (token)", "dyvm", ("--pruning", "token", *_KEEP), fine_tunes=True),
    "dyvm-block": Method("DyVM (block)", "dyvm", _BLOCK, _BLOCK + _SURE, fine_tunes=True),
    "dyvm-both": Method("DyVM (both)", "dyvm", _BOTH, _BOTH + _SURE, fine_tunes=True),
    # attention does not stand the Vims' learning rate on the digits
    "deit": Method("DeiT", "deit", (), ("--lr", "1e-3")),
    # registers against the one class token
    "mambareg": Method("MambaReg", "mambareg"),
}
_COMPARED = tuple(_METHODS)
# The other strategies of Famba-V as published for Vim-S on CIFAR-100; at nano size each, "upper" too, fuses 40 of the
# 64 patches on the way.
_METHODS |= {
    "all": Method("Famba-V (all)", "vim", _merging("all", 7), _merging("all", 5)),
    "alternate": Method("Famba-V (alternate)", "vim", _merging("alternate", 14), _merging("alternate", 10)),
    "lower": Method("Famba-V (lower)", "vim", _merging("lower", 9, 5), _merging("lower", 8, 5)),
}
_STRATEGIES = ("all", "alternate", "lower", "upper")
for _name in _STRATEGIES:
    _method, _raster = _METHODS[_name], ("--fusion-order", "raster")
    _METHODS[f"{_name}-raster"] = Method(
        f"{_method.title[:-1]}, raster order)", "vim", _method.flags + _raster, _method.nano_flags + _raster
    )
for _policy in ("random", "static"):
    _flags = (*_BOTH, "--pruning-policy", _policy)
    _METHODS[f"dyvm-{_policy}"] = Method(f"DyVM (both, {_policy})", "dyvm", _flags, fine_tunes=True)
_METHODS["dyvm-mambareg"] = Method(
    "DyVM on MambaReg (both)", "dyvm_mambareg", _BOTH, _BOTH + _SURE, fine_tunes=True, start="mambareg"
)
_GROUPS = {
    "registers": ("none", "dyvm-both", "mambareg", "dyvm-mambareg"),
    "merging": ("none", *_STRATEGIES, *(f"{name}-raster" for name in _STRATEGIES)),
    "policies": ("none", "dyvm-both", "dyvm-random", "dyvm-static"),
}
_SIZES = {"nano": "nano_patch4_32"} | {size: f"{size}_patch16_224" for size in ("tiny", "small", "base")}

# Few images want little augmentation and a high learning rate that falls at every step, like those of
# scripts/quickstart.sh, and no other for fine-tuning; many images get Vim-Ti's published recipe, and DyVM's.
DIGITS_RECIPE = (
    *("--batch-size", "32", "--unscale-lr", "--lr", "4e-3", "--warmup-epochs", "1", "--sched-on-updates"),
    *("--mixup", "0", "--cutmix", "0", "--reprob", "0", "--aa", "none", "--color-jitter", "0", "--no-repeated-aug"),
    *("--drop-path", "0", "--no-model-ema", "--num_workers", "0"),
)
_RECIPE = ("--batch-size", "128", "--drop-path", "0", "--weight-decay", "0.1")
_FINE_TUNING = ("--lr", "3e-5", "--min-lr", "1e-6", "--weight-decay", "1e-8", "--warmup-epochs", "5")


# Segmentation, from nothing: few steps want small batches, a high learning rate, and images of about the tested size.
SHAPES_RECIPE = (
    *(
        "--batch-size",
        "4",
        "--lr",
        "2e-3",
        "--input-size",
        "64",
        "--scale-range",
        "0.8",
        "1.25",
        "--seg-channels",
        "64",
    ),
    *("--drop", "0", "--drop-path", "0", "--num_workers", "0"),
)
_SEGMENTERS = {
    "none": Method("Vim", "vim"),
    "upper": Method("Famba-V (upper)", "vim", _merging("upper", 8, 4), _merging("upper", 8, 2)),
    "fastvim": Method("FastVim", "fastvim"),
    "dyvm-token": Method("DyVM (token)", "dyvm", ("--pruning", "token")),
    "mambareg": Method("MambaReg", "mambareg"),
    "deit": Method("DeiT (ViT)", "deit", (), ("--lr", "1e-3")),
}


@dataclass(frozen=True)
class Comparison:
    """One task's: `methods` by name, those `compared` unless others are asked for, `groups` of them by name; model
    names without the family by size; the data set that is at hand with flags and epochs for it, the one that is asked
    for by a path, and its flags; what fine-tuning adds there. `by_steps` says that runs are as long as so many steps,
    not epochs."""

    methods: dict[str, Method]
    compared: tuple[str, ...]
    groups: dict[str, tuple[str, ...]]
    sizes: dict[str, str]
    small_data_set: str
    small_recipe: tuple[str, ...]
    data_set: str
    recipe: tuple[str, ...]
    fine_tuning: tuple[str, ...]
    epochs: tuple[int, int]  # of the small data set, of the other
    fine_tune_epochs: tuple[int, int]
    by_steps: bool = False

    @property
    def unit(self) -> str:
        """What the length of a run is counted in, as the program's flag for it says."""
        return "iterations" if self.by_steps else "epochs"

    def length(self, count: int) -> tuple[list[str], int]:
        """The program's flags for a run of `count` epochs or steps, and how many lines it logs."""
        if not self.by_steps:
            return ["--epochs", str(count)], count
        lines = 2 if count % 2 == 0 else 1
        return ["--iterations", str(count), "--eval-interval", str(count // lines)], lines


COMPARISONS = {
    "classify": Comparison(
        methods=_METHODS,
        compared=_COMPARED,
        groups=_GROUPS,
        sizes=_SIZES,
        small_data_set="DIGITS",
        small_recipe=DIGITS_RECIPE,
        data_set="IMNET",
        recipe=_RECIPE,
        fine_tuning=_FINE_TUNING,
        epochs=(12, 300),
        fine_tune_epochs=(12, 30),
    ),
    "segment": Comparison(
        methods=_SEGMENTERS,
        compared=tuple(_SEGMENTERS),
        groups={},
        sizes=_SIZES,
        small_data_set="SHAPES",
        small_recipe=SHAPES_RECIPE,
        data_set="ADE20K",
        recipe=(),
        fine_tuning=(),
        epochs=(1200, 160_000),
        fine_tune_epochs=(0, 0),
        by_steps=True,
    ),
}

# Tasks whose methods are not told apart by one accuracy on one data set: where their tables are, and what makes them.
ELSEWHERE = {
    "pretrain": "docs/mae.md, by FAMILY=vim bash scripts/mae/digits.sh",
    "cells": "docs/cells.md, by python -m benchmarks.channel_sampling",
    "detect": "docs/detection.md, by bash scripts/det/quickstart.sh and python -m benchmarks.detection",
}
