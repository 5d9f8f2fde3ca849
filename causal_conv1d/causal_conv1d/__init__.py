"""Causal depthwise 1-D convolution, and the kernel infrastructure that `mamba_ssm` shares."""

from pathlib import Path

from causal_conv1d.causal_conv1d_interface import (
    causal_conv1d_fn,
    causal_conv1d_ref,
    causal_conv1d_update,
    causal_conv1d_update_ref,
)

__version__ = "1.1.1+portable"
__all__ = ["causal_conv1d_fn", "causal_conv1d_ref", "causal_conv1d_update", "causal_conv1d_update_ref", "get_include"]


def get_include() -> str:
    """Folder of the C++ headers (vectors, threads) that other kernel packages compile against."""
    return str(Path(__file__).parent / "csrc")
