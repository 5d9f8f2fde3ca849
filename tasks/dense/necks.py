"""Adapters between a backbone's maps and the heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as shared
import torch.nn.functional as F
from torch import Tensor, nn

STRIDES = (4, 8, 16, 32)


class MultiScale(nn.Module):
    """Four maps (B, D, rows, cols) of stride `patch_size` -> the i-th brought to stride 4, 8, 16, 32 (`fpn1` to
    `fpn4`).

    A map four times as fine comes from two transposed convolutions with BatchNorm and GELU between, twice as fine from
    one, as it is from none, and k times as coarse from a max-pool of k. Raises ValueError for a patch that no such step
    serves.
    """

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        for number, stride in enumerate(STRIDES, start=1):
            self.add_module(f"fpn{number}", self._step(dim, patch_size, stride))

    @staticmethod
    def _step(dim: int, patch_size: int, stride: int) -> nn.Module:
        if patch_size == 4 * stride:
            return nn.Sequential(
                nn.ConvTranspose2d(dim, dim, 2, 2), nn.BatchNorm2d(dim), nn.GELU(), nn.ConvTranspose2d(dim, dim, 2, 2)
            )
        if patch_size == 2 * stride:
            return nn.Sequential(nn.ConvTranspose2d(dim, dim, 2, 2))
        if patch_size == stride:
            return nn.Identity()
        if stride % patch_size == 0:
            return MaxPoolWhole(stride // patch_size)
        raise ValueError(f"The maps have stride {patch_size}; wanted 4, 8 or 16, to bring them to 4, 8, 16 and 32.")

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four maps, finest last or all alike -> four maps of rising stride."""
        return [step(x) for step, x in zip((self.fpn1, self.fpn2, self.fpn3, self.fpn4), maps, strict=True)]


class MaxPoolWhole(nn.MaxPool2d):
    """A max-pool whose windows shrink to the map where it is smaller than they are: something is always left."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, max(H // k, 1), max(W // k, 1))."""
        return F.max_pool2d(x, [min(self.kernel_size, side) for side in x.shape[-2:]])


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose statistics in training are those of the whole batch, over all processes, on any device.

    (torch's SyncBatchNorm has no CPU path.) Mean first, then the variance around it, in float32 at least.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W), B and H x W may differ among the processes."""
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = wide.new_tensor([x.numel() / x.shape[1]])
        total = shared.all_reduce(torch.cat([wide.sum((0, 2, 3)), count]))
        count = total[-1:].detach()
        mean = total[:-1] / count
        centred = wide - mean.view(1, -1, 1, 1)
        var = shared.all_reduce(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = var * count / (count - 1)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return (centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(x.dtype)


def synchronise_batch_norm(module: nn.Module) -> nn.Module:
    """`module` with every BatchNorm2d made one over all processes: torch's own on a GPU, else `SyncedBatchNorm2d`."""
    device = next(module.parameters()).device
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = SyncedBatchNorm2d
    return module


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """x (B, C, H, W) bilinearly to `size` (height, width), corners not aligned."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
