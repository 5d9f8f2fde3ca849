"""Masked autoencoding: the published numbers, the masks, the decoder's pieces, names and sizes."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import checkpoints
from models_mae import linear_probe
from tests.golden_rules import fill, fill_model, images, load, relative_error

CASES = ("mae_encoder", "mae_fastvim", "mae_vim", "mae_published_rows")


def golden_noise(seed: int, shape: tuple[int, int]) -> Tensor:
    generator = np.random.Generator(np.random.PCG64([9002, seed]))
    return torch.from_numpy(generator.random(shape).astype(np.float32))


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
