"""The mixer's linear layer."""

from __future__ import annotations

from mamba_ssm.ops.linear import linear
from torch import Tensor, nn


class Linear(nn.Linear):
    """`nn.Linear` through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        return linear(x, self.weight, self.bias)
