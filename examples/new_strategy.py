"""A new fusion strategy in 30 lines: merge more and more tokens towards the end of the network.

python -m examples.new_strategy --ramp 12 --epochs 1                   # main.py with one more flag
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

import main as program
from fusion import Settings, SiteMethod, option, register
from fusion.token_merging import merge_tokens
from fusion.token_state import TokenState


@dataclass(frozen=True)
class RampSettings(Settings):
    """Fuse 0 tokens after the first site, `most` after the last, and evenly more in between."""

    most: int = option(0, "tokens to fuse after the last site", flag="--ramp", keyword="ramp", type=int, metavar="R")


class RampMerging(SiteMethod):
    """Fuses more tokens the later the site."""

    name, title, Settings, switch, off = "ramp", "merging that rises", RampSettings, "ramp", 0

    @classmethod
    def conflicts(cls, settings: RampSettings, others: Mapping[str, Any]) -> str | None:
        if any(others[name] is not None for name in ("merging", "pooling", "pruning")):
            return "--ramp merges tokens itself: wanted it without another method."
        return None

    def attach(self, model: nn.Module) -> None:
        sites = range(model.num_sites)
        self.counts = [round(self.settings.most * index / sites[-1]) for index in sites]

    def __call__(self, index: int, state: TokenState, run: Callable[..., TokenState]) -> TokenState:
        return merge_tokens(run(state), self.counts[index], "raster")


if __name__ == "__main__":
    register(RampMerging)
    sys.exit(program.main())
