"""Which efficiency methods are on: their flags, their validation, and one frozen value per method."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_logger = logging.getLogger(__name__)

FUSION_STRATEGIES = ("no", "all", "alternate", "lower", "upper")
FUSION_ORDERS = ("published", "raster")
SCAN_PATHS = ("rowwise", "colwise")
POOL_METHODS = ("mean", "max")
PRUNING_KINDS = ("none", "token", "block", "both")
PRUNING_POLICIES = ("learned", "static", "random")
PREDICTOR_INPUTS = ("hidden", "delta", "B")

# The spellings of DyVM's release, and what each is here.
PUBLISHED_DYVM_NAMES = {
    "Vim-Tiny": "dyvm_tiny_patch16_224",
    "Vim-Small": "dyvm_small_patch16_224",
    "Vim-Base": "dyvm_base_patch16_224",
    "VideoMamba-Tiny": "dyvm_videomamba_tiny_patch16_224",
    "VideoMamba-Small": "dyvm_videomamba_small_patch16_224",
}


def _one_of(what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{what} is {value!r}; wanted one of {', '.join(allowed)}.")


@dataclass(frozen=True)
class MergingConfig:
    """Token merging (Famba-V): which sites merge, how many tokens each, and in which order the survivors go on.

    `strategy` picks the sites by index i: `all` every one, `alternate` odd i, `lower` i < layer, `upper` i > layer.
    """

    strategy: str
    layer: int = 0
    token: int = 0
    order: str = "published"

    def __post_init__(self) -> None:
        _one_of("fusion_strategy", self.strategy, FUSION_STRATEGIES)
        _one_of("fusion_order", self.order, FUSION_ORDERS)
        if self.token < 0:
            raise ValueError(f"fusion_token is {self.token}; wanted 0 or more tokens to fuse at a site.")

    def sites(self, num_sites: int) -> tuple[int, ...]:
        """The indices, out of `num_sites`, of the sites after which tokens merge."""
        if self.strategy in ("lower", "upper") and not 0 <= self.layer < num_sites:
            raise ValueError(f"fusion_layer is {self.layer}; wanted a site of this model, 0 to {num_sites - 1}.")
        chosen = {
            "no": lambda i: False,
            "all": lambda i: True,
            "alternate": lambda i: i % 2 == 1,
            "lower": lambda i: i < self.layer,
            "upper": lambda i: i > self.layer,
        }[self.strategy]
        return tuple(i for i in range(num_sites) if chosen(i))


@dataclass(frozen=True)
class PoolingConfig:
    """Alternating spatial pooling (FastVim): what the scan sees of the token grid.

    `published_rows` matters where tokens are hidden; see `fusion.spatial_pooling.VisiblePooling`.
    """

    scanpath_type: str = "rowwise"
    rotate_every_block: bool = True
    collapse_method: str = "mean"
    use_norm_after_ssm: bool = True
    scaling_factor: float = 1.0
    published_rows: bool = False

    def __post_init__(self) -> None:
        _one_of("scanpath_type", self.scanpath_type, SCAN_PATHS)
        _one_of("collapse_method", self.collapse_method, POOL_METHODS)
        if not self.scaling_factor > 0:
            raise ValueError(f"scaling_factor is {self.scaling_factor}; wanted a number above 0.")
        if self.scaling_factor != 1 and self.collapse_method != "mean":
            raise ValueError(f"scaling_factor is {self.scaling_factor:g}; wanted it with collapse_method 'mean' only.")


@dataclass(frozen=True)
class PruningConfig:
    """Learned pruning (DyVM): where tokens are dropped, to which share of the original ones, and the block keep
    target."""

    kind: str = "both"
    pruning_loc: tuple[int, ...] = (6, 12, 18)
    token_ratio: tuple[float, ...] = (0.7, 0.7**2, 0.7**3)
    block_keep_ratio: float = 0.8
    policy: str = "learned"
    predictor_input: str = "hidden"

    def __post_init__(self) -> None:
        _one_of("pruning", self.kind, PRUNING_KINDS[1:])
        _one_of("pruning_policy", self.policy, PRUNING_POLICIES)
        _one_of("predictor_input", self.predictor_input, PREDICTOR_INPUTS)
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
class MethodConfig:
    """What is on; None is off. Refuses methods that make no sense together."""

    merging: MergingConfig | None = None
    pooling: PoolingConfig | None = None
    pruning: PruningConfig | None = None

    def __post_init__(self) -> None:
        if self.pooling is not None and self.merging is not None:
            raise ValueError(
                "Spatial pooling needs the full token grid, which token merging breaks up: wanted one of the two."
            )
        if self.merging is not None and self.pruning is not None and self.pruning.tokens:
            raise ValueError(
                "Token merging and token pruning both shorten the sequence: wanted one of the two, or merging with "
                "pruning 'block'."
            )
        if self.pooling is not None and self.pruning is not None:
            raise ValueError(
                "Spatial pooling needs the full token grid and both scan directions: wanted it without pruning."
            )

    @classmethod
    def from_keywords(
        cls,
        *,
        fusion_strategy: str = "no",
        fusion_layer: int = 0,
        fusion_token: int = 0,
        fusion_order: str = "published",
        spatial_pool: bool = False,
        scanpath_type: str = "rowwise",
        rotate_every_block: bool = True,
        collapse_method: str = "mean",
        use_norm_after_ssm: bool | None = None,
        scaling_factor: float = 1.0,
        published_rows: bool = False,
        pruning: str = "none",
        pruning_loc: Sequence[int] = (6, 12, 18),
        token_ratio: Sequence[float] = (0.7, 0.7**2, 0.7**3),
        block_keep_ratio: float = 0.8,
        pruning_policy: str = "learned",
        predictor_input: str = "hidden",
    ) -> MethodConfig:
        """Read the model keywords of all methods; a method whose switch is off leaves None."""
        fusion_strategy = "alternate" if fusion_strategy == "interleaved" else fusion_strategy
        merging = MergingConfig(fusion_strategy, fusion_layer, fusion_token, fusion_order)
        pooling = PoolingConfig(
            scanpath_type,
            rotate_every_block,
            collapse_method,
            use_norm_after_ssm is not False,
            float(scaling_factor),
            published_rows,
        )
        _one_of("pruning", pruning, PRUNING_KINDS)
        return cls(
            merging=None if fusion_strategy == "no" else merging,
            pooling=pooling if spatial_pool else None,
            pruning=None
            if pruning == "none"
            else PruningConfig(
                pruning, tuple(pruning_loc), tuple(token_ratio), block_keep_ratio, pruning_policy, predictor_input
            ),
        )


METHOD_KEYWORDS = tuple(MethodConfig.from_keywords.__kwdefaults__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of all three methods."""
    merging = parser.add_argument_group("token merging (Famba-V)")
    merging.add_argument(
        "--fusion-strategy",
        default="no",
        choices=(*FUSION_STRATEGIES, "interleaved"),
        help="after which sites similar tokens merge; 'interleaved' is 'alternate'",
    )
    merging.add_argument(
        "--fusion-layer", type=int, default=0, metavar="K", help="site that bounds 'lower' and 'upper'"
    )
    merging.add_argument("--fusion-token", type=int, default=0, metavar="R", help="tokens to fuse at each merging site")
    merging.add_argument(
        "--fusion-order", default="published", choices=FUSION_ORDERS, help="order of the tokens that go on"
    )
    merging.add_argument(
        "--visualize",
        default="",
        metavar="DIR",
        help="save hidden states, similarities and merged groups of the first test images, after --eval or training",
    )
    merging.add_argument("--bi-merge", action="store_true", help="accepted for published commands; changes nothing")

    pooling = parser.add_argument_group("alternating spatial pooling (FastVim)")
    pooling.add_argument(
        "--spatial-pool",
        default=None,
        choices=("none", "alternate", "row", "col"),
        help="build the FastVim of this size: pool rows and columns in turns, or always the same way",
    )
    pooling.add_argument("--pool-method", default=None, choices=POOL_METHODS, help="how a row becomes one token")
    pooling.add_argument("--no-norm-after-ssm", action="store_true", help="leave out the LayerNorm behind the scan")
    pooling.add_argument(
        "--pool-scale", type=float, default=None, help="factor on the pooled mean (0.25 from a 75 %% MAE)"
    )

    pruning = parser.add_argument_group("learned pruning (DyVM)")
    pruning.add_argument(
        "--pruning",
        default=None,
        choices=PRUNING_KINDS,
        help="what is pruned; 'both' by default on dyvm_* names, 'none' elsewhere",
    )
    pruning.add_argument(
        "--token-keep-ratio", type=float, default=0.7, help="k: the stages keep k, k^2, k^3 of the tokens"
    )
    pruning.add_argument("--block-keep-ratio", type=float, default=0.8, help="target share of scan directions that run")
    pruning.add_argument(
        "--token-pruning-weight", type=float, default=10.0, help="loss weight of the token keep ratios"
    )
    pruning.add_argument("--block-pruning-weight", type=float, default=10.0, help="loss weight of the block keep ratio")
    pruning.add_argument(
        "--gate-noise-end",
        type=float,
        default=1.0,
        metavar="SCALE",
        help="noise of the direction gates in the last epoch, reached in equal steps from 1: with 0 training ends with "
        "the decisions, and so the share of directions, of inference (default: 1, as published)",
    )
    pruning.add_argument(
        "--pruning-loc", type=int, nargs="+", default=None, metavar="I", help="layers before which tokens drop"
    )
    pruning.add_argument("--pruning-policy", default="learned", choices=PRUNING_POLICIES, help="ablation: who chooses")
    pruning.add_argument(
        "--predictor-input", default="hidden", choices=PREDICTOR_INPUTS, help="ablation: what it looks at"
    )
    pruning.add_argument(
        "--model-path", default="", metavar="FILE", help="trained model that student and frozen teacher start from"
    )


def check(args: argparse.Namespace) -> None:
    """Say once what is accepted and changes nothing, and refuse a place for pictures that cannot hold them."""
    if args.bi_merge:
        _logger.warning("--bi-merge changes nothing here: --fusion-strategy alone switches token merging on.")
    if args.fusion_strategy == "no" and (args.fusion_token > 0 or args.fusion_layer != 0):
        _logger.warning("--fusion-token and --fusion-layer change nothing without --fusion-strategy.")
    if args.visualize and Path(args.visualize).exists() and not Path(args.visualize).is_dir():
        raise ValueError(f"--visualize {args.visualize} is a file; wanted a folder.")


def model_keywords(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The registry name and the method keywords that `args` ask for.

    Only switched-on methods leave keywords, so a model that knows none of them can be built from the result. Raises
    ValueError (one sentence) for flags that contradict each other.
    """
    name = PUBLISHED_DYVM_NAMES.get(args.model, args.model)
    keywords: dict[str, Any] = {}
    if args.fusion_strategy != "no":
        keywords.update(
            fusion_strategy="alternate" if args.fusion_strategy == "interleaved" else args.fusion_strategy,
            fusion_layer=args.fusion_layer,
            fusion_token=args.fusion_token,
            fusion_order=args.fusion_order,
        )
    elif args.fusion_token < 0:
        raise ValueError(f"--fusion-token is {args.fusion_token}; wanted 0 or more tokens to fuse at a site.")
    keywords.update(_pooling_keywords(args, name))
    keywords.update(_pruning_keywords(args, name))
    # Contradictions show here, before a model or data set is touched.
    MethodConfig.from_keywords(**keywords)
    return name, keywords


def _pooling_keywords(args: argparse.Namespace, name: str) -> dict[str, Any]:
    is_fastvim = name.startswith("fastvim_") or "noclstok" in name
    if args.spatial_pool == "none" and is_fastvim:
        raise ValueError(
            f"--spatial-pool is none but {name} is a FastVim; wanted a Vim name, or another --spatial-pool."
        )
    if args.spatial_pool in (None, "none") and not is_fastvim:
        if args.pool_method is not None or args.no_norm_after_ssm or args.pool_scale is not None:
            raise ValueError(
                "--pool-method, --no-norm-after-ssm and --pool-scale want --spatial-pool or a FastVim model."
            )
        return {}
    if getattr(args, "if_random_token_rank", False):
        raise ValueError(
            "--if_random_token_rank breaks up the token grid that spatial pooling needs: wanted one of them."
        )
    keywords: dict[str, Any] = {"spatial_pool": True}
    if args.spatial_pool is not None:
        keywords["rotate_every_block"] = args.spatial_pool == "alternate"
        keywords["scanpath_type"] = "colwise" if args.spatial_pool == "col" else "rowwise"
    if args.pool_method is not None:
        keywords["collapse_method"] = args.pool_method
    if args.no_norm_after_ssm:
        keywords["use_norm_after_ssm"] = False
    if args.pool_scale is not None:
        keywords["scaling_factor"] = args.pool_scale
    return keywords


def _pruning_keywords(args: argparse.Namespace, name: str) -> dict[str, Any]:
    kind = args.pruning or ("both" if name.startswith("dyvm_") else "none")
    if not 0 <= args.gate_noise_end <= 1:
        raise ValueError(f"--gate-noise-end is {args.gate_noise_end:g}; wanted 0 to 1.")
    if args.gate_noise_end < 1 and (kind not in ("block", "both") or args.pruning_policy != "learned"):
        raise ValueError("--gate-noise-end wants --pruning block or both, and --pruning-policy learned.")
    if kind == "none":
        if name.startswith("dyvm_"):
            raise ValueError(
                f"--pruning is none but {name} prunes; wanted the plain model's name, or another --pruning."
            )
        return {}
    keep = args.token_keep_ratio
    keywords: dict[str, Any] = {
        "pruning": kind,
        "block_keep_ratio": args.block_keep_ratio,
        "pruning_policy": args.pruning_policy,
        "predictor_input": args.predictor_input,
    }
    if not 0 < keep <= 1:
        raise ValueError(f"--token-keep-ratio is {keep:g}; wanted one above 0 and at most 1.")
    stages = len(args.pruning_loc) if args.pruning_loc else 3
    keywords["token_ratio"] = tuple(keep ** (j + 1) for j in range(stages))
    if args.pruning_loc:
        keywords["pruning_loc"] = tuple(args.pruning_loc)
    return keywords
