"""Peak memory, by two meters: of what a call allocates, within any process, and of a whole process that is fresh.

The first is exact and sees torch's tensors alone. The second also sees what a kernel takes from the system by itself.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from measure.timing import synchronize
from utils import RunError

Call = Callable[[], Any]
ROOT = Path(__file__).resolve().parents[1]


def size_of(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of `tensors`, those that share their memory counted once and None not at all."""
    held = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())


# ---------------------------------------------------------------------------------------------------------------------
# Within a process


def peak_memory(call: Call, device: torch.device, resident: Iterable[Tensor] = ()) -> int:
    """Bytes in use at the peak of `call()`: `resident` tensors, which are there before, and what the call allocates.

    On a CPU every allocation of torch's is traced, so the figure is exact and leaves out the interpreter and the
    allocator's reserves; on CUDA it is torch's own count.
    """
    held = size_of(resident)
    if device.type == "cuda":
        before = bytes_in_use(device)
        return held + peak_in_use(call, device) - before
    return held + max(0, 0, *_running_totals(call))


def _running_totals(call: Call) -> list[int]:
    """Bytes allocated less bytes freed on the CPU since `call()` began, after each allocation or release."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would write to stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profile.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    totals = [0]
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        if event["args"]["Device Type"] == 0:
            totals.append(totals[-1] + event["args"]["Bytes"])
    return totals


# ---------------------------------------------------------------------------------------------------------------------
# A whole process


def bytes_in_use(device: torch.device) -> int:
    """Bytes in use now: allocated by torch on CUDA, this process's resident memory on a CPU.

    Raises RunError where the system does not say (`/proc`, which Linux has).
    """
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        return torch.cuda.memory_allocated(device)
    return _resident("VmRSS")


def peak_in_use(call: Call, device: torch.device) -> int:
    """Bytes in use at the peak of `call()`, what was there before it included, as `bytes_in_use` counts.

    On a CPU this is for functions run by `in_fresh_process`: what others left to the allocator would go unseen.
    """
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):  # the peak begins anew; where that is not allowed, it is the whole process's
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    call()
    return _resident("VmHWM")


def _resident(field: str) -> int:
    # getrusage's peak is no use here: it starts with that of the process that started this one
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        raise RunError("Resident memory is read from /proc/self/status, which this system does not have.") from None


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function(*arguments)` returns when a process of its own calls it, which hands freed memory back at once.

    `function` is one of a module; arguments and result are what JSON can hold. The number of threads is this process's.
    Raises RunError if it fails.
    """
    module = function.__module__
    if module == "__main__":  # a command that was started as `python -m`
        module = sys.modules["__main__"].__spec__.name
    job = json.dumps([module, function.__qualname__, torch.get_num_threads(), arguments])
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-m", "measure.memory", job], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise RunError(f"A process for measuring memory ended with exit code {done.returncode}: {''.join(last)}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    _module, _name, _threads, _arguments = json.loads(sys.argv[1])
    torch.set_num_threads(_threads)
    print(json.dumps(getattr(importlib.import_module(_module), _name)(*_arguments)))
