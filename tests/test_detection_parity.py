"""Detectors against what the released ones computed: pyramids, proposals, detections, losses and gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

import models_mamba  # noqa: F401 (registers the models)
from tasks.dense.published import convert
from tasks.detect import Detector, build_detector, paste_masks
from tests.golden_rules import fill, images, load, relative_error

KINDS = ("vim", "fastvim")


def build(config: dict[str, Any]) -> Detector:
    """The detector of a case, with the release's weights under this project's names, in eval mode."""
    model = build_detector(config["model"], config["num_classes"], drop_path_rate=0.0, **config["kwargs"])
    released = {name: fill(name, tuple(shape), config["salt"]) for name, shape in config["published"]}
    model.load_state_dict(convert(released, model))
    return model.eval()


def feature_maps(config: dict[str, Any]) -> dict[str, Tensor]:
    shapes = config["feature_shapes"]
    return {f"p{i + 2}": images(shape, config["salt"] + 100 + i) for i, shape in enumerate(shapes)}


def ellipses(boxes: Tensor, size: int) -> Tensor:
    """Masks (N, size, size) of the ellipses inside boxes (N, 4)."""
    middle, radius = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    at = torch.arange(size) + 0.5
    x, y = ((at - middle[:, [axis]]) / radius[:, [axis]] for axis in (0, 1))
    return (x[:, None] ** 2 + y[:, :, None] ** 2 <= 1).to(torch.uint8)


def truth(arrays: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    return [
        {
            "boxes": arrays[f"gt_boxes{i}"],
            "labels": arrays[f"gt_labels{i}"] + 1,
            "masks": ellipses(arrays[f"gt_boxes{i}"], size),
        }
        for i in range(2)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_pyramid(kind: str) -> None:
    config, arrays = load(f"det_pyramid_{kind}")
    with torch.no_grad():
        maps = build(config).backbone(images(config["input"], config["salt"]))
    assert list(maps) == ["p2", "p3", "p4", "p5", "p6"]
    for name, values in maps.items():
        assert relative_error(values, arrays[name]) < 2e-4, name


@pytest.mark.parametrize("kind", KINDS)
def test_proposals(kind: str) -> None:
    config, arrays = load(f"det_rpn_{kind}")
    rpn, features = build(config).rpn, feature_maps(config)
    shown = ImageList(torch.zeros(2, 3, 128, 128), [tuple(size) for size in config["image_sizes"]])
    with torch.no_grad():
        boxes, _ = rpn(shown, features)
    for i in range(2):
        assert relative_error(boxes[i], arrays[f"proposals{i}"]) < 2e-4
    rpn.train()
    rpn.fg_bg_sampler.batch_size_per_image = 10**6  # every anchor
    _, losses = rpn(shown, features, truth(arrays, 128))
    for name in ("loss_objectness", "loss_rpn_box_reg"):
        assert relative_error(losses[name].detach(), arrays[name]) < 2e-4, name


@pytest.mark.parametrize("kind", KINDS)
def test_cascade(kind: str) -> None:
    config, arrays = load(f"det_cascade_{kind}")
    model, features = build(config), feature_maps(config)
    sizes = [tuple(size) for size in config["image_sizes"]]
    with torch.no_grad():
        found, _ = model.roi_heads(features, [arrays["proposals0"], arrays["proposals1"]], sizes)
    for i, each in enumerate(found):
        assert torch.equal(each["labels"], arrays[f"labels{i}"])
        for got, name in ((each["boxes"], "boxes"), (each["scores"], "scores"), (each["masks"][:6, 0], "masks")):
            assert relative_error(got, arrays[f"{name}{i}"]) < 2e-4, name

    model.roi_heads.train()
    for values in features.values():
        values.requires_grad_()
    proposals = [arrays["train_proposals0"], arrays["train_proposals1"]]
    _, losses = model.roi_heads(features, proposals, sizes, truth(arrays, 128))
    assert set(losses) == {name for name in arrays if name.startswith("loss_")}
    for name, loss in losses.items():
        assert relative_error(loss.detach(), arrays[name]) < 2e-4, name
    sum(losses.values()).backward()
    norms = torch.stack([features[name].grad.norm() for name in ("p2", "p3", "p4", "p5")])
    assert relative_error(norms, arrays["grad_features"]) < 1e-3
    gradients = {name.removeprefix("grad:"): value for name, value in arrays.items() if name.startswith("grad:")}
    parameters = dict(model.named_parameters())
    for name, wanted in convert(gradients, model).items():
        assert relative_error(parameters[name].grad, wanted) < 1e-3, name


def test_paste() -> None:
    config, arrays = load("det_paste")
    masks = images(config["input"], config["salt"]).sigmoid()
    pasted = paste_masks(masks, arrays["boxes"], tuple(config["image_size"]))
    wanted = np.unpackbits(arrays["pasted"].numpy())[: pasted.numel()]
    assert pasted.shape == tuple(arrays["shape"].tolist())
    assert np.array_equal(pasted.flatten().numpy(), wanted)
