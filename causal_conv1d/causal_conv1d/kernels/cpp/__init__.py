"""The C++ kernel set for CPUs. Importing it loads its library: ImportError where none was built."""

from causal_conv1d.kernels.cpp.convolution import conv_backward, conv_backward_into, conv_forward, conv_update

__all__ = ["conv_backward", "conv_backward_into", "conv_forward", "conv_update"]
