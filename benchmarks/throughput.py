"""Speed, memory and multiply-adds of any registry models, side by side, without training.

    python -m benchmarks.throughput vim_nano_patch4_32 fastvim_nano_patch4_32 deit_nano_patch4_32
    python -m benchmarks.throughput vim_tiny_patch16_224 deit_tiny_patch16_224 --img-size 224 512 --dtype bfloat16
    python -m benchmarks.throughput "vim_tiny_patch16_224:fusion_strategy=upper,fusion_layer=4,fusion_token=8"

A model is a registry name, with keywords behind a colon. Everything that shares an image and batch size is measured in
turns in one process, in a new random order each round, so that a machine that slows down slows down all of it; a figure
is the median over the rounds, after a warm-up. dtypes other than float32 run under autocast, as the program's AMP does.
Peak memory is the model, its images and the most that a call allocates on top of them. The gates of a model that
skips scan directions are set to the share that its training aims at, since random weights would skip none.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import platform
import random
import statistics
import tempfile
import time
from ast import Name, literal_eval
from ast import parse as parse_python
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from causal_conv1d.kernels.registry import backends as conv_backends
from mamba_ssm.kernels.registry import backends as scan_backends
from torch import Tensor, nn
from torch.nn import functional as F

import benchmarks.peers  # noqa: F401 - its models join the registry
from benchmarks.flops import model_flops
from benchmarks.pruning import force_gates
from models_mamba import VisionMamba

BLOCK_SECONDS = 0.05  # one timing is as many calls as take about this long
MIN_ROUNDS = 5
DTYPES = ("float32", "bfloat16", "float16")
Call = Callable[[], Any]


# ---------------------------------------------------------------------------------------------------------------------
# Models


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Read "NAME" or "NAME:key=value,..." into a registry name and keywords; bare words are strings.

    Raises ValueError for a name that is not registered or keywords that cannot be read.
    """
    name, _, text = spec.partition(":")
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        raise ValueError(f"{name!r} is no registry name; the nearest are {', '.join(close) or 'none'}.")
    try:
        call = parse_python(f"_({text})", mode="eval").body
        keywords = call.keywords
        if call.args or None in [word.arg for word in keywords]:
            raise ValueError("a value without a key")
        values = [word.value.id if isinstance(word.value, Name) else literal_eval(word.value) for word in keywords]
        return name, {word.arg: value for word, value in zip(keywords, values)}
    except (SyntaxError, ValueError):
        raise ValueError(f"{text!r} cannot be read as keywords; wanted key=value,key=value.") from None


def build(spec: str, img_size: int | None) -> nn.Module:
    """The model of `spec` for images of `img_size` (its own size by default), with random weights, in eval mode."""
    name, keywords = parse_spec(spec)
    own = timm.list_models(module="models_mamba")
    if img_size is not None and (name in own or timm.get_pretrained_cfg(name).fixed_input_size):
        keywords["img_size"] = img_size
    return timm.create_model(name, **keywords).eval()


def own_size(model: nn.Module) -> int:
    """The image side that `model` was built for."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or model.default_cfg["input_size"][1:]
    return int(size[0])


def kept_directions(model: nn.Module, images: Tensor) -> Tensor | None:
    """The share of `images` (B, C, H, W) that runs each scan direction, (depth, directions); None if none is ever
    skipped."""
    pruning = getattr(getattr(model, "methods", None), "pruning", None)
    if pruning is None or not pruning.blocks:
        return None
    with torch.inference_mode():
        policy = model.forward_with_decisions(images).block_policy
    return policy.float().mean(1).flatten(1)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_in_turns(
    calls: Sequence[Call], device: torch.device, seconds: float, *, min_rounds: int = MIN_ROUNDS
) -> list[list[float]]:
    """Seconds that each of `calls` takes: one list each, one entry a round.

    Rounds go on for about `seconds` and for at least `min_rounds`, each in another order. The calls are warmed up
    first; short ones are repeated within a round, so that a clock's grain does not show.
    """
    repeats = [_warm_up(call, device) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    order = list(range(len(calls)))
    shuffle = random.Random(0).shuffle
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or time.perf_counter() < end:
        shuffle(order)
        for number in order:
            synchronize(device)
            start = time.perf_counter()
            for _ in range(repeats[number]):
                calls[number]()
            synchronize(device)
            times[number].append((time.perf_counter() - start) / repeats[number])
        rounds += 1
    return times


def _warm_up(call: Call, device: torch.device) -> int:
    """Run `call` until it is warm; returns how many calls make one timing."""
    taken = 0.0
    for _ in range(3):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        taken = time.perf_counter() - start
    return max(1, math.ceil(BLOCK_SECONDS / taken))


def peak_memory(call: Call, device: torch.device, resident: Iterable[Tensor] = ()) -> int:
    """Bytes in use at the peak of `call()`: `resident` tensors, which are there before, and what the call allocates.

    On a CPU every allocation of torch's is traced, so the figure is exact and leaves out the interpreter and the
    allocator's reserves; on CUDA it is torch's own count.
    """
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in resident}
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return sum(held.values()) + torch.cuda.max_memory_allocated(device) - before
    return sum(held.values()) + max(0, 0, *_running_totals(call))


def _running_totals(call: Call) -> list[int]:
    """Bytes allocated less bytes freed on the CPU since `call()` began, after each allocation or release."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would write to stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profile.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    totals = [0]
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        if event["args"]["Device Type"] == 0:
            totals.append(totals[-1] + event["args"]["Bytes"])
    return totals


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    probe = torch.empty(0, device=device)
    found = {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "torch": torch.__version__,
        "scan": scan_backends.pick(probe).__name__.rpartition(".")[2],
        "convolution": conv_backends.pick(probe).__name__.rpartition(".")[2],
    }
    return found | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


class Case:
    """One model in one setting: what to call, and what is known of it before any timing."""

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        *,
        dtype: str = "float32",
        compiled: bool = False,
        train: bool = False,
    ) -> None:
        self.model, self.images, self.dtype = model, images, getattr(torch, dtype)
        self.run = torch.compile(model) if compiled else model
        self.targets = torch.randint(model.num_classes, (len(images),), device=images.device) if train else None
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0) if train else None

    def _logits(self) -> Tensor:
        with torch.autocast(self.images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            out = self.run(self.images)
        return out if isinstance(out, Tensor) else out[0]

    def __call__(self) -> None:
        """One batch of inference, or one training step whose update is zero."""
        if self.optimizer is None:
            self.model.eval()
            with torch.inference_mode():
                self._logits()
            return
        self.model.train()
        F.cross_entropy(self._logits().float(), self.targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def peak_bytes(self) -> int:
        """Bytes in use at the peak of a call, weights, optimiser state and images included."""
        self()
        states = self.optimizer.state.values() if self.optimizer else ()
        kept = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        kept = [tensor for tensor in kept if tensor.device.type == self.images.device.type]
        return peak_memory(
            self, self.images.device, [*self.model.parameters(), *self.model.buffers(), self.images, *kept]
        )


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each model, image size, batch size, dtype and way of running that `args` ask for."""
    device = torch.device(args.device)
    rows: list[dict[str, Any]] = []
    for img_size in args.img_size or [None]:
        for batch_size in args.batch_size:
            rows += _measure_together(args, device, img_size, batch_size)
    return rows


def _measure_together(
    args: argparse.Namespace, device: torch.device, img_size: int | None, batch_size: int
) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    timed: list[tuple[dict[str, Any], str, Case]] = []
    for spec in args.models:
        model = build(spec, img_size).to(device)
        side = img_size or own_size(model)
        images = torch.randn(batch_size, 3, side, side, device=device)
        kept = None
        if isinstance(model, VisionMamba) and kept_directions(model, images) is not None:
            force_gates(model, batch_size, model.methods.pruning.block_keep_ratio)
            kept = kept_directions(model, images)
        flops = model_flops(model, side, kept)
        shared = {
            "model": spec,
            "img_size": side,
            "batch_size": batch_size,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "flops_published": flops.published,
            "flops_full": flops.full,
        }
        for dtype in args.dtype:
            for compiled in (False, True) if args.compile else (False,):
                row = shared | {"dtype": dtype, "compiled": compiled}
                rows.append(row)
                for kind in ("eval", "train") if args.train else ("eval",):
                    case = Case(model, images, dtype=dtype, compiled=compiled, train=kind == "train")
                    row |= {f"{kind}_images_per_second": None, f"{kind}_peak_bytes": None}
                    try:
                        row[f"{kind}_peak_bytes"] = case.peak_bytes()
                        timed.append((row, kind, case))
                    except torch.OutOfMemoryError:
                        row["note"] = "out of memory"
                        torch.cuda.empty_cache()
    times = time_in_turns([case for _, _, case in timed], device, args.seconds) if timed else []
    for (row, kind, _), taken in zip(timed, times):
        row[f"{kind}_images_per_second"] = batch_size / statistics.median(taken)
        row[f"{kind}_seconds"] = taken
    return rows


def table(rows: Sequence[dict[str, Any]], train: bool) -> str:
    """Rows of `measure` as Markdown."""
    kinds = ("eval", "train") if train else ("eval",)
    head = ["model", "image", "batch", "dtype", "parameters, M", "FLOPs published, G", "FLOPs full, G"]
    head += [f"{kind} {what}" for kind in kinds for what in ("images/s", "peak, MiB")]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        cells = [row["model"].replace("|", "\\|"), row["img_size"], row["batch_size"]]
        cells.append(row["dtype"] + (", compiled" if row["compiled"] else ""))
        cells += [f"{row['parameters'] / 1e6:.3f}"]
        cells += [f"{row[name] / 1e9:.4f}" for name in ("flops_published", "flops_full")]
        for kind in kinds:
            speed, peak = row[f"{kind}_images_per_second"], row[f"{kind}_peak_bytes"]
            cells += [row.get("note", "-") if value is None else f"{value:.1f}" for value in (speed, _mib(peak))]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _mib(count: int | None) -> float | None:
    return None if count is None else count / 2**20


def main(argv: Sequence[str] | None = None) -> None:
    """Print a Markdown table, and write what it was made from as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="benchmarks.throughput"
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="NAME or NAME:key=value,...")
    parser.add_argument("--img-size", type=int, nargs="+", metavar="SIDE", help="default: each model's own")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[32], metavar="N", help="default: 32")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=DTYPES, help="default: float32")
    parser.add_argument("--compile", action="store_true", help="measure every model under torch.compile as well")
    parser.add_argument("--train", action="store_true", help="measure a training step as well")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's choice)")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="timing for each image and batch size (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and machine here")
    args = parser.parse_args(argv)
    if min([*args.batch_size, *(args.img_size or []), args.threads or 1]) < 1:
        parser.error("sizes and threads are whole numbers from 1 on")
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        for spec in args.models:
            parse_spec(spec)
        rows = measure(args)
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    about = machine(torch.device(args.device))
    print(", ".join(f"{name} {value}" for name, value in about.items()), end="\n\n")
    print(table(rows, args.train))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
