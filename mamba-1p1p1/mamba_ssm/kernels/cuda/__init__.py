"""The CUDA kernel set: `csrc/*.cu`, compiled at first use for the device at hand, on torch's current stream."""

import sys
from types import ModuleType

from causal_conv1d import _nvrtc
from mamba_ssm.kernels.cuda.ahead import (
    foretell_merging,
    foretell_mixer,
    foretell_norm,
    foretell_pooled,
    foretell_sums,
)
from mamba_ssm.kernels.cuda.directions import can_stack, stacked_backward, stacked_forward, weights_size
from mamba_ssm.kernels.cuda.merging import match_tokens, merge_tokens, merge_tokens_backward
from mamba_ssm.kernels.cuda.norm import norm_backward, norm_forward
from mamba_ssm.kernels.cuda.pooled import pooled_conv, pooled_gate
from mamba_ssm.kernels.cuda.scan import (
    scan_backward,
    scan_backward_both,
    scan_forward,
    scan_forward_both,
    states_shape,
)

__all__ = [
    "can_stack",
    "foretell_merging",
    "foretell_mixer",
    "foretell_norm",
    "foretell_pooled",
    "foretell_sums",
    "load",
    "match_tokens",
    "merge_tokens",
    "merge_tokens_backward",
    "norm_backward",
    "norm_forward",
    "pooled_conv",
    "pooled_gate",
    "scan_backward",
    "scan_backward_both",
    "scan_forward",
    "scan_forward_both",
    "stacked_backward",
    "stacked_forward",
    "states_shape",
    "weights_size",
]

# functions of other kernel sets that these lack, and what is put together from torch's operations for want of them
MISSED = {
    "visible_conv": "the convolutions and gates of lines that are shown in part (FastVim's pretraining)",
}


def load(index: int | None = None) -> ModuleType:
    """This kernel set, for the device with this index (None: torch's current one), once a kernel has run there.

    Raises:
        RuntimeError: the reason, in one sentence, why kernels do not run there.
    """
    _nvrtc.prove(index)
    return sys.modules[__name__]
