"""A language model of Mamba blocks: Gu and Dao 2023 (arXiv:2312.00752), section 4.2."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.modules.block import Block, add_norm
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops.triton.layernorm import RMSNorm
from mamba_ssm.utils.generation import GenerationMixin
from mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf
from torch import Tensor, nn


class CausalLMOutput(NamedTuple):
    """`logits` (batch, length, vocabulary)."""

    logits: Tensor


def create_block(
    d_model: int,
    d_intermediate: int = 0,
    ssm_cfg: dict | None = None,
    attn_layer_idx: list[int] | None = None,
    attn_cfg: dict | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device=None,
    dtype=None,
) -> Block:
    """A block with a Mamba mixer; its arguments but for MLPs and attention, which this package does not have.

    Raises:
        NotImplementedError: they ask for what it does not have.
    """
    ssm_cfg = dict(ssm_cfg or {})
    layer = ssm_cfg.pop("layer", "Mamba1")
    if layer != "Mamba1" or d_intermediate or attn_layer_idx or attn_cfg:
        given = f"layer {layer!r}, d_intermediate {d_intermediate}, attention in layers {attn_layer_idx or 'none'}"
        raise NotImplementedError(f"{given}: wanted Mamba1 without MLP and attention, which is what this package has")
    factory = {"device": device, "dtype": dtype}
    mixer = partial(Mamba, layer_idx=layer_idx, **ssm_cfg, **factory)
    norm = partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **factory)
    block = Block(d_model, mixer, nn.Identity, norm, fused_add_norm, residual_in_fp32)
    block.layer_idx = layer_idx
    return block


def _init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """Normal embeddings, no biases, and what writes to the residual smaller with depth (Radford et al. 2019)."""
    if isinstance(module, nn.Linear) and module.bias is not None and not getattr(module.bias, "_no_reinit", False):
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    if rescale_prenorm_residual:
        for name, parameter in module.named_parameters():
            if name.endswith("out_proj.weight") and name.count(".") == 1:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
                with torch.no_grad():
                    parameter /= math.sqrt(n_residuals_per_layer * n_layer)


class MixerModel(nn.Module):
    """Embedding, blocks and last norm: input_ids (batch, length) -> (batch, length, d_model).

    In the first releases the vocabulary stood in `d_intermediate`'s place: a single number there is one.
    """

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        d_intermediate: int = 0,
        vocab_size: int | None = None,
        ssm_cfg: dict | None = None,
        attn_layer_idx: list[int] | None = None,
        attn_cfg: dict | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: dict | None = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if vocab_size is None:
            d_intermediate, vocab_size = 0, d_intermediate
        factory = {"device": device, "dtype": dtype}
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.embedding = nn.Embedding(vocab_size, d_model, **factory)
        norms = {"norm_epsilon": norm_epsilon, "rms_norm": rms_norm}
        adds = {"residual_in_fp32": residual_in_fp32, "fused_add_norm": fused_add_norm}
        others = {"ssm_cfg": ssm_cfg, "attn_layer_idx": attn_layer_idx, "attn_cfg": attn_cfg}
        self.layers = nn.ModuleList(
            create_block(d_model, d_intermediate, **others, **norms, **adds, layer_idx=number, **factory)
            for number in range(n_layer)
        )
        self.norm_f = (RMSNorm if rms_norm else nn.LayerNorm)(d_model, eps=norm_epsilon, **factory)
        self.apply(partial(_init_weights, n_layer=n_layer, **(initializer_cfg or {})))

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None, **kwargs) -> dict:
        """Each layer's states, by its number."""
        given = batch_size, max_seqlen, dtype
        return {number: layer.allocate_inference_cache(*given, **kwargs) for number, layer in enumerate(self.layers)}

    def forward(self, input_ids: Tensor, inference_params=None, **mixer_kwargs) -> Tensor:
        hidden, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, inference_params=inference_params, **mixer_kwargs)
        return add_norm(self.norm_f, hidden, residual, self.residual_in_fp32, self.fused_add_norm)[0]


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """`MixerModel` with a head: input_ids (batch, length) -> logits (batch, length, vocabulary)."""

    def __init__(self, config: MambaConfig, initializer_cfg: dict | None = None, device=None, dtype=None) -> None:
        super().__init__()
        self.config = config
        padding = -config.vocab_size % config.pad_vocab_size_multiple
        factory, vocab_size = {"device": device, "dtype": dtype}, config.vocab_size + padding
        self.backbone = MixerModel(
            d_model=config.d_model,
            n_layer=config.n_layer,
            d_intermediate=config.d_intermediate,
            vocab_size=vocab_size,
            ssm_cfg=config.ssm_cfg,
            attn_layer_idx=config.attn_layer_idx,
            attn_cfg=config.attn_cfg,
            rms_norm=config.rms_norm,
            initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm,
            residual_in_fp32=config.residual_in_fp32,
            **factory,
        )
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False, **factory)
        self.apply(partial(_init_weights, n_layer=config.n_layer, **(initializer_cfg or {})))
        self.tie_weights()

    def tie_weights(self) -> None:
        """One matrix for both ends, if the settings say so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None, **kwargs) -> dict:
        """Each layer's states, by its number."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self, input_ids: Tensor, position_ids=None, inference_params=None, num_last_tokens: int = 0, **mixer_kwargs
    ) -> CausalLMOutput:
        """Logits of all tokens, or of the last `num_last_tokens`; `position_ids` is accepted for published code."""
        hidden = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        return CausalLMOutput(self.lm_head(hidden[:, -num_last_tokens:] if num_last_tokens else hidden))

    @classmethod
    def from_pretrained(cls, pretrained_model_name: str, device=None, dtype=None, **kwargs) -> MambaLMHeadModel:
        """The model in a folder, or of a name on the hub."""
        model = cls(MambaConfig(**load_config_hf(pretrained_model_name)), device=device, dtype=dtype, **kwargs)
        model.load_state_dict(load_state_dict_hf(pretrained_model_name, device=device, dtype=dtype))
        return model

    def save_pretrained(self, save_directory: str) -> None:
        """Write weights and settings, as `from_pretrained` reads them."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), folder / "pytorch_model.bin")
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=4), encoding="utf-8")
