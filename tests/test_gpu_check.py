"""The GPU check's own code, run on the CPU kernels; what it finds on a GPU is for a machine with one."""

import json
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from causal_conv1d import _nvrtc, backend
from causal_conv1d.kernels import cuda as conv_cuda
from causal_conv1d.kernels.registry import backends as conv_backends
from mamba_ssm.kernels import cuda as mamba_cuda
from mamba_ssm.kernels.registry import backends as mamba_backends

from benchmarks import cuda_kernels, gpu_check, gpu_parity
from tests import cuda_emulation
from tests.device_standins import Recorder
from utils import graphs


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_table_and_report(tmp_path, capsys):
    path = tmp_path / "report.json"
    options = ["--device", "cpu", "--sizes", "2,16,10", "--dtypes", "bfloat16", "float32", "--seconds", "0.001"]
    assert gpu_check.main([*options, "--batch", "--output", str(path)]) == 0
    report = json.loads(path.read_text(encoding="utf-8"))
    operators = [f"{name} {way}" for name in ("scan", "conv", "norm") for way in ("forward", "backward")]
    assert [row["operator"] for row in report["operators"]] == 2 * operators
    for row in report["operators"]:
        assert row["ms"] > 0
        assert row["torch_ms"] > 0
        assert row["error"] <= (2e-2 if row["dtype"] == "bfloat16" else 1e-5)
    assert "scan backward" in capsys.readouterr().out


def test_models_are_stepped_and_what_is_left_is_named(monkeypatch):
    """A model that gives logits, one that gives its loss, one that gives its decisions; then there is no more time."""
    pruned = "dyvm_nano_patch4_32:depth=2,pruning_loc=(1,),token_ratio=(0.7,)"
    models = ("vim_nano_patch4_32:depth=1", "mae_vim_nano_patch4_32:depth=1,img_size=16", pruned)
    options = gpu_check._parser().parse_args(["--models", *models, "--batch", "2", "--seconds", "0", "--device", "cpu"])
    device, clock = torch.device("cpu"), iter((*range(3), *range(90, 200)))
    monkeypatch.setattr(gpu_check, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(gpu_check, "_host_seconds", lambda call, device: call() or 0.5)
    monkeypatch.setattr(gpu_check, "median_ms", lambda calls, device, seconds: 4.0)
    rows = gpu_check.model_steps(options, device, 50)
    assert [row["model"] for row in rows[:3]] == list(models)
    for row in rows[:3]:
        assert (row["way"], row["train_images_per_s"], row["eval_host_ms"]) == ("eager", 500.0, 500.0), row
        assert row["train_launches"] is None
    assert {row["failed"] for row in rows[3:]} == {"NOT MEASURED: no time was left"}
    assert {row["dtype"] for row in rows} == set(gpu_check.DTYPES)
    assert [row["model"] for row in rows if row["way"] == "torch"] == list(models)


def test_what_is_timed_on_a_gpu_first():
    options = gpu_check._parser().parse_args([])
    settings = gpu_check.settings_of(options, torch.device("cuda"))
    assert len(settings) == len(set(settings))
    assert settings[:2] == [("vim_tiny_patch16_224", 128, way, "bfloat16") for way in ("eager", "graph")]
    assert settings[2][0] == "deit_tiny_patch16_224"
    assert {each[1] for each in settings} == {1, 32, 128}
    assert {each[2] for each in settings} == {"eager", "graph", "compiled", "torch"}
    assert {each[3] for each in settings} == set(gpu_check.DTYPES)


def test_training_from_a_graph_is_checked(monkeypatch):
    monkeypatch.setattr(graphs, "Recorder", Recorder)
    with backend.use("torch"):
        assert gpu_parity.replayed_error(torch.device("cpu")) == 0
        monkeypatch.setattr(graphs, "WARM_UP", 1)
        monkeypatch.setattr(graphs.Replayed, "__call__", lambda self, *given: self.call(*given))
        assert gpu_parity.replayed_error(torch.device("cpu")) != 0  # nothing was replayed


def test_every_listed_kernel_is_there(monkeypatch):
    compiled = []
    usage = _nvrtc.Usage(40, 0, 0, 0, 0)
    monkeypatch.setattr(_nvrtc, "compile_kernel", lambda *job: compiled.append(job) or _nvrtc.Binary(b"", ""))
    monkeypatch.setattr(_nvrtc, "resource_usage", lambda report: usage)
    rows = cuda_kernels.resources(["sm_90"])
    assert len(rows) == len(compiled) == len(set(compiled))
    assert all(path.is_file() for path, _, _ in compiled)
    assert all(row["blocks"] == 12 or row["dynamic"] or row["kernel"] == "reduce" for row in rows)
    assert len(cuda_kernels.table(rows)) == 2 + len(rows)


def test_blocks_are_limited_by_what_runs_out_first():
    job = cuda_kernels.Job(cuda_kernels.REDUCE_SOURCE, "1", 128, 31_232)
    blocks = cuda_kernels.blocks_per_multiprocessor
    assert blocks(_nvrtc.Usage(168, 0, 0, 0, 0), job, "sm_90") == 3  # 512 threads' registers are 65,536 of 128 each
    assert blocks(_nvrtc.Usage(40, 0, 0, 0, 0), job, "sm_86") == 3  # 32,256 bytes of 102,400
    assert blocks(_nvrtc.Usage(40, 0, 0, 0, 0), job, "sm_75") == 2  # of 65,536
    assert blocks(_nvrtc.Usage(40, 0, 0, 0, 0), job._replace(dynamic=0), "sm_75") == 8  # 1,024 threads


@pytest.mark.skipif(cuda_emulation.missing() is not None, reason="no emulator")
def test_parity_on_the_emulator(monkeypatch, tmp_path, capsys):
    """All operators at the sizes that a sanitizer is given, held to their limits; one that is wrong is an exit code."""
    device = cuda_emulation.EmulatedDevice(1)
    monkeypatch.setattr(_nvrtc, "device", lambda index: device)
    for backends, kernels in ((conv_backends, conv_cuda), (mamba_backends, mamba_cuda)):
        monkeypatch.setattr(backends, "_loaded", {("cpu", None): kernels})
    options = ["--device", "cpu", "--tiny", "--parts", "operators", "--dtypes", "float32"]
    path = tmp_path / "parity.json"
    assert gpu_parity.main([*options, "--output", str(path)]) == 0
    assert all(figure["is_good"] for figure in json.loads(path.read_text(encoding="utf-8")))
    names = {name for name, _ in device.launched}
    scans, rest = {"scan_forward", "scan_backward"}, {"norm_forward", "norm_backward", "reduce"}
    assert names >= scans | rest | {"conv_forward", "conv_backward", "pooled_conv", "pooled_gate"}
    monkeypatch.setitem(gpu_parity.LIMITS, torch.float32, 0.0)
    assert gpu_parity.main(options) == 1
    assert "WRONG" in capsys.readouterr().out


def test_parity_of_models_and_ways_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_parity.main([]) == 2
    options = ["--device", "cpu", "--tiny", "--dtypes", "float32"]
    assert gpu_parity.main([*options, "--parts", "models", "ways"]) == 0


@pytest.mark.parametrize("wrong", [float("nan"), 1.5])
def test_an_error_shows(wrong):
    good = torch.ones(3)
    assert gpu_check.relative_error([good], [good]) == 0
    error = gpu_check.relative_error([torch.tensor([1.0, wrong, 1.0])], [good])
    assert error != error if wrong != wrong else error == pytest.approx(0.5)


def test_one_command_has_one_exit_code_within_ten_minutes(tmp_path):
    """All parts run, whichever fails; what each may take makes ten minutes together."""
    script = Path(gpu_check.__file__).with_name("gpu_check.sh")
    stub = tmp_path / "stub"
    stub.write_text('#!/bin/sh\necho "ran $*"\ncase "$*" in *"$BROKEN"*) exit 3 ;; esac\n', encoding="utf-8")
    stub.chmod(0o755)
    for broken, code in (("none of them", 0), ("benchmarks.gpu_check", 1)):
        environment = os.environ | {"PYTHON": str(stub), "SANITIZER": str(stub), "BROKEN": broken}
        ran = subprocess.run(["bash", script, tmp_path / "out"], env=environment, capture_output=True)
        report = (tmp_path / "out" / "report.txt").read_text(encoding="utf-8")
        assert ran.returncode == code, report
        assert report.endswith("all passed\n" if code == 0 else "FAILED: timings (3)\n")
        assert "-m benchmarks.gpu_check --budget 150 --output" in report
        tools = re.findall("ran --tool ([a-z]+)", report)
        assert tools == ["memcheck", "racecheck", "synccheck", "initcheck"]
        assert re.search("ran -m pytest .*-m gpu .*tests/test_golden_models.py", report)
    seconds = [int(number) for number in re.findall(r'part [a-z"$ ]+ (\d+) ', script.read_text(encoding="utf-8"))]
    assert len(seconds) == 4
    assert sum(seconds) + 3 * seconds[-1] <= 600  # the last for each of four tools
