"""Models whose tokens are the patches of every channel: embedding, channel sampling, orders, pooling, names."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from causal_conv1d import backend
from torch import Tensor

import models_mamba
from embeddings import ChannelPatchEmbed, sample_places
from measure.flops import model_flops

SMALL = dict(img_size=16, patch_size=4, embed_dim=16, depth=3, num_classes=4, in_chans=6)


def build(name: str = "fastchannelvim_nano_patch4_32", **kwargs: Any) -> models_mamba.VisionMamba:
    torch.manual_seed(0)
    return timm.create_model(name, **SMALL | kwargs).eval()


def pictures(batch: int = 2, channels: int = 6, side: int = 16) -> Tensor:
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("order", ["Channel-First", "Spatial-First"])
def test_tokens_are_patches_of_channels_where_the_order_says(order: str) -> None:
    embed = ChannelPatchEmbed((8, 12), 4, 4, 5, 16, scan_order=order, hcs=False)
    x = torch.randn(2, 3, 8, 12)
    tokens, grid = embed(x, [4, 0, 2])
    assert grid == ((2, 3, 3) if order == "Channel-First" else (3, 2, 3))
    for row, col, j in ((0, 0, 0), (1, 2, 1), (0, 1, 2)):
        patch = x[:, j, 4 * row : 4 * row + 4, 4 * col : 4 * col + 4]
        wanted = (embed.proj.weight * patch[:, None, None, None]).sum((2, 3, 4, 5)) + embed.proj.bias
        index = (row * 3 + col) * 3 + j if order == "Channel-First" else (j * 2 + row) * 3 + col
        torch.testing.assert_close(tokens[:, index], wanted + embed.channel_embed.weight[[4, 0, 2][j]])


@pytest.mark.parametrize("name", ["fastchannelvim_nano_patch4_32", "channelvim_nano_patch4_32"])
def test_channels_may_differ_between_images(name: str) -> None:
    model, x = build(name), pictures(channels=3)
    with torch.no_grad():
        both = model(x, channels=torch.tensor([[4, 1, 2], [0, 3, 1]]))
        torch.testing.assert_close(both[:1], model(x[:1], channels=[4, 1, 2]))
        torch.testing.assert_close(both[1:], model(x[1:], channels=(0, 3, 1)))
        torch.testing.assert_close(model(x), model(x, channels=[0, 1, 2]))
        assert not torch.allclose(both[1:], model(x[1:], channels=(0, 1, 3)))
        assert model.forward_features(x, channels=[4, 1, 2]).shape[1] == 48 + model.num_prefix_tokens


@pytest.mark.parametrize(
    ("channels", "said"),
    [
        ([0, 1, 6], "wanted indices from 0 to 5"),
        ([-1, 1, 2], "wanted indices from 0 to 5"),
        ([0, 1, 1], "wanted every channel once"),
        ([[0, 1, 2], [3, 4, 3]], "wanted every channel once"),
        ([0, 1], r"wanted \(3,\) or \(2, 3\) of whole numbers"),
        ([0.0, 1.0, 2.0], "of whole numbers"),
    ],
)
def test_wrong_channels(channels: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build()(pictures(channels=3), channels=channels)


def test_more_channels_than_the_model_knows() -> None:
    with pytest.raises(ValueError, match="of 1 to 6 channels"):
        build()(pictures(channels=7))
    with pytest.raises(ValueError, match="wanted one with channel_tokens"):
        timm.create_model("vim_nano_patch4_32")(torch.zeros(1, 3, 32, 32), channels=[0, 1, 2])


# --- channel sampling ---


def test_places_are_drawn_by_number_first() -> None:
    torch.manual_seed(0)
    drawn = [sample_places(4) for _ in range(4000)]
    sizes = torch.tensor([len(places) for places in drawn]).bincount()[1:] / len(drawn)
    torch.testing.assert_close(sizes, torch.full((4,), 0.25), atol=0.03, rtol=0)
    single = torch.tensor([places[0] for places in drawn if len(places) == 1]).bincount()
    torch.testing.assert_close(single / single.sum(), torch.full((4,), 0.25), atol=0.05, rtol=0)
    assert all(places == sorted(set(places)) for places in drawn)
    assert any(sample_places(4, in_order=False) == [2, 0, 1] for _ in range(500))


def test_a_training_step_sees_what_was_drawn() -> None:
    model, x = build(drop_path_rate=0.0), pictures()
    torch.manual_seed(5)
    places = sample_places(6)
    wanted = model(x[:, places], channels=places)
    torch.manual_seed(5)
    torch.testing.assert_close(model.train()(x), wanted)
    given = [5, 0, 3, 1, 2, 4]
    torch.manual_seed(5)
    torch.testing.assert_close(
        model(x, channels=given), model.eval()(x[:, places], channels=[given[at] for at in places])
    )
    before = torch.get_rng_state()
    model(x)
    assert torch.equal(before, torch.get_rng_state())  # evaluation draws nothing
    build(hcs=False).train()(x)


def test_checkpointing_does_not_draw_again() -> None:
    model, x, grads = build(drop_path_rate=0.0).train(), pictures(), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(7)
        model(x).sum().backward()
        grads.append(model.patch_embed.proj.weight.grad.clone())
    torch.testing.assert_close(*grads)


# --- what is pooled ---


@pytest.mark.parametrize("order", ["Channel-First", "Spatial-First"])
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("path", ["rowwise", "colwise"])
def test_kernels_do_what_the_formulas_do(order: str, dims: int, path: str) -> None:
    model = build(scan_order=order, pool_dims=dims, scanpath_type=path)
    x = pictures(side=20)[:, :3]
    lengths = []
    for layer in model.layers:
        layer.mixer.register_forward_pre_hook(
            lambda _, args, kwargs: lengths.append(kwargs["pooling"].lines.count), with_kwargs=True
        )
    with torch.no_grad():
        found = model(x)
    rows, cols, channels = 5, 5, 3
    wanted = [rows, cols, channels] if dims == 2 else [rows * channels, cols * channels, rows * channels]
    assert lengths == wanted
    with backend.use("torch"), torch.no_grad():
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)


def test_layers_that_never_turn() -> None:
    model = build(pool_dims=2, rotate_every_block=False, img_size=(16, 24))
    method = model.site_methods[0]
    grids = [method.grid_pooling(index, (4, 6, 3)) for index in range(3)]
    assert [grid.axes for grid in grids] == [None, None, None]
    assert [grid.lines.count for grid in grids] == [4, 4, 3]


@pytest.mark.parametrize("method", ["mean", "max"])
def test_any_size_and_odd_grids(method: str) -> None:
    model = build(collapse_method=method)
    assert model(pictures(side=16)[..., :13, :11]).shape == (2, 4)
    assert build("channelvim_nano_patch4_32", stride=2)(pictures()).shape == (2, 4)
    assert build("channelvim_nano_patch4_32", img_size=(16, 24))(pictures(side=24)[..., :16, :]).shape == (2, 4)


def test_maps_are_means_over_channels() -> None:
    for order in ("Channel-First", "Spatial-First"):
        model = build(scan_order=order)
        maps = model.forward_intermediates(pictures(), [2], intermediates_only=True, channels=[5, 4, 3, 2, 1, 0])
        assert maps[0].shape == (2, 16, 4, 4)
        tokens = model.forward_features(pictures(), channels=[5, 4, 3, 2, 1, 0])
        final = model.forward_intermediates(
            pictures(), [2], norm=True, intermediates_only=True, output_fmt="NLC", channels=[5, 4, 3, 2, 1, 0]
        )
        tokens = (
            tokens.unflatten(1, (16, 6)).mean(2) if order == "Channel-First" else tokens.unflatten(1, (6, 16)).mean(1)
        )
        torch.testing.assert_close(final[0], tokens)


# --- keywords, names, weights ---


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        (dict(scan_order="Rows-First"), "wanted 'Channel-First' or 'Spatial-First'"),
        (dict(fusion_strategy="all", fusion_token=2), "Spatial pooling needs the full token grid"),
        (dict(pool_dims=3), "pool_dims is 3"),
        (dict(spatial_pool=False, if_rope=True), "without if_rope"),
        (dict(spatial_pool=False, pruning="both"), "wanted it without channel_tokens"),
        (dict(stride=2), "wanted stride equal to patch_size"),
    ],
)
def test_keywords_that_make_no_sense(keywords: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build(**keywords)
    with pytest.raises(ValueError, match="wanted it with channel_tokens"):
        timm.create_model("fastvim_nano_patch4_32", pool_dims=2)


def test_merging_without_pooling() -> None:
    model = build("channelvim_nano_patch4_32", fusion_strategy="all", fusion_token=5)
    assert model(pictures(channels=2), channels=[3, 1]).shape == (2, 4)


def test_names() -> None:
    sizes = {}
    for patch in (16, 8):
        for name in ("channelvim", "fastchannelvim"):
            with torch.device("meta"):
                model = timm.create_model(f"{name}_small_patch{patch}_224", num_classes=161)
            assert model.patch_embed.in_chans == 8
            sizes[name, patch] = round(sum(each.numel() for each in model.parameters()) / 1e6, 1)
    assert set(sizes.values()) == {25.3, 25.5}
    with torch.device("meta"):
        assert timm.create_model("fastchannelvim_small_patch8_224_maxpool").methods.pooling.collapse_method == "max"
        assert timm.create_model("fastchannelvim_small_patch16_224_2dcompress").methods.pooling.pool_dims == 2
        alias = "channelvim_small_patch16_224_final_pool_mean_abs_pos_embed_with_{}_div2"
        assert timm.create_model(alias.format("midclstok")).num_prefix_tokens == 1
        fast = timm.create_model(alias.format("noclstok"), channels=3)
    assert fast.methods.pooling is not None
    assert fast.patch_embed.in_chans == 3
    assert fast.default_cfg["input_size"] == (8, 224, 224)


def test_parameters() -> None:
    model = build("channelvim_nano_patch4_32", embed_dim=64, img_size=32)
    assert model.patch_embed.proj.weight.shape == (64, 1, 1, 4, 4)
    assert model.patch_embed.channel_embed.weight.shape == (6, 64)
    assert model.pos_embed.shape == (1, 64, 64)
    assert "patch_embed.channel_embed.weight" in model.no_weight_decay()
    assert 0.01 < float(model.patch_embed.channel_embed.weight.detach().std()) < 0.03
    assert float(model.patch_embed.proj.bias.detach().abs().max()) > 0
    assert all(layer.mixer.layernorm is not None for layer in model.layers)
    bare = timm.create_model("channelvim_nano_patch4_32", use_norm_after_ssm=False)
    assert all(layer.mixer.layernorm is None for layer in bare.layers)


def test_positions_of_another_size() -> None:
    source, target = build("channelvim_nano_patch4_32"), build("channelvim_nano_patch4_32", img_size=24)
    weights = models_mamba.checkpoint_filter_fn(source.state_dict(), target)
    target.load_state_dict(weights)
    assert weights["pos_embed"].shape == (1, 36, 16)


def test_multiply_adds_count_every_channel() -> None:
    model = build(img_size=16, spatial_pool=True)
    one, all_channels = (model_flops(build(in_chans=channels), 16).full for channels in (1, 6))
    assert all_channels > 3 * one
    assert model_flops(model, 16).full == all_channels
