"""The packages' C++ libraries, and how tensors are described to them.

A library is a plain shared object with a C interface, found beside its package and opened with ctypes. Each of its
functions takes the address of one struct of 64-bit integers: addresses, sizes, strides in elements, and the bits of
doubles. The structs are those of the package's `csrc/*_abi.h`: they are read from there, so that Python names fields
and never counts them, and a library says which headers it was built from.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

ISA_LEVELS = ("plain", "avx2", "avx512")
ENVIRONMENT_VARIABLE = "KERNEL_ISA"
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_libraries: list[ctypes.CDLL] = []

# --- structs ---------------------------------------------------------------------------------------------------------

_STRUCT = re.compile(r"^struct (\w+) \{\n(.*?)^\};", re.MULTILINE | re.DOTALL)
# a member function, on one line or up to a brace at its own depth
_FUNCTION = re.compile(r"^    [^\n;]*\([^\n]*\{(?:[^\n]*\}\n|\n.*?^    \}\n)", re.MULTILINE | re.DOTALL)
_FIELD = re.compile(r"(\w+)(?:\[(\d+)\])?")


def read_structs(headers: dict[str, str]) -> dict[str, type[ctypes.Structure]]:
    """The structs of `headers`, text by name, as ctypes types whose fields have the names that they have there.

    Raises:
        ValueError: a field is neither of a struct before it nor an int64_t.
    """
    types: dict[str, type] = {"int64_t": ctypes.c_int64}
    ordered: dict[str, str] = {}

    def order(name: str) -> None:
        for included in re.findall(r'^#include "(\w+_abi\.h)"', headers[name], re.MULTILINE):
            order(included)
        ordered[name] = re.sub(r"//.*", "", headers[name])

    for name in headers:
        order(name)
    for text in ordered.values():
        for name, body in _STRUCT.findall(text):
            types[name] = type(name, (ctypes.Structure,), {"__slots__": (), "_fields_": _fields(body, types)})
    return {name: found for name, found in types.items() if found is not ctypes.c_int64}


def _fields(body: str, types: dict[str, type]) -> list[tuple[str, type]]:
    fields = []
    for statement in _FUNCTION.sub("", body).split(";"):
        if statement.strip():
            kind, _, names = statement.strip().partition(" ")
            for name in names.split(","):
                found = _FIELD.fullmatch(name.strip())
                if kind not in types or found is None:
                    raise ValueError(f"{statement.strip()!r} is no field of 64-bit integers")
                fields.append((found[1], types[kind] * int(found[2]) if found[2] else types[kind]))
    return fields


# --- libraries -------------------------------------------------------------------------------------------------------


def _level(name: str) -> int:
    if name not in ISA_LEVELS:
        raise ValueError(f"instruction set is {name!r}, wanted one of {', '.join(ISA_LEVELS)}")
    return ISA_LEVELS.index(name)


_most = _level(os.environ.get(ENVIRONMENT_VARIABLE) or ISA_LEVELS[-1])


class Library:
    """The C++ library in a package's folder; `structs` has the types that its functions take, by name.

    Raises:
        ImportError: no library was built, or one from other headers.
    """

    def __init__(self, folder: Path):
        paths = sorted(path for path in folder.glob("_cpu*") if path.suffix in (".so", ".dylib", ".pyd"))
        if not paths:
            raise ImportError(f"no C++ library in {folder}: install the package again where a C++ compiler is at hand")
        headers = {path.name: path.read_bytes() for path in sorted(folder.glob("csrc/*_abi.h"))}
        self._library = ctypes.CDLL(str(paths[-1]))
        built_from = getattr(self._library, "kernel_abi", None)
        if built_from is not None:
            built_from.restype = ctypes.c_char_p
        if built_from is None or built_from().decode() != hashlib.sha256(b"".join(headers.values())).hexdigest():
            raise ImportError(f"{paths[-1]} is of another version: install the package again")
        self.structs = SimpleNamespace(**read_structs({name: text.decode() for name, text in headers.items()}))
        self._library.kernel_isa(_most)
        _libraries.append(self._library)

    def call(self, function: str, arguments: ctypes.Structure) -> int:
        """Hand `arguments` to a function of the library; returns its code, 0 or one of its own above 1.

        Raises:
            MemoryError: the function found no memory to work in.
        """
        code = getattr(self._library, function)(ctypes.byref(arguments))
        if code == 1:
            raise MemoryError("no memory for a kernel's working buffers")
        return code


class Call(NamedTuple):
    """A call of a library's function that is to be made, with what has to live until then."""

    library: Library
    function: str
    arguments: ctypes.Structure
    alive: Any

    def __call__(self) -> int:
        return self.library.call(self.function, self.arguments)


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


# --- what structs hold -----------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def bits(value: float) -> int:
    """The bits of a double as an integer."""
    return struct.unpack("q", struct.pack("d", value))[0]


def signal(x: Tensor) -> tuple[int, ...]:
    """(batch, dim, seqlen) tensor -> address, dtype, strides."""
    return x.data_ptr(), DTYPE_CODES[x.dtype], *x.stride()


def tokens_of(x: Tensor) -> tuple[int, int, int]:
    """(batch, tokens, dim) tensor with stride 1 along dim -> address, other strides."""
    return x.data_ptr(), x.stride(0), x.stride(1)
