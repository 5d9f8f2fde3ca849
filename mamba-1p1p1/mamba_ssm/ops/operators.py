"""The namespace of this package's operators, `torch.ops.mamba_ssm`."""

from causal_conv1d.registration import Operators

OPERATORS = Operators("mamba_ssm")
