"""The kernel sets of this package.

A kernel set (see `causal_conv1d.backend`) has the functions of `kernels/torch`, with those signatures: `states_shape`,
`scan_forward`, `scan_backward`, `norm_forward`, `norm_backward`. Tensors arrive checked, on one device, with any
strides.

Scan: `u`, `delta`, `z`, `dout` (batch, dim, seqlen), each float32, bfloat16 or float16, not necessarily the same; `A`
(dim, dstate), `D`, `delta_bias` (dim,) float32; `B`, `C` (batch, groups, dstate, seqlen), with one number of groups, or
(dim, dstate). `scan_forward` returns `out` like `torch.empty_like(u)`, `last_state` (batch, dim, dstate) float32 and,
if `save_states`, whatever its backward wants to start from: float32 of shape `states_shape(...)`, else an empty tensor.
`scan_backward` returns the gradients of u, delta, A, B, C, D, z, delta_bias: of u, delta, z like `torch.empty_like` of
each, the others contiguous, each in its argument's dtype; (0,)-shaped where the argument is None.

Normalisation: `norm_forward` takes `x` and, or None, `residual`, (..., size), and returns `out` in the dtype of `x`,
the sum in `total_dtype`, both contiguous, and float32 mean (0 for RMS) and scale of every row, (rows,) each, in memory
of their own. `norm_backward` takes the gradients of `out` and, or None, of the sum, and returns those of x (in the
dtype of `dout`), residual (in `residual_dtype`), weight and bias; (0,)-shaped where there is no argument.

A set may have more, of which `has` tells: `scan_forward_both`, `scan_backward_both`, `directions_forward`,
`directions_backward`, `pooled_conv`, `pooled_scan`, `pooled_scan_saving` with `pooled_scan_backward`, `pooled_gate`,
`visible_conv`, `visible_conv_backward`, `visible_gate`, `visible_gate_backward`, `match_tokens`, `merge_tokens`,
`merge_tokens_backward`, `linear`, `mixer` with `mixer_backward` and `skipping_mixer`, `pooled_mixer` with
`pooled_mixer_backward`, `layers` with `layers_backward`, and `can_mask` where `directions_forward` takes a mask. What
it lacks is put together from the others (`composed`), or not asked of it. One that compiles its kernels is told of what
comes (`Backends.foretell`): `foretell_mixer`, `foretell_pooled`, `foretell_norm`, `foretell_merging`, `foretell_sums`,
with a device's index first.
"""

from importlib import import_module

from causal_conv1d.backend import Backends
from mamba_ssm.kernels import torch as torch_kernels

backends = Backends("mamba_ssm", torch_kernels)
backends.add("cpp", "cpu", lambda _: import_module("mamba_ssm.kernels.cpp"))
backends.add("cuda", "cuda", lambda index: import_module("mamba_ssm.kernels.cuda").load(index))
