"""Learned pruning: every image keeps only the tokens and the scan directions it needs.

Wu et al. 2025, "Dynamic Vision Mamba" (DyVM, arXiv:2504.04787). Token pruning acts before chosen layers, block pruning
inside every mixer; each works alone. In training the sequence keeps its length: kept tokens move to the front, and a
mask keeps the dropped ones out of every convolution and scan, so that training sees what inference computes.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from mamba_ssm.ops.exporting import stable_argsort
from torch import Tensor, nn

from fusion.method import Meter, SiteMethod, SitePlan
from fusion.pruning_loss import PruningLoss, PruningOutput
from fusion.pruning_settings import PruningSettings, PruningTraining
from fusion.token_state import (
    ClassTokens,
    TokenState,
    join_cls,
    mean_of_cls,
    mean_over_kept,
    patch_policy,
    split_cls,
    spread,
)

_logger = logging.getLogger(__name__)

# the release's defaults, of flags that were not typed
RELEASE = dict(epochs=30, warmup_lr=1e-5, block_keep_ratio=0.7, token_pruning_weight=16.0, block_pruning_weight=16.0)

# What chooses tokens: (stage, tokens (B, n, C), policy so far (B, n)) -> either a decision (B, n) of 1 (keep) and 0,
# floating, after which the sequence keeps its length, or the indices (B, k) to keep, long and rising, after which it is
# k long.
TokenPolicy = Callable[[int, Tensor, Tensor], Tensor]

# What chooses scan directions: (layer, class token's column of xz (B, 2 * d_inner)) -> gates (B, directions), 1 or 0.
DirectionPolicy = Callable[[int, Tensor], Tensor]


class ScorePredictor(nn.Module):
    """Scores tokens: (B, n, in_features) -> log-probabilities (B, n, 2), entry 0 "keep".

    Half of the channels stay a token's own, half become the mean over the tokens still kept.
    """

    def __init__(self, in_features: int, dim: int) -> None:
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(in_features), nn.Linear(in_features, dim), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(dim, dim // 2),
            nn.GELU(),
            nn.Linear(dim // 2, dim // 4),
            nn.GELU(),
            nn.Linear(dim // 4, 2),
            nn.LogSoftmax(dim=-1),
        )

    def forward(self, x: Tensor, policy: Tensor) -> Tensor:
        """x (B, n, in_features); policy (B, n), 1 for tokens still kept."""
        # the residual stays in float32 where a model of half numbers adds it; a quantised layer has no such weight
        local, shared = self.in_conv(x.to(self.in_conv[0].weight.dtype)).chunk(2, dim=-1)
        policy = policy.unsqueeze(-1)
        shared = (shared * policy).sum(1, keepdim=True) / (policy.sum(1, keepdim=True) + 1)
        return self.out_conv(torch.cat([local, shared.to(local.dtype).expand_as(local)], -1))


def gumbel_sigmoid(logits: Tensor, temperature: float = 2.0, noise: float = 1.0) -> Tensor:
    """Sample 0 or 1 with probability sigmoid(logits / noise) for 1; gradients are those of the relaxed sample.

    Maddison et al. 2017 (arXiv:1611.00712), straight-through. `noise` scales both Gumbel noises; without any, what
    comes is 1 where the logit is positive.
    """
    if noise:
        one, other = (-torch.empty_like(logits).exponential_().log() for _ in range(2))
        logits = logits + noise * (one - other)
    soft = (logits / temperature).sigmoid()
    return (soft > 0.5).to(soft.dtype) - soft.detach() + soft


def kept_first(policy: Tensor) -> tuple[Tensor, Tensor]:
    """policy (B, n) of 1 and 0 -> order (B, n) that puts kept tokens first, both kinds in sequence; and the number kept
    (B,)."""
    kept = policy > 0.5
    return stable_argsort((~kept).long(), dim=1), kept.sum(1)


def evenly_spread(count: int, keep: int, device: torch.device | None = None) -> Tensor:
    """`keep` of `count` indices, spread evenly from first to last: floor(linspace(0, count - 1, keep)), exactly."""
    return torch.arange(keep, device=device) * (count - 1) // max(keep - 1, 1)


def take(state: TokenState, order: Tensor, cls: ClassTokens) -> TokenState:
    """The patch tokens `order` (B, k) of `state`, in that order, with the class tokens where `cls` says among them."""
    batch, length, _ = state.hidden.shape
    slots = torch.arange(length, device=order.device).view(1, -1, 1).expand(batch, -1, -1)
    classes, patches = split_cls(slots, state.cls)
    slots = join_cls(classes, patches.gather(1, order.unsqueeze(-1)), cls)

    def pick(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.gather(1, slots.expand(-1, -1, x.shape[-1]))

    positions = state.positions
    return state.replace(
        hidden=pick(state.hidden),
        residual=pick(state.residual),
        cls=cls,
        positions=order if positions is None else positions.gather(1, order),
    )


class Rest(NamedTuple):
    """What pruning holds back of all M original patches in raster order, (B, M, D) each: the last value where a patch
    was dropped, zero where it is live. A patch's own value is the sum of both."""

    hidden: Tensor
    residual: Tensor


class Choices(NamedTuple):
    """What pruning keeps in a token sequence: each stage's keep decision (B, M), each layer's gates (B, directions);
    only where a predictor is to look at it, what the last mixer's scans were told (B, L, C); and only on request
    (`keep_rest`) what dropped patches were left at."""

    decisions: tuple[Tensor, ...] = ()
    gates: tuple[Tensor, ...] = ()
    observed: Tensor | None = None
    rest: Rest | None = None


def keep_rest(state: TokenState, wide: bool = True) -> TokenState:
    """Ask that `state`, a whole sequence before its first site, keeps what dropped patches were left at, so that maps
    (`whole`) have a value for every patch; the residual's in float32 if `wide`."""
    patches = split_cls(state.hidden, state.cls)[1]
    residual = torch.zeros_like(patches, dtype=torch.float32 if wide else None)
    return state.with_entry(DynamicPruning.name, Choices(rest=Rest(torch.zeros_like(patches), residual)))


def whole(state: TokenState) -> tuple[Tensor, Tensor | None]:
    """hidden and residual of all M original patches in raster order, (B, M, D) each: a merged patch has its group's
    token (if `state` keeps `groups`), a dropped one its last value (if it was asked to `keep_rest`), else zero."""
    hidden, residual = (
        None if x is None else spread(split_cls(x, state.cls)[1], state) for x in (state.hidden, state.residual)
    )
    rest = state.entry(DynamicPruning.name, Choices()).rest
    if rest is None:
        return hidden, residual
    return hidden + rest.hidden, None if residual is None else residual + rest.residual


def _recall(state: TokenState, policy: Tensor) -> tuple[TokenState, Tensor]:
    """All M patches of `state`, live or dropped, as one sequence in raster order behind the class tokens; and the
    policy (B, M), 1 for the live ones."""
    cls = state.cls.moved(tuple(range(state.num_cls)))

    def line_up(x: Tensor | None, patches: Tensor | None) -> Tensor | None:
        return None if x is None else join_cls(split_cls(x, state.cls)[0], patches, cls)

    hidden, residual = (line_up(x, full) for x, full in zip((state.hidden, state.residual), whole(state)))
    chosen = state.entry(DynamicPruning.name)
    if chosen.observed is not None:
        observed = line_up(chosen.observed, spread(split_cls(chosen.observed, state.cls)[1], state))
        chosen = chosen._replace(observed=observed)
    policy = spread(policy.unsqueeze(-1), state).squeeze(-1)
    state = state.replace(hidden=hidden, residual=residual, cls=cls, token_mask=None, positions=None)
    return state.with_entry(DynamicPruning.name, chosen), policy


def _hold_back(state: TokenState, rest: Rest, choice: Tensor) -> tuple[TokenState, Rest]:
    """Part every patch of a whole sequence (`_recall`) into what goes on, its value times the decision, and what rests,
    its value times one minus the decision: the decision's gradient comes from both."""
    keep = choice if choice.is_floating_point() else torch.zeros_like(rest.hidden[..., 0]).scatter(1, choice, 1.0)
    keep = keep.unsqueeze(-1)
    live, held = [], []
    for x, none in zip((state.hidden, state.residual), rest):
        if x is None:
            live.append(None)
            held.append(torch.zeros_like(none))
            continue
        classes, patches = split_cls(x, state.cls)
        live.append(join_cls(classes, (patches * keep).to(x.dtype), state.cls))
        held.append((patches * (1 - keep)).to(none.dtype))
    return state.replace(hidden=live[0], residual=live[1]), Rest(*held)


def pruning_output(state: TokenState, tokens: Tensor, logits: Tensor) -> PruningOutput:
    """Gather what the sites left in `state`; tokens (B, K + M, D) are normalised, the K class tokens first."""
    policy, positions = patch_policy(state), state.positions
    if state.fills_grid:
        positions = torch.arange(policy.shape[1], device=policy.device).expand(policy.shape[0], -1)
    chosen = state.entry(DynamicPruning.name, Choices())
    return PruningOutput(
        logits=logits,
        tokens=tokens[:, state.num_cls :],
        token_policy=policy.unsqueeze(-1),
        decisions=list(chosen.decisions),
        positions=positions,
        block_policy=torch.stack(chosen.gates).unsqueeze(2) if chosen.gates else None,
    )


class DynamicPruning(SiteMethod):
    """Token pruning before the layers of `settings.pruning_loc`, and direction gates in every layer.

    `token_policy` and `direction_policy` make the choices and may be replaced, to force some; None switches one off.
    `gate_noise` scales the noise that learned gates are drawn with in training: 1 as published, and at 0 they decide as
    in inference.
    Where the class token's column is wanted for the gates, models with several class tokens take the mean of them, and
    models with none the mean over the patch tokens still kept.
    """

    name = "pruning"
    title = "learned pruning (DyVM)"
    Settings, Training = PruningSettings, PruningTraining
    switch, off = "pruning", "none"
    teacher_title = "Unpruned"

    settings: PruningSettings

    def __init__(self, settings: PruningSettings) -> None:
        super().__init__(settings)
        self.gate_noise = 1.0
        tokens = {"learned": self._learned_tokens, "static": self._static_tokens, "random": self._random_tokens}
        gates = {"learned": self._learned_gates, "static": self._static_gates, "random": self._random_gates}
        self.token_policy: TokenPolicy | None = tokens[settings.policy] if settings.tokens else None
        self.direction_policy: DirectionPolicy | None = gates[settings.policy] if settings.blocks else None

    # --- flags ---

    @classmethod
    def model_keywords(cls, args: argparse.Namespace, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """The keywords that the flags ask for; `--token-keep-ratio` k is the stages' k, k^2, ..."""
        given = cls.Settings.from_arguments(args)
        kind = given.get(cls.switch, defaults.get(cls.switch, cls.off))
        if args.gate_noise_end < 1 and (kind not in ("block", "both") or args.pruning_policy != "learned"):
            raise ValueError("--gate-noise-end wants --pruning block or both, and --pruning-policy learned.")
        if args.pruning_teacher != "both" and (kind == cls.off or not getattr(args, "with_teacher", True)):
            raise ValueError("--pruning-teacher wants --pruning, in a task that learns from the unpruned model.")
        if kind == cls.off:
            if cls.is_on({}, defaults):
                raise ValueError(
                    f"--pruning is none but {args.model} prunes; wanted the plain model's name, or another --pruning."
                )
            return {}
        keep = args.token_keep_ratio
        if not 0 < keep <= 1:
            raise ValueError(f"--token-keep-ratio is {keep:g}; wanted one above 0 and at most 1.")
        stages = len(given.get("pruning_loc", defaults.get("pruning_loc", cls.Settings.pruning_loc)))
        return given | {cls.switch: kind, "token_ratio": tuple(keep ** (stage + 1) for stage in range(stages))}

    def check(self, args: argparse.Namespace, typed: set[str]) -> None:
        """Refuse training flags that contradict a loss, a teacher and a training mode of its own."""
        if args.fsdp:
            raise ValueError(f"--model {args.model} contradicts --fsdp, which trains Vision Mambas without pruning.")
        args.pruning = self.settings.kind
        if getattr(args, "with_teacher", True):
            taken = {name: value for name, value in RELEASE.items() if name not in typed}
            for name, value in taken.items():
                setattr(args, name, value)
            if taken and not args.eval:
                told = ", ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in taken.items())
                _logger.info("Learned pruning, not typed and so as in the release: %s.", told)
        if args.eval:
            return
        if not args.model_path and getattr(args, "with_teacher", True):
            raise ValueError(
                "Training with pruning wants --model-path: student and teacher start from a trained model."
            )
        for flag, wrong in (
            ("--cosub", getattr(args, "cosub", False)),
            ("--distillation-type", getattr(args, "distillation_type", "none") != "none"),
            ("--no-train-mode", not args.train_mode),
        ):
            if wrong:
                raise ValueError(f"{flag} contradicts pruning, which has its own loss, teacher and training mode.")

    # --- at the sites ---

    def attach(self, model: nn.Module) -> None:
        """Add `score_predictors` and every mixer's `block_head` (weight 0, bias 5: all directions on), as far as the
        policy learns."""
        settings = self.settings
        settings.check_depth(model.depth)
        self.model = model
        # which parameters a step reaches depends on what it prunes
        model.find_unused_parameters = True
        self.layers_per_site = model.depth // model.num_sites
        self.num_patches = model.patch_embed.num_patches
        if settings.tokens and model.num_prefix_tokens == 0 and model.final_pool_type != "mean":
            raise ValueError(
                f"final_pool_type is {model.final_pool_type!r}; wanted 'mean' for token pruning without a class token."
            )
        odd = any(layer % 2 for layer in settings.pruning_loc)
        if settings.tokens and self.layers_per_site == 2 and (odd or settings.predictor_input != "hidden"):
            raise ValueError(
                "This model takes its layers in pairs: wanted even layers in pruning_loc, and predictor_input 'hidden'."
            )
        mixer = model.layers[0].mixer
        if settings.policy != "learned":
            return
        if settings.tokens:
            width = {"hidden": model.embed_dim, "delta": mixer.d_inner, "B": mixer.d_state}[settings.predictor_input]
            model.score_predictors = nn.ModuleList(ScorePredictor(width, model.embed_dim) for _ in settings.pruning_loc)
        if settings.blocks:
            for layer in model.layers:
                head = nn.Linear(2 * mixer.d_inner, len(mixer.directions))
                nn.init.zeros_(head.weight)
                nn.init.constant_(head.bias, 5.0)
                layer.mixer.block_head = head

    def __call__(self, index: int, state: TokenState, run: Callable[..., TokenState]) -> TokenState:
        layer = index * self.layers_per_site
        if self.token_policy is not None and layer in self.settings.pruning_loc:
            state = self._drop_tokens(self.settings.pruning_loc.index(layer), state)
        mixer_args: dict[str, Any] = {}
        if state.token_mask is not None:
            mixer_args["token_mask"] = state.token_mask
        gates: list[Tensor] = []
        if self.direction_policy is not None:
            mixer_args["direction_gate"] = self._direction_gate(layer, state, gates)
        seen: list[Tensor] = []
        if self.token_policy is not None and self._is_observed(layer):
            mixer_args["observe"] = self._observer(len(state.hidden), gates, seen)
        state = run(state, **mixer_args)
        chosen = state.entry(self.name, Choices())
        chosen = chosen._replace(gates=(*chosen.gates, *gates))
        if "observe" in mixer_args:
            chosen = chosen._replace(observed=self._mean_observed(layer, state, seen))
        return state.with_entry(self.name, chosen)

    def plan(self, index: int, state: TokenState) -> SitePlan | None:
        layer = index * self.layers_per_site
        if self.direction_policy is not None:
            return None
        acts = self.token_policy is not None and (layer in self.settings.pruning_loc or self._is_observed(layer))
        if acts:
            return None
        return SitePlan() if state.token_mask is None else SitePlan({"token_mask": state.token_mask})

    def output(self, output: Any, state: TokenState, tokens: Tensor) -> PruningOutput:
        """In training the model returns its decisions too."""
        return pruning_output(state, tokens, output)

    # --- tokens ---

    def num_kept(self, stage: int) -> int:
        """How many tokens inference keeps at `stage`: a share of the images' original patches, rounded down."""
        return int(self.settings.token_ratio[stage] * self.num_patches)

    def _drop_tokens(self, stage: int, state: TokenState) -> TokenState:
        policy, chosen = patch_policy(state), state.entry(self.name, Choices())
        if state.grid is not None:
            self.num_patches = math.prod(state.grid)
        if chosen.rest is not None:
            state, policy = _recall(state, policy)
            chosen = state.entry(self.name)
        if chosen.observed is not None:
            tokens = chosen.observed
        else:
            tokens = state.hidden if state.residual is None else state.hidden + state.residual
        choice = self.token_policy(stage, split_cls(tokens, state.cls)[1], policy)
        if chosen.rest is not None:
            state, rest = _hold_back(state, chosen.rest, choice)
            chosen = chosen._replace(rest=rest)
        if choice.is_floating_point():
            order, kept = kept_first(choice)
            state = take(state, order, state.cls.among(kept))
            ones = choice.new_ones(choice.shape[0], state.num_cls, 1)
            mask = join_cls(ones, choice.gather(1, order).unsqueeze(-1), state.cls).squeeze(-1)
            state, decision = state.replace(token_mask=mask), choice
        else:
            state = take(state, choice, state.cls.among(choice.shape[1]))
            decision = policy.new_zeros(policy.shape[0], self.num_patches)
            decision = decision.scatter(1, state.positions, 1.0)
        return state.with_entry(self.name, chosen._replace(decisions=(*chosen.decisions, decision)))

    def _learned_tokens(self, stage: int, tokens: Tensor, policy: Tensor) -> Tensor:
        scores = self.model.score_predictors[stage](tokens, policy).float()
        if self.model.training:
            return F.gumbel_softmax(scores, hard=True)[..., 0] * policy
        # what was dropped before is among the tokens only where its last value is kept
        return scores[..., 0].masked_fill(policy == 0, -math.inf).topk(self.num_kept(stage)).indices.sort().values

    def _static_tokens(self, stage: int, tokens: Tensor, policy: Tensor) -> Tensor:
        live = self.num_kept(stage - 1) if stage else self.num_patches
        return kept_first(policy)[0][:, evenly_spread(live, self.num_kept(stage), tokens.device)]

    def _random_tokens(self, stage: int, tokens: Tensor, policy: Tensor) -> Tensor:
        return (torch.rand_like(policy) + policy).topk(self.num_kept(stage)).indices.sort().values

    # --- scan directions ---

    def _direction_gate(self, layer: int, state: TokenState, gates: list[Tensor]) -> Callable[[Tensor], Tensor]:
        """What the mixers of one site ask for their gates, which are also written into `gates`, a layer each."""

        def gate(hidden: Tensor) -> Tensor:
            # the second layer of a pair runs on the reversed sequence
            at, mask = state.cls.index, state.token_mask
            if gates:
                last = hidden.shape[1] - 1
                at = last - at.flip(1) if isinstance(at, Tensor) else tuple(last - place for place in reversed(at))
                mask = None if mask is None else mask.flip(1)
            token = mean_of_cls(hidden, at) if state.num_cls else mean_over_kept(hidden, mask)
            number = layer + len(gates)
            # the class token's column alone: the layer may do without the other tokens of images that skip it
            column = self.model.layers[number].mixer.in_proj(token)
            gates.append(self.direction_policy(number, column))
            return self._static_pattern(number) if self._knows_gates else gates[-1]

        return gate

    def _learned_gates(self, layer: int, column: Tensor) -> Tensor:
        logits = self.model.layers[layer].mixer.block_head(column).float()
        return gumbel_sigmoid(logits, noise=self.gate_noise) if self.model.training else (logits > 0).float()

    @property
    def _knows_gates(self) -> bool:
        """Whether the host knows, in inference, which directions run."""
        return self.direction_policy == self._static_gates and not self.model.training

    def _static_pattern(self, layer: int) -> tuple[bool, ...]:
        """Which directions of a layer run by the static policy: all layers' share of them, as `evenly_spread`."""
        directions = len(self.model.layers[layer].mixer.directions)
        total = directions * self.model.depth
        keep = int(total * self.settings.block_keep_ratio)
        runs = {place * (total - 1) // max(keep - 1, 1) for place in range(keep)}
        return tuple(layer * directions + number in runs for number in range(directions))

    def _static_gates(self, layer: int, column: Tensor) -> Tensor:
        # filled where the model is: a copy of the host's would be waited for
        new = dict(size=(len(column),), dtype=torch.float32, device=column.device)
        return torch.stack([torch.full(fill_value=float(runs), **new) for runs in self._static_pattern(layer)], 1)

    def _random_gates(self, layer: int, column: Tensor) -> Tensor:
        directions = len(self.model.layers[layer].mixer.directions)
        chance = torch.rand(len(column), directions, device=column.device)
        return (chance < self.settings.block_keep_ratio).float()

    # --- what a mixer's scan was told, as the predictor's input ---

    def _is_observed(self, layer: int) -> bool:
        learned_from = self.settings.policy == "learned" and self.settings.predictor_input != "hidden"
        return learned_from and layer + 1 in self.settings.pruning_loc

    def _observer(self, batch: int, gates: list[Tensor], seen: list[Tensor]) -> Callable[..., None]:
        """Collects the step sizes or the B of each direction that runs, times its gate."""

        def observe(delta: Tensor, B: Tensor, images: Tensor | None = None) -> None:
            value = delta if self.settings.predictor_input == "delta" else B
            if images is not None:
                value = value.new_zeros(batch, *value.shape[1:]).index_copy(0, images, value)
            elif gates and self.model.training:
                value = value * gates[-1][:, len(seen)].view(-1, 1, 1)
            seen.append(value)

        return observe

    def _mean_observed(self, layer: int, state: TokenState, seen: list[Tensor]) -> Tensor:
        """The mean over all directions (B, L, C), one that was skipped counting as zero."""
        mixer = self.model.layers[layer].mixer
        if not seen:
            width = mixer.d_inner if self.settings.predictor_input == "delta" else mixer.d_state
            return state.hidden.new_zeros(*state.hidden.shape[:2], width)
        return sum(seen) / len(mixer.directions)

    def varies(self, training: bool) -> str:
        if training or self.direction_policy in (None, self._static_gates):
            return ""
        return "learned pruning leaves out what an image skips, for which the host must know how many do"

    # --- training, and what is told of it ---

    @property
    def needs_teacher(self) -> bool:
        """Fine-tuning starts from the plain model, which is the teacher."""
        return True

    def criterion(self, base: nn.Module, teacher: nn.Module | None, args: argparse.Namespace) -> nn.Module:
        """The task's criterion, the keep targets and the teacher."""
        weights = args.token_pruning_weight, args.block_pruning_weight
        return PruningLoss(base, teacher, self.settings, *weights, compare_tokens=args.pruning_teacher == "both")

    def begin_epoch(self, epoch: int, epochs: int, args: argparse.Namespace) -> None:
        """Set the noise of the gates."""
        scale_gate_noise(self.model, epoch, epochs, args.gate_noise_end)

    def meter(self) -> DecisionMeter:
        """A meter of the kept shares."""
        return DecisionMeter(self.model)

    def report(self, meter: DecisionMeter) -> list[str]:
        """The kept shares that `meter` saw, and those that were wanted."""
        lines = []
        if meter.tokens is not None:
            kept = ", ".join(f"{share:.3f}" for share in meter.tokens.tolist())
            wanted = ", ".join(f"{ratio:.3f}" for ratio in self.settings.token_ratio)
            lines.append(f"Kept tokens, stage by stage: {kept} (wanted {wanted})")
        if meter.directions is not None:
            ran, wanted = float(meter.directions.mean()), self.settings.block_keep_ratio
            lines.append(f"Scan directions that ran: {ran:.3f} (wanted {wanted:.3f})")
        return lines

    def draw(
        self,
        model: nn.Module,
        images: Tensor,
        directory: Path,
        meter: Meter | None,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        """Write what is kept of the images, and the directions that ran."""
        from fusion.visualize_pruning import visualize_pruning  # drawing is rare, and its imports are slow

        visualize_pruning(model, images, directory, meter, mean, std)


def scale_gate_noise(model: nn.Module, epoch: int, epochs: int, end: float) -> float:
    """Set the gate noise of a pruned `model` to what it is in `epoch`: 1 in the first of all `epochs` and, in equal
    steps, `end` in the last. Returns it."""
    scale = 1.0 + (end - 1.0) * epoch / max(epochs - 1, 1)
    for method in model.site_methods:
        if isinstance(method, DynamicPruning):
            method.gate_noise = scale
    return scale


class DecisionMeter(Meter):
    """Adds up what a pruned `model` decides, while it is active or called itself.

    `sums`, float64: the number of images; the kept share of each stage, summed over images; on how many images each
    direction of each layer ran.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        method = next(method for method in model.site_methods if isinstance(method, DynamicPruning))
        settings = method.settings
        self.stages = len(settings.pruning_loc) if settings.tokens else 0
        self.shape = (model.depth, len(model.layers[0].mixer.directions)) if settings.blocks else (0, 0)
        super().__init__(method, 1 + self.stages + self.shape[0] * self.shape[1])

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, classes)."""
        with self:
            output = self.model(x)
        return output if isinstance(output, Tensor) else output.logits

    @torch.no_grad()
    def update(self, state: TokenState) -> None:
        """Add what one batch's sequence holds."""
        chosen = state.entry(DynamicPruning.name, Choices())
        sums = [decision.double().mean(1).sum().view(1) for decision in chosen.decisions]
        sums += [gates.double().sum(0) for gates in chosen.gates]
        self.sums = self.sums.to(state.hidden.device)
        self.sums[0] += len(state.hidden)
        if sums:
            self.sums[1:] += torch.cat(sums)

    @property
    def tokens(self) -> Tensor | None:
        """The mean kept share of every stage (S,); None without token pruning."""
        sums = self.sums.cpu()
        return sums[1 : 1 + self.stages] / sums[0] if self.stages else None

    @property
    def directions(self) -> Tensor | None:
        """The share of images that each scan direction ran on, (depth, directions); None without block pruning."""
        sums = self.sums.cpu()
        return sums[1 + self.stages :].view(self.shape) / sums[0] if self.shape[0] else None

    def shares(self) -> dict[str, float]:
        """The kept shares by name, for a log; none before an image was seen."""
        if not self.sums[0]:
            return {}
        named = {f"kept_tokens_{j + 1}": float(share) for j, share in enumerate(self.tokens if self.stages else ())}
        return named | ({} if self.directions is None else {"kept_directions": float(self.directions.mean())})
