"""Every published model case: logits and gradients as the published systems computed them."""

from __future__ import annotations

import pytest
import timm
import torch

import models_mamba  # noqa: F401 (registers the models)
from tests.golden_rules import GOLDEN, fill_model, images, load, relative_error

PATTERNS = ("vim_*", "fambav_*", "fastvim_*", "mambareg_*", "channel_*")
CASES = sorted(path.stem for pattern in PATTERNS for path in GOLDEN.glob(f"{pattern}.npz"))


ON_A_GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)


@pytest.mark.parametrize("device", ["cpu", ON_A_GPU])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # convolutions would keep ten bits of their inputs
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    config, arrays = load(case)
    model = timm.create_model(config["model"], drop_path_rate=0.0, **config["kwargs"])
    fill_model(model, config["salt"]).train(config["mode"] == "train").to(device)
    channels = config.get("channels")
    given = {} if channels is None else {"channels": channels}
    logits = model(images(config["input"], config["salt"]).to(device), **given)
    assert relative_error(logits.detach().cpu(), arrays["logits"]) < 2e-4
    (logits * images(logits.shape, 77).to(device)).sum().backward()
    parameters = dict(model.named_parameters())
    for key in (key for key in arrays if key.startswith("grad:")):
        assert relative_error(parameters[key.removeprefix("grad:")].grad.cpu(), arrays[key]) < 1e-3, key
