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

import contextlib
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mamba_ssm.ops import merging
from torch import Tensor, nn

from fusion.config import FUSION_ORDERS, MergingConfig
from fusion.token_state import SiteMethod, TokenState, join_cls, split_cls

_logger = logging.getLogger(__name__)


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
    metric: Tensor, r: int, class_token: bool = False, order: str = "published", sort: bool | None = None
) -> Matching:
    """Match the r most similar pairs of tokens (Bolya et al. 2023, section 3): metric (B, L, C) -> `Matching` to L - r.

    Tokens at even indices (set a) are compared by cosine similarity with those at odd indices (set b); each a-token
    picks its best b-token, and the r a-tokens with the highest best similarity are fused into theirs, ties going to the
    lower index. With `class_token` the token at index 0 is left alone. r is capped at half of the other tokens, rounded
    down; r <= 0 fuses nothing. Nothing here is differentiated, and the similarities are computed in float32 at least.

    `order` "published" puts the a-tokens that are left first, then the b-tokens; "raster" leaves every token that is
    left in its place. `sort` is about published order: True keeps the a-tokens in index order, False puts the most
    similar first. The default, None, sorts if there is a class token, as the published function does; models sort.
    Raises ValueError for an unknown order, or for one that contradicts sort=False.
    """
    if order not in FUSION_ORDERS:
        raise ValueError(f"order is {order!r}; wanted one of {', '.join(FUSION_ORDERS)}.")
    if sort is False and (class_token or order == "raster"):
        raise ValueError("sort is False; wanted True or None with a class token or in raster order.")
    cls_index = (0,) if class_token else ()
    r = num_merged(r, metric.shape[1] - len(cls_index))
    return _match(metric, r, cls_index, cls_index, order, sort=class_token or bool(sort))[0]


def _match(
    metric: Tensor,
    r: int,
    cls_index: tuple[int, ...] | Tensor,
    moved: tuple[int, ...] | None,
    order: str,
    sort: bool,
) -> tuple[Matching, tuple[int, ...] | Tensor]:
    """Match a sequence with class tokens at `cls_index`, r within bounds. They go to `moved`, or if that is None a
    single one keeps its own place among the patch tokens left. Returns the matching and where class tokens went."""
    is_first = isinstance(cls_index, tuple) and cls_index == (0,)
    if r and merging.has_kernels(metric):
        cls = cls_index if isinstance(cls_index, Tensor) else torch.tensor([cls_index], dtype=torch.long)
        targets = (-1,) if moved is None else moved
        slot, kept, count, places = merging.match_tokens_fn(
            metric.detach(), r, cls, targets, odd_first=is_first, raster=order == "raster", sort=sort
        )
        return Matching(slot, kept, count), places if moved is None else moved
    patches = split_cls(metric, cls_index)[1]
    slot, kept = _match_patches(patches, r, int(is_first), order, sort)
    if moved is None:
        before = cls_index if isinstance(cls_index, Tensor) else cls_index[0]
        places = (kept & (torch.arange(kept.shape[1], device=kept.device) < before)).sum(1, keepdim=True)
    else:
        places = moved
    return _with_cls(slot, kept, patches.shape[1] - r, cls_index, places), places


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
    ranking = similarity.argsort(dim=-1, descending=True, stable=True)
    # fused[i]: whether a-token i is among the first r of the ranking
    index = place[:, : ranking.shape[1]]
    fused = (ranking[:, :r, None] == index[:, None]).any(1)

    kept = torch.ones_like(place, dtype=torch.bool)
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
    slot = torch.empty_like(place)
    slot[:, in_a] = torch.where(fused, b_places.gather(1, partner), a_places)
    slot[:, in_b] = b_places
    return slot, kept


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def merge(x: Tensor, matching: Matching) -> Tensor:
    """Fuse tokens: x (B, L, C) -> (B, L', C), each the plain mean of its group, in x's dtype.

    Sums in float32 at least. A token alone in its group keeps its exact value. Differentiable in x.
    """
    if merging.has_kernels(x):
        return merging.merge_tokens_fn(x, matching.slot, matching.count)
    batch, length, channels = x.shape
    num_left = matching.count.shape[1]
    # rows of a matrix instead of a batch of sequences: torch adds whole rows much faster
    rows = matching.slot + num_left * torch.arange(batch, device=x.device).unsqueeze(1)
    rows = rows.reshape(-1, 1).expand(-1, channels)
    dtype = torch.promote_types(x.dtype, torch.float32)
    total = x.new_zeros(batch * num_left, channels, dtype=dtype)
    total = total.scatter_add_(0, rows, x.reshape(-1, channels).to(dtype))
    mean = total.div_(matching.count.view(-1, 1))
    return mean.view(batch, num_left, channels).to(x.dtype)


def unmerge(y: Tensor, matching: Matching) -> Tensor:
    """Give every token of the longer sequence its group's value: y (B, L', C) -> (B, L, C). Differentiable in y."""
    return y.gather(1, matching.slot.unsqueeze(-1).expand(-1, -1, y.shape[-1]))


def merge_tokens(state: TokenState, r: int, order: str = "published") -> TokenState:
    """Fuse r patch tokens of `state` after a site, for its hidden states and, with the same pairs, its residual.

    The hidden states are the metric. A class token in front stays there, and patch tokens count from 1 in the choice of
    even and odd; in every other case class tokens are taken out and the patch tokens count from 0. Afterwards a class
    token that was last, or one of two, is at its end of the sequence; one in between is in the middle of the patch
    tokens that are left (`order` "published") or keeps its own place among them ("raster"), which differs from image to
    image: `cls_index` is then a tensor (B, 1).

    The result has neither grid nor positions, since a fused token is no one patch's; `groups`, where kept, say which
    patches it is. Raises ValueError for a state with a token mask.
    """
    if state.token_mask is not None:
        raise ValueError("A masked sequence must keep its length; wanted token merging without a token mask.")
    num_patches = state.num_tokens - state.num_cls
    fused = num_merged(r, num_patches)
    if fused == 0:
        return state
    moved = _moved_cls(state, num_patches - fused, order)
    matching, cls_index = _match(state.hidden, fused, state.cls_index, moved, order, sort=True)
    return state.replace(
        hidden=merge(state.hidden, matching),
        residual=None if state.residual is None else merge(state.residual, matching),
        cls_index=cls_index,
        grid=None,
        positions=None,
        groups=None
        if state.groups is None
        else _patch_slots(matching, state.cls_index, cls_index).gather(1, state.groups),
    )


def _moved_cls(state: TokenState, num_left: int, order: str) -> tuple[int, ...] | None:
    """Where the class tokens of `state` stand once `num_left` patch tokens are left; None where a single one keeps its
    place among those, in each image its own."""
    old = state.cls_index
    if state.num_cls == 2:
        return 0, num_left + 1
    if isinstance(old, tuple):
        if old in ((), (0,)):
            return old
        if old[0] == state.num_tokens - 1:
            return (num_left,)
    return (num_left // 2,) if order == "published" else None


def _patch_slots(matching: Matching, old: tuple[int, ...] | Tensor, new: tuple[int, ...] | Tensor) -> Tensor:
    """Where each patch token goes among the patch tokens left, (B, M); class tokens go from `old` to `new`."""
    slot = split_cls(matching.slot.unsqueeze(-1), old)[1].squeeze(-1)
    for place in reversed(new.split(1, 1) if isinstance(new, Tensor) else new):
        slot = slot - (slot > place).long()
    return slot


def _with_cls(
    slot: Tensor, kept: Tensor, num_left: int, old: tuple[int, ...] | Tensor, new: tuple[int, ...] | Tensor
) -> Matching:
    """The matching of a sequence whose patch tokens go to `slot`, and whose class tokens, each a group of its own, go
    from the indices `old` to `new`."""
    places = new.split(1, 1) if isinstance(new, Tensor) else [slot.new_full((slot.shape[0], 1), at) for at in new]
    for place in places:
        slot = slot + (slot >= place)
    if places:
        slot = join_cls(torch.stack(places, 1), slot.unsqueeze(-1), old).squeeze(-1)
        kept = join_cls(kept.new_ones(kept.shape[0], len(places), 1), kept.unsqueeze(-1), old).squeeze(-1)
    count = slot.new_zeros(slot.shape[0], num_left + len(places))
    return Matching(slot, kept, count.scatter_add_(1, slot, torch.ones_like(slot)))


def token_schedule(config: MergingConfig, num_patches: int, num_cls: int, num_sites: int) -> tuple[int, ...]:
    """The length of the token sequence, class tokens included, after each site of a model."""
    sites, lengths = config.sites(num_sites), []
    for index in range(num_sites):
        if index in sites:
            num_patches -= num_merged(config.token, num_patches)
        lengths.append(num_patches + num_cls)
    return tuple(lengths)


class TokenMerging(SiteMethod):
    """Merges tokens after the sites that its configuration picks, in training and in inference; owns no parameters."""

    def __init__(self, config: MergingConfig) -> None:
        self.config = config
        self.sites: tuple[int, ...] = ()
        self.num_tokens = 0
        self.schedule: tuple[int, ...] = ()

    def attach(self, model: nn.Module) -> None:
        """Learn how many sites and tokens `model` has. Raises ValueError if K is none of its sites."""
        num_patches, num_cls, num_sites = model.patch_embed.num_patches, model.num_prefix_tokens, model.num_sites
        self.sites = self.config.sites(num_sites)
        self.schedule = token_schedule(self.config, num_patches, num_cls, num_sites)
        self.num_tokens = num_patches + num_cls

    def __call__(self, index: int, state: TokenState, run: Callable[..., TokenState]) -> TokenState:
        state = run(state)
        return merge_tokens(state, self.config.token, self.config.order) if index in self.sites else state

    def report(self) -> None:
        """Log the number of tokens after each site, and warn if there are sites that cannot merge what is asked of
        them."""
        config, before = self.config, (self.num_tokens, *self.schedule)
        _logger.info(
            "Token merging (%s, K %d, r %d, %s order): %d tokens, after the sites %s.",
            *(config.strategy, config.layer, config.token, config.order),
            *(self.num_tokens, " ".join(map(str, self.schedule))),
        )
        idle = [index for index in self.sites if before[index] == before[index + 1]]
        if not self.sites or len(idle) == len(self.sites):
            _logger.warning("Token merging is on but merges nothing: no site fuses a token.")
        elif idle:
            _logger.warning(
                "Token merging has nothing left to merge after site %d: r = %d is more than the tokens allow.",
                *(idle[0] - 1, config.token),
            )


def report_merging(model: nn.Module) -> None:
    """Log once, when a program starts, what token merging will do in `model`; nothing if it is off."""
    for method in getattr(model, "site_methods", ()):
        if isinstance(method, TokenMerging):
            method.report()
