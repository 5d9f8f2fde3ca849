"""The mixer's inside as one operator, and the published functions on it, against the reference operators."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from causal_conv1d import backend, causal_conv1d_ref
from mamba_ssm.kernels import products
from mamba_ssm.kernels.registry import backends
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops.directions import Direction, directions_fn, directions_ref, has_masked
from mamba_ssm.ops.selective_scan_interface import (
    bimamba_inner_fn,
    bimamba_inner_ref,
    mamba_inner_fn,
    mamba_inner_fn_no_out_proj,
    mamba_inner_fn_no_out_proj_ref,
    mamba_inner_ref,
    selective_scan_ref,
)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def arguments(batch=2, seqlen=21, dim=24, dt_rank=3, dstate=5, width=4, ways=(False, True), optional=True):
    """xz (batch, seqlen, 2*dim) and a `Direction` for each of `ways`."""
    generator = torch.Generator().manual_seed(5)

    def rand(*shape, scale=1.0):
        return torch.randn(shape, generator=generator) * scale

    xz = rand(batch, seqlen, 2 * dim)
    directions = [
        Direction(
            rand(dim, width, scale=0.5),
            rand(dim) if optional else None,
            rand(dt_rank + 2 * dstate, dim, scale=dim**-0.5),
            rand(dim, dt_rank, scale=dt_rank**-0.5),
            rand(dim) - 1 if optional else None,
            -torch.rand(dim, dstate, generator=generator) * 4,
            rand(dim) if optional else None,
            way,
        )
        for way in ways
    ]
    return xz, directions


def reference(xz, directions, share):
    x, z = xz.transpose(1, 2).chunk(2, dim=1)
    total = 0
    for conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, reverse in directions:
        u = causal_conv1d_ref(x, conv_weight, conv_bias, "silu", reverse=reverse)
        rows = F.linear(u.transpose(1, 2), x_proj)
        dt, B, C = rows.split([dt_proj.shape[1], A.shape[1], A.shape[1]], dim=-1)
        delta, B, C = F.linear(dt, dt_proj).transpose(1, 2), B.transpose(1, 2), C.transpose(1, 2)
        total = total + selective_scan_ref(u, delta, A, B, C, D, z, dt_bias, True, reverse=reverse)
    return (total * share).transpose(1, 2)


def gradients(fn, xz, directions, share, dtype):
    """Output and gradients; xz in `dtype`, parameters as they are."""
    xz = xz.to(dtype).detach().requires_grad_()
    leaves = [
        [t if t is None else t.detach().requires_grad_() for t in direction[:-1]] + [direction.reverse]
        for direction in directions
    ]
    out = fn(xz, [Direction(*leaf) for leaf in leaves], share)
    wanted = [xz, *(tensor for leaf in leaves for tensor in leaf[:-1] if tensor is not None)]
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return out, torch.autograd.grad(out, wanted, dout)


def relative_error(got, want):
    assert got.shape == want.shape
    return ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30)).item()


def double(directions):
    return [
        Direction(*(t if not isinstance(t, torch.Tensor) else t.double() for t in direction))
        for direction in directions
    ]


def assert_as_reference(xz, directions, share, dtype):
    xz = xz.to(dtype)
    out, grads = gradients(directions_fn, xz, directions, share, dtype)
    want, want_grads = gradients(reference, xz, double(directions), share, torch.float64)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert relative_error(out, want) <= TOLERANCE[dtype]
    for grad, want_grad in zip(grads, want_grads):
        assert relative_error(grad, want_grad) <= 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("ways", [(False,), (True,), (False, True)])
@pytest.mark.parametrize("optional", [True, False])
def test_directions(ways, optional, kernels):
    xz, directions = arguments(ways=ways, optional=optional)
    assert_as_reference(xz, directions, 0.5, torch.float32)


@pytest.mark.skipif(backends.available("cpu") != "cpp", reason="no C++ kernels")
@pytest.mark.parametrize("ways", [(True,), (False, True)])
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize(("batch", "threads"), [(1, 1), (1, 2), (2, 3), (5, 2), (21, 2)])
def test_in_one_call_of_the_library(ways, optional, batch, threads, isa, monkeypatch):
    """Where own products are preferred, each way is one call: as much as in steps, what is kept for backward included,
    however images meet threads; log(-A) is as good as A."""
    module, before = importlib.import_module("mamba_ssm.kernels.cpp.directions"), torch.get_num_threads()
    called = []
    for name in ("forward_in_one", "backward_in_one"):
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, plain=plain: called.append(given) or plain(*given))
    xz, directions = arguments(batch, 70, 40, 3, 16, ways=ways, optional=optional)
    xz, dout = (
        torch.cat([xz, xz], -1)[..., : xz.shape[-1]],
        torch.randn(batch, 70, 40, generator=torch.Generator().manual_seed(2)),
    )
    logs = [each._replace(A=(-each.A).log()) for each in directions]

    def both(own: bool, given: list[Direction], log_decay: bool) -> tuple:
        monkeypatch.setattr(products, "PREFER_OWN", own)
        out, x_dbls, states = module.directions_forward(xz, given, 0.5, True, log_decay)
        grads = module.directions_backward(dout, xz, given, x_dbls, states, 0.5, log_decay)
        return out, x_dbls, states, [grad for grad in grads if grad is not None and grad.numel()]

    monkeypatch.setattr(products, "PREFER_OWN_NARROW", False)
    torch.set_num_threads(threads)
    try:
        found, wanted = both(True, directions, False), both(False, directions, False)
        found_of_logs, wanted_of_logs = both(True, logs, True), both(False, logs, True)
        assert len(called) == 4
        monkeypatch.setattr(products, "PREFER_OWN", True)
        out, _, states = module.directions_forward(xz, directions, 0.5, False, False)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(found_of_logs, wanted_of_logs, rtol=2e-4, atol=2e-4)
    assert torch.equal(out, found[0])
    assert not states[0].numel()


def test_directions_of_unequal_sizes(kernels):
    """Each direction may have a rank, states and taps of its own."""
    xz, (first,) = arguments(ways=(False,))
    _, (second,) = arguments(dt_rank=2, dstate=7, width=3, ways=(True,))
    assert_as_reference(xz, [first, second], 1.0, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype, kernels):
    assert_as_reference(*arguments(seqlen=40, dstate=16), 1.0, dtype)


@pytest.mark.skipif(backends.available("cpu") != "cpp", reason="no C++ kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("why", ["one call", "not multiplied"])
def test_sixteen_bits_are_rounded_once(dtype, why, monkeypatch):
    """Where a mixer is one call, or where the processor does not multiply them."""
    monkeypatch.setattr(products, "PREFER_OWN_NARROW", why == "one call")
    monkeypatch.setattr(products, "WIDENED", {dtype} if why == "not multiplied" else set())
    xz, directions = arguments(seqlen=40, dstate=16)
    xz = xz.to(dtype)
    out, (dxz, *_) = gradients(directions_fn, xz, directions, 1.0, dtype)
    wanted, (wanted_dxz, *_) = gradients(directions_fn, xz.float(), directions, 1.0, torch.float32)
    assert out.dtype == dxz.dtype == dtype
    assert torch.equal(out, wanted.to(dtype))
    assert relative_error(dxz, wanted_dxz) <= TOLERANCE[dtype]


def test_other_sizes(kernels):
    assert_as_reference(*arguments(3, 1, 5, 1, 2, 2), 1.0, torch.float32)
    assert_as_reference(*arguments(1, 70, 33, 4, 8, 3), 1.0, torch.float32)


def test_no_rank(kernels):
    """Step sizes of the bias alone."""
    xz, directions = arguments(dt_rank=1)
    without = [
        each._replace(x_proj_weight=each.x_proj_weight[1:], dt_proj_weight=each.dt_proj_weight[:, :0])
        for each in directions
    ]
    none = [each._replace(dt_proj_weight=0 * each.dt_proj_weight) for each in directions]
    (out, grads), (wanted, wanted_grads) = (
        gradients(directions_fn, xz, given, 1.0, torch.float32) for given in (without, none)
    )
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(grads[0], wanted_grads[0], rtol=1e-4, atol=1e-5)


def test_channel_slices(kernels):
    """xz may itself be a view, as of a wider projection."""
    xz, directions = arguments()
    wide = torch.cat([xz, xz], -1)[..., : xz.shape[-1]]
    torch.testing.assert_close(directions_fn(wide, directions), directions_fn(xz, directions))


def test_empty_batch(kernels):
    xz, directions = arguments()
    out, grads = gradients(directions_fn, xz[:0], directions, 1.0, torch.float32)
    assert out.shape == (0, 21, 24)
    assert all(not grad.any() for grad in grads)


def test_autocast(kernels):
    xz, directions = arguments()
    with torch.autocast("cpu", torch.bfloat16):
        out, grads = gradients(directions_fn, xz, directions, 1.0, torch.float32)
    want, want_grads = gradients(reference, xz, directions, 1.0, torch.float32)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, want) <= TOLERANCE[torch.bfloat16]
    for grad, want_grad in zip(grads, want_grads):
        assert grad.dtype == torch.float32
        assert relative_error(grad, want_grad) <= 2 * TOLERANCE[torch.bfloat16]


def test_compiles_without_graph_break():
    xz, directions = arguments()
    xz.requires_grad_()

    def step(xz):
        return directions_fn(xz * 2, directions, 0.5).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (got,), (want,) = torch.autograd.grad(compiled(xz), xz), torch.autograd.grad(step(xz), xz)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["torch", "cpp"])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(name, masked):
    with backend.use(name if backends.available("cpu") == name else "torch"):
        xz, directions = arguments(batch=1, seqlen=35, dim=4, dstate=2)
        parameters = [tensor for direction in directions for tensor in direction[:-1]]
        mask = some_mask(1, 35).requires_grad_() if masked else None
        inputs = [xz.requires_grad_(), mask, *(tensor.requires_grad_() for tensor in parameters)]
        args = (*inputs, [False, True], 0.5, True, False)
        torch.library.opcheck(torch.ops.mamba_ssm.directions.default, args)
        with torch.no_grad():
            out, *saved = torch.ops.mamba_ssm.directions(*args)
        xz, mask, *parameters = (None if tensor is None else tensor.detach() for tensor in inputs)
        args = (out, xz, mask, *saved, *parameters, [False, True], 0.5, False)
        torch.library.opcheck(torch.ops.mamba_ssm.directions_backward.default, args)


def some_mask(*shape):
    """A third of the tokens out, a third in, a third in part."""
    return torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(3)).float() / 2


def masked_gradients(fn, xz, mask, directions, dtype):
    leaves = [xz.to(dtype), mask.to(dtype if dtype == torch.float64 else torch.float32)]
    leaves += [tensor for each in directions for tensor in each[:-1] if tensor is not None]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    given, own = iter(leaves[2:]), []
    for each in directions:
        own.append(Direction(*(None if tensor is None else next(given) for tensor in each[:-1]), each.reverse))
    out = fn(leaves[0], own, 0.5, log_decay=True, mask=leaves[1])
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return out, *torch.autograd.grad(out, leaves, dout)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("ways", [(True,), (False, True)])
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize(("batch", "seqlen"), [(1, 40), (3, 9)])
def test_masked(dtype, ways, optional, batch, seqlen, kernels, monkeypatch):
    """Tokens multiplied before and after the convolution, and the gradients of what they are multiplied with."""
    monkeypatch.setattr(products, "PREFER_OWN_NARROW", True)
    xz, directions = arguments(batch, seqlen, ways=ways, optional=optional)
    logs, mask = [each._replace(A=(-each.A + 0.01).log()) for each in directions], some_mask(batch, seqlen)
    assert has_masked(xz.to(dtype), logs) == (kernels != "torch")
    found = masked_gradients(directions_fn, xz, mask, logs, dtype)
    wanted = masked_gradients(directions_ref, xz.to(dtype), mask, double(logs), torch.float64)
    assert found[0].dtype == dtype
    for got, want in zip(found, wanted):
        assert relative_error(got, want) <= 3 * TOLERANCE[dtype]


def test_masks_of_other_kinds():
    xz, directions = arguments()
    keep = some_mask(2, 21) > 0
    wanted = directions_ref(xz, directions, mask=keep.float())
    for mask in (keep, keep.long(), keep.half()):
        torch.testing.assert_close(directions_fn(xz, directions, mask=mask), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(directions_fn(xz, directions, mask=torch.ones(2, 21)), directions_fn(xz, directions))
    for wrong, said in ((keep[:1], "mask has shape"), ([1], "mask is a list"), (keep.to(torch.int8), "mask has dtype")):
        with pytest.raises((TypeError, ValueError), match=said):
            directions_fn(xz, directions, mask=wrong)


def test_masked_gradients_of_gradients():
    xz, directions = arguments(batch=1, seqlen=5, dim=3, dt_rank=1, dstate=2)
    xz, mask = xz.requires_grad_(), some_mask(1, 5).requires_grad_()
    first = torch.autograd.grad(directions_fn(xz, directions, mask=mask).square().sum(), mask, create_graph=True)[0]
    found = torch.autograd.grad(first.sum(), xz)[0]
    first = torch.autograd.grad(directions_ref(xz, directions, mask=mask).square().sum(), mask, create_graph=True)[0]
    torch.testing.assert_close(found, torch.autograd.grad(first.sum(), xz)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(backends.available("cpu") != "cpp", reason="no C++ kernels")
def test_backward_on_another_kernel_set_knows_the_mask():
    xz, directions = arguments()
    xz, mask = xz.requires_grad_(), some_mask(2, 21).requires_grad_()
    for forward, backward in (("cpp", "torch"), ("torch", "cpp")):
        with backend.use(forward):
            out = directions_fn(xz, directions, mask=mask)
        with backend.use(backward):
            found = torch.autograd.grad(out.sum(), (xz, mask))
        wanted = torch.autograd.grad(directions_ref(xz, directions, mask=mask).sum(), (xz, mask))
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["none", "v2"])
@pytest.mark.parametrize("looks", [{"token_mask"}, {"direction_gate"}, {"token_mask", "direction_gate"}], ids=sorted)
def test_masked_and_gated_mixers(kind, looks, monkeypatch):
    """As put together from the steps: outputs, and gradients of hidden states, mask, gates and parameters."""
    torch.manual_seed(0)
    monkeypatch.setattr(products, "PREFER_OWN_NARROW", True)
    mixer, hidden = Mamba(24, bimamba_type=kind), torch.randn(3, 21, 24, requires_grad=True)
    mask = some_mask(3, 21).requires_grad_()
    gates = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.25, 0.75]])[:, : len(mixer.directions)].clone().requires_grad_()
    given = {"token_mask": mask, "direction_gate": lambda _: gates}
    leaves = [hidden, *([mask] if "token_mask" in looks else []), *([gates] if "direction_gate" in looks else [])]
    leaves += mixer.parameters()
    outs, dout = [], torch.randn(3, 21, 24)
    for steps in (False, True):
        if steps:
            monkeypatch.setattr("mamba_ssm.ops.mixer.has_masked", lambda *_: False)
        out = mixer(hidden, **{name: given[name] for name in looks})
        outs.append((out, *torch.autograd.grad(out, leaves, dout)))
    for got, want in zip(*outs):
        assert relative_error(got, want) <= 3e-5


PUBLISHED = [
    (mamba_inner_fn, mamba_inner_ref, {"out"}),
    (bimamba_inner_fn, bimamba_inner_ref, {"out", "A_b"}),
    (mamba_inner_fn_no_out_proj, mamba_inner_fn_no_out_proj_ref, set()),
]


@pytest.mark.parametrize(("fn", "ref", "takes"), PUBLISHED, ids=[fn.__name__ for fn, *_ in PUBLISHED])
@pytest.mark.parametrize("channel_last", [True, False])
@pytest.mark.parametrize("given", ["x_proj", "B and C", "biases", "no softplus"])
def test_published_functions(fn, ref, takes, channel_last, given):
    torch.manual_seed(0)
    xz, (direction, other) = arguments(seqlen=9)
    dstate, rank = direction.A.shape[1], direction.dt_proj_weight.shape[1]
    xz = xz.transpose(1, 2) if channel_last else xz.transpose(1, 2).contiguous()
    tensors = {
        "xz": xz,
        "conv1d_weight": direction.conv_weight.unsqueeze(1),
        "conv1d_bias": direction.conv_bias,
        "x_proj_weight": direction.x_proj_weight[:rank] if given == "B and C" else direction.x_proj_weight,
        "delta_proj_weight": direction.dt_proj_weight,
        "A": direction.A,
        "D": direction.D,
        "delta_bias": direction.dt_bias,
    }
    if "out" in takes:
        tensors |= {"out_proj_weight": torch.randn(7, 24) / 5, "out_proj_bias": torch.randn(7)}
    if "A_b" in takes:
        tensors["A_b"] = other.A
    if given == "B and C":
        tensors |= {"B": torch.randn(2, dstate, 9), "C": torch.randn(24, dstate)}
    if given == "biases":
        tensors |= {"B_proj_bias": torch.randn(dstate), "C_proj_bias": torch.randn(dstate)}
    results = []
    for function in (fn, ref):
        inputs = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        out = function(**inputs, delta_softplus=given != "no softplus")
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        results.append((out, *torch.autograd.grad(out, list(inputs.values()), dout)))
    for got, want in zip(*results):
        assert relative_error(got, want) <= 5e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"xz": torch.zeros(2, 47, 9)}, r"xz has shape \(2, 47, 9\), wanted \(batch, 2\*dim, seqlen\)"),
        ({"conv1d_weight": torch.zeros(24, 4)}, r"conv1d_weight has shape \(24, 4\), wanted \(dim, 1, width\)"),
        ({"x_proj_weight": torch.zeros(12, 24)}, r"x_proj_weight has shape \(12, 24\), wanted .* with 13 rows"),
        ({"D": torch.zeros(3)}, r"D has shape \(3,\), wanted"),
    ],
)
def test_bad_input(change, message):
    good = {
        "xz": torch.zeros(2, 48, 9),
        "conv1d_weight": torch.zeros(24, 1, 4),
        "conv1d_bias": None,
        "x_proj_weight": torch.zeros(13, 24),
        "delta_proj_weight": torch.zeros(24, 3),
        "A": torch.zeros(24, 5),
        "D": torch.zeros(24),
    }
    with pytest.raises(ValueError, match=message):
        mamba_inner_fn_no_out_proj(**good | change)
