"""Cascade Mask R-CNN on a plain backbone, called as torchvision's detectors are."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes

from tasks.dense.backbone import DenseBackbone, create_body, from_classifier
from tasks.dense.published import convert
from tasks.detect.cascade import CascadeRoIHeads
from tasks.detect.kinds import KINDS
from tasks.detect.proposals import ProposalNetwork
from tasks.detect.published import detector_name
from tasks.detect.pyramid import SimplePyramid
from tasks.detect.regions import paste_masks

_logger = logging.getLogger(__name__)

# what published detectors have and this project's have not
PUBLISHED = ("proposal_generator.", "rpn_head.", "roi_head.")

Target = dict[str, Tensor]
_BODY = "backbone.dense.body."
_PER_BOX = ("boxes", "labels", "masks", "area", "iscrowd")


class FitAndPad(GeneralizedRCNNTransform):
    """Images of any size -> one batch (B, 3, size, size), or of the height and width that `size` is: normalised,
    fitted, zeros at the right and the bottom.

    In evaluation the side that is the longer in proportion becomes that of `size`; in training only larger images are
    shrunk, since jitter makes small ones on purpose. Boxes without area are left out. Detections go back to the image's
    own size, their masks as bool (N, 1, H, W).
    """

    def __init__(self, size: int | tuple[int, int]) -> None:
        sides = to_2tuple(size)
        super().__init__(min(sides), max(sides), list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD))
        self.size = sides

    def forward(
        self, images: list[Tensor], targets: list[Target] | None = None
    ) -> tuple[ImageList, list[Target] | None]:
        """As torchvision's."""
        batch, targets = super().forward(images, targets)
        if targets is not None:
            targets = [_with_area(target) for target in targets]
        return batch, targets

    def resize(self, image: Tensor, target: Target | None = None) -> tuple[Tensor, Target | None]:
        """An image (3, H, W) and its target, fitted; at least one pixel is left of a side."""
        sides = image.shape[-2:]
        if self.training and all(side <= most for side, most in zip(sides, self.size)):
            return image, target
        longest, most = max(zip(sides, self.size), key=lambda pair: pair[0] / pair[1])
        fitted = [max(1, int(side * most / longest + 0.5)) for side in sides]
        image = F.interpolate(image[None], fitted, mode="bilinear", align_corners=False)[0]
        if target is not None:
            target["boxes"] = resize_boxes(target["boxes"], sides, fitted)
            if "masks" in target:
                target["masks"] = F.interpolate(target["masks"][:, None].float(), fitted)[:, 0].byte()
        return image, target

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        """Images (3, H, W) -> one padded batch."""
        batch = images[0].new_zeros(len(images), images[0].shape[0], *self.size)
        for image, place in zip(images, batch):
            place[:, : image.shape[1], : image.shape[2]] = image
        return batch

    def postprocess(
        self, result: list[Target], image_shapes: list[tuple[int, int]], original_image_sizes: list[tuple[int, int]]
    ) -> list[Target]:
        """Detections in fitted images -> detections in the images as they were."""
        for found, fitted, original in zip(result, image_shapes, original_image_sizes):
            found["boxes"] = resize_boxes(found["boxes"], fitted, original)
            found["masks"] = paste_masks(found["masks"][:, 0], found["boxes"], original)[:, None]
        return result


def _with_area(target: Target) -> Target:
    keep = (target["boxes"][:, 2:] > target["boxes"][:, :2]).all(1)
    return target if keep.all() else {key: value[keep] if key in _PER_BOX else value for key, value in target.items()}


class PyramidBackbone(nn.Module):
    """Images (B, 3, H, W) -> p2 to p6: the one map of `dense`, then `pyramid`."""

    def __init__(self, dense: DenseBackbone, pyramid: SimplePyramid) -> None:
        super().__init__()
        self.dense, self.pyramid = dense, pyramid
        self.out_channels = pyramid.out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The maps by name."""
        return self.pyramid(self.dense(x)[0])


class Detector(GeneralizedRCNN):
    """torchvision's detector: `model(images, targets)` gives the losses in training, else the detections of each
    image: `boxes` (N, 4) as corners in pixels, `labels` (N,) of 1 to K, `scores` (N,), `masks` bool (N, 1, H, W).

    Targets have `boxes` (T, 4), `labels` (T,) and `masks` (T, H, W); images are float32 (3, H, W) of 0 to 1.
    """

    def __init__(
        self, backbone: PyramidBackbone, rpn: nn.Module, roi_heads: nn.Module, img_size: int | tuple[int, int]
    ) -> None:
        super().__init__(backbone, rpn, roi_heads, FitAndPad(img_size))
        self.num_classes = roi_heads.num_classes
        self.find_unused_parameters = backbone.dense.find_unused_parameters

    @property
    def body(self) -> nn.Module:
        """The backbone's own model."""
        return self.backbone.dense.body

    published_name = staticmethod(detector_name)

    def renamed(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Published detectors' weights under this model's names; others as they are."""
        return convert(weights, self) if any(name.startswith(PUBLISHED) for name in weights) else weights

    def adapt(
        self, weights: dict[str, Tensor], path: str, size: tuple[int, int] | None = None
    ) -> tuple[dict[str, Tensor], Callable[[str], bool]]:
        """Fit the weights of a classifier, which the backbone starts from, or of a detector of other classes; returns
        them under this model's names and a test for the keys that may be missing. `size` (height, width) is that of the
        images it was trained on, where it is known."""
        weights, own = self.renamed(weights), self.state_dict()
        if any(name.startswith("roi_heads.") for name in weights):
            last = (".cls_score.", ".bbox_pred.", ".mask_fcn_logits.")
            is_last = [name for name in own if name.startswith("roi_heads.") and any(part in name for part in last)]
            other = [name for name in is_last if name in weights and weights[name].shape != own[name].shape]
            if other:
                _logger.info("%s: its classes are others; the last layers of the heads start afresh.", path)
            return {name: value for name, value in weights.items() if name not in other}, other.__contains__
        body = from_classifier(weights, self.body, size)
        _logger.info("%s: the backbone starts from it, pyramid and heads start afresh.", path)
        return {_BODY + name: value for name, value in body.items()}, lambda name: not name.startswith(_BODY)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone: the body's."""
        return {_BODY + name for name in getattr(self.body, "no_weight_decay", set)()}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's grouping of parameters for layer decay: the backbone's embedding and layers, and the rest as one."""
        return self.backbone.dense.group_matcher(prefix="backbone.dense.", coarse=coarse)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each site of the backbone in the backward pass instead of keeping its activations."""
        self.body.set_grad_checkpointing(enable)


def build_detector(
    name: str,
    num_classes: int,
    img_size: int | tuple[int, int] = 1024,
    heads: str | None = None,
    out_channels: int = 256,
    fc_channels: int = 1024,
    drop_path_rate: float = 0.1,
    rpn_pre_nms_top_n_test: int = 1000,
    rpn_post_nms_top_n_test: int = 1000,
    box_batch_size_per_image: int = 512,
    rpn_pre_nms_top_n_train: int = 2000,
    rpn_post_nms_top_n_train: int | None = None,
    **body: Any,
) -> Detector:
    """Cascade Mask R-CNN for `num_classes` classes on the timm model `name`, built with the keywords `body`.

    `heads` is "vim" or "fastvim", by default fastvim for a body that pools. Images are fitted into and padded to
    `img_size` pixels, a side or (height, width). Each stage trains on `box_batch_size_per_image` boxes an image. The
    pyramid stands on the last map of stride 16 or finer; anchors and levels are in proportion to that stride. Raises
    ValueError for other heads, or a model without such a map.
    """
    model = create_body(name, img_size, drop_path_rate=drop_path_rate, **body)
    pools = getattr(getattr(model, "methods", None), "pooling", None) is not None
    heads = heads or ("fastvim" if pools else "vim")
    if heads not in KINDS:
        raise ValueError(f"heads is {heads!r}; wanted {' or '.join(map(repr, KINDS))}.")
    kind = KINDS[heads]
    strides = [info["reduction"] for info in model.feature_info]
    index = max((place for place, stride in enumerate(strides) if stride <= 16), default=None)
    if index is None or strides[index] % 4:
        raise ValueError(f"{name} has maps of stride {sorted(set(strides))}; wanted one of 4, 8 or 16.")
    dense = DenseBackbone(model, (index,), feature="hidden" if pools else "stream", outnorm=pools)
    backbone = PyramidBackbone(dense, SimplePyramid(dense.channels[0], out_channels, kind.norm_eps))
    rpn = ProposalNetwork(
        kind,
        out_channels,
        rpn_pre_nms_top_n_test,
        rpn_post_nms_top_n_test,
        strides[index],
        rpn_pre_nms_top_n_train,
        rpn_post_nms_top_n_train,
    )
    roi_heads = CascadeRoIHeads(
        kind, out_channels, num_classes, fc_channels, box_batch_size_per_image, stride=strides[index]
    )
    return Detector(backbone, rpn, roi_heads, img_size)
