"""The kernel sets of this package.

A kernel set (see `causal_conv1d.backend`) has the functions of `kernels/torch`, with those signatures: `conv_forward`,
`conv_backward`, `conv_update`. Tensors arrive checked, on one device, with any strides; `x`, `dout` and `conv_state`
may differ in dtype from `weight` and `bias`. Results: `out` and `dx` like `torch.empty_like(x)`, `dweight` contiguous,
in its parameter's dtype, `dbias` likewise, or empty where there is no bias.

A set may also have `conv_forward_masked` and `conv_backward_masked`, with a mask (batch, seqlen) behind `x`.
"""

from importlib import import_module

from causal_conv1d.backend import Backends
from causal_conv1d.kernels import torch as torch_kernels

backends = Backends("causal_conv1d", torch_kernels)
backends.add("cpp", "cpu", lambda _: import_module("causal_conv1d.kernels.cpp"))
backends.add("cuda", "cuda", lambda index: import_module("causal_conv1d.kernels.cuda").load(index))
