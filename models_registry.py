"""What a Vision Mamba is built from: its keywords, and the names of timm's registry that stand for them, with their
aliases and the spellings of published systems."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

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
    `num_cls_tokens` puts that many registers, spread among the patches, in the class token's place (MambaReg,
    arXiv:2405.14858); all are read, each narrowed to embed_dim / `cls_reduce` channels. `global_pool` is timm's: what
    the head reads, the class tokens ("token"), the mean of the patch tokens ("avg"), or each token ("", so that the
    model returns them all); None reads class tokens where there are any.

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
    num_cls_tokens: int | None = None
    cls_reduce: int = 1
    global_pool: str | None = None
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
            raise ValueError(
                "Channels of a patch share its position: wanted channel_tokens without if_rope, registers."
            )
        if self.channel_tokens and self.num_cls_tokens is not None:
            raise ValueError("Registers have positions of their own: wanted channel_tokens without num_cls_tokens.")
        if self.num_cls_tokens is not None and self.num_cls_tokens < 1:
            raise ValueError(f"num_cls_tokens is {self.num_cls_tokens}; wanted 1 register or more.")
        if self.cls_reduce != 1 and self.num_cls_tokens is None:
            raise ValueError(f"cls_reduce is {self.cls_reduce}; wanted it with num_cls_tokens only.")
        if self.cls_reduce < 1 or self.embed_dim % self.cls_reduce:
            raise ValueError(f"cls_reduce is {self.cls_reduce}; wanted a divisor of embed_dim, {self.embed_dim}.")

    @property
    def class_tokens(self) -> ClassTokens:
        """How many class tokens there are, their places and positions, and how they are read."""
        if self.num_cls_tokens is not None:
            return ClassTokens(self.num_cls_tokens, "spread", positions="own", readout="concat")
        if not self.if_cls_token:
            return ClassTokens()
        positions = "none" if self.channel_tokens else "shared"
        if self.use_double_cls_token:
            return ClassTokens(2, "ends", positions)
        return ClassTokens(1, "middle" if self.use_middle_cls_token else "front", positions)


# --- names ---

VIM = dict(
    rms_norm=True,
    residual_in_fp32=True,
    fused_add_norm=True,
    final_pool_type="mean",
    if_abs_pos_embed=True,
    bimamba_type="v2",
    if_cls_token=True,
    if_divide_out=True,
    use_middle_cls_token=True,
)
FASTVIM = VIM | dict(if_cls_token=False, use_middle_cls_token=False, spatial_pool=True)
_CHANNELS = dict(channel_tokens=True, in_chans=8, use_norm_after_ssm=True)
_CHANNELVIM, _FASTCHANNELVIM = VIM | _CHANNELS, FASTVIM | _CHANNELS
_VIM_NORM = VIM | dict(use_norm_after_ssm=True)  # the Vim that FastVim's authors pre-train and fine-tune
_FAMBAV = VIM | dict(if_bidirectional=True, use_middle_cls_token=False)
_FAMBAV_UNPAIRED = VIM | dict(use_middle_cls_token=False)  # what Famba-V's release calls its small model
_DYVM = dict(pruning="both")
_MAMBAREG = VIM | dict(use_middle_cls_token=False, num_cls_tokens=12)
_VIDEOMAMBA = VIM | dict(use_middle_cls_token=False, if_divide_out=False)

_TINY, _SMALL, _BASE = (dict(embed_dim=dim, depth=24) for dim in (192, 384, 768))
_LARGE = dict(embed_dim=1024, depth=48)
_NANO = dict(img_size=32, patch_size=4, embed_dim=64, depth=8, num_classes=10, drop_path_rate=0.0)
_STRIDE8 = dict(stride=8)
_MAMBAREG_SIZES = {
    "tiny_patch16_224": _TINY,
    "small_patch16_224": _SMALL | dict(cls_reduce=2),
    "base_patch16_224": _BASE | dict(cls_reduce=4),
    "large_patch16_224": dict(embed_dim=1024, depth=48, num_cls_tokens=16, cls_reduce=8),
    "nano_patch4_32": _NANO | dict(num_cls_tokens=4, cls_reduce=2),
}

REGISTRY: dict[str, dict[str, Any]] = {
    "vim_nano_patch4_32": VIM | _NANO,
    "fambav_nano_patch4_32": _FAMBAV | _NANO,
    "fastvim_nano_patch4_32": FASTVIM | _NANO,
    "dyvm_nano_patch4_32": VIM | _NANO | _DYVM | dict(pruning_loc=(2, 4, 6)),
    "vim_tiny_patch16_224": VIM | _TINY,
    "vim_small_patch16_224": VIM | _SMALL,
    "vim_base_patch16_224": VIM | _BASE,
    "vim_tiny_patch16_224_stride8": VIM | _TINY | _STRIDE8,
    "vim_small_patch16_224_stride8": VIM | _SMALL | _STRIDE8,
    "vim_base_patch16_224_stride8": VIM | _BASE | _STRIDE8,
    "fambav_tiny_patch16_224": _FAMBAV | _TINY,
    "fambav_small_patch16_224": _FAMBAV | _SMALL,
    "fambav_small_unpaired_patch16_224": _FAMBAV_UNPAIRED | _SMALL,
    "fastvim_tiny_patch16_224": FASTVIM | _TINY,
    "fastvim_small_patch16_224": FASTVIM | _SMALL,
    "fastvim_base_patch16_224": FASTVIM | _BASE,
    "fastvim_large_patch16_224": FASTVIM | _LARGE,
    "fastvim_huge_patch14_224": FASTVIM | dict(embed_dim=1280, depth=64, patch_size=14),
    "dyvm_tiny_patch16_224": VIM | _TINY | _DYVM,
    "dyvm_small_patch16_224": VIM | _SMALL | _DYVM,
    "dyvm_base_patch16_224": VIM | _BASE | _DYVM,
    "videomamba_tiny_patch16_224": _VIDEOMAMBA | _TINY,
    "videomamba_small_patch16_224": _VIDEOMAMBA | _SMALL,
    "videomamba_middle_patch16_224": _VIDEOMAMBA | dict(embed_dim=576, depth=32),
    "videomamba_base_patch16_224": _VIDEOMAMBA | _BASE,
    "dyvm_videomamba_tiny_patch16_224": _VIDEOMAMBA | _TINY | _DYVM,
    "dyvm_videomamba_small_patch16_224": _VIDEOMAMBA | _SMALL | _DYVM,
    "dyvm_videomamba_middle_patch16_224": _VIDEOMAMBA | dict(embed_dim=576, depth=32) | _DYVM,
    "dyvm_videomamba_base_patch16_224": _VIDEOMAMBA | _BASE | _DYVM,
    "channelvim_nano_patch4_32": _CHANNELVIM | _NANO | dict(in_chans=5),
    "fastchannelvim_nano_patch4_32": _FASTCHANNELVIM | _NANO | dict(in_chans=5),
}
for _patch in (16, 8):
    _fast = _FASTCHANNELVIM | _SMALL | dict(patch_size=_patch)
    REGISTRY |= {
        f"channelvim_small_patch{_patch}_224": _CHANNELVIM | _SMALL | dict(patch_size=_patch),
        f"fastchannelvim_small_patch{_patch}_224": _fast,
        f"fastchannelvim_small_patch{_patch}_224_maxpool": _fast | dict(collapse_method="max"),
        f"fastchannelvim_small_patch{_patch}_224_2dcompress": _fast | dict(pool_dims=2),
    }
for _size, _keywords in _MAMBAREG_SIZES.items():
    _stages = dict(pruning_loc=(2, 4, 6)) if _size.startswith("nano") else {}
    REGISTRY[f"mambareg_{_size}"] = _MAMBAREG | _keywords
    REGISTRY[f"dyvm_mambareg_{_size}"] = _MAMBAREG | _keywords | _DYVM | _stages

REGISTRY |= {
    f"vim_{size}_final_pool_mean_abs_pos_embed_with_midclstok_div2": _VIM_NORM | settings
    for size, settings in (
        ("tiny_patch16_224", _TINY),
        ("small_patch16_224", _SMALL),
        ("base_patch16_224", _BASE),
        ("large_patch16_224", _LARGE),
        ("nano_patch4_32", _NANO),  # this project's
    )
}

_LONG = "bimambav2_final_pool_mean_abs_pos_embed_with"
ALIASES = (
    {f"mambar_{size}": f"mambareg_{size}" for size in _MAMBAREG_SIZES if "nano" not in size}
    | {
        f"vim_tiny_patch16_224_{_LONG}_midclstok_div2": "vim_tiny_patch16_224",
        f"vim_small_patch16_224_{_LONG}_midclstok_div2": "vim_small_patch16_224",
        f"vim_tiny_patch16_stride8_224_{_LONG}_midclstok_div2": "vim_tiny_patch16_224_stride8",
        f"vim_small_patch16_stride8_224_{_LONG}_midclstok_div2": "vim_small_patch16_224_stride8",
        f"vim_base_patch16_224_{_LONG}_middle_cls_token_div2": "vim_base_patch16_224",
    }
    | {
        f"vim_{size}_final_pool_mean_abs_pos_embed_with_noclstok_div2": f"fastvim_{size}"
        for size in (
            "tiny_patch16_224",
            "small_patch16_224",
            "base_patch16_224",
            "large_patch16_224",
            "huge_patch14_224",
        )
    }
)

_LONG_CHANNELS = "channelvim_small_patch16_224_final_pool_mean_abs_pos_embed_with"
ALIASES |= {
    f"{_LONG_CHANNELS}_noclstok_div2": "fastchannelvim_small_patch16_224",
    f"{_LONG_CHANNELS}_midclstok_div2": "channelvim_small_patch16_224",
}

# keywords that leave no trace in the weights
_SHAPELESS = {"use_middle_cls_token", "if_bidirectional", "if_divide_out", "drop_path_rate", "pruning_loc"}

# How `--model` is spelt in DyVM's release, and what each is here.
PUBLISHED_SPELLINGS = {
    "Vim-Tiny": "dyvm_tiny_patch16_224",
    "Vim-Small": "dyvm_small_patch16_224",
    "Vim-Base": "dyvm_base_patch16_224",
    "VideoMamba-Tiny": "dyvm_videomamba_tiny_patch16_224",
    "VideoMamba-Small": "dyvm_videomamba_small_patch16_224",
    "VideoMamba-Middle": "dyvm_videomamba_middle_patch16_224",
    "VideoMamba-Base": "dyvm_videomamba_base_patch16_224",
    "MambaReg-Tiny": "dyvm_mambareg_tiny_patch16_224",
    "MambaReg-Small": "dyvm_mambareg_small_patch16_224",
    "MambaReg-Base": "dyvm_mambareg_base_patch16_224",
    "MambaReg-Large": "dyvm_mambareg_large_patch16_224",
}


# The same with DyVM- in front, sizes by their first letter, and the plain models that are taught from.
_SPELLING = re.compile(
    r"(?:DyVM[-_]?)?(?P<family>Vim|VideoMamba|MambaReg)(?P<teacher>[-_]?Teacher)?"
    r"[-_](?P<size>Tiny|Small|Middle|Base|Large|[TSMBL])(?P<behind>[-_]?Teacher)?"
)
_SIZES = {name[0]: name for name in ("Tiny", "Small", "Middle", "Base", "Large")}


def registry_name(name: str) -> str:
    """The name in timm's registry that `name`, as `--model` takes it, stands for."""
    spelt = _SPELLING.fullmatch(name)
    if spelt is None:
        return name
    found = PUBLISHED_SPELLINGS.get(f"{spelt['family']}-{_SIZES[spelt['size'][0]]}", name)
    if not (spelt["teacher"] or spelt["behind"]):
        return found
    return found.replace("dyvm_", "" if spelt["family"] != "Vim" else "vim_")


def registry_keywords(name: str) -> dict[str, Any]:
    """The model keywords that a registry name fixes.

    A name registered elsewhere says them in an attribute `keywords` of its function; without it there are none.
    """
    name = registry_name(name)
    if not timm.is_model(name):
        return {}
    return dict(getattr(timm.model_entrypoint(name), "keywords", {}))


def pretrained_cfg(settings: dict[str, Any], *, classifier: str | None = "head", fixed: bool = False) -> dict[str, Any]:
    """timm's `pretrained_cfg` of a model with the keywords `settings`; `fixed` says that no image of another size goes
    through it, which holds for all but those with spatial pooling."""
    size = settings.get("img_size", 224)
    return dict(
        url="",
        num_classes=settings.get("num_classes", 1000),
        input_size=(settings.get("in_chans", 3), size, size),
        fixed_input_size=fixed or not settings.get("spatial_pool", False),
        pool_size=None,
        crop_pct=0.875,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv="patch_embed.proj",
        classifier=classifier,
    )


def class_place(name: str) -> str:
    """Where the one class token of a registry name stands that shares its table of positions with the patches, by the
    rules of `ClassTokens`; "" for a name that is unknown or has no such token."""
    keywords = registry_keywords(name)
    own = {each.name for each in fields(VimSettings)}
    classes = VimSettings(**{key: value for key, value in keywords.items() if key in own}).class_tokens
    return classes.place if keywords and classes.count == 1 and classes.positions == "shared" else ""


def names_of_same_weights(name: str, place: str) -> list[str]:
    """The registry names whose weights have the keys and shapes of those of `name`, and whose class token stands at
    `place`."""

    def shapes(keywords: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in keywords.items() if key not in _SHAPELESS}

    wanted = shapes(registry_keywords(name))
    return [other for other, own in REGISTRY.items() if shapes(own) == wanted and class_place(other) == place]
