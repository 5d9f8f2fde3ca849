"""The pictures of the sites: what they hold, and that they show what merging did."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from matplotlib.image import imread

import models_mamba  # noqa: F401 (registers the models)
from fusion.token_state import split_cls
from fusion.visualize import (
    DROPPED,
    cosine_similarity,
    draw_groups,
    draw_saved,
    main,
    patch_groups,
    trace,
    visualize_merging,
)
from tests.golden_rules import images
from utils import UsageError

SMALL = dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_classes=5, drop_path_rate=0.0)


def test_files(tmp_path: Path) -> None:
    keywords = SMALL | dict(fusion_strategy="all", fusion_token=3, fusion_order="raster")
    model = timm.create_model("vim_nano_patch4_32", **keywords).train()
    visualize_merging(model, images((2, 3, 32, 32), 1), tmp_path / "pictures")
    assert model.training
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["image_0", "image_1"]
    folder = tmp_path / "pictures" / "image_1"
    names = {f"{kind}_{site}.png" for kind in ("groups", "similarity") for site in (0, 1)} | {"overview.png"}
    saved = {f"{kind}.npz" for kind in ("hidden_states", "mixer_outputs", "groups")}
    assert {path.name for path in folder.iterdir()} == names | saved

    with torch.no_grad():
        states = trace(model, images((2, 3, 32, 32), 1))
    with np.load(folder / "hidden_states.npz") as hidden, np.load(folder / "groups.npz") as groups:
        assert [hidden[f"layer_{site}"].shape for site in (0, 1)] == [(14, 16), (11, 16)]
        for site, state in enumerate(states):
            np.testing.assert_array_equal(hidden[f"layer_{site}"], state.hidden[1].numpy())
            assert groups[f"layer_{site}"].shape == (4, 4)
            assert set(groups[f"layer_{site}"].ravel()) == set(range(16 - 3 * (site + 1)))
    assert imread(folder / "groups_1.png").shape[:2] == (256, 256)
    assert imread(folder / "similarity_1.png").shape[0] >= 256


@pytest.mark.parametrize("paired", [False, True])
def test_both_states_are_saved(paired: bool, tmp_path: Path) -> None:
    """The merged state, and what the release saves: the output of the mixer of each site's first layer."""
    keywords = SMALL | dict(depth=4 if paired else 2, if_bidirectional=paired, use_middle_cls_token=not paired)
    model = timm.create_model("vim_nano_patch4_32", **keywords, fusion_strategy="all", fusion_token=2).eval()
    x = images((1, 3, 32, 32), 1)
    visualize_merging(model, x, tmp_path)
    states, mixed = [], []
    with torch.no_grad():
        state = model.embed(x)
        for site in range(model.num_sites):
            layer = model.layers[site * (2 if paired else 1)]
            mixed.append(layer(state.hidden, state.residual)[0])
            state = model.site_methods[0](site, state, lambda state, site=site: model.run_site(site, state))
            states.append(state.hidden)
    for name, wanted in (("hidden_states", states), ("mixer_outputs", mixed)):
        with np.load(tmp_path / "image_0" / f"{name}.npz") as found:
            assert list(found) == [f"layer_{site}" for site in range(model.num_sites)]
            for site, tokens in enumerate(wanted):
                np.testing.assert_allclose(found[f"layer_{site}"], tokens[0].numpy(), rtol=1e-5, atol=1e-6)
    assert not any(layer.mixer._forward_hooks for layer in model.layers)


def test_saved_files_are_drawn_again(tmp_path: Path) -> None:
    model = timm.create_model("vim_nano_patch4_32", **SMALL, fusion_strategy="all", fusion_token=3)
    visualize_merging(model, images((1, 3, 32, 32), 1), tmp_path)
    folder = tmp_path / "image_0"
    pictures = {path.name: imread(path) for path in folder.glob("*.png")}
    assert draw_saved(folder / "hidden_states.npz") == folder / "hidden_states"
    again = {path.name: imread(path) for path in (folder / "hidden_states").iterdir()}
    assert again.keys() == pictures.keys()
    assert all(np.array_equal(again[name], picture) for name, picture in pictures.items())
    # what the mixers gave is longer than what the groups make, so that similarities alone are drawn
    main([str(folder / "mixer_outputs.npz"), "--output", str(tmp_path / "drawn")])
    names = {"similarity_0.png", "similarity_1.png", "overview.png"}
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == names
    assert not np.array_equal(imread(tmp_path / "drawn" / "similarity_1.png"), pictures["similarity_1.png"])


def test_a_file_of_the_release_is_drawn(tmp_path: Path) -> None:
    tokens = images((1, 5, 8), 4)
    np.savez(tmp_path / "saved.npz", **{f"layer_{site}": tokens.numpy() for site in (0, 11)}, other=np.zeros(3))
    draw_saved(tmp_path / "saved.npz")
    assert len(list((tmp_path / "saved").glob("similarity_*.png"))) == 2
    similarity = imread(tmp_path / "saved" / "similarity_11.png")
    assert len({tuple(similarity[52 * row + 20, 52 * row + 20]) for row in range(5)}) == 1


@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "cannot be read"), (b"PK no archive", "cannot be read"), (dict(other=np.zeros(3)), "no token sequence")],
)
def test_a_file_that_is_none_is_refused(content: object, told: str, tmp_path: Path) -> None:
    file = tmp_path / "saved.npz"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        np.savez(file, **content)
    with pytest.raises(UsageError, match=told):
        main([str(file)])
    assert not (tmp_path / "saved").exists()


def test_trace_follows_every_patch_to_its_token() -> None:
    """Tokens that pass all sites unmixed must be the means of the patches that the record names."""
    model = timm.create_model("vim_nano_patch4_32", **SMALL, fusion_strategy="all", fusion_token=3).eval()
    for layer in model.layers:
        torch.nn.init.zeros_(layer.mixer.out_proj.weight)
    x = images((2, 3, 32, 32), 2)
    with torch.no_grad():
        start = model.embed(x)
        patches = split_cls(start.hidden, start.cls)[1]
        state = trace(model, x)[0]
        merged = split_cls(state.residual, state.cls)[1]
    for image in range(2):
        for place in range(merged.shape[1]):
            members = patches[image, state.groups[image] == place]
            torch.testing.assert_close(merged[image, place], members.mean(0))


def test_pruned_patches_are_shown_as_dropped() -> None:
    model = timm.create_model(
        "vim_nano_patch4_32", **SMALL, pruning="token", pruning_loc=(1,), token_ratio=(0.5,)
    ).eval()
    states = trace(model, images((2, 3, 32, 32), 3))
    assert int((patch_groups(states[0]) == DROPPED).sum()) == 0
    for image in range(2):
        assert sorted(patch_groups(states[1])[image].tolist()) == [DROPPED] * 8 + list(range(8))


def test_groups_share_colour_and_border() -> None:
    image = np.zeros((4, 8, 3))
    image[:2, :4, 0] = 1.0  # one red patch of eight, two rows by four columns
    groups = np.array([[0, 1, 2, 1], [0, 3, DROPPED, 3]])
    rows, cols = np.arange(4) // 2, np.arange(8) // 2
    picture = draw_groups(image, groups, rows, cols)
    assert picture.shape == (256, 512, 3)

    def middle(row: int, col: int) -> list[float]:
        return picture[64 + 128 * row, 64 + 128 * col].tolist()

    def corner(row: int, col: int) -> list[float]:
        inner_x = 128 * col + (127 if col < 3 else 0)
        return picture[128 * row + 64, inner_x].tolist()

    # group 0 is red above and black below, so half red in both; group 1 half red at its two far places
    assert middle(0, 0) == middle(1, 0) == [0.5, 0, 0]
    assert middle(0, 1) == middle(0, 3) == [0.5, 0, 0]
    assert middle(0, 2) == middle(1, 1) == [0, 0, 0]
    assert middle(1, 2) == [1, 1, 1]
    assert corner(0, 1) == corner(0, 3) != corner(0, 0)
    assert corner(0, 2) == [0.35] * 3


@pytest.mark.parametrize("keywords", [dict(img_size=33, stride=5), dict(img_size=(24, 40)), dict(patch_size=7)])
def test_any_grid(keywords: dict, tmp_path: Path) -> None:
    model = timm.create_model("vim_nano_patch4_32", **(SMALL | keywords), fusion_strategy="all", fusion_token=2)
    visualize_merging(model, images((1, 3, *model.patch_embed.img_size), 1), tmp_path)
    rows, cols = model.patch_embed.grid_size
    with np.load(tmp_path / "image_0" / "groups.npz") as groups:
        assert groups["layer_0"].shape == (rows, cols)


def test_similarity_is_the_cosine() -> None:
    tokens = images((5, 8), 4)
    wanted = torch.nn.functional.cosine_similarity(tokens[:, None], tokens[None], dim=-1)
    torch.testing.assert_close(cosine_similarity(tokens), wanted)
