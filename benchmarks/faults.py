"""Faults that a run of any task is to survive: kills, signals, a full disk, a lost process, two machines.

A fault that was lost is a failure of its `Tally`; nothing is raised.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import checkpoints
from benchmarks.jobs import Job
from benchmarks.program import MICRO, finish, go_on, lines, ranks_of, start

PATIENCE = 120  # seconds until what does not happen counts as lost
# the learning rate of an epoch must not depend on how many there are
STEADY = ("--sched", "none", "--weight-decay", "0.05", "--model-ema", "--model-ema-decay", "0.9", "--lr", "0.01")


class Lost(Exception):
    """A fault did what it must not; the message says what."""


@dataclass
class Tally:
    """Counts of one kind of fault."""

    name: str
    tried: int = 0
    failures: list[str] = field(default_factory=list)
    notes: str = ""

    @contextlib.contextmanager
    def trial(self) -> Iterator[None]:
        """Count a fault, as lost if the block raises."""
        self.tried += 1
        try:
            yield
        except NoNamespaces:
            self.tried -= 1
            raise
        except Exception as error:  # whatever went wrong, a run was not as it should be
            self.failures.append(f"{self.name}: {type(error).__name__}: {error}")

    def row(self) -> dict[str, Any]:
        """A row of the table."""
        lost = len(self.failures)
        return dict(name=self.name, tried=self.tried, survived=self.tried - lost, lost=lost, notes=self.notes)


def expect(is_true: bool, told: str) -> None:
    """Raise Lost, saying `told`, unless `is_true`."""
    if not is_true:
        raise Lost(told)


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[str], what: str) -> None:
    """Until `is_so`; a process that ends before, or too much time, is lost."""
    looks = PATIENCE * 50  # counted, not timed: all may be stopped for a while, as batch systems do
    while not is_so():
        looks -= 1
        if process.poll() is not None or not looks:
            stop_all(process)
            raise Lost(f"no {what}: {process.communicate()[1][-400:]}")
        go_on(process, 0.02)


def stop_all(process: subprocess.Popen[str]) -> None:
    """End `process` and, if it is a launcher, what it started."""
    for number in (*ranks_of(process), process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


_launched: list[subprocess.Popen[str]] = []


@contextlib.contextmanager
def ended() -> Iterator[None]:
    """Let no run that the block launches outlive it."""
    try:
        yield
    finally:
        for process in _launched:
            if process.poll() is None:
                stop_all(process)
        _launched.clear()


def epochs_in(output: Path) -> int:
    """How many epochs log.txt tells of."""
    file = output / "log.txt"
    return file.read_text(encoding="utf-8").count("\n") if file.exists() else 0


def launch(processes: int, *flags: object) -> subprocess.Popen[str]:
    """Start the program in `processes` processes."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes) if processes > 1 else ()
    _launched.append(start(*launcher, MICRO, *flags))
    return _launched[-1]


def succeed(process: subprocess.Popen[str], timeout: float = 600) -> str:
    """Wait for the end, which must be a good one; returns what was said on stderr."""
    try:
        result = finish(process, timeout)
    except subprocess.TimeoutExpired:
        stop_all(process)
        raise
    expect(result.code == 0, f"exit code {result.code}: {result.err[-400:]}")
    return result.err


def check_readable(output: Path) -> dict[str, Any] | None:
    """Load every checkpoint that is there; returns the newest."""
    found = {file.name: checkpoints.read(str(file)) for file in output.glob("*.pth")}
    return found.get("checkpoint.pth")


def check_same(output: Path, reference: Path) -> None:
    """The logs and weights of two runs must agree to the last bit, and the log must hold every epoch once."""
    logs = [
        [{k: v for k, v in line.items() if k not in ("seconds", "peak_memory_mib")} for line in lines(each)]
        for each in (output, reference)
    ]
    expect([line["epoch"] for line in logs[0]] == list(range(len(logs[0]))), "the log has gaps")
    expect(logs[0] == logs[1], "the logs differ")
    first, second = (checkpoints.read(str(each / "checkpoint.pth")) for each in (output, reference))
    for entry in ("model", "model_ema"):
        expect(first[entry].keys() == second[entry].keys(), f"{entry} differs")
        for name, value in first[entry].items():
            expect(torch.equal(value, second[entry][name]), f"{entry} {name} differs")


# ---------------------------------------------------------------------------------------------------------------------
# Faults


def kill(job: Job, folder: Path, kills: int, chance: random.Random, workers: int = 2) -> Tally:
    """kill -9 at random moments of a run that writes a checkpoint every few steps, then compare it with one that was
    left alone."""
    tally, output = Tally("kill -9 at a random moment, then --resume auto"), folder / "killed"
    flags = [*job.data(folder), *STEADY, *job.batches(), "--num_workers", workers]
    early, groups = 0, []
    for number in range(kills):
        with tally.trial():
            before = epochs_in(output)
            process = launch(1, *flags, "--epochs", 10**6, "--output_dir", output, "--resume", "auto")
            groups.append(process.pid)
            began = time.monotonic()
            if number % 5 == 4:  # one in five before or while the run is picked up
                time.sleep(chance.uniform(0, 5))
                early += 1
            else:
                wait_until(lambda before=before: epochs_in(output) > before + 1, process, "progress after a kill")
                time.sleep(chance.uniform(0, 0.6))
            alive = process.poll() is None
            # the process alone, as a machine short of memory does, or with its loader workers
            chance.choice([os.kill, os.killpg])(process.pid, signal.SIGKILL)
            told = process.communicate(timeout=60)[1]
            expect(alive, f"the run ended by itself after {time.monotonic() - began:.1f} s: {told[-300:]}")
            check_readable(output)
    state = check_readable(output)
    with contextlib.ExitStack() as stack:
        stack.enter_context(tally.trial())
        tally.tried -= 1  # the comparison at the end is no fault of its own
        expect(state is not None, "no checkpoint at the end")
        flags += ["--epochs", state["epoch"] + 3]
        succeed(launch(1, *flags, "--output_dir", output, "--resume", "auto"))
        succeed(launch(1, *flags, "--output_dir", folder / "whole"))
        check_same(output, folder / "whole")
        expect(not list(output.glob(".*.tmp")), "temporary files are left")
        end = time.monotonic() + 30
        while (left := [group for group in groups if _is_alive(group)]) and time.monotonic() < end:
            time.sleep(0.5)
        expect(not left, f"loader workers of {len(left)} killed runs are left")
        tally.notes = (
            f"{early} of them in the first seconds; {state['epoch'] + 3} epochs, log and weights equal those of a run"
            " that was left alone"
        )
    return tally


def _is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def preempt(job: Job, folder: Path, chance: random.Random) -> list[Tally]:
    """A signal in the middle of an epoch; the resumed run must equal one that was left alone."""
    flags = [*job.data(folder, job.batch * job.steps_between), *STEADY, "--num_workers", 1]
    tallies = []
    for processes in (1, 2):
        own = [*flags, *job.batches(processes), "--epochs", 4]
        whole = folder / f"whole_{processes}"
        succeed(launch(processes, *own, "--output_dir", whole))
        for number in (signal.SIGTERM, signal.SIGUSR1):
            tally = Tally(f"{number.name} to {'the process' if processes == 1 else 'one of two processes'}")
            tallies.append(tally)
            with tally.trial():
                output = folder / f"{number.name}_{processes}"
                process = launch(processes, *own, "--output_dir", output)
                wait_until(lambda output=output: epochs_in(output) > 0, process, "epoch")
                # in the midst of the next one, however slow the machine is
                time.sleep(chance.uniform(0.2, 0.7) * lines(output)[0]["seconds"])
                os.kill(ranks_of(process)[-1] if processes > 1 else process.pid, number)
                told = succeed(process, 60)
                expect(told.count("Stopped by") == 1, f"no note: {told}")
                state = check_readable(output)
                expect(state["step"] > 0, "it stopped between epochs")
                tally.notes = (
                    f"stopped at epoch {state['epoch'] + 1} step {state['step']}; resumed, log and weights equal"
                )
                succeed(launch(processes, *own, "--output_dir", output, "--resume", "auto"))
                check_same(output, whole)
    return tallies


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 32 MiB at `folder`."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill_disk(job: Job, folder: Path) -> list[Tally]:
    """Checkpoints that cannot be written while the disk is full, and the run's going on once it is not."""
    full, limit = Tally("disk full (tmpfs)"), Tally("file size limit (RLIMIT_FSIZE)")
    flags = [*job.data(folder), *STEADY, *job.batches(), "--epochs", 10**6]
    if os.geteuid():
        full.notes = "not tried: wants root"
    else:
        with full.trial(), exit_on_sigterm(), small_disk(folder / "disk") as disk:
            _write_fails(flags, disk / "run", lambda process: _full(disk / "filler"), full)
    with limit.trial():
        _write_fails(flags, folder / "limited", _limited, limit)
    return [full, limit]


@contextlib.contextmanager
def _full(filler: Path) -> Iterator[None]:
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    yield
    filler.unlink()


@contextlib.contextmanager
def _limited(process: subprocess.Popen[str]) -> Iterator[None]:
    before = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100, before[1]))
    yield
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, before)


def _write_fails(flags: list[Any], output: Path, fault: Callable[..., Any], tally: Tally) -> None:
    process = launch(1, *flags, "--output_dir", output)
    wait_until(lambda: epochs_in(output) > 0, process, "epoch")
    began = time.monotonic()
    wait_until(lambda: epochs_in(output) > 2, process, "epoch")
    each = (time.monotonic() - began) / 2
    with fault(process):
        time.sleep(0.5)  # a write that had begun may still end
        state = check_readable(output)
        time.sleep(1.5 + 3 * each)  # several more would be, however slow the machine is
        expect(process.poll() is None, "the run ended")
        expect(check_readable(output)["epoch"] == state["epoch"], "a checkpoint was written to a full disk")
    wait_until(
        lambda: check_readable(output)["epoch"] > state["epoch"] + 3, process, "checkpoint after the disk is free"
    )
    process.send_signal(signal.SIGTERM)
    told = succeed(process, 60)
    failed = told.count("checkpoint.pth could not be written")
    expect(failed > 1, f"no warning: {told[-300:]}")
    state = check_readable(output)
    epochs = [line["epoch"] for line in lines(output)]
    expect(
        epochs == list(range(state["epoch"] + 1)), f"the log has gaps: {len(epochs)} lines, {state['epoch'] + 1} epochs"
    )
    tally.notes = (
        f"{failed} writes failed with a warning each; the file before stayed whole; no epoch is missing in the log"
    )


def lose_process(job: Job, folder: Path, times: int) -> list[Tally]:
    """kill -9 of one process of two: the job must end in seconds, readable, and go on when started again."""
    tally, seconds, output = Tally("kill -9 of one of two processes"), [], folder / "output"
    flags = [*job.data(folder), *STEADY, *job.batches(), "--output_dir", output, "--resume", "auto"]
    for number in range(times):
        with tally.trial():
            before = epochs_in(output)
            process = launch(2, *flags, "--epochs", 10**6)
            wait_until(lambda before=before: epochs_in(output) > before + 2, process, "epoch")
            os.kill(ranks_of(process)[number % 2], signal.SIGKILL)
            began = time.monotonic()
            result = finish(process, PATIENCE)
            seconds.append(time.monotonic() - began)
            expect(seconds[-1] < 30, f"the end took {seconds[-1]:.0f} s")
            expect(result.code != 0 and "Signal 9" in result.err, f"exit code {result.code}: {result.err[-300:]}")
            state = check_readable(output)
            succeed(launch(2, *flags, "--epochs", state["epoch"] + 2))
            expect([line["epoch"] for line in lines(output)] == list(range(state["epoch"] + 2)), "the log has gaps")
    if seconds:
        tally.notes = f"the job ended {max(seconds):.1f} s later at the latest, and went on when started again"
    return [tally]


# ---------------------------------------------------------------------------------------------------------------------
# Two machines


class NoNamespaces(Exception):
    """This machine does not let us make network namespaces; the message says why."""


ADDRESSES = ("10.77.0.1", "10.77.0.2")


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Have SIGTERM end the block as an exception does, so that what it set up is taken down."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def two_machines() -> Iterator[list[str]]:
    """Names of two network namespaces with a cable between them. Raises NoNamespaces."""
    names = [f"vim{os.getpid()}{letter}" for letter in "ab"]

    def ip(*words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True)
        if done.returncode:
            raise NoNamespaces(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"ip {words[0]} failed")

    if shutil.which("ip") is None:
        raise NoNamespaces("there is no ip command")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
        for name, address in zip(names, ADDRESSES):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def on_two_machines(names: list[str], *flags: object) -> list[subprocess.Popen[str]]:
    """Start the program with one process on each machine."""
    processes = []
    for number, (name, address) in enumerate(zip(names, ADDRESSES)):
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-id", name[:-1], "--rdzv-endpoint", f"{ADDRESSES[0]}:29500"]
        # both have the host name of the machine that they are parts of, so they are told which one is the host
        rendezvous += ["--rdzv-conf", f"is_host={int(number == 0)}"]
        command = ["-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1, *rendezvous]
        command += ["--local-addr", address, MICRO, *flags]
        # the shell becomes `ip`, which becomes python: the process that is waited for is the launcher
        inside = f'import os, sys; os.execvp("ip", ["ip", "netns", "exec", "{name}", sys.executable, *sys.argv[1:]])'
        processes.append(start("-c", inside, *command, env={"GLOO_SOCKET_IFNAME": name}))
    return processes


def network(job: Job, folder: Path) -> list[Tally]:
    """A run on two machines must equal one of two processes on one, and end when a process of either dies."""
    equal, dies = (
        Tally("a run over two network namespaces"),
        Tally("kill -9 of a process in one of two network namespaces"),
    )
    flags = [*job.data(folder), *STEADY, *job.batches(), "--dist-eval"]
    try:
        with exit_on_sigterm(), two_machines() as names:
            with equal.trial():
                output = folder / "two_machines"
                for process in on_two_machines(names, *flags, "--epochs", 3, "--output_dir", output):
                    succeed(process, PATIENCE)
                succeed(launch(2, *flags, "--epochs", 3, "--output_dir", folder / "one_machine"))
                check_same(output, folder / "one_machine")
                equal.notes = "log and weights equal those of two processes on one machine"
            with dies.trial():
                output = folder / "killed"
                processes = on_two_machines(names, *flags, "--epochs", 10**6, "--output_dir", output)
                try:
                    wait_until(lambda: epochs_in(output) > 2, processes[0], "epoch")
                    os.kill(ranks_of(processes[1])[0], signal.SIGKILL)
                    began = time.monotonic()
                    results = [finish(process, PATIENCE) for process in processes]
                finally:
                    for process in processes:
                        stop_all(process)
                seconds = time.monotonic() - began
                expect(all(result.code for result in results), "a machine took the end for a good one")
                expect(seconds < 60, f"the end took {seconds:.0f} s")
                check_readable(output)
                dies.notes = f"both machines' launchers ended {seconds:.1f} s later; the checkpoint is whole"
    except NoNamespaces as error:
        equal.notes = dies.notes = f"not tried: {error}"
    return [equal, dies]
