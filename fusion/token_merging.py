"""Token merging: after a site, similar patch tokens are fused, so that later sites scan a shorter sequence.

Shen et al. 2024, "Famba-V: Fast Vision Mamba with Cross-Layer Token Fusion" (arXiv:2409.09808), on the matching of
Bolya et al. 2023, "Token Merging: Your ViT But Faster" (arXiv:2210.09461).

The functions are pure and know no model, so they fit any Vision Mamba whose blocks pass on (hidden, residual):

    def forward(self, hidden, residual):                     # a block of someone else's Vim, class token first
        hidden, residual = self.block(hidden, residual)
        matching = bipartite_soft_matching(hidden, r=8, class_token=True, order="raster")
        return merge(hidden, matching), merge(residual, matching)

`TokenMerging` is the method as this project's models run it, with class tokens at any place.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from mamba_ssm.ops import merging
from mamba_ssm.ops.exporting import stable_argsort
from torch import Tensor, nn

from fusion.method import Settings, SiteMethod, SitePlan, option
from fusion.token_state import ClassIndex, ClassTokens, TokenState, join_cls, split_cls

_logger = logging.getLogger(__name__)

STRATEGIES = ("no", "all", "alternate", "lower", "upper")
ORDERS = ("published", "raster")
MATCHINGS = ("similar", "random", "kth")
RELEASE_LAYER, RELEASE_TOKEN = 11, 7  # its defaults of K and r


def _strategy(name: str) -> str:
    return "alternate" if name == "interleaved" else name


@dataclass(frozen=True)
class MergingSettings(Settings):
    """Which sites merge, how many tokens each, and in which order the survivors go on.

    `strategy` picks the sites by index i: `all` every one, `alternate` (also `interleaved`) odd i, `lower` i < layer,
    `upper` i > layer. Ablations: `matching` says which tokens are fused, those most similar to another one, or some
    drawn at `random` (`random_sources`), or every `kth` (`every_kth`), each into its most similar token of the others;
    with `weighted`, a token counts as often in a mean as patches have gone into it.
    """

    strategy: str = option(
        "no",
        "after which sites similar tokens merge; 'interleaved' is 'alternate'",
        flag="--fusion-strategy",
        keyword="fusion_strategy",
        choices=STRATEGIES,
        type=_strategy,
    )
    layer: int = option(
        0,
        "site that bounds 'lower' and 'upper'",
        flag="--fusion-layer",
        keyword="fusion_layer",
        type=int,
        metavar="K",
    )
    token: int = option(
        0, "tokens to fuse at each merging site", flag="--fusion-token", keyword="fusion_token", type=int, metavar="R"
    )
    order: str = option(
        "published",
        "order of the tokens that go on",
        flag="--fusion-order",
        keyword="fusion_order",
        choices=ORDERS,
    )
    matching: str = option(
        "similar",
        "ablation: which tokens are fused, the most similar, some at random, or every kth",
        flag="--fusion-matching",
        keyword="fusion_matching",
        choices=MATCHINGS,
    )
    weighted: bool = option(
        False,
        "ablation: a token counts in a mean by the patches that it holds",
        flag="--fusion-weighted",
        keyword="fusion_weighted",
        action="store_true",
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "strategy", _strategy(self.strategy))
        super().__post_init__()
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


class Matching(NamedTuple):
    """Which tokens of a sequence of length L become one, in a sequence of length L'.

    `slot` (B, L), long: where each token's value goes, 0 to L' - 1. `kept` (B, L), bool: True for the one token of each
    group whose place the group takes, False for those fused into it. `count` (B, L'), long: how many tokens each group
    holds.
    """

    slot: Tensor
    kept: Tensor
    count: Tensor


def num_merged(r: int, num_patches: int) -> int:
    """How many of `num_patches` patch tokens a step can fuse when asked for r: every second one at most, never below
    0."""
    return max(0, min(r, num_patches // 2))


def bipartite_soft_matching(
    metric: Tensor,
    r: int,
    class_token: bool = False,
    order: str = "published",
    sort: bool | None = None,
    sources: Tensor | None = None,
) -> Matching:
    """Match the r most similar pairs of tokens (Bolya et al. 2023, section 3): metric (B, L, C) -> `Matching` to L - r.

    Tokens at even indices (set a) are compared by cosine similarity with those at odd indices (set b); each a-token
    picks its best b-token, and the r a-tokens with the highest best similarity are fused into theirs, ties going to the
    lower index. With `class_token` the token at index 0 is left alone. r is capped at half of the other tokens, rounded
    down; r <= 0 fuses nothing. Nothing here is differentiated, and the similarities are computed in float32 at least.

    `order` "published" puts the a-tokens that are left first, then the b-tokens; "raster" leaves every token that is
    left in its place. `sort` is about published order: True keeps the a-tokens in index order, False puts the most
    similar first. The default, None, sorts if there is a class token, as the published function does; models sort.

    `sources` (B or 1, r), long, names the tokens to fuse, counted without the class token, in place of those that are
    most similar: they are then set a, all others set b, and what is left keeps its place (`random_sources`,
    `every_kth`). Raises ValueError for an unknown order, or for one or sources that contradict sort=False or r.
    """
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}; wanted one of {', '.join(ORDERS)}.")
    if sort is False and (class_token or order == "raster"):
        raise ValueError("sort is False; wanted True or None with a class token or in raster order.")
    index = (0,) if class_token else ()
    r = num_merged(r, metric.shape[1] - len(index))
    if sources is None:
        return _match(metric, r, index, index, int(class_token), order, sort=class_token or bool(sort))[0]
    if sort is False or sources.ndim != 2 or sources.shape[1] != r or len(sources) not in (1, len(metric)):
        raise ValueError(
            f"sources are {tuple(sources.shape)}; wanted ({len(metric)} or 1, {r}), and sort True or None beside them."
        )
    return _match_sources(metric, sources, index, index)[0]


def random_sources(batch: int, num_patches: int, r: int, generator: torch.Generator | None = None) -> Tensor:
    """r of `num_patches` patch tokens drawn at random for each sequence of a batch: (batch, r), long, rising."""
    return torch.rand(batch, num_patches, generator=generator).topk(r).indices.sort().values


def every_kth(num_patches: int, r: int) -> Tensor:
    """r of `num_patches` patch tokens in even steps of k = num_patches / r, from the first: (1, r), long, rising. With
    r half of them they are every second token, set a of the published matching."""
    return (torch.arange(r) * num_patches // max(r, 1)).unsqueeze(0)


def _match(
    metric: Tensor, r: int, index: ClassIndex, moved: tuple[int, ...] | None, first: int, order: str, sort: bool
) -> tuple[Matching, ClassIndex]:
    """Match a sequence with class tokens at `index`, r within bounds; set a begins at patch token `first` (0 or 1).
    They go to `moved`, or if that is None keep their own places among the patch tokens left. Returns the matching and
    where class tokens went."""
    if r and merging.has_kernels(metric):
        cls = index if isinstance(index, Tensor) else merging.index_tensor(index, metric.device)
        slot, kept, count, places = merging.match_tokens_fn(
            metric.detach(),
            r,
            cls,
            [-1] * cls.shape[1] if moved is None else moved,
            odd_first=bool(first),
            raster=order == "raster",
            sort=sort,
        )
        return Matching(slot, kept, count), places if moved is None else moved
    patches = split_cls(metric, index)[1]
    slot, kept = _match_patches(patches, r, first, order, sort)
    places = _own_places(kept, index) if moved is None else moved
    return _with_cls(slot, kept, patches.shape[1] - r, index, places), places


def _match_sources(
    metric: Tensor, sources: Tensor, index: ClassIndex, moved: tuple[int, ...] | None
) -> tuple[Matching, ClassIndex]:
    """Match a sequence with class tokens at `index`, going to `moved` as in `_match`, whose patch tokens `sources`
    (B or 1, r) are fused, each into the most similar of the others."""
    patches = split_cls(metric, index)[1]
    batch, length = patches.shape[:2]
    sources = sources.to(patches.device).expand(batch, -1)
    kept = torch.ones(batch, length, dtype=torch.bool, device=patches.device).scatter(1, sources, False)
    with torch.no_grad(), _without_autocast(metric.device.type):
        unit = F.normalize(patches.to(torch.promote_types(patches.dtype, torch.float32)), dim=-1)
        from_a = unit.gather(1, sources.unsqueeze(-1).expand(-1, -1, unit.shape[2]))
        similarity = from_a @ unit.transpose(1, 2)
        partner = similarity.masked_fill(~kept.unsqueeze(1), -torch.inf).argmax(-1)
    slot = kept.cumsum(1) - 1
    slot = slot.scatter(1, sources, slot.gather(1, partner))
    places = _own_places(kept, index) if moved is None else moved
    return _with_cls(slot, kept, length - sources.shape[1], index, places), places


def _own_places(kept: Tensor, index: ClassIndex) -> Tensor:
    """Where class tokens at `index` stand if they keep their places among the patch tokens that are `kept` (B, M)."""
    index = index if isinstance(index, Tensor) else torch.tensor([index], dtype=torch.long, device=kept.device)
    slots = torch.arange(index.shape[1], device=kept.device)
    before = torch.arange(kept.shape[1], device=kept.device) < (index - slots).unsqueeze(2)
    return (kept.unsqueeze(1) & before).sum(2) + slots


def _match_patches(metric: Tensor, r: int, first: int, order: str, sort: bool) -> tuple[Tensor, Tensor]:
    """Match patch tokens alone, r within bounds: set a begins at index `first` (0 or 1), set b at the other. Returns
    `slot` and `kept`."""
    batch, length = metric.shape[:2]
    place = torch.arange(length, device=metric.device).expand(batch, -1)
    if r == 0:
        return place, torch.ones_like(place, dtype=torch.bool)
    in_a, in_b = slice(first, None, 2), slice(1 - first, None, 2)
    with torch.no_grad(), _without_autocast(metric.device.type):
        metric = F.normalize(metric.to(torch.promote_types(metric.dtype, torch.float32)), dim=-1)
        similarity, partner = (metric[:, in_a] @ metric[:, in_b].transpose(1, 2)).max(-1)
    ranking = stable_argsort(similarity, descending=True)
    # fused[i]: whether a-token i is among the first r of the ranking
    index = place[:, : ranking.shape[1]]
    fused = (ranking[:, :r, None] == index[:, None]).any(1)

    # like what comes of the tokens, which under `torch.func.vmap` are more than they look
    like = metric[..., :1].sum(-1)
    kept = torch.ones_like(like, dtype=torch.bool)
    kept[:, in_a] = ~fused
    if order == "raster":
        places = kept.cumsum(1) - 1
        a_places, b_places = places[:, in_a], places[:, in_b]
    else:
        num_left = index.shape[1] - r
        if sort:
            a_places = (~fused).cumsum(1) - 1
        else:
            a_places = (ranking[:, r:, None] == index[:, None]).int().argmax(1)
        b_places = num_left + place[:, : length - index.shape[1]]
    slot = torch.empty_like(like, dtype=place.dtype)
    slot[:, in_a] = torch.where(fused, b_places.gather(1, partner), a_places)
    slot[:, in_b] = b_places
    return slot, kept


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    # which Dynamo before torch 2.12 cannot follow; what is compiled has a device that knows autocast
    if torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def merge(x: Tensor, matching: Matching, sizes: Tensor | None = None) -> Tensor:
    """Fuse tokens: x (B, L, C) -> (B, L', C), each the mean of its group, in x's dtype; plain, or weighted by `sizes`
    (B, L), above 0, as many as patches have gone into each token (Bolya et al. 2023, section 3).

    Sums in float32 at least. A token alone in its group keeps its exact value. Differentiable in x.
    """
    if sizes is None and merging.has_kernels(x):
        return merging.merge_tokens_fn(x, matching.slot, matching.count)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if sizes is None:
        mean = _sums(wide, matching) / matching.count.unsqueeze(-1)
    else:
        sizes = sizes.to(wide.dtype)
        shares = sizes / merge_sizes(sizes, matching).gather(1, matching.slot)
        mean = _sums(wide * shares.unsqueeze(-1), matching)
    return mean.to(x.dtype)


def merge_sizes(sizes: Tensor, matching: Matching) -> Tensor:
    """How many patches have gone into each group: sizes (B, L) -> (B, L')."""
    return _sums(sizes.unsqueeze(-1), matching).squeeze(-1)


def _sums(x: Tensor, matching: Matching) -> Tensor:
    """The sum of each group: x (B, L, C) -> (B, L', C)."""
    return merging.sum_tokens(x, matching.slot, matching.count.shape[1])


def unmerge(y: Tensor, matching: Matching) -> Tensor:
    """Give every token of the longer sequence its group's value: y (B, L', C) -> (B, L, C). Differentiable in y."""
    return merging.spread_tokens(y, matching.slot)


def merge_tokens(
    state: TokenState, r: int, order: str = "published", sources: Tensor | None = None, weighted: bool = False
) -> TokenState:
    """Fuse r patch tokens of `state` after a site, for its hidden states and, with the same pairs, its residual.

    The hidden states are the metric. Class tokens are taken out and the patch tokens count from 0 in the choice of even
    and odd; where all class tokens are in front they stay there, and tokens count with them. Afterwards class tokens at
    both ends, or spread by a rule, are put back by their rule, and those in front or behind stay there; others are in
    the middle of the patch tokens that are left (`order` "published") or keep their own places among them ("raster"),
    which differ from image to image: their index is then a tensor (B, K).

    `sources` (B or 1, r), long, names the patch tokens to fuse (see `bipartite_soft_matching`). With `weighted`, tokens
    count in a mean by the patches that they hold, which the result remembers, and class tokens by one.

    The result has neither grid nor positions, since a fused token is no one patch's; `groups`, where kept, say which
    patches it is. Raises ValueError for a state with a token mask.
    """
    if state.token_mask is not None:
        raise ValueError("A masked sequence must keep its length; wanted token merging without a token mask.")
    fused = num_merged(r, state.num_patches)
    if fused == 0:
        return state
    cls = state.cls
    moved = _moved_cls(cls, state.num_patches, state.num_patches - fused, order)
    if sources is None:
        matching, index = _match(state.hidden, fused, cls.index, moved, _first_of_a(cls), order, sort=True)
    else:
        matching, index = _match_sources(state.hidden, sources, cls.index, moved)
    sizes = None
    if weighted:
        sizes = state.entry(TokenMerging.name)
        sizes = state.hidden.new_ones(state.hidden.shape[:2], dtype=torch.float32) if sizes is None else sizes
        state = state.with_entry(TokenMerging.name, merge_sizes(sizes, matching))
    return state.merged(
        merge(state.hidden, matching, sizes),
        None if state.residual is None else merge(state.residual, matching, sizes),
        index,
        groups=None if state.groups is None else _patch_slots(matching, cls.index, index).gather(1, state.groups),
    )


def _plan_merging(state: TokenState, r: int, order: str) -> SitePlan | None:
    """What `merge_tokens` does with a sequence like `state`, where kernels do it, the same for every image and to
    nothing but the tokens; else None."""
    cls, fused = state.cls, num_merged(r, state.num_patches)
    carries = any(each is not None for each in (state.token_mask, state.groups))
    if carries or isinstance(cls.index, Tensor) or not merging.has_kernels(state.hidden):
        return None
    if fused == 0:
        return SitePlan()
    moved = _moved_cls(cls, state.num_patches, state.num_patches - fused, order)
    if moved is None:
        return None
    return SitePlan(merging=merging.Merging(fused, cls.index, moved, bool(_first_of_a(cls)), order == "raster"))


def _first_of_a(cls: ClassTokens) -> int:
    """The patch token at which set a begins: tokens count with class tokens where all of these are in front."""
    return cls.count % 2 if cls.place != "spread" and cls.index == tuple(range(cls.count)) else 0


def _moved_cls(cls: ClassTokens, num_patches: int, num_left: int, order: str) -> tuple[int, ...] | None:
    """Where the class tokens among `num_patches` patch tokens stand once `num_left` are left; None where they keep
    their places among those, in each image their own."""
    if cls.place in ("ends", "spread"):
        return cls.places(num_left)
    for place in ("front", "back", "ends"):
        rule = ClassTokens(cls.count, place)
        if isinstance(cls.index, tuple) and cls.index == rule.places(num_patches):
            return rule.places(num_left)
    return ClassTokens(cls.count, "middle").places(num_left) if order == "published" else None


def _patch_slots(matching: Matching, old: ClassIndex, new: ClassIndex) -> Tensor:
    """Where each patch token goes among the patch tokens left, (B, M); class tokens go from `old` to `new`."""
    slot = split_cls(matching.slot.unsqueeze(-1), old)[1].squeeze(-1)
    for place in reversed(_places(new)):
        slot = slot - (slot > place).long()
    return slot


def _places(index: ClassIndex) -> list[int | Tensor]:
    """One class token's place after the other: an index, or (B, 1)."""
    return [at.unsqueeze(1) for at in index.unbind(1)] if isinstance(index, Tensor) else list(index)


def _with_cls(slot: Tensor, kept: Tensor, num_left: int, old: ClassIndex, new: ClassIndex) -> Matching:
    """The matching of a sequence whose patch tokens go to `slot`, and whose class tokens, each a group of its own, go
    from the indices `old` to `new`."""
    places = [slot.new_full((slot.shape[0], 1), at) if isinstance(at, int) else at for at in _places(new)]
    for place in places:
        slot = slot + (slot >= place)
    if places:
        slot = join_cls(torch.stack(places, 1), slot.unsqueeze(-1), old).squeeze(-1)
        kept = join_cls(kept.new_ones(kept.shape[0], len(places), 1), kept.unsqueeze(-1), old).squeeze(-1)
    count = slot.new_zeros(slot.shape[0], num_left + len(places))
    return Matching(slot, kept, count.scatter_add(1, slot, torch.ones_like(slot)))


def token_schedule(settings: MergingSettings, num_patches: int, num_cls: int, num_sites: int) -> tuple[int, ...]:
    """The length of the token sequence, class tokens included, after each site of a model."""
    sites, lengths = settings.sites(num_sites), []
    for index in range(num_sites):
        if index in sites:
            num_patches -= num_merged(settings.token, num_patches)
        lengths.append(num_patches + num_cls)
    return tuple(lengths)


class TokenMerging(SiteMethod):
    """Merges tokens after the sites that its settings pick, in training and in inference; owns no parameters."""

    name = "merging"
    title = "token merging (Famba-V)"
    Settings = MergingSettings
    switch, off = "fusion_strategy", "no"

    settings: MergingSettings
    sites: tuple[int, ...] = ()
    num_tokens = 0
    schedule: tuple[int, ...] = ()

    @classmethod
    def add_arguments(cls, group: argparse._ActionsContainer) -> None:
        """Add the flags."""
        super().add_arguments(group)
        group.add_argument("--bi-merge", action="store_true", help="accepted for published commands; changes nothing")

    @classmethod
    def check_flags(cls, args: argparse.Namespace, typed: set[str]) -> None:
        """Say what changes nothing."""
        super().check_flags(args, typed)
        if args.bi_merge:
            _logger.warning("--bi-merge changes nothing here: --fusion-strategy alone switches token merging on.")
        if args.fusion_strategy != "no":
            # as in the release, whose command may name the strategy alone; `describe` says what is taken
            if "fusion_token" not in typed:
                args.fusion_token = RELEASE_TOKEN
            if "fusion_layer" not in typed:
                args.fusion_layer, args.cut_fusion_layer = RELEASE_LAYER, True
            return
        if args.fusion_matching != "similar" or args.fusion_weighted:
            raise ValueError("--fusion-matching and --fusion-weighted say how tokens merge; wanted --fusion-strategy.")
        if args.fusion_token > 0 or args.fusion_layer != 0:
            _logger.warning("--fusion-token and --fusion-layer change nothing without --fusion-strategy.")
        if args.fusion_token < 0:
            raise ValueError(f"--fusion-token is {args.fusion_token}; wanted 0 or more tokens to fuse at a site.")

    @classmethod
    def model_keywords(cls, args: argparse.Namespace, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """A layer that was not typed is cut to the sites of the registry entry."""
        given = super().model_keywords(args, defaults)
        if given and getattr(args, "cut_fusion_layer", False):
            sites = defaults.get("depth", 24) // (2 if defaults.get("if_bidirectional") else 1)
            args.fusion_layer = given["fusion_layer"] = min(RELEASE_LAYER, sites - 1)
        return given

    @classmethod
    def conflicts(cls, settings: MergingSettings, others: Mapping[str, Any]) -> str | None:
        """Two methods that shorten the sequence."""
        pruning = others.get("pruning")
        if pruning is not None and pruning.tokens:
            return (
                "Token merging and token pruning both shorten the sequence: wanted one of the two, or merging with "
                "pruning 'block'."
            )
        return None

    def attach(self, model: nn.Module) -> None:
        """Learn how many sites and tokens `model` has. Raises ValueError if K is none of its sites."""
        if model.rope is not None:
            raise ValueError(
                "A merged token has no one position to turn by: wanted the rotary embedding without token merging."
            )
        self.model = model
        self.resize(model)

    def resize(self, model: nn.Module) -> None:
        """Count the tokens after each site."""
        num_patches, num_cls, num_sites = model.patch_embed.num_patches, model.num_prefix_tokens, model.num_sites
        self.sites = self.settings.sites(num_sites)
        self.schedule = token_schedule(self.settings, num_patches, num_cls, num_sites)
        self.num_tokens = num_patches + num_cls

    def __call__(self, index: int, state: TokenState, run: Callable[..., TokenState]) -> TokenState:
        settings = self.settings
        self._foretell(index, state)
        state = run(state)
        if index not in self.sites:
            return state
        return merge_tokens(state, settings.token, settings.order, self._sources(index, state), settings.weighted)

    def plan(self, index: int, state: TokenState) -> SitePlan | None:
        settings = self.settings
        self._foretell(index, state)
        if index not in self.sites:
            return SitePlan()
        if settings.matching != "similar" or settings.weighted:
            return None
        return _plan_merging(state, settings.token, settings.order)

    def _foretell(self, index: int, state: TokenState) -> None:
        """Before the first site, say that tokens are going to be merged."""
        if index == 0:
            merging.foretell(state.hidden, self.settings.weighted)

    def _sources(self, index: int, state: TokenState) -> Tensor | None:
        """Which patch tokens are fused after site `index`; None for the most similar. What is drawn is drawn for each
        image in training, and in evaluation for all images and every time alike."""
        fused = num_merged(self.settings.token, state.num_patches)
        if self.settings.matching == "similar":
            return None
        if self.settings.matching == "kth":
            return every_kth(state.num_patches, fused)
        if self.model.training:
            return random_sources(len(state.hidden), state.num_patches, fused)
        return random_sources(1, state.num_patches, fused, torch.Generator().manual_seed(index))

    def varies(self, training: bool) -> str:
        return "" if self.settings.matching == "similar" else "the host chooses which tokens are fused"

    def describe(self) -> None:
        """Log the number of tokens after each site, and warn if there are sites that cannot merge what is asked of
        them."""
        settings, before = self.settings, (self.num_tokens, *self.schedule)
        lengths = " ".join(map(str, self.schedule))
        matching = "" if settings.matching == "similar" else f", {settings.matching} matching"
        _logger.info(
            "Token merging (%s, K %d, r %d, %s order%s): %d tokens, after the sites %s.",
            *(settings.strategy, settings.layer, settings.token, settings.order),
            matching + (", weighted" if settings.weighted else ""),
            *(self.num_tokens, lengths),
        )
        idle = [index for index in self.sites if before[index] == before[index + 1]]
        if not self.sites or len(idle) == len(self.sites):
            _logger.warning("Token merging is on but merges nothing: no site fuses a token.")
        elif idle:
            _logger.warning(
                "Token merging has nothing left to merge after site %d: r = %d is more than the tokens allow.",
                idle[0] - 1,
                settings.token,
            )
        elif settings.weighted and len(self.sites) == 1:
            _logger.warning("Weighted means are plain ones here: one site merges, and every token is one patch there.")
