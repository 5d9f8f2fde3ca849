"""A feature pyramid from the one map of a plain backbone."""

from __future__ import annotations

from functools import partial

from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from tasks.dense.necks import MaxPoolWhole


class SimplePyramid(nn.Module):
    """One map (B, D, rows, cols) of stride 16 -> p2 to p6, of `out_channels` and strides 4 to 64.

    Li et al. 2022, "Exploring Plain Vision Transformer Backbones for Object Detection" (arXiv:2203.16527): p2 and p3
    by transposed convolutions, p5 by pooling, on each a 1x1 and a 3x3 convolution with a norm over channels (`eps`);
    p6 is every second value of p5.
    """

    def __init__(self, dim: int, out_channels: int = 256, eps: float = 1e-6) -> None:
        super().__init__()
        norm, half, quarter = partial(LayerNorm2d, eps=eps), dim // 2, dim // 4
        self.out_channels = out_channels

        def level(channels: int, *resize: nn.Module) -> nn.Sequential:
            conv = partial(Conv2dNormActivation, out_channels=out_channels, norm_layer=norm, activation_layer=None)
            return nn.Sequential(*resize, conv(channels, kernel_size=1), conv(out_channels, kernel_size=3))

        self.p2 = level(
            quarter, nn.ConvTranspose2d(dim, half, 2, 2), norm(half), nn.GELU(), nn.ConvTranspose2d(half, quarter, 2, 2)
        )
        self.p3 = level(half, nn.ConvTranspose2d(dim, half, 2, 2))
        self.p4 = level(dim)
        self.p5 = level(dim, MaxPoolWhole(2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The levels by name, finest first."""
        maps = {name: getattr(self, name)(x) for name in ("p2", "p3", "p4", "p5")}
        return maps | {"p6": maps["p5"][:, :, ::2, ::2]}
