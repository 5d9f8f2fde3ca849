"""Learned pruning: every image keeps only the tokens and the scan directions it needs.

Wu et al. 2025, "Dynamic Vision Mamba" (DyVM, arXiv:2504.04787). Token pruning acts before chosen layers, block pruning
inside every mixer; each works alone. In training the sequence keeps its length: kept tokens move to the front, and a
mask keeps the dropped ones out of every convolution and scan, so that training sees what inference computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion.config import PruningConfig
from fusion.token_state import Rest, SiteMethod, TokenState, join_cls, mean_over_kept, patch_policy, split_cls, whole

# What chooses tokens: (stage, tokens (B, n, C), policy so far (B, n)) -> either a decision (B, n) of 1 (keep) and 0,
# floating, after which the sequence keeps its length, or the indices (B, k) to keep, long and rising, after which it is
# k long.
TokenPolicy = Callable[[int, Tensor, Tensor], Tensor]

# What chooses scan directions: (layer, class token's column of xz (B, 2 * d_inner)) -> gates (B, directions), 1 or 0.
DirectionPolicy = Callable[[int, Tensor], Tensor]


class PruningOutput(NamedTuple):
    """What a pruned model computed and decided, for B images of M patches.

    `logits` (B, classes); `tokens` (B, M, D): the final patch tokens, kept ones first (inference: only those);
    `token_policy` (B, M, 1): 1 where a token is still kept; `decisions`: a stage's keep decision (B, M) each, in
    training in the order the stage found the tokens in, in inference in raster order; `positions` (B, M): raster index
    of every token, None where merging has mixed them; `block_policy` (depth, B, 1, directions), None without block
    pruning.
    """

    logits: Tensor
    tokens: Tensor
    token_policy: Tensor
    decisions: list[Tensor]
    positions: Tensor | None
    block_policy: Tensor | None


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
        local, shared = self.in_conv(x).chunk(2, dim=-1)
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
    return (~kept).long().argsort(dim=1, stable=True), kept.sum(1)


def evenly_spread(count: int, keep: int) -> Tensor:
    """`keep` of `count` indices, spread evenly from first to last: floor(linspace(0, count - 1, keep)), exactly."""
    return torch.arange(keep) * (count - 1) // max(keep - 1, 1)


def take(state: TokenState, order: Tensor, cls_index: tuple[int, ...] | Tensor) -> TokenState:
    """The patch tokens `order` (B, k) of `state`, in that order, with the class tokens at `cls_index` among them."""
    batch, length, _ = state.hidden.shape
    slots = torch.arange(length, device=order.device).view(1, -1, 1).expand(batch, -1, -1)
    classes, patches = split_cls(slots, state.cls_index)
    slots = join_cls(classes, patches.gather(1, order.unsqueeze(-1)), cls_index)

    def pick(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.gather(1, slots.expand(-1, -1, x.shape[-1]))

    positions = state.positions
    return state.replace(
        hidden=pick(state.hidden),
        residual=pick(state.residual),
        cls_index=cls_index,
        grid=None,
        positions=order if positions is None else positions.gather(1, order),
    )


def _recall(state: TokenState, policy: Tensor) -> tuple[TokenState, Tensor]:
    """All M patches of `state`, live or dropped, as one sequence in raster order behind the class tokens; and the
    policy (B, M), 1 for the live ones."""

    def line_up(x: Tensor | None, patches: Tensor | None) -> Tensor | None:
        return None if x is None else join_cls(split_cls(x, state.cls_index)[0], patches, cls_index)

    cls_index = tuple(range(state.num_cls))
    hidden, residual = (line_up(x, full) for x, full in zip((state.hidden, state.residual), whole(state)))
    observed = state.observed
    if state.positions is not None:
        policy = torch.zeros_like(state.rest.hidden[..., 0], dtype=policy.dtype).scatter(1, state.positions, policy)
    if observed is not None and state.positions is not None:
        classes, patches = split_cls(observed, state.cls_index)
        index = state.positions.unsqueeze(-1).expand_as(patches)
        patches = patches.new_zeros(*policy.shape, patches.shape[-1]).scatter(1, index, patches)
        observed = join_cls(classes, patches, cls_index)
    state = state.replace(
        hidden=hidden, residual=residual, cls_index=cls_index, token_mask=None, positions=None, observed=observed
    )
    return state, policy


def _hold_back(state: TokenState, choice: Tensor) -> TokenState:
    """Part every patch of a whole sequence (`_recall`) into what goes on, its value times the decision, and what rests,
    its value times one minus the decision: the decision's gradient comes from both."""
    keep = choice if choice.is_floating_point() else torch.zeros_like(state.rest.hidden[..., 0]).scatter(1, choice, 1.0)
    keep = keep.unsqueeze(-1)
    live, rest = [], []
    for x, none in zip((state.hidden, state.residual), state.rest):
        if x is None:
            live.append(None)
            rest.append(torch.zeros_like(none))
            continue
        classes, patches = split_cls(x, state.cls_index)
        live.append(join_cls(classes, (patches * keep).to(x.dtype), state.cls_index))
        rest.append((patches * (1 - keep)).to(none.dtype))
    return state.replace(hidden=live[0], residual=live[1], rest=Rest(*rest))


def pruning_output(state: TokenState, tokens: Tensor, logits: Tensor) -> PruningOutput:
    """Gather what the sites left in `state`; tokens (B, K + M, D) are normalised, the K class tokens first."""
    policy, positions = patch_policy(state), state.positions
    if positions is None and state.grid is not None:
        positions = torch.arange(policy.shape[1], device=policy.device).expand(policy.shape[0], -1)
    return PruningOutput(
        logits=logits,
        tokens=tokens[:, state.num_cls :],
        token_policy=policy.unsqueeze(-1),
        decisions=list(state.decisions),
        positions=positions,
        block_policy=torch.stack(state.block_policy).unsqueeze(2) if state.block_policy else None,
    )


class DynamicPruning(SiteMethod):
    """Token pruning before the layers of `config.pruning_loc`, and direction gates in every layer.

    `token_policy` and `direction_policy` make the choices and may be replaced, to force some; None switches one off.
    `gate_noise` scales the noise that learned gates are drawn with in training: 1 as published, and at 0 they decide as
    in inference.
    Where the class token's column is wanted for the gates, models with two class tokens take the mean of both, and
    models with none the mean over the patch tokens still kept.
    """

    def __init__(self, config: PruningConfig) -> None:
        self.config = config
        self.gate_noise = 1.0
        tokens = {"learned": self._learned_tokens, "static": self._static_tokens, "random": self._random_tokens}
        gates = {"learned": self._learned_gates, "static": self._static_gates, "random": self._random_gates}
        self.token_policy: TokenPolicy | None = tokens[config.policy] if config.tokens else None
        self.direction_policy: DirectionPolicy | None = gates[config.policy] if config.blocks else None

    def attach(self, model: nn.Module) -> None:
        """Add `score_predictors` and every mixer's `block_head` (weight 0, bias 5: all directions on), as far as the
        policy learns."""
        config = self.config
        config.check_depth(model.depth)
        self.model = model
        self.layers_per_site = model.depth // model.num_sites
        self.num_patches = model.patch_embed.num_patches
        if config.tokens and model.num_prefix_tokens == 0 and model.final_pool_type != "mean":
            raise ValueError(
                f"final_pool_type is {model.final_pool_type!r}; wanted 'mean' for token pruning without a class token."
            )
        odd = any(layer % 2 for layer in config.pruning_loc)
        if config.tokens and self.layers_per_site == 2 and (odd or config.predictor_input != "hidden"):
            raise ValueError(
                "This model takes its layers in pairs: wanted even layers in pruning_loc, and predictor_input 'hidden'."
            )
        mixer = model.layers[0].mixer
        if config.policy != "learned":
            return
        if config.tokens:
            width = {"hidden": model.embed_dim, "delta": mixer.d_inner, "B": mixer.d_state}[config.predictor_input]
            model.score_predictors = nn.ModuleList(ScorePredictor(width, model.embed_dim) for _ in config.pruning_loc)
        if config.blocks:
            for layer in model.layers:
                head = nn.Linear(2 * mixer.d_inner, len(mixer.directions))
                nn.init.zeros_(head.weight)
                nn.init.constant_(head.bias, 5.0)
                layer.mixer.block_head = head

    def __call__(self, index: int, state: TokenState, run: Callable[..., TokenState]) -> TokenState:
        layer = index * self.layers_per_site
        if state.grid is not None:
            self.num_patches = math.prod(state.grid)
        if self.token_policy is not None and layer in self.config.pruning_loc:
            state = self._drop_tokens(self.config.pruning_loc.index(layer), state)
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
        state = state.replace(block_policy=state.block_policy + tuple(gates))
        if "observe" in mixer_args:
            state = state.replace(observed=self._mean_observed(layer, state, seen))
        return state

    # --- tokens ---

    def num_kept(self, stage: int) -> int:
        """How many tokens inference keeps at `stage`: a share of the images' original patches, rounded down."""
        return int(self.config.token_ratio[stage] * self.num_patches)

    def _drop_tokens(self, stage: int, state: TokenState) -> TokenState:
        policy = patch_policy(state)
        if state.rest is not None:
            state, policy = _recall(state, policy)
        if state.observed is not None:
            tokens = state.observed
        else:
            tokens = state.hidden if state.residual is None else state.hidden + state.residual
        choice = self.token_policy(stage, split_cls(tokens, state.cls_index)[1], policy)
        batch = policy.shape[0]
        if state.rest is not None:
            state = _hold_back(state, choice)
        if choice.is_floating_point():
            order, kept = kept_first(choice)
            cls_index = [
                torch.as_tensor(place, device=order.device) for place in self.model.class_token_positions(kept)
            ]
            cls_index = torch.stack([place.expand(batch) for place in cls_index], 1) if cls_index else ()
            state = take(state, order, cls_index)
            ones = choice.new_ones(batch, state.num_cls, 1)
            mask = join_cls(ones, choice.gather(1, order).unsqueeze(-1), cls_index).squeeze(-1)
            return state.replace(token_mask=mask, decisions=(*state.decisions, choice))
        state = take(state, choice, self.model.class_token_positions(choice.shape[1]))
        decision = policy.new_zeros(batch, self.num_patches).scatter(1, state.positions, 1.0)
        return state.replace(decisions=(*state.decisions, decision))

    def _learned_tokens(self, stage: int, tokens: Tensor, policy: Tensor) -> Tensor:
        scores = self.model.score_predictors[stage](tokens, policy).float()
        if self.model.training:
            return F.gumbel_softmax(scores, hard=True)[..., 0] * policy
        # what was dropped before is only among the tokens where maps want its last value
        return scores[..., 0].masked_fill(policy == 0, -math.inf).topk(self.num_kept(stage)).indices.sort().values

    def _static_tokens(self, stage: int, tokens: Tensor, policy: Tensor) -> Tensor:
        order, kept = kept_first(policy)
        chosen = evenly_spread(int(kept[0]), self.num_kept(stage))
        return order[:, chosen.to(tokens.device)]

    def _random_tokens(self, stage: int, tokens: Tensor, policy: Tensor) -> Tensor:
        return (torch.rand_like(policy) + policy).topk(self.num_kept(stage)).indices.sort().values

    # --- scan directions ---

    def _direction_gate(self, layer: int, state: TokenState, gates: list[Tensor]) -> Callable[[Tensor], Tensor]:
        """What the mixers of one site ask for their gates, which are also written into `gates`, a layer each."""

        def gate(hidden: Tensor) -> Tensor:
            # the second layer of a pair runs on the reversed sequence
            at, mask = state.cls_index, state.token_mask
            if gates:
                last = hidden.shape[1] - 1
                at = last - at if isinstance(at, Tensor) else tuple(last - place for place in at)
                mask = None if mask is None else mask.flip(1)
            if isinstance(at, Tensor):
                token = hidden.gather(1, at.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])).mean(1)
            elif len(at) == 1:
                token = hidden[:, at[0]]
            elif at:
                token = (hidden[:, at[0]] + hidden[:, at[1]]) / 2
            else:
                token = mean_over_kept(hidden, mask)
            number = layer + len(gates)
            # the class token's column alone: the layer may do without the other tokens of images that skip it
            column = self.model.layers[number].mixer.in_proj(token)
            gates.append(self.direction_policy(number, column))
            return gates[-1]

        return gate

    def _learned_gates(self, layer: int, column: Tensor) -> Tensor:
        logits = self.model.layers[layer].mixer.block_head(column).float()
        return gumbel_sigmoid(logits, noise=self.gate_noise) if self.model.training else (logits > 0).float()

    def _static_gates(self, layer: int, column: Tensor) -> Tensor:
        directions = len(self.model.layers[layer].mixer.directions)
        total = directions * self.model.depth
        gates = torch.zeros(total, device=column.device)
        gates[evenly_spread(total, int(total * self.config.block_keep_ratio)).to(column.device)] = 1.0
        return gates[layer * directions : (layer + 1) * directions].expand(len(column), -1)

    def _random_gates(self, layer: int, column: Tensor) -> Tensor:
        directions = len(self.model.layers[layer].mixer.directions)
        chance = torch.rand(len(column), directions, device=column.device)
        return (chance < self.config.block_keep_ratio).float()

    # --- what a mixer's scan was told, as the predictor's input ---

    def _is_observed(self, layer: int) -> bool:
        learned_from = self.config.policy == "learned" and self.config.predictor_input != "hidden"
        return learned_from and layer + 1 in self.config.pruning_loc

    def _observer(self, batch: int, gates: list[Tensor], seen: list[Tensor]) -> Callable[..., None]:
        """Collects the step sizes or the B of each direction that runs, times its gate."""

        def observe(delta: Tensor, B: Tensor, images: Tensor | None = None) -> None:
            value = delta if self.config.predictor_input == "delta" else B
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
            width = mixer.d_inner if self.config.predictor_input == "delta" else mixer.d_state
            return state.hidden.new_zeros(*state.hidden.shape[:2], width)
        return sum(seen) / len(mixer.directions)


def scale_gate_noise(model: nn.Module, epoch: int, epochs: int, end: float) -> float:
    """Set the gate noise of a pruned `model` to what it is in `epoch`: 1 in the first of all `epochs` and, in equal
    steps, `end` in the last. Returns it."""
    scale = 1.0 + (end - 1.0) * epoch / max(epochs - 1, 1)
    for method in model.site_methods:
        if isinstance(method, DynamicPruning):
            method.gate_noise = scale
    return scale


class DecisionMeter:
    """Calls a pruned `model` for logits, and adds up what it decides over all calls.

    `sums`, float64: the number of images; the kept share of each stage, summed over images; on how many images each
    direction of each layer ran. Several meters' sums may be added.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, config = model, model.methods.pruning
        self.stages = len(config.pruning_loc) if config.tokens else 0
        self.shape = (model.depth, len(model.layers[0].mixer.directions)) if config.blocks else (0, 0)
        self.sums = torch.zeros(1 + self.stages + self.shape[0] * self.shape[1], dtype=torch.float64)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, classes)."""
        output = self.model.forward_with_decisions(x)
        sums = [torch.tensor([len(x)]), *(decision.double().mean(1).sum().view(1) for decision in output.decisions)]
        if output.block_policy is not None:
            sums.append(output.block_policy.double().sum((1, 2)).flatten())
        self.sums += torch.cat([part.cpu().double() for part in sums])
        return output.logits

    @property
    def tokens(self) -> Tensor | None:
        """The mean kept share of every stage (S,); None without token pruning."""
        return self.sums[1 : 1 + self.stages] / self.sums[0] if self.stages else None

    @property
    def directions(self) -> Tensor | None:
        """The share of images that each scan direction ran on, (depth, directions); None without block pruning."""
        return self.sums[1 + self.stages :].view(self.shape) / self.sums[0] if self.shape[0] else None

    def shares(self) -> dict[str, float]:
        """The kept shares by name, for a log."""
        named = {f"kept_tokens_{j + 1}": float(share) for j, share in enumerate(self.tokens if self.stages else ())}
        return named | ({} if self.directions is None else {"kept_directions": float(self.directions.mean())})


def ratio_terms(
    decisions: Sequence[Tensor],
    block_policy: Tensor | None,
    config: PruningConfig,
    token_weight: float,
    block_weight: float,
) -> dict[str, Tensor]:
    """The two keep targets, weighted: `token_ratio`, the mean over stages and images of (kept share - target)^2, from
    `decisions`, (B, M) a stage; `block_ratio`, (mean gate - target)^2. What is not pruned has no term."""
    terms = {}
    if decisions:
        shares = torch.stack([decision.mean(1) for decision in decisions])
        wanted = torch.tensor(config.token_ratio, device=shares.device)
        terms["token_ratio"] = token_weight * (shares - wanted[:, None]).square().mean()
    if block_policy is not None:
        terms["block_ratio"] = block_weight * (block_policy.mean() - config.block_keep_ratio).square()
    return terms


class PruningLoss(nn.Module):
    """Classification, the two keep targets, and the frozen teacher's logits and tokens.

    `base(samples, logits, targets)` + token_weight * mean over stages and images of (kept share - target)^2
    + block_weight * (mean(block policy) - target)^2 + distill_weight * (KL + MSE). `teacher` is the model that
    fine-tuning started from, without pruning. `parts` holds the terms of the last call, weighted.
    """

    def __init__(
        self,
        base: nn.Module,
        teacher: nn.Module,
        config: PruningConfig,
        token_weight: float = 10.0,
        block_weight: float = 10.0,
        distill_weight: float = 0.5,
    ) -> None:
        super().__init__()
        self.base, self.teacher, self.config = base, teacher.eval().requires_grad_(False), config
        self.token_weight, self.block_weight, self.distill_weight = token_weight, block_weight, distill_weight
        self.parts: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> PruningLoss:
        """Switch the rest; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, samples: Tensor, outputs: PruningOutput, targets: Tensor) -> Tensor:
        """The scalar loss of one batch: samples (B, C, H, W), what the student made of them, the base's targets."""
        with torch.no_grad():
            teacher_tokens = self.teacher.forward_features(samples)
            teacher_logits = self.teacher.forward_head(teacher_tokens)
        parts = self.terms(outputs, teacher_logits, teacher_tokens[:, self.teacher.num_prefix_tokens :])
        parts = {"classification": self.base(samples, outputs.logits, targets)} | parts
        self.parts = {name: part.detach() for name, part in parts.items()}
        return sum(parts.values())

    def terms(self, outputs: PruningOutput, teacher_logits: Tensor, teacher_tokens: Tensor) -> dict[str, Tensor]:
        """The weighted terms beside classification; teacher_tokens (B, M, D) in raster order."""
        terms = ratio_terms(outputs.decisions, outputs.block_policy, self.config, self.token_weight, self.block_weight)
        student, teacher = (logits.float().log_softmax(-1) for logits in (outputs.logits, teacher_logits))
        terms["logit_kl"] = self.distill_weight * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        # merged tokens are no one patch's, and have no counterpart
        if outputs.positions is not None:
            index = outputs.positions.unsqueeze(-1).expand(-1, -1, teacher_tokens.shape[-1])
            distance = (outputs.tokens.float() - teacher_tokens.float().gather(1, index)).square().mean(-1)
            kept = (outputs.token_policy.squeeze(-1) > 0.5).to(distance.dtype)
            terms["token_mse"] = self.distill_weight * (distance * kept).sum() / kept.sum().clamp(min=1)
        return terms
