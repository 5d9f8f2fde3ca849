"""The C++ kernels on aarch64 without such a machine: compiled by a cross compiler, run under an emulator, looked at.

    python -m benchmarks.aarch64                  # wants g++-aarch64-linux-gnu and qemu-user-static of Debian
    python -m benchmarks.aarch64 --loops          # and every innermost loop that calculates, with its instructions

Scan, convolution, product, norm, the mixer's one call, the gate behind pooled lines and merging are linked with
`aarch64_check.cpp`, which holds them to loops in double precision. Then the machine code is read: a loop that
calculates in single numbers, and in no vectors, is told. Nothing is installed, and an emulator's time says nothing.
Exit code 1 if a check failed.
"""

from __future__ import annotations

import collections
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.command import command, parser
from utils import RunError, UsageError

ROOT = Path(__file__).resolve().parent.parent
SCAN, CONV = ROOT / "mamba-1p1p1/mamba_ssm/csrc", ROOT / "causal_conv1d/causal_conv1d/csrc"
SOURCES = (
    *(SCAN / f"{name}.cpp" for name in ("scan", "gemm", "norm", "mixers", "visible", "merging")),
    CONV / "conv1d.cpp",
)
COMPILER, EMULATOR, DISASSEMBLER = "aarch64-linux-gnu-g++", "qemu-aarch64-static", "aarch64-linux-gnu-objdump"
PACKAGES = "gcc-aarch64-linux-gnu g++-aarch64-linux-gnu qemu-user-static"
# as setup.py of both packages has them
OPTIONS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-w")

_FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")
_INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\s+(\S+)\s*(.*)$")
_ARITHMETIC = re.compile(r"f(n?m(add|sub|ul|la|ls)|(add|sub|div|max|min)(p|nm)?|sqrt|recp[es])")


@dataclass
class Loop:
    """An innermost loop of a function: how often each instruction stands in it, and which of them calculate."""

    function: str
    instructions: collections.Counter[str]
    vectors: int
    singles: int

    def __str__(self) -> str:
        told = ", ".join(f"{count} {name}" for name, count in self.instructions.most_common())
        return f"{self.function}: {self.vectors} on vectors, {self.singles} on single numbers; {told}"


def missing() -> list[str]:
    """The programs that are wanted and not here."""
    return [name for name in (COMPILER, EMULATOR, DISASSEMBLER) if shutil.which(name) is None]


def loops(disassembly: str) -> Iterator[Loop]:
    """The innermost loops that calculate with floats, of objdump's `disassembly`."""
    name, body = "", []
    for line in [*disassembly.splitlines(), "0 <end>:"]:
        if found := _FUNCTION.match(line):
            yield from _loops_of(name, body)
            name, body = found[1].partition("(")[0], []
        elif found := _INSTRUCTION.match(line):
            body.append((int(found[1], 16), found[2], found[3]))


def _loops_of(name: str, body: list[tuple[int, str, str]]) -> Iterator[Loop]:
    spans = []
    for address, what, operands in body:
        target = re.search(r"\b([0-9a-f]+) <", operands)
        jumps = what.startswith(("b", "cb", "tb")) and not what.startswith(("bl", "br", "bi", "bf"))
        if target and jumps and body[0][0] <= int(target[1], 16) <= address:
            spans.append((int(target[1], 16), address))
    for first, last in sorted(set(spans)):
        if any((a, b) != (first, last) and first <= a and b <= last for a, b in spans):
            continue
        inside = [(what, operands) for address, what, operands in body if first <= address <= last]
        calculating = [operands for what, operands in inside if _ARITHMETIC.fullmatch(what)]
        vectors = sum(operands.startswith("v") for operands in calculating)
        if calculating:
            counted = collections.Counter(what for what, _ in inside)
            yield Loop(name, counted, vectors, len(calculating) - vectors)


def tell(program: list[str | Path]) -> subprocess.CompletedProcess[str]:
    """Run a program; its output is kept."""
    return subprocess.run([str(part) for part in program], capture_output=True, text=True)


def compiled(folder: Path) -> list[Path]:
    """The objects of all sources and the check, in `folder`."""
    objects = []
    for source in (*SOURCES, Path(__file__).with_name("aarch64_check.cpp")):
        target = folder / f"{source.stem}.o"
        # every library has this function of its own
        own = f"-Dkernel_isa=kernel_isa_{source.stem}"
        done = tell([COMPILER, *OPTIONS, own, f"-I{SCAN}", f"-I{CONV}", "-c", source, "-o", target])
        if done.returncode:
            raise RunError(f"{source.name} does not compile: {done.stderr.strip().splitlines()[0]}")
        objects.append(target)
    return objects


@command("benchmarks.aarch64")
def main(argv: Sequence[str] | None = None) -> int:
    """Compile, run, and read the machine code."""
    flags = parser("benchmarks.aarch64", __doc__)
    flags.add_argument("--loops", action="store_true", help="list every innermost loop that calculates")
    args = flags.parse_args(argv)
    if lacking := missing():
        raise UsageError(f"There is no {', '.join(lacking)} here; Debian has them in {PACKAGES}.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        objects, check = compiled(folder), folder / "check"
        linked = tell([COMPILER, "-static", *objects, "-o", check, "-ldl", "-lpthread", "-w"])
        if linked.returncode:
            raise RunError(f"The check does not link: {linked.stderr.strip().splitlines()[-1]}")
        checked = tell([EMULATOR, check])
        print(checked.stdout, end="")
        read = tell([DISASSEMBLER, "-d", "-C", "--no-show-raw-insn", *objects[: len(SOURCES)]])
    found = list(loops(read.stdout))
    single = [loop for loop in found if not loop.vectors]
    print(f"\n{len(found)} innermost loops calculate, {len(single)} of them in single numbers only:")
    for loop in found if args.loops else single:
        print(f"  {loop}")
    return int(checked.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
