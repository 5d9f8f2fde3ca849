"""The torch kernel set: vectorised, on every device."""

from causal_conv1d.kernels.torch.convolution import conv_backward, conv_forward, conv_update

__all__ = ["conv_backward", "conv_forward", "conv_update"]
