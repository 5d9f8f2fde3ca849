"""The mixer over pooled lines on the CUDA kernels, emulated: against the formulas in float64, in value and gradient."""

import pytest
import torch
from causal_conv1d import _nvrtc, backend
from causal_conv1d.kernels import cuda as conv_cuda
from causal_conv1d.kernels import registry as conv_registry
from mamba_ssm.kernels import cuda as cuda_kernels
from mamba_ssm.kernels import registry
from mamba_ssm.ops.pooled import Lines, Taps, pooled_conv_fn, pooled_conv_ref, pooled_gate_fn, pooled_gate_ref

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
GRIDS = {
    "rows": Lines.of_grid((5, 6)),
    "columns": Lines.of_grid((5, 6), (1, 0)),
    "first axis": Lines.of_grid((3, 2, 4), pooled=(0,), scale=3.0),
    "outer axes": Lines.of_grid((3, 2, 4), (2, 0, 1), pooled=(0, 2)),
    "all": Lines.of_grid((7,), pooled=(0,)),
}


@pytest.fixture
def device(monkeypatch, emulation):
    """An emulated device and the CUDA kernel sets in the place of every device."""
    device = emulation.EmulatedDevice(1)
    monkeypatch.setattr(_nvrtc, "device", lambda index: device)
    monkeypatch.setattr(registry.backends, "_loaded", {("cpu", None): cuda_kernels})
    monkeypatch.setattr(conv_registry.backends, "_loaded", {("cpu", None): conv_cuda})
    torch.manual_seed(0)
    return device


def assert_near_float64(call, reference, inputs):
    """`call` of the inputs and `reference` of the same in float64 give the same, as do their gradients."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    wide = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    got, wanted = call(*leaves), reference(*wide)
    douts = [torch.randn_like(out) for out in got]
    grads = torch.autograd.grad(got, [t for t in leaves if t is not None], douts)
    wanted_grads = torch.autograd.grad(wanted, [t for t in wide if t is not None], [dout.double() for dout in douts])
    for number, (one, other) in enumerate(zip([*got, *grads], [*wanted, *wanted_grads], strict=True)):
        assert one.shape == other.shape
        error = ((one.detach().double() - other.detach()).abs().max() / other.detach().abs().max()).item()
        assert error <= TOLERANCE[inputs[0].dtype], f"result {number}: relative error {error:.1e}"


@pytest.mark.parametrize(("dim", "dtype", "width"), [(24, torch.float32, 4), (21, torch.bfloat16, 3)])
@pytest.mark.parametrize("grid", GRIDS)
def test_emulated_pooled_conv(grid, dim, dtype, width, device):
    lines = GRIDS[grid]
    x = torch.randn(2, lines.count * lines.length, 2 * dim).to(dtype)[..., :dim]
    taps = [torch.randn(size) for _ in range(2) for size in ((dim, width), (dim,), (dim,))]
    if dim == 21:
        taps[1] = taps[4] = None

    def call(x, *taps):
        return pooled_conv_fn(x, Taps(*taps[:3]), Taps(*taps[3:]), lines)

    def reference(x, *taps):
        return pooled_conv_ref(x, Taps(*taps[:3]), Taps(*taps[3:]), lines)

    assert_near_float64(call, reference, [x, *taps])
    assert [name for name, _ in device.launched].count("pooled_conv") == 1


@pytest.mark.parametrize(("dim", "dtype", "norm"), [(136, torch.float32, True), (21, torch.bfloat16, False)])
@pytest.mark.parametrize("grid", GRIDS)
def test_emulated_pooled_gate(grid, dim, dtype, norm, device):
    lines = GRIDS[grid]
    tokens = lines.count * lines.length
    skip, groups = torch.randn(2, tokens, dim).to(dtype), torch.randn(2, lines.count, dim).to(dtype)
    z = torch.randn(2, tokens, 2 * dim).to(dtype)[..., dim:]
    parameters = [torch.randn(dim), torch.randn(dim)] if norm else [None, None]
    more = 1e-5, lines, 0.5
    assert_near_float64(
        lambda *tensors: [pooled_gate_fn(*tensors, *more)],
        lambda *tensors: [pooled_gate_ref(*tensors, *more)],
        [skip, groups, z, *parameters],
    )
    assert [name for name, _ in device.launched] == ["pooled_gate"]


def test_what_is_refused_runs_on_torch(device, monkeypatch):
    monkeypatch.setattr(backend, "_told", {"refused"})

    def refuse(*job):
        raise _nvrtc.KernelError("refused")

    monkeypatch.setattr(device, "kernel", refuse)
    lines = GRIDS["columns"]
    x = torch.randn(2, 30, 8)
    taps = [Taps(torch.randn(8, 4), torch.randn(8), torch.randn(8)) for _ in range(2)]
    for one, other in zip(pooled_conv_fn(x, *taps, lines), pooled_conv_ref(x, *taps, lines)):
        torch.testing.assert_close(one, other)
    skip, groups, z = torch.randn(2, 30, 8), torch.randn(2, lines.count, 8), torch.randn(2, 30, 8)
    given = skip, groups, z, torch.randn(8), None, 1e-5, lines, 0.5
    torch.testing.assert_close(pooled_gate_fn(*given), pooled_gate_ref(*given))
