"""The C++ kernel set for CPUs. Importing it loads its library and that of the convolution: ImportError without them."""

from mamba_ssm.kernels.cpp.directions import can_mask, directions_backward, directions_forward
from mamba_ssm.kernels.cpp.layers import layers, layers_backward
from mamba_ssm.kernels.cpp.linear import gemm, linear, linear_backward
from mamba_ssm.kernels.cpp.merging import match_tokens, merge_tokens, merge_tokens_backward
from mamba_ssm.kernels.cpp.norm import norm_backward, norm_forward
from mamba_ssm.kernels.cpp.pooled import pooled_conv, pooled_gate, pooled_scan, pooled_scan_backward, pooled_scan_saving
from mamba_ssm.kernels.cpp.scan import scan_backward, scan_forward, states_shape
from mamba_ssm.kernels.cpp.visible import (
    visible_conv,
    visible_conv_backward,
    visible_gate,
    visible_gate_backward,
)
from mamba_ssm.kernels.cpp.whole import mixer, mixer_backward, pooled_mixer, pooled_mixer_backward, skipping_mixer

__all__ = [
    "can_mask",
    "directions_backward",
    "directions_forward",
    "gemm",
    "layers",
    "layers_backward",
    "linear",
    "linear_backward",
    "match_tokens",
    "merge_tokens",
    "merge_tokens_backward",
    "mixer",
    "mixer_backward",
    "norm_backward",
    "norm_forward",
    "pooled_conv",
    "pooled_gate",
    "pooled_mixer",
    "pooled_mixer_backward",
    "pooled_scan",
    "pooled_scan_backward",
    "pooled_scan_saving",
    "scan_backward",
    "scan_forward",
    "skipping_mixer",
    "states_shape",
    "visible_conv",
    "visible_conv_backward",
    "visible_gate",
    "visible_gate_backward",
]
