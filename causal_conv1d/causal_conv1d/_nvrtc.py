"""The one place that compiles, caches and launches the CUDA kernels of both packages.

A kernel is a `.cu` file with one `KERNEL(...)` and a string of template arguments. At first use on a device it is
compiled by NVRTC for that device's architecture, which takes a fraction of a second and needs no CUDA toolkit, and the
binary is kept on disk under a hash of everything that went into it. Later processes only load it. Several processes may
start at once: a file appears under its final name complete or not at all.

The cache is `$KERNEL_CACHE_DIR`, else `$XDG_CACHE_HOME/vision-mamba-kernels`, else `~/.cache/vision-mamba-kernels`;
where it cannot be written, kernels are compiled anew in every process. What is read from it runs, so nothing is taken
that another user may have put there: only regular files of this user, which nobody else can write to.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import stat
import struct
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, lru_cache, wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
from causal_conv1d.backend import tell
from torch.utils._python_dispatch import _disable_current_modes

SHARED_SOURCES = Path(__file__).parent / "csrc"
_PROBE = SHARED_SOURCES / "probe.cu"
OPTIONS = ("--std=c++17", "--prec-div=false", "--ftz=true", "--ptxas-options=-v")
CACHE_VARIABLE = "KERNEL_CACHE_DIR"
# What a block gets of shared memory without asking.
DEFAULT_DYNAMIC_BYTES = 48 << 10

# The oldest drivers that run what CUDA of a major version compiles, on Linux (CUDA's release notes, table 3).
DRIVERS = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
COMPILERS = 8  # threads that compile at once, at most

CPP_TYPES = {torch.float32: "float", torch.float16: "Float16", torch.bfloat16: "BFloat16"}


class Binary(NamedTuple):
    """A compiled kernel: machine code (or PTX, for devices newer than the compiler) and the assembler's report."""

    code: bytes
    report: str


class Usage(NamedTuple):
    """What a kernel takes: registers and bytes of stack and spills per thread, bytes of static shared memory."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


class KernelError(RuntimeError):
    """A kernel cannot be had on this device, or cannot be launched: torch's operations are to do its work."""


class CompileError(KernelError):
    """NVRTC refused a source; the message holds its log."""


def or_else(other: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a kernel set's function: where one of its kernels is not to be had, `other` is called with the same
    arguments, and one warning says why."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any) -> Any:
            try:
                return function(*args)
            except KernelError as error:
                tell("CUDA", error)
                return other(*args)

        return call

    return decorate


def resource_usage(report: str) -> Usage:
    """Read the assembler's report of one kernel.

    Raises:
        ValueError: the report holds no usage, as when the code is PTX.
    """
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = re.search(r"Used (\d+) registers", report)
    if spills is None or registers is None:
        raise ValueError(f"the assembler's report has no usage in it: {report!r}")
    shared = re.search(r"(\d+) bytes smem", report)
    return Usage(int(registers[1]), *(int(group) for group in spills.groups()), int(shared[1]) if shared else 0)


def _checked(answer: tuple, what: str):
    """The value of a cuda-bindings call, which answers (status, value...). Raises KernelError."""
    status, *values = answer
    if int(status) != 0:
        raise KernelError(f"{what} failed: {status.name}")
    return values[0] if values else None


def _nvrtc():
    from cuda.bindings import nvrtc

    return nvrtc


def _driver():
    from cuda.bindings import driver

    return driver


def _torch_device(index: int) -> torch.device:
    return torch.device("cuda", index)


@lru_cache(maxsize=1)
def compiler_version() -> tuple[int, int]:
    """NVRTC's (major, minor). Raises ImportError or RuntimeError where NVRTC cannot be loaded."""
    _, major, minor = _nvrtc().nvrtcVersion()
    return major, minor


def _local_includes(source: str) -> list[str]:
    return re.findall(r'^#include "([^"]+)"', source, re.MULTILINE)


@cache
def _sources(path: Path) -> tuple[str, dict[str, str]]:
    """The text of a `.cu` file, and of every header it includes, directly or not, by name."""
    source, headers = path.read_text(encoding="utf-8"), {}
    wanted = _local_includes(source)
    while wanted:
        name = wanted.pop()
        # Only compilers for a CPU get this far into device.h.
        if name in headers or name == "cuda_emulator.h":
            continue
        header = next(folder / name for folder in (path.parent, SHARED_SOURCES) if (folder / name).is_file())
        headers[name] = header.read_text(encoding="utf-8")
        wanted += _local_includes(headers[name])
    return source, headers


@cache
def _supported() -> list[int]:
    return _checked(_nvrtc().nvrtcGetSupportedArchs(), "asking NVRTC for its architectures")


def knows(target: str) -> bool:
    """Whether NVRTC compiles for `target`, as sm_90."""
    return int(target.removeprefix("sm_")) in _supported()


def _target(capability: tuple[int, int]) -> str:
    """NVRTC's name for a compute capability; the newest portable PTX it can write if the device is newer than NVRTC."""
    number, supported = capability[0] * 10 + capability[1], _supported()
    if number in supported:
        return f"sm_{number}"
    older = [arch for arch in supported if arch < number]
    if not older:
        raise RuntimeError(f"the device has compute capability {capability}, NVRTC supports {min(supported)} and later")
    return f"compute_{max(older)}"


def compile_kernel(path: Path, arguments: str, target: str) -> Binary:
    """Compile one `.cu` file with `KERNEL_ARGUMENTS` for a target such as "sm_90"; needs no GPU and no driver.

    Raises:
        CompileError: the source does not compile.
    """
    nvrtc = _nvrtc()
    source, headers = _sources(path)
    options = [*OPTIONS, f"--gpu-architecture={target}", f"-DKERNEL_ARGUMENTS={arguments}"]
    contents, names = [text.encode() for text in headers.values()], [name.encode() for name in headers]
    create = nvrtc.nvrtcCreateProgram(source.encode(), path.name.encode(), len(headers), contents, names)
    program = _checked(create, "creating an NVRTC program")
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])[0]
        # NVRTC writes into what it is given. CPython shares the bytes objects of one byte, and an empty log is one byte
        # long: a `bytes` buffer would change every b" " of the process.
        log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program), "reading NVRTC's log"))
        _checked(nvrtc.nvrtcGetProgramLog(program, log), "reading NVRTC's log")
        report = log.decode(errors="replace").strip("\0 \n")
        if int(status) != 0:
            raise CompileError(f"{path.name} <{arguments}> does not compile for {target}:\n{report}")
        size, read = nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN
        if target.startswith("compute_"):
            size, read = nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX
        code = bytearray(_checked(size(program), "reading the binary"))
        _checked(read(program, code), "reading the binary")
        return Binary(bytes(code), report)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def cache_directory() -> Path:
    """Where compiled kernels are kept."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE])
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # a relative path is to be ignored, says the XDG Base Directory Specification
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "vision-mamba-kernels"


def _is_own(status: os.stat_result) -> bool:
    """Whether a file or folder is this user's, and nobody else's to write to."""
    if not hasattr(os, "getuid"):  # Windows, whose folders in a user's home are that user's
        return True
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _read_own(file: Path) -> bytes:
    """What is in a regular file of this user's, followed through no link and waited for at no pipe.

    Raises:
        OSError: there is none, or it is another's.
    """
    careful = [getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY")]
    handle = os.open(file, os.O_RDONLY | sum(careful))
    with os.fdopen(handle, "rb") as stream:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or not _is_own(status):
            raise PermissionError(f"{file} is not a regular file that only this user can write to")
        return stream.read()


def cached_kernel(path: Path, arguments: str, target: str, *, renew: bool = False) -> bytes:
    """Machine code from the cache, compiled and put there first if it is not in it (or if `renew`)."""
    source, headers = _sources(path)
    made_of = repr((path.name, source, sorted(headers.items()), arguments, OPTIONS, target, compiler_version()))
    name = f"{path.stem}-{target}-{hashlib.sha256(made_of.encode()).hexdigest()[:32]}"
    try:
        file = cache_directory() / name
        if not renew:
            return _read_own(file)
    except (OSError, RuntimeError):
        pass
    code = compile_kernel(path, arguments, target).code
    try:
        file = cache_directory() / name
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f"{name}.")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(code)
            os.replace(temporary, file)
        except BaseException:
            os.unlink(temporary)
            raise
    except (OSError, RuntimeError):
        pass
    return code


class Kernel:
    """A kernel loaded on one device. Calling it launches it on torch's current stream of that device.

    `refuse` is handed what goes wrong, before it is raised.
    """

    def __init__(
        self,
        driver,
        function,
        device_index: int,
        threads: int,
        refuse: Callable[[KernelError], KernelError] = lambda error: error,
    ):
        self._refuse = refuse
        self._launch = driver.cuLaunchKernel
        self._driver = driver
        self._function = function
        self._device_index = device_index
        self._threads = threads
        self._dynamic_bytes = DEFAULT_DYNAMIC_BYTES
        self._lock = threading.Lock()
        self._params = ctypes.create_string_buffer(1)
        self._point_to_params()

    def _point_to_params(self) -> None:
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self._params))
        self._address = ctypes.addressof(self._pointers)

    def __call__(self, grid: tuple[int, int, int], params: bytes, dynamic_bytes: int = 0) -> None:
        """Launch with the bytes of the kernel's argument struct, which are copied before this returns.

        Raises:
            KernelError: the driver refused it.
        """
        try:
            if torch._C._cuda_getDevice() == self._device_index:
                self._launch_here(grid, params, dynamic_bytes)
            else:
                with torch.cuda.device(self._device_index):
                    self._launch_here(grid, params, dynamic_bytes)
        except KernelError as error:
            raise self._refuse(error) from None

    def _launch_here(self, grid: tuple[int, int, int], params: bytes, dynamic_bytes: int) -> None:
        if dynamic_bytes > self._dynamic_bytes:
            limit = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(self._driver.cuFuncSetAttribute(self._function, limit, dynamic_bytes), "asking for shared memory")
            self._dynamic_bytes = dynamic_bytes
        stream = torch._C._cuda_getCurrentRawStream(self._device_index)
        # The buffer is this kernel's, so only one thread at a time may fill it.
        with self._lock:
            if len(params) != len(self._params):
                self._params = ctypes.create_string_buffer(len(params))
                self._point_to_params()
            ctypes.memmove(self._params, params, len(params))
            arguments = (self._function, *grid, self._threads, 1, 1, dynamic_bytes, stream, self._address, 0)
            (status,) = self._launch(*arguments)
            if status == self._driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
                # A thread that torch has not yet used on this device.
                context = _checked(self._driver.cuDevicePrimaryCtxRetain(self._device_index), "finding torch's context")
                _checked(self._driver.cuCtxSetCurrent(context), "entering torch's context")
                (status,) = self._launch(*arguments)
        if int(status) != 0:
            raise KernelError(f"launching a CUDA kernel failed: {status.name}")


class Device:
    """One CUDA device: its kernels, loaded as they are asked for.

    Once a kernel cannot be had, none can: what forward left to torch's operations, backward must not take up.
    """

    def __init__(self, index: int):
        self._driver = _driver()
        self.index = index
        self.multiprocessors = torch.cuda.get_device_properties(index).multi_processor_count
        self.target = _target(torch.cuda.get_device_capability(index))
        self._kernels: dict[tuple[Path, str], Kernel] = {}
        self._compiling: dict[tuple[Path, str], Future] = {}
        self._lock = threading.Lock()
        self._refused: KernelError | None = None

    def kernel(self, path: Path, arguments: str, threads: int) -> Callable[..., None]:
        """The kernel of `path` (named as the file) with these template arguments, in blocks of `threads`.

        Raises:
            KernelError: it does not compile or load here; so do all calls after that one.
        """
        kernel = self._kernels.get((path, arguments))
        if kernel is None or self._refused is not None:
            with self._lock:
                if self._refused is not None:
                    raise self._refused
                kernel = self._kernels.get((path, arguments))
                if kernel is None:
                    try:
                        kernel = self._load(path, arguments, threads)
                    except Exception as error:
                        raise self._refuse(error) from error
                    self._kernels[path, arguments] = kernel
        return kernel

    def prepare(self, wanted: Iterable[tuple[Path, str]]) -> None:
        """Start to compile these kernels, several at once; `kernel` waits for the one that it is asked for."""
        with self._lock:
            if self._refused is not None:
                return
            new = [job for job in dict.fromkeys(wanted) if job not in self._kernels and job not in self._compiling]
            for path, arguments in new:
                job = _compilers().submit(cached_kernel, path, arguments, self.target)
                self._compiling[path, arguments] = job

    def prove(self) -> None:
        """Compile, load and launch one small kernel, and look at what it did.

        Raises:
            KernelError: the reason why kernels do not run here.
        """
        # where a graph of fake tensors is being made, this is still done with true ones
        with _disable_current_modes():
            to = torch.zeros(1, dtype=torch.int32, device=_torch_device(self.index))
            wanted = 0x5EED
            self.kernel(_PROBE, "", 32)((1, 1, 1), struct.pack("qi4x", to.data_ptr(), wanted))
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return  # nothing may be read back
            if to.item() != wanted:
                raise self._refuse(KernelError("a small kernel was launched and did nothing"))

    def _refuse(self, error: Exception) -> KernelError:
        if not isinstance(error, KernelError):
            error = KernelError(f"a kernel cannot be loaded: {error}")
        self._refused = error
        return error

    def _load(self, path: Path, arguments: str, threads: int) -> Kernel:
        driver, compiling = self._driver, self._compiling.pop((path, arguments), None)
        code = cached_kernel(path, arguments, self.target) if compiling is None else compiling.result()
        with torch.cuda.device(self.index):
            torch.cuda.current_stream().synchronize()  # makes torch's context this thread's
            status, module = driver.cuModuleLoadData(code)
            if int(status) != 0:  # a damaged file in the cache
                code = cached_kernel(path, arguments, self.target, renew=True)
                module = _checked(driver.cuModuleLoadData(code), f"loading {path.stem}")
            function = _checked(driver.cuModuleGetFunction(module, path.stem.encode()), f"finding {path.stem}")
        return Kernel(driver, function, self.index, threads, self._refuse)


@cache
def _compilers() -> ThreadPoolExecutor:
    """The threads that compile ahead; NVRTC runs without Python's lock."""
    return ThreadPoolExecutor(max(1, min(COMPILERS, os.cpu_count() or 1)), thread_name_prefix="nvrtc")


@cache
def device(index: int) -> Device:
    """The device with torch's index `index`.

    Raises:
        ImportError, RuntimeError: cuda-bindings or NVRTC is not there, or too old for the device.
    """
    return Device(index)


def check() -> None:
    """Raise the reason, in one sentence, why CUDA kernels cannot be compiled here; return if they can."""
    major = (torch.version.cuda or "").partition(".")[0]
    package = f"'cuda-bindings=={major}.*'" if major else "cuda-bindings"
    try:
        compiler_version()
    except ImportError as error:
        raise RuntimeError(f"cuda-bindings is not installed: pip install {package}") from error
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RuntimeError(f"NVRTC cannot be loaded ({reason}): pip install {package}") from error


def check_driver() -> None:
    """Raise the reason, in one sentence, why NVIDIA's driver cannot run the kernels; return if it can."""
    wanted = torch.version.cuda or ""
    major = int(wanted.partition(".")[0] or 0)
    oldest = f"driver {DRIVERS[major]} or later" if major in DRIVERS else "a newer driver"
    try:
        version = _checked(_driver().cuDriverGetVersion(), "asking for the driver's version")
    except (ImportError, OSError, RuntimeError) as error:
        raise RuntimeError(f"there is no NVIDIA driver, and torch's CUDA {wanted} wants {oldest}") from error
    if version // 1000 < major:
        found = f"{version // 1000}.{version % 1000 // 10}"
        raise RuntimeError(f"the NVIDIA driver is for CUDA {found}, and torch's CUDA {wanted} wants {oldest}")


def prove(index: int | None) -> None:
    """Return if kernels compile, load and run on the device with torch's index `index` (None: the current one).

    Raises:
        RuntimeError: the reason, in one sentence, why they do not.
    """
    if torch.version.hip:
        raise RuntimeError(f"torch is built for ROCm {torch.version.hip}, and the kernels are for CUDA")
    check()
    check_driver()
    device(torch.cuda.current_device() if index is None else index).prove()
