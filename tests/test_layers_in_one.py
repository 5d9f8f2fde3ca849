"""Layers that run as one operator: the same numbers as one by one, and one by one wherever something looks on."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from mamba_ssm.kernels import products
from mamba_ssm.kernels.registry import backends
from torch import Tensor, nn

import models_layers
import models_mamba  # noqa: F401 (registers the models)
from fusion import SpatialPooling
from fusion.method import SiteMethod

pytestmark = pytest.mark.skipif(backends.available("cpu") != "cpp", reason="the C++ kernels are not built")

VIM, FASTVIM, DYVM = "vim_nano_patch4_32", "fastvim_nano_patch4_32", "dyvm_nano_patch4_32"
LAST_TWO = {"fusion_strategy": "upper", "fusion_layer": 5, "fusion_token": 4}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers went into each operator; the own products are preferred, on any processor."""
    monkeypatch.setattr(products, "PREFER_OWN_NARROW", True)
    found: list[int] = []
    call = models_layers.layers_fn
    monkeypatch.setattr(models_layers, "layers_fn", lambda *given: found.append(len(given[2])) or call(*given))
    return found


def build(name: str, **keywords: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **keywords)


def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def logits_and_gradients(model: nn.Module) -> list[Tensor]:
    """In training, with the same draws every time; then the logits in evaluation."""
    torch.manual_seed(2)
    model.train().zero_grad()
    out = model(images())
    out = out if isinstance(out, Tensor) else out.logits
    F.cross_entropy(out, torch.tensor([1, 2, 3])).backward()
    with torch.no_grad():
        after = model.eval()(images())
    return [out, *(each.grad for each in model.parameters() if each.grad is not None), after]


def one_by_one(model: nn.Module) -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models_layers, "has_layers", lambda *_: False)
        return logits_and_gradients(model)


def assert_equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize(
    ("name", "keywords", "taken", "whole"),
    [
        (VIM, {}, [6, 2], [8]),
        (VIM, {"drop_path_rate": 0.5}, [6, 2], [8]),
        (VIM, {"rms_norm": False, "if_divide_out": True, "depth": 3}, [3], [3]),
        (FASTVIM, {"drop_path_rate": 0.5}, [6, 2], [8]),
        (FASTVIM, {"use_norm_after_ssm": False, "rotate_every_block": False}, [6, 2], [8]),
        (VIM, {"fusion_strategy": "upper", "fusion_layer": 4, "fusion_token": 4}, [6, 2], [8]),
        # behind the last site there is nothing left to merge
        (VIM, {"fusion_strategy": "all", "fusion_token": 30, "drop_path_rate": 0.5}, [6, 2], [8]),
        (VIM, {"fusion_strategy": "alternate", "fusion_token": 5, "num_cls_tokens": 3}, [6, 2], [8]),
        # a class token that has a place of its own in each image, and what the host chooses, are in no plan
        (VIM, LAST_TWO | {"fusion_order": "raster"}, [6, 1, 1], [6, 1, 1]),
        (VIM, LAST_TWO | {"fusion_matching": "kth"}, [6, 1, 1], [6, 1, 1]),
        (VIM, LAST_TWO | {"fusion_weighted": True}, [6, 1, 1], [6, 1, 1]),
        # between the stages, 2, 4 and 6, before which tokens are dropped; in training they are masked from then on
        (DYVM, {"pruning": "token"}, [2, *[1] * 6], [2, *[1] * 6]),
        (DYVM, {"pruning": "token", "predictor_input": "delta"}, [1] * 5, [1] * 5),
        (DYVM, {"pruning": "block"}, [], []),
        # none of these is what the operator does
        (VIM, {"fused_add_norm": False}, [], []),
        (VIM, {"init_layer_scale": 0.1}, [], []),
        (VIM, {"if_bimamba": True, "bimamba_type": "none"}, [], []),
        (FASTVIM, {"collapse_method": "max"}, [], []),
    ],
    ids=str,
)
def test_the_same_numbers(
    name: str, keywords: dict[str, Any], taken: list[int], whole: list[int], runs: list[int]
) -> None:
    """In training, some layers at a time; in evaluation all."""
    model = build(name, **keywords)
    found = logits_and_gradients(model)
    assert runs == [*taken, *whole]
    assert_equal(found, one_by_one(model))


@pytest.mark.parametrize("part", ["layers.2", "layers.2.mixer", "layers.2.norm", "layers.2.mixer.in_proj"])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_called(part: str, register: str, runs: list[int]) -> None:
    model, seen = build(VIM), []
    getattr(model.get_submodule(part), register)(lambda *_: seen.append(part))
    found = logits_and_gradients(model)
    assert (seen, runs) == ([part] * 2, [])
    model = build(VIM)
    for one, other in zip(logits_and_gradients(model), found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * one.abs().max().item())
    assert runs == [6, 2, 8]


def test_a_layer_of_another_class_is_called(runs: list[int]) -> None:
    class Halved(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.inside = layer

        def forward(self, *given: Any, **more: Any) -> tuple[Tensor, Tensor]:
            hidden, residual = self.inside(*given, **more)
            return hidden / 2, residual

    model = build(VIM)
    before = model.eval()(images())
    model.layers[3] = Halved(model.layers[3])
    assert not torch.equal(model(images()), before)
    assert runs == [6, 2]


def test_intermediates_are_seen_one_by_one(runs: list[int]) -> None:
    model = build(FASTVIM).eval()
    with torch.no_grad():
        last, maps = model.forward_intermediates(images())
        assert runs == [1] * 8
        assert len(maps) == 8
        assert torch.equal(model.forward_features(images()), last)
    assert runs == [1] * 8 + [8]


def test_checkpointed_layers_are_recomputed_one_by_one(runs: list[int]) -> None:
    model = build(VIM)
    wanted = logits_and_gradients(model)
    model.set_grad_checkpointing()
    runs.clear()
    assert_equal(logits_and_gradients(model), wanted)
    assert runs == [1] * 16 + [8], "forwards, and again for the gradients; evaluation has nothing to recompute"


def test_what_does_not_learn_costs_no_gradient(runs: list[int]) -> None:
    model = build(VIM).requires_grad_(False)
    model.head.requires_grad_(True)
    model.layers[6:].requires_grad_(True)
    F.cross_entropy(model(images()), torch.tensor([1, 2, 3])).backward()
    learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learned == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_method_that_says_nothing_is_called() -> None:
    class Watching(SpatialPooling):
        seen = ()

        def __call__(self, index, state, run):
            self.seen = (*self.seen, index)
            return super().__call__(index, state, run)

    class Silent(SiteMethod):
        pass

    model = build(FASTVIM)
    (pooling,) = model.site_methods
    watching = Watching(pooling.settings)
    model.site_methods = [Silent(None), watching]
    with torch.no_grad():
        found = model.eval()(images())
        model.site_methods = [pooling]
        assert torch.equal(found, model(images()))
    assert watching.seen == tuple(range(8))


def test_two_methods_that_merge_behind_one_site_are_called(runs: list[int]) -> None:
    """A plan has one merging."""
    model = build(VIM, **LAST_TWO)
    (merging,) = model.site_methods
    model.site_methods = [merging, merging]
    found = logits_and_gradients(model)
    assert runs == [6, 1, 1] * 2
    assert_equal(found, one_by_one(model))
    assert model.encode(model.embed(images())).num_tokens == 65 - 4 * LAST_TWO["fusion_token"]


def test_under_autocast_layers_are_called(runs: list[int]) -> None:
    model = build(VIM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(images())
    assert not runs
