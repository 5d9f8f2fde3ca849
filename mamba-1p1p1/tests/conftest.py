"""What the package's tests share."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from causal_conv1d import backend, native
from causal_conv1d.kernels.registry import backends as conv_backends
from mamba_ssm.kernels.registry import backends

sys.path.insert(0, str(Path(__file__).parent))  # where what tests share is, beside fixtures


@pytest.fixture(params=["torch", "plain", "avx2", "avx512"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every CPU backend, the C++ one at each instruction set that this machine has."""
    with ExitStack() as stack:
        if request.param == "torch":
            stack.enter_context(backend.use("torch"))
        else:
            _enter(stack, request.param)
        yield request.param


@pytest.fixture(params=["plain", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The C++ backend at each instruction set that this machine has."""
    with ExitStack() as stack:
        _enter(stack, request.param)
        yield request.param


def _enter(stack: ExitStack, isa: str) -> None:
    if backends.available("cpu") != "cpp" or conv_backends.available("cpu") != "cpp":
        pytest.skip("the C++ kernels are not built")
    if stack.enter_context(native.isa(isa)) != isa:
        pytest.skip(f"this processor has no {isa}")
    stack.enter_context(backend.use("cpp"))


@pytest.fixture(scope="session")
def emulation():
    """`tests/cuda_emulation.py` of the repository, with which kernels run on CPU tensors; skips where it cannot."""
    path = Path(__file__).resolve().parents[2] / "tests" / "cuda_emulation.py"
    if not path.is_file():
        pytest.skip("no emulator: tests/cuda_emulation.py is not here")
    spec = importlib.util.spec_from_file_location("cuda_emulation", path)
    module = sys.modules.get("cuda_emulation")
    if module is None:
        module = sys.modules.setdefault("cuda_emulation", importlib.util.module_from_spec(spec))
        spec.loader.exec_module(module)
    if module.missing() is not None:
        pytest.skip(f"no emulator: {module.missing()}")
    return module
