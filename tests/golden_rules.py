"""The rules by which the golden files were made: weights by name, images by seed."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"


def load(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the arrays of one golden file."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(np.asarray(file[key])) for key in file.files if key != "config"}
        return json.loads(str(file["config"])), arrays


def fill(name: str, shape: tuple[int, ...], salt: int) -> Tensor:
    """The value of a named parameter."""
    generator = np.random.Generator(np.random.PCG64([zlib.crc32(name.encode()), salt]))
    x = generator.standard_normal(shape).astype(np.float32)
    last = name.split(".")[-1]
    if last in ("A_log", "A_b_log"):
        x = np.log(np.arange(1, shape[-1] + 1, dtype=np.float32)) + 0.1 * x
    elif name.endswith((".dt_proj.bias", ".dt_proj_b.bias")):
        x = x - 4
    elif last in ("D", "D_b"):
        x = 1 + 0.1 * x
    elif last in ("pos_embed", "cls_token", "decoder_pos_embed", "mask_token"):
        x = 0.2 * x
    elif name.endswith("bias"):
        x = 0.1 * x
    elif len(shape) == 1:
        x = 1 + 0.1 * x
    else:
        x = x / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))


def fill_model(model: nn.Module, salt: int) -> nn.Module:
    """Give every tensor of the state dict its golden value."""
    state = {name: fill(name, tuple(value.shape), salt) for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    return model


def images(shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal values by seed."""
    generator = np.random.Generator(np.random.PCG64([9001, seed]))
    return torch.from_numpy(generator.standard_normal(tuple(shape)).astype(np.float32))


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest wanted value."""
    return float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-12))
