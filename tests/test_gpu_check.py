"""The GPU check's own code, run on the CPU kernels; what it finds on a GPU is for a machine with one."""

import json

import pytest
import torch
from causal_conv1d import _nvrtc
from causal_conv1d.kernels import cuda as conv_cuda
from causal_conv1d.kernels.registry import backends as conv_backends
from mamba_ssm.kernels import cuda as mamba_cuda
from mamba_ssm.kernels.registry import backends as mamba_backends

from benchmarks import cuda_kernels, gpu_check, gpu_parity
from tests import cuda_emulation


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_table_and_report(tmp_path, capsys):
    path = tmp_path / "report.json"
    options = ["--device", "cpu", "--sizes", "2,16,10", "--dtypes", "bfloat16", "float32", "--seconds", "0.001"]
    assert gpu_check.main([*options, "--batch", "--output", str(path)]) == 0
    report = json.loads(path.read_text())
    operators = [f"{name} {way}" for name in ("scan", "conv", "norm") for way in ("forward", "backward")]
    assert [row["operator"] for row in report["operators"]] == 2 * operators
    for row in report["operators"]:
        assert row["ms"] > 0
        assert row["torch_ms"] > 0
        assert row["error"] <= (2e-2 if row["dtype"] == "bfloat16" else 1e-5)
    assert "scan backward" in capsys.readouterr().out


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
    assert all(figure["is_good"] for figure in json.loads(path.read_text()))
    names = {name for name, _ in device.launched}
    scans, rest = {"scan_forward", "scan_backward"}, {"norm_forward", "norm_backward", "reduce"}
    assert names == scans | rest | {"conv_forward", "conv_backward"}
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
