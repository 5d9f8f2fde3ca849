"""The micro models, by their name in the tests."""

from benchmarks.micro_models import SIZES, default_cfgs, timm

__all__ = ["SIZES", "default_cfgs", "timm"]
