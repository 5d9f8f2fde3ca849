"""Multiply-adds: the published figures, agreement with fvcore's tracer, and models of every kind."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

import models_mamba  # noqa: F401 (registers the models)
from benchmarks.flops import PUBLISHED, main
from measure.flops import model_flops, traced_flops

FIGURES = {
    "vim_tiny_patch16_224": 1.449,
    "vim_small_patch16_224": 5.077,
    "vim_base_patch16_224": 18.868,
    "dyvm_tiny_patch16_224": 1.215,
    "dyvm_small_patch16_224": 3.239,
    "dyvm_base_patch16_224": 12.042,
}
MERGED = dict(fusion_strategy="upper", fusion_layer=2, fusion_token=5)


@pytest.mark.parametrize("name", FIGURES)
def test_published_figures(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, **PUBLISHED[name])
    flops = model_flops(model)
    assert round(flops.published / 1e9, 3) == FIGURES[name]
    assert flops.full > flops.published


@pytest.mark.parametrize(
    ("name", "keywords"),
    [
        ("vim_nano_patch4_32", {}),
        ("dyvm_nano_patch4_32", {}),
        ("dyvm_nano_patch4_32", dict(pruning="token")),
        ("dyvm_nano_patch4_32", dict(pruning="block", in_chans=1)),
        ("fambav_nano_patch4_32", {}),
        ("vim_nano_patch4_32", MERGED),
        ("fastvim_nano_patch4_32", {}),
    ],
)
def test_full_count_is_what_fvcore_counts(name: str, keywords: dict[str, Any]) -> None:
    model = timm.create_model(name, **keywords)
    full = model_flops(model, block_keep=1.0).full
    traced = traced_flops(model)
    traced.pop("matmul", None)  # means over pooled tokens, which are no layer's
    assert set(traced) == {"linear", "conv", "selective_scan"}
    # with pooling, D and the gate act outside the scan, on all 64 tokens, where a tracer sees element-wise products
    apart = 8 * 2 * 2 * 128 * 64 if "fastvim" in name else 0
    assert full == sum(traced.values()) + apart


def test_count_follows_the_directions_that_run() -> None:
    model = timm.create_model("dyvm_nano_patch4_32", block_keep_ratio=0.5)
    one, half, both = (model_flops(model, block_keep=keep) for keep in (0.0, 0.5, 1.0))
    assert model_flops(model) == half
    assert one.full < half.full < both.full
    assert 2 * half.full == one.full + both.full
    each = torch.ones(8, 2)
    each[:, 1] = 0
    assert model_flops(model, block_keep=each) == half


def test_counting_leaves_the_model_as_it_was() -> None:
    model = timm.create_model("dyvm_nano_patch4_32").train()
    policy = model.site_methods[0].direction_policy
    model_flops(model)
    traced_flops(model)
    assert model.training
    assert model.site_methods[0].direction_policy == policy
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


def test_other_models_of_timm() -> None:
    model = timm.create_model("deit_tiny_patch16_224").eval()
    tokens, dim = 197, 192
    block = tokens * 12 * dim * dim + 2 * tokens * tokens * dim
    assert model_flops(model).full == model_flops(model).published == 12 * block + 196 * dim * 768 + dim * 1000


def test_command_prints_both_counts(capsys: pytest.CaptureFixture[str]) -> None:
    main(["vim_nano_patch4_32", "--img-size", "64"])
    assert capsys.readouterr().out.splitlines()[2].startswith("| vim_nano_patch4_32 | 0.3")
