"""Detectors as models: torchvision's calling convention, what training must survive, other backbones, anchors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

import models_mamba  # noqa: F401 (registers the models)
from benchmarks import detection
from tasks.detect import Detector, build_detector
from tasks.detect.proposals import Anchors
from tasks.detect.regions import AlignedPool, box_levels, pool_masks
from tests import micro_models  # noqa: F401 (registers the micro models)

SMALL = dict(img_size=64, out_channels=8, fc_channels=16, box_batch_size_per_image=32, rpn_post_nms_top_n_test=20)


def small(name: str = "vim_micro_patch8_32", **keywords: Any) -> Detector:
    torch.manual_seed(0)
    return build_detector(name, 3, **(SMALL | keywords))


def objects(boxes: list[list[float]], size: tuple[int, int]) -> dict[str, Tensor]:
    found = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    masks = torch.zeros(len(found), *size, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, found.int().tolist()):
        mask[y0:y1, x0:x1] = 1
    return {"boxes": found, "labels": torch.arange(len(found)) % 3 + 1, "masks": masks}


def two_hundred() -> list[list[float]]:
    corner = torch.rand(200, 2, generator=torch.Generator().manual_seed(0)) * 40
    return torch.cat([corner, corner + 12], 1).tolist()


# an image without boxes is what a crowd alone leaves, too
CASES = {
    "usual": [[4, 4, 30, 30], [20, 30, 50, 60]],
    "no boxes": [],
    "no area": [[4, 4, 30, 30], [9, 9, 9, 20]],
    "only no area": [[9, 9, 9, 20]],
    "200 boxes": two_hundred(),
}


@pytest.mark.parametrize("name", ["vim_micro_patch8_32", "fastvim_micro_patch8_32"])
def test_training_is_finite_whatever_the_boxes(name: str, one_thread: None) -> None:
    model = small(name).train()
    images = [torch.rand(3, 64, 56), torch.rand(3, 48, 64)]
    for case, boxes in CASES.items():
        model.zero_grad()
        losses = model(images, [objects(boxes, (64, 56)), objects([], (48, 64))])
        assert all(bool(loss.isfinite()) for loss in losses.values()), case
        sum(losses.values()).backward()
        for key, parameter in model.named_parameters():
            # every process of a run must have a gradient, whatever its images hold
            assert parameter.grad is not None, (case, key)
            assert bool(parameter.grad.isfinite().all()), (case, key)


def test_torchvisions_calling_convention(one_thread: None) -> None:
    model = small()
    names = {"loss_objectness", "loss_rpn_box_reg", "loss_mask_0"}
    names |= {f"loss_{kind}_{stage}" for kind in ("classifier", "box_reg") for stage in range(3)}
    images = [torch.rand(3, 40, 60), torch.rand(3, 200, 100)]
    targets = [objects([[4, 4, 30, 30]], (40, 60)), objects([[10, 20, 90, 150]], (200, 100))]
    assert set(model.train()(images, targets)) == names
    with torch.no_grad():
        found = model.eval()(images)
    for image, each in zip(images, found):
        count = len(each["boxes"])
        assert set(each) == {"boxes", "labels", "scores", "masks"}
        assert each["masks"].shape == (count, 1, *image.shape[1:])
        assert each["masks"].dtype == torch.bool
        assert count > 0
        assert bool(((each["labels"] >= 1) & (each["labels"] <= 3)).all())
        assert bool((each["scores"].diff() <= 0).all())
        height, width = image.shape[1:]
        limits = torch.tensor([width, height, width, height]) + 1e-3
        assert bool((each["boxes"] >= 0).all() & (each["boxes"] <= limits).all())
    # targets stay as they were
    assert targets[1]["boxes"].tolist() == [[10, 20, 90, 150]]


def test_images_are_fitted_and_padded() -> None:
    transform = small().transform
    batch, _ = transform.eval()([torch.ones(3, 30, 60), torch.ones(3, 3, 280), torch.ones(3, 200, 100)])
    assert batch.tensors.shape == (3, 3, 64, 64)
    assert batch.image_sizes == [(32, 64), (1, 64), (64, 32)]
    for image, (height, width) in zip(batch.tensors, batch.image_sizes):
        assert bool((image[:, :height, :width] != 0).all())
        assert not image[:, height:].any()
        assert not image[:, :, width:].any()
    batch, targets = transform.train()(
        [torch.ones(3, 30, 60), torch.ones(3, 128, 64)],
        [objects(CASES["usual"], (30, 60)), objects([[4, 8, 30, 100]], (128, 64))],
    )
    assert batch.image_sizes == [(30, 60), (64, 32)]
    assert targets[1]["boxes"].tolist() == [[2, 4, 15, 50]]
    assert int(targets[1]["masks"].sum()) == 13 * 46


def test_a_run_that_diverges_has_a_loss(one_thread: None) -> None:
    """It is not finite, which the engine tells, and nothing breaks on the way."""
    for name in ("vim_micro_patch8_32", "fastvim_micro_patch8_32"):
        model = small(name).train()
        with torch.no_grad():
            model.roi_heads.box_predictor[0].bbox_pred.bias.fill_(float("nan"))
        losses = model([torch.rand(3, 64, 64)], [objects(CASES["usual"], (64, 64))])
        assert not bool(sum(losses.values()).isfinite())


def test_detections_do_not_depend_on_the_batch(one_thread: None) -> None:
    model = small("fastvim_micro_patch8_32").eval()
    images = [torch.rand(3, 64, 40), torch.rand(3, 32, 64)]
    with torch.no_grad():
        together, alone = model(images), [model([image])[0] for image in images]
    for first, second in zip(together, alone):
        assert torch.equal(first["labels"], second["labels"])
        torch.testing.assert_close(first["boxes"], second["boxes"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "vim_micro_patch8_32"])
def test_any_backbone_with_maps(name: str, one_thread: None) -> None:
    model = small(name, heads="fastvim", **(dict(depth=2) if name.startswith("vit") else {})).train()
    losses = model([torch.rand(3, 64, 64)], [objects(CASES["usual"], (64, 64))])
    sum(losses.values()).backward()
    assert all(bool(loss.isfinite()) for loss in losses.values())
    stride = 8 if "patch8" in name else 16
    maps = model.backbone(torch.zeros(1, 3, 64, 64))
    assert [64 // each.shape[-1] for each in maps.values()] == [stride * 2**level // 16 for level in range(2, 7)]


def test_merged_patches(one_thread: None) -> None:
    model = small(fusion_strategy="upper", fusion_layer=2, fusion_token=4).eval()
    with torch.no_grad():
        assert model.backbone(torch.rand(1, 3, 64, 64))["p4"].shape[-2:] == (8, 8)


def test_wrong_keywords_are_told() -> None:
    with pytest.raises(ValueError, match=r"heads is 'mask'; wanted 'vim' or 'fastvim'"):
        small(heads="mask")


def test_anchors_are_torchvisions_unrounded() -> None:
    shown = ImageList(torch.zeros(1, 3, 128, 192), [(128, 192)])
    maps = [torch.zeros(1, 1, 128 // stride, 192 // stride) for stride in (4, 8, 16, 32, 64)]
    (own,) = Anchors()(shown, maps)
    (theirs,) = AnchorGenerator(tuple((32 * 2**i,) for i in range(5)), ((0.5, 1.0, 2.0),) * 5)(shown, maps)
    assert own.shape == theirs.shape
    assert 0 < float((own - theirs).abs().max()) <= 0.5
    sides = own[:, 2:] - own[:, :2]
    torch.testing.assert_close(sides.prod(1).sqrt()[:3], torch.full((3,), 32.0))
    # places stay a stride apart where a map was rounded up
    (odd,) = Anchors()(ImageList(torch.zeros(1, 3, 96, 96), [(96, 96)]), [torch.zeros(1, 1, 2, 2)] * 5)
    assert float(odd[-3, 0] - odd[-6, 0]) == 64


def test_levels() -> None:
    sides = torch.tensor([0.0, 111, 112, 223.9, 224, 447, 448, 2000])
    boxes = torch.stack([torch.zeros(8), torch.zeros(8), sides, sides], 1)
    assert box_levels(boxes).tolist() == [2, 2, 3, 3, 4, 4, 5, 5]
    assert box_levels(boxes / 2, stride=8).tolist() == box_levels(boxes).tolist()


def test_pooling_is_aligned() -> None:
    """A map that rises with x, pooled, gives the x of the pooled places' centres."""
    maps = {f"p{level}": (torch.arange(64 // 2**level) + 0.5).expand(1, 1, 64 // 2**level, -1) for level in range(2, 6)}
    pooled = AlignedPool(7)(maps, [torch.tensor([[8.0, 8, 36, 36]])])
    wanted = (8 + 28 * (torch.arange(7) + 0.5) / 7) / 4
    torch.testing.assert_close(pooled[0, 0, 3], wanted)


def test_mask_targets_of_many_objects() -> None:
    """More masks than are pooled at once: each box gets its own."""
    masks = torch.zeros(40, 56, 56, dtype=torch.uint8)
    for number in range(40):
        masks[number, :, : number + 8] = 1
    matched = torch.tensor([39, 0, 17, 16])
    targets = pool_masks(masks, torch.tensor([[0.0, 0, 56, 56]]).expand(4, 4), matched)
    assert targets[:, 0].sum(1).tolist() == [(number + 8 + 1) // 2 for number in matched.tolist()]


def test_benchmark(one_thread: None) -> None:
    rows = detection.measure(["vim_micro_patch8_32"], 64, "vim", torch.device("cpu"), 0.0, proposals=5)
    (row,) = rows
    assert row["body_seconds"] + row["heads_seconds"] > 0
    assert row["whole_peak_bytes"] >= max(row["body_peak_bytes"], 4 * row["parameters"])
    assert "vim_micro_patch8_32" in detection.table(rows)
    # the untrained heads are sure enough to have something to draw masks of
    with torch.no_grad():
        found = detection.build("vim_micro_patch8_32", 64, "vim")([torch.rand(3, 64, 64)])
    assert len(found[0]["scores"]) > 20
