"""What the CUDA kernels take on each architecture: registers, spills, shared memory, blocks on a multiprocessor.

    python -m benchmarks.cuda_kernels
    python -m benchmarks.cuda_kernels --targets sm_90 --dtypes float32

Everything is compiled by NVRTC, as on a GPU's first use; neither a GPU nor a driver is needed. Blocks are how many one
multiprocessor holds at once, by what limits them first: registers, shared memory, threads or their number.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from causal_conv1d import _nvrtc
from causal_conv1d._reduce import SOURCE as REDUCE_SOURCE
from causal_conv1d.kernels.cuda import convolution
from mamba_ssm.kernels.cuda import merging, norm, pooled, scan

from benchmarks.command import command, parser

DTYPES = {"float32": "float", "bfloat16": "BFloat16", "float16": "Float16"}
TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


class Multiprocessor(NamedTuple):
    """What a multiprocessor has (CUDA C++ programming guide, technical specifications per compute capability)."""

    shared: int  # bytes
    reserved: int  # bytes of those that every block takes beside its own
    threads: int
    blocks: int


MULTIPROCESSORS = {
    "sm_75": Multiprocessor(64 << 10, 0, 1024, 16),
    "sm_80": Multiprocessor(164 << 10, 1 << 10, 2048, 32),
    "sm_86": Multiprocessor(100 << 10, 1 << 10, 1536, 16),
    "sm_89": Multiprocessor(100 << 10, 1 << 10, 1536, 24),
    "sm_90": Multiprocessor(228 << 10, 1 << 10, 2048, 32),
    "sm_100": Multiprocessor(228 << 10, 1 << 10, 2048, 32),
    "sm_120": Multiprocessor(100 << 10, 1 << 10, 1536, 24),
}
REGISTERS, WARP_STEP = 65536, 256  # of a multiprocessor, and how many a warp is given at once


class Job(NamedTuple):
    """A kernel to compile: threads of a block, and bytes of shared memory that it is launched with."""

    path: Path
    arguments: str
    threads: int
    dynamic: int = 0


def kernel_list(dtypes: Sequence[str] = tuple(DTYPES)) -> list[Job]:
    """Every kernel a Vim, FastVim or a model of its width can need at d_state 16, one dtype per tensor."""
    jobs = []
    for name in (DTYPES[dtype] for dtype in dtypes):
        types = ",".join([name] * 4)
        jobs += [Job(scan.FORWARD_SOURCE, f"{types},4,{channels},4", scan.THREADS) for channels in (1, 2, 4)]
        for lanes, channels in ((4, 1), (4, 2), (16, 2), (32, 2)):
            shared = scan.backward_shared_bytes(lanes, channels)
            jobs.append(Job(scan.BACKWARD_SOURCE, f"{types},{lanes},{channels},4", scan.THREADS, shared))
        for backwards in ("false", "true"):
            jobs.append(Job(scan.STATES_SOURCE, f"{types},4,{backwards},4", scan.THREADS))
        for source in (norm.FORWARD_SOURCE, norm.BACKWARD_SOURCE):
            jobs += [
                Job(source, f"{name},float,float,float,{norm.layout_arguments(size, 4)}", norm.THREADS)
                for size in (192, 768, 1280)
            ]
        for source in (convolution.FORWARD_SOURCE, convolution.BACKWARD_SOURCE):
            jobs += [Job(source, f"{name},float,4,4{masked}", convolution.THREADS) for masked in ("", ",true")]
        jobs.append(Job(pooled.CONV_SOURCE, f"{name},float,4,4", pooled.THREADS))
        jobs += [
            Job(pooled.GATE_SOURCE, f"{name},float,{norm.layout_arguments(size, 4)}", pooled.THREADS)
            for size in (384, 1536, 2560)
        ]
        jobs.append(Job(merging.PAIRS_SOURCE, name, merging.THREADS))
        jobs += [Job(each, f"{name},4", merging.THREADS) for each in (merging.FORWARD_SOURCE, merging.BACKWARD_SOURCE)]
    jobs += [Job(scan.CARRY_SOURCE, backwards, scan.THREADS) for backwards in ("false", "true")]
    return [*jobs, Job(merging.ARRANGE_SOURCE, "", merging.THREADS), Job(REDUCE_SOURCE, "10", 256)]


def blocks_per_multiprocessor(usage: _nvrtc.Usage, job: Job, target: str) -> int | None:
    """How many blocks a multiprocessor holds at once; None if it is not known what it has."""
    has = MULTIPROCESSORS.get(target)
    if has is None:
        return None
    warps = -(-job.threads // 32)
    registers = -(-usage.registers * 32 // WARP_STEP) * WARP_STEP * warps
    shared = usage.shared + job.dynamic + has.reserved
    by_shared = has.shared // shared if shared else has.blocks
    return min(REGISTERS // registers, by_shared, has.threads // (32 * warps), has.blocks)


def resources(targets: Sequence[str], dtypes: Sequence[str] = tuple(DTYPES)) -> list[dict[str, object]]:
    """What every kernel takes on each target, and how long it takes to compile."""

    def one(given: tuple[Job, str]) -> dict[str, object]:
        job, target = given
        start = time.perf_counter()
        usage = _nvrtc.resource_usage(_nvrtc.compile_kernel(job.path, job.arguments, target).report)
        seconds = round(time.perf_counter() - start, 2)
        return {
            "kernel": job.path.stem,
            "arguments": job.arguments,
            "target": target,
            **usage._asdict(),
            "dynamic": job.dynamic,
            "blocks": blocks_per_multiprocessor(usage, job, target),
            "compile_s": seconds,
        }

    with ThreadPoolExecutor(min(_nvrtc.COMPILERS, os.cpu_count() or 1)) as pool:
        return list(pool.map(one, [(job, target) for job in kernel_list(dtypes) for target in targets]))


def table(rows: Sequence[dict[str, object]]) -> list[str]:
    """The lines of a Markdown table: a row a kernel, a column a target."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    lines = [
        f"| kernel | template arguments | shared, bytes | {' | '.join(targets)} |",
        f"|{'---|' * (3 + len(targets))}",
    ]
    for kernel, arguments in dict.fromkeys((row["kernel"], row["arguments"]) for row in rows):
        same = [row for row in rows if (row["kernel"], row["arguments"]) == (kernel, arguments)]
        shared = same[0]["shared"] + same[0]["dynamic"]
        cells = []
        for row in same:
            spills = row["spill_stores"] + row["spill_loads"]
            cells.append(f"{row['registers']}, {row['blocks']}" + (f", spills {spills} B" if spills else ""))
        lines.append(f"| {kernel} | `{arguments}` | {shared:,} | {' | '.join(cells)} |")
    return lines


@command("benchmarks.cuda_kernels")
def main(argv: Sequence[str] | None = None) -> None:
    """Print the table: registers, blocks on a multiprocessor and, if there are any, bytes of spills."""
    found = parser("benchmarks.cuda_kernels", __doc__)
    found.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    found.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    options = found.parse_args(argv)
    print("\n".join(table(resources(options.targets, options.dtypes))))


if __name__ == "__main__":
    sys.exit(main())
