"""The GPU check's own code, run on the CPU kernels; what it finds on a GPU is for a machine with one."""

import json

import pytest
import torch
from causal_conv1d import _nvrtc

from benchmarks import gpu_check


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_table_and_report(tmp_path, capsys):
    path = tmp_path / "report.json"
    options = ["--device", "cpu", "--sizes", "2,16,10", "--dtypes", "bfloat16", "float32", "--seconds", "0.001"]
    assert gpu_check.main([*options, "--batch", "0", "--output", str(path)]) == 0
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
    rows = gpu_check.resources(["sm_90"])
    assert len(rows) == len(compiled) == len(set(compiled))
    assert all(path.is_file() for path, _, _ in compiled)


@pytest.mark.parametrize("wrong", [float("nan"), 1.5])
def test_an_error_shows(wrong):
    good = torch.ones(3)
    assert gpu_check.relative_error([good], [good]) == 0
    error = gpu_check.relative_error([torch.tensor([1.0, wrong, 1.0])], [good])
    assert error != error if wrong != wrong else error == pytest.approx(0.5)
