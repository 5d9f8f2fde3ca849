"""Object detection and instance segmentation: Cascade Mask R-CNN, published with Vim and FastVim."""

from tasks.detect.detector import Detector, build_detector
from tasks.detect.pyramid import SimplePyramid
from tasks.detect.regions import paste_masks

__all__ = ["Detector", "SimplePyramid", "build_detector", "paste_masks"]
