"""Time and memory of the kernel packages' operators on a CPU, against peers, in one process.

    python -m benchmarks.ops                          # every size, two threads, a table
    python -m benchmarks.ops --sizes 8,384,197 --json ops.json --no-reference
    python -m benchmarks.ops --threads 1              # cycles of a step, where two threads would share a core

Sizes are (batch, dim, seqlen), with 16 states; scans have D, z, delta_bias and softplus. Peers: the reference loop,
`mambapy`'s parallel scan if it can be imported, and `torch.exp` of as many numbers as the scan has states to step, in
cache and into memory that is there: about the least that torch itself would take. The processor's own least is told by
ports: a state step is one lane of a vector, and how many cycles a thread takes for a vector of them stands under the
times (an AVX2 core needs 5 to 6, and an AVX-512 core about as many for twice the lanes; the clock is measured). The
convolution's peer is `F.conv1d` and `F.silu`. All that belongs to a size is timed in turns, round by round, so that a
machine that slows down slows down all of it; a figure is the median, and the fastest round stands beside it. Extra
memory is the peak of a fresh process over a forward and backward, less what was there before, less results and
gradients, in units of `u` in float32.
"""

from __future__ import annotations

import importlib
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from causal_conv1d import causal_conv1d_fn
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref
from torch import Tensor

from benchmarks.cases import DTYPES
from benchmarks.command import add_threads, command, parser, size, write_json
from measure.clock import clock_hertz
from measure.machine import LANES, in_words, instruction_set, machine
from measure.memory import bytes_in_use, in_fresh_process, peak_in_use, size_of
from measure.timing import Call, time_in_turns
from utils.flags import number

SIZES = ("8,384,197", "8,768,197", "8,384,14", "1,384,4096", "64,128,64")
DSTATE = 16
WIDTH = 4
IN_CACHE = 1 << 17  # numbers: half a megabyte, in and out
SLOW_SECONDS = 0.2  # peers that take this long get few rounds
CPU = torch.device("cpu")
Size = tuple[int, int, int]


def timings(calls: dict[str, Call], rounds: int) -> dict[str, tuple[float, float]]:
    """(median, fastest) seconds of each call, in turns after a warm-up."""
    options = dict(min_rounds=rounds, warm_up=1, block_seconds=0.0, slow_seconds=SLOW_SECONDS)
    times = time_in_turns(list(calls.values()), CPU, **options)
    return {name: (statistics.median(taken), min(taken)) for name, taken in zip(calls, times)}


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


def extra_memory(size: Size, dtype: str) -> int:
    """Bytes that a scan's forward and backward take at their peak beyond arguments, result and gradients; to be called
    in a fresh process. The process' own peak, so scratch memory outside torch is in it."""
    tensors, dout = scan_arguments(*size, getattr(torch, dtype)), output_gradient(size, getattr(torch, dtype))
    results: list[Tensor] = []

    def call() -> None:
        out = selective_scan_fn(**tensors, delta_softplus=True)
        results.extend((out, *torch.autograd.grad(out, list(tensors.values()), dout)))

    call()  # what is loaded and set up once is no part of it
    results.clear()
    before = bytes_in_use(CPU)
    peak = peak_in_use(call, CPU)
    return max(0, peak - before - size_of(results))


def output_gradient(size: Size, dtype: torch.dtype) -> Tensor:
    """A gradient of a scan's output, channel-last."""
    return torch.randn(size).transpose(1, 2).contiguous().transpose(1, 2).to(dtype)


def scan_rows(size: Size, dtype: torch.dtype, rounds: int, reference: bool) -> dict[str, Any]:
    """Seconds of the scan and its peers at one size, and the scan's extra memory in units of u (None where the system
    does not say)."""
    tensors, dout = scan_arguments(*size, dtype), output_gradient(size, dtype)
    inputs = list(tensors.values())
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
    found: dict[str, Any] = {"seconds": timings(calls, rounds), "extra_memory_in_u": None}
    if Path("/proc/self/status").exists():
        name = str(dtype).removeprefix("torch.")
        found["extra_memory_in_u"] = in_fresh_process(extra_memory, size, name) / (4 * tensors["u"].numel())
    return found


def conv_rows(size: Size, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
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


PORT_COLUMNS = {"cycles_per_vector": ".1f", "steps_per_cycle_and_lane": ".4f"}


def ports(size: Size, scan: dict[str, Any], hertz: float | None) -> dict[str, dict[str, float]]:
    """What a thread gets out of its processor: for each way through the scan and for `torch.exp`, state steps a second
    and thread, and, where the clock (`hertz`) is known, cycles for a vector of them and steps a cycle and lane.

    A forward + backward counts its states once, though it steps through them several times.
    """
    states, threads, lanes = size[0] * size[1] * size[2] * DSTATE, torch.get_num_threads(), LANES[instruction_set()]
    found = {}
    for name in ("torch.exp", "selective_scan_fn forward", "selective_scan_fn forward + backward"):
        speed = states / scan["seconds"][name][0] / threads
        found[name] = {"steps_per_second": speed}
        if hertz is not None:
            found[name] |= {
                "cycles_per_vector": lanes * hertz / speed,
                "steps_per_cycle_and_lane": speed / hertz / lanes,
            }
    return found


def table(size: str, result: dict[str, Any]) -> str:
    """One size's figures as Markdown."""
    lines = [f"### ({size})", "", "| operator | median, ms | fastest, ms |", "|---|---|---|"]
    for part in ("scan", "conv"):
        for name, (median, fastest) in result[part]["seconds"].items():
            lines.append(f"| {name} | {median * 1e3:.3f} | {fastest * 1e3:.3f} |")
    lines += ["", "| a thread | G state steps/s | cycles for a vector | steps a cycle and lane |", "|---|---|---|---|"]
    for name, figures in result["ports"].items():
        cycles = [f"{figures[key]:{form}}" if key in figures else "-" for key, form in PORT_COLUMNS.items()]
        lines.append(f"| {name} | {figures['steps_per_second'] / 1e9:.3f} | {' | '.join(cycles)} |")
    lines += ["", "| ratio | |", "|---|---|"]
    lines += [f"| {name} | {value:.2f} |" for name, value in result["ratios"].items()]
    return "\n".join(lines) + "\n"


@command("benchmarks.ops")
def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write what was asked for."""
    flags = parser("benchmarks.ops", __doc__)
    flags.add_argument(
        "--sizes", nargs="+", type=size, default=[size(text) for text in SIZES], metavar="BATCH,DIM,SEQLEN"
    )
    flags.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    add_threads(flags, threads=2)
    flags.add_argument("--rounds", type=number(int, 1), default=30, help="default: %(default)s")
    flags.add_argument(
        "--no-reference", dest="reference", action="store_false", help="leave out selective_scan_ref: seconds a call"
    )
    flags.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    args = flags.parse_args(argv)
    torch.set_num_threads(args.threads)
    dtype, hertz = getattr(torch, args.dtype), clock_hertz()
    about = machine(CPU) | {"GHz": None if hertz is None else round(hertz / 1e9, 2)}
    results: dict[str, Any] = {}
    print(f"{args.dtype}, {in_words(about)}\n")
    for each in args.sizes:
        name = ",".join(map(str, each))
        scan, conv = scan_rows(each, dtype, args.rounds, args.reference), conv_rows(each, dtype, args.rounds)
        results[name] = {"scan": scan, "conv": conv, "ports": ports(each, scan, hertz), "ratios": ratios(scan, conv)}
        print(table(name, results[name]), flush=True)
    settings = {"dtype": args.dtype, "rounds": args.rounds}
    write_json(args.json, {"settings": settings | about, "sizes": results})


if __name__ == "__main__":
    sys.exit(main())
