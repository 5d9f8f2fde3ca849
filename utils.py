"""Small helpers of the program: user errors, processes, random states, signals, meters."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import difflib
import logging
import multiprocessing
import multiprocessing.util
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

_logger = logging.getLogger(__name__)


class UsageError(ValueError):
    """A mistake of the user's, told in one sentence; `main` prints it and exits with code 2.

    A data-loader worker hands its exception over as the text of a traceback; the sentence is what that text ends with.
    `is_own` is set where only this process of a run has met the mistake.
    """

    is_own = False

    def __init__(self, message: str) -> None:
        super().__init__(
            message.strip().rpartition(f"{__name__}.UsageError: ")[2] if "Traceback" in message else message
        )


class RunError(RuntimeError):
    """A run that cannot go on, told in one sentence; `main` prints it and exits with code 1."""


class PeerError(RuntimeError):
    """Another process of the run has failed and says why; this one only ends."""


def nearest(wanted: str, names: Iterable[str]) -> str:
    """The end of a sentence that offers the names closest to `wanted`, or the empty string if none is close."""
    close = difflib.get_close_matches(wanted, list(names), n=3, cutoff=0.5)
    return f"; the nearest names are {', '.join(close)}" if close else ""


# ---------------------------------------------------------------------------------------------------------------------
# Flags


class Parser(argparse.ArgumentParser):
    """An argument parser that tells a mistake in one line and knows which flags were typed."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message[0].upper() + message[1:].rstrip(".") + f" ({self.prog} --help lists the flags).")

    def parse(self, argv: list[str] | None = None) -> tuple[argparse.Namespace, set[str]]:
        """Parse `argv`; returns the values and the names of those that were typed."""
        args = self.parse_args(argv)
        unset = object()
        typed = argparse.Namespace(**dict.fromkeys(vars(args), unset))
        self.parse_args(argv, typed)
        return args, {name for name, value in vars(typed).items() if value is not unset}


def number(
    kind: type, low: float | None = None, high: float | None = None, *, above: bool = False, below: bool = False
) -> Callable[[str], Any]:
    """An argparse type: a finite int or float from `low` to `high`, the bounds left out if `above`, `below`."""

    def parse(text: str) -> Any:
        wanted = "a whole number" if kind is int else "a number"
        if low is not None:
            wanted += f" above {low:g}" if above else f" from {low:g}"
        if high is not None:
            wanted += f"{' and' if above else ''} {'below' if below else 'to' if not above else 'at most'} {high:g}"
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
        too_low = low is not None and (value <= low if above else value < low)
        too_high = high is not None and (value >= high if below else value > high)
        if too_low or too_high or not np.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


def add_switch(parser: argparse._ActionsContainer, on: list[str], off: list[str], *, default: bool, help: str) -> None:
    """Add a pair of flags that switch one value, named after the first flag, on and off."""
    dest = on[0].lstrip("-").replace("-", "_")
    text = f"{help}; {off[0]} switches it off (default: {'on' if default else 'off'})"
    parser.add_argument(*on, dest=dest, action="store_true", default=default, help=text)
    parser.add_argument(*off, dest=dest, action="store_false", default=default, help=argparse.SUPPRESS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of machine and processes."""
    group = parser.add_argument_group("machine and processes")
    group.add_argument("--device", default=None, help="cuda, cuda:N or cpu (default: cuda where there is one)")
    group.add_argument("--seed", type=number(int, 0, 2**31 - 1), default=0, help="seed of every random choice")
    group.add_argument("--deterministic", action="store_true", help="use deterministic algorithms only")
    group.add_argument("--distributed", action="store_true", help="start a process group even for a single process")
    group.add_argument("--fsdp", action="store_true", help="divide parameters and optimiser among the processes")
    group.add_argument(
        "--world_size", "--world-size", type=number(int, 1), default=1, help="processes; launchers set it"
    )
    group.add_argument("--dist_url", "--dist-url", default="env://", help="where the processes meet")
    group.add_argument("--local-rank", "--local_rank", type=number(int, 0), default=0, help="set by old launchers")


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def rank() -> int:
    """This process's number among all; 0 when alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes run together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main_process() -> bool:
    """Whether this process writes files and speaks."""
    return rank() == 0


def speaks_for_node() -> bool:
    """Whether this process reports mistakes that every process of its machine makes alike."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))) == 0


def _slurm_rendezvous() -> None:
    """Translate what `srun` sets into what torch.distributed reads, where a launcher has not done so."""
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")
    os.environ["WORLD_SIZE"] = os.environ["SLURM_STEP_NUM_TASKS"]
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ.get("SLURM_STEP_NODELIST", "localhost")
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            nodes = subprocess.run(
                ["scontrol", "show", "hostnames", nodes], check=True, capture_output=True, text=True
            ).stdout
        os.environ["MASTER_ADDR"] = nodes.split()[0]
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000))


def init_processes(args: argparse.Namespace) -> torch.device:
    """Join the process group that torchrun, SLURM or the flags describe, and choose this process's device.

    Sets `args.distributed`, `args.world_size`, `args.rank`, `args.local_rank`. CUDA groups also carry gloo, so that
    flags shared between steps stay on the CPU. Raises UsageError for a device that is not there.
    """
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        _slurm_rendezvous()
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    args.local_rank = int(os.environ.get("LOCAL_RANK", args.local_rank)) if launched else 0
    device = _choose_device(args.device, args.local_rank if launched else None)
    if launched:
        args.rank, args.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        args.distributed = args.distributed or args.world_size > 1
    elif args.world_size > 1:
        raise UsageError(
            f"--world_size is {args.world_size} but no launcher started the processes; wanted torchrun or srun."
        )
    else:
        args.rank = 0
    if args.fsdp and not args.distributed:
        raise UsageError("--fsdp divides a model among processes, and there is one; wanted torchrun or srun.")
    if args.distributed:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = _meeting_place(args) if launched else dist.HashStore()
        dist.init_process_group(backend, store=store, rank=args.rank, world_size=args.world_size)
    return device


def _meeting_place(args: argparse.Namespace) -> dist.Store:
    """The store at --dist_url through which the processes find each other."""
    store, _, _ = next(dist.rendezvous(args.dist_url, args.rank, args.world_size))
    # torchrun keeps one store for all restarts, where processes would find the addresses of those that died; machines
    # count restarts on their own, so several of them want TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 instead
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    return store


def _choose_device(name: str | None, local_rank: int | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device is {name!r}; wanted cuda, cuda:N or cpu.") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device is {name!r}; wanted cuda, cuda:N or cpu.")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"--device is {name!r} but this machine has no usable CUDA device; wanted cpu.")
        index = device.index if device.index is not None else local_rank or 0
        if index >= torch.cuda.device_count():
            raise UsageError(
                f"Process {index} of this machine wants cuda:{index} but it has {torch.cuda.device_count()}."
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def any_process(*flags: bool) -> tuple[bool, ...]:
    """Which of `flags` is set on at least one process; every process must call this together."""
    if world_size() == 1:
        return flags
    shared = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return tuple(bool(flag) for flag in shared)


def sum_over_processes(values: list[float]) -> list[float]:
    """Each of `values` summed over all processes, in double precision; every process must call this together."""
    if world_size() == 1:
        return values
    shared = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(shared)
    return shared.tolist()


def gather_objects(value: Any) -> list[Any]:
    """`value` of every process, by rank; every process must call this together."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def once_per_node(work: Callable[[], None]) -> None:
    """Run `work` in one process of every machine while the others wait; every process must call this together.

    Raises what `work` raises, and PeerError in the processes that waited for one that failed.
    """
    failure = None
    if speaks_for_node():
        try:
            work()
        except Exception as error:
            failure = error
    failed = any_process(failure is not None)[0]
    if failure is not None:
        raise failure
    if failed:
        raise PeerError


def tell_mistake(error: UsageError) -> None:
    """Print `error`: from one process of each machine, unless only this process has met it."""
    if speaks_for_node() or error.is_own:
        print(f"main.py: error: {error}", file=sys.stderr, flush=True)
    else:
        # a launcher ends all processes as soon as one has ended, and the one that speaks may be slower
        time.sleep(10)


def is_lost_peer(error: Exception) -> bool:
    """Whether `error` is a collective that broke because another process went away."""
    return world_size() > 1 and (
        isinstance(error, dist.DistError)
        or bool(re.search(r"[Cc]onnection (closed|reset|refused)|closed by peer|remote process", str(error)))
    )


# ---------------------------------------------------------------------------------------------------------------------
# Random states


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch, on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - timm's mixup and augmentations draw from numpy's global state
    torch.manual_seed(seed)


def random_state(device: torch.device) -> dict[str, Any]:
    """This process's random states, as plain values and tensors that load with weights_only."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    state = {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what `random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextlib.contextmanager
def seeded(seed: int, *, restore: bool) -> Iterator[None]:
    """Run a block with python, numpy and torch's CPU generator seeded, and put their states back if `restore`."""
    generator = torch.default_generator
    before = (random.getstate(), np.random.get_state(), generator.get_state()) if restore else None  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    generator.manual_seed(seed)
    try:
        yield
    finally:
        if before is not None:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002
            generator.set_state(before[2])


def use_deterministic_algorithms() -> None:
    """Make torch refuse or replace algorithms whose result changes from run to run."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


# ---------------------------------------------------------------------------------------------------------------------
# Signals


class StopRequest:
    """Notes SIGTERM, SIGUSR1 (SLURM's) and SIGUSR2 (submitit's): the run is to save itself and end at the next step."""

    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.name is not None

    def _note(self, number: int, frame: object) -> None:
        self.name = signal.Signals(number).name

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in self.signals}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


# Shared with forked workers. multiprocessing ends them with SIGTERM too, from a function that runs at exit; functions
# registered after it run before it.
_program_ends = multiprocessing.RawValue("b", 0)
atexit.register(lambda: setattr(_program_ends, "value", 1))


def _end_with_program(number: int, frame: object) -> None:
    if _program_ends.value:
        os._exit(0)


def ignore_stop_signals(worker_id: int = 0) -> None:
    """For data-loader workers: signals to the whole job are for the process that trains, and workers end with it."""
    for number in StopRequest.signals:
        signal.signal(number, _end_with_program)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring and telling


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory in MiB: allocated on `device` since the last reset, or this process's peak resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


class Meters:
    """Running values of an epoch: a short window for the console, and exact sums that survive a resume."""

    window = 20

    def __init__(self) -> None:
        self._recent: dict[str, deque[float]] = {}
        self._sums: dict[str, list[float]] = {}

    def update(self, count: int = 1, **values: float) -> None:
        """Add `values`, each the mean of `count` things."""
        for name, value in values.items():
            self._recent.setdefault(name, deque(maxlen=self.window)).append(value)
            total = self._sums.setdefault(name, [0.0, 0])
            total[0] += value * count
            total[1] += count

    def averages(self) -> dict[str, float]:
        """Means over the epoch and over all processes; every process must call this together."""
        names = list(self._sums)
        sums = sum_over_processes([number for name in names for number in self._sums[name]])
        return {name: sums[2 * i] / max(sums[2 * i + 1], 1) for i, name in enumerate(names)}

    def __str__(self) -> str:
        return "  ".join(
            f"{name}: {sorted(values)[len(values) // 2]:.4f} ({self._sums[name][0] / max(self._sums[name][1], 1):.4f})"
            for name, values in self._recent.items()
        )

    def state_dict(self) -> dict[str, list[float]]:
        """The exact sums."""
        return {name: list(total) for name, total in self._sums.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Go on from the sums of an interrupted epoch."""
        self._sums = {name: list(total) for name, total in state.items()}


class Progress:
    """Tells how far a loop is: a tqdm bar on a terminal, else DeiT's meter line every `every` steps; rank 0 only."""

    def __init__(self, title: str, total: int | None, device: torch.device, *, start: int = 0, every: int = 10) -> None:
        self.title, self.total, self.device, self.start, self.every = title, total, device, start, every
        self.began = time.perf_counter()
        self.images = 0
        self._quiet = not is_main_process()
        self._bar = None
        if not self._quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, desc=title, leave=False, dynamic_ncols=True)

    def step(self, done: int, images: int, text: str) -> None:
        """Tell that `done` steps are through, the last one with `images` images over all processes."""
        self.images += images
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)
        elif (done - 1) % self.every == 0 or done == self.total:
            seconds = self.elapsed()
            each = seconds / max(done - self.start, 1)
            left = "?" if self.total is None else _clock(each * (self.total - done))
            _logger.info(
                "%s  [%d/%s]  eta: %s  %s  time: %.4f  images/s: %.1f  max mem: %.0f MiB",
                *(self.title, done, "?" if self.total is None else self.total, left, text, each),
                *(self.images / max(seconds, 1e-9), peak_memory_mib(self.device)),
            )

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.began

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


class Board:
    """TensorBoard events in a folder, None for none; points after `updates` steps, of a run that was killed, are
    replaced."""

    every = 20  # steps between two points of the training loss

    def __init__(self, folder: Path | None, updates: int = 0) -> None:
        self._writer = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=updates + 1 if updates else None)

    def add(self, values: dict[str, float], step: int) -> None:
        """Add a point to each curve. A disk that is full ends the curves, not the run."""
        if self._writer is None:
            return
        try:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()
        except OSError as error:
            _logger.warning("TensorBoard's events could not be written (%s): no more are.", error)
            self._writer = None

    def close(self) -> None:
        """End the file."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()


def accuracy(outputs: Tensor, targets: Tensor, top: tuple[int, ...] = (1, 5)) -> list[float]:
    """How many rows of `outputs` (B, classes) have their target (B,) among their k highest, for each k of `top`."""
    best = min(max(top), outputs.shape[1])
    ranked = outputs.topk(best, dim=1).indices == targets[:, None]
    return [float(ranked[:, : min(k, best)].sum()) for k in top]


def setup_logging() -> None:
    """Send notices to stdout and warnings to stderr, on the main process only."""
    info = logging.StreamHandler(sys.stdout)
    info.addFilter(lambda record: record.levelno < logging.WARNING)
    warning = logging.StreamHandler(sys.stderr)
    warning.setLevel(logging.WARNING)
    level = logging.INFO if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", handlers=[info, warning], force=True)
