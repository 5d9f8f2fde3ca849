"""The clock that a core runs at under load, which clouds do not tell: timed by a chain of instructions that must wait
for each other."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

# On x86 a 64-bit product takes 3 cycles since 2008, on aarch64 a sum takes 1.
_SOURCE = """
#if defined(__x86_64__)
#define STEP "imul %0, %0\\n\\t"
#define CYCLES 3
#elif defined(__aarch64__)
#define STEP "add %0, %0, %0\\n\\t"
#define CYCLES 1
#endif
long chain(long rounds) {
    unsigned long x = 3;
    for (long i = 0; i < rounds; i++)
        __asm__ volatile(STEP STEP STEP STEP STEP STEP STEP STEP STEP STEP : "+r"(x));
    return 10 * CYCLES * rounds;
}
"""
_ROUNDS = 400_000
_REPEATS = 7


def clock_hertz() -> float | None:
    """Cycles a second of one busy core, the fastest of several short trials; None without a C compiler, or on other
    processors than x86-64 and aarch64."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "chain.c"), Path(folder, "chain.so")
        source.write_text(_SOURCE, encoding="utf-8")
        command = [*compiler.split(), "-O1", "-shared", "-fPIC", "-o", str(library), str(source)]
        if subprocess.run(command, capture_output=True).returncode:
            return None
        chain = ctypes.CDLL(str(library)).chain
        chain.argtypes, chain.restype = [ctypes.c_long], ctypes.c_long
        found = []
        for _ in range(_REPEATS):
            start = time.perf_counter()
            cycles = chain(_ROUNDS)
            found.append(cycles / (time.perf_counter() - start))
    return max(found)
