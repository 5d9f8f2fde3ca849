"""FastVim: the pooled mixer against the paper read literally, any image size, the seam's other uses, and bad input."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from causal_conv1d import causal_conv1d_ref
from mamba_ssm import Mamba
from mamba_ssm.ops.selective_scan_interface import selective_scan_ref
from torch import Tensor

import checkpoints
import models_mamba
from fusion import Methods
from fusion.spatial_pooling import GridPooling, PoolingSettings, SpatialPooling, VisiblePooling
from fusion.token_state import split_cls
from tests.golden_rules import fill_model, images

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = dict(img_size=(24, 40), patch_size=8, embed_dim=16, depth=3, num_classes=5, drop_path_rate=0.0)


def small_model(**keywords: Any) -> models_mamba.VisionMamba:
    return fill_model(timm.create_model("fastvim_tiny_patch16_224", **SMALL | keywords), salt=3).eval()


def literal_mixer(mixer: Mamba, hidden: Tensor, cols: int, method: str, scale: float) -> Tensor:
    """The mixer of a row-wise layer as the paper writes it: flipped sequences, channel-first, no shared work."""
    x, z = mixer.in_proj(hidden).transpose(1, 2).chunk(2, dim=1)
    length, total = x.shape[2], 0
    for number, direction in enumerate(mixer.directions):
        u = causal_conv1d_ref(
            x.flip(-1) if number else x, direction.conv.weight.squeeze(1), direction.conv.bias, "silu"
        )
        rows = u.unflatten(2, (length // cols, cols))
        pooled = rows.amax(-1) if method == "max" else rows.mean(-1) * scale
        dt, B, C = (
            F.linear(pooled.transpose(1, 2), direction.x_proj.weight)
            .transpose(1, 2)
            .split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=1)
        )
        delta = torch.einsum("dr,brl->bdl", direction.dt_proj.weight, dt)
        A, bias = -torch.exp(direction.A_log), direction.dt_proj.bias
        y = selective_scan_ref(pooled, delta, A, B, C, delta_bias=bias, delta_softplus=True)
        y = y.repeat_interleave(cols, dim=2) + direction.D[:, None] * u
        total = total + (y.flip(-1) if number else y)
    y = total.transpose(1, 2) / 2
    y = y if mixer.layernorm is None else mixer.layernorm(y)
    return mixer.out_proj(y * F.silu(z.transpose(1, 2)))


def literal_model(model: models_mamba.VisionMamba, x: Tensor) -> Tensor:
    """Patch grid transposed once for colwise, and before and after every odd layer; the logits."""
    config = model.methods.pooling
    grid = model.patch_embed.proj(x).permute(0, 2, 3, 1)
    if config.scanpath_type == "colwise":
        grid = grid.transpose(1, 2)
    rows, cols = grid.shape[1:3]
    hidden, residual = grid.flatten(1, 2) + model.pos_embed, torch.zeros(())
    for index, layer in enumerate(model.layers):
        residual = hidden + residual
        hidden = layer.norm(residual)
        across = config.rotate_every_block and index % 2 == 1
        if across:
            hidden = hidden.unflatten(1, (rows, cols)).transpose(1, 2).flatten(1, 2)
        hidden = literal_mixer(
            layer.mixer, hidden, rows if across else cols, config.collapse_method, config.scaling_factor
        )
        if across:
            hidden = hidden.unflatten(1, (cols, rows)).transpose(1, 2).flatten(1, 2)
    return model.head(model.norm_f(hidden + residual).mean(1))


@pytest.mark.parametrize(
    "keywords",
    [
        dict(),
        dict(scanpath_type="colwise"),
        dict(scanpath_type="colwise", rotate_every_block=False),
        dict(rotate_every_block=False, collapse_method="max"),
        dict(scaling_factor=0.25, use_norm_after_ssm=False),
    ],
    ids=lambda keywords: "-".join(map(str, keywords.values())) or "defaults",
)
def test_model_does_what_the_paper_writes(keywords: dict[str, Any]) -> None:
    model = small_model(**keywords)
    x = images((2, 3, 24, 40), 1)
    wanted = literal_model(model, x)
    torch.testing.assert_close(model(x), wanted, rtol=2e-4, atol=2e-5)
    parameters = [p for name, p in model.named_parameters() if "layers.1." in name or name == "pos_embed"]
    grads = torch.autograd.grad(model(x).square().sum(), parameters)
    for grad, literal in zip(grads, torch.autograd.grad(wanted.square().sum(), parameters)):
        torch.testing.assert_close(grad, literal, rtol=1e-3, atol=1e-4 * float(literal.abs().max()))


# --- any image size ---


@pytest.mark.parametrize("scanpath_type", ["rowwise", "colwise"])
def test_other_sizes_are_padded_and_resized(scanpath_type: str) -> None:
    model = small_model(scanpath_type=scanpath_type)
    x = images((2, 3, 35, 50), 2)
    padded = F.pad(x, (0, 6, 0, 5))
    with torch.no_grad():
        torch.testing.assert_close(model(x), model(padded))
        # a model made for that size, its weights loaded the way timm loads them for another size, is the same function
        made = small_model(img_size=(40, 56), scanpath_type=scanpath_type)
        state = model.state_dict()
        state["pos_embed"] = embed_for(model, (5, 7))
        made.load_state_dict(state)
        torch.testing.assert_close(made(padded), model(padded))


def embed_for(model: models_mamba.VisionMamba, grid: tuple[int, int]) -> Tensor:
    """The position embedding resized on the grid it is stored on."""
    stored, wanted = (model.pos_embed_grid, grid)
    if model.methods.pooling.scanpath_type == "colwise":
        wanted = wanted[::-1]
    maps = model.pos_embed.detach().transpose(1, 2).unflatten(2, stored)
    return F.interpolate(maps, size=wanted, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)


def test_colwise_is_rowwise_on_the_transposed_image() -> None:
    rowwise, colwise = small_model(img_size=(40, 24)), small_model(scanpath_type="colwise")
    with torch.no_grad():
        rowwise.patch_embed.proj.weight.copy_(colwise.patch_embed.proj.weight.mT)
        x = images((2, 3, 24, 40), 4)
        for size in (x, x[..., :19, :]):
            final, maps = colwise.forward_intermediates(size, indices=[0, 2])
            final_rows, maps_rows = rowwise.forward_intermediates(size.mT.contiguous(), indices=[0, 2])
            assert maps[0].shape == (2, 16, 3, 5)
            for got, wanted in zip(maps, maps_rows):
                torch.testing.assert_close(got, wanted.mT)
            torch.testing.assert_close(final.unflatten(1, (3, 5)), final_rows.unflatten(1, (5, 3)).transpose(1, 2))


def test_features_only_gives_maps_of_any_size() -> None:
    model = timm.create_model("fastvim_nano_patch4_32", depth=2, features_only=True, out_indices=(0, 1))
    assert not model.default_cfg["fixed_input_size"]
    assert model.feature_info.reduction() == [4, 4]
    with torch.no_grad():
        assert [tuple(m.shape) for m in model(torch.randn(1, 3, 30, 21))] == [(1, 64, 8, 6)] * 2


def test_gradient_checkpointing_changes_nothing() -> None:
    model = small_model().train()
    x, grads = images((2, 3, 24, 40), 5), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*grads):
        torch.testing.assert_close(plain, checkpointed)


# --- the seam ---


@pytest.mark.parametrize(
    "pooling",
    [
        GridPooling((3, 5)),
        GridPooling((3, 5), axes=(1, 0), scale=0.5),
        GridPooling((3, 5, 2), pooled=1),
        GridPooling((3, 5, 2), axes=(1, 0, 2), pooled=1, method="max"),
        GridPooling((2, 3, 5), axes=(0, 2, 1)),
        GridPooling((3, 5, 2), pooled=(1, 2)),
        GridPooling((3, 5, 2), axes=(1, 0, 2), pooled=(2, 0), scale=0.5),
        GridPooling((3, 5, 2), pooled=(0, 1), method="max"),
        GridPooling((3, 5), pooled=(0, 1)),
    ],
    ids=str,
)
def test_grid_pooling_by_its_definition(pooling: GridPooling) -> None:
    """Tokens at the same place but for the pooled axis are one group; groups are walked in raster order."""
    shape = pooling.shape
    x = torch.randn(2, math.prod(shape), 4)
    axes = pooling.axes or tuple(range(len(shape)))
    tokens = x.unflatten(1, shape).permute(0, *(axis + 1 for axis in axes), -1)
    ordered = pooling.order(x)
    torch.testing.assert_close(ordered, tokens.flatten(1, -2))
    torch.testing.assert_close(pooling.restore(ordered), x)
    given = (pooling.pooled,) if isinstance(pooling.pooled, int) else pooling.pooled
    pooled = sorted(axis % len(shape) + 1 for axis in given)
    last = list(range(-1 - len(pooled), -1))
    lines = (
        tokens.movedim(pooled, last).flatten(-1 - len(pooled), -2).reshape(2, -1, math.prod(pooled_sizes(pooling)), 4)
    )
    groups = pooling.reduce(ordered)
    wanted = lines.amax(2) if pooling.method == "max" else lines.mean(2) * pooling.scale
    torch.testing.assert_close(groups, wanted)
    spread = pooling.expand_add(ordered, groups) - ordered
    spread = spread.unflatten(1, pooling.walked).movedim(pooled, last).reshape(lines.shape)
    torch.testing.assert_close(spread, groups.unsqueeze(2).expand_as(spread))


def pooled_sizes(pooling: GridPooling) -> list[int]:
    given = (pooling.pooled,) if isinstance(pooling.pooled, int) else pooling.pooled
    return [pooling.walked[axis] for axis in given]


def test_sites_of_a_grid_with_channels() -> None:
    """One axis in turns; or two, and every third site both spatial ones."""
    one = SpatialPooling(PoolingSettings())
    assert [one.grid_pooling(index, (3, 5, 2)) for index in range(2)] == [
        GridPooling((3, 5, 2), None, (1,)),
        GridPooling((3, 5, 2), (1, 0, 2), (1,)),
    ]
    two = SpatialPooling(PoolingSettings(pool_dims=2, spatial_axes=(1, 2)))
    assert [two.grid_pooling(index, (2, 3, 5)) for index in range(4)] == [
        GridPooling((2, 3, 5), None, (0, 2)),
        GridPooling((2, 3, 5), (0, 2, 1), (0, 2)),
        GridPooling((2, 3, 5), None, (1, 2)),
        GridPooling((2, 3, 5), None, (0, 2)),
    ]
    walked = SpatialPooling(PoolingSettings(rotate_every_block=False, scanpath_type="colwise"))
    assert {walked.grid_pooling(index, (3, 5)) for index in range(3)} == {GridPooling((3, 5), (1, 0), (1,))}
    assert GridPooling((3, 5), (1, 0), (1,)).lines == GridPooling((3, 5), (1, 0)).lines is not None


def test_models_on_a_subset_of_the_tokens() -> None:
    """All tokens kept is the full grid; fewer go through the mixers as visible ones; and each walk is sorted once."""
    model = small_model(depth=4)
    x, keep = images((2, 3, 24, 40), 5), torch.tensor([[0, 3, 4, 9, 14], [1, 2, 5, 6, 7]])
    with torch.no_grad():
        everything = model.encode(model.embed(x, keep=torch.arange(15).expand(2, -1)))
        assert everything.fills_grid
        assert torch.equal(model.finish(everything), model.forward_features(x))
        start = model.embed(x, keep=keep)
        assert start.grid == (3, 5)
        torch.testing.assert_close(start.hidden, take(model.embed(x).hidden, keep))
        walks: list[Any] = []
        state = model.encode(start, lambda index, state: walks.append(state.entry("pooling")))
        assert torch.equal(state.positions, keep)
        assert sorted(walks[-1]) == [False, True]
        assert walks[1][False] is walks[3][False]
        hidden, residual = start.hidden, None
        for index, layer in enumerate(model.layers):
            pooling = VisiblePooling(keep, (3, 5), index % 2 == 1)
            hidden, residual = layer(hidden, residual, pooling=pooling)
        torch.testing.assert_close(state.hidden, hidden)
    model.train().set_grad_checkpointing()
    model.finish(model.encode(model.embed(x, keep=keep))).sum().backward()
    assert model.pos_embed.grad.isfinite().all()


def test_a_subset_keeps_class_tokens_by_their_rule() -> None:
    model = timm.create_model("vim_nano_patch4_32", depth=1).eval()
    x, keep = images((2, 3, 32, 32), 5), torch.tensor([[0, 3, 4, 60, 63], [1, 2, 5, 6, 7]])
    state, full = model.embed(x, keep=keep), model.embed(x)
    assert state.cls.index == (2,)
    assert torch.equal(split_cls(state.hidden, state.cls)[0], split_cls(full.hidden, full.cls)[0])
    assert torch.equal(split_cls(state.hidden, state.cls)[1], take(split_cls(full.hidden, full.cls)[1], keep))
    with pytest.raises(ValueError, match=r"keep is \(5,\) of torch.int64; wanted \(2, V\)"):
        model.embed(x, keep=keep[0])


@pytest.mark.parametrize("transposed", [False, True])
def test_all_visible_tokens_are_the_full_grid(transposed: bool) -> None:
    """In whatever order they stand, visible tokens go through the mixer as those of the full grid do."""
    mixer = Mamba(8, bimamba_type="v2", if_divide_out=True, use_norm_after_ssm=True)
    x = torch.randn(2, 15, 8)
    positions = torch.stack([torch.randperm(15), torch.randperm(15)])
    dense = mixer(x, pooling=GridPooling((3, 5), (1, 0) if transposed else None, scale=0.5))
    visible = VisiblePooling(positions, (3, 5), transposed, scale=0.5)
    shuffled = mixer(take(x, positions), pooling=visible)
    torch.testing.assert_close(shuffled, take(dense, positions))


def take(x: Tensor, positions: Tensor) -> Tensor:
    return torch.stack([image[order] for image, order in zip(x, positions)])


@pytest.mark.parametrize("transposed", [False, True])
def test_visible_tokens_by_definition(transposed: bool) -> None:
    rows, cols = 3, 4
    positions = torch.tensor([[7, 0, 5, 2], [8, 9, 11, 1]])
    x = torch.randn(2, 4, 6, requires_grad=True)
    pooling = VisiblePooling(positions, (rows, cols), transposed)
    ordered = pooling.order(x)
    torch.testing.assert_close(pooling.restore(ordered), x)
    groups = torch.zeros(2, cols if transposed else rows, 6)
    spread = torch.randn_like(groups)
    for image in range(2):
        where = [(p % cols, p // cols) if transposed else (p // cols, p % cols) for p in positions[image].tolist()]
        walk = sorted(range(4), key=lambda token: where[token])
        torch.testing.assert_close(ordered[image], x[image, walk])
        for token, (line, _) in enumerate(where):
            groups[image, line] += x[image, token].detach() / (rows if transposed else cols)
            got = pooling.restore(pooling.expand_add(ordered, spread))[image, token]
            torch.testing.assert_close(got, x[image, token] + spread[image, line])
    torch.testing.assert_close(pooling.reduce(ordered), groups)
    mixer = Mamba(6, bimamba_type="v2")
    mixer(x, pooling=pooling).sum().backward()
    assert x.grad.abs().min() > 0


# --- registry ---


@pytest.mark.parametrize(("size", "millions"), [("tiny", 7.166), ("small", 25.833), ("base", 97.671)])
def test_published_sizes(size: str, millions: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"fastvim_{size}_patch16_224")
        on_vim = timm.create_model(f"vim_{size}_patch16_224", spatial_pool=True, scanpath_type="colwise")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=5e-4)
    assert {k: v.shape for k, v in on_vim.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert on_vim.methods == Methods.from_keywords(spatial_pool=True, scanpath_type="colwise")


# --- checkpoints ---


def test_lightning_checkpoint_at_another_size(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Averaged weights are taken, their prefix goes, and a column-wise grid is resized on its exchanged sides."""
    trained = small_model(img_size=32, scanpath_type="colwise")
    averaged = {f"ema_model.module.backbone.{name}": value for name, value in trained.state_dict().items()}
    other = {f"backbone.{name}": torch.zeros_like(value) for name, value in trained.state_dict().items()}
    torch.save({"state_dict": other | averaged, "pytorch-lightning_version": "2.1"}, tmp_path / "last.ckpt")
    weights, origin = checkpoints.find_weights(checkpoints.read(str(tmp_path / "last.ckpt")), "last.ckpt")
    assert "averaged" in origin
    model = timm.create_model("fastvim_tiny_patch16_224", **SMALL, scanpath_type="colwise").eval()
    with caplog.at_level(logging.INFO):
        weights, may_miss = checkpoints.adapt(weights, model, "last.ckpt")
    checkpoints.load_strictly(model, weights, "last.ckpt", "FastVim", may_miss=may_miss)
    assert "4x4 to 5x3" in caplog.text
    x = images((1, 3, 24, 40), 6)
    with torch.no_grad():
        torch.testing.assert_close(model(x), trained(x))


# --- bad input ---


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (dict(img_size=7), "at least one patch"),
        (dict(collapse_method="median"), "collapse_method is 'median'; wanted one of mean, max"),
        (dict(scanpath_type="diagonal"), "scanpath_type is 'diagonal'; wanted one of rowwise, colwise"),
        (dict(scaling_factor=0), "wanted a number above 0"),
        (dict(scaling_factor=0.5, collapse_method="max"), "with collapse_method 'mean' only"),
        (dict(fusion_strategy="all", fusion_token=2), "token merging breaks up: wanted one of the two"),
        (dict(pruning="token"), "wanted it without pruning"),
        (dict(stride=4), "wanted stride equal to patch_size"),
        (dict(if_cls_token=True), "no class token"),
        (dict(flip_img_sequences_ratio=0.5), "no flipped sequences"),
    ],
)
def test_bad_keywords_are_refused(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model("fastvim_nano_patch4_32", **SMALL | keywords)


def test_bad_images_are_refused() -> None:
    model = small_model()
    with pytest.raises(ValueError, match=r"Images are 24 x 5; wanted at least one patch, \(8, 8\)"):
        model(torch.randn(1, 3, 24, 5))
    with pytest.raises(ValueError, match=r"wanted \(batch, 3, height, width\)"):
        model(torch.randn(1, 4, 24, 40))
    largest = small_model(collapse_method="max")
    state = largest.embed(torch.randn(1, 3, 24, 40), keep=torch.tensor([[0, 2]]))
    with pytest.raises(ValueError, match="wanted pooling by 'mean'"):
        largest.encode(state)
    with pytest.raises(ValueError, match="without reordered tokens"):
        model(torch.randn(1, 3, 24, 40), if_random_token_rank=True)
    mixer = model.layers[0].mixer
    with pytest.raises(ValueError, match="without direction_gate"):
        mixer(torch.randn(1, 15, 16), pooling=GridPooling((3, 5)), direction_gate=lambda xz: xz)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model fastvim_nano_patch4_32 --input-size 3", "wanted at least one patch"),
        ("--model fastvim_nano_patch4_32 --if_random_token_rank", "--if_random_token_rank"),
        ("--model fastvim_nano_patch4_32 --pruning block", "both scan directions"),
        ("--model vim_nano_patch4_32 --spatial-pool diagonal", "invalid choice: 'diagonal'"),
        ("--model vim_nano_patch4_32 --pool-method max", "want --spatial-pool"),
        ("--model vim_nano_patch4_32 --spatial-pool col --pool-method max --pool-scale 0.5", "scaling_factor"),
    ],
)
def test_program_refuses_in_one_sentence(flags: str, message: str, program: Callable[..., Any]) -> None:
    result = program("--data-set", "DIGITS", *flags.split())
    assert result.code == 2
    assert message in result.err
    assert result.err.count("\n") == 1
