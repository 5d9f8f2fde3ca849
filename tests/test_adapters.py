"""What is put on a whole model's parts by the libraries that people use: peft, torch's pruning and quantisation, hooks.

`bash scripts/test_transformers.sh` runs this with peft; without it those tests are skipped.
"""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import prune

from tests import micro_models  # noqa: F401 - their names join the registry

FAMILIES = ("vim", "fambav", "fastvim", "mambareg", "dyvm")
PROJECTIONS = ("in_proj", "x_proj", "x_proj_b", "dt_proj", "out_proj")


def made(family: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(f"{family}_micro_patch8_32").eval()


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out = model(x)
    return out if isinstance(out, torch.Tensor) else out[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [["x_proj", "in_proj"], list(PROJECTIONS)], ids=["x_proj, in_proj", "all"])
def test_lora_trains_and_merges(family: str, targets: list[str]) -> None:
    peft = pytest.importorskip("peft", reason="peft is no dependency: scripts/test_transformers.sh has it")
    model, x = made(family), images(4)
    before, frozen = logits(model, x).detach(), model.layers[0].mixer.x_proj.weight.detach().clone()
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["head"]))
    torch.testing.assert_close(logits(model, x), before)  # an adapter starts as nothing
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=3e-2)
    labels, losses = torch.arange(4), []
    for _ in range(6):
        loss = nn.functional.cross_entropy(logits(model, x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    last = [name for name, each in model.named_parameters() if "lora_B" in name and not each.any()]
    # FastVim's first layers pool what later ones see: every adapter still has moved
    assert not last
    base = model.base_model.model
    assert torch.equal(base.layers[0].mixer.x_proj.base_layer.weight, frozen)
    trained = logits(model, x).detach()
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, x), trained, rtol=1e-3, atol=1e-4)
    assert merged.layers[0].mixer.directions[0].plain
    assert not torch.equal(merged.layers[0].mixer.x_proj.weight, frozen)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", ["norm_f", "layers.2.norm"])
def test_grad_cam_by_hooks(family: str, target: str) -> None:
    """Of the last norm and of a layer's: activations and gradients make a map over the patches."""
    model, seen = made(family), {}
    norm = model.get_submodule(target)

    def keep(module: nn.Module, args: object, out: torch.Tensor) -> None:
        seen["out"] = out
        out.register_hook(lambda grad: seen.setdefault("grad", grad))

    handle = norm.register_forward_hook(keep)
    logits(model, images())[:, 3].sum().backward()
    handle.remove()
    out, grad = seen["out"], seen["grad"]
    assert out.shape == grad.shape
    cam = (grad.mean(1, keepdim=True) * out).sum(-1).relu()
    assert cam.shape[0] == 2
    assert cam.isfinite().all()
    assert grad.abs().sum() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_full_backward_hooks_see_every_kind_of_part(family: str) -> None:
    model, seen = made(family), set()
    for name, part in model.named_modules():
        if isinstance(part, (nn.Linear, nn.Conv1d, nn.LayerNorm)) or "norm" in name.rpartition(".")[2]:
            part.register_full_backward_hook(lambda *_, name=name: seen.add(name.rpartition(".")[2]))
    logits(model, images().requires_grad_()).sum().backward()
    assert {"in_proj", "conv1d", "x_proj", "dt_proj", "out_proj", "norm", "norm_f"} <= seen


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_weights_train_and_stay_pruned(family: str) -> None:
    model, x = made(family), images()
    parts = [getattr(layer.mixer, name) for layer in model.layers for name in ("x_proj", "in_proj")]
    prune.global_unstructured([(part, "weight") for part in parts], prune.L1Unstructured, amount=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = parts[0].weight_orig.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        logits(model, x).square().sum().backward()
        optimizer.step()
    assert not torch.equal(parts[0].weight_orig, before)
    out = logits(model, x).detach()
    for part in parts:
        prune.remove(part, "weight")
    torch.testing.assert_close(logits(model, x), out, rtol=1e-4, atol=1e-5)
    assert sum(int((part.weight == 0).sum()) for part in parts) >= sum(part.weight.numel() for part in parts) // 2
    assert model.layers[0].mixer.directions[0].plain


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_dynamic_quantisation(family: str) -> None:
    model, x = made(family), images()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    with torch.no_grad():
        got, wanted = logits(quantised, x), logits(model, x)
    assert not torch.equal(got, wanted)
    assert got.isfinite().all()
    if family != "dyvm":  # whose gates may fall the other way
        assert (got - wanted).abs().max() < 0.2 * wanted.abs().max() + 0.02


def test_fx_is_refused_in_a_sentence() -> None:
    with pytest.raises(TypeError, match="torch.fx cannot follow this model.*wanted features by forward_intermediates"):
        torch.fx.symbolic_trace(made("vim"))
