"""Semantic segmentation: UPerNet on a Vision Mamba."""

from __future__ import annotations

from tasks.segment.loss import SegmentationLoss
from tasks.segment.models import FCNHead, Segmenter, SegmenterOutput, UPerNetHead, build_segmenter

__all__ = ["FCNHead", "SegmentationLoss", "Segmenter", "SegmenterOutput", "UPerNetHead", "build_segmenter"]
