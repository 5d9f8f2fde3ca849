"""Class tokens, any number of them at any places: taken out and put back, by rule or by index, shared or per image."""

from __future__ import annotations

import pytest
import torch
from causal_conv1d import backend
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusion.token_merging import merge_tokens
from fusion.token_state import PLACES, ClassTokens, TokenState, join_cls, mean_of_cls, split_cls

MOST = 12


@st.composite
def placed(draw: st.DrawFn, least_patches: int = 0) -> tuple[int, ClassTokens]:
    """A number of patch tokens, and up to `MOST` class tokens among them: for three images, or for each its own."""
    count, patches = draw(st.integers(0, MOST)), draw(st.integers(least_patches, 20))
    places = st.lists(st.sampled_from(range(count + patches)), min_size=count, max_size=count, unique=True).map(sorted)
    if count == 0:
        return patches, ClassTokens.at(draw(st.sampled_from([(), torch.empty(3, 0, dtype=torch.long)])))
    if draw(st.booleans()):
        return patches, ClassTokens.at(tuple(draw(places)))
    return patches, ClassTokens.at(torch.tensor([draw(places) for _ in range(3)]))


def indices(cls: ClassTokens, image: int) -> list[int]:
    return cls.index[image].tolist() if isinstance(cls.index, Tensor) else list(cls.index)


@settings(max_examples=200, deadline=None)
@given(placed())
def test_split_and_join_are_inverse(case: tuple[int, ClassTokens]) -> None:
    patches, cls = case
    x = torch.randn(3, patches + cls.count, 2, requires_grad=True)
    tokens, rest = split_cls(x, cls)
    for image in range(3):
        at = indices(cls, image)
        assert torch.equal(tokens[image], x[image, at])
        assert torch.equal(rest[image], x[image, [i for i in range(x.shape[1]) if i not in at]])
    joined = join_cls(tokens, rest, cls)
    assert torch.equal(joined, x)
    weight = torch.randn_like(x)
    assert torch.equal(torch.autograd.grad((joined * weight).sum(), x)[0], weight)
    if cls.count:
        torch.testing.assert_close(mean_of_cls(x, cls), tokens.mean(1))


@pytest.mark.parametrize("place", PLACES)
def test_places_are_one_rule_for_numbers_and_for_each_image(place: str) -> None:
    for count in range(MOST + 1):
        cls = ClassTokens(count, place)
        for patches in range(20):
            index = cls.places(patches)
            assert len(index) == count
            assert all(0 <= a < b for a, b in zip(index, (*index[1:], patches + count)))
            each = cls.places(torch.tensor([patches, 19 - patches]))
            if count:
                assert each.tolist() == [list(index), list(cls.places(19 - patches))]


def test_what_the_rules_say() -> None:
    assert ClassTokens(1, "middle").places(64) == ClassTokens(1, "spread").places(64) == (32,)
    assert ClassTokens(2, "ends").places(64) == (0, 65)
    assert ClassTokens(3, "ends").places(5) == (0, 1, 7)
    assert ClassTokens(2, "front").places(5) == (0, 1)
    assert ClassTokens(2, "back").places(5) == (5, 6)
    # MambaReg's registers, arXiv:2405.14858
    assert ClassTokens(12, "spread").places(196) == tuple(range(15, 192, 16))
    assert ClassTokens(16, "spread").places(196) == tuple(range(11, 192, 12))
    assert ClassTokens(4, "spread").places(3) == (0, 1, 2, 3)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@settings(max_examples=100, deadline=None)
@given(case=placed(least_patches=2), order=st.sampled_from(["published", "raster"]))
def test_merging_leaves_class_tokens_alone(kernels: str, case: tuple[int, ClassTokens], order: str) -> None:
    """Whatever their number and places, with C++ and without, class tokens come out as they went in, in their order."""
    patches, cls = case
    state = TokenState(torch.randn(3, patches + cls.count, 4), torch.randn(3, patches + cls.count, 4), cls)
    with backend.use(kernels):
        merged = merge_tokens(state, 3, order)
    assert merged.num_patches == patches - min(3, patches // 2)
    for before, after in ((state.hidden, merged.hidden), (state.residual, merged.residual)):
        assert torch.equal(split_cls(after, merged.cls)[0], split_cls(before, cls)[0])


@settings(max_examples=60, deadline=None)
@given(case=placed(least_patches=2), order=st.sampled_from(["published", "raster"]))
def test_kernels_and_torch_match_alike(case: tuple[int, ClassTokens], order: str) -> None:
    patches, cls = case
    hidden = torch.randn(3, patches + cls.count, 4)
    found = []
    for kernels in ("auto", "torch"):
        with backend.use(kernels):
            found.append(merge_tokens(TokenState(hidden, hidden, cls), 4, order))
    torch.testing.assert_close(found[0].hidden, found[1].hidden)
    assert [indices(found[0].cls, image) for image in range(3)] == [indices(found[1].cls, image) for image in range(3)]


@pytest.mark.parametrize("order", ["published", "raster"])
def test_registers_go_back_by_their_rule(order: str) -> None:
    cls = ClassTokens(4, "spread").among(64)
    merged = merge_tokens(TokenState(torch.randn(2, 68, 8), torch.randn(2, 68, 8), cls), 9, order)
    assert merged.cls.index == ClassTokens(4, "spread").places(55) == (11, 23, 35, 47)
