"""Weights and settings as the Hugging Face hub keeps them: from a folder, or by name where the hub's library is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def _file(model_name: str, name: str) -> Path:
    """`name` of a folder, or of a model on the hub.

    Raises:
        FileNotFoundError: there is neither. ImportError: a name on the hub, and no library to ask it with.
    """
    folder = Path(model_name)
    if folder.is_dir():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}, wanted a model's folder")
        return folder / name
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        message = f"{model_name!r} is no folder, and to load it from the hub: pip install huggingface_hub"
        raise ImportError(message) from error
    return Path(hf_hub_download(model_name, name))


def load_config_hf(model_name: str) -> dict[str, Any]:
    """The settings in `config.json` of a folder, or of a model on the hub."""
    return json.loads(_file(model_name, "config.json").read_text(encoding="utf-8"))


def load_state_dict_hf(model_name: str, device=None, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The weights in `pytorch_model.bin` of a folder, or of a model on the hub; nothing in the file is run."""
    found = torch.load(_file(model_name, "pytorch_model.bin"), map_location="cpu", weights_only=True)
    return {name: tensor.to(device=device, dtype=dtype or tensor.dtype) for name, tensor in found.items()}
