"""Token merging: published numbers, and what must hold for every order and every kind of class token."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator

import pytest
import timm
import torch
from causal_conv1d import backend
from mamba_ssm.ops.merging import _sums_in_order
from torch import Tensor

import fusion
import models_mamba
from fusion import Methods
from fusion.token_merging import (
    Matching,
    MergingSettings,
    TokenMerging,
    _sums,
    bipartite_soft_matching,
    every_kth,
    merge,
    merge_sizes,
    merge_tokens,
    random_sources,
    token_schedule,
    unmerge,
)
from fusion.token_state import ClassTokens, TokenState, split_cls
from tests.golden_rules import images, load, relative_error

# models this small only lose time in handing work to threads
pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = dict(img_size=32, patch_size=4, embed_dim=16, depth=4, num_classes=5, drop_path_rate=0.0)
CLASS_TOKENS = {
    "middle": dict(),
    "head": dict(use_middle_cls_token=False),
    "double": dict(use_middle_cls_token=False, use_double_cls_token=True),
    "none": dict(use_middle_cls_token=False, if_cls_token=False),
    "paired": dict(use_middle_cls_token=False, if_bidirectional=True),
}
ORDERS = ("published", "raster")


def reference(metric: Tensor, r: int, class_token: bool, order: str) -> list[list[int]]:
    """The groups of one sequence (L, C), in the order of their places, by the definition: one token at a time."""
    length = len(metric)
    unit = metric / metric.norm(dim=-1, keepdim=True)
    a_tokens, b_tokens = range(0, length, 2), range(1, length, 2)
    r = max(0, min(r, (length - class_token) // 2))
    movable = [a for a in a_tokens if a > 0 or not class_token] if r else []
    best = {a: max((float(unit[a] @ unit[b]), -b) for b in b_tokens) for a in movable}
    chosen = sorted(best, key=lambda a: -best[a][0])[:r]
    groups = {token: [token] for token in range(length) if token not in chosen}
    for a in chosen:
        groups[-best[a][1]].append(a)
    places = sorted(groups) if order == "raster" or not chosen else sorted(groups, key=lambda token: (token % 2, token))
    return [sorted(groups[token]) for token in places]


def groups_of(matching: Matching, image: int) -> list[list[int]]:
    """The members of each group of a matching."""
    return [
        [int(token) for token in (matching.slot[image] == place).nonzero()] for place in range(matching.count.shape[1])
    ]


@pytest.fixture(params=["auto", "torch"])
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """The kernels at hand, and none."""
    with backend.use(request.param):
        yield


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("case", ["bipartite_cls", "bipartite_nocls", "bipartite_cap"])
def test_published_matching(case: str) -> None:
    config, arrays = load(case)
    metric, x = images(config["shape"], config["metric_seed"]), images(config["shape"], config["x_seed"])
    matching = bipartite_soft_matching(metric, config["r"], config["class_token"])
    merged = merge(x, matching)
    assert merged.shape == arrays["merged"].shape
    assert relative_error(merged, arrays["merged"]) < 1e-6
    assert relative_error(unmerge(merged, matching), arrays["unmerged"]) < 1e-6


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize(("length", "r"), [(17, 5), (16, 5), (16, 100), (2, 1), (3, 1), (9, 0), (9, -3), (1, 4)])
def test_matching_is_the_definition(length: int, r: int, class_token: bool, order: str) -> None:
    metric, x = images((3, length, 8), 1), images((3, length, 4), 2)
    matching = bipartite_soft_matching(metric, r, class_token, order, sort=True)
    merged = merge(x, matching)
    for image in range(3):
        wanted = reference(metric[image], r, class_token, order)
        assert groups_of(matching, image) == wanted
        torch.testing.assert_close(merged[image], torch.stack([x[image, group].mean(0) for group in wanted]))
        assert matching.count[image].tolist() == [len(group) for group in wanted]
        assert int(matching.kept[image].sum()) == len(wanted)


def test_sums_in_order_are_the_sums() -> None:
    """The form that CUDA takes, whose sums have one order: in value and gradient, groups of many among them."""
    metric, x = images((3, 40, 8), 1), images((3, 40, 4), 2)
    metric[:, ::2] = metric[:, :1]  # all choose the same
    matching = bipartite_soft_matching(metric, 18, False, "published", sort=True)
    assert matching.count.max() > 3
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outs = [_sums(leaves[0], matching), _sums_in_order(leaves[1], matching.slot, matching.count.shape[1])]
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-6, atol=1e-7)
    for out in outs:
        out.square().sum().backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("kernels")
def test_unsorted_survivors_come_most_similar_first() -> None:
    metric = images((2, 16, 8), 3)
    unit = metric / metric.norm(dim=-1, keepdim=True)
    best = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).amax(-1)
    matching = bipartite_soft_matching(metric, 3, sort=False)
    for image in range(2):
        survivors = [group[0] for group in groups_of(matching, image)[:5]]
        assert survivors == [2 * int(a) for a in best[image].argsort(descending=True)[3:]]
    with pytest.raises(ValueError, match="sort is False"):
        bipartite_soft_matching(metric, 3, order="raster", sort=False)
    with pytest.raises(ValueError, match="wanted one of published, raster"):
        bipartite_soft_matching(metric, 3, order="spiral")


@pytest.mark.parametrize("order", ORDERS)
def test_gradient_is_the_mean_and_not_the_choice(order: str) -> None:
    x = images((2, 9, 4), 5).double().requires_grad_()
    matching = bipartite_soft_matching(x, 3, class_token=True, order=order)
    weight = images((2, 6, 4), 6).double()
    (merge(x, matching) * weight).sum().backward()
    shares = unmerge(weight / matching.count.unsqueeze(-1), matching)
    torch.testing.assert_close(x.grad, shares)


@pytest.mark.usefixtures("kernels")
def test_ties_zeros_and_infinities_still_give_a_matching() -> None:
    for metric in (torch.zeros(2, 9, 4), torch.ones(2, 9, 4), torch.full((2, 9, 4), torch.nan)):
        matching = bipartite_soft_matching(metric, 3, class_token=True)
        assert matching.count.sum(1).tolist() == [9, 9]
        assert int(matching.slot.max()) == 5
        assert matching.slot[:, 0].tolist() == [0, 0]


@pytest.mark.usefixtures("kernels")
def test_half_precision_sums_in_float32() -> None:
    """Bfloat16 would lose the 257th summand of equal size."""
    x = torch.full((1, 600, 1), 3.0, dtype=torch.bfloat16)
    slot = torch.zeros(1, 600, dtype=torch.long)
    matching = Matching(slot, slot == 0, torch.tensor([[600]]))
    merged = merge(x, matching)
    assert merged.dtype == torch.bfloat16
    assert float(merged) == 3.0


STATES = {
    "head": (0,),
    "middle": (8,),
    "off the middle": (5,),
    "last": (16,),
    "double": (0, 16),
    "none": (),
    "per image": torch.tensor([[3], [0], [16]]),
    "two per image": torch.tensor([[0, 4], [2, 16], [7, 8]]),
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", STATES)
def test_class_tokens_pass_untouched(kind: str, order: str) -> None:
    cls_index = STATES[kind]
    state = TokenState(images((3, 17, 8), 7), images((3, 17, 8), 8), ClassTokens.at(cls_index), grid=(4, 4))
    classes, patches = split_cls(state.hidden, cls_index)
    groups = torch.arange(patches.shape[1]).expand(3, -1)
    merged = merge_tokens(state.replace(groups=groups), 4, order)
    assert merged.num_tokens == 13
    assert merged.grid is merged.positions is None
    new_classes, new_patches = split_cls(merged.hidden, merged.cls)
    assert torch.equal(new_classes, classes)
    assert torch.equal(split_cls(merged.residual, merged.cls)[0], split_cls(state.residual, cls_index)[0])

    # hidden states choose for the residual as well, and the record of groups says the same
    order_first = int(kind == "head")
    for image in range(3):
        a_first = [split_cls(t, cls_index)[1][image] for t in (state.hidden, state.residual)]
        padded = [torch.cat([x[:1] * 0, x]) if order_first else x for x in a_first]
        wanted = reference(padded[0] + 1e-9, 4, bool(order_first), order)[order_first:]
        wanted = [[token - order_first for token in group] for group in wanted]
        got = [[int(p) for p in (merged.groups[image] == place).nonzero()] for place in range(len(wanted))]
        assert got == wanted
        for before, after in zip(a_first, (merged.hidden, merged.residual)):
            means = torch.stack([before[group].mean(0) for group in wanted])
            torch.testing.assert_close(split_cls(after, merged.cls)[1][image], means)
    assert new_patches.shape[1] == patches.shape[1] - 4


@pytest.mark.usefixtures("kernels")
def test_where_class_tokens_go() -> None:
    hidden = images((3, 17, 8), 7)

    def place(cls_index: tuple[int, ...], order: str) -> tuple[int, ...] | Tensor:
        return merge_tokens(TokenState(hidden, hidden, ClassTokens.at(cls_index)), 4, order).cls.index

    assert place((8,), "published") == (6,)
    assert place((5,), "published") == (6,)
    assert place((0,), "published") == place((0,), "raster") == (0,)
    assert place((16,), "published") == place((16,), "raster") == (12,)
    assert place((0, 16), "published") == place((0, 16), "raster") == (0, 12)
    assert place((), "raster") == ()
    # its own place: as many patch tokens in front as are left of those that were
    patches = split_cls(hidden, (8,))[1]
    for image, where in enumerate(place((8,), "raster")):
        groups = reference(patches[image], 4, False, "raster")
        kept = [next(token for token in group if token % 2 or len(group) == 1) for group in groups]
        assert int(where) == sum(token < 8 for token in kept)


def test_masked_sequences_are_refused() -> None:
    hidden = images((2, 17, 8), 7)
    with pytest.raises(ValueError, match="without a token mask"):
        merge_tokens(TokenState(hidden, hidden, ClassTokens.at((0,)), token_mask=torch.ones(2, 17)), 4)


@pytest.mark.parametrize("order", ORDERS)
def test_images_do_not_see_each_other(order: str) -> None:
    model = timm.create_model("vim_nano_patch4_32", **SMALL, fusion_strategy="all", fusion_token=7, fusion_order=order)
    model.eval()
    x, permutation = images((4, 3, 32, 32), 9), torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        together = model(x)
        torch.testing.assert_close(model(x[permutation]), together[permutation], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model(x[1:2]), together[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", CLASS_TOKENS)
def test_models_train_and_get_shorter(kind: str, order: str) -> None:
    keywords = SMALL | CLASS_TOKENS[kind] | dict(fusion_strategy="all", fusion_token=9, fusion_order=order, depth=2)
    model = timm.create_model("vim_nano_patch4_32", **keywords).train()
    lengths: list[int] = []
    model.encode(model.embed(images((2, 3, 32, 32), 1)), lambda index, state: lengths.append(state.num_tokens))
    sites = model.num_sites
    assert lengths == [64 + model.num_prefix_tokens - 9 * (index + 1) for index in range(sites)]
    assert list(model.site_methods[0].schedule) == lengths
    model(images((2, 3, 32, 32), 1)).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("option", ["if_random_cls_token_position", "if_random_token_rank"])
@pytest.mark.parametrize("kind", ["middle", "head", "double"])
def test_random_orders_merge_too(kind: str, option: str) -> None:
    keywords = SMALL | CLASS_TOKENS[kind] | dict(fusion_strategy="all", fusion_token=9, fusion_order="raster")
    model = timm.create_model("vim_nano_patch4_32", **keywords, flip_img_sequences_ratio=0.5).train()
    for _ in range(4):
        assert model(images((2, 3, 32, 32), 1), **{option: True}).isfinite().all()


def test_a_trained_model_merges_without_training() -> None:
    """Merging owns no parameters, and merging nothing changes nothing."""
    plain = timm.create_model("vim_nano_patch4_32", **SMALL).eval()
    idle = timm.create_model("vim_nano_patch4_32", **SMALL, fusion_strategy="all", fusion_token=0).eval()
    merging = timm.create_model("vim_nano_patch4_32", **SMALL, fusion_strategy="upper", fusion_layer=0, fusion_token=8)
    for model in (idle, merging):
        model.load_state_dict(plain.state_dict(), strict=True)
    x = images((2, 3, 32, 32), 4)
    with torch.no_grad():
        assert torch.equal(idle(x), plain(x))
        assert not torch.equal(merging.eval()(x), plain(x))


@pytest.mark.parametrize("order", ORDERS)
def test_equal_tokens_lose_nothing(order: str) -> None:
    """Where every patch is alike, means are what they were, so only the length of the sequence can tell."""
    state = TokenState(torch.ones(2, 17, 8), torch.full((2, 17, 8), 2.0), ClassTokens.at((8,)))
    merged = merge_tokens(state, 100, order)
    assert merged.num_tokens == 9
    assert torch.equal(merged.hidden, torch.ones(2, 9, 8))
    assert torch.equal(merged.residual, torch.full((2, 9, 8), 2.0))


def test_schedule_stops_at_one_token() -> None:
    lengths = token_schedule(MergingSettings("all", token=100), 196, 1, 24)
    assert lengths[:8] == (99, 50, 26, 14, 8, 5, 3, 2)
    assert set(lengths[7:]) == {2}
    model = timm.create_model("vim_nano_patch4_32", **(SMALL | dict(depth=8)), fusion_strategy="all", fusion_token=100)
    assert model.eval()(images((1, 3, 32, 32), 1)).shape == (1, 5)
    state = model.encode(model.embed(images((1, 3, 32, 32), 1)))
    assert state.num_tokens == model.site_methods[0].schedule[-1] == 2


@pytest.mark.parametrize(
    ("strategy", "layer", "sites"),
    [
        ("no", 0, ()),
        ("all", 0, (0, 1, 2, 3, 4, 5)),
        ("alternate", 0, (1, 3, 5)),
        ("lower", 2, (0, 1)),
        ("upper", 2, (3, 4, 5)),
    ],
)
def test_strategies(strategy: str, layer: int, sites: tuple[int, ...]) -> None:
    assert MergingSettings(strategy, layer, 1).sites(6) == sites
    schedule = token_schedule(MergingSettings(strategy, layer, 1), 16, 1, 6)
    before = (17, *schedule)
    assert tuple(i for i in range(6) if before[i + 1] < before[i]) == sites


def test_the_published_setting() -> None:
    with torch.device("meta"):
        model = timm.create_model("vim_tiny_patch16_224", fusion_strategy="upper", fusion_layer=4, fusion_token=8)
    assert model.site_methods[0].schedule == (*[197] * 5, *range(189, 44, -8))
    assert model.eval()(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)


def test_what_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    def said(**keywords: object) -> list[str]:
        caplog.clear()
        fusion.describe(timm.create_model("vim_nano_patch4_32", **SMALL, **keywords))
        return [record.getMessage() for record in caplog.records]

    assert said() == []
    lines = said(fusion_strategy="upper", fusion_layer=1, fusion_token=8)
    assert len(lines) == 1
    assert lines[0].endswith("65 tokens, after the sites 65 65 57 49.")
    assert "merges nothing" in said(fusion_strategy="all", fusion_token=0)[1]
    assert "merges nothing" in said(fusion_strategy="upper", fusion_layer=3, fusion_token=4)[1]
    caplog.clear()
    method = TokenMerging(MergingSettings("all", token=100))
    method.attach(timm.create_model("vim_nano_patch4_32", **(SMALL | dict(depth=8))))
    method.describe()
    assert "nothing left to merge after site 5" in caplog.records[-1].getMessage()
    assert len(caplog.records) == 2


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="wanted 0 or more"):
        MergingSettings("all", token=-1)
    with pytest.raises(ValueError, match="wanted one of no, all"):
        MergingSettings("middle")
    with pytest.raises(ValueError, match="wanted one of published, raster"):
        MergingSettings("all", order="spiral")
    with pytest.raises(ValueError, match="0 to 3"):
        timm.create_model("vim_nano_patch4_32", **SMALL, fusion_strategy="lower", fusion_layer=4, fusion_token=2)
    with pytest.raises(ValueError, match="full token grid"):
        Methods.from_keywords(fusion_strategy="all", fusion_token=2, spatial_pool=True)
    with pytest.raises(ValueError, match="wanted one of the two"):
        Methods.from_keywords(fusion_strategy="all", fusion_token=2, pruning="token")


def test_flags(caplog: pytest.LogCaptureFixture) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="vim_tiny_patch16_224")
    fusion.add_arguments(parser)
    flags = "--fusion-strategy interleaved --fusion-layer 4 --fusion-token 8 --bi-merge"
    args = parser.parse_args(flags.split())
    keywords = fusion.model_keywords(args, models_mamba.registry_keywords(args.model))
    wanted = dict(fusion_strategy="alternate", fusion_layer=4, fusion_token=8, fusion_order="published")
    assert keywords == wanted | dict(fusion_matching="similar", fusion_weighted=False)
    args = parser.parse_args([*flags.split(), "--fusion-matching", "kth", "--fusion-weighted"])
    keywords = fusion.model_keywords(args, models_mamba.registry_keywords(args.model))
    assert keywords == wanted | dict(fusion_matching="kth", fusion_weighted=True)
    args = parser.parse_args(flags.split())
    fusion.check(args, set())
    assert "--bi-merge changes nothing" in caplog.records[-1].getMessage()
    fusion.check(parser.parse_args(["--fusion-token", "8"]), set())
    assert "change nothing without --fusion-strategy" in caplog.records[-1].getMessage()
    assert len(caplog.records) == 2
    fusion.check(parser.parse_args([]), set())
    assert len(caplog.records) == 2
    for given in (["--fusion-weighted"], ["--fusion-matching", "random"]):
        with pytest.raises(ValueError, match="wanted --fusion-strategy"):
            fusion.check(parser.parse_args(given), set())


# --- the ablations: which tokens are fused, and weighted means ---


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", STATES)
def test_given_tokens_are_fused_into_their_most_similar(kind: str, order: str) -> None:
    cls_index = STATES[kind]
    state = TokenState(images((3, 17, 8), 7), images((3, 17, 8), 8), ClassTokens.at(cls_index))
    num_patches = state.num_patches
    sources = random_sources(3, num_patches, 5, torch.Generator().manual_seed(1))
    groups = torch.arange(num_patches).expand(3, -1)
    merged = merge_tokens(state.replace(groups=groups), 5, order, sources)
    assert merged.num_tokens == 12
    # class tokens go where they go with the most similar tokens
    if order == "published":
        like = merge_tokens(state, 5, order).cls.index
        assert torch.equal(merged.cls.index, like) if isinstance(like, Tensor) else merged.cls.index == like
    for image in range(3):
        before = [split_cls(x, cls_index)[1][image] for x in (state.hidden, state.residual)]
        unit = before[0] / before[0].norm(dim=-1, keepdim=True)
        chosen = sources[image].tolist()
        wanted = {token: [token] for token in range(num_patches) if token not in chosen}
        for token in chosen:
            wanted[max(wanted, key=lambda other: float(unit[token] @ unit[other]))].append(token)
        got = [merged.groups[image].eq(place).nonzero().flatten().tolist() for place in range(len(wanted))]
        assert got == [sorted(group) for group in wanted.values()]
        for x, after in zip(before, (merged.hidden, merged.residual)):
            means = torch.stack([x[group].mean(0) for group in wanted.values()])
            torch.testing.assert_close(split_cls(after, merged.cls)[1][image], means)


def test_every_kth_is_half_the_published_matching() -> None:
    assert every_kth(10, 5).tolist() == [[0, 2, 4, 6, 8]]
    assert every_kth(10, 3).tolist() == [[0, 3, 6]]
    assert every_kth(10, 0).shape == (1, 0)
    metric = images((2, 16, 8), 3)
    wanted = bipartite_soft_matching(metric, 8)
    given = bipartite_soft_matching(metric, 8, sources=every_kth(16, 8))
    assert all(torch.equal(own, other) for own, other in zip(given, wanted))
    after = bipartite_soft_matching(images((2, 17, 8), 3), 8, class_token=True, sources=every_kth(16, 8))
    assert after.slot[:, 0].tolist() == [0, 0]
    assert after.kept[:, 1::2].logical_not().all()
    for wrong in (dict(r=7), dict(r=8, sort=False)):
        with pytest.raises(ValueError, match="sources are"):
            bipartite_soft_matching(metric, **wrong, sources=every_kth(16, 8))


@pytest.mark.parametrize("weighted", [True, False])
def test_weighted_means_are_those_of_all_patches(weighted: bool) -> None:
    """Through mixers that add nothing, a token of several merges is the mean of its patches, if it is weighted."""
    keywords = dict(fusion_strategy="all", fusion_token=20, fusion_weighted=weighted)
    model = timm.create_model("vim_nano_patch4_32", **SMALL, **keywords).eval()
    for layer in model.layers:
        torch.nn.init.zeros_(layer.mixer.out_proj.weight)
    with torch.no_grad():
        state = model.embed(images((2, 3, 32, 32), 2))
        patches = split_cls(state.hidden, state.cls)[1]
        # what comes first is the residual afterwards; tokens that differ in it choose by it
        state = state.replace(groups=torch.arange(64).expand(2, -1), residual=state.hidden)
        for _ in range(3):
            state = merge_tokens(state, 12, weighted=weighted)
            state = state.replace(hidden=state.residual)
    means = torch.stack(
        [torch.stack([patches[i, state.groups[i] == place].mean(0) for place in range(28)]) for i in range(2)]
    )
    difference = (split_cls(state.residual, state.cls)[1] - means).abs().max()
    assert difference < 1e-6 if weighted else difference > 1e-4
    if weighted:
        sizes = split_cls(state.entry("merging").unsqueeze(-1), state.cls)[1].squeeze(-1)
        assert torch.equal(sizes, torch.nn.functional.one_hot(state.groups).sum(1).float())


def test_weighted_means_of_given_sizes() -> None:
    matching = Matching(
        torch.tensor([[0, 1, 1, 0]]), torch.tensor([[True, True, False, False]]), torch.tensor([[2, 2]])
    )
    sizes = torch.tensor([[1.0, 3.0, 1.0, 4.0]])
    x = torch.tensor([[[1.0], [2.0], [6.0], [11.0]]]).double().requires_grad_()
    merged = merge(x, matching, sizes)
    torch.testing.assert_close(merged.flatten().tolist(), [9.0, 3.0])
    assert merge_sizes(sizes, matching).tolist() == [[5.0, 4.0]]
    (merged * torch.tensor([[[1.0], [2.0]]])).sum().backward()
    torch.testing.assert_close(x.grad.flatten().tolist(), [0.2, 1.5, 0.5, 0.8])


@pytest.mark.parametrize("matching", ["random", "kth"])
def test_models_with_other_matchings(matching: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    keywords = SMALL | dict(depth=2, fusion_strategy="all", fusion_token=9, fusion_weighted=True)
    model = timm.create_model("vim_nano_patch4_32", **keywords, fusion_matching=matching)
    usual = timm.create_model("vim_nano_patch4_32", **keywords)
    usual.load_state_dict(model.state_dict())
    fusion.describe(model)
    assert f"{matching} matching, weighted): 65 tokens, after the sites 56 47." in caplog.messages[0]
    x = images((3, 3, 32, 32), 1)

    def trained(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model.train()(x)

    logits = trained(1)
    assert torch.equal(trained(1), logits)
    assert torch.equal(trained(2), logits) == (matching == "kth")
    logits.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    with torch.no_grad():
        before = torch.random.get_rng_state()
        tested = model.eval()(x)
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.testing.assert_close(model(x[2:]), tested[2:], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(usual.eval()(x), tested, rtol=1e-3)


def test_random_tokens_are_drawn_for_each_image() -> None:
    sources = random_sources(500, 8, 3, torch.Generator().manual_seed(0))
    assert (sources.diff(dim=1) > 0).all()
    share = torch.bincount(sources.flatten(), minlength=8) / 500
    assert (share - 3 / 8).abs().max() < 0.08


def test_compiles_without_a_graph_break() -> None:
    keywords = SMALL | dict(fusion_strategy="all", fusion_token=9, fusion_order="raster", depth=2)
    model = timm.create_model("vim_nano_patch4_32", **keywords)
    x = images((2, 3, 32, 32), 1)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    logits = compiled(x)
    torch.testing.assert_close(logits, model(x), rtol=1e-4, atol=1e-5)
    logits.sum().backward()
    assert torch.isfinite(model.layers[0].mixer.A_log.grad).all()


def test_works_under_autocast_and_checkpointing() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vim_nano_patch4_32", **SMALL, fusion_strategy="all", fusion_token=9).train()
    x = images((2, 3, 32, 32), 1)
    model(x).square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], msg=name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
    logits.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
