"""A run: everything that a checkpoint holds, how it is saved and resumed, and the folder that it lives in."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib.util
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.scheduler import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from checkpoints import accept, divided, find_weights, load_strictly, read, saved_flags
from tasks.task import Task
from utils import RunError, UsageError, first_line
from utils.files import copy_whole, is_url, remove_temporaries, write_atomically, write_if_possible
from utils.processes import any_process, gather_objects, is_main_process, rank, world_size
from utils.randomness import random_state, set_random_state
from utils.states import check_like, check_optimizer_state
from utils.telling import Meters

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_logger = logging.getLogger(__name__)

CHECKPOINTS = ("checkpoint.pth", "best_checkpoint.pth")
LOCK_SECONDS = 5
OUTPUT_FILES = (*CHECKPOINTS, "log.txt", "args.json")
# flags that say how a run goes on rather than what it is: on resuming they are taken as they are now
SCHEDULE_FLAGS = (
    *("epochs", "lr", "blr", "unscale_lr", "weight_decay", "weight_decay_end", "sched", "warmup_epochs", "warmup_lr"),
    *("warmup_iters", "min_lr", "decay_epochs", "decay_rate", "lr_noise", "layer_decay", "iterations"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a run's folder and of where it starts from."""
    group = parser.add_argument_group("checkpoints")
    group.add_argument("--output_dir", "--output-dir", default="", metavar="DIR", help="where checkpoints and logs go")
    group.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        default="",
        metavar="FILE",
        help="go on from FILE, or from the last checkpoint of --output_dir (auto, or no FILE)",
    )
    group.add_argument("--no-resume", action="store_const", const="", dest="resume", help=argparse.SUPPRESS)
    group.add_argument(
        "--finetune", default="", metavar="FILE", help="start from FILE's weights, at any image size and class count"
    )
    group.add_argument("--mlflow", action="store_true", help="log to MLflow too, where its package is installed")
    group.add_argument("--start_epoch", "--start-epoch", type=int, default=0, help="default: 0")


def check(args: argparse.Namespace) -> None:
    """Refuse checkpoint flags that contradict each other or name no file."""
    if args.start_epoch < 0:
        raise UsageError(f"--start_epoch is {args.start_epoch}; wanted a whole number from 0.")
    if args.mlflow and importlib.util.find_spec("mlflow") is None:
        raise UsageError("--mlflow wants the MLflow package; wanted pip install mlflow.")
    for flag, value in (("--resume", args.resume), ("--finetune", args.finetune), ("--model-path", args.model_path)):
        if value and not is_url(value) and not (flag == "--resume" and value == "auto") and not Path(value).is_file():
            raise UsageError(f"{flag} {value} is no file.")
    if args.resume == "auto" and not args.output_dir:
        raise UsageError("--resume auto looks in --output_dir, which is missing.")
    if args.eval and not (args.resume or args.finetune or args.model_path):
        raise UsageError("--eval wants weights: --resume FILE, --finetune FILE or --model-path FILE.")
    if args.output_dir and Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        raise UsageError(f"--output_dir {args.output_dir} is a file; wanted a folder.")


@dataclass
class Run:
    """Everything that changes while a model trains, and what it is trained with; a checkpoint holds the former.

    `epoch` is the epoch to train next or now, `step` how many of its batches are done, `updates` how many steps the
    optimiser took in all, `seconds` the time spent on the epoch so far, `best` the task's metric at its best. How many
    steps in a row were left out, `skipped`, is not kept.
    """

    task: Task
    optimizer: Optimizer
    scheduler: Scheduler | None
    autocast: Callable[[], contextlib.AbstractContextManager]
    scaler: torch.amp.GradScaler
    device: torch.device
    epoch: int = 0
    step: int = 0
    updates: int = 0
    best: float | None = None
    seconds: float = 0.0
    skipped: int = 0
    meters: Meters = field(default_factory=Meters)
    unwritten: list[dict[str, Any]] = field(default_factory=list)  # lines of log.txt that found the disk full

    @property
    def model(self) -> nn.Module:
        """The network that is trained, without wrappers."""
        return self.task.model

    @property
    def ema(self) -> ModelEmaV3 | None:
        """The moving average of the weights, if one is kept."""
        return self.task.get_trainable_module(ema=True)

    def end_epoch(self) -> None:
        """Go to the beginning of the next epoch."""
        self.epoch, self.step, self.seconds, self.meters = self.epoch + 1, 0, 0.0, Meters()

    def capture(self, args: argparse.Namespace, log: dict[str, Any] | None = None) -> dict[str, Any]:
        """The checkpoint of this moment; `log` is the line of the epoch that just ended. Every process must call this
        together."""
        own = {"random": random_state(self.device), "meters": self.meters.state_dict()}
        return {
            "model": _whole(self.model.state_dict()),
            "optimizer": _whole(self.optimizer.state_dict()),
            "lr_scheduler": _scheduler_state(self.scheduler),
            "scaler": self.scaler.state_dict(),
            "model_ema": _whole(self.ema.module.state_dict()) if self.ema is not None else None,
            "task_state": self.task.get_task_state(),
            "args": dict(vars(args)),
            "epoch": self.epoch - 1,  # the last whole one, as DeiT counts
            "step": self.step,
            "updates": self.updates,
            "best_metric": self.best,
            "seconds": self.seconds,
            "log": log,
            "processes": gather_objects(own),
        }

    def restore(self, checkpoint: dict[str, Any], path: str, args: argparse.Namespace) -> None:
        """Go on where `capture` left off, or from the weights alone where another program saved less."""
        weights, origin = find_weights(checkpoint, path)
        load_strictly(self.model, weights, path, args.model)
        averaged = checkpoint.get("model_ema")
        if self.ema is not None:
            if averaged is None:
                self.ema.set(self.model)
            else:
                load_strictly(self.ema.module, find_weights(checkpoint, path, ema=True)[0], path, args.model)
        if "optimizer" not in checkpoint or "epoch" not in checkpoint:
            _logger.warning("%s holds %s and no state of a run: training starts from these weights.", path, origin)
            return
        settings = [dict(group, params=None) for group in self.optimizer.param_groups]
        try:
            check_optimizer_state(checkpoint["optimizer"], self.optimizer)
            self.optimizer.load_state_dict(_divided_optimizer(checkpoint["optimizer"], self.optimizer))
            for group, own in zip(self.optimizer.param_groups, settings):
                group.update((name, value) for name, value in own.items() if name != "params")
            if checkpoint.get("scaler"):
                check_like(checkpoint["scaler"], self.scaler.state_dict(), "scaler")
                self.scaler.load_state_dict(checkpoint["scaler"])
        except (ValueError, KeyError, RuntimeError) as error:
            raise UsageError(f"{path} was trained with another optimiser: {first_line(error)}.") from error
        self.task.load_task_state(checkpoint.get("task_state"))
        self.epoch = checkpoint["epoch"] + 1
        self.step, self.updates = checkpoint.get("step", 0), checkpoint.get("updates", 0)
        self.best = checkpoint.get("best_metric", checkpoint.get("best_accuracy"))
        self.seconds = checkpoint.get("seconds", 0.0)
        _go_to(self.scheduler, self, checkpoint.get("lr_scheduler") or {})
        processes = checkpoint.get("processes", [])
        if len(processes) == world_size():
            own = processes[rank()]
            check_like(own, {"random": random_state(self.device), "meters": {}}, "processes")
            check_like(own["meters"], dict.fromkeys(own["meters"], [0.0, 0]), "meters")
            set_random_state(own["random"], self.device)
            self.meters.load_state_dict(own["meters"])
        else:
            _logger.warning("%s was saved by %d processes: random states start afresh.", path, len(processes))


def _whole(state: Any) -> Any:
    """`state` with the tensors that are divided among processes put together, in the memory of the main process.

    (torch.distributed.checkpoint would name the optimiser's entries, which every published file numbers.)
    """
    if isinstance(state, DTensor):
        whole = state.full_tensor()
        return whole.cpu() if is_main_process() else None
    if isinstance(state, dict):
        return {name: _whole(value) for name, value in state.items()}
    return state


def _divided_optimizer(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = {
        index: {
            name: divided(value, parameters[index])
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for name, value in entry.items()
        }
        for index, entry in state["state"].items()
        if index < len(parameters)
    }
    return state | {"state": entries}


def _scheduler_state(scheduler: Scheduler | None) -> dict[str, Any]:
    # timm leaves most of the state of 'plateau' out
    if isinstance(scheduler, PlateauLRScheduler):
        return {"plateau": scheduler.lr_scheduler.state_dict(), "restore_lr": scheduler.restore_lr}
    return scheduler.state_dict() if scheduler is not None else {}


def _go_to(scheduler: Scheduler | None, run: Run, state: dict[str, Any]) -> None:
    """Bring a fresh schedule to where `run` stands. Only 'plateau' has a memory; the others follow from the place, and
    so take flags that have changed since."""
    if isinstance(scheduler, PlateauLRScheduler):
        if "plateau" in state:
            check_like(state["plateau"], scheduler.lr_scheduler.state_dict(), "lr_scheduler")
            if state["restore_lr"] is not None:
                check_like(state["restore_lr"], [0.0] * len(run.optimizer.param_groups), "lr_scheduler")
            scheduler.lr_scheduler.load_state_dict(state["plateau"])
            scheduler.restore_lr = state["restore_lr"]
            for group, rate in zip(run.optimizer.param_groups, scheduler.lr_scheduler._last_lr):
                group["lr"] = rate
    elif scheduler is not None:
        if run.epoch:
            scheduler.step(run.epoch)
        if run.updates:
            scheduler.step_update(run.updates)


def save(path: Path, checkpoint: dict[str, Any]) -> bool:
    """Write `checkpoint` to `path`, replacing it only once the new file is whole; False, with a warning, if that
    fails."""
    return write_if_possible(path, lambda file: torch.save(checkpoint, file))


def save_run(
    run: Run, args: argparse.Namespace, output: Path, log: dict[str, Any] | None = None, is_best: bool = False
) -> bool:
    """Write the checkpoint of this moment and, once it is whole, the line of the epoch that just ended.

    Returns whether the checkpoint is on the disk. Raises RunError instead of saving weights that are not finite. Every
    process must call this together.
    """
    broken = [
        name
        for name, value in (*run.model.named_parameters(), *run.model.named_buffers())
        if not bool((value.to_local() if isinstance(value, DTensor) else value).isfinite().all())
    ]
    if any_process(bool(broken))[0]:
        name = broken[0] if broken else "Another process's share of the weights"
        raise RunError(f"{name} is not finite in epoch {run.epoch}; it is not saved, and the run stops.")
    checkpoint = run.capture(args, log)
    if not is_main_process():
        return True
    is_saved = save(output / "checkpoint.pth", checkpoint)
    if is_saved and is_best:
        copy_whole(output / "checkpoint.pth", output / "best_checkpoint.pth")
    if log is not None:
        run.unwritten = append_log(output / "log.txt", [*run.unwritten, log])
    return is_saved


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


def find(args: argparse.Namespace) -> tuple[str, Any]:
    """The checkpoint that --resume names and where it lies; ("", None) if it is auto and there is none yet.

    Raises UsageError if there are checkpoints and none of them is whole, since going on from nothing would bury them.
    """
    if args.resume != "auto":
        return args.resume, read(args.resume)
    output = Path(args.output_dir)
    files = [file for name in CHECKPOINTS if (file := output / name).is_file()]
    whole = []
    for file in files:
        try:
            checkpoint = read(str(file))
            # a file's time says nothing once it was copied
            whole.append((_progress(checkpoint), str(file), checkpoint))
        except UsageError as error:
            _logger.warning("%s Trying the others.", error)
    if whole:
        _, path, checkpoint = max(whole, key=lambda entry: entry[0])
        return path, checkpoint
    if files or args.eval:
        raise UsageError(f"--resume auto: no checkpoint in {output} is whole; wanted one, or an empty folder to train.")
    return "", None


def _progress(checkpoint: Any) -> tuple[float, float]:
    """How far the run of `checkpoint` was: its epochs and steps."""
    places = (checkpoint.get(name) for name in ("epoch", "step")) if isinstance(checkpoint, dict) else (None, None)
    epoch, step = (float(place) if isinstance(place, (int, float)) else -2.0 for place in places)
    return epoch, step


def _check_run(checkpoint: dict[str, Any]) -> None:
    """Raise ValueError for entries that no run writes and that would only come to light later."""
    for name, kinds, low in (
        ("epoch", int, -1),
        ("step", int, 0),
        ("updates", int, 0),
        ("best_accuracy", (int, float), 0),
        ("best_metric", (int, float, type(None)), None),
        ("seconds", (int, float), 0),
    ):
        value = checkpoint.get(name, 0)
        if not isinstance(value, kinds) or (low is not None and not value >= low):
            raise ValueError(f"{name} is {value!r}")
    for name in ("batch_size", "world_size"):
        check_like(saved_flags(checkpoint).get(name, 1), 1, f"args.{name}")
    # its line goes into log.txt
    json.dumps(checkpoint.get("log"))
    for name, kinds in (("log", dict), ("args", (dict, argparse.Namespace)), ("task_state", dict)):
        value = checkpoint.get(name)
        if value is not None and not isinstance(value, kinds):
            raise ValueError(f"{name} is a {type(value).__name__}")


def resume(run: Run, args: argparse.Namespace) -> dict[str, Any] | None:
    """Go on from the checkpoint that --resume names, in the middle of an epoch if it was saved there.

    Returns the line of the last whole epoch, for the log. Nothing is written.
    """
    path, checkpoint = find(args)
    if checkpoint is None:
        _logger.info("--resume auto: no checkpoint in %s yet, starting from the beginning.", args.output_dir)
        return None
    if not isinstance(checkpoint, dict):
        raise UsageError(f"{path} holds a {type(checkpoint).__name__}; wanted the checkpoint of a run.")
    before = saved_flags(checkpoint)
    try:
        _check_run(checkpoint)
        accept(args, run.model, checkpoint, path)
        if before.get("opt", args.opt) != args.opt and "optimizer" in checkpoint:
            raise UsageError(
                f"{path} was trained with --opt {before['opt']}, and --opt {args.opt} cannot go on from its state; "
                "wanted the same, or --finetune for its weights."
            )
        run.restore(checkpoint, path, args)
    except UsageError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, OverflowError) as error:
        told = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(f"{path} holds no state to go on from ({told}); wanted --finetune for its weights.") from error
    now = vars(args)
    changed = [name for name in SCHEDULE_FLAGS if name in before and before[name] != now.get(name)]
    if changed:
        told = ", ".join(f"--{name.replace('_', '-')} {before[name]} -> {now.get(name)}" for name in changed)
        _logger.warning("Flags changed since %s was saved are taken from here on: %s.", path, told)
    total, own = before.get("batch_size", 0) * before.get("world_size", 1), args.batch_size * world_size()
    if run.step and total != own:
        run.step = run.step * total // own
        _logger.warning("The total batch was %d and is %d: the epoch goes on at step %d.", total, own, run.step)
    _logger.info("Resumed %s at epoch %d step %d.", path, run.epoch, run.step)
    if run.epoch >= args.epochs:
        _logger.warning(
            "%s has trained %d epochs and --epochs is %d: nothing is left to do.", path, run.epoch, args.epochs
        )
    return checkpoint.get("log")


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def append_log(file: Path, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add `entries`, a line each, to log.txt; returns those that found no room, of which the file keeps nothing."""
    for number, entry in enumerate(entries):
        size = None
        try:
            with open(file, "ab", buffering=0) as stream:
                size = stream.tell()
                line = json.dumps(entry).encode() + b"\n"
                if stream.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            _logger.warning("log.txt could not be written (%s): its lines wait for the next epoch.", error)
            if size is not None:
                with contextlib.suppress(OSError):
                    os.truncate(file, size)
            return entries[number:]
    return []


def repair_log(file: Path, epoch: int, last: dict[str, Any] | None) -> None:
    """Make log.txt end with epoch `epoch` - 1, whose line is `last`: a kill leaves a line too many or too few."""
    lines = []
    if file.exists():
        for text in file.read_text(errors="replace", encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, RecursionError):  # a line that a kill cut short
                line = json.loads(text)
                # what no run writes is left behind
                if isinstance(line, dict) and isinstance(line.get("epoch"), int) and line["epoch"] < epoch:
                    lines.append(line)
    if last is not None and not any(line["epoch"] == last.get("epoch") for line in lines):
        lines.append(last)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    if text or file.exists():
        write_atomically(file, lambda stream: stream.write(text.encode()))


def claim_output(args: argparse.Namespace, written: Sequence[str] = ()) -> contextlib.AbstractContextManager:
    """Make --output_dir and remove what killed writes left there, of a run's own files and of those that its task has
    `written`.

    Returns what holds the folder for this run alone, until it is closed. Raises UsageError if another run holds it.
    """
    output = Path(args.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = _lock(output)
        remove_temporaries(output, (*OUTPUT_FILES, *written))
    except OSError as error:
        raise UsageError(f"--output_dir {output} cannot be written: {error}.") from error
    return lock


def prepare_output(args: argparse.Namespace, epoch: int, last: dict[str, Any] | None) -> None:
    """Put an earlier run's files aside, or make its log end with epoch `epoch` - 1, whose line is `last`, if this run
    goes on from them; and keep the flags."""
    output = Path(args.output_dir)
    text = json.dumps(vars(args), indent=2, default=str)
    try:
        for name in (*CHECKPOINTS, "log.txt"):
            file = output / name
            if not args.resume and file.exists():
                aside = file.with_name(f"{file.stem}_before{file.suffix}")
                os.replace(file, aside)
                _logger.warning("%s has a run already: its %s is now %s.", output, name, aside.name)
        if args.resume:
            repair_log(output / "log.txt", epoch, last)
        write_atomically(output / "args.json", lambda file: file.write(text.encode()))
    except OSError as error:
        raise UsageError(f"--output_dir {output} cannot be written: {error}.") from error


def _lock(output: Path) -> contextlib.AbstractContextManager:
    """Hold `output`; a run that is just ending is waited for."""
    if fcntl is None:
        return contextlib.nullcontext()
    file = open(output / ".lock", "a", encoding="utf-8")  # noqa: SIM115 - held for as long as the run lasts
    for patience in range(LOCK_SECONDS * 10, -1, -1):
        try:
            # of this process alone, so that loader workers that outlive it hold nothing
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except (BlockingIOError, PermissionError):
            if patience:
                time.sleep(0.1)
        except OSError:  # a file system that has no locks
            return file
    file.close()
    raise UsageError(
        f"--output_dir {output} belongs to a run that is still going; wanted another folder, or that run ended."
    )
