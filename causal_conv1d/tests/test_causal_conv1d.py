"""The convolution: golden numbers, every backend against the reference in value and gradient, and bad input."""

import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from causal_conv1d import (
    backend,
    causal_conv1d_fn,
    causal_conv1d_ref,
    causal_conv1d_update,
    causal_conv1d_update_ref,
    native,
)
from causal_conv1d.kernels.registry import backends

GOLDEN = sorted((Path(__file__).parent / "golden").glob("conv_*.npz"))
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@pytest.fixture(params=["torch", "plain", "avx2", "avx512"])
def kernels(request):
    """Every CPU backend, the C++ one at each instruction set that this machine has."""
    with ExitStack() as stack:
        if request.param == "torch":
            stack.enter_context(backend.use("torch"))
        else:
            if backends.available("cpu") != "cpp":
                pytest.skip("the C++ kernels are not built")
            if stack.enter_context(native.isa(request.param)) != request.param:
                pytest.skip(f"this processor has no {request.param}")
            stack.enter_context(backend.use("cpp"))
        yield request.param


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    if want.numel() == 0:
        return 0.0
    return ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30)).item()


def arguments(batch, dim, seqlen, width, bias, dtype=torch.float32, layout="contiguous"):
    generator = torch.Generator().manual_seed(batch * 1000 + dim * 10 + seqlen)

    def rand(*shape):
        return torch.randn(shape, generator=generator)

    if layout == "channel_last":
        x = rand(batch, seqlen, dim).to(dtype).transpose(1, 2)
    elif layout == "half":  # the x half of an (batch, seqlen, 2*dim) projection
        x = rand(batch, seqlen, 2 * dim).to(dtype)[..., :dim].transpose(1, 2)
    elif layout == "strided":
        x = rand(batch, dim, 2 * seqlen).to(dtype)[..., ::2]
    else:
        x = rand(batch, dim, seqlen).to(dtype)
    return x, rand(dim, width), rand(dim) if bias else None


def gradients(fn, x, weight, bias, dout, **options):
    inputs = [tensor.detach().requires_grad_() for tensor in (x, weight, bias) if tensor is not None]
    out = fn(*inputs, *([] if bias is not None else [None]), **options)
    return out, torch.autograd.grad(out, inputs, dout)


def assert_as_reference(x, weight, bias, activation, reverse, tolerance):
    dout = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    options = {"activation": activation, "reverse": reverse}
    out, grads = gradients(causal_conv1d_fn, x, weight, bias, dout, **options)
    want, want_grads = gradients(causal_conv1d_ref, x.float(), weight, bias, dout.float(), **options)
    assert out.dtype == x.dtype
    assert out.stride() == torch.empty_like(x).stride()
    assert relative_error(out, want) <= tolerance
    for grad, want_grad in zip(grads, want_grads):
        assert relative_error(grad, want_grad) <= max(2 * tolerance, 1e-5)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize("reverse", [False, True])
def test_golden(path, reverse, kernels):
    golden = np.load(path)
    tensors = {name: torch.from_numpy(golden[name]) for name in golden if name != "config"}
    activation = json.loads(str(golden["config"]))["activation"]
    sequences = ("x", "dout", "out", "grad:x")
    tensors = {name: t.flip(-1) if reverse and name in sequences else t for name, t in tensors.items()}
    bias = tensors.get("bias")
    out, grads = gradients(
        causal_conv1d_fn, tensors["x"], tensors["weight"], bias, tensors["dout"], activation=activation, reverse=reverse
    )
    assert relative_error(out, tensors["out"]) <= 2e-6
    for name, grad in zip(("x", "weight", "bias"), grads):
        assert relative_error(grad, tensors[f"grad:{name}"]) <= 2e-6


@pytest.mark.parametrize("layout", ["contiguous", "channel_last", "half", "strided"])
@pytest.mark.parametrize("shape", [(2, 48, 197), (1, 16, 4), (3, 5, 1), (2, 37, 2), (1, 130, 33), (2, 3, 1100)])
def test_shapes_and_layouts(shape, layout, kernels):
    for reverse in (False, True):
        assert_as_reference(*arguments(*shape, 4, True, layout=layout), "silu", reverse, 2e-6)


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("layout", ["contiguous", "channel_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_options(width, layout, dtype, kernels):
    for bias in (False, True):
        for activation in (None, "swish"):
            inputs = arguments(2, 19, 25, width, bias, dtype, layout)
            for reverse in (False, True):
                assert_as_reference(*inputs, activation, reverse, TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0)])
def test_empty(shape, kernels):
    x, weight, bias = arguments(*shape, 4, True)
    out, grads = gradients(causal_conv1d_fn, x, weight, bias, torch.zeros(shape), activation="silu")
    assert out.shape == x.shape
    assert all(not grad.any() for grad in grads)


def test_extreme_values(kernels):
    x = torch.tensor([1e4, -1e4, 3e38, 0.0, -3e38, torch.inf]).repeat(1, 20, 5)
    weight, bias = torch.ones(20, 2), torch.zeros(20)
    torch.testing.assert_close(
        causal_conv1d_fn(x, weight, bias, "silu"), causal_conv1d_ref(x, weight, bias, "silu"), equal_nan=True
    )


def test_same_threads_same_bits():
    x, weight, bias = arguments(3, 70, 129, 4, True)
    first, second = (gradients(causal_conv1d_fn, x, weight, bias, x, activation="silu") for _ in range(2))
    for one, other in zip((first[0], *first[1]), (second[0], *second[1])):
        assert torch.equal(one, other)


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_update(width, dtype, activation, kernels):
    for dim in (5, 32):
        x, weight, bias = arguments(2, dim, 7, width, True, dtype)
        state = torch.zeros(2, dim, width, dtype=dtype)
        reference_state = state.clone()
        steps, reference_steps = [], []
        for t in range(x.shape[2]):
            steps.append(causal_conv1d_update(x[:, :, t], state, weight, bias, activation))
            reference_steps.append(causal_conv1d_update_ref(x[:, :, t], reference_state, weight, bias, activation))
        assert torch.equal(state, reference_state)
        assert relative_error(torch.stack(steps), torch.stack(reference_steps)) <= TOLERANCE[dtype]
        whole = causal_conv1d_fn(x, weight, bias, activation)
        assert relative_error(torch.stack(steps, -1), whole) <= TOLERANCE[dtype]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_reference_gradcheck(reverse, activation):
    inputs = [tensor.double().requires_grad_() for tensor in arguments(2, 3, 6, 3, True)]
    for fn in (causal_conv1d_ref, causal_conv1d_fn):
        assert torch.autograd.gradcheck(lambda *args, fn=fn: fn(*args, activation, reverse=reverse), inputs)


@pytest.mark.parametrize("name", ["torch", "cpp"])
def test_opcheck(name):
    x, weight, bias = (tensor.requires_grad_() for tensor in arguments(2, 5, 9, 4, True))
    last = x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    with backend.use(name if backends.available("cpu") == name else "torch"):
        for args in ((x, weight, bias, True, False), (last, weight, bias, False, True), (x, weight, None, True, True)):
            torch.library.opcheck(torch.ops.causal_conv1d.forward.default, args)
            detached = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]
            torch.library.opcheck(torch.ops.causal_conv1d.backward.default, (detached[0], *detached))
        state = torch.zeros(2, 5, 4)
        args = (x.detach()[:, :, 0], state, weight.detach(), bias.detach(), True)
        torch.library.opcheck(torch.ops.causal_conv1d.update.default, args)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 5)}, ValueError, r"x has shape \(4, 5\), wanted \(batch, dim, seqlen\)"),
        ({"x": [1.0]}, TypeError, "x is a list, wanted a torch.Tensor"),
        ({"x": torch.zeros(2, 4, 5, dtype=torch.int64)}, TypeError, "x has dtype int64, wanted float32 or bfloat16"),
        ({"weight": torch.zeros(3, 4)}, ValueError, r"weight has shape \(3, 4\), wanted \(dim, width\) with dim 4"),
        ({"weight": torch.zeros(4, 0)}, ValueError, r"weight has shape \(4, 0\), wanted .* width 1 or more"),
        ({"weight": torch.zeros(4, 1, 4)}, ValueError, r"weight has shape \(4, 1, 4\), wanted \(dim, width\)"),
        ({"weight": torch.zeros(4, 4, device="meta")}, ValueError, "weight is on meta, wanted cpu, the device of x"),
        ({"bias": torch.zeros(1)}, ValueError, r"bias has shape \(1,\), wanted \(dim,\) = \(4,\)"),
        ({"activation": "gelu"}, ValueError, "activation is 'gelu', wanted None, 'silu' or 'swish'"),
    ],
)
def test_bad_input(change, error, message):
    good = {"x": torch.zeros(2, 4, 5), "weight": torch.zeros(4, 4), "bias": torch.zeros(4), "activation": "silu"}
    with pytest.raises(error, match=message) as raised:
        causal_conv1d_fn(**good | change)
    assert "\n" not in str(raised.value)


def test_bad_update_input():
    with pytest.raises(
        ValueError, match=r"conv_state has shape \(2, 4, 2\), wanted \(batch, dim, width\) = \(2, 4, 4\)"
    ):
        causal_conv1d_update(torch.zeros(2, 4), torch.zeros(2, 4, 2), torch.zeros(4, 4))


def test_update_writes_only_where_torch_would(kernels):
    x, weight, bias = torch.randn(2, 8), torch.randn(8, 4), torch.randn(8)
    for state in (torch.zeros(1, 8, 4).expand(2, 8, 4), torch.zeros(2, 8, 1).expand(2, 8, 4), torch.zeros(8, 8).T[:2]):
        state = state.unfold(1, 4, 4)[:, :1].expand(2, 8, 4) if state.dim() == 2 else state
        with pytest.raises(RuntimeError, match="wanted a place in memory of its own for each element"):
            causal_conv1d_update(x, state, weight, bias)
    with pytest.raises(RuntimeError, match="conv_state requires a gradient"):
        causal_conv1d_update(x, torch.zeros(2, 8, 4, requires_grad=True), weight, bias)
    state = torch.zeros(2, 8, 4)
    with pytest.raises(RuntimeError, match="x shares its memory with conv_state"):
        causal_conv1d_update(state[:, :, 0], state, weight, bias)
    # a view with places of its own is as good as a whole
    wide = torch.randn(2, 4, 16).transpose(1, 2)[:, ::2]
    own = wide.clone()
    torch.testing.assert_close(
        causal_conv1d_update(x, wide, weight, bias), causal_conv1d_update_ref(x, own, weight, bias)
    )
    torch.testing.assert_close(wide, own)


def test_update_of_a_state_that_a_graph_has_saved_is_an_error(kernels):
    x, weight = torch.randn(2, 8), torch.randn(8, 4)
    leaf = torch.randn(2, 8, 4, requires_grad=True)
    state = leaf.detach() * 1
    saved = (leaf * state).sum()
    before = state._version
    causal_conv1d_update(x, state, weight)
    assert state._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_unknown_backend():
    with (
        pytest.raises(ValueError, match="kernel backend is 'fast', wanted one of auto, cuda, cpp, torch"),
        backend.use("fast"),
    ):
        pass


# --- what later releases take ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 4, 5, 9])
def test_any_width(width, kernels):
    x, weight, bias = arguments(2, 6, 12, width, True)
    for reverse in (False, True):
        assert_as_reference(x, weight, bias, "silu", reverse, 2e-6)
    state, steps = torch.zeros(2, 6, width), []
    for t in range(12):
        steps.append(causal_conv1d_update(x[..., t], state, weight, bias, "silu"))
    torch.testing.assert_close(torch.stack(steps, -1), causal_conv1d_ref(x, weight, bias, "silu"))


def test_the_fourth_place_is_told_apart_by_its_type():
    x, weight, bias = arguments(2, 6, 12, 4, True)
    wanted = causal_conv1d_fn(x, weight, bias, activation="silu")
    for given in (("silu",), ("swish",), (None, None, False, None, "silu")):
        assert torch.equal(causal_conv1d_fn(x, weight, bias, *given), wanted)
    one = torch.zeros(2, 12, dtype=torch.int32)
    torch.testing.assert_close(causal_conv1d_fn(x, weight, bias, one, None, False, None, "silu"), wanted)


@pytest.mark.parametrize("width", [3, 4, 6])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_packed_sequences_do_not_see_each_other(width, activation, kernels):
    x, weight, bias = arguments(1, 6, 12, width, True)
    seq_idx = torch.tensor([[0] * 5 + [1] * 1 + [2] * 6], dtype=torch.int32)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    out = causal_conv1d_fn(*inputs, seq_idx=seq_idx, activation=activation)
    parts = [causal_conv1d_ref(part, weight, bias, activation) for part in x.split([5, 1, 6], dim=-1)]
    torch.testing.assert_close(out, torch.cat(parts, -1))
    grads = [torch.autograd.grad(each.square().sum(), inputs) for each in (out, torch.cat(parts, -1))]
    for got, want in zip(*grads):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [2, 4, 6])
def test_states_carry_a_sequence_on(width, kernels):
    x, weight, bias = arguments(2, 6, 12, width, True)
    whole = causal_conv1d_ref(x, weight, bias, "silu")
    pieces, states = [], None
    for part in x.split([2, 7, 3], dim=-1):
        room = torch.empty(2, 6, width - 1)
        options = {"return_final_states": True, "final_states_out": room, "activation": "silu"}
        piece, states = causal_conv1d_fn(part, weight, bias, initial_states=states, **options)
        assert states is room
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, -1), whole)
    assert torch.equal(states, x[..., 12 - (width - 1) :])
    given = torch.randn(2, 6, width - 1, requires_grad=True)
    causal_conv1d_fn(x, weight, bias, initial_states=given).sum().backward()
    assert given.grad.any()


@pytest.mark.parametrize("length", [3, 4, 7])
@pytest.mark.parametrize("steps", [None, 1, 3])
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("chosen", [False, True])
def test_update_of_longer_states(length, steps, ring, chosen):
    """A state of width - 1 or more, several steps at once, a ring, some of many: all go on as one pass does."""
    x, weight, bias = arguments(2, 6, 12, 4, True)
    whole = causal_conv1d_ref(x, weight, bias, "silu")
    store = torch.zeros(5 if chosen else 2, 6, length)
    rows = torch.tensor([3, 1], dtype=torch.int32) if chosen else None
    outs = []
    for start in range(0, 12, steps or 1):
        part = x[..., start] if steps is None else x[..., start : start + steps]
        written = torch.full((2,), start, dtype=torch.int32) if ring else None
        outs.append(causal_conv1d_update(part, store, weight, bias, "silu", written, rows))
        assert outs[-1].shape == part.shape
    torch.testing.assert_close(torch.stack(outs, -1) if steps is None else torch.cat(outs, -1), whole)
    if chosen:
        assert not store[[0, 2, 4]].any()


def test_update_is_differentiated_where_that_is_wanted(kernels):
    x, weight, bias = (tensor.requires_grad_() for tensor in arguments(2, 6, 12, 4, True))
    state, outs = torch.zeros(2, 6, 4), []
    for t in range(3):
        outs.append(causal_conv1d_update(x[..., t], state, weight, bias, "silu"))
    assert not state.requires_grad
    got = torch.autograd.grad(torch.stack(outs, -1).sum(), (weight, bias))
    want = torch.autograd.grad(causal_conv1d_ref(x[..., :3], weight, bias, "silu").sum(), (weight, bias))
    for one, other in zip(got, want):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_idx": torch.zeros(2, 4).int()}, r"seq_idx has shape \(2, 4\), wanted \(batch, seqlen\) = \(2, 5\)"),
        ({"seq_idx": torch.zeros(2, 5)}, "seq_idx has dtype float32, wanted int32 or int64"),
        ({"seq_idx": torch.zeros(2, 5).int(), "return_final_states": True}, "beside states, wanted one of them"),
        ({"initial_states": torch.zeros(2, 4, 4)}, r"wanted \(batch, dim, width - 1\) = \(2, 4, 3\)"),
        ({"return_final_states": True, "reverse": True}, "reverse is True beside"),
    ],
)
def test_states_that_do_not_fit(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        causal_conv1d_fn(torch.zeros(2, 4, 5), torch.zeros(4, 4), **change)


@pytest.mark.parametrize("width", [4, 5])
def test_mask_is_a_factor_before_and_after(width, kernels):
    x, weight, bias, mask = torch.randn(2, 6, 11), torch.randn(6, width), torch.randn(6), torch.rand(2, 11)
    tensors = [tensor.requires_grad_() for tensor in (x, weight, bias, mask)]
    out = causal_conv1d_fn(x, weight, bias, activation="silu", mask=mask)
    wanted = causal_conv1d_ref(x * mask[:, None], weight, bias, "silu") * mask[:, None]
    torch.testing.assert_close(out, wanted)
    for grad, want in zip(*(torch.autograd.grad(one.square().sum(), tensors) for one in (out, wanted))):
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 3\), wanted .* = \(2, 11\)"):
        causal_conv1d_fn(x, weight, bias, mask=mask[:, :3])
    with pytest.raises(ValueError, match="mask is given beside seq_idx or states"):
        causal_conv1d_fn(x, weight, bias, mask=mask, return_final_states=True)
