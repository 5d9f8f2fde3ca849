"""Cascade RoI heads: three stages that refine and classify boxes, each matched at a higher IoU, and masks.

Cai and Vasconcelos 2018, "Cascade R-CNN: Delving into High Quality Object Detection" (arXiv:1712.00726), in the two
released kinds of `tasks.detect.kinds`, on torchvision's RoIHeads: its matching, sampling and calling convention.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

from tasks.detect.kinds import STAGE_IOU, STAGES, HeadKind
from tasks.detect.regions import AlignedPool, pool_masks

BOX_POOL, MASK_POOL = 7, 14  # sides of a pooled box


class BoxPredictor(FastRCNNPredictor):
    """Class logits (N, K + 1), background last, and deltas (N, 4), or (N, 4 K) by class; float32.

    Girshick 2015 (arXiv:1504.08083): normal weights of standard deviation 0.01 and 0.001, biases 0.
    """

    def __init__(self, in_channels: int, num_classes: int, by_class: bool) -> None:
        super().__init__(in_channels, num_classes + 1)
        self.bbox_pred = nn.Linear(in_channels, 4 * num_classes if by_class else 4)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = super().forward(x)
        return logits.float(), deltas.float()


class CascadeRoIHeads(RoIHeads):
    """Proposals -> boxes, labels 1 to K, scores and masks, or in training the losses of every stage.

    Called as torchvision's RoIHeads. Losses are `loss_classifier_k`, `loss_box_reg_k` (L1, over the number of sampled
    boxes) and `loss_mask_k`. `stride` is that of the backbone's map, the pyramid's third.
    """

    def __init__(
        self,
        kind: HeadKind,
        channels: int,
        num_classes: int,
        fc_channels: int = 1024,
        batch_size_per_image: int = 512,
        stride: int = 16,
    ) -> None:
        norm = partial(LayerNorm2d, eps=kind.norm_eps)
        convs = [channels] * 4
        super().__init__(
            AlignedPool(BOX_POOL, stride),
            nn.ModuleList(
                FastRCNNConvFCHead((channels, BOX_POOL, BOX_POOL), convs, [fc_channels], norm) for _ in range(STAGES)
            ),
            nn.ModuleList(BoxPredictor(fc_channels, num_classes, kind.by_class) for _ in range(STAGES)),
            fg_iou_thresh=STAGE_IOU[0],
            bg_iou_thresh=STAGE_IOU[0],
            batch_size_per_image=batch_size_per_image,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
            mask_roi_pool=AlignedPool(MASK_POOL, stride),
            mask_head=nn.ModuleList(MaskRCNNHeads(channels, convs, 1, norm) for _ in range(kind.num_masks)),
            mask_predictor=nn.ModuleList(
                MaskRCNNPredictor(channels, channels, num_classes) for _ in range(kind.num_masks)
            ),
        )
        self.kind, self.num_classes = kind, num_classes
        self.box_coders = [BoxCoder(weights) for weights in kind.delta_weights]
        self.matchers = [Matcher(iou, iou) for iou in STAGE_IOU]

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Maps by name, the proposals (N, 4) and the size of each image -> detections, or in training losses.

        Targets have `boxes` (T, 4), `labels` (T,) of 1 to K and `masks` (T, H, W).
        """
        if self.training:
            self.check_targets(targets)
            return [], self._losses(features, proposals, image_shapes, targets)
        return self._detections(features, proposals, image_shapes), {}

    # --- training ---

    def _losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        losses = {}
        for stage, weight in enumerate(self.kind.stage_weights):
            boxes, matched, labels, is_true = self._sample(stage, proposals, targets)
            logits, deltas = self._predict(stage, features, boxes)
            wanted = self._matched_boxes(matched, targets)
            parts = self._box_losses(stage, logits, deltas, boxes, labels, wanted)
            if stage < self.kind.num_masks:
                parts["loss_mask"] = self._mask_loss(stage, features, boxes, matched, labels, targets)
            losses |= {f"{name}_{stage}": weight * loss for name, loss in parts.items()}
            if stage + 1 < STAGES:
                refined = self._refine(stage, logits, deltas.detach(), boxes, image_shapes, labels)
                if self.kind.resample:
                    proposals = [each[~true] for each, true in zip(refined, is_true)]
                else:
                    proposals = [each[remove_small_boxes(each, torch.finfo(each.dtype).tiny)] for each in refined]
        return losses

    def _sample(
        self, stage: int, proposals: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Of each image the boxes to train a stage on, which true box each belongs to, its label (0 for background),
        and whether it is itself one of the true boxes."""
        counts = [len(each) for each in proposals]
        true_boxes = [target["boxes"].to(proposals[0].dtype) for target in targets]
        draws = stage == 0 or self.kind.resample
        if draws:
            proposals = self.add_gt_proposals(proposals, true_boxes)
        self.proposal_matcher = self.matchers[stage]
        # of an image whose boxes have all vanished nothing can be matched
        there = [true if len(boxes) else true[:0] for true, boxes in zip(true_boxes, proposals)]
        matched, labels = self.assign_targets_to_proposals(proposals, there, [each["labels"] for each in targets])
        if not draws:
            return proposals, matched, labels, [torch.zeros_like(each, dtype=torch.bool) for each in labels]
        chosen = self.subsample(labels)
        is_true = [places >= count for places, count in zip(chosen, counts)]
        boxes, matched, labels = ([each[i] for each, i in zip(x, chosen)] for x in (proposals, matched, labels))
        return boxes, matched, labels, is_true

    @staticmethod
    def _matched_boxes(matched: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
        """The true box of each box (N, 4), zeros in images that have none."""
        return torch.cat(
            [
                target["boxes"][places] if len(target["boxes"]) else target["boxes"].new_zeros(len(places), 4)
                for target, places in zip(targets, matched)
            ]
        )

    def _box_losses(
        self, stage: int, logits: Tensor, deltas: Tensor, boxes: list[Tensor], labels: list[Tensor], wanted: Tensor
    ) -> dict[str, Tensor]:
        label, box = torch.cat(labels), torch.cat(boxes)
        count = max(len(label), 1)
        # background, 0 in targets, is the last class of the logits
        classes = (label - 1) % (self.num_classes + 1)
        positive = (label > 0).nonzero().squeeze(1)
        predicted = self._of_class(deltas, label - 1)[positive]
        aim = self.box_coders[stage].encode_single(wanted[positive].to(box), box[positive])
        return {
            "loss_classifier": F.cross_entropy(logits, classes, reduction="sum") / count,
            "loss_box_reg": F.l1_loss(predicted, aim, reduction="sum") / count,
        }

    def _mask_loss(
        self,
        stage: int,
        features: dict[str, Tensor],
        boxes: list[Tensor],
        matched: list[Tensor],
        labels: list[Tensor],
        targets: list[dict[str, Tensor]],
    ) -> Tensor:
        """Mean cross-entropy of the true class's mask over the positive boxes; 0 where there is none."""
        positive = [each > 0 for each in labels]
        inside = [each[keep] for each, keep in zip(boxes, positive)]
        logits = self.mask_predictor[stage](self.mask_head[stage](self.mask_roi_pool(features, inside))).float()
        aim = torch.cat(
            [
                pool_masks(target["masks"], box, places[keep])
                for target, box, places, keep in zip(targets, inside, matched, positive)
            ]
        )
        if not len(aim):
            return logits.sum() * 0
        classes = torch.cat([each[keep] for each, keep in zip(labels, positive)]) - 1
        return F.binary_cross_entropy_with_logits(logits[torch.arange(len(classes)), classes], aim)

    # --- both ---

    def _predict(self, stage: int, features: dict[str, Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Class logits and deltas of all boxes."""
        pooled = self.box_roi_pool(features, boxes)
        if self.kind.pooled_gradient != 1 and pooled.requires_grad:
            pooled.register_hook(lambda gradient: gradient * self.kind.pooled_gradient)
        return self.box_predictor[stage](self.box_head[stage](pooled))

    def _of_class(self, deltas: Tensor, classes: Tensor) -> Tensor:
        """The deltas (N, 4) that each box has for its class 0 to K - 1; background gets any."""
        if not self.kind.by_class:
            return deltas
        deltas = deltas.unflatten(1, (-1, 4))
        return deltas[torch.arange(len(deltas), device=deltas.device), classes.clamp(0)]

    def _refine(
        self,
        stage: int,
        logits: Tensor,
        deltas: Tensor,
        boxes: list[Tensor],
        image_shapes: list[tuple[int, int]],
        labels: list[Tensor] | None = None,
    ) -> list[Tensor]:
        """The boxes moved by the deltas of their class, true if known, else the likeliest object, and clipped."""
        classes = logits[:, :-1].argmax(1)
        if labels is not None:
            label = torch.cat(labels)
            classes = torch.where(label > 0, label - 1, classes)
        whole = torch.cat(boxes)
        moved = self.box_coders[stage].decode_single(self._of_class(deltas, classes), whole)
        # a run that diverges is told by its loss, not by what pooling makes of such boxes
        moved = torch.where(moved.isfinite(), moved, whole)
        parts = moved.split([len(each) for each in boxes])
        return [clip_boxes_to_image(part, shape) for part, shape in zip(parts, image_shapes)]

    # --- inference ---

    def _detections(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        stage_logits: list[Tensor] = []
        for stage in range(STAGES):
            logits, deltas = self._predict(stage, features, boxes)
            stage_logits.append(logits)
            if stage + 1 < STAGES:
                boxes = self._refine(stage, logits, deltas, boxes, image_shapes)
        if self.kind.mean_of_logits:
            scores = torch.stack(stage_logits).mean(0).softmax(1)
        else:
            scores = torch.stack(stage_logits).softmax(2).mean(0)
        moved = self.box_coders[-1].decode_single(deltas, torch.cat(boxes)).unflatten(1, (-1, 4))
        counts = [len(each) for each in boxes]
        found = [self._select(*parts) for parts in zip(moved.split(counts), scores[:, :-1].split(counts), image_shapes)]
        self._add_masks(features, found)
        return found

    def _select(self, boxes: Tensor, scores: Tensor, image_shape: tuple[int, int]) -> dict[str, Tensor]:
        """Boxes (N, 1 or K, 4) and scores (N, K) of one image -> its detections, best first."""
        boxes = clip_boxes_to_image(boxes, image_shape).expand(-1, self.num_classes, -1)
        row, label = (scores > self.score_thresh).nonzero(as_tuple=True)
        boxes, scores = boxes[row, label], scores[row, label]
        keep = batched_nms(boxes, scores, label, self.nms_thresh)[: self.detections_per_img]
        return {"boxes": boxes[keep], "labels": label[keep] + 1, "scores": scores[keep]}

    def _add_masks(self, features: dict[str, Tensor], found: list[dict[str, Tensor]]) -> None:
        """Give every detection the mask probabilities (1, 28, 28) of its class."""
        pooled = self.mask_roi_pool(features, [each["boxes"] for each in found])
        classes = torch.cat([each["labels"] for each in found]) - 1
        each_head: list[Any] = [
            predict(head(pooled)).float().sigmoid() for head, predict in zip(self.mask_head, self.mask_predictor)
        ]
        masks = torch.stack(each_head).mean(0)[torch.arange(len(classes)), classes][:, None]
        for each, part in zip(found, masks.split([len(each["labels"]) for each in found])):
            each["masks"] = part
