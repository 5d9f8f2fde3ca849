"""The region proposal network: torchvision's, with anchors that are not rounded and either release's box loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from tasks.detect.kinds import HeadKind

LEVELS = (2, 3, 4, 5, 6)  # of the pyramid; a place of level k is 2^k pixels wide where the backbone's is 16
ANCHOR_RATIOS = (0.5, 1.0, 2.0)  # height over width
ANCHOR_SIDE = 8  # of an anchor, in places of its level: 32 to 512 pixels


class Anchors(AnchorGenerator):
    """Anchors of one size a level and three ratios, as they are: torchvision rounds their corners to whole pixels.

    They are float32 whatever the maps are, since bfloat16 cannot tell neighbouring pixels apart, and as far apart as
    the `stride` of the backbone's map says: torchvision divides the image's size by the map's, which is too little
    where a map was rounded up.
    """

    def __init__(self, stride: int = 16) -> None:
        self.strides = [stride * 2**level // 16 for level in LEVELS]
        super().__init__(tuple((ANCHOR_SIDE * each,) for each in self.strides), (ANCHOR_RATIOS,) * len(LEVELS))

    def generate_anchors(
        self,
        scales: list[int],
        aspect_ratios: list[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008 (as in torchvision, whose method this is)
    ) -> Tensor:
        """Anchors (scales * ratios, 4) around the origin, as corners in pixels."""
        sizes = torch.as_tensor(scales, dtype=dtype, device=device)
        heights = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        ws, hs = ((side[:, None] * sizes).flatten() / 2 for side in (1 / heights, heights))
        return torch.stack([-ws, -hs, ws, hs], 1)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """The anchors (N, 4) of each image, level by level, in each a place's ratios side by side."""
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)
        strides = [[torch.tensor(stride, device=device)] * 2 for stride in self.strides]
        anchors = torch.cat(self.grid_anchors([list(each.shape[-2:]) for each in feature_maps], strides))
        return [anchors] * len(image_list.image_sizes)


class ProposalHead(RPNHead):
    """torchvision's head of two convolutions; what it predicts is float32, so that boxes are too under autocast."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, len(ANCHOR_RATIOS), conv_depth=2)

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps (B, C, rows, cols) -> of each the objectness (B, 3, rows, cols) and deltas (B, 12, rows, cols)."""
        logits, deltas = super().forward(x)
        return [each.float() for each in logits], [each.float() for each in deltas]


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's network, with a box loss that is linear from `kind.rpn_beta` on (0: everywhere).

    `stride` is that of the backbone's map, the pyramid's third: anchors of a finer one are smaller in proportion.
    `post_nms_top_n_train` is by default the kind's.
    """

    def __init__(
        self,
        kind: HeadKind,
        channels: int,
        pre_nms_top_n_test: int = 1000,
        post_nms_top_n_test: int = 1000,
        stride: int = 16,
        pre_nms_top_n_train: int = 2000,
        post_nms_top_n_train: int | None = None,
    ) -> None:
        super().__init__(
            Anchors(stride),
            ProposalHead(channels),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": pre_nms_top_n_train, "testing": pre_nms_top_n_test},
            post_nms_top_n={
                "training": post_nms_top_n_train or kind.rpn_post_nms_top_n_train,
                "testing": post_nms_top_n_test,
            },
            nms_thresh=0.7,
        )
        self.beta = kind.rpn_beta
        self.min_size = torch.finfo(torch.float32).tiny  # any area at all

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Objectness and box loss, each over the number of sampled anchors; arguments are torchvision's."""
        positive, negative = (torch.cat(masks).bool() for masks in self.fg_bg_sampler(labels))
        sampled, count = positive | negative, max(int(positive.sum() + negative.sum()), 1)
        wanted = torch.cat(labels)[sampled]
        loss_objectness = F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], wanted, reduction="sum")
        targets = torch.cat(regression_targets)[positive]
        loss_box = F.smooth_l1_loss(pred_bbox_deltas[positive], targets, beta=self.beta, reduction="sum")
        return loss_objectness / count, loss_box / count
