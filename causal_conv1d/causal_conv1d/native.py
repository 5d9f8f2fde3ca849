"""Loading of the packages' C++ libraries and the layout of what is handed to them.

A library is a plain shared object with a C interface, found beside its package and opened with ctypes. Each of its
functions takes the address of one struct of 64-bit integers: addresses, sizes, and strides in elements.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

ISA_LEVELS = ("plain", "avx2", "avx512")
ENVIRONMENT_VARIABLE = "KERNEL_ISA"
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_libraries: list[ctypes.CDLL] = []


def _level(name: str) -> int:
    if name not in ISA_LEVELS:
        raise ValueError(f"instruction set is {name!r}, wanted one of {', '.join(ISA_LEVELS)}")
    return ISA_LEVELS.index(name)


_most = _level(os.environ.get(ENVIRONMENT_VARIABLE) or ISA_LEVELS[-1])


def load_library(package_file: str, struct_sizes: dict[str, int]) -> ctypes.CDLL:
    """The C++ library beside `package_file`.

    Args:
        package_file: `__file__` of a module in the package's folder.
        struct_sizes: function name -> number of 64-bit fields that it must say its arguments have.

    Raises:
        ImportError: no library was built, or one of another version.
    """
    folder = Path(package_file).resolve().parent
    paths = sorted(path for path in folder.glob("_cpu*") if path.suffix in (".so", ".dylib", ".pyd"))
    if not paths:
        raise ImportError(f"no C++ library in {folder}: install the package again where a C++ compiler is at hand")
    library = ctypes.CDLL(str(paths[-1]))
    for name, fields in struct_sizes.items():
        function = getattr(library, name, None)
        if function is None or function() != 8 * fields:
            raise ImportError(f"{paths[-1]} is of another version: install the package again")
    library.kernel_isa(_most)
    _libraries.append(library)
    return library


@contextmanager
def isa(name: str) -> Iterator[str]:
    """Run the C++ kernels with at most this instruction set ("plain", "avx2", "avx512"); gives the one in force."""
    global _most
    previous, _most = _most, _level(name)
    try:
        yield ISA_LEVELS[min((library.kernel_isa(_most) for library in _libraries), default=_most)]
    finally:
        _most = previous
        for library in _libraries:
            library.kernel_isa(_most)


def call(function, fields: Sequence[int]) -> int:
    """Hand `fields` to a library function; returns its code, 0 or one of its own above 1.

    Raises:
        MemoryError: the function found no memory to work in.
    """
    code = function((ctypes.c_int64 * len(fields))(*fields))
    if code == 1:
        raise MemoryError("no memory for a kernel's working buffers")
    return code


ABSENT_SIGNAL = (0, 0, 0, 0, 0)


def signal(x: Tensor | None) -> tuple[int, ...]:
    """(batch, dim, seqlen) tensor -> address, dtype, strides."""
    return ABSENT_SIGNAL if x is None else (x.data_ptr(), DTYPE_CODES[x.dtype], *x.stride())


def channel_last(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """`x` (batch, tokens, dim), copied only if its stride along dim is not 1, and its address and other strides."""
    x = x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()
    return x, (x.data_ptr(), x.stride(0), x.stride(1))


def address(x: Tensor | None) -> int:
    """Address of a contiguous float32 tensor; 0 for None."""
    return 0 if x is None else x.data_ptr()
