"""How the package is found, falls back, and is compiled through."""

import subprocess
import sys
import warnings
from pathlib import Path

import causal_conv1d
import pytest
import torch
from causal_conv1d import backend, causal_conv1d_fn
from causal_conv1d.backend import Backends
from causal_conv1d.kernels import torch as torch_kernels


def test_not_shadowed_by_folder(tmp_path):
    """A folder of the package's name, without __init__.py, on the path before it does not hide it."""
    (tmp_path / "causal_conv1d" / "tests").mkdir(parents=True)
    code = "import causal_conv1d; print(causal_conv1d.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()) == Path(causal_conv1d.__file__)


def test_headers_are_shipped():
    headers = {path.name for path in Path(causal_conv1d.get_include()).iterdir()}
    assert {"activations.h", "each_isa.h", "isa.h", "parallel.h", "tile.h", "vec.h"} <= headers


def test_fallback_warns_once(monkeypatch):
    monkeypatch.setattr(backend, "_told", set())

    def unavailable(index):
        raise ImportError("no compiler here")

    backends = Backends("example", torch_kernels)
    backends.add("cpp", "cpu", unavailable)
    with pytest.warns(RuntimeWarning, match=r"^no cpp kernels \(no compiler here\); using the slower torch path"):
        assert backends.pick(torch.zeros(1)) is torch_kernels
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.pick(torch.zeros(1)) is torch_kernels
    assert backends.available("cpu") == "torch"


def test_compiles_without_graph_break():
    x, weight, bias = torch.randn(2, 6, 9, requires_grad=True), torch.randn(6, 4), torch.randn(6)

    def step(x):
        return causal_conv1d_fn(x * 2, weight, bias, "silu").square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (grad,), (want,) = torch.autograd.grad(compiled(x), x), torch.autograd.grad(step(x), x)
    torch.testing.assert_close(grad, want)
