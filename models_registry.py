"""The names of timm's registry that spell this project's models: what each stands for, its aliases, and how published
systems spell it."""

from __future__ import annotations

from typing import Any

import timm

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
_DYVM = dict(pruning="both")
_VIDEOMAMBA = VIM | dict(use_middle_cls_token=False, if_divide_out=False)

_TINY, _SMALL, _BASE = (dict(embed_dim=dim, depth=24) for dim in (192, 384, 768))
_LARGE = dict(embed_dim=1024, depth=48)
_NANO = dict(img_size=32, patch_size=4, embed_dim=64, depth=8, num_classes=10, drop_path_rate=0.0)
_STRIDE8 = dict(stride=8)

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

REGISTRY |= {
    f"vim_{size}_patch16_224_final_pool_mean_abs_pos_embed_with_midclstok_div2": _VIM_NORM | settings
    for size, settings in (("tiny", _TINY), ("small", _SMALL), ("base", _BASE), ("large", _LARGE))
}

_LONG = "bimambav2_final_pool_mean_abs_pos_embed_with"
ALIASES = {
    f"vim_tiny_patch16_224_{_LONG}_midclstok_div2": "vim_tiny_patch16_224",
    f"vim_small_patch16_224_{_LONG}_midclstok_div2": "vim_small_patch16_224",
    f"vim_tiny_patch16_stride8_224_{_LONG}_midclstok_div2": "vim_tiny_patch16_224_stride8",
    f"vim_small_patch16_stride8_224_{_LONG}_midclstok_div2": "vim_small_patch16_224_stride8",
    f"vim_base_patch16_224_{_LONG}_middle_cls_token_div2": "vim_base_patch16_224",
} | {
    f"vim_{size}_final_pool_mean_abs_pos_embed_with_noclstok_div2": f"fastvim_{size}"
    for size in ("tiny_patch16_224", "small_patch16_224", "base_patch16_224", "large_patch16_224", "huge_patch14_224")
}
_LONG_CHANNELS = "channelvim_small_patch16_224_final_pool_mean_abs_pos_embed_with"
ALIASES |= {
    f"{_LONG_CHANNELS}_noclstok_div2": "fastchannelvim_small_patch16_224",
    f"{_LONG_CHANNELS}_midclstok_div2": "channelvim_small_patch16_224",
}

# How `--model` is spelt in DyVM's release, and what each is here.
PUBLISHED_SPELLINGS = {
    "Vim-Tiny": "dyvm_tiny_patch16_224",
    "Vim-Small": "dyvm_small_patch16_224",
    "Vim-Base": "dyvm_base_patch16_224",
    "VideoMamba-Tiny": "dyvm_videomamba_tiny_patch16_224",
    "VideoMamba-Small": "dyvm_videomamba_small_patch16_224",
}


def registry_name(name: str) -> str:
    """The name in timm's registry that `name`, as `--model` takes it, stands for."""
    return PUBLISHED_SPELLINGS.get(name, name)


def registry_keywords(name: str) -> dict[str, Any]:
    """The model keywords that a registry name fixes.

    A name registered elsewhere says them in an attribute `keywords` of its function; without it there are none.
    """
    name = registry_name(name)
    if not timm.is_model(name):
        return {}
    return dict(getattr(timm.model_entrypoint(name), "keywords", {}))
