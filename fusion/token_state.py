"""What travels between the sites of a Vision Mamba: the token sequence, and where class tokens stand in it.

A *site* is one encoder layer (in paired models two). What acts there is a `fusion.method.SiteMethod`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from mamba_ssm.ops.merging import spread_tokens
from torch import Tensor

# Where class tokens stand in a sequence, rising: indices shared by the batch, or long (B, K) once images differ.
ClassIndex = tuple[int, ...] | Tensor

PLACES = ("front", "middle", "back", "ends", "spread")
POSITIONS = ("shared", "own", "none")
READOUTS = ("mean", "concat")


@dataclass(frozen=True)
class ClassTokens:
    """K class tokens: a rule for their places, the places that they have, their positions, and how they are read.

    `place` is the rule among m patch tokens: `front`; `middle`, from index m // 2 on; `back`; `ends`, the first half of
    them in front and the others behind; `spread`, m // (K + 1) patch tokens before each (MambaReg's registers,
    arXiv:2405.14858). `index` is where they stand now, empty for a rule alone. `positions` says where their position
    embedding comes from: rows of `pos_embed` at their places (`shared`), a parameter of their `own`, or `none`.
    `readout` is their `mean`, or all of them behind one another (`concat`).
    """

    count: int = 0
    place: str = "middle"
    positions: str = "shared"
    readout: str = "mean"
    index: ClassIndex = ()

    @classmethod
    def at(cls, index: ClassIndex, place: str = "middle") -> ClassTokens:
        """Class tokens that stand at `index`."""
        return cls(index.shape[1] if isinstance(index, Tensor) else len(index), place, index=index)

    def places(self, num_patches: int | Tensor) -> ClassIndex:
        """Where the rule puts them among m patch tokens, or, for a long tensor (B,), among each image's own number."""
        shared = not isinstance(num_patches, Tensor) or num_patches.ndim == 0
        if shared and isinstance(num_patches, Tensor):
            num_patches = int(num_patches)  # where torch.jit traces, sizes are tensors
        if not shared and not self.count:
            return ()
        slots = range(self.count) if shared else torch.arange(self.count, device=num_patches.device)
        m = num_patches if shared else num_patches.unsqueeze(1)
        if self.place == "spread":
            length = m // (self.count + 1)
            return tuple(k * (length + 1) + length for k in slots) if shared else slots * (length + 1) + length
        in_front = {"front": self.count, "ends": (self.count + 1) // 2}.get(self.place, 0)
        behind = m // 2 if self.place == "middle" else m
        if shared:
            return tuple(k if k < in_front else behind + k for k in slots)
        return torch.where(slots < in_front, slots, behind + slots)

    def among(self, num_patches: int | Tensor) -> ClassTokens:
        """The same class tokens where the rule puts them among `num_patches` patch tokens."""
        return self.moved(self.places(num_patches))

    def moved(self, index: ClassIndex) -> ClassTokens:
        """The same class tokens at `index`."""
        return ClassTokens(self.count, self.place, self.positions, self.readout, index)


@dataclass(frozen=True)
class TokenState:
    """The token sequence between two sites.

    `hidden` (B, L, D) is the last mixer's output, `residual` (B, L, D) the residual stream it has not been added to yet
    (None before the first site). `cls` says where the class tokens stand among the M patch tokens. `grid` is the grid
    that the patch tokens come from, with any number of axes, (rows, cols) for an image; None once tokens are mixed.
    `positions` (B, M), long, says which places of it are present, as raster indices in the order of the tokens; None
    means all of them in raster order. `token_mask` (B, L) is 1 for tokens that take part and 0 for tokens kept only to
    keep the length (training with pruning). `groups` (B, M0), kept only on request, maps each original patch to the
    patch token it now lives in. `entries` holds what only one method needs, by the method's name.
    """

    hidden: Tensor
    residual: Tensor | None = None
    cls: ClassTokens = field(default_factory=ClassTokens)
    grid: tuple[int, ...] | None = None
    positions: Tensor | None = None
    token_mask: Tensor | None = None
    groups: Tensor | None = None
    entries: Mapping[str, Any] = field(default_factory=dict)

    def replace(self, **changes: Any) -> TokenState:
        """A copy with the named fields changed."""
        # field by field: Dynamo of torch 2.6 cannot follow dataclasses.replace
        own = {
            **dict(hidden=self.hidden, residual=self.residual, cls=self.cls, grid=self.grid, positions=self.positions),
            **dict(token_mask=self.token_mask, groups=self.groups, entries=self.entries),
        }
        return TokenState(**{**own, **changes})

    def merged(self, hidden: Tensor, residual: Tensor | None, index: ClassIndex, **changes: Any) -> TokenState:
        """The sequence once tokens have become one and class tokens stand at `index`: with neither grid nor positions,
        since a fused token is no one patch's."""
        moved = dict(hidden=hidden, residual=residual, cls=self.cls.moved(index), grid=None, positions=None)
        return self.replace(**moved, **changes)

    def entry(self, name: str, default: Any = None) -> Any:
        """What the method `name` keeps in this sequence."""
        return self.entries.get(name, default)

    def with_entry(self, name: str, value: Any) -> TokenState:
        """A copy in which the method `name` keeps `value`."""
        return self.replace(entries={**self.entries, name: value})

    @property
    def num_tokens(self) -> int:
        """Length L of the sequence, class tokens included."""
        return self.hidden.shape[1]

    @property
    def num_cls(self) -> int:
        """How many class tokens the sequence holds."""
        return self.cls.count

    @property
    def num_patches(self) -> int:
        """How many patch tokens the sequence holds."""
        return self.num_tokens - self.num_cls

    @property
    def fills_grid(self) -> bool:
        """Whether the patch tokens fill their grid, in raster order."""
        return self.grid is not None and self.positions is None


def split_cls(x: Tensor, cls: ClassTokens | ClassIndex) -> tuple[Tensor, Tensor]:
    """Part class tokens from patch tokens: x (B, L, C) -> class tokens (B, K, C), patch tokens (B, L - K, C), in
    order."""
    index = _index_of(cls)
    if isinstance(index, Tensor):
        order = _patches_first(index, x.shape[1])
        x = x.gather(1, order.unsqueeze(-1).expand_as(x))
        patches, classes = x.tensor_split([x.shape[1] - index.shape[1]], 1)
        return classes, patches
    classes, patches, begin = [], [], 0
    for first, last in _runs(index):
        patches.append(x[:, begin:first])
        classes.append(x[:, first:last])
        begin = last
    return _cat(classes, x), _cat([*patches, x[:, begin:]], x)


def join_cls(classes: Tensor, patches: Tensor, cls: ClassTokens | ClassIndex) -> Tensor:
    """Put class tokens (B, K, C) among patch tokens (B, M, C) so that they stand where `cls` says; inverse of
    `split_cls`."""
    index = _index_of(cls)
    if isinstance(index, Tensor):
        x = torch.cat([patches, classes], 1)
        order = _patches_first(index, x.shape[1])
        slots = torch.arange(x.shape[1], device=x.device).expand_as(order)
        source = torch.empty_like(order).scatter_(1, order, slots)
        return x.gather(1, source.unsqueeze(-1).expand_as(x))
    pieces, taken, begin = [], 0, 0
    for first, last in _runs(index):
        before = first - taken
        pieces += [patches[:, begin:before], classes[:, taken : taken + last - first]]
        taken, begin = taken + last - first, before
    return _cat([*pieces, patches[:, begin:]], patches)


def mean_of_cls(x: Tensor, cls: ClassTokens | ClassIndex) -> Tensor:
    """The mean over the K >= 1 class tokens: x (B, L, C) -> (B, C)."""
    index = _index_of(cls)
    if isinstance(index, Tensor):
        return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1])).mean(1)
    if len(index) == 1:
        return x[:, index[0]]
    return _cat([x[:, first:last] for first, last in _runs(index)], x).mean(1)


def spread(patches: Tensor, state: TokenState) -> Tensor:
    """What the patch tokens of `state` have, (B, m, C) -> what all M places of their grid have, (B, M, C): merged
    patches (`groups`) their group's, absent ones zero."""
    if state.groups is not None:
        patches = spread_tokens(patches, state.groups)
    if state.positions is None:
        return patches
    index = state.positions.unsqueeze(-1).expand_as(patches)
    return patches.new_zeros(patches.shape[0], math.prod(state.grid), patches.shape[-1]).scatter(1, index, patches)


def reorder(state: TokenState, order: Tensor) -> TokenState:
    """The same tokens in another order (L,), for the whole batch; the patches' positions are written down.

    Class tokens that are read one by one (`concat`) keep their own order at the places that come to them.
    """
    old_cls = torch.tensor(state.cls.index, dtype=torch.long)
    cls = state.cls.moved(tuple(int(index) for index in torch.isin(order, old_cls).nonzero()))
    if cls.readout == "concat":
        order = order.index_put((torch.tensor(cls.index, dtype=torch.long),), old_cls)
    order = order.to(state.hidden.device, non_blocking=True)
    batch = state.hidden.shape[0]
    positions = state.positions
    if positions is None:
        positions = torch.arange(state.num_patches, device=order.device).expand(batch, -1)
    slots = join_cls(positions.new_full((batch, cls.count, 1), -1), positions.unsqueeze(-1), state.cls)[:, order]
    return state.replace(hidden=state.hidden[:, order], cls=cls, positions=split_cls(slots, cls)[1].squeeze(-1))


def patch_policy(state: TokenState) -> Tensor:
    """1 for every patch token still kept, else 0: (B, n)."""
    if state.token_mask is None:
        return state.hidden.new_ones(state.hidden.shape[0], state.num_patches, dtype=torch.float32)
    return split_cls(state.token_mask.unsqueeze(-1), state.cls)[1].squeeze(-1)


def mean_over_kept(x: Tensor, policy: Tensor | None) -> Tensor:
    """Mean over the tokens whose `policy` (B, n) is 1, or over all: x (B, n, C) -> (B, C); zeros where none is kept."""
    if policy is None:
        return x.sum(1) / max(x.shape[1], 1)
    policy = policy.unsqueeze(-1).to(x.dtype)
    return (x * policy).sum(1) / policy.sum(1).clamp(min=1)


def _index_of(cls: ClassTokens | ClassIndex) -> ClassIndex:
    return cls.index if isinstance(cls, ClassTokens) else cls


def _runs(index: tuple[int, ...]) -> list[tuple[int, int]]:
    """Neighbouring indices as (first, last + 1)."""
    runs: list[tuple[int, int]] = []
    for at in index:
        if runs and runs[-1][1] == at:
            runs[-1] = (runs[-1][0], at + 1)
        else:
            runs.append((at, at + 1))
    return runs


def _cat(parts: list[Tensor], x: Tensor) -> Tensor:
    """The parts (B, n, C) behind one another, without a copy where there is but one; an empty x[:, :0] for none."""
    parts = [part for part in parts if part.shape[1]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1) if parts else x[:, :0]


def _patches_first(index: Tensor, length: int) -> Tensor:
    """The order (B, length) of a sequence that puts its patch tokens first and its class tokens (B, K) last."""
    batch, num_cls = index.shape
    patches = torch.arange(length - num_cls, device=index.device).expand(batch, -1)
    # a patch token stands behind every class token with no more patch tokens in front of it than there are before it
    before = index - torch.arange(num_cls, device=index.device)
    patches = patches + (patches.unsqueeze(2) >= before.unsqueeze(1)).sum(2)
    return torch.cat([patches, index], 1)
