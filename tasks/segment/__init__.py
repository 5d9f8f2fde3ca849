"""Semantic segmentation: UPerNet on a Vision Mamba."""

from __future__ import annotations

from tasks.dense.measure import SegmentationMeter
from tasks.segment.inference import slide_inference
from tasks.segment.loss import SegmentationLoss
from tasks.segment.models import FCNHead, Segmenter, SegmenterOutput, UPerNetHead, build_segmenter

__all__ = [
    "FCNHead",
    "SegmentationLoss",
    "SegmentationMeter",
    "Segmenter",
    "SegmenterOutput",
    "UPerNetHead",
    "build_segmenter",
    "slide_inference",
]
