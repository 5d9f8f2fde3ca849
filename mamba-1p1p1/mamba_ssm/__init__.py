"""Selective state-space operators and the Mamba mixer, with the published names."""

from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn

__version__ = "1.1.1+portable"
__all__ = ["Mamba", "mamba_inner_fn", "selective_scan_fn"]
