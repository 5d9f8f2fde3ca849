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
from fusion.visualize import DROPPED, cosine_similarity, draw_groups, patch_groups, trace, visualize_merging
from tests.golden_rules import images

SMALL = dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_classes=5, drop_path_rate=0.0)


def test_files(tmp_path: Path) -> None:
    keywords = SMALL | dict(fusion_strategy="all", fusion_token=3, fusion_order="raster")
    model = timm.create_model("vim_nano_patch4_32", **keywords).train()
    visualize_merging(model, images((2, 3, 32, 32), 1), tmp_path / "pictures")
    assert model.training
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["image_0", "image_1"]
    folder = tmp_path / "pictures" / "image_1"
    names = {f"{kind}_{site}.png" for kind in ("groups", "similarity") for site in (0, 1)}
    assert {path.name for path in folder.iterdir()} == names | {"hidden_states.npz", "groups.npz", "overview.png"}

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
