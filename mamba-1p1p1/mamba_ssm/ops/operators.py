"""The namespace of this package's operators, `torch.ops.mamba_ssm`."""

from causal_conv1d.registration import Operators

OPERATORS = Operators("mamba_ssm")

# What several of them are given, as schemas have it.
_TAPS_OF_ONE = "Tensor weight{0}, Tensor? bias{0}, Tensor D{0}"
_PROJECTIONS_OF_ONE = "Tensor x_proj{0}, Tensor dt_proj{0}, Tensor dt_bias{0}, Tensor A_log{0}"
_TENSORS_OF_ONE = (
    "Tensor? conv_weight{0}, Tensor? conv_bias{0}, Tensor? x_proj_weight{0}, Tensor? dt_proj_weight{0},"
    " Tensor? dt_bias{0}, Tensor? A{0}, Tensor? D{0}"
)
TAPS, PROJECTIONS, _TENSORS = (
    f"{of_one.format('')}, {of_one.format('_b')}" for of_one in (_TAPS_OF_ONE, _PROJECTIONS_OF_ONE, _TENSORS_OF_ONE)
)
# the second direction's tensors are None if there is one only
DIRECTIONS = f"{_TENSORS}, bool[] reverse, float share"
LINES = "int[3] sizes, int[3] strides, bool[3] pooled"
ENDS = "Tensor in_proj, Tensor? in_bias, Tensor out_proj, Tensor? out_bias"
# what a mixer over all tokens is given beside them
FACTORS = "Tensor? mask, Tensor? gates"
