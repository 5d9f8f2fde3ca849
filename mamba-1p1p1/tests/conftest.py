"""What the package's tests share."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from causal_conv1d import backend, native
from causal_conv1d.kernels.registry import backends as conv_backends
from mamba_ssm.kernels.registry import backends


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
