"""MambaReg: registers spread over the sequence, read all together, plain, pruned and merged."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

import checkpoints
import models_mamba
from fusion.token_state import split_cls
from fusion.visualize import class_marks, trace, visualize_merging
from fusion.visualize_pruning import visualize_pruning
from measure.flops import model_flops
from tests.golden_rules import fill_model, images, relative_error
from tests.test_dynamic_pruning import forced, random_sets
from utils import UsageError

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = dict(img_size=32, patch_size=4, embed_dim=32, depth=4, num_classes=5, drop_path_rate=0.0)
FIGURES = {  # parameters of MambaReg and of DyVM on it; multiply-adds in G, published and full
    "tiny": (9_264_232, 9_483_310, (1.530, 1.925)),
    "small": (27_801_064, 28_598_590, (5.360, 6.242)),
    "base": (99_301_096, 102_333_790, (19.918, 22.050)),
    "large": (341_222_376, 346_740_558, (70.64, 77.10)),
}
PRUNED = {"small": (0.8, (3.513, 3.974)), "base": (0.7, (13.058, 14.034))}


def small(name: str = "mambareg_nano_patch4_32", salt: int = 1, **keywords: Any) -> models_mamba.VisionMamba:
    return fill_model(timm.create_model(name, **(SMALL | keywords)), salt).eval()


# --- published figures ---


@pytest.mark.parametrize("size", FIGURES)
def test_parameters_and_multiply_adds(size: str) -> None:
    plain, pruned, flops = FIGURES[size]
    with torch.device("meta"):
        model, student = (timm.create_model(f"{kind}mambareg_{size}_patch16_224") for kind in ("", "dyvm_"))
        alias = timm.create_model(f"mambar_{size}_patch16_224")
    assert sum(parameter.numel() for parameter in model.parameters()) == plain
    assert sum(parameter.numel() for parameter in student.parameters()) == pruned
    assert {k: v.shape for k, v in alias.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    digits = 2 if size == "large" else 3
    assert tuple(round(count / 1e9, digits) for count in model_flops(model)) == flops
    assert models_mamba.registry_name(f"MambaReg-{size.capitalize()}") == f"dyvm_mambareg_{size}_patch16_224"


@pytest.mark.parametrize("size", PRUNED)
def test_multiply_adds_of_pruned_models(size: str) -> None:
    keep, flops = PRUNED[size]
    with torch.device("meta"):
        model = timm.create_model(f"dyvm_mambareg_{size}_patch16_224", block_keep_ratio=keep)
    assert tuple(round(count / 1e9, 3) for count in model_flops(model)) == flops


# --- the model ---


def test_registers_are_embedded_apart_and_stand_among_the_patches() -> None:
    model = small(num_cls_tokens=5)
    state = model.embed(images((2, 3, 32, 32), 1))
    assert state.cls.index == (10, 21, 32, 43, 54)
    classes, patches = split_cls(state.hidden, state.cls)
    assert torch.equal(classes, (model.cls_token + model.pos_embed_cls).expand(2, -1, -1))
    tokens, _ = model.patch_embed(images((2, 3, 32, 32), 1))
    torch.testing.assert_close(patches, tokens + model.pos_embed)
    assert {"cls_token", "pos_embed", "pos_embed_cls"} <= model.no_weight_decay()
    maps = model.forward_intermediates(images((2, 3, 32, 32), 1), 1, return_prefix_tokens=True)[1]
    assert [tuple(part.shape) for part in maps[0]] == [(2, 32, 8, 8), (2, 5, 32)]


def test_registers_are_not_dropped_out() -> None:
    model = small(drop_rate=0.5).train()
    state = model.embed(images((2, 3, 32, 32), 1))
    classes, patches = split_cls(state.hidden, state.cls)
    assert torch.equal(classes, (model.cls_token + model.pos_embed_cls).expand(2, -1, -1))
    assert 0.3 < float((patches == 0).float().mean()) < 0.7


@pytest.mark.parametrize(("reduce", "width"), [(1, 128), (2, 64), (8, 16), (32, 4)])
def test_readout(reduce: int, width: int) -> None:
    model = small(cls_reduce=reduce)
    x = images((2, 3, 32, 32), 1)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 4 + 64, 32)
    wanted = tokens[:, :4]
    if reduce > 1:
        wanted = wanted @ model.neck.weight.T
        wanted = wanted.reshape(2, -1)
        wanted = wanted * (wanted.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * model.norm_neck.weight
    got = model.forward_head(tokens, pre_logits=True)
    assert got.shape == (2, width) == (2, model.head_hidden_size)
    torch.testing.assert_close(got, wanted.reshape(2, -1))
    torch.testing.assert_close(model(x, return_features=True), got)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert model(x).shape == (2, width)


def test_one_register_is_vims_middle_token() -> None:
    vim = small("vim_nano_patch4_32")
    model = small(num_cls_tokens=1, cls_reduce=1)
    state = vim.state_dict()
    row, patches = split_cls(state["pos_embed"], (32,))
    model.load_state_dict(state | {"pos_embed": patches, "pos_embed_cls": row})
    x = images((2, 3, 32, 32), 1)
    with torch.no_grad():
        torch.testing.assert_close(model(x), vim(x))


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = timm.create_model("mambareg_nano_patch4_32")
    for parameter in (model.neck.weight, model.cls_token, model.pos_embed_cls, model.pos_embed):
        assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.15)
    assert torch.equal(model.norm_neck.weight.detach(), torch.ones(128))


def test_another_image_size_moves_the_registers(tmp_path: Path) -> None:
    trained = small()
    torch.save(trained.state_dict(), tmp_path / "small.pth")
    overlay = dict(file=str(tmp_path / "small.pth"), num_classes=5)
    keywords = SMALL | dict(img_size=48)
    large = timm.create_model("mambareg_nano_patch4_32", True, pretrained_cfg_overlay=overlay, **keywords)
    assert large.pos_embed.shape == (1, 144, 32)
    assert torch.equal(large.pos_embed_cls, trained.pos_embed_cls)
    assert large.embed(images((1, 3, 48, 48), 1)).cls.index == (28, 57, 86, 115)


@pytest.mark.parametrize("option", ["if_random_cls_token_position", "if_random_token_rank"])
def test_random_orders_train(option: str) -> None:
    torch.manual_seed(0)
    model = small(flip_img_sequences_ratio=0.5).train()
    for _ in range(3):
        logits = model(images((2, 3, 32, 32), 1), **{option: True})
        assert logits.isfinite().all()
    registers = (model.cls_token + model.pos_embed_cls).expand(2, -1, -1)
    for state in (model.embed(images((2, 3, 32, 32), 1), random_token_rank=True) for _ in range(3)):
        assert torch.equal(split_cls(state.hidden, state.cls)[0], registers), "each is read as itself"
    places = {model.embed(images((2, 3, 32, 32), 1), random_cls_position=True).cls.index for _ in range(4)}
    assert len(places) > 2


@pytest.mark.parametrize(
    ("keywords", "left_out"),
    [
        (dict(img_size=48), ()),
        (dict(num_classes=7), ("head for 5 classes",)),
        (dict(num_cls_tokens=6), ("cls_token, norm_neck.weight, pos_embed_cls", "head for 5 classes")),
        (dict(cls_reduce=4), ("neck.weight, norm_neck.weight", "head for 5 classes")),
        (dict(cls_reduce=1), ("neck.weight, norm_neck.weight", "head for 5 classes")),
        (dict(num_cls_tokens=8, cls_reduce=4), ("cls_token, neck.weight, pos_embed_cls",)),
    ],
    ids=str,
)
def test_finetuning_at_another_size(
    keywords: dict[str, Any], left_out: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    trained, model = small().state_dict(), timm.create_model("mambareg_nano_patch4_32", **(SMALL | keywords))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if left_out and "num_classes" not in keywords:
        other = timm.create_model("mambareg_nano_patch4_32", **(SMALL | keywords))
        with pytest.raises(UsageError, match="instead of|is missing|is unknown"):
            checkpoints.load_strictly(other, trained, "file", "MambaReg")
    caplog.set_level(logging.INFO)
    weights, may_miss = checkpoints.adapt(trained, model, "file")
    checkpoints.load_strictly(model, weights, "file", "MambaReg", may_miss=may_miss)
    assert all(name in caplog.text for name in left_out)
    state = model.state_dict()
    assert torch.equal(state["norm_f.weight"], trained["norm_f.weight"])
    if len(state["pos_embed"][0]) == 64:
        assert torch.equal(state["pos_embed"], trained["pos_embed"])
    fresh = {key for key in state if torch.equal(state[key], before[key]) and "block_head" not in key}
    named = [key for part in left_out for key in part.split(", ") if "." in key or "_" in key]
    heads = {"head.weight", "head.bias"} if any("head for" in part for part in left_out) else set()
    assert fresh == ({*named} & state.keys()) | heads
    assert model.eval()(images((1, 3, *model.patch_embed.img_size), 1)).isfinite().all()


# --- methods ---


@pytest.mark.parametrize(
    ("registers", "keep"),
    [(6, [0.7, 0.49, 0.343]), (6, [0.08, 0.05, 0.02]), (6, [0.5, 0, 0]), (20, [0.3, 0.2, 0.1]), (1, [0.7, 0.3, 0.1])],
)
def test_training_equals_inference(registers: int, keep: list[float]) -> None:
    """Also where fewer tokens than registers are left, or none."""
    model = small("dyvm_mambareg_nano_patch4_32", num_cls_tokens=registers, depth=8)
    method = model.site_methods[0]
    x, (mask, index) = images((3, 3, 32, 32), 5), forced(random_sets(keep, 3, 64, seed=1))
    gates = torch.rand(8, 3, 2, generator=torch.Generator().manual_seed(2)).round()
    method.direction_policy = lambda layer, column: gates[layer]
    with torch.no_grad():
        method.token_policy = mask
        trained = model.train()(x)
        method.token_policy = index
        inferred = model.eval().forward_with_decisions(x)
    assert relative_error(trained.logits, inferred.logits) < 1e-4
    assert inferred.tokens.shape[1] == int(keep[-1] * 64)


def test_no_more_patches_than_registers() -> None:
    """m <= n from the start: registers come first, and training is inference all the same."""
    keywords = dict(img_size=8, num_cls_tokens=4, depth=4, pruning_loc=(1, 2), token_ratio=(0.75, 0.5))
    model = small("dyvm_mambareg_nano_patch4_32", **keywords)
    x, (mask, index) = images((3, 3, 8, 8), 5), forced(random_sets([0.75, 0.5], 3, 4, seed=1))
    assert model.embed(x).cls.index == (0, 1, 2, 3)
    method = model.site_methods[0]
    method.direction_policy = None
    with torch.no_grad():
        method.token_policy = mask
        trained = model.train()(x)
        method.token_policy = index
        assert relative_error(trained.logits, model.eval()(x)) < 1e-4


def test_each_image_has_registers_among_its_own_kept_tokens() -> None:
    model = small("dyvm_mambareg_nano_patch4_32", depth=8).train()
    counts = torch.tensor([40, 3, 0])
    first = (torch.arange(64) < counts[:, None]).float()
    model.site_methods[0].token_policy = lambda stage, tokens, policy: first * policy
    with torch.no_grad():
        state = model.encode(model.embed(images((3, 3, 32, 32), 5)))
    assert state.cls.index.tolist() == [[8, 17, 26, 35], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert [int(row.sum()) for row in state.token_mask] == [44, 7, 4]


def test_block_head_reads_the_mean_of_the_registers() -> None:
    model = small("dyvm_mambareg_nano_patch4_32", pruning="block")
    columns: dict[int, Tensor] = {}
    method = model.site_methods[0]
    method.direction_policy = lambda layer, column: columns.setdefault(layer, column)[:, :2] * 0 + 1
    seen: list[Tensor] = []
    model.layers[0].mixer.in_proj.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        model(images((2, 3, 32, 32), 1))
    places = list(model.class_token_positions(64))
    assert relative_error(columns[0], seen[-1][:, places].mean(1)) < 1e-5


@pytest.mark.parametrize("order", ["published", "raster"])
@pytest.mark.parametrize("keywords", [{}, dict(pruning="block")], ids=["plain", "block pruning"])
def test_merging_puts_registers_back_by_the_formula(keywords: dict[str, Any], order: str) -> None:
    model = small(fusion_strategy="all", fusion_token=9, fusion_order=order, **keywords).train()
    places: list[tuple[int, ...]] = []
    state = model.encode(
        model.embed(images((2, 3, 32, 32), 1)), lambda index, state: places.append((state.num_patches, state.cls.index))
    )
    assert places == [(m, model.class_token_positions(m)) for m in (55, 46, 37, 28)]
    assert model.site_methods[-1].schedule == (59, 50, 41, 32)
    model.finish(state).square().sum().backward()
    assert all(layer.mixer.A_log.grad.isfinite().all() for layer in model.layers)


def test_pictures_show_where_registers_stand(tmp_path: Path) -> None:
    x = images((2, 3, 32, 32), 1)
    model = small(depth=2, fusion_strategy="all", fusion_token=20, fusion_order="raster")
    for state in trace(model, x):
        for image in range(2):
            behind = [at - number - 1 for number, at in enumerate(state.cls.index)]
            groups = state.groups[image]
            # each register is marked behind the last patch of the token in front of it
            wanted = [int((groups == token).nonzero().max()) for token in behind]
            assert class_marks(state, image) == wanted
    visualize_merging(model, x, tmp_path)
    with np.load(tmp_path / "image_0" / "groups.npz") as groups:
        assert groups["class_tokens_0"].tolist() == class_marks(trace(model, x)[0], 0)
    pruned = small("dyvm_mambareg_nano_patch4_32", depth=4, pruning_loc=(1, 2), token_ratio=(0.5, 0.02))
    visualize_pruning(pruned, x, tmp_path / "pruned")
    kept = np.load(tmp_path / "pruned" / "image_0" / "kept.npz")
    first = np.flatnonzero(kept["kept"][0])
    assert kept["class_tokens"][0].tolist() == [first[6 * k + 5] for k in range(4)]
    assert kept["class_tokens"][1].tolist() == [-1] * 4  # one token is left, and registers come first
    assert (tmp_path / "pruned" / "image_0" / "kept.png").stat().st_size > 0


# --- bad input ---


@pytest.mark.parametrize(
    ("keywords", "told"),
    [
        (dict(cls_reduce=3), "cls_reduce is 3; wanted a divisor of embed_dim, 32."),
        (dict(cls_reduce=0), "cls_reduce is 0"),
        (dict(num_cls_tokens=0), "num_cls_tokens is 0; wanted 1 register or more."),
        (dict(spatial_pool=True), "no class token or register among the patches"),
        (dict(fusion_strategy="all", fusion_token=2, pruning="token"), "wanted one of the two"),
    ],
)
def test_bad_keywords(keywords: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        timm.create_model("mambareg_nano_patch4_32", **(SMALL | keywords))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="cls_reduce is 2; wanted it with num_cls_tokens only."):
        timm.create_model("vim_nano_patch4_32", cls_reduce=2)
