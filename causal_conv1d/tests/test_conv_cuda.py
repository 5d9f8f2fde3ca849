"""CUDA convolution: compiled for every architecture, emulated on the CPU, and run where a GPU is (`-m gpu`)."""

import contextlib
import ctypes
import importlib.util
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from causal_conv1d import _nvrtc, backend, causal_conv1d_fn, causal_conv1d_ref
from causal_conv1d._reduce import Sum, add_up, dense_sum
from causal_conv1d.kernels import cuda as cuda_kernels
from causal_conv1d.kernels import registry
from causal_conv1d.kernels import torch as torch_kernels
from causal_conv1d.kernels.cuda import convolution as cuda

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
CSRC = _nvrtc.SHARED_SOURCES
TARGETS = ("sm_80", "sm_90", "sm_100")  # of which older compilers know the first alone


def load_emulation():
    """tests/cuda_emulation.py of the repository, if this package's tests run inside it."""
    path = ROOT / "tests" / "cuda_emulation.py"
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location("cuda_emulation", path)
    module = sys.modules.setdefault("cuda_emulation", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


emulation = load_emulation()
NOT_EMULATED = "tests/cuda_emulation.py is not here" if emulation is None else emulation.missing()
emulated = pytest.mark.skipif(NOT_EMULATED is not None, reason=f"no emulator: {NOT_EMULATED}")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def why_no_compiler() -> str | None:
    try:
        _nvrtc.check()
    except RuntimeError as error:
        return str(error)
    return None


compiled = pytest.mark.skipif(why_no_compiler() is not None, reason=f"no NVRTC: {why_no_compiler()}")

F, H, BF = "float", "Float16", "BFloat16"
KERNELS = [
    *[("conv_forward", f"{types},4") for types in (f"{F},{F},4", f"{H},{F},4", f"{BF},{F},4", f"{F},{F},1")],
    *[("conv_backward", f"{types},4") for types in (f"{F},{F},4", f"{BF},{F},4", f"{F},{F},1")],
    *[(f"conv_{way}", f"{BF},{F},4,4,true") for way in ("forward", "backward")],
    ("reduce", "5"),
]


@cache
def usages() -> dict[tuple[str, str, str], _nvrtc.Usage]:
    """Resource usage of every kernel on every target."""
    known = [target for target in TARGETS if _nvrtc.knows(target)]
    jobs = [(name, arguments, target) for name, arguments in KERNELS for target in known]
    with ThreadPoolExecutor(2) as pool:
        binaries = pool.map(lambda job: _nvrtc.compile_kernel(CSRC / f"{job[0]}.cu", *job[1:]), jobs)
        return {job: _nvrtc.resource_usage(binary.report) for job, binary in zip(jobs, binaries)}


@compiled
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "arguments"), KERNELS)
def test_compiles_without_spills(name, arguments, target, record_property):
    if not _nvrtc.knows(target):
        pytest.skip(f"this NVRTC does not know {target}")
    usage = usages()[name, arguments, target]
    record_property("usage", usage._asdict())
    assert 0 < usage.registers <= 255
    assert usage.shared <= 48 << 10
    assert usage.stack == usage.spill_stores == usage.spill_loads == 0


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_kernel(tmp_path, monkeypatch):
    """A small kernel's path, with an empty cache in `tmp_path / "cache"`."""
    monkeypatch.setenv(_nvrtc.CACHE_VARIABLE, str(tmp_path / "cache"))
    path = tmp_path / "small.cu"
    path.write_text(
        '#include "device.h"\nstruct P { float *x; };\nKERNEL(small, P, 32, 1) { *p.x = KERNEL_ARGUMENTS; }\n',
        encoding="utf-8",
    )
    return path


@compiled
def test_cache_compiles_once(small_kernel, tmp_path, monkeypatch):
    code = _nvrtc.cached_kernel(small_kernel, "1.f", "sm_90")
    monkeypatch.setattr(_nvrtc, "compile_kernel", None)
    assert _nvrtc.cached_kernel(small_kernel, "1.f", "sm_90") == code
    assert len(list((tmp_path / "cache").iterdir())) == 1


@compiled
def test_cache_tells_apart_what_differs(small_kernel, tmp_path):
    for arguments, target in (("1.f", "sm_90"), ("2.f", "sm_90"), ("1.f", "sm_80")):
        _nvrtc.cached_kernel(small_kernel, arguments, target)
    small_kernel.write_text(small_kernel.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    _nvrtc._sources.cache_clear()
    _nvrtc.cached_kernel(small_kernel, "1.f", "sm_90")
    assert len(list((tmp_path / "cache").iterdir())) == 4


@compiled
def test_cache_filled_by_several_at_once_holds_whole_files(small_kernel, tmp_path):
    start, codes = threading.Barrier(4), []

    def compile_now():
        start.wait()
        codes.append(_nvrtc.cached_kernel(small_kernel, "1.f", "sm_90", renew=True))

    threads = [threading.Thread(target=compile_now) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (file,) = (tmp_path / "cache").iterdir()
    assert len(codes) == 4
    assert file.read_bytes() in codes


@compiled
def test_cache_that_cannot_be_written_is_done_without(small_kernel, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv(_nvrtc.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    assert _nvrtc.cached_kernel(small_kernel, "1.f", "sm_90")


@pytest.fixture
def honest(small_kernel, tmp_path, monkeypatch):
    """The cached file of a kernel, without a compiler; `read()` gives what the cache gives for it."""
    monkeypatch.setattr(_nvrtc, "compiler_version", lambda: (13, 0))
    monkeypatch.setattr(_nvrtc, "compile_kernel", lambda *job: _nvrtc.Binary(b"honest", ""))

    def read():
        return _nvrtc.cached_kernel(small_kernel, "1.f", "sm_90")

    assert read() == b"honest"
    (file,) = (tmp_path / "cache").iterdir()
    return file, read


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such files")
@pytest.mark.parametrize("kind", ["link", "fifo", "folder", "writable by all", "another's"])
def test_cache_takes_nothing_that_another_may_have_put_there(kind, honest, tmp_path, monkeypatch):
    file, read = honest
    file.write_bytes(b"own")
    assert read() == b"own"
    if kind == "writable by all":
        file.chmod(0o666)
    elif kind == "another's":
        monkeypatch.setattr(os, "getuid", lambda: file.stat().st_uid + 1)
    else:
        file.unlink()
        (tmp_path / "elsewhere").write_bytes(b"foreign")
        make = {"link": lambda: file.symlink_to(tmp_path / "elsewhere"), "fifo": lambda: os.mkfifo(file)}
        make.get(kind, file.mkdir)()
    assert read() == b"honest"


def test_cache_folder_is_this_user_s(tmp_path, monkeypatch):
    monkeypatch.delenv(_nvrtc.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _nvrtc.cache_directory() == tmp_path / ".cache" / "vision-mamba-kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert _nvrtc.cache_directory() == tmp_path / "xdg" / "vision-mamba-kernels"


@compiled
def test_compile_errors_carry_the_log(small_kernel):
    with pytest.raises(_nvrtc.CompileError, match="undefined"):
        _nvrtc.compile_kernel(small_kernel, "nowhere", "sm_90")


@compiled
def test_compiling_leaves_the_interpreters_shared_bytes_alone(small_kernel):
    """NVRTC writes logs and code into Python's memory; an empty log has the length of objects CPython shares."""
    assert _nvrtc.compile_kernel(small_kernel, "1.f", _nvrtc._target((99, 0))).report == ""
    assert [value for value in range(256) if ord(bytes([value])) != value] == []


@compiled
def test_newer_devices_get_portable_code(small_kernel):
    assert _nvrtc._target((8, 9)) == "sm_89"
    target = _nvrtc._target((99, 0))
    assert target.startswith("compute_")
    assert b".target" in _nvrtc.compile_kernel(small_kernel, "1.f", target).code


# --- launching -------------------------------------------------------------------------------------------------------


class FakeResult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_INVALID_CONTEXT = 201


class FakeDriver:
    """Records what a kernel asks of the driver; the first launches end with `statuses`."""

    CUresult = FakeResult

    class CUfunction_attribute:
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = "dynamic bytes"

    def __init__(self, *statuses):
        self.statuses = list(statuses)
        self.calls = []

    def cuLaunchKernel(self, function, *rest):
        *shape, dynamic_bytes, stream, address, _ = rest
        params = ctypes.cast(address, ctypes.POINTER(ctypes.c_void_p))[0]
        self.calls.append((shape, dynamic_bytes, stream, ctypes.string_at(params, 6)))
        return ((self.statuses.pop(0) if self.statuses else FakeResult.CUDA_SUCCESS),)

    def cuFuncSetAttribute(self, function, attribute, value):
        self.calls.append((attribute, value))
        return (FakeResult.CUDA_SUCCESS,)

    def cuDevicePrimaryCtxRetain(self, index):
        return FakeResult.CUDA_SUCCESS, "context"

    def cuCtxSetCurrent(self, context):
        self.calls.append(context)
        return (FakeResult.CUDA_SUCCESS,)


@pytest.fixture
def stream(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 70 + index, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext(entered.append(index)))
    entered = []
    return entered


def test_launch_passes_the_struct_grid_and_stream(stream):
    driver = FakeDriver()
    kernel = _nvrtc.Kernel(driver, "function", 3, 128)
    kernel((4, 5, 6), b"struct")
    kernel((1, 1, 1), b"second")
    assert stream == [3, 3]
    assert driver.calls == [([4, 5, 6, 128, 1, 1], 0, 73, b"struct"), ([1, 1, 1, 128, 1, 1], 0, 73, b"second")]


def test_launch_asks_once_for_more_shared_memory(stream):
    driver = FakeDriver()
    kernel = _nvrtc.Kernel(driver, "function", 0, 128)
    for _ in range(2):
        kernel((1, 1, 1), b"struct", 60_000)
    assert [call for call in driver.calls if call[0] == "dynamic bytes"] == [("dynamic bytes", 60_000)]
    assert [call[1] for call in driver.calls[1:]] == [60_000, 60_000]


def test_launch_from_a_thread_without_context(stream):
    driver = FakeDriver(FakeResult.CUDA_ERROR_INVALID_CONTEXT)
    _nvrtc.Kernel(driver, "function", 0, 128)((1, 1, 1), b"struct")
    assert driver.calls[1] == "context"
    assert driver.calls[0] == driver.calls[2]


def test_launch_failure_names_the_status(stream):
    driver = FakeDriver(FakeResult.CUDA_ERROR_INVALID_VALUE)
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
        _nvrtc.Kernel(driver, "function", 0, 128)((1, 1, 1), b"struct")


# --- emulation -------------------------------------------------------------------------------------------------------


def framed(*shape: int, dtype=torch.float32) -> torch.Tensor:
    """Random values inside a larger buffer of NaN, so that a read outside shows; rows keep their alignment."""
    buffer = torch.full([size + 8 for size in shape], float("nan"), dtype=dtype)
    inside = buffer[tuple(slice(4, 4 + size) for size in shape)]
    return inside.copy_(torch.randn(shape))


def widened(tensors):
    """In float64 on the CPU, where none of the kernels under test is."""
    return [None if tensor is None else tensor.detach().cpu().double() for tensor in tensors]


def assert_near(got, wanted, tolerance, name):
    assert got.shape == wanted.shape, name
    got, wanted = widened([got, wanted])
    assert torch.isfinite(got).all(), name
    error = (got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)
    assert error <= tolerance, f"{name}: relative error {error:.1e}"


def arguments(batch, dim, seqlen, width, dtype=torch.float32, parameters=torch.float32, channel_last=True, bias=True):
    rows = framed(batch, seqlen, dim, dtype=dtype).transpose(1, 2) if channel_last else framed(batch, dim, seqlen)
    return rows, torch.randn(dim, width).to(parameters), torch.randn(dim).to(parameters) if bias else None


def assert_conv_parity(x, weight, bias, silu, reverse, tolerance):
    out = cuda.conv_forward(x, weight, bias, silu, reverse)
    assert out.stride() == torch.empty_like(x).stride()
    wide = widened([x, weight, bias])
    assert_near(out, torch_kernels.conv_forward(*wide, silu, reverse), tolerance, "out")
    dout = torch.randn_like(out)
    grads = cuda.conv_backward(dout, x, weight, bias, silu, reverse)
    for name, grad, want in zip(
        ("x", "weight", "bias"), grads, torch_kernels.conv_backward(*widened([dout]), *wide, silu, reverse)
    ):
        if want.numel():
            assert_near(grad, want, tolerance, f"d{name}")
    return (out, *grads)


@pytest.fixture
def device(monkeypatch):
    """Puts an emulated device in the place of every CUDA device; call it to set the device up."""

    def use(multiprocessors=4, order=0):
        device = emulation.EmulatedDevice(multiprocessors, order)
        monkeypatch.setattr(_nvrtc, "device", lambda index: device)
        return device

    torch.manual_seed(0)
    use()
    return use


CASES = {
    "channel-last": ((2, 40, 37, 4), {}, True, 4),
    "time-last": ((2, 40, 37, 4), {"channel_last": False}, True, 4),
    "odd dim": ((3, 37, 150, 3), {"dtype": torch.bfloat16}, False, 1),
    "blocks share the batch": ((9, 256, 40, 4), {"dtype": torch.bfloat16}, True, 1),
    "no bias": ((3, 8, 3, 2), {"dtype": torch.float16, "bias": False}, True, 1),
    "one step": ((2, 8, 1, 4), {"dtype": torch.float16, "parameters": torch.float16}, True, 1),
}


@emulated
@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "reversed"])
@pytest.mark.parametrize("case", CASES)
def test_emulated_convolution(case, reverse, device):
    sizes, options, silu, multiprocessors = CASES[case]
    used = device(multiprocessors)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[options.get("dtype", torch.float32)]
    assert_conv_parity(*arguments(*sizes, **options), silu, reverse, tolerance)
    vector = used.launched[0][1].split(",")[2]
    assert vector == ("1" if case in ("time-last", "odd dim") else "4")


@emulated
def test_emulated_convolution_does_not_depend_on_the_order_of_threads(device):
    results = []
    for order in (0, 1, 2):
        torch.manual_seed(1)
        device(1, order)
        results.append(assert_conv_parity(*arguments(2, 40, 37, 4), True, False, 2e-6))
    for result in results[1:]:
        for first, other in zip(results[0], result):
            torch.testing.assert_close(first, other, rtol=0, atol=0)


@emulated
def test_emulated_directions_share_a_launch(device):
    used = device(1)
    convs = [cuda.Conv(*arguments(2, 40, 37, 4), True, reverse) for reverse in (False, True)]
    together = cuda.forward(convs)
    assert len(used.launched) == 1
    for conv, out in zip(convs, together):
        torch.testing.assert_close(out, cuda.conv_forward(*conv[:5]), rtol=0, atol=0)


MASKED = {
    "channel-last": ((2, 40, 37, 4), {}),
    "several blocks, blocks share the batch": ((3, 136, 300, 4), {}),
    "time-last, odd dim, no bias": ((2, 37, 50, 4), {"channel_last": False, "bias": False}),
}


def assert_masked_parity(case, reverse, device_type):
    """Through the operator and autograd, against the reference in float64; factors of any size have gradients, too."""
    sizes, options = MASKED[case]
    tensors = [None if t is None else t.detach().to(device_type) for t in arguments(*sizes, **options)]
    mask = (torch.rand(sizes[0], sizes[2]) < 0.6).float()
    mask[0] *= torch.rand(sizes[2])
    mask = torch.stack([mask, mask], 2).to(device_type)[..., 0]
    leaves = [None if t is None else t.requires_grad_() for t in (tensors[0], mask, *tensors[1:])]
    out = causal_conv1d_fn(*tensors, activation="silu", reverse=reverse, mask=mask)
    dout, tolerance = torch.randn_like(out), 3e-6
    grads = torch.autograd.grad(out, [t for t in leaves if t is not None], dout)
    x, factor, weight, bias = [None if t is None else t.requires_grad_() for t in widened(leaves)]
    wanted = causal_conv1d_ref(x * factor[:, None], weight, bias, "silu", reverse=reverse) * factor[:, None]
    wide = [t for t in (x, factor, weight, bias) if t is not None]
    assert_near(out, wanted, tolerance, "out")
    for number, (grad, want) in enumerate(zip(grads, torch.autograd.grad(wanted, wide, dout.cpu().double()))):
        assert_near(grad, want, tolerance, f"gradient {number}")


@emulated
@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "reversed"])
@pytest.mark.parametrize("case", MASKED)
def test_emulated_masked_convolution(case, reverse, device, monkeypatch):
    used = device(1)
    monkeypatch.setattr(registry.backends, "_loaded", {("cpu", None): cuda_kernels})
    assert_masked_parity(case, reverse, "cpu")
    assert [name for name, _ in used.launched] == ["conv_forward", "conv_backward", "reduce"]
    assert all(kernel.endswith(",true") for name, kernel in used.launched if name != "reduce")


@emulated
def test_masked_operators_meet_torch_library(device, monkeypatch):
    monkeypatch.setattr(registry.backends, "_loaded", {("cpu", None): cuda_kernels})
    x, weight, bias = (t.detach().clone().requires_grad_() for t in arguments(2, 8, 9, 4))
    mask = torch.rand(2, 9, requires_grad=True)
    torch.library.opcheck(torch.ops.causal_conv1d.masked.default, (x, mask, weight, bias, True, True))
    given = [t.detach() for t in (torch.randn_like(x), x, mask, weight, bias)]
    torch.library.opcheck(torch.ops.causal_conv1d.masked_backward.default, (*given, True, True))


@emulated
def test_masked_convolution_that_is_refused_runs_on_torch(device, monkeypatch):
    monkeypatch.setattr(backend, "_told", {"refused"})
    monkeypatch.setattr(registry.backends, "_loaded", {("cpu", None): cuda_kernels})

    def refuse(*job):
        raise _nvrtc.KernelError("refused")

    monkeypatch.setattr(device(), "kernel", refuse)
    x, weight, bias = (t.detach().clone().requires_grad_() for t in arguments(2, 8, 9, 4))
    mask = torch.rand(2, 9, requires_grad=True)
    out = causal_conv1d_fn(x, weight, bias, mask=mask, activation="silu")
    wanted = causal_conv1d_ref(x * mask[:, None], weight, bias, "silu") * mask[:, None]
    torch.testing.assert_close(out, wanted)
    for grad, want in zip(*(torch.autograd.grad(one.sum(), (x, mask, weight, bias)) for one in (out, wanted))):
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-5)


@emulated
@pytest.mark.parametrize("file", sorted(path.name for path in GOLDEN.glob("conv_*.npz")))
def test_emulated_convolution_golden(file, device):
    data = np.load(GOLDEN / file)
    given = {key: torch.from_numpy(data[key]) for key in data.files if key != "config"}
    silu = json.loads(str(data["config"]))["activation"] is not None
    tensors = given["x"], given["weight"], given.get("bias")
    assert_near(cuda.conv_forward(*tensors, silu, False), given["out"], 2e-4, "out")
    for name, grad in zip(("x", "weight", "bias"), cuda.conv_backward(given["dout"], *tensors, silu, False)):
        if f"grad:{name}" in given:
            assert_near(grad, given[f"grad:{name}"], 1e-3, f"d{name}")


@emulated
def test_emulated_convolution_beyond_32_bit_offsets(device):
    """Elements further than 2^31 from the first; the memory between them is never touched."""
    x, weight, bias = arguments(2, 8, 3, 4, dtype=torch.bfloat16)
    far = torch.empty(2**31 + 1000, dtype=torch.bfloat16).as_strided(x.shape, (2**31 + 8, 1, 8))
    assert_conv_parity(far.copy_(x), weight, bias, True, False, 8e-3)


@emulated
@pytest.mark.parametrize(("batch", "seqlen"), [(0, 5), (2, 0)])
def test_empty(batch, seqlen, device):
    x, weight, bias = torch.randn(batch, 8, seqlen), torch.randn(8, 4), torch.randn(8)
    assert cuda.conv_forward(x, weight, bias, True, False).shape == x.shape
    dx, dweight, dbias = cuda.conv_backward(x, x, weight, bias, True, False)
    assert dx.shape == x.shape
    assert not dweight.any()
    assert not dbias.any()


@emulated
@pytest.mark.parametrize("rows", [1, 16, 17, 100])
def test_emulated_reduction(rows, device):
    parts, wide = torch.randn(rows, 2, 3, 50), torch.randn(rows, 7)
    first, second = torch.empty(3, 50, 2), torch.empty(7, dtype=torch.bfloat16)
    turned = Sum(parts.data_ptr(), rows, 300, (150, 50, 1), first, (1, 100, 2), (2, 3, 50))
    add_up(_nvrtc.device(0), [turned, dense_sum(wide.data_ptr(), rows, second)])
    assert_near(first, parts.double().sum(0).permute(1, 2, 0), 1e-6, "strided")
    assert_near(second, wide.double().sum(0), 4e-3, "bfloat16")


def test_without_a_compiler_the_torch_path_runs_and_one_warning_says_why(monkeypatch):
    monkeypatch.setattr(backend, "_told", set())
    monkeypatch.setattr(_nvrtc, "_nvrtc", lambda: (_ for _ in ()).throw(ImportError("cuda")))
    monkeypatch.setattr(_nvrtc, "compiler_version", _nvrtc.compiler_version.__wrapped__)
    backends = backend.Backends("causal_conv1d", torch_kernels)
    backends.add("cuda", "cuda", cuda_kernels.load)
    with pytest.warns(RuntimeWarning, match="pip install .*cuda-bindings") as caught:
        assert [backends.available("cuda"), backends.available("cuda")] == ["torch", "torch"]
    assert len(caught) == 1


# --- on a GPU --------------------------------------------------------------------------------------------------------


class TestGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "reversed"])
    @pytest.mark.parametrize("case", CASES)
    def test_convolution(self, case, reverse):
        sizes, options, silu, _ = CASES[case]
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[
            options.get("dtype", torch.float32)
        ]
        tensors = [None if t is None else t.cuda() for t in arguments(*sizes, **options)]
        assert_conv_parity(*tensors, silu, reverse, tolerance)

    @pytest.mark.parametrize("sizes", [(128, 384, 197, 4), (1, 384, 100_000, 4), (64, 768, 14, 3)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_sizes(self, sizes, dtype):
        tolerance = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        assert_conv_parity(*[t.cuda() for t in arguments(*sizes, dtype=dtype)], True, False, tolerance)

    def test_interface_and_side_stream(self):
        tensors = [t.cuda().requires_grad_() for t in arguments(4, 64, 50, 4)]
        wide = [tensor.requires_grad_() for tensor in widened(tensors)]
        wanted = causal_conv1d_ref(*wide, "silu")
        wanted_grads = torch.autograd.grad(wanted.square().sum(), wide)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            out = causal_conv1d_fn(*tensors, "silu")
            grads = torch.autograd.grad(out.square().sum(), tensors)
        stream.synchronize()
        assert_near(out.detach(), wanted.detach(), 1e-5, "out")
        for name, grad, want in zip(("x", "weight", "bias"), grads, wanted_grads):
            assert_near(grad, want, 1e-5, f"d{name}")

    @pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "reversed"])
    @pytest.mark.parametrize("case", MASKED)
    def test_masked(self, case, reverse):
        assert_masked_parity(case, reverse, "cuda")
