"""A new fusion strategy in 30 lines: merge more and more tokens towards the end of the network.

python -m examples.new_strategy --model vim_nano_ramp --epochs 1            # main.py with the new name
"""

import sys
from collections.abc import Callable
from typing import Any

import timm
from timm.models import generate_default_cfgs, register_model
from torch import nn

import main as program
from fusion.token_merging import merge_tokens
from fusion.token_state import SiteMethod, TokenState


class RampMerging(SiteMethod):
    """Fuses 0 tokens after the first site, `most` after the last, and evenly more in between."""

    def __init__(self, most: int, order: str = "raster") -> None:
        self.most, self.order = most, order

    def attach(self, model: nn.Module) -> None:
        """Learn how many sites `model` has."""
        self.counts = [round(self.most * index / (model.num_sites - 1)) for index in range(model.num_sites)]

    def __call__(self, index: int, state: TokenState, run: Callable[..., TokenState]) -> TokenState:
        return merge_tokens(run(state), self.counts[index], self.order)


default_cfgs = generate_default_cfgs({"vim_nano_ramp": dict(input_size=(3, 32, 32), fixed_input_size=True)})


@register_model
def vim_nano_ramp(pretrained: bool = False, most: int = 12, **kwargs: Any) -> nn.Module:
    """`vim_nano_patch4_32` with this strategy."""
    model = timm.create_model("vim_nano_patch4_32", pretrained, **kwargs)
    method = RampMerging(most)
    method.attach(model)
    model.site_methods.append(method)
    return model


if __name__ == "__main__":
    sys.exit(program.main())
