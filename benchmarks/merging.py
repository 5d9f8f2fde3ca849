"""Token merging against none: time and memory of a training step, and what the matching costs.

    python -m benchmarks.merging --json merging.json

Every setting runs in the same process, in turns, so that a busy machine slows all of them alike; times are medians.
Peak memory comes in two counts. *Step* is what a training step needs on top of the weights and the optimiser's state,
which no method changes; *total* includes them. On a CPU both are resident memory, measured for each setting in a
process of its own, without the program and its libraries; on a GPU they are the allocator's.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import models_mamba  # noqa: F401 (registers the models)
from fusion import token_merging

SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "upper K4 r8": dict(fusion_strategy="upper", fusion_layer=4, fusion_token=8),
    "all r7": dict(fusion_strategy="all", fusion_token=7),
    "alternate r14": dict(fusion_strategy="alternate", fusion_token=14),
    "upper K4 r8 raster": dict(fusion_strategy="upper", fusion_layer=4, fusion_token=8, fusion_order="raster"),
}


class Trainer:
    """One model of a setting, and its training step on random images."""

    def __init__(self, args: argparse.Namespace, setting: str, **keywords: Any) -> None:
        torch.manual_seed(0)
        self.device = torch.device(args.device)
        keywords |= dict(img_size=args.size, num_classes=100, drop_path_rate=0.0) | SETTINGS[setting]
        self.model: nn.Module = timm.create_model(args.model, **keywords).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.images = torch.randn(args.batch, 3, args.size, args.size, device=self.device)
        self.targets = torch.randint(100, (args.batch,), device=self.device)

    def step(self) -> None:
        """Forward, backward, update."""
        self.model.train()
        loss = nn.functional.cross_entropy(self.model(self.images), self.targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def forward(self) -> Tensor:
        """Inference."""
        return self.model.eval()(self.images)


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """How long `work` takes."""
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def resident_mib() -> float:
    """This process's resident memory now, in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak_of_steps(args: argparse.Namespace, setting: str) -> dict[str, float]:
    """Peak memory in MiB of training steps; on a CPU this must be a process of its own."""
    on_gpu = args.device != "cpu"
    memory = (lambda: torch.cuda.memory_allocated() / 2**20) if on_gpu else resident_mib
    # a first step of a shallow model loads what the libraries load late
    Trainer(args, setting, depth=6).step()
    gc.collect()
    before = memory()
    trainer = Trainer(args, setting)
    trainer.step()
    trainer.optimizer.zero_grad()
    gc.collect()
    kept = memory()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    trainer.step()
    trainer.step()
    if on_gpu:
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"total_mib": peak - before, "step_mib": peak - kept}


def peak_in_child(setting: str) -> dict[str, float]:
    """`peak_of_steps` in a fresh process whose allocator hands every freed tensor back at once."""
    command = [sys.executable, "-m", "benchmarks.merging", *sys.argv[1:], "--only-memory", setting]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def timed(name: str, device: torch.device) -> Iterator[list[float]]:
    """Replace a function of `token_merging` by one that notes how long each of its calls takes."""
    function, spent = getattr(token_merging, name), []

    def noted(*args: Any, **kwargs: Any) -> Any:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        result: list[Any] = []
        spent.append(seconds(lambda: result.append(function(*args, **kwargs)), device))
        return result[0]

    setattr(token_merging, name, noted)
    try:
        yield spent
    finally:
        setattr(token_merging, name, function)


def matching_costs(trainers: dict[str, Trainer], rounds: int) -> dict[str, float]:
    """Milliseconds of an inference without merging, and inside one with the read-me's setting: of the first matching,
    of all matchings, and of all merging (matching and the moving of tokens)."""
    plain, merging = trainers["none"], trainers["upper K4 r8"]
    device = plain.device
    notes: dict[str, list[float]] = {"forward": [], "first matching": [], "all matching": [], "all merging": []}
    for _ in range(rounds + 1):
        notes["forward"].append(seconds(plain.forward, device))
        with timed("_match", device) as spent:
            merging.forward()
        notes["first matching"].append(spent[0])
        notes["all matching"].append(sum(spent))
        with timed("merge_tokens", device) as spent:
            merging.forward()
        notes["all merging"].append(sum(spent))
    return {name: 1000 * statistics.median(values[1:]) for name, values in notes.items()}


def main() -> None:
    """Measure, print a table, and write it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vim_tiny_patch16_224")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", default="", help="file to write")
    parser.add_argument("--only-memory", default="", choices=("", *SETTINGS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.only_memory:
        print(json.dumps(peak_of_steps(args, args.only_memory)))
        return

    device = torch.device(args.device)
    measure = peak_in_child if device.type == "cpu" else lambda setting: peak_of_steps(args, setting)
    memory = {setting: measure(setting) for setting in SETTINGS}
    trainers = {setting: Trainer(args, setting) for setting in SETTINGS}
    times: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
    for _ in range(args.rounds + 1):
        for setting, trainer in trainers.items():
            times[setting].append(seconds(trainer.step, device))
    costs = matching_costs(trainers, args.rounds)

    rows = []
    for setting, trainer in trainers.items():
        model, step = trainer.model, statistics.median(times[setting][1:])
        methods = model.site_methods
        length = methods[0].schedule[-1] if methods else model.patch_embed.num_patches + model.num_prefix_tokens
        rows.append(dict(setting=setting, tokens_at_end=length, seconds=step) | memory[setting])
    for row in rows:
        for name in ("seconds", "step_mib", "total_mib"):
            row[f"{name}_saved"] = 1 - row[name] / rows[0][name]
    print(f"{args.model}, {args.size} px, batch {args.batch}, training step, {args.threads} threads, {args.device}")
    print(f"{'setting':20} {'tokens at end':>13} {'time':>20} {'peak of the step':>20} {'peak in total':>20}")
    for row in rows:
        figures = (
            f"{scale * row[name]:9.0f} {unit} {-row[f'{name}_saved']:+6.1%}"
            for name, scale, unit in (("seconds", 1000, "ms"), ("step_mib", 1, "MiB"), ("total_mib", 1, "MiB"))
        )
        print(f"{row['setting']:20} {row['tokens_at_end']:13} ", *figures)
    for name in ("first matching", "all matching", "all merging"):
        print(f"{name}: {costs[name]:.2f} ms, {costs[name] / costs['forward']:.2%} of a forward without merging")
    if args.json:
        about = dict(vars(args), torch=torch.__version__, machine=platform.machine(), cores=os.cpu_count())
        Path(args.json).write_text(json.dumps(dict(about=about, steps=rows, milliseconds=costs), indent=2) + "\n")


if __name__ == "__main__":
    main()
