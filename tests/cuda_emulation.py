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
from functools import cache, lru_cache
from pathlib import Path

from causal_conv1d import _nvrtc

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
        *include,
        f"-DKERNEL_ARGUMENTS={arguments}",
        "-x",
        "c++",
        str(path),
        "-o",
        str(built),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise _nvrtc.CompileError(f"{path.name} <{arguments}> does not compile for the emulator:\n{result.stderr}")
    library = ctypes.CDLL(str(built))
    library.emulate.restype = ctypes.c_char_p
    library.emulate.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int] * 4, ctypes.c_longlong, ctypes.c_int]
    return library


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

    def kernel(self, path: Path, arguments: str, threads: int):
        library = _library(path, arguments)
        kernel = ctypes.cast(getattr(library, path.stem), ctypes.c_void_p)

        def launch(grid: tuple[int, int, int], params: bytes, dynamic_bytes: int = 0) -> None:
            self.launched.append((path.stem, arguments))
            error = library.emulate(kernel, params, *grid, threads, dynamic_bytes, self.order)
            if error is not None:
                raise RuntimeError(f"{path.stem} <{arguments}>: {error.decode()}")

        return launch
