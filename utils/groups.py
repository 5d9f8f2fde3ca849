"""Which parameters of a model learn how much: shares of the learning rate by layer, and what decays."""

from __future__ import annotations

import math
from typing import Any

from timm.optim._param_groups import param_groups_layer_decay
from torch import nn


def layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """The factor on the learning rate of every parameter of `model`, by name, so that layers near the image learn less.

    A Vision Mamba of `depth` layers has n = depth + 1 steps: positions, class tokens and patch embedding stand at 0,
    `layers.i` at i + 1, all else at n, and two layers share a rate, decay^ceil((n - step) / 2), as FastVim's
    fine-tuning has it. Other models follow timm's grouping.
    """
    if hasattr(model, "layers") and hasattr(model, "depth"):
        last = model.depth + 1
        places = {}
        for name, _ in model.named_parameters():
            first, _, rest = name.partition(".")
            if first == "layers":
                places[name] = int(rest.partition(".")[0]) + 1
            elif first.startswith(("pos_embed", "cls_token", "patch_embed")):
                places[name] = 0
            else:
                places[name] = last
        return {name: decay ** math.ceil((last - place) / 2) for name, place in places.items()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups_layer_decay(model, layer_decay=decay)
    return {names[id(parameter)]: group["lr_scale"] for group in groups for parameter in group["params"]}


def parameter_groups(model: nn.Module, weight_decay: float, scales: dict[str, float]) -> list[dict[str, Any]]:
    """The parameters of `model` that are trained, by their share of the learning rate and whether they decay."""
    spared = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and name not in spared and not name.endswith(".bias")
            groups.setdefault((scales.get(name, 1.0), weight_decay if decays else 0.0), []).append(parameter)
    return [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]
