"""The registry, the state-dict layout of published checkpoints, timm's interface, and every constructor option."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import timm
import torch

import models_mamba
from embeddings import resize_pos_embed
from fusion.token_state import ClassTokens, TokenState, join_cls, split_cls
from tests.conftest import ROOT

SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_classes=5, drop_path_rate=0.0)
NAMES = timm.list_models(module="models_mamba")
LONG_TINY = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"


def registers_of(name: str) -> tuple[int, int]:
    """How many registers the MambaReg of that name has, and by what they are narrowed; 0 for other names."""
    sizes = {"tiny": (12, 1), "small": (12, 2), "base": (12, 4), "large": (16, 8), "nano": (4, 2)}
    return next((sizes[size] for size in sizes if f"mambar_{size}" in name or f"mambareg_{size}" in name), (0, 1))


def published_layout(name: str, model: models_mamba.VisionMamba) -> dict[str, tuple[int, ...]]:
    """Keys and shapes as the published systems write them, from the sizes alone."""
    dim, classes = model.embed_dim, model.num_classes
    inner, rank, state = 2 * dim, math.ceil(dim / 16), 16
    patch = model.patch_embed.patch_size
    fast, channels = "fast" in name or "noclstok" in name, "channelvim" in name
    registers, reduce = registers_of(name)
    layout = {
        "pos_embed": (1, model.patch_embed.num_patches + (not fast and not registers and not channels), dim),
        "patch_embed.proj.weight": (dim, 1, 1, *patch) if channels else (dim, 3, *patch),
        "patch_embed.proj.bias": (dim,),
        "head.weight": (classes, dim),
        "head.bias": (classes,),
        "norm_f.weight": (dim,),
    }
    if channels:
        layout["patch_embed.channel_embed.weight"] = (5 if "nano" in name else 8, dim)
    if registers:
        layout["cls_token"] = layout["pos_embed_cls"] = (1, registers, dim)
        layout["head.weight"] = (classes, registers * dim // reduce)
        if reduce > 1:
            layout |= {"neck.weight": (dim // reduce, dim), "norm_neck.weight": (registers * dim // reduce,)}
    elif not fast:
        layout["cls_token"] = (1, 1, dim)
    for i in range(model.depth):
        layer = {"norm.weight": (dim,), "mixer.in_proj.weight": (2 * inner, dim), "mixer.out_proj.weight": (dim, inner)}
        for b in ("", "_b"):
            layer |= {
                f"mixer.A{b}_log": (inner, state),
                f"mixer.D{b}": (inner,),
                f"mixer.conv1d{b}.weight": (inner, 1, 4),
                f"mixer.conv1d{b}.bias": (inner,),
                f"mixer.x_proj{b}.weight": (rank + 2 * state, inner),
                f"mixer.dt_proj{b}.weight": (inner, rank),
                f"mixer.dt_proj{b}.bias": (inner,),
            }
        if (
            fast
            or channels
            or name.endswith("_final_pool_mean_abs_pos_embed_with_midclstok_div2")
            and "bimambav2" not in name
        ):
            layer |= {"mixer.layernorm.weight": (inner,), "mixer.layernorm.bias": (inner,)}
        if "dyvm" in name:
            layer |= {"mixer.block_head.weight": (2, 2 * inner), "mixer.block_head.bias": (2,)}
        layout |= {f"layers.{i}.{key}": shape for key, shape in layer.items()}
    if "dyvm" in name:
        for j in range(3):
            linears = {"in_conv.1": (dim, dim), "out_conv.0": (dim // 2, dim), "out_conv.2": (dim // 4, dim // 2)}
            linears["out_conv.4"] = (2, dim // 4)
            layout[f"score_predictors.{j}.in_conv.0.weight"] = layout[f"score_predictors.{j}.in_conv.0.bias"] = (dim,)
            for key, shape in linears.items():
                layout[f"score_predictors.{j}.{key}.weight"] = shape
                layout[f"score_predictors.{j}.{key}.bias"] = shape[:1]
    return layout


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_layout(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    got = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert got == published_layout(name, model)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("vim_tiny_patch16_224", 7.148),
        (LONG_TINY, 7.148),
        ("vim_small_patch16_224", 25.797),
        ("vim_base_patch16_224", 97.598),
        ("dyvm_tiny_patch16_224", 7.37),
        ("dyvm_small_patch16_224", 26.6),
        ("dyvm_base_patch16_224", 100.6),
    ],
)
def test_parameter_counts(name: str, millions: float) -> None:
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
    digits = 3 if "vim_" in name and "dyvm" not in name else 1
    assert count / 1e6 == pytest.approx(millions, abs=6 * 10 ** -(digits + 1))


@pytest.mark.parametrize("name", ["vim_nano_patch4_32", "fambav_nano_patch4_32", "videomamba_tiny_patch16_224"])
def test_timm_interface(name: str) -> None:
    model = timm.create_model(name, **SMALL).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (2, 17, 32)
        torch.testing.assert_close(model.forward_head(features), model(x))
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), model(x, return_features=True))
        maps = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
        assert [tuple(m.shape) for m in maps] == [(2, 32, 4, 4)] * 2
    assert model.get_classifier() is model.head
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    assert model.default_cfg["first_conv"] == "patch_embed.proj"
    with pytest.raises(ValueError, match="reads its class token"):
        model.reset_classifier(3, global_pool="max")


def test_no_weight_decay_holds_what_the_papers_name() -> None:
    model = timm.create_model("vim_nano_patch4_32")
    names = model.no_weight_decay()
    assert {"pos_embed", "cls_token", "layers.0.mixer.A_log", "layers.7.mixer.A_b_log", "layers.3.mixer.D_b"} <= names
    assert not any(key.endswith(("proj.weight", "head.weight")) for key in names)


def test_features_only_gives_maps() -> None:
    model = timm.create_model("vim_nano_patch4_32", features_only=True, out_indices=(1, 3))
    assert [tuple(m.shape) for m in model(torch.randn(1, 3, 32, 32))] == [(1, 64, 8, 8)] * 2


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vim_nano_patch4_32", depth=4)
    mixer = model.layers[1].mixer
    torch.testing.assert_close(mixer.A_b_log[5].exp(), torch.arange(1.0, 17.0))
    dt = torch.nn.functional.softplus(mixer.dt_proj.bias.detach())
    assert dt.min() > 0.9e-3
    assert dt.max() < 0.101
    assert mixer.dt_proj_b.bias.detach().abs().max() == 0
    assert model.patch_embed.proj.bias.abs().max() == 0
    assert model.head.weight.detach().std() == pytest.approx(0.02, rel=0.2)
    # Kaiming-uniform with a = sqrt(5) is uniform within 1 / sqrt(fan_in), here over sqrt(depth)
    assert mixer.out_proj.weight.detach().abs().max() == pytest.approx(128**-0.5 / 2, rel=0.05)


def test_drop_path_rates() -> None:
    model = timm.create_model("vim_nano_patch4_32", depth=4, drop_path_rate=0.3)
    rates = [getattr(layer.drop_path, "drop_prob", 0.0) for layer in model.layers]
    assert rates == pytest.approx([0, 0, 0.1, 0.2])
    assert model.drop_path.drop_prob == 0.3


OPTIONS = {
    "rope": dict(if_rope=True, if_rope_residual=True),
    "flip": dict(flip_img_sequences_ratio=1.0, if_rope=True),
    "v1": dict(if_bimamba=True),
    "forward only": dict(bimamba_type="none"),
    "layer scale": dict(init_layer_scale=0.1),
    "LayerNorm": dict(rms_norm=False),
    "unfused": dict(fused_add_norm=False),
    "residual in x's dtype": dict(residual_in_fp32=False),
    "double class token": dict(use_middle_cls_token=False, use_double_cls_token=True),
    "head class token": dict(use_middle_cls_token=False),
    "no class token": dict(use_middle_cls_token=False, if_cls_token=False),
    "last token": dict(use_middle_cls_token=False, if_cls_token=False, final_pool_type="none"),
    "no position embedding": dict(if_abs_pos_embed=False),
    "undivided": dict(if_devide_out=False),
    "paired mean": dict(if_bidirectional=True, pair_residual="mean"),
    "grey images": dict(in_chans=1),
    "dropout": dict(drop_rate=0.1),
    "ssm_cfg": dict(ssm_cfg=dict(d_conv=3, expand=1)),
    "rectangular": dict(img_size=(32, 48)),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_train(option: str) -> None:
    keywords = SMALL | OPTIONS[option]
    model = timm.create_model("vim_nano_patch4_32", **keywords).train()
    size = keywords["img_size"]
    x = torch.randn(2, keywords.get("in_chans", 3), *((size, size) if isinstance(size, int) else size))
    logits = model(x)
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert not unused


def test_fused_and_plain_norm_agree() -> None:
    plain = timm.create_model("vim_nano_patch4_32", **SMALL, fused_add_norm=False).eval()
    fused = timm.create_model("vim_nano_patch4_32", **SMALL, fused_add_norm=True).eval()
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(plain(x), fused(x), rtol=1e-4, atol=1e-5)


def test_flip_of_a_two_direction_model_swaps_the_directions() -> None:
    """A reversed sequence through swapped directions is the same model: checks reading position, conv and scan."""
    model = timm.create_model("vim_nano_patch4_32", **SMALL, if_rope=True, flip_img_sequences_ratio=1.0)
    x = torch.randn(2, 3, 32, 32)
    forward = model.eval()(x)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    swapped = dict(state)
    for key in state:
        twin = key.replace("A_log", "A_b_log").replace(".D", ".D_b")
        for part in ("conv1d", "x_proj", "dt_proj"):
            twin = twin.replace(f"{part}.", f"{part}_b.")
        if twin != key and twin in state:
            swapped[key], swapped[twin] = state[twin], state[key]
    model.load_state_dict(swapped)
    torch.testing.assert_close(model.train()(x), forward, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("forward_option", ["if_random_cls_token_position", "if_random_token_rank"])
def test_random_orders_move_the_reading_position(forward_option: str) -> None:
    model = timm.create_model("vim_nano_patch4_32", **SMALL).eval()
    with torch.no_grad():
        model.cls_token.fill_(7.0)
        model.pos_embed.zero_()
    torch.manual_seed(1)
    position = {f"random_{'cls_position' if 'cls' in forward_option else 'token_rank'}": True}
    seen = set()
    for _ in range(8):
        state = model.embed(torch.randn(1, 3, 32, 32), **position)
        seen.add(state.cls.index[0])
        assert bool((state.hidden[:, state.cls.index[0]] == 7.0).all())
    assert len(seen) > 2
    assert model(torch.randn(1, 3, 32, 32), **{forward_option: True}).shape == (1, 5)


@pytest.mark.parametrize(
    "cls_index",
    [(), (0,), (3,), (6,), (0, 6), torch.tensor([[0], [3], [6]]), torch.tensor([[0, 6], [1, 3], [2, 5]])],
    ids=str,
)
def test_split_and_join_are_inverse(cls_index: tuple[int, ...] | torch.Tensor) -> None:
    x = torch.randn(3, 7, 2)
    classes, patches = split_cls(x, cls_index)
    torch.testing.assert_close(join_cls(classes, patches, cls_index), x)
    assert classes.shape[1] + patches.shape[1] == 7
    assert TokenState(x, cls=ClassTokens.at(cls_index)).num_cls == classes.shape[1]


def test_resized_positions_keep_the_middle_row() -> None:
    """The patch rows are resized as an image, and the class token's row is moved to its new place, not mixed in."""
    table = torch.randn(1, 2, 8, 8)
    classes = torch.full((1, 1, 2), 99.0)

    def middle(num_patches: int) -> tuple[int, ...]:
        return (num_patches // 2,)

    pos_embed = join_cls(classes, table.flatten(2).transpose(1, 2), middle(64))
    resized = resize_pos_embed(pos_embed, (8, 8), (12, 16), middle)
    moved, patches = split_cls(resized, middle(192))
    assert bool((moved == 99.0).all())
    wanted = torch.nn.functional.interpolate(table, size=(12, 16), mode="bicubic")
    torch.testing.assert_close(patches.transpose(1, 2).unflatten(2, (12, 16)), wanted)
    with pytest.raises(ValueError, match="wanted those of a grid"):
        resize_pos_embed(pos_embed, (7, 8), (12, 16), middle)


def test_checkpoints_of_another_size_load_through_timm(tmp_path) -> None:
    small = timm.create_model("vim_nano_patch4_32", num_classes=5)
    torch.save(small.state_dict(), tmp_path / "small.pth")
    overlay = dict(file=str(tmp_path / "small.pth"), num_classes=5)
    large = timm.create_model("vim_nano_patch4_32", True, num_classes=5, img_size=48, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(large.pos_embed[:, 72], small.pos_embed[:, 32])


def test_gradient_checkpointing_changes_nothing() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vim_nano_patch4_32", **SMALL).train()
    x = torch.randn(2, 3, 32, 32)
    model(x).square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], msg=name)


def test_compiles_without_a_graph_break() -> None:
    model = timm.create_model("vim_nano_patch4_32", **SMALL)
    x = torch.randn(2, 3, 32, 32)
    wanted = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    logits = compiled(x)
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
    logits.sum().backward()
    assert torch.isfinite(model.layers[0].mixer.A_log.grad).all()


def test_compiles_in_a_process_that_has_run_nothing() -> None:
    """There the compiler meets kernels that are not loaded yet."""
    code = """
import timm, torch, models_mamba
for name, keywords in (("vim", dict(fusion_strategy="all", fusion_token=9)), ("fastvim", {})):
    model = timm.create_model(f"{name}_nano_patch4_32", depth=2, **keywords)
    torch.compile(model, backend="aot_eager", fullgraph=True)(torch.randn(1, 3, 32, 32)).sum().backward()
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


BAD = {
    "another image size": (dict(), (1, 3, 40, 40), "40 x 40; this model wanted 32 x 32"),
    "channels": (dict(), (1, 1, 32, 32), r"wanted \(batch, 3, height, width\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_images(case: str) -> None:
    keywords, shape, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        timm.create_model("vim_nano_patch4_32", **SMALL, **keywords)(torch.randn(shape))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (dict(if_bidirectional=True, depth=3), "wanted an even number"),
        (dict(pair_residual="median"), "wanted 'sum' or 'mean'"),
        (dict(img_size=4), "wanted at least one patch"),
        (dict(final_pool_type="max"), "wanted 'none' or 'mean'"),
        (dict(bimamba_type="v3"), "wanted 'none', 'v1' or 'v2'"),
        (dict(fusion_strategy="middle"), "wanted one of no, all"),
        (dict(if_rope=True, fusion_strategy="all", fusion_token=2), "without token merging"),
    ],
)
def test_bad_keywords(keywords: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model("vim_nano_patch4_32", **(SMALL | keywords))


def test_unknown_keyword() -> None:
    with pytest.raises(TypeError, match="does not know fusion_strength"):
        timm.create_model("vim_nano_patch4_32", fusion_strength=3)
