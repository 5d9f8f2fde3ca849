"""Memory of this process: its peak, and that it keeps what it frees."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

# of glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_SAY = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES"}


def keep_freed_memory() -> bool:
    """Have glibc's allocator keep what is freed for what is allocated next; whether it will.

    By itself it hands large blocks, and the end of the heap, back to the system, which gives them out again page by
    page, each of them cleared: a training step on a CPU frees what the next one needs, and a tenth of its time can go
    there. The peak stays what it is. What the user has set stays, too; other allocators are left alone.
    """
    if not sys.platform.startswith("linux") or os.environ.keys() & _SAY:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # older releases take no more than 32 MiB for blocks; -1: never trimmed
    blocks = mallopt(_MMAP_THRESHOLD, 1 << 30) or mallopt(_MMAP_THRESHOLD, 32 << 20)
    return bool(blocks and mallopt(_TRIM_THRESHOLD, -1))


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new peak on a CUDA device; a CPU process has only one, from its start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory in MiB: allocated on `device` since the last reset, or this process's peak resident set on a CPU (0
    where the system does not say)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
