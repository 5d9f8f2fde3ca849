"""What a finished run of the program costs: its model and its training step, rebuilt by the program's own code."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import checkpoints
import engine
import main as program
from benchmarks.cases import Case
from benchmarks.summary import Score, read_log
from fusion.token_merging import TokenMerging
from measure.flops import model_flops, traced_flops
from measure.memory import peak_memory
from measure.pruning import kept_directions
from measure.timing import time_in_turns
from tasks import TASKS
from utils.randomness import seed_everything
from utils.signals import StopRequest
from utils.telling import Board


class Run(NamedTuple):
    """One training: a method and a seed, where it lies, the run it starts from, and the program's flags, those that
    name folders left out."""

    name: str
    method: str
    seed: int
    folder: Path
    start: Run | None
    epochs: int
    flags: list[str]

    def command(self) -> list[str]:
        """All flags of the program."""
        start = ["--model-path", str(self.start.folder / "checkpoint.pth")] if self.start else []
        return [*self.flags, *start, "--output_dir", str(self.folder), "--resume", "auto"]

    def finished(self) -> bool:
        """Whether the last epoch is done."""
        log = self.folder / "log.txt"
        return log.is_file() and log.stat().st_size > 0 and len(read_log(self.folder)) >= self.epochs


def training_seconds(run: Run) -> float:
    """The median epoch of `run` times its epochs, and the same for the run it starts from."""
    own = statistics.median(line["seconds"] for line in read_log(run.folder)) * run.epochs
    return own + (training_seconds(run.start) if run.start else 0.0)


def trained_case(run: Run, device: torch.device) -> tuple[Case, argparse.Namespace]:
    """The model of a finished run, and the first batch of its evaluation."""
    checkpoint = checkpoints.read(str(run.folder / "checkpoint.pth"))
    args = argparse.Namespace(**checkpoint["args"])
    kind = TASKS[args.task]
    data = kind.build_data(args, train=False)
    model = kind.build_model(args, data)
    model.load_state_dict(checkpoint["model"])
    task = kind(args, model.to(device), data, device)
    inputs, _, _ = task.prepare(next(iter(kind.eval_batches(data, args))), training=False)
    if not isinstance(inputs, Tensor):  # images with the size of their labels, all of one shape in a small data set
        inputs = torch.stack([image for image, _ in inputs])
    dtype = "float32"
    if args.if_amp:
        dtype = args.amp_dtype or ("bfloat16" if device.type == "cpu" or torch.cuda.is_bf16_supported() else "float16")
    return Case(model.eval(), inputs, dtype=dtype), args


def training_peak(run: Run, device: torch.device) -> int:
    """Bytes in use at the peak of one training step of `run`, by the program's own code, on one device."""
    args = program.parse(run.command())
    args.distributed, args.output_dir = False, ""
    seed_everything(args.seed)
    kind = TASKS[args.task]
    data = kind.build_data(args, train=True)
    args.nb_classes = data.num_classes
    batches = kind.train_batches(data, args)
    model = kind.build_model(args, data)
    teacher = program.load_weights(args, kind, model, data)
    task = kind(args, model.to(device), data, device, teacher)
    state = program.build_run(args, task, batches)
    one = _OneBatch(next(iter(batches.epoch(0))))

    def step() -> None:
        state.step = 0
        engine.train_one_epoch(state, one, args, StopRequest(), Board(None))

    step()
    state.optimizer.zero_grad()  # a step begins without gradients, whose release would go unseen
    averaged = [state.ema.module] if state.ema is not None else []
    held = [tensor for part in (task, *averaged) for tensor in (*part.parameters(), *part.buffers())]
    held += [value for entry in state.optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    return peak_memory(step, device, [tensor for tensor in (*held, *one.batch) if tensor.device.type == device.type])


class _OneBatch:
    """Stands for an epoch of a single batch."""

    steps = 1

    def __init__(self, batch: Sequence[Tensor]) -> None:
        self.batch = batch

    def epoch(self, epoch: int, start: int = 0) -> Any:
        return iter([self.batch])


def kept_shares(model: Any, line: dict[str, Any]) -> tuple[float, float]:
    """The shares of tokens that reach the end and of scan directions that run, by a trained model and its log's last
    line."""
    tokens = [value for name, value in sorted(line.items()) if name.startswith("test_kept_tokens_")]
    for method in getattr(model, "site_methods", ()):
        if isinstance(method, TokenMerging):
            tokens.append(method.schedule[-1] / method.num_tokens)
    return tokens[-1] if tokens else 1.0, line.get("test_kept_directions", 1.0)


def body_of(model: nn.Module) -> nn.Module:
    """The backbone inside a model for dense prediction; another model itself."""
    return getattr(getattr(model, "backbone", None), "body", model)


def head_flops(model: nn.Module, img_size: int) -> int:
    """Multiply-adds of one image through all that stands on the backbone's maps."""
    whole, maps = (sum(traced_flops(part, img_size).values()) for part in (model, model.backbone))
    return whole - maps


def measure(runs: Sequence[Run], score: Score, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """What every finished run achieved, by `score`, and costs, one entry a run; all are timed for about `seconds`."""
    cases, found = [], []
    train_peaks: dict[str, int] = {}
    for run in runs:
        if run.method not in train_peaks:  # the same for every seed
            train_peaks[run.method] = training_peak(run, device)
        case, settings = trained_case(run, device)
        body = body_of(case.model)
        kept = kept_directions(body, case.images)
        flops = model_flops(body, settings.input_size, kept)
        tokens, directions = kept_shares(body, read_log(run.folder)[-1])
        cases.append(case)
        found.append(
            {
                "run": run.name,
                "method": run.method,
                "seed": run.seed,
                score.key: read_log(run.folder)[-1][score.logged],
                "kept_tokens": tokens,
                "kept_directions": directions,
                "parameters": sum(parameter.numel() for parameter in case.model.parameters()),
                "flops_published": flops.published,
                "flops_full": flops.full,
                **({} if body is case.model else {"flops_head": head_flops(case.model, settings.input_size)}),
                "train_seconds": training_seconds(run),
                "train_peak_bytes": train_peaks[run.method],
                "eval_peak_bytes": case.peak_bytes(),
            }
        )
    times = time_in_turns(cases, device, seconds)
    for entry, case, taken in zip(found, cases, times):
        entry["images_per_second"] = len(case.images) / statistics.median(taken)
    return found
