"""Selective state-space operators and the Mamba mixer, with the published names."""

from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn

__version__ = "1.1.1+portable"
__all__ = ["Mamba", "mamba_inner_fn", "selective_scan_fn"]

_OTHERS = {"Mamba2", "Mamba2Simple", "Mamba3", "MambaLMHeadModel"}


def __getattr__(name: str):
    if name == "MambaLMHeadModel":
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

        return MambaLMHeadModel
    if name in _OTHERS:
        raise ImportError(f"this mamba_ssm ({__version__}) has no {name}: it has Mamba, the mixer of the first paper")
    raise AttributeError(f"module 'mamba_ssm' has no attribute {name!r}")
