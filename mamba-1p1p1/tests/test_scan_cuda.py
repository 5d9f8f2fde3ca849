"""CUDA scan and norm: compiled for every architecture, emulated on the CPU, and run where a GPU is (`-m gpu`).

Emulation checks indexing, strides, barriers, reductions and tails against float64, in value and gradient. It is CPU
arithmetic: that the hardware computes the same is what the `gpu` tests are for.
"""

import copy
import importlib.util
import json
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from causal_conv1d import _nvrtc, backend
from causal_conv1d.kernels import cuda as conv_cuda
from causal_conv1d.kernels import registry as conv_registry
from mamba_ssm.kernels import cuda as cuda_kernels
from mamba_ssm.kernels import registry
from mamba_ssm.kernels import torch as torch_kernels
from mamba_ssm.kernels.cuda import norm as cuda_norm
from mamba_ssm.kernels.cuda import scan as cuda
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops.bidirectional import bidirectional_scan_fn
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref
from mamba_ssm.ops.triton.layernorm import layer_norm_fn

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
CSRC = cuda.SOURCES
TARGETS = ("sm_80", "sm_90", "sm_100")  # of which older compilers know the first alone
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


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


# --- compilation -----------------------------------------------------------------------------------------------------

F, H, BF = "float", "Float16", "BFloat16"
KERNELS = [
    *[("scan_forward", f"{BF},{BF},{BF},{BF},4,{cpt},4") for cpt in (1, 2, 4)],
    *[("scan_forward", f"{F},{F},{F},{F},{more}") for more in ("4,1,4", "4,4,4", "4,4,0", "4,4,1")],
    *[("scan_forward", f"{F},{F},{F},{F},{more}") for more in ("1,1,4", "2,2,4", "8,4,4", "16,1,4")],
    ("scan_forward", f"{H},{F},{H},{F},4,4,4"),
    *[("scan_backward", f"{t},{t},{t},{t},4,2,4") for t in (F, BF)],
    *[("scan_backward", f"{F},{F},{F},{F},{more}") for more in ("4,2,1", "4,1,4", "16,2,4")],
    *[("scan_states", f"{F},{F},{F},{F},4,{back},4") for back in ("false", "true")],
    *[("scan_carry", back) for back in ("false", "true")],
    *[(f"norm_{way}", f"{t},{F},{F},{F},4,2,32") for way in ("forward", "backward") for t in (F, BF)],
    *[("norm_backward", f"{F},{F},{F},{F},{more}") for more in ("4,8,32", "4,3,128", "4,8,128")],
    *[("match_pairs", BF), ("match_arrange", ""), ("merge_forward", f"{BF},4"), ("merge_backward", f"{BF},4")],
    *[("pooled_gate", f"{BF},{F},{more}") for more in ("4,8,32", "4,5,128")],
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


# --- emulation -------------------------------------------------------------------------------------------------------


def framed(*shape: int, dtype=torch.float32, low=None, high=None) -> torch.Tensor:
    """Random values inside a larger buffer of NaN, so that a read outside shows; rows keep their alignment."""
    buffer = torch.full([size + 8 for size in shape], float("nan"), dtype=dtype)
    inside = buffer[tuple(slice(4, 4 + size) for size in shape)]
    inside.copy_(torch.randn(shape) if low is None else torch.rand(shape) * (high - low) + low)
    return inside


def arguments(
    batch, dim, seqlen, dstate, groups=1, dtype=torch.float32, channel_last=True, D=True, z=True, bias=True, other=None
):
    """u, delta, A, B, C, D, z, delta_bias; `other` is the dtype of delta, B and C."""
    other = other or dtype

    def rows(dtype):
        if channel_last:
            return framed(batch, seqlen, dim, dtype=dtype).transpose(1, 2)
        return framed(batch, dim, seqlen, dtype=dtype)

    def matrix():
        if channel_last:
            return framed(batch, seqlen, groups, dstate, dtype=other).permute(0, 2, 3, 1)
        return framed(batch, groups, dstate, seqlen, dtype=other)

    parameters = [torch.randn(dim) if wanted else None for wanted in (D, bias)]
    A = -torch.rand(dim, dstate) * 3 - 0.1
    return rows(dtype), rows(other), A, matrix(), matrix(), parameters[0], rows(dtype) if z else None, parameters[1]


def widened(tensors):
    """In float64 on the CPU, where none of the kernels under test is."""
    return [None if tensor is None else tensor.detach().cpu().double() for tensor in tensors]


def assert_near(got, wanted, tolerance, name):
    assert got.shape == wanted.shape, name
    got, wanted = widened([got, wanted])
    assert torch.isfinite(got).all(), name
    scale = wanted.abs().max().clamp(min=1e-6)
    error = (got - wanted).abs().max() / scale
    assert error <= tolerance, f"{name}: relative error {error:.1e}"


def assert_scan_parity(tensors, softplus, reverse, multiprocessors=4, order=0, tolerance=None):
    """Forward and backward against the torch kernel set in float64. Returns all results."""
    tolerance = tolerance or TOLERANCE[tensors[0].dtype]
    out, last_state, states = cuda.scan_forward(*tensors, softplus, reverse, True)
    wanted, wanted_state, _ = torch_kernels.scan_forward(*widened(tensors), softplus, reverse, True)
    assert out.stride() == torch.empty_like(tensors[0]).stride()
    assert_near(out, wanted, tolerance, "out")
    assert_near(last_state, wanted_state, 5e-6, "last_state")
    dout = torch.randn_like(out)
    grads = cuda.scan_backward(dout, *tensors, states, softplus, reverse)
    wanted = torch_kernels.scan_backward(*widened([dout, *tensors, states]), softplus, reverse)
    for name, tensor, grad, want in zip(NAMES, tensors, grads, wanted):
        if tensor is None:
            assert grad.shape == (0,)
        else:
            assert grad.dtype == tensor.dtype
            assert_near(grad, want, 1.5 * tolerance, f"d{name}")
    return (out, last_state, *grads)


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
    "channel-last": ((2, 40, 37, 16), {}, 4),
    "time-last": ((2, 40, 37, 16), {"channel_last": False}, 4),
    "four channels per thread, not all there": ((1, 268, 20, 16), {}, 1),
    "bare": ((1, 268, 33, 16), {"D": False, "z": False, "bias": False}, 1),
    "groups": ((2, 24, 19, 16), {"groups": 3}, 4),
    "bfloat16": ((2, 72, 40, 16), {"dtype": torch.bfloat16}, 1),
    "float16": ((2, 72, 40, 16), {"dtype": torch.float16}, 1),
    "mixed dtypes": ((2, 40, 20, 16), {"dtype": torch.bfloat16, "other": torch.float32}, 4),
    "one step": ((3, 40, 1, 16), {}, 4),
    "odd dim": ((2, 37, 40, 16), {}, 4),
    "dstate 3": ((1, 20, 40, 3), {}, 4),
    "dstate 64": ((3, 20, 40, 64), {}, 4),
    "split sequence": ((1, 20, 600, 16), {}, 8),
}


@emulated
@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "reversed"])
@pytest.mark.parametrize("case", CASES)
def test_emulated_scan(case, reverse, device):
    sizes, options, multiprocessors = CASES[case]
    used = device(multiprocessors)
    assert_scan_parity(arguments(*sizes, **options), case != "bare", reverse)
    launched = dict(used.launched)
    assert ("scan_carry" in launched) == (case == "split sequence")
    pack = "0" if case == "time-last" else "1" if case == "odd dim" else "4"
    assert {launched["scan_forward"][-1], launched["scan_backward"][-1]} == {pack}


@emulated
@pytest.mark.parametrize("case", ["four channels per thread, not all there", "split sequence"])
def test_emulated_scan_does_not_depend_on_the_order_of_threads(case, device):
    sizes, options, multiprocessors = CASES[case]
    results = []
    for order in (0, 1, 2):
        torch.manual_seed(1)
        device(multiprocessors, order)
        tensors = arguments(*sizes, **options)
        results.append(assert_scan_parity(tensors, True, False))
    for result in results[1:]:
        for first, other in zip(results[0], result):
            torch.testing.assert_close(first, other, rtol=0, atol=0)


@emulated
def test_emulated_directions_share_a_launch(device):
    used = device(1)
    scans = [cuda.Scan(*arguments(2, 40, 37, 16), True, reverse) for reverse in (False, True)]
    both = cuda.forward(scans, True)
    assert [name for name, _ in used.launched] == ["scan_forward"]
    douts = [torch.randn_like(out) for out, _, _ in both]
    both_grads = cuda.backward(scans, douts, [states for _, _, states in both])
    assert [name for name, _ in used.launched] == ["scan_forward", "scan_backward", "reduce"]
    for scan, together, dout, grads in zip(scans, both, douts, both_grads):
        out, last_state, states = cuda.scan_forward(*scan, True)
        torch.testing.assert_close((out, last_state), together[:2], rtol=0, atol=0)
        for name, grad, want in zip(NAMES, grads, cuda.scan_backward(dout, *scan[:8], states, *scan[8:])):
            assert_near(grad, want, 1e-6, f"d{name}")


def as_arguments(tensors):
    """The tensors as a caller has them: B and C without groups, everything wanting a gradient."""
    tensors = [tensor.squeeze(1) if i in (3, 4) else tensor for i, tensor in enumerate(tensors)]
    return [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]


@emulated
def test_emulated_bidirectional_scan(device, monkeypatch):
    """Through the operator and autograd, against two references in float64."""
    used = device(1)
    first, second = (as_arguments(arguments(2, 40, 37, 16)) for _ in range(2))
    wide = [tensor.requires_grad_() for tensor in widened([*first, *second])]
    wanted = [selective_scan_ref(*wide[:8], True), selective_scan_ref(*wide[8:], True, reverse=True)]
    douts = [torch.randn_like(out) for out in (first[0], second[0])]
    wanted_grads = torch.autograd.grad(wanted, wide, widened(douts))
    monkeypatch.setattr(registry.backends, "pick", lambda tensor: cuda_kernels)
    got = bidirectional_scan_fn(first, second, True)
    grads = torch.autograd.grad(got, [*first, *second], douts)
    assert [name for name, _ in used.launched] == ["scan_forward", "scan_backward", "reduce"]
    for name, out, want in zip(("out", "out_b"), got, wanted):
        assert_near(out.detach(), want.detach(), 5e-6, name)
    for name, grad, want in zip(2 * NAMES, grads, wanted_grads):
        assert_near(grad, want, 1e-5, f"d{name}")


@emulated
@pytest.mark.parametrize("kind", ["none", "v1", "v2"])
def test_emulated_mixer(kind, device, monkeypatch):
    """A whole mixer on the CUDA kernel sets, against one in float64 on the torch ones."""
    used = device(1)
    mixer = Mamba(16, bimamba_type=kind, if_divide_out=True)
    x = torch.randn(2, 21, 16, requires_grad=True)
    with backend.use("torch"):
        wide, wide_x = copy.deepcopy(mixer).double(), x.detach().double().requires_grad_()
        wanted = wide(wide_x)
        dout = torch.randn_like(x)
        wanted_grads = torch.autograd.grad(wanted, [wide_x, *wide.parameters()], dout.double())
    monkeypatch.setattr(registry.backends, "pick", lambda tensor: cuda_kernels)
    monkeypatch.setattr(conv_registry.backends, "pick", lambda tensor: conv_cuda)
    got = mixer(x)
    # v2 is one operator, whose second scan adds to the first
    assert [name for name, _ in used.launched].count("scan_forward") == (2 if kind == "v2" else 1)
    assert_near(got.detach(), wanted.detach(), 1e-5, "out")
    for grad, want in zip(torch.autograd.grad(got, [x, *mixer.parameters()], dout), wanted_grads):
        assert_near(grad, want, 1e-4, "gradient")


@emulated
@pytest.mark.parametrize("ways", [("torch", "cuda"), ("cuda", "torch")])
def test_backward_on_another_kernel_set_than_forward(ways, device, monkeypatch):
    kernels, tensors = {"torch": torch_kernels, "cuda": cuda_kernels}, as_arguments(arguments(1, 8, 100, 16))
    wide = [tensor.requires_grad_() for tensor in widened(tensors)]
    wanted = torch.autograd.grad(selective_scan_ref(*wide, True).square().sum(), wide)
    monkeypatch.setattr(registry.backends, "pick", lambda tensor: kernels[ways[0]])
    out = selective_scan_fn(*tensors, delta_softplus=True)
    monkeypatch.setattr(registry.backends, "pick", lambda tensor: kernels[ways[1]])
    for name, grad, want in zip(NAMES, torch.autograd.grad(out.square().sum(), tensors), wanted):
        assert_near(grad, want, 1e-5, f"d{name}")


@emulated
def test_operators_meet_torch_library_on_the_emulated_kernels(device, monkeypatch):
    """Schema, fake results, gradients: `torch.library.opcheck`."""
    device(1)
    monkeypatch.setattr(registry.backends, "pick", lambda tensor: cuda_kernels)
    tensors = [t.detach().requires_grad_() for t in arguments(1, 8, 40, 16)]
    torch.library.opcheck(torch.ops.mamba_ssm.selective_scan, (*tensors, True, True, True))
    torch.library.opcheck(torch.ops.mamba_ssm.scan_both, (*tensors, *tensors, True, True))
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    torch.library.opcheck(torch.ops.mamba_ssm.add_norm, (x, x, weight, None, 1e-5, True, torch.float32))


@emulated
def test_emulated_scan_shares_memory_out_sparingly(device, monkeypatch):
    """Blocks that must share channel tiles or batch entries add to what is there already."""
    device(1)
    wanted = cuda._backward_plan

    def shared(plan):
        how = wanted(plan)
        assert how.slots > 2
        assert how.rows > 3
        return how._replace(grid=(2, 3, 1), sizes=plan.sizes(2, 2), slots=2, rows=3)

    monkeypatch.setattr(cuda, "_backward_plan", shared)
    assert_scan_parity(arguments(7, 268, 40, 16), True, False)


@emulated
@pytest.mark.parametrize("file", sorted(path.name for path in GOLDEN.glob("scan_*.npz")))
def test_emulated_scan_golden(file, device):
    data = np.load(GOLDEN / file)
    given = {key: torch.from_numpy(data[key]) for key in data.files if key != "config"}
    tensors = [given.get(name) for name in NAMES]
    for i in (3, 4):
        tensors[i] = tensors[i].unsqueeze(1) if tensors[i].dim() == 3 else tensors[i]
    softplus = json.loads(str(data["config"]))["delta_softplus"]
    out, last_state, states = cuda.scan_forward(*tensors, softplus, False, True)
    assert_near(out, given["out"], 2e-4, "out")
    assert_near(last_state, given["last_state"], 2e-4, "last_state")
    grads = cuda.scan_backward(given["dout"], *tensors, states, softplus, False)
    for name, tensor, grad in zip(NAMES, tensors, grads):
        if tensor is not None:
            assert_near(grad.reshape(given[f"grad:{name}"].shape), given[f"grad:{name}"], 1e-3, f"d{name}")


@emulated
@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("multiprocessors", [1, 64], ids=["whole", "split"])
def test_emulated_scan_extreme_inputs(softplus, multiprocessors, device):
    """Where the reference has a number, so has the kernel, and the same."""
    device(multiprocessors)
    tensors = list(arguments(1, 8, 520, 16))
    size = 10.0 ** torch.randint(-4, 5, tensors[1].shape)
    tensors[1] = size * tensors[1].sign() if softplus else size
    tensors[7] = tensors[7].abs()
    tensors[2] = -(10.0 ** torch.randint(-4, 5, tensors[2].shape).float())
    tensors[6] = tensors[6] * 1e4
    out, last_state, states = cuda.scan_forward(*tensors, softplus, False, True)
    wanted, wanted_state = selective_scan_ref(*widened(tensors), softplus, True)
    assert wanted.isfinite().all()
    assert_near(out, wanted, 1e-4, "out")
    assert_near(last_state, wanted_state, 1e-4, "last_state")
    dout = torch.randn_like(out)
    grads = cuda.scan_backward(dout, *tensors, states, softplus, False)
    wanted_grads = torch_kernels.scan_backward(*widened([dout, *tensors, states]), softplus, False)
    for name, grad, want in zip(NAMES, grads, wanted_grads):
        assert want.isfinite().all()
        assert_near(grad, want, 1e-4, f"d{name}")


@emulated
@pytest.mark.parametrize("strides", [(2**31 + 8, 1, 8), (64, 1, 2**30 + 4)], ids=["batch", "time"])
def test_emulated_scan_beyond_32_bit_offsets(strides, device):
    """Elements further than 2^31 from the first; the memory between them is never touched."""
    tensors = list(arguments(2, 8, 3, 16, dtype=torch.bfloat16))
    far = torch.empty(2**31 + 1000, dtype=torch.bfloat16).as_strided(tensors[0].shape, strides)
    tensors[0] = far.copy_(tensors[0])
    assert_scan_parity(tensors, True, False)


@emulated
@pytest.mark.parametrize(("batch", "seqlen"), [(0, 5), (2, 0)])
def test_empty(batch, seqlen, device):
    tensors = arguments(2, 8, 5, 16)
    tensors = [t[:batch, ..., :seqlen] if t is not None and t.dim() > 2 else t for t in tensors]
    out, last_state, states = cuda.scan_forward(*tensors, True, False, True)
    assert (out.shape, last_state.shape) == ((batch, 8, seqlen), (batch, 8, 16))
    assert states.shape == cuda.states_shape(batch, 8, seqlen, 16)
    grads = cuda.scan_backward(out, *tensors, states, True, False)
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in tensors]


@emulated
@pytest.mark.parametrize("dstate", [16, 130], ids=["constant B", "dstate 130"])
def test_what_no_kernel_covers_runs_on_torch_and_says_so_once(dstate, device, monkeypatch):
    monkeypatch.setattr(backend, "_told", set())
    used = device()
    tensors = list(arguments(2, 8, 5, dstate))
    if dstate == 16:
        tensors[3] = torch.randn(8, 16)
    with pytest.warns(RuntimeWarning, match=r"no CUDA kernel for a scan .*; using the slower torch path"):
        out, _, states = cuda.scan_forward(*tensors, True, False, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cuda.scan_forward(*tensors, True, False, True)
    assert states.shape == cuda.states_shape(2, 8, 5, dstate)
    torch.testing.assert_close(out, torch_kernels.scan_forward(*tensors, True, False, True)[0])
    cuda.scan_backward(out, *tensors, states, True, False)
    assert used.launched == []


def memory_beyond_results(batch, dim, seqlen, dstate, multiprocessors=132):
    """Floats that forward and backward take beside their results, in sizes of u: what `cuda` asks torch for."""
    states = np.prod(cuda.states_shape(batch, dim, seqlen, dstate))
    tensors = [torch.empty(size, device="meta") for size in ((batch, dim, seqlen),) * 2]
    A, B = torch.empty(dim, dstate, device="meta"), torch.empty(batch, 1, dstate, seqlen, device="meta")
    plan = cuda._plan_for([cuda.Scan(*tensors, A, B, B, None, None, None, True, False)])
    how = cuda._backward_plan(plan)
    most = how.slots * batch * seqlen * 2 * plan.lanes * cuda.STATES + how.rows * dim * (dstate + 2)
    carried = plan.splits * batch * dim * (dstate + 1) if plan.splits > 1 else 0
    return (states + carried + most) / (batch * dim * seqlen)


@emulated
@pytest.mark.parametrize("sizes", [(128, 384, 197), (8, 768, 197), (8, 384, 14), (1, 384, 4096), (64, 128, 64)])
def test_extra_memory_is_at_most_three_times_u(sizes, device):
    device(132)
    assert memory_beyond_results(*sizes, 16) <= 3


def test_without_a_compiler_the_torch_path_runs_and_one_warning_says_why(monkeypatch):
    monkeypatch.setattr(backend, "_told", set())
    monkeypatch.setattr(_nvrtc, "_nvrtc", lambda: (_ for _ in ()).throw(ImportError("cuda")))
    monkeypatch.setattr(_nvrtc, "compiler_version", _nvrtc.compiler_version.__wrapped__)
    backends = backend.Backends("mamba_ssm", torch_kernels)
    backends.add("cuda", "cuda", cuda_kernels.load)
    with pytest.warns(RuntimeWarning, match="pip install .*cuda-bindings") as caught:
        assert [backends.available("cuda"), backends.available("cuda")] == ["torch", "torch"]
    assert len(caught) == 1


NORMS = {
    "layer norm": ((3, 7, 40), torch.float32, torch.float32, torch.float32, True, False),
    "rms norm, half width": ((3, 7, 192), torch.bfloat16, torch.float32, torch.float32, False, True),
    "odd size": ((5, 77), torch.float16, None, torch.float32, True, False),
    "long rows": ((5, 1280), torch.bfloat16, torch.float32, torch.float32, False, False),
    "long rows, odd size": ((3, 1031), torch.float32, None, torch.float32, True, True),
    "residual of x's dtype": ((9, 64), torch.bfloat16, torch.bfloat16, torch.bfloat16, True, True),
}


@emulated
@pytest.mark.parametrize("shape", [(0, 16), (2, 4097)], ids=["no rows", "long rows"])
def test_norms_no_kernel_covers_run_on_torch(shape, device, monkeypatch):
    monkeypatch.setattr(backend, "_told", {"a norm over more than 4,096 channels"})
    used, x, weight = device(), torch.randn(shape), torch.randn(shape[1])
    out, total, mean, scale = cuda_norm.norm_forward(x, None, weight, None, 1e-5, False, torch.float32)
    torch.testing.assert_close(out, torch.nn.functional.layer_norm(x, weight.shape, weight))
    grads = cuda_norm.norm_backward(out, None, total, mean, scale, weight, None, False, None)
    assert [grad.shape for grad in grads] == [x.shape, (0,), weight.shape, (0,)]
    assert used.launched == []


@emulated
@pytest.mark.parametrize("case", NORMS)
def test_emulated_norm(case, device):
    device(1)
    shape, dtype, residual_dtype, total_dtype, with_bias, rms = NORMS[case]
    x = framed(*shape, dtype=dtype)
    residual = None if residual_dtype is None else framed(*shape, dtype=residual_dtype)
    weight, bias = torch.randn(shape[-1]), torch.randn(shape[-1]) if with_bias else None
    out, total, mean, scale = cuda_norm.norm_forward(x, residual, weight, bias, 1e-5, rms, total_dtype)
    leaves = [None if t is None else t.requires_grad_() for t in widened((x, residual, weight, bias))]
    wanted, wanted_total = layer_norm_fn(leaves[0], *leaves[2:], leaves[1], 1e-5, True, True, rms)
    half = min(dtype.itemsize, total_dtype.itemsize) == 2
    assert_near(out, wanted.detach(), 1e-2 if half else 2e-6, "out")
    assert_near(total, wanted_total.detach(), 1e-2 if total_dtype.itemsize == 2 else 1e-6, "total")
    dout, dtotal = torch.randn_like(out), torch.randn_like(total)
    grads = cuda_norm.norm_backward(dout, dtotal, total, mean, scale, weight, bias, rms, residual_dtype)
    torch.autograd.backward([wanted, wanted_total], widened([dout, dtotal]))
    for name, grad, leaf in zip(("x", "residual", "weight", "bias"), grads, leaves):
        if leaf is None:
            assert grad.shape == (0,)
        else:
            assert_near(grad, leaf.grad, 2e-2 if half else 3e-6, f"d{name}")


# --- on a GPU --------------------------------------------------------------------------------------------------------


def on_gpu(tensors):
    return [None if tensor is None else tensor.cuda() for tensor in tensors]


class TestGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "reversed"])
    @pytest.mark.parametrize("case", CASES)
    def test_scan(self, case, reverse):
        sizes, options, _ = CASES[case]
        tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}[
            options.get("dtype", torch.float32)
        ]
        torch.manual_seed(0)
        assert_scan_parity(on_gpu(arguments(*sizes, **options)), case != "bare", reverse, tolerance=tolerance)

    @pytest.mark.parametrize(
        "sizes", [(128, 384, 197, 16), (8, 384, 14, 16), (1, 384, 4096, 16), (1, 16, 100_000, 16), (2, 100, 1000, 64)]
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_scan_sizes(self, sizes, dtype):
        torch.manual_seed(0)
        tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype]
        assert_scan_parity(on_gpu(arguments(*sizes, dtype=dtype)), True, False, tolerance=tolerance)

    def test_scan_is_deterministic(self):
        tensors = on_gpu(arguments(16, 384, 197, 16))
        first = assert_scan_parity(tensors, True, False, tolerance=1e-4)
        torch.manual_seed(0)
        dout = torch.randn_like(first[0])
        states = cuda.scan_forward(*tensors, True, False, True)[2]
        runs = [cuda.scan_backward(dout, *tensors, states, True, False) for _ in range(3)]
        for run in runs[1:]:
            for grad, other in zip(runs[0], run):
                torch.testing.assert_close(grad, other, rtol=0, atol=0)

    def test_interface_and_side_stream(self):
        tensors = [t if t is None else t.requires_grad_() for t in on_gpu(arguments(4, 64, 50, 16))]
        wide = [tensor.requires_grad_() for tensor in widened(tensors)]
        wide[3:5] = [matrix.squeeze(1) for matrix in wide[3:5]]
        wanted = selective_scan_ref(*wide, delta_softplus=True)
        wanted_grads = torch.autograd.grad(wanted.square().sum(), wide)
        wanted_grads = [grad.view_as(tensor) for grad, tensor in zip(wanted_grads, tensors)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            out = selective_scan_fn(*tensors, delta_softplus=True)
            grads = torch.autograd.grad(out.square().sum(), tensors)
        stream.synchronize()
        assert_near(out.detach(), wanted.detach(), 2e-5, "out")
        for name, grad, want in zip(NAMES, grads, wanted_grads):
            assert_near(grad, want, 1e-4, f"d{name}")

    def test_bidirectional_scan(self):
        first, second = (as_arguments(on_gpu(arguments(8, 64, 197, 16))) for _ in range(2))
        got = bidirectional_scan_fn(first, second, True)
        douts = [torch.randn_like(out) for out in got]
        wide = [tensor.requires_grad_() for tensor in widened([*first, *second])]
        wanted = [selective_scan_ref(*wide[:8], True), selective_scan_ref(*wide[8:], True, reverse=True)]
        wanted_grads = torch.autograd.grad(wanted, wide, widened(douts))
        for out, want in zip(got, wanted):
            assert_near(out.detach(), want.detach(), 5e-5, "out")
        for name, grad, want in zip(2 * NAMES, torch.autograd.grad(got, [*first, *second], douts), wanted_grads):
            assert_near(grad, want, 1e-4, f"d{name}")

    @pytest.mark.parametrize("case", NORMS)
    def test_norm(self, case):
        shape, dtype, residual_dtype, total_dtype, with_bias, rms = NORMS[case]
        x = torch.randn(shape, dtype=dtype, device="cuda")
        residual = None if residual_dtype is None else torch.randn(shape, dtype=residual_dtype, device="cuda")
        weight = torch.randn(shape[-1], device="cuda")
        bias = torch.randn(shape[-1], device="cuda") if with_bias else None
        out, total, mean, scale = cuda_norm.norm_forward(x, residual, weight, bias, 1e-5, rms, total_dtype)
        leaves = [None if t is None else t.requires_grad_() for t in widened((x, residual, weight, bias))]
        wanted, wanted_total = layer_norm_fn(leaves[0], *leaves[2:], leaves[1], 1e-5, True, True, rms)
        assert_near(out, wanted, 1e-2, "out")
        dout, dtotal = torch.randn_like(out), torch.randn_like(total)
        grads = cuda_norm.norm_backward(dout, dtotal, total, mean, scale, weight, bias, rms, residual_dtype)
        torch.autograd.backward([wanted, wanted_total], widened([dout, dtotal]))
        for name, grad, leaf in zip(("x", "residual", "weight", "bias"), grads, leaves):
            if leaf is not None:
                assert_near(grad, leaf.grad, 2e-2, f"d{name}")
