"""The torch kernel set: vectorised, on every device."""

from mamba_ssm.kernels.torch.norm import norm_backward, norm_forward
from mamba_ssm.kernels.torch.scan import scan_backward, scan_forward, states_shape

__all__ = ["norm_backward", "norm_forward", "scan_backward", "scan_forward", "states_shape"]
