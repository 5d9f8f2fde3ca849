"""The one place that chooses which implementation of an operator runs.

A *kernel set* is a module (or any object) whose attributes are an operator package's kernels, all with the same
signatures; those that it lacks, and would be faster with, are in its `MISSED`, with what they do in words. Each package
keeps one `Backends` table and asks it for a kernel set at every call:

| name | device | what |
|---|---|---|
| `cuda` | cuda | CUDA C++ compiled at first use |
| `cpp` | cpu | the C++ library built at install time |
| `torch` | any | vectorised torch operations; always there |

The first that loads is taken, for each device by itself; if a faster one fails to load, one warning says why and the
next is used.
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


# Why there are no kernels, as far as a warning has said so.
_told: set[str] = set()


def tell(kind: str, reason: Exception) -> None:
    """Warn that there are no kernels of a kind, and why: once, however many packages and operators meet the reason."""
    if str(reason) not in _told:
        _told.add(str(reason))
        warnings.warn(f"no {kind} kernels ({reason}); using the slower torch path", RuntimeWarning, stacklevel=3)


def tell_of(what: str) -> None:
    """Warn, once, that `what` has no kernel on a device that has others, so that torch's operations do it."""
    if what not in _told and not torch.compiler.is_compiling():
        _told.add(what)
        warnings.warn(f"no CUDA kernel for {what}; using the slower torch path", RuntimeWarning, stacklevel=3)


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
        self._loaders: dict[str, tuple[str, Callable[[int | None], Any]]] = {}
        self._loaded: dict[tuple[str, int | None], Any] = {}

    def add(self, name: str, device_type: str, load: Callable[[int | None], Any]) -> None:
        """Register backend `name` for `device_type`; `load(index)`, with the index of a device or None for torch's
        current one, returns its kernel set or raises the reason it cannot."""
        self._loaders[device_type] = (_checked(name), load)

    def available(self, device_type: str, index: int | None = None) -> str:
        """Name of the backend that runs on a device when none is forced."""
        name, _ = self._loaders.get(device_type, ("torch", None))
        return "torch" if self._load(device_type, index) is self.fallback else name

    def pick(self, tensor: torch.Tensor) -> Any:
        """Kernel set for operators whose first argument is `tensor`."""
        if _forced == "torch" or tensor.dtype not in KERNEL_DTYPES:
            return self.fallback
        device = tensor.device.type, tensor.device.index
        if _forced != "auto":
            return self._load_forced(*device)
        return self._loaded.get(device) or self._load(*device)

    def has(self, tensor: torch.Tensor, function: str) -> bool:
        """Whether the kernel set for `tensor` has `function`, which not all have. Not while a graph is exported, whose
        reader knows the plain operators only, nor under a transform of `torch.func`, which knows none."""
        exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
        if torch.jit.is_tracing() or exporting():
            return False
        if torch.compiler.is_compiling():
            _load_before_compiling(self, tensor.device.type, tensor.device.index)
        elif torch._C._are_functorch_transforms_active():
            return False
        kernels = self.pick(tensor)
        if hasattr(kernels, function):
            return True
        missed = getattr(kernels, "MISSED", {}).get(function)
        if missed is not None:
            tell_of(missed)
        return False

    def foretell(self, tensor: torch.Tensor, function: str, coming: Callable[[], tuple]) -> None:
        """Tell the kernel set for `tensor` what comes, by its `function(device index, *coming())`, if it wants to know:
        kernels can be compiled before they are asked for. Not while a graph is made."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return
        call = getattr(self.pick(tensor), function, None)
        if call is not None:
            call(tensor.device.index, *coming())

    def _load(self, device_type: str, index: int | None) -> Any:
        device = device_type, index
        if device not in self._loaded:
            name, load = self._loaders.get(device_type, ("torch", lambda index: self.fallback))
            try:
                self._loaded[device] = load(index)
            except Exception as error:
                tell("CUDA" if name == "cuda" else name, error)
                self._loaded[device] = self.fallback
        return self._loaded[device]

    def _load_forced(self, device_type: str, index: int | None) -> Any:
        name, load = self._loaders.get(device_type, ("torch", None))
        if name != _forced:
            return self.fallback
        device = device_type, index
        if self._loaded.get(device, self.fallback) is self.fallback:
            self._loaded[device] = load(index)
        return self._loaded[device]


@torch.compiler.assume_constant_result
def _load_before_compiling(backends: Backends, device_type: str, index: int | None) -> str:
    """Load the kernel set for a device, which a compiler cannot follow."""
    return backends.available(device_type, index)
