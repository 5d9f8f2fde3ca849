"""What happens where CUDA kernels cannot run: a stand-in for the driver fails at each step of loading and launching.

Each time the operators of both packages end in torch's operations, and one warning says why. CPU tensors stand in for
those of a device; what compiles is compiled by NVRTC in earnest.
"""

import contextlib
import ctypes
import struct
import warnings
from enum import IntEnum
from types import SimpleNamespace

import pytest
import torch
from causal_conv1d import _nvrtc, backend, causal_conv1d_fn
from causal_conv1d.kernels import cuda as conv_cuda
from causal_conv1d.kernels.registry import backends as conv_backends

mamba_cuda = pytest.importorskip("mamba_ssm.kernels.cuda")
from mamba_ssm.kernels.registry import backends as mamba_backends  # noqa: E402
from mamba_ssm.ops.scan import selective_scan_fn  # noqa: E402


def why_no_compiler() -> str | None:
    try:
        _nvrtc.check()
    except RuntimeError as error:
        return str(error)
    return None


pytestmark = pytest.mark.skipif(why_no_compiler() is not None, reason=f"no NVRTC: {why_no_compiler()}")


class Status(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_IMAGE = 200
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES = 701


class Driver:
    """Loads and launches the probe; any other kernel it loads, and refuses to launch."""

    CUresult = Status

    def __init__(self, version: int = 13_000, loads: bool = True, launches: bool = True, works: bool = True):
        self.version, self.loads, self.launches, self.works = version, loads, launches, works
        self.launched = []

    def cuDriverGetVersion(self):
        if self.version == 0:
            raise RuntimeError('"cuda" is an NVIDIA driver library')
        return Status.CUDA_SUCCESS, self.version

    def cuModuleLoadData(self, code):
        return (Status.CUDA_SUCCESS, code) if self.loads else (Status.CUDA_ERROR_INVALID_IMAGE, None)

    def cuModuleGetFunction(self, module, name):
        return Status.CUDA_SUCCESS, name

    def cuLaunchKernel(self, function, *rest):
        self.launched.append(function)
        if function != b"probe" or not self.launches:
            return (Status.CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES,)
        if self.works:
            params = ctypes.string_at(ctypes.cast(rest[-2], ctypes.POINTER(ctypes.c_void_p))[0], 12)
            to, value = struct.unpack("qi", params)
            ctypes.cast(to, ctypes.POINTER(ctypes.c_int))[0] = value
        return (Status.CUDA_SUCCESS,)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """`machine(driver, capability)` makes CPU tensors those of a device that the driver drives."""

    def use(driver, capability=(9, 0)):
        monkeypatch.setattr(_nvrtc, "_driver", lambda: driver)
        monkeypatch.setattr(_nvrtc, "_torch_device", lambda index: torch.device("cpu"))
        monkeypatch.setattr(_nvrtc, "device", _nvrtc.cache(_nvrtc.Device))
        monkeypatch.setattr(backend, "_told", set())
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        properties = SimpleNamespace(multi_processor_count=4)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
        for backends, kernels in ((conv_backends, conv_cuda), (mamba_backends, mamba_cuda)):
            monkeypatch.setattr(backends, "_loaders", {"cpu": ("cuda", kernels.load)})
            monkeypatch.setattr(backends, "_loaded", {})

    monkeypatch.setenv(_nvrtc.CACHE_VARIABLE, str(tmp_path))
    return use


def results() -> list[torch.Tensor]:
    """A convolution and a scan, in value and gradient."""
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(size, requires_grad=True) for size in ((2, 8, 5), (8, 4), (8,)))
    u, delta = (torch.randn(2, 8, 5, requires_grad=True) for _ in range(2))
    A, (B, C) = (-torch.rand(8, 4)).requires_grad_(), (torch.randn(2, 4, 5, requires_grad=True) for _ in range(2))
    out = causal_conv1d_fn(x, weight, bias, activation="silu")
    y = selective_scan_fn(u, delta, A, B, C, delta_softplus=True)
    leaves = [x, weight, bias, u, delta, A, B, C]
    return [out, y, *torch.autograd.grad(out.square().sum() + y.square().sum(), leaves)]


def assert_torch_with_one_warning(reason: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = results()
        torch.testing.assert_close(results(), got, rtol=0, atol=0)
    assert [str(warning.message) for warning in caught if "slower torch path" in str(warning.message)] != []
    assert len(caught) == 1, [str(warning.message) for warning in caught]
    assert reason in str(caught[0].message)
    with backend.use("torch"):
        torch.testing.assert_close(got, results(), rtol=0, atol=0)


REFUSED = "launching a CUDA kernel failed: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"
STEPS = {
    "no driver": (Driver(version=0), {}, "there is no NVIDIA driver, and torch's CUDA"),
    "old driver": (Driver(version=11_080), {}, "the NVIDIA driver is for CUDA 11.8, and torch's CUDA"),
    "unknown architecture": (Driver(), {"capability": (3, 5)}, "the device has compute capability (3, 5)"),
    "module refused": (Driver(loads=False), {}, "loading probe failed: CUDA_ERROR_INVALID_IMAGE"),
    "launch refused": (
        Driver(launches=False),
        {},
        "launching a CUDA kernel failed: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
    ),
    "nothing done": (Driver(works=False), {}, "a small kernel was launched and did nothing"),
    "a later launch refused": (Driver(), {}, REFUSED),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_driver_that_fails_at(step, machine):
    driver, options, reason = STEPS[step]
    machine(driver, **options)
    assert_torch_with_one_warning(reason)
    assert (b"conv_forward" in driver.launched) == (step == "a later launch refused")


def test_the_driver_that_is_wanted_is_named(machine, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    machine(Driver(version=11_080))
    assert_torch_with_one_warning("is for CUDA 11.8, and torch's CUDA 12.8 wants driver 525.60.13 or later")


def test_rocm(machine, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    machine(Driver())
    assert_torch_with_one_warning("torch is built for ROCm 6.4")


@pytest.mark.parametrize("which", ["the first kernel", "a later kernel"])
def test_a_kernel_that_does_not_compile(which, machine, monkeypatch, tmp_path):
    machine(Driver())
    broken = tmp_path / "broken.cu"
    broken.write_text("nothing\n", encoding="utf-8")
    if which == "the first kernel":
        monkeypatch.setattr(_nvrtc, "_PROBE", broken)
    else:
        monkeypatch.setattr(conv_cuda.convolution, "FORWARD_SOURCE", broken)
    assert_torch_with_one_warning("broken.cu <")


def test_after_one_kernel_is_refused_none_is_launched(machine, monkeypatch):
    """A state that forward could not leave must not be read by a backward that can."""
    driver = Driver()
    machine(driver)
    device = _nvrtc.device(0)
    device.prove()
    driver.loads = False
    for _ in range(2):
        with pytest.raises(_nvrtc.KernelError, match="loading reduce failed"):
            device.kernel(_nvrtc.SHARED_SOURCES / "reduce.cu", "1", 256)
    driver.loads = True
    with pytest.raises(_nvrtc.KernelError, match="loading reduce failed"):
        device.kernel(_nvrtc._PROBE, "", 32)


def test_kernels_compiled_ahead_are_waited_for_and_compiled_once(machine, monkeypatch):
    compiled = []
    monkeypatch.setattr(_nvrtc, "cached_kernel", lambda *job, **_: compiled.append(job[1]) or b"code")
    machine(Driver())
    device, path = _nvrtc.device(0), _nvrtc.SHARED_SOURCES / "reduce.cu"
    device.prepare([(path, "1"), (path, "2"), (path, "1")])
    device.prepare([(path, "2")])
    for arguments in "213":
        device.kernel(path, arguments, 256)
    assert sorted(compiled) == ["1", "2", "3"]
