"""What learned pruning can be told: its keywords and flags, and what only fine-tuning needs."""

from __future__ import annotations

from dataclasses import dataclass

from fusion.method import Settings, option

KINDS = ("token", "block", "both")
POLICIES = ("learned", "static", "random")
PREDICTOR_INPUTS = ("hidden", "delta", "B")
TEACHERS = ("both", "logits")


@dataclass(frozen=True)
class PruningSettings(Settings):
    """Where tokens are dropped, to which share of the original ones, and the block keep target."""

    kind: str = option(
        "both",
        "what is pruned; 'both' by default on dyvm_* names, 'none' elsewhere",
        flag="--pruning",
        flag_default=None,
        keyword="pruning",
        choices=KINDS,
    )
    pruning_loc: tuple[int, ...] = option(
        (6, 12, 18),
        "layers before which tokens drop",
        flag="--pruning-loc",
        flag_default=None,
        type=int,
        nargs="+",
        metavar="I",
    )
    token_ratio: tuple[float, ...] = option(
        (0.7, 0.7**2, 0.7**3),
        "k: the stages keep k, k^2, k^3 of the tokens",
        flag="--token-keep-ratio",
        aliases=("--base_rate",),
        flag_default=0.7,
        type=float,
    )
    block_keep_ratio: float = option(
        0.8,
        "target share of scan directions that run",
        flag="--block-keep-ratio",
        aliases=("--layer-keep-ratio",),
        type=float,
    )
    policy: str = option(
        "learned", "ablation: who chooses", flag="--pruning-policy", keyword="pruning_policy", choices=POLICIES
    )
    predictor_input: str = option(
        "hidden", "ablation: what it looks at", flag="--predictor-input", choices=PREDICTOR_INPUTS
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.pruning_loc) != len(self.token_ratio):
            raise ValueError(
                f"token_ratio has {len(self.token_ratio)} shares for {len(self.pruning_loc)} stages of pruning_loc; "
                "wanted one share a stage."
            )
        if any(b <= a for a, b in zip(self.pruning_loc, self.pruning_loc[1:])) or min(self.pruning_loc, default=0) < 0:
            raise ValueError(f"pruning_loc is {list(self.pruning_loc)}; wanted increasing layer indices from 0 on.")
        for ratio in (*self.token_ratio, self.block_keep_ratio):
            if not 0 < ratio <= 1:
                raise ValueError(f"a keep ratio is {ratio:g}; wanted one above 0 and at most 1.")
        if any(b > a for a, b in zip(self.token_ratio, self.token_ratio[1:])):
            shares = ", ".join(f"{ratio:g}" for ratio in self.token_ratio)
            raise ValueError(
                f"token_ratio is {shares}; wanted shares that do not rise, since dropped tokens stay dropped."
            )
        if self.tokens and self.predictor_input != "hidden" and 0 in self.pruning_loc:
            raise ValueError(
                f"pruning_loc is {list(self.pruning_loc)}; wanted layers from 1 on for predictor_input "
                f"{self.predictor_input!r}, which the mixer before them gives."
            )

    @property
    def tokens(self) -> bool:
        """Whether tokens are pruned."""
        return self.kind in ("token", "both")

    @property
    def blocks(self) -> bool:
        """Whether scan directions are skipped."""
        return self.kind in ("block", "both")

    def check_depth(self, depth: int) -> None:
        """Refuse stages that a model of `depth` layers does not have."""
        if self.tokens and max(self.pruning_loc, default=0) >= depth:
            raise ValueError(f"pruning_loc is {list(self.pruning_loc)}; wanted layers of this model, 0 to {depth - 1}.")


@dataclass(frozen=True)
class PruningTraining(Settings):
    """What only fine-tuning needs."""

    token_pruning_weight: float = option(
        10.0, "loss weight of the token keep ratios", flag="--token-pruning-weight", type=float
    )
    block_pruning_weight: float = option(
        10.0,
        "loss weight of the block keep ratio",
        flag="--block-pruning-weight",
        aliases=("--layer-pruning-weight",),
        type=float,
    )
    pruning_teacher: str = option(
        "both",
        "what is compared with the unpruned model: logits and tokens, or logits alone, as the release does where "
        "directions alone are pruned (default: both)",
        flag="--pruning-teacher",
        choices=TEACHERS,
    )
    gate_noise_end: float = option(
        1.0,
        "noise of the direction gates in the last epoch, reached in equal steps from 1: with 0 training ends with the "
        "decisions, and so the share of directions, of inference (default: 1, as published)",
        flag="--gate-noise-end",
        type=float,
        metavar="SCALE",
    )
    model_path: str = option(
        "", "trained model that student and frozen teacher start from", flag="--model-path", metavar="FILE"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.gate_noise_end <= 1:
            raise ValueError(f"--gate-noise-end is {self.gate_noise_end:g}; wanted 0 to 1.")
