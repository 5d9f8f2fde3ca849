"""What timm's users expect of a model beside logits: heads and pooling, other image sizes, features, fewer layers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from torchvision.models.feature_extraction import create_feature_extractor

import models_mamba
from fusion.token_state import split_cls
from tests.golden_rules import fill_model, images

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = dict(img_size=32, patch_size=8, embed_dim=16, depth=4, num_classes=5, drop_path_rate=0.0)
NAMES = tuple(f"{family}_nano_patch4_32" for family in ("vim", "fambav", "fastvim", "mambareg"))
X = images((2, 3, 32, 32), 1)


def small(name: str, **keywords: Any) -> models_mamba.VisionMamba:
    return fill_model(timm.create_model(name, **(SMALL | keywords)), 2).eval()


@pytest.mark.parametrize("name", NAMES)
def test_no_pooling_gives_every_token(name: str) -> None:
    model = small(name)
    with torch.no_grad():
        tokens = model.forward_features(X)
        model.reset_classifier(0, "")
        assert torch.equal(model(X), tokens)
        assert torch.equal(timm_copy(name, model, num_classes=0, global_pool="")(X), tokens)
        model.reset_classifier(7)
        assert model.global_pool == ""
        assert model(X).shape == (2, tokens.shape[1], 7)


def timm_copy(name: str, model: torch.nn.Module, **keywords: Any) -> models_mamba.VisionMamba:
    other = timm.create_model(name, **(SMALL | keywords)).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("name", NAMES)
def test_average_pooling_reads_the_patches(name: str) -> None:
    model = small(name, global_pool="avg")
    assert model.head_hidden_size == model.num_features == 16
    with torch.no_grad():
        tokens = model.forward_features(X)
        mean = tokens[:, model.num_prefix_tokens :].mean(1)
        torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), mean)
        torch.testing.assert_close(model(X), model.head(mean))
    assert "neck.weight" not in model.state_dict()


@pytest.mark.parametrize("name", NAMES)
def test_token_pooling_comes_back(name: str) -> None:
    model = small(name)
    with torch.no_grad():
        before = model(X, return_features=True)
        own = "avg" if name.startswith("fastvim") else "token"
        model.reset_classifier(5, own)
        torch.testing.assert_close(model(X, return_features=True), before)
        model.reset_classifier(5, "avg")
        model.reset_classifier(5, own)
        features = model(X, return_features=True)
        if name.startswith("mambareg"):  # without a neck
            assert features.shape == (2, 4 * 16) == (2, model.head_hidden_size)
        else:
            torch.testing.assert_close(features, before)
        assert model(X).shape == (2, 5)


@pytest.mark.parametrize(("name", "pool"), [("vim_nano_patch4_32", "max"), ("fastvim_nano_patch4_32", "token")])
def test_other_pooling_is_refused(name: str, pool: str) -> None:
    with pytest.raises(ValueError, match=f"global_pool is '{pool}'"):
        timm.create_model(name, global_pool=pool)
    with pytest.raises(ValueError, match="reads its class token"):
        small(name).reset_classifier(5, pool)


@pytest.mark.parametrize("name", NAMES)
def test_a_new_image_size_is_the_model_of_that_size(name: str) -> None:
    model, size = small(name), (40, 24)
    model.set_input_size(size)
    x = images((2, 3, *size), 1)
    made = timm.create_model(name, **(SMALL | dict(img_size=size))).eval()
    assert made.pos_embed.shape == model.pos_embed.shape == (1, 15 + (name[:3] in ("vim", "fam")), 16)
    made.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(x), made(x))
        assert [tuple(m.shape) for m in model.forward_intermediates(x, 1, intermediates_only=True)] == [(2, 16, 5, 3)]
    if not name.startswith("fastvim"):
        with pytest.raises(ValueError, match="this model wanted 40 x 24"):
            model(X)


def test_a_new_image_size_reaches_rotary_positions_and_methods() -> None:
    model = small("vim_nano_patch4_32", if_rope=True)
    model.set_input_size(img_size=48, patch_size=model.patch_embed.patch_size)
    with pytest.raises(ValueError, match="patch_size is 4; wanted"):
        model.set_input_size(patch_size=4)
    made = timm.create_model("vim_nano_patch4_32", **(SMALL | dict(img_size=48)), if_rope=True)
    assert torch.equal(model.rope.freqs_cos, made.rope.freqs_cos)
    merging = small("vim_nano_patch4_32", fusion_strategy="all", fusion_token=3)
    merging.set_input_size(48)
    assert merging.site_methods[0].schedule == (34, 31, 28, 25)
    pruned = small("dyvm_nano_patch4_32", pruning_loc=(1, 2, 3))
    names = pruned.state_dict().keys()
    pruned.set_input_size(48)
    assert pruned.state_dict().keys() == names
    assert pruned.forward_with_decisions(images((1, 3, 48, 48), 1)).tokens.shape[1] == int(0.7**3 * 36)


@pytest.mark.parametrize("name", NAMES)
def test_intermediate_layers(name: str) -> None:
    model = small(name)
    sites = 2 if name.startswith("fambav") else 4
    assert len(model.feature_info) == model.num_sites == sites
    with torch.no_grad():
        (last,) = model.get_intermediate_layers(X)
        assert last.shape == (2, 16, 16)
        maps = model.get_intermediate_layers(X, [0, 1], reshape=True, norm=True)
        assert [tuple(m.shape) for m in maps] == [(2, 16, 4, 4)] * 2
        pairs = model.get_intermediate_layers(X, 2, return_prefix_tokens=True, norm=True)
        assert pairs[-1][1].shape == (2, model.num_prefix_tokens, 16)
        final = model.forward_features(X)
        torch.testing.assert_close(torch.cat(pairs[-1][::-1], 1), final)
        found = model.forward_intermediates(X, 1, return_prefix_tokens=True, norm=True, output_dict=True)
    assert sorted(found) == ["image_features", "image_intermediates", "image_intermediates_prefix"]
    assert torch.equal(found["image_features"], final)
    torch.testing.assert_close(found["image_intermediates"][0], pairs[-1][0].mT.unflatten(2, (4, 4)))
    only = model.forward_intermediates(X, 1, intermediates_only=True, output_dict=True)
    assert sorted(only) == ["image_intermediates"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prune_norm", [False, True])
def test_fewer_layers_give_the_same_intermediates(name: str, prune_norm: bool) -> None:
    model = small(name)
    with torch.no_grad():
        wanted = model.forward_intermediates(X, [0], intermediates_only=True)[0]
        tokens = wanted.flatten(2).mT
        assert model.prune_intermediate_layers([0], prune_norm=prune_norm) == [0]
        assert len(model.layers) == model.depth == (2 if name.startswith("fambav") else 1)
        torch.testing.assert_close(model.forward_intermediates(X, intermediates_only=True)[0], wanted)
        out = model(X)
        assert out.shape == (2, 16 + model.num_prefix_tokens, 16)
        if prune_norm:
            torch.testing.assert_close(out[:, model.num_prefix_tokens :], tokens)


def test_fx_is_refused_in_words_and_features_come_by_timm_s_own_way() -> None:
    with pytest.raises(TypeError, match="torch.fx cannot follow this model.*wanted features by forward_intermediates"):
        create_feature_extractor(small("vim_nano_patch4_32"), ["layers.3"])
    model = timm.create_model("vim_nano_patch4_32", features_only=True, out_indices=(1, 3), **SMALL).eval()
    with torch.no_grad():
        assert [tuple(each.shape) for each in model(X)] == [(2, 16, 4, 4)] * 2


def test_learned_pruning_keeps_its_layers() -> None:
    with pytest.raises(ValueError, match="wanted a model without it"):
        small("dyvm_nano_patch4_32", pruning_loc=(1, 2, 3)).prune_intermediate_layers([0])


@pytest.mark.parametrize("name", [*NAMES, "dyvm_nano_patch4_32"])
def test_copies_keep_what_does_not_decay(name: str) -> None:
    model = small(name, **(dict(pruning_loc=(1, 2, 3)) if name.startswith("dyvm") else {}))
    names = model.no_weight_decay()
    assert "layers.0.mixer.A_log" in names
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.no_weight_decay() == names
        with torch.no_grad():
            assert torch.equal(copied(X), model(X))


@pytest.mark.parametrize("name", [*NAMES, "dyvm_nano_patch4_32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_new_head_has_the_model_s_dtype(name: str, dtype: torch.dtype) -> None:
    model = small(name, **(dict(pruning_loc=(1, 2, 3)) if name.startswith("dyvm") else {})).to(dtype)
    model.reset_classifier(3)
    assert model.head.weight.dtype == dtype
    with torch.no_grad():
        assert model(X.to(dtype)).isfinite().all()


def test_prefix_tokens_of_features_are_the_registers() -> None:
    model = small("mambareg_nano_patch4_32")
    with torch.no_grad():
        state = model.encode(model.embed(X))
        classes, patches = split_cls(state.hidden + state.residual, state.cls)
        tokens = model.forward_features(X)
    torch.testing.assert_close(tokens, model.norm_f(torch.cat([classes, patches], 1)))


@pytest.mark.parametrize(("name", "keywords"), [*((name, {}) for name in NAMES), (NAMES[0], {"if_rope": True})])
def test_a_model_made_without_memory_starts_as_any(name: str, keywords: dict[str, Any]) -> None:
    keywords = keywords | SMALL | {"depth": 2}
    with torch.device("meta"):
        model = timm.create_model(name, **keywords)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(torch.nan)
    model.init_weights()
    other = timm.create_model(name, **keywords)
    assert model(X).isfinite().all()
    for (key, tensor), (_, wanted) in zip(model.state_dict().items(), other.state_dict().items()):
        # what is drawn is drawn as widely
        torch.testing.assert_close(tensor.std(), wanted.std(), rtol=0.7, atol=1e-6, msg=key, equal_nan=True)
        if not tensor.std() or key.endswith(("A_log", "A_b_log")):
            assert torch.equal(tensor, wanted), key
    for (_, tensor), (_, wanted) in zip(model.named_buffers(), other.named_buffers()):
        assert torch.equal(tensor, wanted)


def test_device_and_dtype_are_keywords() -> None:
    for name in (NAMES[0], "mae_fastvim_base_patch16_224"):
        model = timm.create_model(name, device="meta", dtype=torch.bfloat16)
        assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    features = timm.create_model(NAMES[0], **SMALL, features_only=True, dtype=torch.float64)
    assert features(X.double())[-1].dtype == torch.float64


def test_scripting_is_refused_in_words() -> None:
    with pytest.raises(TypeError, match="torch.jit.script cannot read this model.* wanted torch.jit.trace or torch.ex"):
        torch.jit.script(small(NAMES[0]))


def test_grids_of_other_images_by_timm_s_names() -> None:
    embed = small("vim_nano_patch4_32", stride=4).patch_embed
    assert embed.dynamic_feat_size((32, 40)) == embed.grid_of(32, 40) == (7, 9)
    assert embed.feat_ratio() == 4
    assert embed.feat_ratio(as_scalar=False) == (4, 4)
