"""Models small enough to train in a second, in timm's registry, and the program that knows them.

`python benchmarks/micro_models.py FLAGS...` is `python main.py FLAGS...` with these names added.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import timm
from timm.models import generate_default_cfgs, register_model

import models_mae  # noqa: F401 - its names join the registry
import models_mamba

SIZES: dict[str, Any] = dict(depth=4, embed_dim=32, patch_size=8)
FAMILIES = (
    *("vim", "fambav", "fastvim", "dyvm", "mambareg", "dyvm_mambareg", "mae_vim", "mae_fastvim"),
    *("channelvim", "fastchannelvim"),
)
default_cfgs = generate_default_cfgs(
    {
        f"{family}_micro_patch8_32": dict(
            input_size=(3, 32, 32), fixed_input_size=True, num_classes=0 if family.startswith("mae_") else 10
        )
        for family in FAMILIES
    }
)


def _entry(family: str) -> Any:
    more = {"dyvm": dict(pruning_loc=(1, 2, 3)), "mae": dict(decoder_embed_dim=32)}
    own = SIZES | more.get(family.partition("_")[0], {})

    def build(pretrained: bool = False, **kwargs: Any) -> models_mamba.VisionMamba:
        keywords = own | kwargs
        keywords = {name: value for name, value in keywords.items() if not name.startswith(("pretrained", "cache"))}
        return timm.create_model(f"{family}_nano_patch4_32", **keywords)

    build.keywords = models_mamba.registry_keywords(f"{family}_nano_patch4_32") | own
    build.__name__ = build.__qualname__ = f"{family}_micro_patch8_32"
    return register_model(build)


for _family in FAMILIES:
    globals()[f"{_family}_micro_patch8_32"] = _entry(_family)

if __name__ == "__main__":
    import main

    sys.exit(main.main())
