"""The CUDA kernels on the GPU at hand: time, bandwidth, error and memory, against the torch path and a device copy.

    benchmarks/gpu_check.sh                                  # the GPU tests first, then this
    python -m benchmarks.gpu_check --output output/gpu.json

What there is no time for (`--budget`) is told as NOT MEASURED; the most wanted comes first. Times are medians of CUDA
events around calls replayed from CUDA graphs, so that the time Python takes to launch is left out, over several sets of
inputs where one would fit the cache. *Copy* is the share of the device's measured copy bandwidth that an operator
reaches when each argument is counted as read once and each result as written once. *Error* is the largest difference
from the torch path in float32, relative to the largest value. With `--published NAME` the published build's extension
of that name, if it can be imported, is timed on the same sizes.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from causal_conv1d import _nvrtc, backend
from torch import Tensor
from torch.autograd import DeviceType

import fusion
from benchmarks.cases import build, model_spec, own_size
from benchmarks.command import command, device_name, parser, size, write_json
from benchmarks.cuda_kernels import resources
from measure.machine import machine
from measure.memory import bytes_in_use, peak_in_use, size_of
from measure.timing import Call, device_seconds, synchronize
from utils import UsageError, first_line
from utils.flags import number

SIZES = (
    *((128, 384, seqlen) for seqlen in (14, 45, 197, 785)),
    *((8, 384, 197), (8, 768, 197), (8, 384, 14), (1, 384, 4096), (64, 128, 64)),
)
DSTATE, WIDTH = 16, 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CACHE_BYTES = 256 << 20
# The most wanted first.
MODELS = (
    *("vim_tiny_patch16_224", "deit_tiny_patch16_224", "vim_small_patch16_224", "fastvim_tiny_patch16_224"),
    *("fambav_tiny_patch16_224", "dyvm_tiny_patch16_224", "vim_base_patch16_224", "mae_vim_base_patch16_224"),
)
MODEL_DTYPES = ("bfloat16", "float16", "float32")


class Row(NamedTuple):
    """One operator at one size: times in ms, share of the copy bandwidth, relative error."""

    operator: str
    size: str
    dtype: str
    ms: float
    torch_ms: float
    published_ms: float | None
    copy: float
    error: float


class Case(NamedTuple):
    """One operator on one set of inputs: `call()` gives its results, `moved` is the bytes it must move."""

    operator: str
    call: Callable[[], Sequence[Tensor]]
    wide: Callable[[], Sequence[Tensor]]
    published: Call | None
    moved: int


@command("benchmarks.gpu_check")
def main(argv: Sequence[str] | None = None) -> None:
    """Run the check. Raises UsageError where there is nothing to run it on."""
    options = _parser().parse_args(argv)
    if options.device is None and not torch.cuda.is_available():
        raise UsageError("No CUDA device is at hand; wanted one, or --device cpu.")
    device, end = torch.device(options.device or "cuda"), time.perf_counter() + options.budget
    published = _published(options.published)
    copy = copy_bandwidth(device, options.seconds)
    rows = []
    for dtype in options.dtypes:
        for each in options.sizes:
            rows += measure(each, DTYPES[dtype], device, copy, published, options.seconds)
    report = {
        **machine(device),
        "date": date.today().isoformat(),
        "command": " ".join(["python -m benchmarks.gpu_check", *(sys.argv[1:] if argv is None else argv)]),
        "copy_GB_per_s": round(copy / 1e9, 1),
        "published": None if published is None else published.__name__,
        "operators": [row._asdict() for row in rows],
        "host_us_per_call": host_time(device),
        "extra_memory": {",".join(map(str, each)): extra_memory(each, device) for each in options.sizes},
        "models": model_steps(options, device, end) if options.batch else [],
        "kernels": resources([_nvrtc.device(device.index or 0).target], options.dtypes)
        if device.type == "cuda"
        else [],
    }
    _print_report(report)
    write_json(options.output, report)


def _parser() -> argparse.ArgumentParser:
    found = parser("benchmarks.gpu_check", __doc__)
    found.add_argument("--output", type=Path, help="write the report as JSON")
    found.add_argument("--device", type=device_name, help="cpu times the C++ kernels the same way (default: cuda)")
    found.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    found.add_argument("--sizes", nargs="+", type=size, default=list(SIZES), metavar="BATCH,DIM,SEQLEN")
    found.add_argument("--seconds", type=number(float, 0), default=0.3, help="about how long each figure is measured")
    found.add_argument("--published", default="selective_scan_cuda", help="module name of the published extension")
    found.add_argument(
        "--models",
        nargs="+",
        type=model_spec,
        default=list(MODELS),
    )
    found.add_argument("--model-dtypes", nargs="+", choices=DTYPES, default=list(MODEL_DTYPES), help="first ones first")
    found.add_argument(
        "--budget",
        type=number(float, 0),
        default=240.0,
        metavar="SECONDS",
        help="no model is begun after so long (default: 240)",
    )
    found.add_argument(
        "--batch", type=number(int, 1), nargs="*", default=[1, 32, 128], help="images in a step; none leaves models out"
    )
    return found


def _published(name: str) -> ModuleType | None:
    """The published extension, if there is one to import."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        return None
    # this project's own module of that name is no other build
    return None if getattr(module, "PORTABLE", False) else module


# --- timing ----------------------------------------------------------------------------------------------------------


def median_ms(calls: Sequence[Call], device: torch.device, seconds: float) -> float:
    """Median time of one call, in ms, taking the calls in turn."""
    return 1e3 * device_seconds(calls, device, seconds)


def graphed(call: Call, device: torch.device) -> Call:
    """`call` captured in a CUDA graph, whose replay it becomes; itself where there are none, or where it cannot be."""
    if device.type != "cuda":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:
        torch.cuda.synchronize(device)
        print(f"not captured in a graph: {first_line(error)}", file=sys.stderr)
        return call
    return graph.replay


def copy_bandwidth(device: torch.device, seconds: float) -> float:
    """Bytes per second, read and written, of a large copy on the device."""
    source = torch.empty(CACHE_BYTES * (4 if device.type == "cuda" else 1) // 4, device=device).normal_()
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / (1e-3 * median_ms([lambda: target.copy_(source)], device, seconds))


def host_time(device: torch.device, count: int = 500) -> dict[str, float]:
    """Microseconds of host time per call of each operator, at a size that leaves the device nothing to do."""
    with torch.no_grad():
        cases = [*scan_cases((1, 8, 4), torch.float32, device, None), *conv_cases((1, 8, 4), torch.float32, device)]
        cases += norm_cases((1, 8, 4), torch.float32, device)
        times = {}
        for case in cases:
            case.call()
            synchronize(device)
            start = time.perf_counter()
            for _ in range(count):
                case.call()
            times[case.operator] = round(1e6 * (time.perf_counter() - start) / count, 1)  # the device may be behind
            synchronize(device)
    return times


# --- operators -------------------------------------------------------------------------------------------------------


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _widened(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.float() for t in tensors]


def scan_inputs(size: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """u, delta, A, B, C, D, z, delta_bias as the mixer makes them: channel-last, z half of a wider tensor."""
    (batch, dim, seqlen), new = size, {"device": device, "dtype": dtype}
    rows = [torch.randn(batch, seqlen, dim, **new).transpose(1, 2) for _ in range(2)]
    z = torch.randn(batch, seqlen, 2 * dim, **new)[..., dim:].transpose(1, 2)
    B, C = torch.randn(batch, seqlen, 2 * DSTATE, **new).transpose(1, 2).unsqueeze(1).chunk(2, dim=2)
    A = -torch.arange(1.0, DSTATE + 1, device=device).repeat(dim, 1)
    D, bias = torch.ones(dim, device=device), torch.rand(dim, device=device) - 4
    return [*rows, A, B, C, D, z, bias]


def scan_cases(
    size: tuple[int, int, int], dtype: torch.dtype, device: torch.device, published: ModuleType | None
) -> list[Case]:
    """The scan with everything it can do, forward as in training, and backward."""
    ops, tensors, options = torch.ops.mamba_ssm, scan_inputs(size, dtype, device), (True, False)
    u, delta, A, B, C, D, z, bias = tensors
    out, _, states = ops.selective_scan(*tensors, *options, True)
    dout = torch.randn_like(out)
    moved = _bytes(u, delta, z, B, C, out)
    forward = backward = None
    if published is not None:
        dense = [t.contiguous() for t in (u, delta, A, B, C)], z.contiguous(), dout.contiguous()
        first = published.fwd(*dense[0], D, dense[1], bias, True)
        given = (*dense[0], D, dense[1], bias, dense[2], first[1], first[0], None, True, False)

        def forward():
            return published.fwd(*dense[0], D, dense[1], bias, True)

        def backward():
            return published.bwd(*given)

    return [
        Case(
            "scan forward",
            lambda: ops.selective_scan(*tensors, *options, True)[:2],
            lambda: ops.selective_scan(*_widened(tensors), *options, True)[:2],
            forward,
            moved,
        ),
        Case(
            "scan backward",
            lambda: ops.selective_scan_backward(dout, *tensors, states, *options),
            lambda: ops.selective_scan_backward(dout.float(), *_widened(tensors), states, *options),
            backward,
            moved + _bytes(u, delta, z, B, C),
        ),
    ]


def conv_cases(size: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> list[Case]:
    """The convolution with bias and silu, on half of a wider channel-last tensor."""
    batch, dim, seqlen = size
    x = torch.randn(batch, seqlen, 2 * dim, device=device, dtype=dtype)[..., :dim].transpose(1, 2)
    tensors = x, torch.randn(dim, WIDTH, device=device), torch.randn(dim, device=device)
    ops, dout = torch.ops.causal_conv1d, torch.randn_like(x)
    return [
        Case(
            "conv forward",
            lambda: [ops.forward(*tensors, True, False)],
            lambda: [ops.forward(*_widened(tensors), True, False)],
            None,
            2 * _bytes(x),
        ),
        Case(
            "conv backward",
            lambda: ops.backward(dout, *tensors, True, False),
            lambda: ops.backward(dout.float(), *_widened(tensors), True, False),
            None,
            3 * _bytes(x),
        ),
    ]


def norm_cases(size: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> list[Case]:
    """Residual addition and RMSNorm as between two layers: the model's width is half of dim, the residual float32."""
    batch, dim, seqlen = size
    x = torch.randn(batch, seqlen, dim // 2, device=device, dtype=dtype)
    residual, weight = torch.randn(x.shape, device=device), torch.ones(dim // 2, device=device)
    ops, dout = torch.ops.mamba_ssm, torch.randn_like(x)
    _, total, mean, scale = ops.add_norm(x, residual, weight, None, 1e-5, True, torch.float32)
    saved = torch.randn_like(total), total, mean, scale, weight, None, True, torch.float32
    return [
        Case(
            "norm forward",
            lambda: ops.add_norm(x, residual, weight, None, 1e-5, True, torch.float32)[:2],
            lambda: ops.add_norm(x.float(), residual, weight, None, 1e-5, True, torch.float32)[:2],
            None,
            2 * _bytes(x, residual),
        ),
        Case(
            "norm backward",
            lambda: ops.add_norm_backward(dout, *saved),
            lambda: ops.add_norm_backward(dout.float(), *saved),
            None,
            2 * _bytes(x) + 3 * _bytes(total),
        ),
    ]


def relative_error(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest difference of any result, relative to the largest value of it."""
    errors = [0.0]
    for result, want in zip(got, wanted):
        if want.numel():
            scale = want.float().abs().max().clamp(min=1e-12)
            errors.append(float((result.float() - want.float()).abs().max() / scale))
    return float("nan") if any(error != error for error in errors) else max(errors)


def measure(
    size: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    copy: float,
    published: ModuleType | None,
    seconds: float,
) -> list[Row]:
    """All operators at one size."""
    rows, label = [], ",".join(map(str, size))
    with torch.no_grad():
        for make in (lambda: scan_cases(size, dtype, device, published), lambda: conv_cases(size, dtype, device)):
            rows += _measure(make, label, dtype, device, copy, seconds)
        rows += _measure(lambda: norm_cases(size, dtype, device), label, dtype, device, copy, seconds)
    return rows


def _measure(make: Callable, label: str, dtype: torch.dtype, device: torch.device, copy: float, seconds: float):
    first = make()
    count = 1 if device.type != "cuda" else max(1, min(6, -(-CACHE_BYTES // max(case.moved for case in first))))
    sets = [first, *(make() for _ in range(count - 1))]
    rows = []
    for same in zip(*sets):
        got = same[0].call()
        ms = median_ms([graphed(case.call, device) for case in same], device, seconds)
        with backend.use("torch"):
            error = relative_error(got, same[0].wide())
            torch_ms = median_ms([case.call for case in same], device, seconds)
        ours = None
        if same[0].published is not None:
            ours = round(median_ms([case.published for case in same], device, seconds), 4)
        share = same[0].moved / (1e-3 * ms) / copy
        name = str(dtype).removeprefix("torch.")
        rows.append(
            Row(same[0].operator, label, name, round(ms, 4), round(torch_ms, 4), ours, round(share, 3), round(error, 7))
        )
    return rows


def extra_memory(size: tuple[int, int, int], device: torch.device) -> float | None:
    """Peak memory of scan forward and backward beside arguments, results and gradients, in sizes of u in float32."""
    if device.type != "cuda":
        return None
    ops, tensors = torch.ops.mamba_ssm, scan_inputs(size, torch.float32, device)
    dout = torch.randn_like(tensors[0])
    results: list[Tensor] = []

    def call() -> None:
        out, last_state, states = ops.selective_scan(*tensors, True, False, True)
        results.extend((out, last_state))
        results.extend(ops.selective_scan_backward(dout, *tensors, states, True, False))

    before = bytes_in_use(device)
    peak = peak_in_use(call, device)
    return round((peak - before - size_of(results)) / _bytes(tensors[0]), 2)


# --- a training step -------------------------------------------------------------------------------------------------


def model_steps(options: argparse.Namespace, device: torch.device, end: float) -> list[dict[str, object]]:
    """Images per second, peak memory, time of the host and launches of evaluation and of a training step (AdamW), by
    model, batch and dtype: as Python calls it, from a CUDA graph, compiled, and with torch's operations in the place of
    kernels. After `end`, of `time.perf_counter`, what is left is named alone."""
    rows = []
    for name, batch, way, dtype in settings_of(options, device):
        about = {"model": name, "batch": batch, "way": way, "dtype": dtype}
        if time.perf_counter() > end:
            rows.append(about | {"failed": "NOT MEASURED: no time was left"})
            continue
        try:
            rows.append(about | _step(name, batch, way, DTYPES[dtype], options, device))
        except (RuntimeError, torch.OutOfMemoryError) as error:
            rows.append(about | {"failed": first_line(error)})
    return rows


def settings_of(options: argparse.Namespace, device: torch.device) -> list[tuple[str, int, str, str]]:
    """(model, batch, way, dtype) of all that is timed: the largest batch of the first dtype before the others, eager
    and graph before the rest."""
    graph = ("graph",) if device.type == "cuda" else ()
    largest, (first, *others) = max(options.batch), options.model_dtypes
    ours = [name for name in options.models if not name.startswith("deit")]
    rounds = [
        (options.models, [largest], ("eager", *graph), [first]),
        (options.models, [batch for batch in options.batch if batch != largest], ("eager", *graph), [first]),
        (options.models, [largest], graph or ("eager",), others),
        (ours[:1], [largest], ("torch",), [first]),
        (options.models, [largest], ("compiled",) if graph else (), [first]),
        (ours[1:], [largest], ("torch",), [first]),
    ]
    return [
        (name, batch, way, dtype)
        for names, batches, ways, dtypes in rounds
        for dtype in dtypes
        for batch in batches
        for name in names
        for way in ways
    ]


def _step(
    name: str, batch: int, way: str, dtype: torch.dtype, options: argparse.Namespace, device: torch.device
) -> dict[str, float | None]:
    torch.manual_seed(0)
    model = build(name, None, **({} if name.startswith("mae_") else {"num_classes": 1000})).to(device)
    side = own_size(model)
    images = torch.randn(batch, 3, side, side, device=device)
    targets = torch.randint(1000, (batch,), device=device)
    capturable = {"capturable": True} if device.type == "cuda" else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, **capturable)
    called = torch.compile(model) if way == "compiled" else model
    # weights that autocast has kept from a step that a graph captured would be stale in the next
    half = partial(torch.autocast, device.type, dtype, enabled=dtype is not torch.float32, cache_enabled=way != "graph")

    def evaluate():
        with torch.inference_mode(), half():
            called(images)

    def step():
        with half():
            output = called(images)
            output = getattr(output, "logits", output)
            # a masked autoencoder gives its loss
            loss = output[0] if isinstance(output, tuple) else torch.nn.functional.cross_entropy(output, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    found: dict[str, float | None] = {}
    with backend.use("torch" if way == "torch" else "auto"):
        for what, call in (("eval", evaluate), ("train", step)):
            figures = ("images_per_s", "peak_GiB", "host_ms", "launches")
            if way == "graph" and fusion.varies(model, what == "train"):
                found |= dict.fromkeys(f"{what}_{figure}" for figure in figures)
                continue
            model.train(what == "train")
            timed = graphed(call, device) if way == "graph" else call
            if way == "graph" and timed is call:
                raise RuntimeError("not captured in a graph")
            timed()
            ms = median_ms([timed], device, 3 * options.seconds)
            peak = round(peak_in_use(timed, device) / 2**30, 2) if device.type == "cuda" else None
            values = round(1e3 * batch / ms, 1), peak, round(1e3 * _host_seconds(timed, device), 2)
            found |= zip((f"{what}_{figure}" for figure in figures), (*values, launches(timed, device)))
    return found


def launches(call: Call, device: torch.device) -> int | None:
    """How many kernels, copies and fills the device does in one call; None where torch's profiler sees none."""
    if device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        synchronize(device)
    return sum(event.device_type == DeviceType.CUDA for event in profile.events()) or None


def _host_seconds(call: Call, device: torch.device) -> float:
    """How long the host is busy with one call, however long the device is behind."""
    synchronize(device)
    start = time.perf_counter()
    call()
    taken = time.perf_counter() - start
    synchronize(device)
    return taken


# --- tables ----------------------------------------------------------------------------------------------------------


def _print_table(rows: Sequence[dict[str, object]]) -> None:
    if not rows:
        return
    lines = [list(rows[0]), *([("" if value is None else str(value)) for value in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())


def _print_report(report: dict[str, object]) -> None:
    tables = ("operators", "models")
    for key, value in report.items():
        if key not in (*tables, "kernels"):
            print(f"{key}: {value}")
    kernels = report["kernels"]
    if kernels:
        most, spilled = max(row["registers"] for row in kernels), sum(row["spill_stores"] > 0 for row in kernels)
        seconds = sum(row["compile_s"] for row in kernels)
        print(f"kernels: {len(kernels)} compiled in {seconds:.1f} s, at most {most} registers, {spilled} with spills")
    for table in tables:
        print()
        _print_table(report[table])


if __name__ == "__main__":
    sys.exit(main())
