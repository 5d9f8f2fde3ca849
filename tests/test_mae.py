"""Masked autoencoding: the published numbers, the masks, the decoder's pieces, names and sizes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch
from causal_conv1d import backend
from mamba_ssm.kernels.registry import backends
from mamba_ssm.modules.mamba_simple import Mamba
from torch import Tensor, nn

import checkpoints
import engine
from fusion.spatial_pooling import GridPooling, VisiblePooling
from models_mae import MaskedAutoencoder, linear_probe, mask_by_noise, sine_positions, visible_count
from tests.golden_rules import fill, fill_model, images, load, relative_error
from utils import UsageError

CASES = ("mae_encoder", "mae_fastvim", "mae_vim", "mae_published_rows")


def golden_noise(seed: int, shape: tuple[int, int]) -> Tensor:
    generator = np.random.Generator(np.random.PCG64([9002, seed]))
    return torch.from_numpy(generator.random(shape).astype(np.float32))


@pytest.fixture
def micro() -> MaskedAutoencoder:
    return timm.create_model("mae_fastvim_nano_patch4_32", img_size=(16, 24), patch_size=8, embed_dim=16, depth=2)


def fill_head(head: nn.Linear, salt: int) -> None:
    for name, parameter in head.named_parameters():
        parameter.data.copy_(fill(f"head.{name}", tuple(parameter.shape), salt))


@pytest.mark.parametrize("case", CASES)
def test_published_numbers(case: str) -> None:
    config, arrays = load(case)
    model = timm.create_model(config["model"], **config["kwargs"])
    for name in ("pos_embed", "decoder_pos_embed"):
        if f"init:{name}" in arrays:
            assert relative_error(getattr(model, name), arrays[f"init:{name}"]) < 1e-6
    fill_model(model, config["salt"]).train()
    pixels = images(config["input"], config["salt"])
    noise = golden_noise(config["noise_seed"], (len(pixels), model.patch_embed.num_patches))
    latent, mask, ids_restore = model.forward_encoder(pixels, mask_ratio=config["mask_ratio"], noise=noise)
    loss, pred, mask_again = model(pixels, mask_ratio=config["mask_ratio"], noise=noise)
    assert relative_error(latent.detach(), arrays["latent"]) < 2e-4
    assert torch.equal(mask, arrays["mask"])
    assert torch.equal(mask_again, arrays["mask"])
    assert abs(loss.item() - float(arrays["loss"])) < 2e-4 * float(arrays["loss"])
    if "pred" in arrays:
        wanted = arrays["pred"]
        chosen = arrays.get("patches")
        assert relative_error(pred.detach() if chosen is None else pred.detach()[:, chosen], wanted) < 2e-4
    (loss if config["gradient_of"] == "loss" else (latent * images(latent.shape, 77)).sum()).backward()
    parameters = dict(model.named_parameters())
    for key in (key for key in arrays if key.startswith("grad:")):
        assert relative_error(parameters[key.removeprefix("grad:")].grad, arrays[key]) < 1e-3, key


def test_published_fine_tuning_and_probe() -> None:
    config, arrays = load("mae_finetune")
    masked = fill_model(timm.create_model(config["mae_model"], **config["mae_kwargs"]), config["salt"])
    model = timm.create_model(config["model"], drop_path_rate=0.0, **config["kwargs"])
    weights, may_miss = checkpoints.adapt(masked.state_dict(), model, "mae.pth")
    checkpoints.load_strictly(model, weights, "mae.pth", config["model"], may_miss=may_miss)
    scales = engine.layer_scales(model, config["layer_decay"])
    assert [scales[name] for name in config["names"]] == pytest.approx(arrays["lr_scale"].tolist(), rel=1e-12)
    fill_head(model.head, config["salt"])
    pixels = images(config["input"], config["salt"])
    logits = model.train()(pixels)
    assert relative_error(logits.detach(), arrays["logits"]) < 2e-4
    (logits * images(logits.shape, 77)).sum().backward()
    parameters = dict(model.named_parameters())
    for key in (key for key in arrays if key.startswith("grad:")):
        assert relative_error(parameters[key.removeprefix("grad:")].grad, arrays[key]) < 1e-3, key
    probe = linear_probe(model)
    assert {name for name, parameter in probe.named_parameters() if parameter.requires_grad} == {
        "head.1.weight",
        "head.1.bias",
    }
    fill_head(probe.head[1], config["salt"])
    assert relative_error(probe.train()(pixels).detach(), arrays["probe_logits"]) < 2e-4


# --- masks, patches, positions, loss ---


def test_visible_count_is_that_of_python_floats() -> None:
    assert visible_count(100, 0.8) == 19  # 100 * (1 - 0.8) is a little under 20
    assert visible_count(196, 0.75) == 49
    assert visible_count(64, 0.0) == 64


@pytest.mark.parametrize("ratio", [1.0, -0.1, 0.99, float("nan")])
def test_ratio_that_leaves_nothing_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="mask_ratio"):
        visible_count(64, ratio)


def test_masks_follow_the_noise() -> None:
    noise = torch.tensor([[0.9, 0.1, 0.5, 0.2, 0.3], [0.5, 0.5, 0.1, 0.5, 0.5]])
    keep, mask, ids_restore = mask_by_noise(noise, 2)
    assert keep.tolist() == [[1, 3], [0, 2]]  # in raster order; of equals the first
    assert mask.tolist() == [[1, 0, 1, 0, 1], [0, 1, 0, 1, 1]]
    assert ids_restore.tolist() == [[2, 0, 3, 1, 4], [0, 2, 1, 3, 4]]


def test_patches_by_row_column_channel(micro: MaskedAutoencoder) -> None:
    pixels = images((2, 3, 16, 24), 1)
    patches = micro.patchify(pixels)
    assert patches.shape == (2, 6, 8 * 8 * 3)
    assert torch.equal(patches[1, 4].view(8, 8, 3), pixels[1, :, 8:16, 8:16].permute(1, 2, 0))
    assert torch.equal(micro.unpatchify(patches), pixels)


def test_positions_of_any_grid() -> None:
    table = sine_positions((2, 3), 8, num_cls=1)
    assert table.shape == (1, 7, 8)
    assert not table[0, 0].any()
    row, col = 1, 2
    wanted = [f(at * w) for at in (col, row) for f in (math.sin, math.cos) for w in (1.0, 0.01)]
    assert table[0, 1 + row * 3 + col].tolist() == pytest.approx(wanted, abs=1e-6)


def test_loss_counts_hidden_patches_alone(micro: MaskedAutoencoder) -> None:
    pixels = images((2, 3, 16, 24), 2)
    mask = torch.tensor([[1.0, 0, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
    target = micro.patchify(pixels)
    mean, deviation = target.mean(-1, keepdim=True), target.std(-1, keepdim=True)
    pred = torch.where(mask.bool().unsqueeze(-1), (target - mean) / deviation + 1, 1e6)
    assert micro.forward_loss(pixels, pred.bfloat16().double(), mask).dtype == torch.float32
    assert float(micro.forward_loss(pixels, pred, mask)) == pytest.approx(1, rel=1e-4)
    # a prediction of each patch's mean: the variance over n, of variance 1 over n - 1
    assert float(micro.forward_loss(pixels, torch.zeros_like(pred), mask)) == pytest.approx(191 / 192, rel=1e-4)
    micro.norm_pix_loss = False
    assert float(micro.forward_loss(pixels, target + 2, mask)) == pytest.approx(4, rel=1e-4)


def test_images_of_another_size_are_refused(micro: MaskedAutoencoder) -> None:
    with pytest.raises(ValueError, match="24"):
        micro(torch.zeros(1, 3, 24, 24))


# --- encoder ---


@pytest.mark.parametrize("family", ["fastvim", "vim"])
def test_nothing_masked_is_the_classifier(family: str) -> None:
    keywords = dict(img_size=(16, 32), patch_size=4, embed_dim=32, depth=4)
    masked = fill_model(timm.create_model(f"mae_{family}_nano_patch4_32", **keywords), 3)
    name = "fastvim_nano_patch4_32" if family == "fastvim" else "vim_nano_patch4_32"
    plain = timm.create_model(name, num_classes=0, use_norm_after_ssm=True, **keywords)
    weights, may_miss = checkpoints.adapt(masked.state_dict(), plain, "mae.pth")
    checkpoints.load_strictly(plain, weights, "mae.pth", name)
    pixels = images((2, 3, 16, 32), 5)
    wanted = plain.forward_features(pixels)
    latent, mask, ids_restore = masked.forward_encoder(pixels, 0.0)
    assert not mask.any()
    assert relative_error(latent, wanted) < 1e-6
    assert torch.equal(ids_restore, torch.arange(32).expand(2, -1))


needs_cpp = pytest.mark.skipif(backends.available("cpu") != "cpp", reason="the C++ kernels are not built")


@pytest.mark.parametrize("backend_name", [pytest.param("cpp", marks=needs_cpp), "torch"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("has_norm", [True, False])
def test_pooling_of_all_tokens_is_that_of_the_grid(backend_name: str, transposed: bool, has_norm: bool) -> None:
    mixer = Mamba(32, bimamba_type="v2", if_divide_out=True, use_norm_after_ssm=has_norm)
    x = images((2, 24, 32), 1).requires_grad_()
    positions, results = torch.arange(24).expand(2, -1), []
    with backend.use(backend_name):
        for pooling in (
            GridPooling((4, 6), (1, 0) if transposed else None),
            VisiblePooling(positions, (4, 6), transposed),
        ):
            mixer.zero_grad()
            x.grad = None
            y = mixer(x, pooling=pooling)
            y.backward(images(y.shape, 2))
            results.append([y.detach(), x.grad, *(parameter.grad.clone() for parameter in mixer.parameters())])
    for dense, visible in zip(*results):
        assert relative_error(visible, dense) < 1e-5


@needs_cpp
@pytest.mark.parametrize("transposed", [False, True])
def test_kernels_and_torch_agree_on_visible_tokens(transposed: bool) -> None:
    mixer = Mamba(40, bimamba_type="v2", if_divide_out=True, use_norm_after_ssm=True)
    noise = golden_noise(1, (3, 24))
    noise[0, :6], noise[1, ::6] = 2, 2  # a row and a column without a visible token
    pooling = VisiblePooling(mask_by_noise(noise, 9)[0], (4, 6), transposed)
    x, results = images((3, 9, 40), 1).requires_grad_(), []
    for name in ("cpp", "torch"):
        with backend.use(name):
            mixer.zero_grad()
            x.grad = None
            y = mixer(x, pooling=pooling)
            y.backward(images(y.shape, 2))
            results.append([y.detach(), x.grad, *(parameter.grad.clone() for parameter in mixer.parameters())])
            with torch.no_grad():
                assert relative_error(mixer(x, pooling=pooling), y.detach()) < 1e-5
    for fast, plain in zip(*results):
        assert relative_error(fast, plain) < 1e-4


@pytest.mark.parametrize("family", ["fastvim", "vim"])
def test_hidden_pixels_are_not_seen(family: str) -> None:
    model = fill_model(timm.create_model(f"mae_{family}_nano_patch4_32", img_size=16, embed_dim=32, depth=2), 3).eval()
    pixels, noise = images((2, 3, 16, 16), 5), golden_noise(1, (2, 16))
    noise[0, 4:8] = 2  # a row without a visible token
    latent, mask, _ = model.forward_encoder(pixels, 0.5, noise)
    hidden = model.unpatchify(mask.unsqueeze(-1).expand(-1, -1, 48)).bool()
    assert torch.equal(model.forward_encoder(pixels.masked_fill(hidden, 7.0), 0.5, noise)[0], latent)
    visible = pixels.masked_fill(~hidden, 7.0)
    assert not torch.allclose(model.forward_encoder(visible, 0.5, noise)[0], latent)


def test_masks_are_drawn_where_no_noise_is_given(micro: MaskedAutoencoder) -> None:
    pixels = images((64, 3, 16, 24), 5)
    torch.manual_seed(0)
    first, again = micro(pixels, 0.5)[2], micro(pixels, 0.5)[2]
    assert not torch.equal(first, again)
    assert first.sum(1).tolist() == [3.0] * 64
    assert (first.mean(0) - 0.5).abs().max() < 0.2
    torch.manual_seed(0)
    assert torch.equal(micro(pixels, 0.5)[2], first)


def test_recomputed_sites_give_the_same_gradients(micro: MaskedAutoencoder) -> None:
    pixels, noise, grads = images((2, 3, 16, 24), 5), golden_noise(1, (2, 6)), []
    for recompute in (False, True):
        micro.set_grad_checkpointing(recompute)
        micro.zero_grad()
        micro.train()(pixels, 0.5, noise)[0].backward()
        grads.append(micro.patch_embed.proj.weight.grad.clone())
    assert torch.equal(*grads)


@pytest.mark.parametrize("family", ["fastvim", "vim"])
def test_mixed_precision(family: str) -> None:
    model = fill_model(timm.create_model(f"mae_{family}_nano_patch4_32", img_size=16, embed_dim=32, depth=2), 3)
    pixels, noise = images((2, 3, 16, 16), 5), golden_noise(1, (2, 16))
    wanted = model(pixels, 0.5, noise)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(pixels, 0.5, noise)[0]
    loss.backward()
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=0.02)
    assert model.patch_embed.proj.weight.grad.isfinite().all()


# --- names, sizes, start ---


@pytest.mark.parametrize(
    ("name", "alias", "millions"),
    [
        ("mae_fastvim_base_patch16_224", "mae_FastVim_base_dec512d2b", 101.43),
        ("mae_fastvim_large_patch16_224", "mae_FastVim_large_dec512d2b", 343.86),
        ("mae_fastvim_huge_patch14_224", "mae_FastVim_huge_dec512d2b", 705.82),
        ("mae_vim_base_patch16_224", "mae_vim_base_dec512d2b", 101.43),
        ("mae_vim_large_patch16_224", "mae_vim_large_dec512d2b", 343.87),
        ("mae_vim_huge_patch16_224", "mae_vim_huge_dec512d2b", 706.04),
    ],
)
def test_published_sizes(name: str, alias: str, millions: float) -> None:
    with torch.device("meta"):
        model, same = timm.create_model(name), timm.create_model(alias)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == millions
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert shapes == {key: value.shape for key, value in same.state_dict().items()}
    assert ("cls_token" in shapes) == ("vim_" in name and "fastvim" not in name)
    assert not any(key.startswith("head") for key in shapes)
    assert shapes["layers.0.mixer.layernorm.weight"] == (2 * model.embed_dim,)
    assert shapes["decoder_pos_embed"] == (1, model.patch_embed.num_patches + model.num_prefix_tokens, 512)
    assert shapes["decoder_pred.weight"] == (3 * model.patch_embed.patch_size[0] ** 2, 512)
    assert model.decoder_blocks[1].mixer.layernorm is not None


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_vim_with_norm_is_what_fine_tuning_takes(size: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"vim_{size}_patch16_224_final_pool_mean_abs_pos_embed_with_midclstok_div2")
    assert model.layers[0].mixer.layernorm is not None
    assert model.class_token_positions(196) == (98,)


@torch.no_grad()
def test_start_of_training() -> None:
    torch.manual_seed(0)
    model = timm.create_model("mae_vim_nano_patch4_32", embed_dim=64, depth=6, decoder_embed_dim=128, decoder_depth=3)
    for weight in (model.patch_embed.proj.weight.flatten(1), model.decoder_embed.weight, model.decoder_pred.weight):
        bound = math.sqrt(6 / sum(weight.shape))
        assert weight.abs().max() <= bound
        assert weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    for token in (model.mask_token, model.cls_token):
        assert token.std() == pytest.approx(0.02, rel=0.4)
    for blocks, dim in ((model.layers, 64), (model.decoder_blocks, 128)):
        bound = 1 / math.sqrt(2 * dim * len(blocks))
        assert blocks[1].mixer.out_proj.weight.abs().max() == pytest.approx(bound, rel=0.01)
        assert not blocks[1].mixer.dt_proj_b.bias.any()
        assert blocks[1].mixer.dt_proj.bias.any()
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert fixed == {"pos_embed", "decoder_pos_embed"} <= model.no_weight_decay()
    assert {"mask_token", "cls_token", "decoder_blocks.0.mixer.A_log"} <= model.no_weight_decay()


@pytest.mark.parametrize(
    ("keywords", "told"),
    [
        (dict(embed_dim=30), "multiple of 4"),
        (dict(decoder_embed_dim=30), "multiple of 4"),
        (dict(num_classes=10), "no head"),
        (dict(stride=2), "stride"),
        (dict(collapse_method="max"), "mean"),
        (dict(fusion_strategy="all", fusion_token=2), "fusion_strategy"),
        (dict(pruning="token"), "pruning"),
        (dict(if_rope=True), "if_rope"),
        (dict(published_rows=True, spatial_pool=False), "published_rows"),
        (dict(flip_img_sequences_ratio=0.5), "flip_img_sequences_ratio"),
    ],
)
def test_what_a_masked_grid_cannot_have(keywords: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        timm.create_model("mae_fastvim_nano_patch4_32", **keywords)


# --- weights ---


def test_class_row_moves_to_the_middle_and_grids_are_resized() -> None:
    masked = fill_model(timm.create_model("mae_vim_nano_patch4_32", img_size=16, embed_dim=32, depth=2), 3)
    keywords = dict(img_size=16, embed_dim=32, depth=2, num_classes=5, use_norm_after_ssm=True)
    model = timm.create_model("vim_nano_patch4_32", **keywords)
    weights, may_miss = checkpoints.adapt(masked.state_dict(), model, "mae.pth")
    rows = masked.pos_embed[0]
    assert torch.equal(weights["pos_embed"][0], torch.cat([rows[1:9], rows[:1], rows[9:]]))
    checkpoints.load_strictly(model, weights, "mae.pth", "vim", may_miss=may_miss)
    larger = timm.create_model("vim_nano_patch4_32", **keywords | dict(img_size=24))
    weights, _ = checkpoints.adapt(masked.state_dict(), larger, "mae.pth")
    assert weights["pos_embed"].shape == (1, 37, 32)
    assert torch.equal(weights["pos_embed"][0, 18], rows[0])


def test_masked_weights_go_on_as_masked_weights() -> None:
    masked = fill_model(timm.create_model("mae_vim_nano_patch4_32", img_size=16, embed_dim=32, depth=2), 3)
    larger = timm.create_model("mae_vim_nano_patch4_32", img_size=24, embed_dim=32, depth=2)
    positions = larger.pos_embed.clone()
    weights, may_miss = checkpoints.adapt(masked.state_dict(), larger, "mae.pth")
    checkpoints.load_strictly(larger, weights, "mae.pth", "mae", may_miss=may_miss)
    assert torch.equal(larger.pos_embed, positions)
    assert torch.equal(larger.mask_token, masked.mask_token)


def test_published_wrapping_is_read() -> None:
    masked = timm.create_model("mae_fastvim_nano_patch4_32", embed_dim=32, depth=2)
    lightning = {"state_dict": {f"backbone.{name}": value for name, value in masked.state_dict().items()}}
    weights, origin = checkpoints.find_weights(lightning, "last.ckpt")
    assert weights.keys() == masked.state_dict().keys()
    assert "backbone." in origin


def test_another_family_is_told_apart() -> None:
    masked = timm.create_model("mae_vim_nano_patch4_32", embed_dim=32, depth=2)
    fastvim = timm.create_model("fastvim_nano_patch4_32", embed_dim=32, depth=2)
    weights, may_miss = checkpoints.adapt(masked.state_dict(), fastvim, "mae.pth")
    with pytest.raises(UsageError, match="cls_token is unknown"):
        checkpoints.load_strictly(fastvim, weights, "mae.pth", "fastvim", may_miss=may_miss)
