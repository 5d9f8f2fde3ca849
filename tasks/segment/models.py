"""UPerNet on a Vision Mamba, or on any timm backbone with maps: heads and the whole segmenter.

Xiao et al. 2018, "Unified Perceptual Parsing for Scene Understanding" (arXiv:1807.10221); the decoder is the one of
segmentation-models-pytorch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from segmentation_models_pytorch.base.initialization import initialize_decoder
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from fusion.dynamic_pruning import Choices, DynamicPruning
from models_mamba import VisionMamba
from tasks.dense.backbone import DenseBackbone, create_body, from_classifier, spread_indices
from tasks.dense.necks import MultiScale, resize
from tasks.dense.published import convert

_logger = logging.getLogger(__name__)

PUBLISHED = "decode_head.lateral_convs."  # what published segmenters have and this project's have not


class SegmenterOutput(NamedTuple):
    """What a segmenter computes in training, for B images.

    `logits` (B, classes, rows, cols) at the finest map's size; `aux` the same of the auxiliary head, at the third
    map's; both at the image's size where that is no whole number of patches. `decisions` and `block_policy` are those
    of `fusion.pruning_loss.PruningOutput`, empty and None where nothing is pruned.
    """

    logits: Tensor
    aux: Tensor | None
    decisions: list[Tensor]
    block_policy: Tensor | None


class UPerNetHead(nn.Module):
    """Pyramid pooling and feature pyramid over maps of `in_channels`, finest first -> logits at the finest map's size.

    `decoder` is SMP's UPerNet decoder, without the norms it would put before the maps.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        # SMP's decoder expects the image and its half in front, and leaves both out
        self.decoder = UPerNetDecoder([0, 0, *in_channels], len(in_channels) + 1, channels)
        self.decoder.feature_norms = nn.ModuleList(nn.Identity() for _ in in_channels)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        initialize_decoder(self.decoder)
        _init_classifier(self.conv_seg)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """maps, each (B, C_i, rows_i, cols_i) -> logits (B, classes, rows_0, cols_0)."""
        return self.conv_seg(self.dropout(self.decoder([None, None, *maps])))


class FCNHead(nn.Module):
    """One 3x3 convolution and a classifier over a single map, the auxiliary head (Long et al. 2015, 1411.4038)."""

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.convs = Conv2dNormActivation(in_channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        initialize_decoder(self.convs)
        _init_classifier(self.conv_seg)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, rows, cols) -> logits (B, classes, rows, cols)."""
        return self.conv_seg(self.dropout(self.convs(x)))


def _init_classifier(conv: nn.Conv2d) -> None:
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)


def _is_new(name: str) -> bool:
    """Whether a classifier has nothing for this parameter of a segmenter."""
    return not name.startswith("backbone.body.")


class Segmenter(nn.Module):
    """Backbone, adapter (None where the maps go to the heads as they are), decoder head and auxiliary head (or None),
    which reads the third map."""

    def __init__(
        self, backbone: DenseBackbone, neck: nn.Module | None, decode_head: nn.Module, auxiliary_head: nn.Module | None
    ) -> None:
        super().__init__()
        self.backbone, self.neck = backbone, neck
        self.decode_head, self.auxiliary_head = decode_head, auxiliary_head
        self.num_classes = decode_head.conv_seg.out_channels
        self.find_unused_parameters = backbone.find_unused_parameters

    def maps(self, x: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) -> what the heads see, finest first."""
        return self._adapt(self.backbone(x))

    def _adapt(self, maps: list[Tensor]) -> list[Tensor]:
        return maps if self.neck is None else self.neck(maps)

    def forward(self, x: Tensor) -> Tensor | SegmenterOutput:
        """Images (B, C, H, W) -> in eval mode logits (B, classes, H, W), in training mode a `SegmenterOutput`."""
        maps, state = self.backbone.forward_with_state(x)
        maps = self._adapt(maps)
        logits = self.decode_head(maps)
        if not self.training:
            return self._at_image_size(logits, x)
        aux = None if self.auxiliary_head is None else self.auxiliary_head(maps[2])
        if self.backbone.padded_size(x.shape[-2:]) != tuple(x.shape[-2:]):
            logits, aux = (None if part is None else self._at_image_size(part, x) for part in (logits, aux))
        chosen = Choices() if state is None else state.entry(DynamicPruning.name, Choices())
        return SegmenterOutput(
            logits=logits,
            aux=aux,
            decisions=list(chosen.decisions),
            block_policy=torch.stack(chosen.gates).unsqueeze(2) if chosen.gates else None,
        )

    def _at_image_size(self, logits: Tensor, x: Tensor) -> Tensor:
        """Logits of images x, at x's size; what pads an image to whole patches is cut off, not squeezed in."""
        height, width = x.shape[-2:]
        return resize(logits, self.backbone.padded_size((height, width)))[..., :height, :width]

    def renamed(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Published segmenters' weights under this model's names; others as they are."""
        return convert(weights, self) if any(name.startswith(PUBLISHED) for name in weights) else weights

    def adapt(
        self, weights: dict[str, Tensor], path: str, size: tuple[int, int] | None = None
    ) -> tuple[dict[str, Tensor], Callable[[str], bool]]:
        """Fit the weights of a classifier, which the backbone starts from, or of a segmenter of other classes; returns
        them under this model's names and a test for the keys that may be missing. `size` (height, width) is that of the
        images it was trained on, where it is known."""
        weights, own = self.renamed(weights), self.state_dict()
        if any(name.startswith("decode_head.") for name in weights):
            other = [name for name in weights if ".conv_seg." in name and weights[name].shape != own[name].shape]
            if other:
                _logger.info("%s: its classes are others; the last layers of both heads start afresh.", path)
            return {name: value for name, value in weights.items() if name not in other}, other.__contains__
        body = from_classifier(weights, self.backbone.body, size)
        _logger.info("%s: the backbone starts from it, adapter and heads start afresh.", path)
        return {f"backbone.body.{name}": value for name, value in body.items()}, _is_new

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The backbone's own exceptions from weight decay."""
        body = self.backbone.body
        return {f"backbone.body.{name}" for name in getattr(body, "no_weight_decay", set)()}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's grouping of parameters for layer decay: the backbone's embedding and layers, and the rest as one."""
        return self.backbone.group_matcher(prefix="backbone.", coarse=coarse)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each site of the backbone in the backward pass instead of keeping its activations."""
        self.backbone.body.set_grad_checkpointing(enable)


def build_segmenter(
    name: str,
    num_classes: int,
    img_size: int | tuple[int, int] = 512,
    out_indices: Sequence[int] | None = None,
    feature: str = "hidden",
    channels: int | None = None,
    aux_channels: int = 256,
    dropout: float = 0.1,
    drop_path_rate: float = 0.1,
    **body: Any,
) -> Segmenter:
    """UPerNet on timm's backbone `name`, with `body` keywords; names and defaults are the published ones.

    `out_indices` is where maps are taken, by default at each quarter of the depth: (5, 11, 17, 23) of 24 layers.
    `channels` is the decoder's width, by default the backbone's (512 for FastVim and for backbones whose maps differ in
    stride). FastVim's maps go to the decoder normed and all of one stride; other single-stride backbones get
    `MultiScale`.
    """
    trunk = create_body(name, img_size, drop_path_rate=drop_path_rate, **body)
    indices = spread_indices(trunk) if out_indices is None else out_indices
    pooled = isinstance(trunk, VisionMamba) and trunk.methods.get("pooling") is not None
    backbone = DenseBackbone(trunk, indices, feature, outnorm=pooled)
    if len(backbone.channels) != 4:
        raise ValueError(f"out_indices is {list(indices)}; wanted four, for the decoder's four maps.")
    one_stride = len(set(backbone.reductions)) == 1
    neck = MultiScale(backbone.channels[0], backbone.reductions[0]) if one_stride and not pooled else None
    if channels is None:
        channels = backbone.channels[0] if neck is not None else 512
    return Segmenter(
        backbone,
        neck,
        UPerNetHead(backbone.channels, channels, num_classes, dropout),
        FCNHead(backbone.channels[2], aux_channels, num_classes, dropout),
    )
