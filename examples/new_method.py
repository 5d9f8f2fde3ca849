"""A method from outside with a flag, a loss and a parameter: a second head that learns behind an early site.

python -m examples.new_method --early-readout 3 --epochs 1             # main.py with two more flags
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import main as program
from fusion import Settings, SiteMethod, option, register
from fusion.token_state import TokenState, split_cls


@dataclass(frozen=True)
class EarlySettings(Settings):
    """What the model has to know: one keyword, `early_readout`, and its flag."""

    site: int = option(
        -1, "site behind which a second head reads", flag="--early-readout", keyword="early_readout", type=int
    )


@dataclass(frozen=True)
class EarlyTraining(Settings):
    """What only training has to know: a flag."""

    early_readout_weight: float = option(0.3, "loss weight of that head", flag="--early-readout-weight", type=float)


class EarlyLoss(nn.Module):
    """The task's own criterion on both heads; `parts` are logged."""

    def __init__(self, base: nn.Module, weight: float) -> None:
        super().__init__()
        self.base, self.weight, self.parts = base, weight, {}

    def forward(self, samples: Tensor, outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        last, early = (self.base(samples, logits, targets) for logits in outputs)
        self.parts = {"last": last.detach(), "early": self.weight * early.detach()}
        return last + self.weight * early


class EarlyReadout(SiteMethod):
    """Trains a second head, whose logits training returns beside the model's own; evaluation does without."""

    name, title = "early", "a head behind an early site"
    Settings, Training, switch, off = EarlySettings, EarlyTraining, "early_readout", -1

    @classmethod
    def conflicts(cls, settings: EarlySettings, others: Mapping[str, Any]) -> str | None:
        if others["pruning"] is not None:
            return "--early-readout and pruning both replace what training returns: wanted one of the two."
        return None

    def attach(self, model: nn.Module) -> None:
        if not 0 <= self.settings.site < model.num_sites:
            raise ValueError(f"early_readout is {self.settings.site}; wanted a site, 0 to {model.num_sites - 1}.")
        self.model, model.early_head = model, nn.Linear(model.embed_dim, model.num_classes)

    def __call__(self, index: int, state: TokenState, run: Callable[..., TokenState]) -> TokenState:
        state = run(state)
        if index == self.settings.site and self.model.training:
            classes, patches = split_cls(state.hidden + state.residual, state.cls)
            features = (classes if state.num_cls else patches).mean(1)
            state = state.with_entry(self.name, self.model.early_head(features))
        return state

    def output(self, output: Tensor, state: TokenState, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return output, state.entry(self.name)

    def criterion(self, base: nn.Module, teacher: nn.Module | None, args: argparse.Namespace) -> nn.Module:
        return EarlyLoss(base, args.early_readout_weight)


if __name__ == "__main__":
    register(EarlyReadout)
    sys.exit(program.main())
