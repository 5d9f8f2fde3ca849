"""The one place that chooses which implementation of an operator runs.

A *kernel set* is a module (or any object) whose attributes are an operator package's kernels, all with the same
signatures. Each package keeps one `Backends` table and asks it for a kernel set at every call:

| name | device | what |
|---|---|---|
| `cuda` | cuda | CUDA C++ compiled at first use |
| `cpp` | cpu | the C++ library built at install time |
| `torch` | any | vectorised torch operations; always there |

The first that loads is taken; if a faster one fails to load, one warning says why and the next is used.
`use("torch")`, or `KERNEL_BACKEND=torch` in the environment, forces one by name.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

NAMES = ("auto", "cuda", "cpp", "torch")
ENVIRONMENT_VARIABLE = "KERNEL_BACKEND"
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _checked(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"kernel backend is {name!r}, wanted one of {', '.join(NAMES)}")
    return name


_forced = _checked(os.environ.get(ENVIRONMENT_VARIABLE, "auto") or "auto")


@contextmanager
def use(name: str) -> Iterator[None]:
    """Force one backend ("cuda", "cpp", "torch"; "auto" restores the choice) inside a `with` block, process-wide.

    A forced backend that cannot run on a tensor's device is passed over for "torch"; one that fails to load raises.
    """
    global _forced
    previous, _forced = _forced, _checked(name)
    try:
        yield
    finally:
        _forced = previous


class Backends:
    """The kernel sets of one package, best first for each device type.

    Args:
        package: the package's name, for messages.
        fallback: the kernel set that runs on every device and dtype.
    """

    def __init__(self, package: str, fallback: Any):
        self.package = package
        self.fallback = fallback
        self._loaders: dict[str, tuple[str, Callable[[], Any]]] = {}
        self._loaded: dict[str, Any] = {}

    def add(self, name: str, device_type: str, load: Callable[[], Any]) -> None:
        """Register backend `name` for `device_type`; `load()` returns its kernel set or raises the reason it cannot."""
        self._loaders[device_type] = (_checked(name), load)

    def available(self, device_type: str) -> str:
        """Name of the backend that runs on `device_type` when none is forced."""
        name, _ = self._loaders.get(device_type, ("torch", None))
        return "torch" if self._load(device_type) is self.fallback else name

    def pick(self, tensor: torch.Tensor) -> Any:
        """Kernel set for operators whose first argument is `tensor`."""
        if _forced == "torch" or tensor.dtype not in KERNEL_DTYPES:
            return self.fallback
        device_type = tensor.device.type
        if _forced != "auto":
            return self._load_forced(device_type)
        return self._loaded.get(device_type) or self._load(device_type)

    def has(self, tensor: torch.Tensor, function: str) -> bool:
        """Whether the kernel set for `tensor` has `function`, which not all have. Not while a graph is exported, whose
        reader knows the plain operators only, nor under a transform of `torch.func`, which knows none."""
        exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
        if torch.jit.is_tracing() or exporting():
            return False
        if torch.compiler.is_compiling():
            _load_before_compiling(self, tensor.device.type)
        elif torch._C._are_functorch_transforms_active():
            return False
        return hasattr(self.pick(tensor), function)

    def _load(self, device_type: str) -> Any:
        if device_type not in self._loaded:
            name, load = self._loaders.get(device_type, ("torch", lambda: self.fallback))
            try:
                self._loaded[device_type] = load()
            except Exception as error:
                message = f"{self.package}: no {name} kernels ({error}); using the slower torch path"
                warnings.warn(message, RuntimeWarning, stacklevel=2)
                self._loaded[device_type] = self.fallback
        return self._loaded[device_type]

    def _load_forced(self, device_type: str) -> Any:
        name, load = self._loaders.get(device_type, ("torch", None))
        return load() if name == _forced else self.fallback


@torch.compiler.assume_constant_result
def _load_before_compiling(backends: Backends, device_type: str) -> str:
    """Load the kernel set for a kind of device, which a compiler cannot follow."""
    return backends.available(device_type)
