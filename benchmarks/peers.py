"""Peers of this project's models: those that a user would take instead, and one that timm does not name, with the
program that knows it.

python -m benchmarks.peers --model deit_nano_patch4_32 FLAGS...        # main.py with the names below added
"""

from __future__ import annotations

import sys
from typing import Any

import timm
from timm.models import generate_default_cfgs, register_model
from torch import nn

# What a user would take for the accuracy of DeiT-Ti (72.2 % top-1): that, and on a CPU the fastest of timm's own table
# at this accuracy, LCNet (72.1 %), and the fastest above it, MobileNetV4-S (73.8 %).
PEERS = ("deit_tiny_patch16_224", "lcnet_100", "mobilenetv4_conv_small")
NANO: dict[str, Any] = dict(img_size=32, patch_size=4, embed_dim=66, depth=6, num_heads=3, num_classes=10)

default_cfgs = generate_default_cfgs(
    {
        "deit_nano_patch4_32": dict(
            input_size=(3, 32, 32),
            fixed_input_size=True,
            num_classes=10,
            crop_pct=0.875,
            interpolation="bicubic",
            first_conv="patch_embed.proj",
            classifier="head",
        )
    }
)


@register_model
def deit_nano_patch4_32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's DeiT with as many parameters as `vim_nano_patch4_32` (0.33 M); keywords override."""
    own = {name: value for name, value in kwargs.items() if not name.startswith(("pretrained", "cache_dir"))}
    model = timm.create_model("deit_tiny_patch16_224", **(NANO | own))
    model.pretrained_cfg = model.default_cfg = default_cfgs["deit_nano_patch4_32"].default.to_dict()
    return model


if __name__ == "__main__":
    import main

    sys.exit(main.main())
