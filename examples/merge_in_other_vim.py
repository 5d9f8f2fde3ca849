"""Plug token merging into someone else's Vim, from outside: `python -m examples.merge_in_other_vim`.

The functions of `fusion.token_merging` know no model. Any Vision Mamba whose blocks pass on (hidden, residual), with
the class token first, merges after a hook on its blocks; its code and its weights stay as they are.
"""

from __future__ import annotations

import torch
from mamba_ssm import Mamba
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fusion.token_merging import bipartite_soft_matching, merge


def add_token_merging(blocks: nn.ModuleList, layer: int, r: int, order: str = "raster") -> list[RemovableHandle]:
    """Let `blocks` fuse `r` pairs of tokens after each one behind `layer`; `.remove()` the handles to undo it."""

    def merge_tokens(block: nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        hidden, residual = output
        matching = bipartite_soft_matching(hidden, r, class_token=True, order=order)
        return merge(hidden, matching), merge(residual, matching)

    return [block.register_forward_hook(merge_tokens) for block in blocks[layer + 1 :]]


class TheirBlock(nn.Module):
    """Someone else's block: add, norm, mix."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.mixer = Mamba(dim, bimamba_type="v2", if_divide_out=True)

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        residual = hidden if residual is None else hidden + residual
        return self.mixer(self.norm(residual)), residual


class TheirVim(nn.Module):
    """Someone else's Vim: images (B, 3, H, W) -> logits (B, num_classes)."""

    def __init__(
        self, img_size: int = 32, patch: int = 4, dim: int = 64, depth: int = 8, num_classes: int = 10
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential()
        self.patch_embed.add_module("proj", nn.Conv2d(3, dim, patch, patch))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, (img_size // patch) ** 2 + 1, dim))
        self.layers = nn.ModuleList(TheirBlock(dim) for _ in range(depth))
        self.norm_f = nn.RMSNorm(dim, eps=1e-5)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        hidden = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1) + self.pos_embed
        residual = None
        for block in self.layers:
            hidden, residual = block(hidden, residual)
        return self.head(self.norm_f(hidden + residual)[:, 0])


@torch.inference_mode()
def main() -> None:
    """Show how many tokens each block of a Vim sees without and with merging."""
    model, images, lengths = TheirVim().eval(), torch.randn(2, 3, 32, 32), []
    for block in model.layers:
        block.register_forward_pre_hook(lambda block, args: lengths.append(args[0].shape[1]))
    model(images)
    handles = add_token_merging(model.layers, layer=2, r=8)
    model(images)
    for handle in handles:
        handle.remove()
    half = len(lengths) // 2
    print(f"Tokens that each block sees: {lengths[:half]} as it was, {lengths[half:]} with merging.")


if __name__ == "__main__":
    main()
