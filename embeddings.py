"""Where tokens come from and where they are: patch embedding, rotary positions, resized position embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from fusion.token_state import TokenState, join_cls, split_cls

SCAN_ORDERS = ("Channel-First", "Spatial-First")


class PatchEmbed(nn.Module):
    """Image (B, C, H, W) -> patch tokens (B, rows * cols, D) in raster order, by a convolution of `patch_size` and
    `stride`.

    The grid is ((H - patch) // stride + 1, (W - patch) // stride + 1). An image of another size than `img_size` is an
    error, unless `dynamic`: then it is padded at the right and bottom to a multiple of the patch.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int,
        stride: int,
        in_chans: int,
        embed_dim: int,
        dynamic: bool = False,
    ) -> None:
        super().__init__()
        self.patch_size, self.stride, self.dynamic = to_2tuple(patch_size), to_2tuple(stride), dynamic
        self.resize(img_size)
        self.proj = self._new_proj(in_chans, embed_dim)

    def _new_proj(self, in_chans: int, embed_dim: int) -> nn.Module:
        return nn.Conv2d(in_chans, embed_dim, self.patch_size, self.stride)

    def resize(self, img_size: int | tuple[int, int]) -> None:
        """Take images of `img_size` from now on."""
        img_size = to_2tuple(img_size)
        if any(size < patch for size, patch in zip(img_size, self.patch_size)):
            raise ValueError(f"img_size is {img_size}; wanted at least one patch of {self.patch_size}.")
        self.img_size = img_size
        self.grid_size = self.grid_of(*img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """(rows, cols) of the token grid of an image, padded first where that is allowed."""
        if self.dynamic:
            height, width = (side + -side % patch for side, patch in zip((height, width), self.patch_size))
        sides = zip((height, width), self.patch_size, self.stride)
        rows, cols = ((side - patch) // stride + 1 for side, patch, stride in sides)
        return rows, cols

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """timm's name for `grid_of`."""
        return self.grid_of(*img_size)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """timm's name for how many pixels a token stands for along each side: the stride."""
        return max(self.stride) if as_scalar else self.stride

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Returns the tokens and their grid (rows, cols)."""
        if x.ndim != 4 or x.shape[1] != self.proj.in_channels:
            raise ValueError(
                f"Images have shape {tuple(x.shape)}; wanted (batch, {self.proj.in_channels}, height, width)."
            )
        x = self.proj(self._fitted(x))
        return x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])

    def _fitted(self, x: Tensor) -> Tensor:
        """Images padded where that is allowed, else of the right size."""
        height, width = x.shape[2:]
        if self.dynamic:
            if height < self.patch_size[0] or width < self.patch_size[1]:
                raise ValueError(f"Images are {height} x {width}; wanted at least one patch, {self.patch_size}.")
            x = F.pad(x, (0, -width % self.patch_size[1], 0, -height % self.patch_size[0]))
        elif (height, width) != self.img_size:
            raise ValueError(
                f"Images are {height} x {width}; this model wanted {self.img_size[0]} x {self.img_size[1]}."
            )
        return x


class ChannelPatchEmbed(PatchEmbed):
    """Every patch of every channel is a token, so that images may have any of the `in_chans` channels.

    One convolution 1 -> D runs on each channel alone; the token of channel c gets row c of a learned embedding added.
    Bao et al. 2024, "Channel Vision Transformers" (arXiv:2309.16108), equation 2. In training mode with `hcs` each call
    sees channels drawn anew (`sample_places`, in rising order if `sort_channels`), as its section 3.3 has it.

    `scan_order` says which tokens stand together, a patch's channels ("Channel-First": grid (rows, cols, channels)) or
    a channel's patches ("Spatial-First": grid (channels, rows, cols)). `num_patches` counts those of one channel.
    """

    def __init__(
        self,
        *args: Any,
        scan_order: str = SCAN_ORDERS[0],
        hcs: bool = True,
        sort_channels: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.scan_order, self.hcs, self.sort_channels = scan_order, hcs, sort_channels
        self.spatial_axes = (0, 1) if scan_order == "Channel-First" else (1, 2)
        self.channel_axis = 2 if scan_order == "Channel-First" else 0

    def _new_proj(self, in_chans: int, embed_dim: int) -> nn.Module:
        self.in_chans = in_chans
        self.channel_embed = nn.Embedding(in_chans, embed_dim)
        nn.init.normal_(self.channel_embed.weight, std=0.02)
        return nn.Conv3d(1, embed_dim, (1, *self.patch_size), (1, *self.stride))

    def forward(
        self, x: Tensor, channels: Sequence[int] | Sequence[Sequence[int]] | Tensor | None = None
    ) -> tuple[Tensor, tuple[int, int, int]]:
        """Images (B, n, H, W) -> tokens (B, rows * cols * n, D) and their grid.

        `channels` says which the n are: n distinct indices, or (B, n) where images differ; None is 0 to n - 1. Tokens
        stand in the order given.
        """
        if x.ndim != 4 or not 0 < x.shape[1] <= self.in_chans:
            raise ValueError(
                f"Images have shape {tuple(x.shape)}; wanted (batch, channels, height, width) of 1 to {self.in_chans} "
                "channels."
            )
        x, index = self._choose(x, channels)
        rows = self.channel_embed.weight[: x.shape[1]] if index is None else self.channel_embed(index)
        x = self.proj(self._fitted(x).unsqueeze(1)) + rows.transpose(-1, -2).unsqueeze(-1).unsqueeze(-1)
        x = x.permute(0, 3, 4, 2, 1) if self.channel_axis == 2 else x.permute(0, 2, 3, 4, 1)
        return x.flatten(1, 3), tuple(x.shape[1:4])

    def varies(self, training: bool) -> str:
        """What differs from pass to pass beside numbers on the device (`fusion.varies`)."""
        return "the host draws which channels are seen" if training and self.hcs else ""

    def _choose(self, x: Tensor, channels: Any) -> tuple[Tensor, Tensor | None]:
        """The channels that are embedded, and their indices, (n,) or (B, n); None for 0 to n - 1."""
        if channels is None and not (self.training and self.hcs):
            return x, None
        return self._drawn(x, channels)

    # what is drawn and checked on the CPU stays outside of what is compiled
    @torch.compiler.disable
    def _drawn(self, x: Tensor, channels: Any) -> tuple[Tensor, Tensor]:
        index = torch.arange(x.shape[1]) if channels is None else torch.as_tensor(channels)
        if index.is_floating_point() or index.shape not in ((x.shape[1],), x.shape[:2]):
            raise ValueError(
                f"channels is {tuple(index.shape)} of {index.dtype} for images of {tuple(x.shape)}; wanted "
                f"({x.shape[1]},) or {tuple(x.shape[:2])} of whole numbers."
            )
        if channels is not None:
            rows = index.sort(-1).values
            if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= self.in_chans):
                raise ValueError(f"channels is {index.tolist()}; wanted indices from 0 to {self.in_chans - 1}.")
            if bool((rows[..., 1:] == rows[..., :-1]).any()):
                raise ValueError(f"channels is {index.tolist()}; wanted every channel once.")
        if self.training and self.hcs:
            places = sample_places(x.shape[1], self.sort_channels)
            x, index = x[:, places], index[..., places]
        return x, index.to(x.device)

    def spread(self, rows: Tensor, grid: Sequence[int]) -> Tensor:
        """What every channel shares, (1, rows * cols, D) -> (1, M, D) for the tokens of `grid`."""
        rows = rows.unflatten(1, [grid[axis] for axis in self.spatial_axes]).unsqueeze(self.channel_axis + 1)
        return rows.expand(-1, *grid, -1).flatten(1, 3)

    def mean(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        """The mean over the channels: (B, M, D) -> (B, rows * cols, D)."""
        return tokens.unflatten(1, grid).mean(self.channel_axis + 1).flatten(1, 2)


def sample_places(count: int, in_order: bool = True) -> list[int]:
    """How many of `count` places, drawn uniformly from 1 on, and then which, without replacement; rising if `in_order`.

    Hierarchical channel sampling (Bao et al. 2024, arXiv:2309.16108, algorithm 1), from torch's CPU generator.
    """
    chosen = torch.randperm(count)[: int(torch.randint(1, count + 1, ()))].tolist()
    return sorted(chosen) if in_order else chosen


class RotaryEmbedding2d(nn.Module):
    """Rotates channel pairs of the patch tokens by their grid position: rows turn the first half, columns the second.

    Su et al. 2021 (arXiv:2104.09864), extended to a grid as in EVA-02 (arXiv:2303.11331): positions are scaled to
    `pretrain_side`.
    """

    def __init__(self, dim: int, grid: tuple[int, int], pretrain_side: int, theta: float = 10000.0) -> None:
        super().__init__()
        if dim % 4:
            raise ValueError(f"embed_dim is {dim}; wanted a multiple of 4 for the rotary embedding.")
        self.dim, self.grid, self.pretrain_side, self.theta = dim, grid, pretrain_side, theta
        angles = self._angles(grid)
        self.register_buffer("freqs_cos", angles.cos(), persistent=False)
        self.register_buffer("freqs_sin", angles.sin(), persistent=False)

    def _angles(self, grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
        """The angle of each channel at each place of `grid`, (rows * cols, dim)."""
        half = self.dim // 2
        frequencies = self.theta ** (-torch.arange(0, half, 2, device=device) / half)
        rows, cols = (torch.arange(n, device=device)[:, None] / n * self.pretrain_side * frequencies for n in grid)
        angles = torch.cat([rows[:, None].expand(-1, grid[1], -1), cols[None].expand(grid[0], -1, -1)], -1)
        return angles.flatten(0, 1).repeat_interleave(2, -1)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        # published checkpoints hold the tables, which follow from the grid
        for name in ("freqs_cos", "freqs_sin"):
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor, state: TokenState) -> Tensor:
        """Turn the patch tokens of x (B, L, D), which stand where `state` says; class tokens pass."""
        cos, sin = self.freqs_cos, self.freqs_sin
        if state.grid is not None and state.grid != self.grid:
            angles = self._angles(state.grid, cos.device)
            cos, sin = angles.cos().to(cos.dtype), angles.sin().to(sin.dtype)
        if state.positions is not None:
            cos, sin = cos[state.positions], sin[state.positions]
        classes, patches = split_cls(x, state.cls)
        even, odd = patches.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-odd, even], -1).flatten(-2)
        return join_cls(classes, (patches * cos + turned * sin).to(x.dtype), state.cls)


def resize_pos_embed(
    pos_embed: Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    class_token_positions: Callable[[int], tuple[int, ...]],
) -> Tensor:
    """Resize (1, L, D) from one token grid to another, bicubically; class-token rows keep their value and their right
    place.

    (The Vim release resizes as if the class token came first, which shifts and mixes the rows of a middle token.)
    """
    old_cls = class_token_positions(old_grid[0] * old_grid[1])
    if pos_embed.shape[1] != old_grid[0] * old_grid[1] + len(old_cls):
        raise ValueError(
            f"pos_embed has {pos_embed.shape[1]} rows; wanted those of a grid of {old_grid} and the class tokens."
        )
    classes, patches = split_cls(pos_embed, old_cls)
    patches = patches.transpose(1, 2).unflatten(2, old_grid)
    patches = F.interpolate(patches.float(), size=new_grid, mode="bicubic", align_corners=False).to(pos_embed.dtype)
    return join_cls(classes, patches.flatten(2).transpose(1, 2), class_token_positions(new_grid[0] * new_grid[1]))
