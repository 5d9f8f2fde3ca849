"""What learned pruning keeps, measured or, for random weights, forced."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusion.dynamic_pruning import DynamicPruning
from models_mamba import VisionMamba


def kept_directions(model: nn.Module, images: Tensor) -> Tensor | None:
    """The share of `images` (B, C, H, W) that runs each scan direction, (depth, directions); None if none is ever
    skipped."""
    pruning = getattr(getattr(model, "methods", None), "pruning", None)
    if pruning is None or not pruning.blocks:
        return None
    with torch.inference_mode():
        policy = model.forward_with_decisions(images).block_policy
    return policy.float().mean(1).flatten(1)


def force_gates(model: VisionMamba, batch_size: int, keep: float) -> float:
    """Let the share `keep` of the batch run each scan direction, other images each time, whatever the gates' heads,
    which still run, say. Returns the share that runs."""
    method = next(method for method in model.site_methods if isinstance(method, DynamicPruning))
    learned, directions = method.direction_policy, len(model.layers[0].mixer.directions)
    count = model.depth * directions * batch_size
    gates = torch.zeros(count)
    gates[torch.randperm(count)[: round(keep * count)]] = 1.0
    gates = gates.view(model.depth, batch_size, directions).to(next(model.parameters()).device)
    method.direction_policy = lambda layer, column: learned(layer, column) * 0 + gates[layer]
    return float(gates.mean())
