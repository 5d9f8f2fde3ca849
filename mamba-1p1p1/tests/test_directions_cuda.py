"""A mixer's inside on the CUDA kernels, emulated: against float64, in value and gradient, and what it costs."""

from functools import partial

import pytest
import torch
from causal_conv1d import _nvrtc, backend
from causal_conv1d.kernels import cuda as conv_cuda
from causal_conv1d.kernels import registry as conv_registry
from mamba_ssm.kernels import cuda as cuda_kernels
from mamba_ssm.kernels import registry
from mamba_ssm.kernels import torch as torch_kernels
from mamba_ssm.kernels.arguments import DIRECTION_TENSORS
from mamba_ssm.modules.block import Block
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops.directions import Direction, directions_fn, directions_ref
from mamba_ssm.ops.triton.layernorm import RMSNorm

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture
def device(monkeypatch, emulation):
    """Puts an emulated device and the CUDA kernel sets in the place of every device; call it to set the device up."""

    def use(multiprocessors=1, order=0):
        device = emulation.EmulatedDevice(multiprocessors, order)
        monkeypatch.setattr(_nvrtc, "device", lambda index: device)
        return device

    monkeypatch.setattr(registry.backends, "_loaded", {("cpu", None): cuda_kernels})
    monkeypatch.setattr(conv_registry.backends, "_loaded", {("cpu", None): conv_cuda})
    torch.manual_seed(0)
    use()
    return use


def arguments(batch=2, seqlen=21, dim=24, dt_rank=4, dstate=16, ways=(False, True), optional=True, dtype=torch.float32):
    """xz (batch, seqlen, 2*dim), and a `Direction` with log(-A) for each of `ways`."""

    def rand(*shape, scale=1.0):
        return (torch.randn(shape) * scale).requires_grad_()

    xz = torch.randn(batch, seqlen, 2 * dim).to(dtype).requires_grad_()
    directions = [
        Direction(
            rand(dim, 4, scale=0.5),
            rand(dim) if optional else None,
            rand(dt_rank + 2 * dstate, dim, scale=dim**-0.5),
            rand(dim, dt_rank, scale=dt_rank**-0.5),
            rand(dim) if optional else None,
            rand(dim, dstate, scale=0.5),
            rand(dim) if optional else None,
            way,
        )
        for way in ways
    ]
    return xz, directions


def leaves_of(xz, directions):
    return [xz, *(tensor for each in directions for tensor in each[:DIRECTION_TENSORS] if tensor is not None)]


def assert_near_float64(xz, directions, share, got, grads, dout, tolerance):
    """Output and gradients against the reference operators in float64."""
    wide = [t.detach().double().requires_grad_() for t in leaves_of(xz, directions)]
    rest = iter(wide[1:])
    doubles = [
        Direction(*(None if t is None else next(rest) for t in each[:DIRECTION_TENSORS]), each.reverse)
        for each in directions
    ]
    want = directions_ref(wide[0], doubles, share, log_decay=True)
    wanted = torch.autograd.grad(want, wide, dout.double())
    for name, one, other in [("out", got, want), *((n, g, w) for n, (g, w) in enumerate(zip(grads, wanted)))]:
        assert one.shape == other.shape
        error = ((one.detach().double() - other.detach()).abs().max() / other.detach().abs().max()).item()
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


CASES = {
    "both": ({}, 1, 0.5),
    "one": ({"ways": (True,), "optional": False}, 1, 1.0),
    "along": ({"ways": (False, False), "dim": 21, "seqlen": 33}, 1, 1.0),
    "bfloat16": ({"dtype": torch.bfloat16, "dim": 72}, 1, 1.0),
    "float16": ({"dtype": torch.float16, "dim": 72, "seqlen": 5}, 1, 0.5),
    "split": ({"batch": 1, "seqlen": 530, "dim": 16}, 8, 0.5),
    "dstate 72": ({"dstate": 72, "dim": 12}, 1, 1.0),
    "dstate 5": ({"dstate": 5}, 1, 1.0),
}


@pytest.mark.parametrize("case", CASES)
def test_emulated_directions(case, device):
    options, multiprocessors, share = CASES[case]
    used = device(multiprocessors)
    xz, directions = arguments(**options)
    got = directions_fn(xz, directions, share, log_decay=True)
    dout = torch.randn_like(got)
    grads = torch.autograd.grad(got, leaves_of(xz, directions), dout)
    assert_near_float64(xz, directions, share, got, grads, dout, TOLERANCE[xz.dtype])
    launched, ways = [name for name, _ in used.launched], len(directions)
    assert launched.count("conv_forward") == 2  # forward, and again in backward, both directions at once
    assert launched.count("conv_backward") == 1
    assert launched.count("scan_forward") == launched.count("scan_backward") == ways
    assert launched.count("reduce") == 2
    assert ("scan_carry" in launched) == (case == "split")
    if case in ("both", "bfloat16", "split"):  # whole packs of a Vim's d_state
        asked = {job for job in used.launched if job[0].startswith(("scan", "conv"))}
        assert asked <= {(path.stem, arguments) for path, arguments in used.prepared}


def test_sizes_that_differ_are_not_stacked(device):
    used = device()
    xz, (first, _) = arguments()
    _, (_, second) = arguments(dt_rank=3)
    got = directions_fn(xz, [first, second], log_decay=True)
    dout = torch.randn_like(got)
    grads = torch.autograd.grad(got, leaves_of(xz, [first, second]), dout)
    assert_near_float64(xz, [first, second], 1.0, got, grads, dout, 1e-5)
    assert "scan_forward" in [name for name, _ in used.launched]


@pytest.mark.parametrize("ways", [("torch", "cuda"), ("cuda", "torch"), ("cuda", "refused")])
def test_backward_on_another_kernel_set_than_forward(ways, device, monkeypatch):
    used = device()
    xz, directions = arguments()
    sets = {"torch": torch_kernels, "cuda": cuda_kernels, "refused": cuda_kernels}
    monkeypatch.setattr(registry.backends, "pick", lambda tensor: sets[ways[0]])
    got = directions_fn(xz, directions, log_decay=True)
    monkeypatch.setattr(registry.backends, "pick", lambda tensor: sets[ways[1]])
    if ways[1] == "refused":
        monkeypatch.setattr(backend, "_told", {"refused"})

        def refuse(*job):
            raise _nvrtc.KernelError("refused")

        monkeypatch.setattr(used, "kernel", refuse)
    dout = torch.randn_like(got)
    grads = torch.autograd.grad(got, leaves_of(xz, directions), dout)
    assert_near_float64(xz, directions, 1.0, got, grads, dout, 1e-5)


def test_forward_refused(device, monkeypatch):
    """What torch's operations leave for backward has the shapes that were announced."""
    used = device()
    monkeypatch.setattr(backend, "_told", {"refused"})

    def refuse(*job):
        raise _nvrtc.KernelError("refused")

    monkeypatch.setattr(used, "kernel", refuse)
    xz, directions = arguments()
    got = directions_fn(xz, directions, log_decay=True)
    dout = torch.randn_like(got)
    grads = torch.autograd.grad(got, leaves_of(xz, directions), dout)
    assert_near_float64(xz, directions, 1.0, got, grads, dout, 1e-5)


def test_operators_meet_torch_library(device):
    xz, directions = arguments(batch=1, seqlen=18, dim=8)
    parameters = [tensor for each in directions for tensor in each[:DIRECTION_TENSORS]]
    args = (xz, None, *parameters, [False, True], 0.5, True, True)
    torch.library.opcheck(torch.ops.mamba_ssm.directions.default, args)
    with torch.no_grad():
        out, *saved = torch.ops.mamba_ssm.directions(*args)
    xz, *parameters = (tensor.detach() for tensor in (xz, *parameters))
    args = (out, xz, None, *saved, *parameters, [False, True], 0.5, True)
    torch.library.opcheck(torch.ops.mamba_ssm.directions_backward.default, args)


# --- what a layer costs ----------------------------------------------------------------------------------------------


def costs(device, recorder) -> dict[str, tuple[int, int]]:
    """(launches, allocations) of a layer of a Vim, under autocast: forward and backward."""
    torch.manual_seed(0)
    mixer = partial(Mamba, bimamba_type="v2", if_divide_out=True)
    block = Block(32, mixer, norm_cls=RMSNorm, fused_add_norm=True, residual_in_fp32=True)
    x = torch.randn(2, 20, 32, dtype=torch.bfloat16, requires_grad=True)
    residual = torch.randn(2, 20, 32, requires_grad=True)
    found = {}

    def run(name, call):
        before = len(recorder.launched) + len(device.launched), recorder.allocated
        with recorder:
            result = call()
        after = len(recorder.launched) + len(device.launched), recorder.allocated
        found[name] = after[0] - before[0], after[1] - before[1]
        return result

    with torch.autocast("cpu", torch.bfloat16):
        out, total = run("forward", lambda: block(x, residual))
    douts = torch.randn_like(out), torch.randn_like(total)
    run("backward", lambda: torch.autograd.backward((out, total), douts))
    return found


def test_a_layer_launches_and_allocates_half_of_what_single_operators_do(device, monkeypatch, emulation):
    now = costs(device(), emulation.Recorder())
    for name in ("stacked_forward", "stacked_backward", "can_stack"):
        monkeypatch.delattr(cuda_kernels, name)
    before = costs(device(), emulation.Recorder())
    print(f"(launches, allocations): before {before}, now {now}")
    for way in ("forward", "backward"):
        assert now[way][0] <= before[way][0] / 2
        assert now[way][1] <= before[way][1] / 2
