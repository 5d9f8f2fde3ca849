"""The processes of a run: how they find each other, what they say together, and who speaks."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from utils.errors import PeerError, UsageError
from utils.flags import number


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
    if args.fsdp and device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise UsageError(f"--fsdp on CPUs is not in torch {torch.__version__}; wanted a newer one, or GPUs.")
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
