"""The keywords of `VisionMamba`, beside those of the methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from embeddings import SCAN_ORDERS
from fusion.token_state import ClassTokens


@dataclass(frozen=True)
class VimSettings:
    """The keywords of `VisionMamba` that are no method's: those of the published constructor, and a few more.

    `stride` defaults to `patch_size`. Class token: `use_middle_cls_token` puts it at index M // 2 of M patches,
    `use_double_cls_token` one at each end (read as their mean), else it comes first; `if_cls_token=False` averages all
    tokens (`final_pool_type="mean"`). `if_bidirectional` takes layers in pairs, the second on the reversed sequence;
    `pair_residual` says whether the two residuals, equal but for drop-path, are summed (published: it doubles the
    residual at every site) or averaged. `flip_img_sequences_ratio` is the chance that training reverses the sequence.
    `use_norm_after_ssm` puts a LayerNorm between scan and gate; None does so with spatial pooling only.

    `channel_tokens` makes every patch of every channel a token (ChannelVim; `ChannelPatchEmbed`, whose keywords are
    `hcs`, `sort_channels` and `scan_order`); `channels` is then another name of `in_chans`, how many the model knows.
    Class tokens have no positions there.
    """

    img_size: int | tuple[int, int] = 224
    patch_size: int = 16
    stride: int | None = None
    depth: int = 24
    embed_dim: int = 192
    d_state: int = 16
    in_chans: int = 3
    num_classes: int = 1000
    ssm_cfg: dict[str, Any] | None = None
    drop_rate: float = 0.0
    drop_path_rate: float = 0.1
    norm_epsilon: float = 1e-5
    rms_norm: bool = False
    fused_add_norm: bool = False
    residual_in_fp32: bool = False
    ft_seq_len: int | None = None
    pt_hw_seq_len: int = 14
    if_bidirectional: bool = False
    pair_residual: str = "sum"
    final_pool_type: str = "none"
    if_abs_pos_embed: bool = False
    if_rope: bool = False
    if_rope_residual: bool = False
    flip_img_sequences_ratio: float = -1.0
    if_bimamba: bool = False
    bimamba_type: str = "none"
    if_cls_token: bool = False
    if_divide_out: bool = False
    init_layer_scale: float | None = None
    use_double_cls_token: bool = False
    use_middle_cls_token: bool = False
    use_norm_after_ssm: bool | None = None
    channel_tokens: bool = False
    channels: int | None = None
    hcs: bool = True
    sort_channels: bool = True
    scan_order: str = SCAN_ORDERS[0]
    if_devide_out: bool | None = None  # the published spelling

    def __post_init__(self) -> None:
        if self.final_pool_type not in ("none", "mean"):
            raise ValueError(f"final_pool_type is {self.final_pool_type!r}; wanted 'none' or 'mean'.")
        if self.if_bidirectional and self.depth % 2:
            raise ValueError(
                f"depth is {self.depth}; wanted an even number, since if_bidirectional takes layers in pairs."
            )
        if self.pair_residual not in ("sum", "mean"):
            raise ValueError(f"pair_residual is {self.pair_residual!r}; wanted 'sum' or 'mean'.")
        if self.scan_order not in SCAN_ORDERS:
            raise ValueError(f"scan_order is {self.scan_order!r}; wanted {' or '.join(map(repr, SCAN_ORDERS))}.")
        if self.channel_tokens and self.if_rope:
            raise ValueError("Channels of a patch share its position: wanted channel_tokens without if_rope.")

    @property
    def class_tokens(self) -> ClassTokens:
        """How many class tokens there are, and their places."""
        if not self.if_cls_token:
            return ClassTokens()
        positions = "none" if self.channel_tokens else "shared"
        if self.use_double_cls_token:
            return ClassTokens(2, "ends", positions)
        return ClassTokens(1, "middle" if self.use_middle_cls_token else "front", positions)
