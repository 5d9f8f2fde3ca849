"""The CUDA kernel set: `csrc/*.cu`, compiled at first use for the device at hand, on torch's current stream.

The one-step `conv_update`, a few kilobytes of work, stays with the torch kernel set.
"""

import sys
from types import ModuleType

from causal_conv1d import _nvrtc
from causal_conv1d.kernels.cuda.convolution import (
    conv_backward,
    conv_backward_masked,
    conv_forward,
    conv_forward_masked,
)
from causal_conv1d.kernels.torch import conv_update

__all__ = ["conv_backward", "conv_backward_masked", "conv_forward", "conv_forward_masked", "conv_update", "load"]


def load(index: int | None = None) -> ModuleType:
    """This kernel set, for the device with this index (None: torch's current one), once a kernel has run there.

    Raises:
        RuntimeError: the reason, in one sentence, why kernels do not run there.
    """
    _nvrtc.prove(index)
    return sys.modules[__name__]
