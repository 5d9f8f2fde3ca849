"""One encoder layer of a Vision Mamba, and its add and norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.modules.parts import is_bare, is_plain
from mamba_ssm.ops.layers import Layer, has_layers, layers_fn
from mamba_ssm.ops.triton.layernorm import RMSNorm, layer_norm_fn
from timm.layers import DropPath
from torch import Tensor, nn

from embeddings import resize_pos_embed
from fusion.method import SitePlan
from fusion.token_state import TokenState

AT_ONCE = 6  # layers in one step of the graph of gradients


class Block(nn.Module):
    """One encoder layer: add the last output to the residual, normalise, mix."""

    def __init__(
        self,
        mixer: Mamba,
        norm: nn.Module,
        drop_path: float,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.mixer, self.norm = mixer, norm
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.fused_add_norm, self.residual_in_fp32 = fused_add_norm, residual_in_fp32

    def forward(self, hidden: Tensor, residual: Tensor | None, **mixer_args: Any) -> tuple[Tensor, Tensor]:
        """hidden, residual (B, L, D) -> the mixer's output and the new residual; `mixer_args` go to the mixer."""
        if residual is not None:
            hidden = self.drop_path(hidden)
        hidden, residual = add_norm(self.norm, hidden, residual, self.fused_add_norm, self.residual_in_fp32)
        return self.mixer(hidden, **mixer_args), residual


def run_layers(layers: Sequence[Block], state: TokenState, plans: Sequence[SitePlan]) -> TokenState:
    """The sequence behind one layer after the other, each with what its site's plan says: in one operator where that
    does the same, as for layers that are as they were made, else by calling each."""
    hidden, residual = state.hidden, state.residual
    found = _as_operator(layers, hidden, residual, plans)
    if found is not None:
        # gradients of weights add up while what they are computed from is kept, so that a step has some layers
        size = AT_ONCE if torch.is_grad_enabled() else len(found)
        for start in range(0, len(found), size):
            hidden, residual = layers_fn(hidden, residual, found[start : start + size])
    else:
        for layer, plan in zip(layers, plans, strict=True):
            hidden, residual = layer(hidden, residual, **plan.mixer_args)
            if plan.merging is not None:
                hidden, residual = plan.merging(hidden, residual)
    for merging in (plan.merging for plan in plans if plan.merging is not None):
        state = state.merged(hidden, residual, merging.moved)
    return state.replace(hidden=hidden, residual=residual)


def _as_operator(
    layers: Sequence[Block], hidden: Tensor, residual: Tensor | None, plans: Sequence[SitePlan]
) -> list[Layer] | None:
    """What `layers_fn` is to be given; None where a layer has to be called."""
    if torch.compiler.is_compiling() or not has_layers(hidden, residual):
        return None
    found = []
    for layer, (mixer_args, merging) in zip(layers, plans, strict=True):
        if not is_bare(layer, Block) or not layer.fused_add_norm:
            return None
        norm, mixer, drop_path = layer.norm, layer.mixer, layer.drop_path
        if not is_bare(mixer, Mamba) or not is_plain(norm):
            return None
        if not isinstance(drop_path, nn.Identity) and not is_bare(drop_path, DropPath):
            return None
        whole = mixer.whole(hidden, **mixer_args) if mixer_args.keys() <= {"pooling", "token_mask"} else None
        if whole is None or norm.weight is None:
            return None
        found.append(Layer(norm.weight, norm.bias, norm.eps, isinstance(norm, RMSNorm), whole, merging=merging))
    # once all are known to be run as one, since each that is called draws, too; the first of all never drops
    for place in range(residual is None, len(layers)):
        drop_path = layers[place].drop_path
        if not isinstance(drop_path, nn.Identity) and drop_path.training and drop_path.drop_prob:
            found[place] = found[place]._replace(factor=drop_path(hidden.new_ones(len(hidden), 1, 1)))
    return found


def add_norm(
    norm: nn.Module, hidden: Tensor, residual: Tensor | None, fused: bool, residual_in_fp32: bool
) -> tuple[Tensor, Tensor]:
    """residual + hidden, and its norm: in one operator if `fused` and the norm is as it was made, else step by step in
    the dtypes that torch gives, the norm as the module that it is.

    `residual_in_fp32` keeps the residual in float32 at least: a model in float64 has it in float64.
    """
    residual_in_fp32 = residual_in_fp32 and hidden.dtype != torch.float64
    if fused and is_plain(norm):
        is_rms = isinstance(norm, RMSNorm)
        return layer_norm_fn(
            hidden, norm.weight, norm.bias, residual, norm.eps, True, residual_in_fp32, is_rms_norm=is_rms
        )
    residual = hidden if residual is None else residual + hidden
    if residual_in_fp32:
        residual = residual.float()
    return norm(residual.to(norm.weight.dtype)), residual


def init_linears(module: nn.Module, depth: int) -> None:
    """Vim's initialisation of the linear layers in `module`: zero biases but for dt_proj's, and out_proj
    Kaiming-uniform over sqrt(depth), one residual branch a layer."""
    for name, linear in module.named_modules():
        if not isinstance(linear, nn.Linear):
            continue
        if name.endswith("out_proj"):
            nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
            with torch.no_grad():
                linear.weight /= math.sqrt(depth)
        if linear.bias is not None and not getattr(linear.bias, "_no_reinit", False):
            nn.init.zeros_(linear.bias)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """timm's hook on loaded weights: fit the position embedding of a square grid to the model's own grid."""
    pos_embed = state_dict.get("pos_embed")
    if pos_embed is None or model.pos_embed is None or pos_embed.shape[1] == model.pos_embed.shape[1]:
        return state_dict
    num_patches = pos_embed.shape[1] - len(model.class_row_positions(model.patch_embed.num_patches))
    side = math.isqrt(max(num_patches, 0))
    if side * side != num_patches:
        raise ValueError(
            f"pos_embed has {num_patches} patch rows; wanted a square number, to know the grid it was made for."
        )
    resized = resize_pos_embed(pos_embed, (side, side), model.pos_embed_grid, model.class_row_positions)
    return state_dict | {"pos_embed": resized}


def made_at(build: Callable[[], nn.Module], device: Any = None, dtype: torch.dtype | None = None) -> nn.Module:
    """What `build` makes, on a device and in a dtype where those are given."""
    with nullcontext() if device is None else torch.device(device):
        model = build()
    return model if dtype is None else model.to(dtype=dtype)


class Untraced(nn.Module):
    """A module that `torch.jit.script` and `torch.fx` refuse in words that lead on."""

    def __prepare_scriptable__(self) -> nn.Module:
        raise TypeError("torch.jit.script cannot read this model's Python; wanted torch.jit.trace or torch.export.")

    @staticmethod
    def refuse_symbolic(x: Tensor) -> None:
        """Raise TypeError for the stand-in by which `torch.fx` follows a model."""
        if isinstance(x, torch.fx.Proxy):
            raise TypeError(
                "torch.fx cannot follow this model, which looks at sizes and values; wanted features by "
                "forward_intermediates or timm's features_only, and graphs by torch.export."
            )
