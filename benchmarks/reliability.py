"""What a run survives and what it refuses: `python -m benchmarks.reliability` writes benchmarks/RELIABILITY.md.

Runs are killed, signalled, given a full disk and a lost process, trained in mixed precision, and spread over two
network namespaces (as root); the program and the operators are given inputs that are broken at random. Everything is
drawn from `--seed`. The exit code is 1 if anything was lost, crashed or not finite. Wants the packages of the test
suite, and runs from the root of a checkout.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

import checkpoints
from benchmarks.compare import DIGITS_RECIPE
from benchmarks.summary import markdown
from tests import bad_inputs
from tests.conftest import MICRO, QUICK, ROOT, finish, lines, ranks_of, start
from tests.program_data import write_cifar100

PATIENCE = 120  # seconds until what does not happen counts as lost
FAULTS = {"fault": "{name}", "tried": "{tried}", "survived": "{survived}", "lost": "{lost}", "notes": "{notes}"}
SWEEPS = {
    "input": "{name}",
    "tried": "{tried}",
    "accepted": "{accepted}",
    "refused cleanly": "{refused}",
    "crashed": "{crashed}",
}
RUNS = {
    "model": "{model}",
    "arithmetic": "{dtype}",
    "optimizer steps": "{steps}",
    "non-finite losses": "{bad}",
    "steps that the scaler left out": "{scaled}",
    "first and last epoch's loss": "{first:.4f}, {last:.4f}",
    "finite": "{finite}",
}
# the learning rate of an epoch must not depend on how many there are
STEADY = (*QUICK, "--sched", "none", "--model-ema-decay", "0.9", "--lr", "0.01")


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
    end = time.monotonic() + PATIENCE
    while not is_so():
        if process.poll() is not None or time.monotonic() > end:
            stop_all(process)
            raise Lost(f"no {what}: {process.communicate()[1][-400:]}")
        time.sleep(0.02)


def stop_all(process: subprocess.Popen[str]) -> None:
    """End `process` and, if it is a launcher, what it started."""
    for number in (*ranks_of(process), process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def epochs_in(output: Path) -> int:
    """How many epochs log.txt tells of."""
    file = output / "log.txt"
    return file.read_text().count("\n") if file.exists() else 0


def launch(processes: int, *flags: object) -> subprocess.Popen[str]:
    """Start the program in `processes` processes."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes) if processes > 1 else ()
    return start(*launcher, MICRO, *flags)


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


def soak(folder: Path, kills: int, chance: random.Random, workers: int = 2) -> Tally:
    """kill -9 at random moments of a run that writes a checkpoint every few steps, then compare it with one that was
    left alone."""
    tally = Tally("kill -9 at a random moment, then --resume auto")
    data, output = write_cifar100(folder / "data"), folder / "killed"
    flags = [*STEADY, "--data-set", "CIFAR", "--data-path", data, "--batch-size", 4, "--num_workers", workers]
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


def preempt(folder: Path, chance: random.Random) -> list[Tally]:
    """A signal in the middle of an epoch; the resumed run must equal one that was left alone."""
    data = write_cifar100(folder / "data", train=400)
    flags = [*STEADY, "--data-set", "CIFAR", "--data-path", data, "--num_workers", 1]
    tallies = []
    for processes in (1, 2):
        own = [*flags, "--batch-size", 4 // processes, "--epochs", 4]
        whole = folder / f"whole_{processes}"
        succeed(launch(processes, *own, "--output_dir", whole))
        for number in (signal.SIGTERM, signal.SIGUSR1):
            tally = Tally(f"{number.name} to {'the process' if processes == 1 else 'one of two processes'}")
            tallies.append(tally)
            with tally.trial():
                output = folder / f"{number.name}_{processes}"
                process = launch(processes, *own, "--output_dir", output)
                wait_until(lambda output=output: epochs_in(output) > 0, process, "epoch")
                time.sleep(chance.uniform(0.1, 0.4))
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
    """A file system of 8 MiB at `folder`."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill_disk(folder: Path) -> list[Tally]:
    """Checkpoints that cannot be written while the disk is full, and the run's going on once it is not."""
    full, limit = Tally("disk full (tmpfs)"), Tally("file size limit (RLIMIT_FSIZE)")
    data = write_cifar100(folder / "data")
    flags = [*STEADY, "--data-set", "CIFAR", "--data-path", data, "--batch-size", 4, "--epochs", 10**6]
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
    wait_until(lambda: epochs_in(output) > 2, process, "epoch")
    with fault(process):
        time.sleep(0.5)  # a write that had begun may still end
        state = check_readable(output)
        time.sleep(1.5)
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


def lose_process(folder: Path, times: int) -> list[Tally]:
    """kill -9 of one process of two: the job must end in seconds, readable, and go on when started again."""
    tally, seconds = Tally("kill -9 of one of two processes"), []
    data, output = write_cifar100(folder / "data"), folder / "output"
    flags = [*STEADY, "--data-set", "CIFAR", "--data-path", data, "--batch-size", 4, "--output_dir", output]
    flags += ["--resume", "auto"]
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


def network(folder: Path) -> list[Tally]:
    """A run on two machines must equal one of two processes on one, and end when a process of either dies."""
    equal, dies = (
        Tally("a run over two network namespaces"),
        Tally("kill -9 of a process in one of two network namespaces"),
    )
    data = write_cifar100(folder / "data")
    flags = [*STEADY, "--data-set", "CIFAR", "--data-path", data, "--batch-size", 4, "--dist-eval"]
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


# ---------------------------------------------------------------------------------------------------------------------
# Bad inputs


@dataclass
class Sweep:
    """Counts of one kind of input."""

    name: str
    accepted: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def tried(self) -> int:
        """How many inputs there were."""
        return self.accepted + self.refused + len(self.failures)

    def row(self) -> dict[str, Any]:
        """A row of the table."""
        counts = dict(accepted=self.accepted, refused=self.refused, crashed=len(self.failures))
        return dict(name=self.name, tried=self.tried, **counts)


def sweep(
    name: str,
    inputs: st.SearchStrategy[Any],
    judge: Callable[[Any], str],
    count: int,
    seed: int,
    allowed: Sequence[str] = (bad_inputs.ACCEPTED, bad_inputs.REFUSED),
) -> Sweep:
    """Judge `count` inputs, in processes of their own, so that one that ends by a signal is counted too."""
    result, context, part = Sweep(name), multiprocessing.get_context("fork"), 0
    while result.tried < count and part < 10 * count:
        receiver, sender = context.Pipe(duplex=False)
        left = min(count - result.tried, 500)
        child = context.Process(target=_judge_all, args=(inputs, judge, left, seed * 1000 + part, sender))
        child.start()
        sender.close()
        last, before = "", result.tried
        with contextlib.suppress(EOFError):
            while True:
                drawn, verdict = receiver.recv()
                last = "" if verdict else drawn
                if verdict:
                    _count(result, drawn, verdict, allowed)
        child.join()
        if not last and child.exitcode:
            raise RuntimeError(f"The inputs of {name} cannot be drawn.")
        if last:
            result.failures.append(f"{name}: {last} ended the process ({child.exitcode})")
        elif result.tried == before:
            raise RuntimeError(f"No input of {name} was judged: exit code {child.exitcode}.")
        part += 1
    return result


def _count(result: Sweep, drawn: str, verdict: str, allowed: Sequence[str]) -> None:
    if verdict not in allowed:
        result.failures.append(f"{result.name}: {drawn}: {verdict}")
    elif verdict == bad_inputs.ACCEPTED:
        result.accepted += 1
    else:
        result.refused += 1


def _judge_all(inputs: st.SearchStrategy[Any], judge: Callable[[Any], str], count: int, seed: int, sender: Any) -> None:
    torch.set_num_threads(1)

    @seeded(seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def run(value: Any) -> None:
        drawn = repr(value)[:600]
        sender.send((drawn, ""))
        sender.send((drawn, judge(value)))

    run()
    sender.close()


def bad_inputs_of_all_kinds(folder: Path, count: int, seed: int) -> list[Sweep]:
    """`count` inputs of every kind."""
    files, images = bad_inputs.Checkpoints.make(folder), bad_inputs.Images.make(folder)
    torch.save({"model": files.run["model"]}, folder / "teacher.pth")
    common = [*files.flags, "--teacher-path", folder / "teacher.pth", "--output_dir", folder / "output"]

    def judge_file(pair: tuple[bad_inputs.File, str]) -> str:
        return files.judge(*pair)

    def judge_flags(flags: list[str]) -> str:
        return bad_inputs.judge_program(*common, *flags)

    resumed = st.just("--resume")
    refused = (bad_inputs.REFUSED,)
    sweeps = [
        sweep("checkpoint bytes", st.tuples(files.damaged(), bad_inputs.USES), judge_file, count, seed),
        sweep(
            "checkpoints that call code",
            st.tuples(files.with_code(), bad_inputs.USES),
            judge_file,
            count,
            seed,
            refused,
        ),
        sweep("checkpoints with odd entries", st.tuples(files.odd(), resumed), judge_file, count, seed),
        sweep("image files", images.files(), images.judge, count, seed),
        sweep("command lines", bad_inputs.FLAGS, judge_flags, count, seed),
    ]
    for operator in bad_inputs.OPERATORS:
        calls = bad_inputs.calls(operator)
        sweeps.append(sweep(f"arguments of `{operator}`", calls, bad_inputs.judge_call, count, seed))
    return sweeps


# ---------------------------------------------------------------------------------------------------------------------
# Mixed precision

MODELS: dict[str, tuple[str, ...]] = {
    "Vim": ("--model", "vim_nano_patch4_32"),
    "Famba-V (paired), `upper`": (
        *("--model", "fambav_nano_patch4_32", "--fusion-strategy", "upper"),
        *("--fusion-layer", "2", "--fusion-token", "8"),
    ),
    "FastVim": ("--model", "fastvim_nano_patch4_32"),
    "DyVM": ("--model", "dyvm_nano_patch4_32"),
}
TRAIN_IMAGES = 1437
BATCH = 14


def mixed_precision(folder: Path, steps: int) -> list[dict[str, Any]]:
    """Train every method on DIGITS for at least `steps` steps; non-finite losses are skipped and counted."""
    epochs = math.ceil(steps / (TRAIN_IMAGES // BATCH))
    rows = []
    for dtype in ("bfloat16", "float16"):
        for model, own in MODELS.items():
            output = folder / f"{own[1]}_{dtype}"
            flags = [
                "--data-set",
                "DIGITS",
                *DIGITS_RECIPE,
                *own,
                "--batch-size",
                BATCH,
                "--lr",
                "1e-3",
                "--epochs",
                epochs,
                "--device",
                "cpu",
            ]
            flags += ["--if_amp", "--amp-dtype", dtype, "--if_continue_inf", "--output_dir", output]
            if model == "DyVM":  # it starts from a trained Vim, and learns from it
                flags += ["--model-path", folder / f"{MODELS['Vim'][1]}_{dtype}" / "checkpoint.pth"]
            try:
                told = succeed(start("main.py", *flags), 3600)
            except Lost as error:
                told = " ".join(str(error).split())
                rows.append(dict(model=model, dtype=dtype, steps=0, bad=0, scaled=0, first=math.nan, last=math.nan))
                rows[-1]["finite"] = f"no: {told}"
                continue
            state, log = check_readable(output), lines(output)
            taken = int(max(entry["step"] for entry in state["optimizer"]["state"].values()))
            bad = len(re.findall("the step is skipped", told))
            weights = all(bool(value.isfinite().all()) for value in state["model"].values())
            losses = [line["train_loss"] for line in log]
            finite = bad == 0 and weights and all(map(math.isfinite, losses))
            rows.append(
                dict(model=model, dtype=dtype, steps=taken, bad=bad, scaled=state["updates"] - taken)
                | dict(first=losses[0], last=losses[-1], finite="yes" if finite else "no")
            )
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Report


def processor() -> str:
    """The machine's processor and how many of its cores there are."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        info = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in info if line.startswith("model name"))
    return f"{os.cpu_count()} cores of an {name}"


def report(
    command: str, faults: list[Tally], sweeps: list[Sweep], runs: list[dict[str, Any]], seconds: dict[str, float]
) -> str:
    """The Markdown page."""
    failures = [text for each in (*faults, *sweeps) for text in each.failures]
    total = {
        "faults": [sum(each.tried for each in faults), sum(len(each.failures) for each in faults)],
        "inputs": [sum(each.tried for each in sweeps), sum(len(each.failures) for each in sweeps)],
    }
    finite = sum(run["finite"] == "yes" for run in runs)
    parts = [
        "# What a run survives and what it refuses",
        f"Written by `{command}`. Machine: {processor()}, CPU only, torch {torch.__version__}, Python"
        f" {platform.python_version()}, {date.today()}. Seconds: "
        + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
        + ".",
        f"Faults: {total['faults'][0]} tried, {total['faults'][0] - total['faults'][1]} survived,"
        f" {total['faults'][1]} lost. Bad inputs: {total['inputs'][0]} tried, {sum(each.refused for each in sweeps)}"
        f" refused cleanly, {sum(each.accepted for each in sweeps)} accepted (they were harmless), {total['inputs'][1]}"
        f" crashed. Mixed precision: {len(runs)} runs, {finite} finite, {len(runs) - finite} not.",
    ]
    if faults:
        parts += [
            "## Faults",
            "Survived: every checkpoint that is there loads, and the run goes on as if nothing had been.",
            markdown([each.row() for each in faults], FAULTS),
        ]
    if sweeps:
        parts += [
            "## Bad inputs",
            "Drawn by hypothesis (tests/bad_inputs.py); some of them are good. Refused cleanly: the program ends with"
            " one sentence on stderr and exit code 2 (1 for a run that could not go on), an operator raises ValueError,"
            " TypeError or RuntimeError with one sentence. Crashed: a traceback, a signal, no end within"
            f" {bad_inputs.SECONDS} s, or code of a checkpoint's that ran.",
            markdown([each.row() for each in sweeps], SWEEPS),
        ]
    if runs:
        parts += [
            "## Mixed precision",
            f"DIGITS at 32 px, batches of {BATCH}; non-finite losses would be skipped and counted. float16's scaler"
            " leaves out steps while it finds its scale.",
            markdown(runs, RUNS),
        ]
    if failures:
        parts += ["## Lost and crashed", "\n".join("- " + " ".join(text.split())[:1200] for text in failures[:40])]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections and write the page; returns 1 if anything was lost, crashed or not finite."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="default: 50")
    parser.add_argument("--steps", type=int, default=500, help="of mixed precision (default: 500)")
    parser.add_argument("--inputs", type=int, default=500, help="bad inputs of each kind (default: 500)")
    parser.add_argument("--seed", type=int, default=0)
    names = ("kills", "signals", "disk", "processes", "network", "inputs", "precision")
    parser.add_argument("--sections", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "RELIABILITY.md")
    args = parser.parse_args(argv)
    faults: list[Tally] = []
    sweeps: list[Sweep] = []
    runs: list[dict[str, Any]] = []
    seconds: dict[str, float] = {}
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="reliability_") as root:

        def run(name: str) -> None:
            folder, began = Path(root, name), time.monotonic()
            folder.mkdir()
            if name == "kills":
                faults.append(soak(folder, args.kills, chance))
            elif name == "signals":
                faults.extend(preempt(folder, chance))
            elif name == "disk":
                faults.extend(fill_disk(folder))
            elif name == "processes":
                faults.extend(lose_process(folder, 4))
            elif name == "network":
                faults.extend(network(folder))
            elif name == "inputs":
                sweeps.extend(bad_inputs_of_all_kinds(folder, args.inputs, args.seed))
            else:
                runs.extend(mixed_precision(folder, args.steps))
            seconds[name] = time.monotonic() - began
            print(f"{name}: {seconds[name]:.0f} s", file=sys.stderr, flush=True)

        # what only trains goes on beside what is killed and fuzzed
        with ThreadPoolExecutor(1) as pool:
            aside = [pool.submit(run, name) for name in args.sections if name == "precision"]
            for name in args.sections:
                if name != "precision":
                    run(name)
            for each in aside:
                each.result()
    command = " ".join(["python -m benchmarks.reliability", *(sys.argv[1:] if argv is None else argv)])
    args.output.write_text(report(command, faults, sweeps, runs, seconds))
    bad = any(each.failures for each in (*faults, *sweeps)) or any(run["finite"] == "no" for run in runs)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
