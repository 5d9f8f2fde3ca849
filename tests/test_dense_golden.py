"""Segmenters as published: maps, logits, losses and gradients of every golden case, by published parameter names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.dense.backbone import create_body, from_classifier
from tasks.dense.data import ade20k_labels
from tasks.dense.published import convert
from tasks.segment import (
    FCNHead,
    SegmentationLoss,
    SegmentationMeter,
    UPerNetHead,
    build_segmenter,
    slide_inference,
)
from tests.golden_rules import GOLDEN, fill, images, load, relative_error

CASES = [
    case for case in sorted(path.stem for path in GOLDEN.glob("seg_*.npz")) if load(case)[0]["kind"] == "seg_model"
]


def published_weights(config: dict[str, Any]) -> dict[str, Tensor]:
    """The release's tensors, filled by name."""
    weights = {name: fill(name, tuple(shape), config["salt"]) for name, shape in config["published"]}
    for end, value in config.get("override", {}).items():
        weights |= {name: torch.full_like(x, value) for name, x in weights.items() if name.endswith(end)}
    return weights


def load_published(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Convert, and load strictly; integer buffers are 0."""
    counts = {name: torch.zeros_like(x) for name, x in model.state_dict().items() if not x.is_floating_point()}
    model.load_state_dict(convert(weights, model) | counts, strict=True)


@pytest.fixture
def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "exponential_", lambda self, *args, **kwargs: self.fill_(1.0))


@pytest.mark.parametrize("case", CASES)
def test_segmenter(case: str, no_noise: None) -> None:
    config, arrays = load(case)
    model = build_segmenter(config["model"], config["num_classes"], drop_path_rate=0.0, **config["kwargs"])
    load_published(model, published_weights(config))
    x = images(config["input"], config["salt"])
    model.eval()
    with torch.no_grad():
        maps = model.maps(x)
        for index, one in enumerate(maps):
            assert relative_error(one, arrays[f"map{index}"]) < 2e-4, index
        assert relative_error(model.decode_head(maps), arrays["logits"]) < 2e-4
        assert relative_error(model.auxiliary_head(maps[2]), arrays["aux"]) < 2e-4
        assert model(x).shape == (len(x), config["num_classes"], *x.shape[-2:])
    if "labels" not in arrays:
        return
    model.train()
    criterion = SegmentationLoss(model.backbone.pruning)
    criterion(model(x), arrays["labels"].long()).backward()
    for part, key in dict(decode="decode", aux="aux", token_ratio="token", block_ratio="block").items():
        if f"loss_{key}" in arrays:
            assert relative_error(criterion.parts[part], arrays[f"loss_{key}"]) < 2e-4, part
    wanted = {key.removeprefix("grad:"): value for key, value in arrays.items() if key.startswith("grad:")}
    parameters = dict(model.named_parameters())
    for name, value in convert(wanted, model).items():
        assert relative_error(parameters[name].grad, value) < 1e-3, name


def test_heads() -> None:
    config, arrays = load("seg_heads")
    heads = nn.Module()
    heads.decode_head = UPerNetHead(config["in_channels"], config["channels"], config["num_classes"])
    heads.auxiliary_head = FCNHead(config["in_channels"][2], config["aux_channels"], config["num_classes"])
    load_published(heads, published_weights(config))
    heads.eval()
    maps = [images(shape, config["salt"] + i) for i, shape in enumerate(config["feature_shapes"])]
    assert relative_error(heads.decode_head(maps), arrays["logits"]) < 2e-4
    assert relative_error(heads.auxiliary_head(maps[2]), arrays["aux"]) < 2e-4


def test_start_from_a_classifier() -> None:
    config, arrays = load("seg_start")
    body = create_body(config["model"], tuple(config["img_size"]), **config["kwargs"])
    state = from_classifier(published_weights(config), body)
    assert relative_error(state["pos_embed"], arrays["pos_embed"]) < 2e-4
    body.load_state_dict(state, strict=True)


def test_sliding_windows() -> None:
    config, arrays = load("seg_slide")
    classes, salt = config["num_classes"], config["salt"]
    weight = images((classes, 3, 5, 5), salt) / 8
    logits = slide_inference(
        lambda x: F.conv2d(x, weight, padding=2), images(config["input"], salt + 1), config["crop"], config["stride"]
    )
    assert relative_error(logits, arrays["logits"]) < 2e-4


def test_mean_iou() -> None:
    config, arrays = load("seg_miou")
    meter = SegmentationMeter(config["num_classes"])
    for index in range(config["images"]):
        meter.update(arrays[f"pred{index}"], ade20k_labels(arrays[f"annotation{index}"]))
    torch.testing.assert_close(meter.iou, arrays["iou"], equal_nan=True)
    torch.testing.assert_close(meter.accuracy, arrays["acc"], equal_nan=True)
    wanted = dict(zip(("mIoU", "mAcc", "aAcc"), arrays["summary"].tolist()))
    assert meter.stats() == pytest.approx(wanted, rel=1e-12)
