"""What figures were measured on: one description, beside every table."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch
from causal_conv1d import native
from causal_conv1d.kernels.registry import backends as conv_backends
from mamba_ssm.kernels.registry import backends as scan_backends

# float32 numbers in a vector of each instruction set
LANES = {"none": 1, "plain": 4, "avx2": 8, "avx512": 16}


def processor() -> str:
    """The processor's name, and where Linux says them its family and model: clouds hide which of a maker's it is."""
    fields: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    if {"cpu family", "model"} <= fields.keys():
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name


def cores() -> int:
    """How many of the processor's cores, as the system counts them, this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def instruction_set() -> str:
    """The instructions that the C++ kernels use: the best of `plain`, `avx2`, `avx512` that the processor has, or the
    one that KERNEL_ISA asks for; `none` where the kernels are not built."""
    if "cpp" not in conv_backends.available("cpu"):
        return "none"
    with native.isa(os.environ.get(native.ENVIRONMENT_VARIABLE) or native.ISA_LEVELS[-1]) as level:
        return level


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, cores, instructions, threads, device, versions, and the kernels that `device` gets, by name."""
    probe = torch.empty(0, device=device)
    found = {
        "processor": processor(),
        "cores": cores(),
        "isa": instruction_set(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "scan": scan_backends.pick(probe).__name__.rpartition(".")[2],
        "convolution": conv_backends.pick(probe).__name__.rpartition(".")[2],
    }
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def in_words(about: dict[str, Any]) -> str:
    """What `machine` returned, in a line."""
    return ", ".join(f"{name} {value}" for name, value in about.items())
