"""Runs the CUDA kernel sets on CPU tensors, through `cuda_emulator.h` and a C++ compiler.

Only the compiler and the launch are replaced: the sources are the same, and so is the host code with its grids, strides
and buffers. `missing()` says why there can be no emulation where there is no suitable compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from functools import cache, lru_cache
from pathlib import Path

import torch
from causal_conv1d import _nvrtc
from causal_conv1d.ops.convolution import OPERATORS as conv_operators
from mamba_ssm.ops.operators import OPERATORS as mamba_operators
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

EMULATOR = Path(__file__).parent / "cuda_emulator.h"
FLAGS = (
    "-std=c++17",
    "-O1",
    "-march=native",
    "-fPIC",
    "-shared",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Werror",
)
# Misaligned vectors, out-of-range shifts and indices end in an error, without a sanitizer's runtime.
TRAPS = ("-fsanitize=alignment,bounds,shift,signed-integer-overflow", "-fsanitize-undefined-trap-on-error")
# With AddressSanitizer, whose library must be there before Python starts: scripts/asan_cuda.sh.
SANITIZE_VARIABLE = "CUDA_EMULATOR_SANITIZE"
SANITIZED = ("-g", "-fsanitize=address", "-fno-omit-frame-pointer") if os.environ.get(SANITIZE_VARIABLE) else ()


@lru_cache(maxsize=1)
def _build_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="cuda-emulation-"))


def missing() -> str | None:
    """Why kernels cannot be emulated here, or None."""
    if shutil.which("g++") is None:
        return "no g++"
    probe = subprocess.run(["g++", "-E", "-x", "c++", str(EMULATOR), "-o", os.devnull], capture_output=True, text=True)
    return None if probe.returncode == 0 else probe.stderr.strip().splitlines()[-1]


@cache
def _library(path: Path, arguments: str) -> ctypes.CDLL:
    name = f"{path.stem}-{hashlib.sha256(arguments.encode()).hexdigest()[:16]}.so"
    built = _build_folder() / name
    include = [f"-I{folder}" for folder in (EMULATOR.parent, path.parent, _nvrtc.SHARED_SOURCES)]
    command = [
        "g++",
        *FLAGS,
        *TRAPS,
        *SANITIZED,
        *include,
        f"-DKERNEL_ARGUMENTS={arguments}",
        "-x",
        "c++",
        str(path),
        "-o",
        str(built),
    ]
    # the compiler itself runs without what is loaded before Python
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode != 0:
        raise _nvrtc.CompileError(f"{path.name} <{arguments}> does not compile for the emulator:\n{result.stderr}")
    library = ctypes.CDLL(str(built))
    library.emulate.restype = ctypes.c_char_p
    library.emulate.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int] * 4, ctypes.c_longlong, ctypes.c_int]
    return library


KERNELS = {
    f"{namespace}::{name}": kernel
    for namespace, operators in (("causal_conv1d", conv_operators), ("mamba_ssm", mamba_operators))
    for name, kernel in operators.kernels.items()
}


class EmulatedDevice:
    """Stands in for `_nvrtc.Device`.

    Args:
        multiprocessors: how large a device the host code believes in; it sizes grids and splits sequences by it.
        order: in which order threads take their turns; results must not depend on it.
    """

    target = "emulated"

    def __init__(self, multiprocessors: int = 4, order: int = 0):
        self.multiprocessors = multiprocessors
        self.order = order
        self.launched: list[tuple[str, str]] = []
        self.prepared: list[tuple[Path, str]] = []

    def kernel(self, path: Path, arguments: str, threads: int):
        library = _library(path, arguments)
        kernel = ctypes.cast(getattr(library, path.stem), ctypes.c_void_p)

        def launch(grid: tuple[int, int, int], params: bytes, dynamic_bytes: int = 0) -> None:
            self.launched.append((path.stem, arguments))
            error = library.emulate(kernel, params, *grid, threads, dynamic_bytes, self.order)
            if error is not None:
                raise RuntimeError(f"{path.stem} <{arguments}>: {error.decode()}")

        return launch

    def prepare(self, wanted: Iterable[tuple[Path, str]]) -> None:
        self.prepared += wanted


class Recorder(TorchDispatchMode):
    """Counts what torch would launch on a device, and what it would allocate there, while it is entered.

    Views cost neither. The operators of the kernel packages are looked into, and what they launch is counted by the
    device that they are given.
    """

    def __init__(self):
        super().__init__()
        self.launched: list[str] = []
        self.allocated = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace in ("mamba_ssm", "causal_conv1d"):
            with self, torch.no_grad():
                return KERNELS[func._schema.name](*args, **kwargs)
        result = func(*args, **kwargs)
        returned = [value for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
        if any(
            argument.alias_info is not None and not argument.alias_info.is_write for argument in func._schema.arguments
        ):
            return result  # a view
        given = {value.untyped_storage().data_ptr() for value in tree_leaves((args, kwargs)) if torch.is_tensor(value)}
        new = [value for value in returned if value.untyped_storage().data_ptr() not in given]
        self.allocated += sum(value.untyped_storage().nbytes() > 0 for value in new)
        works = (returned or func._schema.is_mutable) and "empty" not in func.name()
        if works and func.name() not in ("aten::detach", "aten::_unsafe_view"):
            self.launched.append(func.name().removeprefix("aten::"))
        return result
