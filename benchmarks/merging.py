"""Token merging against none: time and memory of a training step, and what the matching costs.

    python -m benchmarks.merging --json merging.json

Every setting runs in the same process, in turns, so that a busy machine slows all of them alike; times are medians.
Peak memory comes in two counts. *Step* is what a training step needs on top of the weights and the optimiser's state,
which no method changes; *total* includes them. On a CPU both are resident memory, measured for each setting in a
process of its own, without the program and its libraries; on a GPU they are the allocator's.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import adamw, build, model_spec
from benchmarks.command import add_device, add_threads, command, parser, write_json
from fusion import token_merging
from measure.machine import in_words, machine
from measure.memory import bytes_in_use, in_fresh_process, peak_in_use
from measure.timing import seconds_of, time_in_turns
from models_mamba import VisionMamba
from utils import UsageError
from utils.flags import number

SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "upper K4 r8": dict(fusion_strategy="upper", fusion_layer=4, fusion_token=8),
    "all r7": dict(fusion_strategy="all", fusion_token=7),
    "alternate r14": dict(fusion_strategy="alternate", fusion_token=14),
    "upper K4 r8 raster": dict(fusion_strategy="upper", fusion_layer=4, fusion_token=8, fusion_order="raster"),
}


class Trainer:
    """One model of a setting, and its training step on random images; `about` has model, size, batch and device."""

    def __init__(self, about: dict[str, Any], setting: str, **keywords: Any) -> None:
        torch.manual_seed(0)
        self.device, side, batch = torch.device(about["device"]), about["size"], about["batch"]
        keywords |= dict(num_classes=100, drop_path_rate=0.0) | SETTINGS[setting]
        self.model: nn.Module = build(about["model"], side, **keywords).to(self.device)
        self.optimizer = adamw(self.model, lr=1e-4)
        self.images = torch.randn(batch, 3, side, side, device=self.device)
        self.targets = torch.randint(100, (batch,), device=self.device)

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


def peak_of_steps(about: dict[str, Any], setting: str) -> dict[str, float]:
    """Peak memory in MiB of training steps; on a CPU this must be a process of its own."""
    device = torch.device(about["device"])
    # a first step of a shallow model loads what the libraries load late
    Trainer(about, setting, depth=6).step()
    before = bytes_in_use(device)
    trainer = Trainer(about, setting)
    trainer.step()
    trainer.optimizer.zero_grad()
    kept = bytes_in_use(device)
    peak = peak_in_use(lambda: (trainer.step(), trainer.step()), device)
    return {"total_mib": (peak - before) / 2**20, "step_mib": (peak - kept) / 2**20}


@contextmanager
def timed(name: str, device: torch.device) -> Iterator[list[float]]:
    """Replace a function of `token_merging` by one that notes how long each of its calls takes."""
    function, spent = getattr(token_merging, name), []

    def noted(*args: Any, **kwargs: Any) -> Any:
        result: list[Any] = []
        spent.append(seconds_of(lambda: result.append(function(*args, **kwargs)), device))
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
    notes: dict[str, list[float]] = {"first matching": [], "all matching": [], "all merging": []}

    def match() -> None:
        with timed("_match", plain.device) as spent:
            merging.forward()
        notes["first matching"].append(spent[0])
        notes["all matching"].append(sum(spent))

    def merge() -> None:
        with timed("merge_tokens", plain.device) as spent:
            merging.forward()
        notes["all merging"].append(sum(spent))

    calls = [plain.forward, match, merge]
    forward = time_in_turns(calls, plain.device, min_rounds=rounds, warm_up=1, block_seconds=0.0)[0]
    # the first of each is the warm-up
    costs = {"forward": forward} | {name: values[1:] for name, values in notes.items()}
    return {name: 1000 * statistics.median(values) for name, values in costs.items()}


@command("benchmarks.merging")
def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write it as JSON if asked."""
    flags = parser("benchmarks.merging", __doc__)
    count = number(int, 1)
    flags.add_argument("--model", type=model_spec, default="vim_tiny_patch16_224", help="default: %(default)s")
    flags.add_argument("--size", type=count, default=224, help="image side (default: %(default)s)")
    flags.add_argument("--batch", type=count, default=8, help="default: %(default)s")
    flags.add_argument("--rounds", type=count, default=5, help="default: %(default)s")
    add_device(flags)
    add_threads(flags, threads=2)
    flags.add_argument("--json", type=Path, metavar="FILE", help="file to write")
    args = flags.parse_args(argv)
    torch.set_num_threads(args.threads)
    about = {name: getattr(args, name) for name in ("model", "size", "batch", "device")}
    if not isinstance(Trainer(about, "none", depth=1).model, VisionMamba):
        raise UsageError(f"--model {args.model} is not a Vision Mamba, whose tokens can be merged.")
    device = torch.device(args.device)
    own_process = in_fresh_process if device.type == "cpu" else lambda function, *given: function(*given)
    memory = {setting: own_process(peak_of_steps, about, setting) for setting in SETTINGS}
    trainers = {setting: Trainer(about, setting) for setting in SETTINGS}
    steps = [trainer.step for trainer in trainers.values()]
    times = time_in_turns(steps, device, min_rounds=args.rounds, warm_up=1, block_seconds=0.0)
    costs = matching_costs(trainers, args.rounds)

    rows = []
    for (setting, trainer), taken in zip(trainers.items(), times):
        model, methods = trainer.model, trainer.model.site_methods
        length = methods[0].schedule[-1] if methods else model.patch_embed.num_patches + model.num_prefix_tokens
        rows.append(dict(setting=setting, tokens_at_end=length, seconds=statistics.median(taken)) | memory[setting])
    for row in rows:
        for name in ("seconds", "step_mib", "total_mib"):
            row[f"{name}_saved"] = 1 - row[name] / rows[0][name]
    found = machine(device)
    print(f"{args.model}, {args.size} px, batch {args.batch}, training step, {in_words(found)}")
    print(f"{'setting':20} {'tokens at end':>13} {'time':>20} {'peak of the step':>20} {'peak in total':>20}")
    for row in rows:
        figures = (
            f"{scale * row[name]:9.0f} {unit} {-row[f'{name}_saved']:+6.1%}"
            for name, scale, unit in (("seconds", 1000, "ms"), ("step_mib", 1, "MiB"), ("total_mib", 1, "MiB"))
        )
        print(f"{row['setting']:20} {row['tokens_at_end']:13} ", *figures)
    for name in ("first matching", "all matching", "all merging"):
        print(f"{name}: {costs[name]:.2f} ms, {costs[name] / costs['forward']:.2%} of a forward without merging")
    settings = about | {"rounds": args.rounds}
    write_json(args.json, dict(about=settings | found, steps=rows, milliseconds=costs))


if __name__ == "__main__":
    sys.exit(main())
