"""Several processes: the same numbers as one, one decision for all, and an end in seconds when one dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import MICRO, QUICK, ROOT, Result, finish, lines, ranks_of, start
from tests.program_data import write_cifar100
from utils import threads
from utils.memory import keep_freed_memory

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)


def wait_for_epoch(process: subprocess.Popen[str], output: Path, epoch: int) -> None:
    """Until log.txt has the line of `epoch`."""
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if (output / "log.txt").exists() and len(lines(output)) > epoch:
            return
        time.sleep(0.1)
    process.terminate()  # a launcher that is killed would leave its processes behind
    raise AssertionError(process.communicate()[1])


def wait_for_ranks(process: subprocess.Popen[str], count: int, *, other_than: int) -> list[int]:
    """Until the launcher has `count` processes and `other_than` is none of them; returns them by rank."""
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        found = ranks_of(process)
        if len(found) == count and other_than not in found:
            return found
        time.sleep(0.1)
    process.terminate()
    raise AssertionError(process.communicate()[1])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize("name", ["torchrun", "launch"])
def test_two_processes_do_what_one_does(name: str, program: Callable[..., Result], tmp_path: Path) -> None:
    """The first step's loss is that of one process on the same batch, and accuracy does not count padding."""
    data = write_cifar100(tmp_path / "data", train=8, test=15)
    flags = [*QUICK, "--data-set", "CIFAR", "--data-path", data, "--mixup", 0, "--cutmix", 0, "--drop-path", 0]
    flags += ["--dist-eval", "--no-model-ema", "--epochs", 3]
    launch = ("-m", "torch.distributed.launch", "--nproc_per_node=2", "--use_env", f"--master_port={free_port()}")
    launcher = TORCHRUN if name == "torchrun" else launch
    two = finish(start(*launcher, MICRO, *flags, "--batch-size", 4, "--output_dir", tmp_path / "two"))
    assert two.code == 0, two.err
    assert two.out.count("2 process(es)") == 1
    assert program(*flags, "--output_dir", tmp_path / "one").code == 0
    for first, second in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert first["train_loss"] == pytest.approx(second["train_loss"], rel=1e-4 if first["epoch"] else 1e-6)
        assert first["test_acc5"] == second["test_acc5"]
        assert first["test_loss"] == pytest.approx(second["test_loss"], rel=1e-4)


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="no --fsdp on CPUs in this torch")
def test_divided_parameters_train_alike(program: Callable[..., Result], tmp_path: Path) -> None:
    """FSDP's losses are those of one process, and its checkpoints are like any other, to go on from either way."""
    data = write_cifar100(tmp_path / "data", train=8, test=13)
    flags = [*QUICK, "--data-set", "CIFAR", "--data-path", data, "--mixup", 0, "--cutmix", 0, "--drop-path", 0]
    flags += ["--dist-eval", "--model-ema-decay", 0.9, "--clip-grad", 1, "--lr", 0.5, "--sched", "constant"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert program(*flags, "--epochs", 4, "--output_dir", one).code == 0
    # one epoch by one process, two by two, one by one again
    assert program(*flags, "--epochs", 1, "--output_dir", two).code == 0
    command = [*TORCHRUN, MICRO, *flags, "--batch-size", 4, "--epochs", 3, "--output_dir", two, "--resume", "auto"]
    divided = finish(start(*command, "--fsdp"))
    assert divided.code == 0, divided.err
    assert program(*flags, "--epochs", 4, "--output_dir", two, "--resume", "auto").code == 0
    for first, second in zip(lines(one), lines(two), strict=True):
        assert first["train_loss"] == pytest.approx(second["train_loss"], rel=1e-5)
        assert first["test_loss"] == pytest.approx(second["test_loss"], rel=1e-5)
    first, second = (torch.load(folder / "checkpoint.pth", weights_only=True) for folder in (one, two))
    for entry in ("model", "model_ema"):
        for name, value in first[entry].items():
            torch.testing.assert_close(second[entry][name], value, rtol=1e-3, atol=1e-4)


def test_a_signal_to_one_rank_stops_all_at_one_step(
    program: Callable[..., Result], cifar: Path, tmp_path: Path
) -> None:
    flags = [*QUICK, "--data-set", "CIFAR", "--data-path", cifar, "--batch-size", 4, "--output_dir", tmp_path]
    flags += ["--num_workers", 1]
    process = start(*TORCHRUN, MICRO, *flags, "--epochs", 1000)
    wait_for_epoch(process, tmp_path, 1)
    os.kill(ranks_of(process)[1], signal.SIGUSR1)
    result = finish(process, 60)
    assert result.code == 0, result.err
    assert result.err.count("Stopped by") == 1
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert len(state["processes"]) == 2
    # one process goes on with what two have left
    result = program(*flags, "--resume", "auto", "--epochs", state["epoch"] + 2)
    assert result.code == 0
    assert "saved by 2 processes" in result.err
    assert [line["epoch"] for line in lines(tmp_path)] == list(range(state["epoch"] + 2))


def test_killed_rank_ends_the_job_and_a_restart_goes_on(cifar: Path, tmp_path: Path) -> None:
    flags = [*QUICK, "--data-set", "CIFAR", "--data-path", cifar, "--batch-size", 4, "--output_dir", tmp_path]
    process = start(*TORCHRUN, "--max-restarts", 1, MICRO, *flags, "--epochs", 1000, "--resume", "auto")
    killed = 0
    for _ in range(2):
        # the first life may still end an epoch while the launcher ends it: what counts is what the new process trains
        wait_for_ranks(process, 2, other_than=killed)
        wait_for_epoch(process, tmp_path, len(lines(tmp_path)) + 1 if killed else 1)
        killed = wait_for_ranks(process, 2, other_than=killed)[1]
        os.kill(killed, signal.SIGKILL)
        began = time.monotonic()
    result = finish(process, 60)
    assert time.monotonic() - began < 30
    assert result.code != 0
    assert "Signal 9" in result.err
    assert [line["epoch"] for line in lines(tmp_path)] == list(range(len(lines(tmp_path))))


def test_a_mistake_is_told_once(tmp_path: Path) -> None:
    result = finish(start(*TORCHRUN, MICRO, *QUICK, "--data-set", "IMNET", "--data-path", tmp_path / "nowhere"))
    assert result.code != 0
    assert result.err.count("nowhere does not exist") == 1
    assert (ROOT / "main.py").exists()


def test_threads_that_wait_sleep_before_another_process_needs_the_core():
    unset = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    told = subprocess.run(
        [sys.executable, "-c", "import main"],
        **dict(cwd=ROOT, env=unset | {"OMP_DISPLAY_ENV": "verbose"}, capture_output=True, text=True, check=True),
    ).stderr
    if "GOMP_SPINCOUNT" not in told:
        pytest.skip("torch has another OpenMP runtime here")
    assert f"GOMP_SPINCOUNT = '{threads.SPINS}'" in told


FAULTS = """
import resource, torch
from utils.memory import keep_freed_memory
keeps = keep_freed_memory()
torch.set_num_threads(1)

def step():
    return [torch.ones(2**20) for _ in range(20)]

for _ in range(4):  # until the heap has found its size
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(int(keeps), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_what_is_freed_is_not_asked_of_the_system_again():
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC", "GLIBC"))}
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found = []
    for environment in (bare, bare | at_once):
        how = dict(cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        found.append(tuple(map(int, subprocess.run([sys.executable, "-c", FAULTS], **how).stdout.split())))
    (keeps, faults), (is_said, others) = found
    if not keeps:
        pytest.skip("C's allocator is not glibc's")
    assert not is_said, "the environment has the last word"
    # a step has 80 MiB, 20,000 pages
    assert faults < 20000 < 100000 <= others


@pytest.mark.parametrize("variable", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_is_kept_is_the_users_to_say(monkeypatch, variable):
    monkeypatch.setenv(variable, "65536")
    assert not keep_freed_memory()


@pytest.mark.parametrize(("variable", "value"), [("GOMP_SPINCOUNT", "77"), ("OMP_WAIT_POLICY", "active")])
def test_how_threads_wait_is_the_users_to_say(monkeypatch, variable, value):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    before = dict(os.environ)
    threads.sleep_early()
    assert os.environ == before
