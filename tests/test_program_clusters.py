"""SLURM and submitit, with stand-ins for the commands of a cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import types
from pathlib import Path

import pytest

import run_with_submitit
from tests.conftest import QUICK, ROOT
from utils import UsageError

# srun starts the tasks and passes signals on; scancel signals the tasks; scontrol notes that it was called
COMMANDS = {
    "srun": """#!/usr/bin/env bash
shift
for task in 0 1; do
    SLURM_STEP_NUM_TASKS=2 SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_STEP_NODELIST=localhost "$@" &
    echo $! >>"$STATE/tasks"
done
code=0
for job in $(jobs -p); do wait "$job" || code=$?; done
exit $code
""",
    "scancel": """#!/usr/bin/env bash
for task in $(cat "$STATE/tasks"); do kill -USR1 "$task"; done
""",
    "scontrol": """#!/usr/bin/env bash
if [ "$1" = show ]; then echo localhost; else echo "$@" >>"$STATE/requeued"; fi
""",
}


def test_slurm_job_saves_itself_and_queues_again(cifar: Path, tmp_path: Path) -> None:
    for name, text in COMMANDS.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER", "RANK", "WORLD"))
    }
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STATE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_SUBMIT_DIR": str(ROOT)}
    output = tmp_path / "output"
    flags = [*QUICK, "--model", "vim_nano_patch4_32", "--data-set", "CIFAR", "--data-path", cifar, "--epochs", 1000]
    command = ["bash", ROOT / "scripts" / "slurm" / "train.sbatch", *flags, "--output_dir", output]
    job = subprocess.Popen(
        list(map(str, command)), env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    end = time.monotonic() + 120
    while time.monotonic() < end and job.poll() is None and not (output / "log.txt").exists():
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    out, err = job.communicate(timeout=60)
    assert job.returncode == 0, err
    assert "2 process(es)" in out
    assert err.count("Stopped by SIGUSR1") == 1
    assert (tmp_path / "requeued").read_text(encoding="utf-8").split() == ["requeue", str(os.getpid())]
    assert json.loads((output / "log.txt").read_text(encoding="utf-8").splitlines()[0])["epoch"] == 0


def test_submitit_runs_the_program(cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = [*QUICK, "--model", "vim_nano_patch4_32", "--data-set", "CIFAR", "--data-path", str(cifar)]
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    job = run_with_submitit.submit([*flags, "--cluster", "local", "--ngpus", "2"])
    assert job.results() == [None, None]
    (output,) = (tmp_path / "output" / "jobs").iterdir()
    assert json.loads((output / "log.txt").read_text(encoding="utf-8"))["epoch"] == 0
    assert json.loads((output / "args.json").read_text(encoding="utf-8"))["world_size"] == 2
    assert (output / "jobs").is_dir()


def test_submitit_asks_slurm_for_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, made = {}, []

    class Executor:
        def __init__(self, folder: Path, cluster: str) -> None:
            made.append((folder, cluster))

        def update_parameters(self, **parameters: object) -> None:
            asked.update(parameters)

        def submit(self, training: run_with_submitit.Training) -> types.SimpleNamespace:
            return types.SimpleNamespace(job_id="7", training=training)

    monkeypatch.setattr(run_with_submitit.submitit, "AutoExecutor", Executor)
    job = run_with_submitit.submit(["--use_volta32", "--nodes", "2", "--model", "vim_nano_patch4_32"])
    (folder, cluster), *_ = made
    assert (folder.parents[1], folder.name, cluster) == (Path("output/jobs"), "jobs", "slurm")
    assert (asked["slurm_constraint"], asked["nodes"], asked["gpus_per_node"]) == ("volta32gb", 2, 8)
    assert job.training.flags[-4:] == ["--output_dir", str(folder.parent), "--resume", "auto"]
    run_with_submitit.submit(["--job_dir", str(tmp_path), "--model", "vim_nano_patch4_32"])
    assert made[1] == (tmp_path / "jobs", "slurm")
    run_with_submitit.submit(["--model", "vim_nano_patch4_32"])
    assert made[2][0] != folder
    with pytest.raises(UsageError, match="wanted it without --cluster local"):
        run_with_submitit.submit(["--use_volta32", "--cluster", "local"])


def test_submitit_refuses_before_it_queues(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--data-set 'NONE' is unknown"):
        run_with_submitit.submit(["--cluster", "local", "--job_dir", str(tmp_path / "job"), "--data-set", "NONE"])
    assert not (tmp_path / "job").exists()
