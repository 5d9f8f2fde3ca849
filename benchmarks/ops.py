"""Time and memory of the kernel packages' operators on a CPU, against peers, in one process.

    python -m benchmarks.ops                          # every size, two threads, a table
    python -m benchmarks.ops --sizes 8,384,197 --json ops.json --no-reference

Sizes are (batch, dim, seqlen), with 16 states; scans have D, z, delta_bias and softplus. Peers: the reference loop,
`mambapy`'s parallel scan if it can be imported, and `torch.exp` of as many numbers as the scan has states to step, in
cache and into memory that is there: about the least that the scan's exponentials can take. The convolution's peer is
`F.conv1d` and `F.silu`. All that belongs to a size is timed in turns, round by round, so that a machine that slows down
slows down all of it; a figure is the median, and the fastest round stands beside it. Extra memory is the peak of the
process over a forward and backward, less what was there before, less results and gradients, in units of `u` in float32.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from causal_conv1d import causal_conv1d_fn
from causal_conv1d.kernels.registry import backends as conv_backends
from mamba_ssm.kernels.registry import backends as scan_backends
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref
from torch import Tensor

SIZES = ("8,384,197", "8,768,197", "8,384,14", "1,384,4096", "64,128,64")
DSTATE = 16
WIDTH = 4
IN_CACHE = 1 << 17  # numbers: half a megabyte, in and out
SLOW_ROUNDS = 2  # of peers that take this long or longer:
SLOW_SECONDS = 0.2
Call = Callable[[], Any]


def timings(calls: dict[str, Call], rounds: int) -> dict[str, tuple[float, float]]:
    """(median, fastest) seconds of each call, in turns after a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    slow = set()
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        if time.perf_counter() - start > SLOW_SECONDS:
            slow.add(name)
    for number in range(rounds):
        for name, call in calls.items():
            if name in slow and number >= SLOW_ROUNDS:
                continue
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: (statistics.median(found), min(found)) for name, found in seconds.items()}


def scan_arguments(batch: int, dim: int, seqlen: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Arguments of a scan as a mixer makes them: channel-last, step sizes around 0.01."""
    generator = torch.Generator().manual_seed(0)

    def sequence(channels: int) -> Tensor:
        return torch.randn(batch, seqlen, channels, generator=generator).to(dtype).transpose(1, 2)

    tensors = {
        "u": sequence(dim),
        "delta": sequence(dim),
        "A": -torch.arange(1.0, DSTATE + 1).repeat(dim, 1),
        "B": sequence(DSTATE),
        "C": sequence(DSTATE),
        "D": torch.ones(dim),
        "z": sequence(dim),
        "delta_bias": torch.randn(dim, generator=generator) - 4,
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def mambapy_scan() -> Callable[..., Tensor] | None:
    """The scan as `mambapy` computes it; None if it cannot be imported."""
    try:
        pscan = importlib.import_module("mambapy.pscan").pscan
    except ImportError:
        return None

    def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        u, delta, B, C, z = (tensor.transpose(1, 2) for tensor in (u, delta, B, C, z))
        dt = F.softplus(delta + delta_bias)
        decays = torch.exp(dt.unsqueeze(-1) * A)
        states = pscan(decays, dt.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1))
        y = (states @ C.unsqueeze(-1)).squeeze(3) + D * u
        return (y * F.silu(z)).transpose(1, 2)

    return scan


def exponentials(count: int) -> Call:
    """`torch.exp` of `count` numbers."""
    numbers = -torch.rand(min(count, IN_CACHE))
    out, calls = torch.empty_like(numbers), max(1, round(count / numbers.numel()))

    def call() -> None:
        for _ in range(calls):
            torch.exp(numbers, out=out)

    return call


def forward_and_backward(fn: Call, inputs: Sequence[Tensor], dout: Tensor) -> Call:
    """A call of `fn` and the gradients of `inputs`."""
    return lambda: torch.autograd.grad(fn(), inputs, dout)


def without_gradients(fn: Call) -> Call:
    """`fn` under `torch.no_grad`."""

    def call() -> Any:
        with torch.no_grad():
            return fn()

    return call


def extra_memory(fn: Call, inputs: Sequence[Tensor], dout: Tensor) -> float | None:
    """Bytes that a forward and backward take at their peak beyond arguments, result and gradients; None if the system
    does not say. The process' own peak, so scratch memory outside torch is in it."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (status.is_file() and reset.exists()):
        return None

    def reading(field: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024

    torch.autograd.grad(fn(), inputs, dout)  # what is loaded and set up once is no part of it
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    try:
        reset.write_text("5")
    except OSError:
        return None
    before = reading("VmRSS")
    out = fn()
    grads = torch.autograd.grad(out, inputs, dout)
    peak = reading("VmHWM")
    results = sum(tensor.numel() * tensor.element_size() for tensor in (out, *grads))
    return max(0, peak - before - results)


def scan_rows(size: tuple[int, int, int], dtype: torch.dtype, rounds: int, reference: bool) -> dict[str, Any]:
    """Seconds of the scan and its peers at one size, and the scan's extra memory in units of u."""
    tensors = scan_arguments(*size, dtype)
    inputs = list(tensors.values())
    dout = torch.randn(size).transpose(1, 2).contiguous().transpose(1, 2).to(dtype)
    peers: dict[str, Callable[..., Tensor]] = {"selective_scan_fn": selective_scan_fn}
    if reference:
        peers["selective_scan_ref"] = selective_scan_ref
    if (peer := mambapy_scan()) is not None and dtype == torch.float32:
        peers["mambapy"] = peer
    calls: dict[str, Call] = {"torch.exp": exponentials(size[0] * size[1] * size[2] * DSTATE)}
    for name, fn in peers.items():
        run = lambda fn=fn: fn(**tensors, delta_softplus=True)  # noqa: E731
        calls[f"{name} forward"] = without_gradients(run)
        calls[f"{name} forward + backward"] = forward_and_backward(run, inputs, dout)
    run = lambda: selective_scan_fn(**tensors, delta_softplus=True)  # noqa: E731
    memory = extra_memory(run, inputs, dout)
    found: dict[str, Any] = {"seconds": timings(calls, rounds)}
    found["extra_memory_in_u"] = None if memory is None else memory / (4 * tensors["u"].numel())
    return found


def conv_rows(size: tuple[int, int, int], dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Seconds of the convolution with silu and of its peer, in the layout each likes best."""
    batch, dim, seqlen = size
    weight, bias = torch.randn(dim, WIDTH, requires_grad=True), torch.randn(dim, requires_grad=True)
    calls: dict[str, Call] = {}
    for layout in ("channel-last", "contiguous"):
        x = torch.randn(batch, seqlen, dim).to(dtype).transpose(1, 2)
        x = (x if layout == "channel-last" else x.contiguous()).requires_grad_()
        dout = torch.randn_like(x)
        run = lambda x=x: causal_conv1d_fn(x, weight, bias, "silu")  # noqa: E731
        calls[f"causal_conv1d_fn {layout} forward"] = without_gradients(run)
        calls[f"causal_conv1d_fn {layout} forward + backward"] = forward_and_backward(run, [x, weight, bias], dout)

    def peer(x: Tensor) -> Tensor:
        wide = F.conv1d(x, weight.unsqueeze(1).to(dtype), bias.to(dtype), padding=WIDTH - 1, groups=dim)
        return F.silu(wide[..., :seqlen])

    run = lambda: peer(x)  # noqa: E731
    calls["F.conv1d + F.silu forward"] = without_gradients(run)
    calls["F.conv1d + F.silu forward + backward"] = forward_and_backward(run, [x, weight, bias], dout)
    target = torch.empty_like(x)
    calls["copy of x"] = lambda: target.copy_(x.detach())
    return {"seconds": timings(calls, rounds)}


def ratios(scan: dict[str, Any], conv: dict[str, Any]) -> dict[str, float]:
    """The comparisons that matter, as ratios of medians."""
    seconds = {name: median for name, (median, _) in (scan["seconds"] | conv["seconds"]).items()}
    found = {"scan forward / torch.exp": seconds["selective_scan_fn forward"] / seconds["torch.exp"]}
    both = seconds["selective_scan_fn forward + backward"]
    for peer in ("selective_scan_ref", "mambapy"):
        if f"{peer} forward + backward" in seconds:
            found[f"{peer} / scan, forward + backward"] = seconds[f"{peer} forward + backward"] / both
    peer = seconds["F.conv1d + F.silu forward + backward"]
    for layout in ("channel-last", "contiguous"):
        own = seconds[f"causal_conv1d_fn {layout} forward + backward"]
        found[f"F.conv1d + F.silu / conv {layout}, forward + backward"] = peer / own
    if scan["extra_memory_in_u"] is not None:
        found["scan's extra memory / u"] = scan["extra_memory_in_u"]
    return found


def table(size: str, result: dict[str, Any]) -> str:
    """One size's figures as Markdown."""
    lines = [f"### ({size})", "", "| operator | median, ms | fastest, ms |", "|---|---|---|"]
    for part in ("scan", "conv"):
        for name, (median, fastest) in result[part]["seconds"].items():
            lines.append(f"| {name} | {median * 1e3:.3f} | {fastest * 1e3:.3f} |")
    lines += ["", "| ratio | |", "|---|---|"]
    lines += [f"| {name} | {value:.2f} |" for name, value in result["ratios"].items()]
    return "\n".join(lines) + "\n"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="BATCH,DIM,SEQLEN")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--no-reference", dest="reference", action="store_false", help="leave out selective_scan_ref: seconds a call"
    )
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    args = parser.parse_args(argv)
    for size in args.sizes:
        if len(size.split(",")) != 3 or not all(part.isdigit() and int(part) for part in size.split(",")):
            parser.error(f"--sizes has {size!r}; wanted three whole numbers above 0, as 8,384,197")
    if args.threads < 1 or args.rounds < 1:
        parser.error("--threads and --rounds must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write what was asked for."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    backends = {"scan": scan_backends.available("cpu"), "convolution": conv_backends.available("cpu")}
    results: dict[str, Any] = {}
    print(f"torch {torch.__version__}, {args.threads} threads, {args.dtype}, kernels {backends}\n")
    for name in args.sizes:
        size = tuple(int(part) for part in name.split(","))
        scan, conv = scan_rows(size, dtype, args.rounds, args.reference), conv_rows(size, dtype, args.rounds)
        results[name] = {"scan": scan, "conv": conv, "ratios": ratios(scan, conv)}
        print(table(name, results[name]), flush=True)
    if args.json is not None:
        settings = {"threads": args.threads, "dtype": args.dtype, "rounds": args.rounds, "kernels": backends}
        machine = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
        args.json.write_text(json.dumps({"settings": settings | machine, "sizes": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
