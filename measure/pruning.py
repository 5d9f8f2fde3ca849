"""What learned pruning keeps and saves."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from fusion.dynamic_pruning import DecisionMeter
from measure import against
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
    method = model.site_methods[0]
    learned, directions = method.direction_policy, len(model.layers[0].mixer.directions)
    count = model.depth * directions * batch_size
    gates = torch.zeros(count)
    gates[torch.randperm(count)[: round(keep * count)]] = 1.0
    gates = gates.view(model.depth, batch_size, directions).to(next(model.parameters()).device)
    method.direction_policy = lambda layer, column: learned(layer, column) * 0 + gates[layer]
    return float(gates.mean())


def report(
    meter: DecisionMeter,
    teacher: VisionMamba,
    images: Tensor,
    autocast: against.Autocast = contextlib.nullcontext,
    seconds: float = 5.0,
) -> list[str]:
    """What pruning does, in lines for a reader: kept shares from `meter`, whose model is the student; speed of student
    and teacher on `images` (B, C, H, W); multiply-adds of an image at the input's size."""
    config, lines = meter.model.methods.pruning, []
    if meter.tokens is not None:
        kept = ", ".join(f"{share:.3f}" for share in meter.tokens.tolist())
        wanted = ", ".join(f"{ratio:.3f}" for ratio in config.token_ratio)
        lines.append(f"Kept tokens, stage by stage: {kept} (wanted {wanted})")
    ran = meter.directions
    if ran is not None:
        lines.append(f"Scan directions that ran: {float(ran.mean()):.3f} (wanted {config.block_keep_ratio:.3f})")
    return lines + against.report(meter.model, teacher, images, autocast, seconds, ran)
