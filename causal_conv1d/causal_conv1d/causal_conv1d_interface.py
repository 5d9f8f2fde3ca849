"""The published import path of the convolution."""

from causal_conv1d.ops.convolution import causal_conv1d_fn, causal_conv1d_ref
from causal_conv1d.ops.update import causal_conv1d_update, causal_conv1d_update_ref

__all__ = [
    "CausalConv1dFn",
    "causal_conv1d_fn",
    "causal_conv1d_ref",
    "causal_conv1d_update",
    "causal_conv1d_update_ref",
]


class CausalConv1dFn:
    """The published class, of which others call `apply`."""

    apply = staticmethod(causal_conv1d_fn)
