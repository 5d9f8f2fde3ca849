"""Token merging through the program: evaluation, pictures, and the scripts of the published experiments."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import timm
import torch

import fusion
import main
import models_mamba
from tests.conftest import QUICK, ROOT, Result

LONG_NAME = "bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"


def test_evaluating_a_trained_model_with_merging(
    program: Callable[..., Result], cifar: Path, vim_weights: Path, tmp_path: Path
) -> None:
    flags = (*QUICK, "--data-set", "CIFAR", "--data-path", cifar, "--eval", "--resume", vim_weights)
    merging = ("--fusion-strategy", "upper", "--fusion-layer", 0, "--fusion-token", 3, "--bi-merge")
    plain, merged = program(*flags), program(*flags, *merging, "--visualize", tmp_path / "pictures")
    assert (plain.code, merged.code) == (0, 0)
    assert "merging" not in plain.out + plain.err
    assert merged.out.count("17 tokens, after the sites 17 14 11 8.") == 1
    assert merged.err.count("--bi-merge") == 1

    def loss(result: Result) -> str:
        return next(line for line in result.out.splitlines() if line.startswith("Accuracy")).split()[-1]

    assert loss(merged) != loss(plain)
    assert len(list((tmp_path / "pictures").glob("image_*/groups_3.png"))) == 4


def test_training_ends_with_pictures(program: Callable[..., Result], cifar: Path, tmp_path: Path) -> None:
    flags = (*QUICK, "--data-set", "CIFAR", "--data-path", cifar, "--fusion-strategy", "all", "--fusion-token", 99)
    done = program(*flags, "--visualize", tmp_path)
    assert done.code == 0
    assert done.err.count("nothing left to merge after site 3") == 0
    assert "17 tokens, after the sites 9 5 3 2." in done.out
    assert len(list(tmp_path.glob("image_*/overview.png"))) == 4


def test_pictures_that_cannot_be_written_cost_a_warning(
    program: Callable[..., Result], cifar: Path, vim_weights: Path, tmp_path: Path
) -> None:
    (tmp_path / "image_0").touch()
    flags = (*QUICK, "--data-set", "CIFAR", "--data-path", cifar, "--eval", "--resume", vim_weights)
    result = program(*flags, "--visualize", tmp_path)
    assert result.code == 0
    assert "cannot hold the pictures" in result.err


def test_pictures_need_a_folder(program: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = program(*QUICK, "--visualize", tmp_path / "file")
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert "is a file; wanted a folder" in result.err


def test_scripts_are_the_published_experiments() -> None:
    published = {
        "none": ("no", 0, 0),
        "all": ("all", 0, 7),
        "alternate": ("alternate", 0, 14),
        "lower": ("lower", 5, 9),
        "upper": ("upper", 18, 9),
        "readme": ("upper", 4, 8),
    }
    # beside them is one that draws the unmerged model
    scripts = sorted({*(ROOT / "scripts" / "fambav").glob("*-vim-[st]-*.sh")} - {*ROOT.glob("**/*-similarity.sh")})
    wanted = {(data, size, setting) for data in ("cifar", "imnet") for size in "ts" for setting in published}
    wanted -= {("cifar", "s", "readme"), ("imnet", "t", "readme"), ("imnet", "s", "readme")}
    assert {tuple(path.stem.replace("vim-", "").split("-")) for path in scripts} == wanted
    for path in scripts:
        data, _, size, setting = path.stem.split("-")
        command, environment = ["bash", path, "tests", "--seed", "3"], os.environ | {"PYTHON": "echo", "GPUS": "1"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        args = main.get_args_parser().parse_args(done.stdout.split()[1:])
        assert (args.fusion_strategy, args.fusion_layer, args.fusion_token) == published[setting]
        assert args.model == f"vim_{dict(t='tiny', s='small')[size]}_patch16_224_{LONG_NAME}"
        assert (args.data_set, args.data_path, args.seed) == (dict(cifar="CIFAR", imnet="IMNET")[data], "tests", 3)
        name = models_mamba.registry_name(args.model)
        keywords = fusion.model_keywords(args, models_mamba.registry_keywords(name))
        with torch.device("meta"):
            assert bool(timm.create_model(name, **keywords).site_methods) == (setting != "none")
