"""Token merging's operators against the definition, one token at a time."""

import pytest
import torch
from causal_conv1d import backend, native
from hypothesis import given, settings
from hypothesis import strategies as st
from mamba_ssm.kernels.registry import backends
from mamba_ssm.ops.merging import has_kernels, match_tokens_fn, merge_tokens_fn

pytestmark = pytest.mark.skipif(backends.available("cpu") != "cpp", reason="no C++ kernels")


def match_one(metric, fused, cls, moved, odd_first, raster, sort):
    """`match_tokens_fn` for one image: metric (tokens, channels), cls a list."""
    patches = [index for index in range(len(metric)) if index not in cls]
    unit = torch.nn.functional.normalize(metric.double(), dim=-1)
    a_tokens, b_tokens = patches[odd_first::2], patches[1 - odd_first :: 2]
    best = {a: max((float(unit[a] @ unit[b]), -b) for b in b_tokens) for a in a_tokens}
    ranking = sorted(a_tokens, key=lambda a: (-best[a][0], a))
    chosen, others = ranking[:fused], ranking[fused:]
    order = sorted(others + b_tokens) if raster else (sorted(others) if sort else others) + b_tokens
    if moved and set(moved) == {-1}:
        moved = [sum(token < at for token in order) + number for number, at in enumerate(cls)]
    for index, place in zip(cls, moved):
        order.insert(place, index)
    slot = [order.index(-best[t][1] if t in chosen else t) for t in range(len(metric))]
    count = [slot.count(place) for place in range(len(order))]
    return slot, [t not in chosen for t in range(len(metric))], count, moved


CASES = {
    "none": (9, [], [], False),
    "front": (9, [0], [0], True),
    "middle": (17, [8], [6], False),
    "own place": (16, [5], [-1], False),
    "first, own place": (16, [0], [-1], False),
    "both ends": (18, [0, 17], [0, 13], False),
    "smallest": (3, [1], [1], False),
    "more than a tile": (83, [82], [78], False),
    "twelve": (40, list(range(1, 37, 3)), list(range(0, 36, 3)), False),
    "twelve, own places": (40, list(range(1, 37, 3)), [-1] * 12, False),
    "neighbours, own places": (20, [0, 1, 2, 9, 10, 19], [-1] * 6, True),
}


@pytest.mark.parametrize("isa", native.ISA_LEVELS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("order", ["raster", "sorted", "ranked"])
@pytest.mark.parametrize("case", CASES)
def test_matching_is_the_definition(case, order, threads, isa):
    tokens, cls, moved, odd_first = CASES[case]
    fused, before = min(4, (tokens - len(cls)) // 2), torch.get_num_threads()
    options = odd_first, order == "raster", order == "sorted"
    torch.set_num_threads(threads)
    try:
        with native.isa(isa):
            for dtype, channels in ((torch.float32, 21), (torch.bfloat16, 32), (torch.float16, 7)):
                metric = torch.randn(3, tokens + 2, channels).to(dtype)[:, 1:-1]
                got = match_tokens_fn(
                    *(metric, fused, torch.tensor([cls], dtype=torch.long).view(1, -1), moved),
                    **dict(zip(("odd_first", "raster", "sort"), options)),
                )
                for image in range(3):
                    wanted = match_one(metric[image], fused, cls, list(moved), *options)
                    assert [part[image].tolist() for part in got] == [list(part) for part in wanted]
    finally:
        torch.set_num_threads(before)


def test_class_tokens_of_each_image_their_own():
    metric, cls = torch.randn(3, 17, 8), torch.tensor([[3], [0], [16]])
    got = match_tokens_fn(metric, 5, cls, [-1], raster=True)
    for image in range(3):
        wanted = match_one(metric[image], 5, cls[image].tolist(), [-1], False, True, True)
        assert [part[image].tolist() for part in got] == [list(part) for part in wanted]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_number_of_class_tokens_anywhere(data):
    classes, patches = data.draw(st.integers(0, 12)), data.draw(st.integers(2, 20))
    fused = data.draw(st.integers(1, patches // 2))

    def places(length):
        indices = st.sampled_from(range(length))
        return sorted(data.draw(st.lists(indices, min_size=classes, max_size=classes, unique=True))) if classes else []

    cls = [places(classes + patches) for _ in range(data.draw(st.sampled_from([1, 2])))]
    moved = data.draw(st.sampled_from([[-1] * classes, places(classes + patches - fused)]))
    odd_first, raster, sort = (data.draw(st.booleans()) for _ in range(3))
    metric = torch.randn(2, classes + patches, 8)
    got = match_tokens_fn(
        *(metric, fused, torch.tensor(cls, dtype=torch.long).view(len(cls), -1), moved),
        **dict(odd_first=odd_first, raster=raster, sort=sort),
    )
    for image in range(2):
        wanted = match_one(metric[image], fused, cls[image % len(cls)], list(moved), odd_first, raster, sort)
        assert [part[image].tolist() for part in got] == [list(part) for part in wanted]


def test_equal_tokens_match_the_first_and_nan_some():
    slot, kept, count, _ = match_tokens_fn(torch.ones(1, 8, 4), 3, torch.empty(1, 0, dtype=torch.long), [])
    assert kept.tolist() == [[False, True, False, True, False, True, True, True]]
    assert slot.tolist() == [[1, 1, 1, 2, 1, 3, 0, 4]]
    slot, kept, count, _ = match_tokens_fn(torch.full((1, 8, 4), torch.nan), 3, torch.tensor([[0]]), [0])
    assert count.sum() == 8
    assert 0 <= slot.min() <= slot.max() == 4


@pytest.mark.parametrize("isa", native.ISA_LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_means_and_gradients(dtype, isa):
    x = torch.randn(2, 12, 150).to(dtype)[..., 3:140].requires_grad_()
    slot = torch.tensor([[0, 1, 1, 2, 3, 3, 3, 4, 4, 0, 5, 1], [5, 4, 3, 2, 1, 0, 5, 4, 3, 2, 1, 0]])
    count = torch.stack([row.bincount(minlength=6) for row in slot])
    with native.isa(isa):
        out = merge_tokens_fn(x, slot, count)
    wide = x.detach().double().requires_grad_()
    wanted = torch.stack([torch.stack([wide[b, slot[b] == g].mean(0) for g in range(6)]) for b in range(2)])
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance)
    assert torch.equal(out[0, 2], x[0, 3])
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, x, dout)[0], torch.autograd.grad(wanted, wide, dout.double())[0]
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=tolerance, atol=tolerance)


def test_threads_and_neighbours_change_nothing():
    x, cls, before = torch.randn(5, 65, 40), torch.tensor([[32]]), torch.get_num_threads()
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        slot, _, count, _ = match_tokens_fn(x, 9, cls, [28])
        found.append((slot, merge_tokens_fn(x, slot, count)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))
    alone, *_ = match_tokens_fn(x[3:4], 9, cls, [28])
    assert torch.equal(alone, found[0][0][3:4])


def test_what_is_refused():
    x, none = torch.randn(2, 9, 4), torch.empty(1, 0, dtype=torch.long)
    with pytest.raises(ValueError, match="fused is 5; wanted 1 to 4"):
        match_tokens_fn(x, 5, none, [])
    with pytest.raises(ValueError, match="moved has 1 indices"):
        match_tokens_fn(x, 2, none, [1])
    with pytest.raises(ValueError, match="wanted rising indices from 0 to 6, or one -1"):
        match_tokens_fn(x, 2, torch.tensor([[0]]), [7])
    with pytest.raises(ValueError, match="wanted rising indices"):
        match_tokens_fn(x, 2, torch.tensor([[0, 8]]), [-1, 3])
    for cls in ([[9]], [[-1]], [[4], [12]]):
        with pytest.raises(IndexError, match="wanted such from 0 to 8"):
            match_tokens_fn(x, 2, torch.tensor(cls), [0])
    with pytest.raises(IndexError, match="rising"):
        match_tokens_fn(x, 2, torch.tensor([[3, 3]]), [0, 1])
    slot, count = torch.zeros(2, 9, dtype=torch.long), torch.full((2, 1), 9)
    for place in (1, -1):
        slot[1, 4] = place
        with pytest.raises(IndexError, match="wanted 0 to 0"):
            merge_tokens_fn(x, slot, count)
    with pytest.raises(IndexError, match="or count no size"):
        merge_tokens_fn(x, slot.abs(), count * 0)
    with pytest.raises(TypeError, match="slot has dtype int32, wanted int64"):
        merge_tokens_fn(x, slot.int(), count)
    with pytest.raises(ValueError, match=r"slot has shape \(2, 8\), wanted \(batch, tokens\) = \(2, 9\)"):
        merge_tokens_fn(x, slot[:, :8], count)
    for change in (x[0], x.long(), "x"):
        with pytest.raises((ValueError, TypeError), match="metric (has|is)"):
            match_tokens_fn(change, 2, none, [])


@pytest.mark.parametrize("case", CASES)
def test_references_are_the_operators(case):
    """Without kernels, as for float64, they run in their place."""
    tokens, cls, moved, odd_first = CASES[case]
    cls, fused = torch.tensor([cls], dtype=torch.long).view(1, -1), min(4, (tokens - len(cls)) // 2)
    x = torch.randn(2, tokens, 9)
    for raster, sort in ((True, True), (False, True), (False, False)):
        options = {"odd_first": odd_first, "raster": raster, "sort": sort}
        found = match_tokens_fn(x, fused, cls, moved, **options)
        wanted = match_tokens_fn(x.double(), fused, cls, moved, **options)
        assert all(torch.equal(one, other) for one, other in zip(found, wanted))
    slot, _, count, _ = found
    torch.testing.assert_close(merge_tokens_fn(x, slot, count).double(), merge_tokens_fn(x.double(), slot, count))
    for bad in (slot + 1, slot - 1):
        with pytest.raises(IndexError, match="no place of the merged sequence"):
            merge_tokens_fn(x.double(), bad, count)


def test_where_there_are_kernels():
    x = torch.randn(1, 4, 4)
    assert has_kernels(x)
    assert not has_kernels(x.double())
    with backend.use("torch"):
        assert not has_kernels(x)


def test_opcheck():
    x, cls = torch.randn(2, 9, 4, requires_grad=True), torch.tensor([[4]])
    args = (x.detach(), 3, cls, [-1], False, True, True)
    torch.library.opcheck(torch.ops.mamba_ssm.match_tokens.default, args)
    slot, _, count, _ = match_tokens_fn(*args[:4], raster=True)
    torch.library.opcheck(torch.ops.mamba_ssm.merge_tokens.default, (x, slot, count))
