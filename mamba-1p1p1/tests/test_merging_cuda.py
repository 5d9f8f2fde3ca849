"""Token merging on the CUDA kernels, emulated: the matching is the definition's, means and gradients are float64's."""

import pytest
import torch
from causal_conv1d import _nvrtc, backend
from mamba_ssm.kernels import cuda as cuda_kernels
from mamba_ssm.kernels import registry
from mamba_ssm.ops.merging import match_tokens_fn, match_tokens_ref, merge_tokens_fn, merge_tokens_ref


@pytest.fixture
def device(monkeypatch, emulation):
    """Puts an emulated device and the CUDA kernel set in the place of every device; call it to set the device up."""

    def use(order=0):
        device = emulation.EmulatedDevice(1, order)
        monkeypatch.setattr(_nvrtc, "device", lambda index: device)
        return device

    monkeypatch.setattr(registry.backends, "_loaded", {("cpu", None): cuda_kernels})
    torch.manual_seed(0)
    use()
    return use


# tokens, class tokens, where they go, whether set a begins at the second patch token
CASES = {
    "none": (9, [], [], False),
    "front": (9, [0], [0], True),
    "middle": (17, [8], [6], False),
    "own place": (16, [5], [-1], False),
    "smallest": (3, [1], [1], False),
    "more than a tile": (83, [82], [78], False),
    "more than a block has threads": (297, [148], [-1], False),
    "twelve, own places": (40, list(range(1, 37, 3)), [-1] * 12, False),
    "neighbours, own places": (20, [0, 1, 2, 9, 10, 19], [-1] * 6, True),
}


@pytest.mark.parametrize("order", ["raster", "sorted", "ranked"])
@pytest.mark.parametrize("case", CASES)
def test_emulated_matching_is_the_definition(case, order, device):
    used, (tokens, cls, moved, odd_first) = device(), CASES[case]
    fused, options = min(4, (tokens - len(cls)) // 2), (odd_first, order == "raster", order == "sorted")
    if tokens > 100:
        fused = tokens // 2 - 1
    for dtype, channels in ((torch.float32, 21), (torch.bfloat16, 70)):
        metric = torch.randn(2, tokens + 2, channels).to(dtype)[:, 1:-1]
        own = torch.tensor([cls], dtype=torch.long).view(1, -1)
        got = match_tokens_fn(metric, fused, own, moved, **dict(zip(("odd_first", "raster", "sort"), options)))
        for one, other in zip(got, match_tokens_ref(metric.double(), fused, own, moved, *options)):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
    assert [name for name, _ in used.launched] == ["match_pairs", "match_arrange"] * 2


def test_class_tokens_of_each_image_their_own(device):
    metric, cls = torch.randn(3, 17, 8), torch.tensor([[3], [0], [16]])
    for one, other in zip(
        match_tokens_fn(metric, 5, cls, [-1], raster=True),
        match_tokens_ref(metric.double(), 5, cls, [-1], False, True, True),
    ):
        assert torch.equal(one, other)


def test_ties_go_to_the_lower_index_and_numbers_that_are_none_leave_a_matching(device):
    none = torch.empty(1, 0, dtype=torch.long)
    slot, kept, count, _ = match_tokens_fn(torch.ones(1, 8, 4), 3, none, [])
    assert kept.tolist() == [[False, True, False, True, False, True, True, True]]
    assert count.tolist() == [[1, 4, 1, 1, 1]]
    slot, kept, count, _ = match_tokens_fn(torch.full((1, 8, 4), torch.nan), 3, torch.tensor([[0]]), [0])
    assert count.sum() == 8
    assert 0 <= slot.min() <= slot.max() < 5
    assert kept.sum() == 5


def test_what_is_outside_the_sequence_is_passed_over(device):
    """The host is not told; nothing is written where it does not belong."""
    slot, _, count, _ = match_tokens_fn(torch.randn(2, 9, 4), 2, torch.tensor([[2**40]]), [-1])
    assert slot.shape == (2, 9)
    assert count.shape == (2, 7)
    x, slot = torch.randn(1, 4, 8, requires_grad=True), torch.tensor([[0, 1, -1, 2**40]])
    out = merge_tokens_fn(x, slot, torch.ones(1, 2, dtype=torch.long))
    torch.testing.assert_close(out, x[:, :2])
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad.tolist() == [[[1.0] * 8] * 2 + [[0.0] * 8] * 2]


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(
    ("channels", "dtype", "tolerance"),
    [(300, torch.float32, 1e-6), (21, torch.bfloat16, 8e-3)],
)
def test_emulated_merging(channels, dtype, tolerance, order, device):
    used = device(order)
    x = torch.randn(2, 37, 2 * channels).to(dtype)[..., :channels].requires_grad_()
    slot = torch.cat([torch.arange(9), torch.tensor([3, 3, 3, 8]), torch.arange(24) % 9]).expand(2, -1)
    slot = torch.stack([slot[0], slot[1].flip(0)])
    count = torch.nn.functional.one_hot(slot, 10).sum(1).clamp(min=1)
    out = merge_tokens_fn(x, slot, count)
    dout = torch.randn(2, 10, channels).to(dtype)
    (grad,) = torch.autograd.grad(out, x, dout)
    wide = x.detach().double().requires_grad_()
    wanted = merge_tokens_ref(wide, slot, count)
    (wanted_grad,) = torch.autograd.grad(wanted, wide, dout.double())
    for one, other in ((out, wanted), (grad, wanted_grad)):
        assert one.dtype == dtype
        torch.testing.assert_close(one.detach().double(), other.detach(), rtol=tolerance, atol=tolerance)
    alone = merge_tokens_fn(x, torch.arange(37).expand(2, -1), torch.ones(2, 37, dtype=torch.long))
    assert torch.equal(alone, x)
    assert [name for name, _ in used.launched] == ["merge_forward", "merge_backward", "merge_forward"]


def test_merging_adds_in_one_order(device):
    """Bit for bit, however many tokens a group has, and whatever order threads run in."""
    x, slot = torch.randn(1, 40, 8) * 10.0 ** torch.randint(-6, 7, (1, 40, 1)), torch.zeros(1, 40, dtype=torch.long)
    count, results = torch.tensor([[40]]), []
    for order in (0, 1, 2):
        device(order)
        results.append(merge_tokens_fn(x, slot, count))
    in_order = torch.zeros(8)
    for row in x[0]:
        in_order += row
    for result in results:
        assert torch.equal(result[0, 0], in_order / 40)


@pytest.mark.parametrize("why", ["refused", "many"])
def test_what_is_refused_runs_on_the_references(why, device, monkeypatch):
    monkeypatch.setattr(backend, "_told", set())

    def refuse(*job):
        raise _nvrtc.KernelError("refused")

    classes = 2
    if why == "refused":
        monkeypatch.setattr(device(), "kernel", refuse)
    else:
        classes = 129
    metric, cls = torch.randn(1, classes + 8, 8, requires_grad=True), torch.arange(classes)[None]
    with pytest.warns(RuntimeWarning, match="no CUDA kernels .*(refused|128 class tokens)"):
        got = match_tokens_fn(metric, 2, cls, list(range(classes)))
    for one, other in zip(got, match_tokens_ref(metric, 2, cls, list(range(classes)), False, False, True)):
        assert torch.equal(one, other)
    out = merge_tokens_fn(metric, got[0], got[2])
    torch.testing.assert_close(out, merge_tokens_ref(metric, got[0], got[2]))
    torch.autograd.grad(out.sum(), metric)


def test_operators_meet_torch_library(device):
    x, cls = torch.randn(2, 11, 8, requires_grad=True), torch.tensor([[5]])
    slot, _, count, _ = match_tokens_fn(x, 3, cls, [4])
    torch.library.opcheck(torch.ops.mamba_ssm.match_tokens.default, (x.detach(), 3, cls, [4], False, False, True))
    torch.library.opcheck(torch.ops.mamba_ssm.merge_tokens.default, (x, slot, count))
    dout = torch.randn(2, 8, 8)
    torch.library.opcheck(torch.ops.mamba_ssm.merge_tokens_backward.default, (dout, slot, count))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype):
    torch.manual_seed(0)
    x, cls = torch.randn(4, 197, 192).to(dtype), torch.tensor([[98]])
    got = match_tokens_fn(x.cuda(), 40, cls.cuda(), [-1], raster=True)
    for one, other in zip(got, match_tokens_ref(x.double(), 40, cls, [-1], False, True, True)):
        assert torch.equal(one.cpu(), other)
    leaf, slot, count = x.cuda().requires_grad_(), got[0], got[2]
    out, wide = merge_tokens_fn(leaf, slot, count), x.double().requires_grad_()
    wanted = merge_tokens_ref(wide, slot.cpu(), count.cpu())
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(out.cpu().double(), wanted, rtol=tolerance, atol=tolerance)
    dout = torch.randn_like(out)
    (grad,), (wanted_grad,) = (
        torch.autograd.grad(one, to, given)
        for one, to, given in ((out, leaf, dout), (wanted, wide, dout.cpu().double()))
    )
    torch.testing.assert_close(grad.cpu().double(), wanted_grad, rtol=tolerance, atol=tolerance)
