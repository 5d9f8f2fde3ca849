"""Detectors against what the released ones computed: proposals, detections, losses and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from tasks.detect.cascade import CascadeRoIHeads
from tasks.detect.kinds import KINDS
from tasks.detect.proposals import ProposalNetwork
from tasks.detect.published import detector_name
from tasks.detect.regions import paste_masks
from tests.golden_rules import fill, images, load, relative_error


def published_weights(config: dict[str, Any]) -> dict[str, Tensor]:
    return {name: fill(name, tuple(shape), config["salt"]) for name, shape in config["published"]}


def test_rpn():
    pass


@pytest.mark.parametrize("case", ["det_rpn_vim", "det_rpn_fastvim"])
def test_proposals(case: str) -> None:
    config, arrays = load(case)
    kind, kw = KINDS[config["kwargs"]["heads"]], config["kwargs"]
    rpn = ProposalNetwork(kind, 16, kw["rpn_pre_nms_top_n_test"], kw["rpn_post_nms_top_n_test"]).eval()
    w = {detector_name(n): v for n, v in published_weights(config).items()}
    rpn.load_state_dict({n.removeprefix("rpn."): v for n, v in w.items() if n.startswith("rpn.")})
    feats = {f"p{i + 2}": images(s, config["salt"] + 100 + i) for i, s in enumerate(config["feature_shapes"])}
    il = ImageList(torch.zeros(2, 3, 128, 128), [tuple(s) for s in config["image_sizes"]])
    boxes, _ = rpn(il, feats)
    for i in range(2):
        print(case, i, boxes[i].shape, relative_error(boxes[i], arrays[f"proposals{i}"]))
    targets = [{"boxes": arrays[f"gt_boxes{i}"], "labels": arrays[f"gt_labels{i}"] + 1} for i in range(2)]
    rpn.train()
    rpn.fg_bg_sampler.batch_size_per_image = 10**6
    _, losses = rpn(il, feats, targets)
    for k, v in losses.items():
        print(k, float(v), float(arrays[k]))


def ellipses(boxes, size):
    h, w = size
    y, x = torch.arange(h)[:, None] + 0.5, torch.arange(w)[None] + 0.5
    out = []
    for x0, y0, x1, y1 in boxes.tolist():
        out.append(((x - (x0 + x1) / 2) / ((x1 - x0) / 2)) ** 2 + ((y - (y0 + y1) / 2) / ((y1 - y0) / 2)) ** 2 <= 1)
    return torch.stack(out).to(torch.uint8)


@pytest.mark.parametrize("case", ["det_cascade_vim", "det_cascade_fastvim"])
def test_cascade(case: str) -> None:
    config, arrays = load(case)
    kind = KINDS[config["kwargs"]["heads"]]
    heads = CascadeRoIHeads(kind, 16, 5, 32).eval()
    w = {detector_name(n): v for n, v in published_weights(config).items()}
    heads.load_state_dict({n.removeprefix("roi_heads."): v for n, v in w.items() if n.startswith("roi_heads.")})
    feats = {f"p{i + 2}": images(s, config["salt"] + 100 + i) for i, s in enumerate(config["feature_shapes"])}
    sizes = [tuple(s) for s in config["image_sizes"]]
    with torch.no_grad():
        found, _ = heads(feats, [arrays[f"proposals{i}"] for i in range(2)], sizes)
    for i in range(2):
        print(case, i, found[i]["boxes"].shape)
        print((found[i]["labels"] == arrays[f"labels{i}"]).float().mean())
        for k in ("boxes", "scores"):
            print(k, relative_error(found[i][k], arrays[f"{k}{i}"]))
        print(relative_error(found[i]["masks"][:6, 0], arrays[f"masks{i}"]))
    heads.train()
    for p in feats.values():
        p.requires_grad_()
    targets = [
        {
            "boxes": arrays[f"gt_boxes{i}"],
            "labels": arrays[f"gt_labels{i}"] + 1,
            "masks": ellipses(arrays[f"gt_boxes{i}"], sizes[i] if 0 else (128, 128)),
        }
        for i in range(2)
    ]
    _, losses = heads(feats, [arrays[f"train_proposals{i}"] for i in range(2)], sizes, targets)
    for k, v in losses.items():
        print(k, float(v), float(arrays[k]))
    sum(losses.values()).backward()
    print([feats[f"p{i}"].grad.norm().item() for i in (2, 3, 4, 5)], arrays["grad_features"])
    params = dict(heads.named_parameters())
    for k in arrays:
        if k.startswith("grad:"):
            n = detector_name(k[5:]).removeprefix("roi_heads.")
            print(n, relative_error(params[n].grad, arrays[k]))


def test_paste() -> None:
    import numpy as np

    config, arrays = load("det_paste")
    probabilities = images(config["input"], config["salt"]).sigmoid()
    pasted = paste_masks(probabilities, arrays["boxes"], tuple(config["image_size"]))
    wanted = np.unpackbits(arrays["pasted"].numpy())[: pasted.numel()].reshape(pasted.shape)
    print((pasted.numpy() != wanted).sum(), wanted.sum(), arrays["boxes"])
