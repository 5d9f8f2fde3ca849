"""What users attach to a model's modules has its effect: hooks, quantisation, pruning."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from tests import micro_models

MODELS = ("vim_micro_patch8_32", "fastvim_micro_patch8_32", "dyvm_micro_patch8_32")


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    keywords = dict(pruning_loc=(1,), token_ratio=(0.7,)) if name.startswith("dyvm") else {}
    model = micro_models.timm.create_model(name, depth=2, **keywords)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval(), torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("place", ["layers.1.norm", "norm_f"])
def test_grad_cam_on_a_norm(name: str, place: str) -> None:
    """Activations and their gradients come by hooks (Selvaraju et al. 2017), and the model is what it is without."""
    model, images = build(name)
    wanted = model(images)
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        seen["activation"] = output
        output.register_hook(lambda grad: seen.__setitem__("gradient", grad))

    handle = model.get_submodule(place).register_forward_hook(keep)
    found = model(images)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    found[:, 0].sum().backward()
    weight = seen["gradient"].mean(1, keepdim=True)
    heat = (weight * seen["activation"]).sum(-1).relu()
    assert heat.shape[0] == 2
    assert seen["gradient"].any()
    handle.remove()
    assert torch.equal(model(images), wanted)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_dynamic_quantisation(name: str) -> None:
    model, images = build(name)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    found, wanted = quantised(images), model(images)
    assert not torch.equal(found, wanted)
    assert (found - wanted).abs().max() <= 0.2 * wanted.abs().max()


def test_pruned_weights_are_what_runs() -> None:
    model, images = build("vim_micro_patch8_32")
    before = model(images)
    for layer in model.layers:
        for part in (layer.mixer.conv1d, layer.mixer.x_proj_b):
            prune.random_unstructured(part, "weight", amount=0.9)
    assert not torch.allclose(model(images), before)
    model(images).sum().backward()
    assert model.layers[0].mixer.conv1d.weight_orig.grad.any()
