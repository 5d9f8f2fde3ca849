"""What travels between the sites of a Vision Mamba, and the shape of a method that acts there.

A *site* is one encoder layer (in paired models two). A method sees the token sequence before and after a site, and may
hand arguments to the mixer inside it; see `SiteMethod`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Rest(NamedTuple):
    """What pruning holds back of all M original patches in raster order, (B, M, D) each: the last value where a patch
    was dropped, zero where it is live. A patch's own value is the sum of both."""

    hidden: Tensor
    residual: Tensor


@dataclass(frozen=True)
class TokenState:
    """The token sequence between two sites.

    `hidden` (B, L, D) is the last mixer's output, `residual` (B, L, D) the residual stream it has not been added to yet
    (None before the first site). `cls_index` says where the K class tokens are: a tuple of 0, 1 or 2 indices shared by
    the batch, or a long tensor (B, K) once images differ, rising in either case. `grid` is (rows, cols) while the patch
    tokens still fill it. `token_mask` (B, L) is 1 for tokens that take part and 0 for tokens kept only to keep the
    length (training with pruning). `positions` (B, M) holds the original raster index of every patch token. `groups`
    (B, M0), kept only on request, maps each original patch to the patch token it now lives in. `decisions` and
    `block_policy` collect what pruning chose, stage by stage and layer by layer; `observed` (B, L, C), kept only where
    pruning looks at it, is what the last mixer's scans were told. `rest`, kept only on request, is what the patches
    without a live token were left at, so that maps (`whole`) still have a value for them.
    """

    hidden: Tensor
    residual: Tensor | None = None
    cls_index: tuple[int, ...] | Tensor = ()
    grid: tuple[int, int] | None = None
    token_mask: Tensor | None = None
    positions: Tensor | None = None
    groups: Tensor | None = None
    decisions: tuple[Tensor, ...] = ()
    block_policy: tuple[Tensor, ...] = ()
    observed: Tensor | None = None
    rest: Rest | None = None

    def replace(self, **changes: Any) -> TokenState:
        """A copy with the named fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def num_tokens(self) -> int:
        """Length L of the sequence, class tokens included."""
        return self.hidden.shape[1]

    @property
    def num_cls(self) -> int:
        """How many class tokens the sequence holds: 0, 1 or 2."""
        return self.cls_index.shape[1] if isinstance(self.cls_index, Tensor) else len(self.cls_index)


def split_cls(x: Tensor, cls_index: tuple[int, ...] | Tensor) -> tuple[Tensor, Tensor]:
    """Part class tokens from patch tokens: x (B, L, C) -> class tokens (B, K, C), patch tokens (B, L - K, C), in
    order."""
    if isinstance(cls_index, Tensor):
        order = _patches_first(cls_index, x.shape[1])
        x = x.gather(1, order.unsqueeze(-1).expand_as(x))
        patches, classes = x.tensor_split([x.shape[1] - cls_index.shape[1]], 1)
        return classes, patches
    if not cls_index:
        return x[:, :0], x
    first, last = cls_index[0], cls_index[-1]
    parts = [x[:, :first], x[:, first + 1 : last], x[:, last + 1 :]]
    parts = [part for part in parts if part.shape[1]]
    classes = (
        x[:, first : first + 1] if first == last else torch.cat([x[:, first : first + 1], x[:, last : last + 1]], 1)
    )
    return classes, parts[0] if len(parts) == 1 else torch.cat(parts, 1) if parts else x[:, :0]


def join_cls(classes: Tensor, patches: Tensor, cls_index: tuple[int, ...] | Tensor) -> Tensor:
    """Put class tokens (B, K, C) among patch tokens (B, M, C) so that they stand at `cls_index`; inverse of
    `split_cls`."""
    if isinstance(cls_index, Tensor):
        x = torch.cat([patches, classes], 1)
        order = _patches_first(cls_index, x.shape[1])
        slots = torch.arange(x.shape[1], device=x.device).expand_as(order)
        source = torch.empty_like(order).scatter_(1, order, slots)
        return x.gather(1, source.unsqueeze(-1).expand_as(x))
    if not cls_index:
        return patches
    first = cls_index[0]
    pieces = [patches[:, :first], classes[:, :1]]
    if len(cls_index) == 1:
        pieces.append(patches[:, first:])
    else:
        last = cls_index[1]
        pieces += [patches[:, first : last - 1], classes[:, 1:], patches[:, last - 1 :]]
    return torch.cat(pieces, 1)


def whole(state: TokenState) -> tuple[Tensor, Tensor | None]:
    """hidden and residual of all M original patches in raster order, (B, M, D) each: a merged patch has its group's
    token (if `state` keeps `groups`), a dropped one its last value (if it keeps `rest`), else zero."""
    hidden, residual = (
        None if x is None else _spread(split_cls(x, state.cls_index)[1], state) for x in (state.hidden, state.residual)
    )
    if state.rest is None:
        return hidden, residual
    return hidden + state.rest.hidden, None if residual is None else residual + state.rest.residual


def _spread(patches: Tensor, state: TokenState) -> Tensor:
    """Patch tokens (B, m, C) of `state` -> their places among all M patches (B, M, C); zero where none is."""
    if state.groups is not None:
        patches = patches.gather(1, state.groups.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
    if state.positions is None:
        return patches
    num_patches = patches.shape[1] if state.rest is None else state.rest.hidden.shape[1]
    index = state.positions.unsqueeze(-1).expand_as(patches)
    return patches.new_zeros(len(patches), num_patches, patches.shape[-1]).scatter(1, index, patches)


def patch_policy(state: TokenState) -> Tensor:
    """1 for every patch token still kept, else 0: (B, n)."""
    if state.token_mask is None:
        return state.hidden.new_ones(state.hidden.shape[0], state.num_tokens - state.num_cls, dtype=torch.float32)
    return split_cls(state.token_mask.unsqueeze(-1), state.cls_index)[1].squeeze(-1)


def mean_over_kept(x: Tensor, policy: Tensor | None) -> Tensor:
    """Mean over the tokens whose `policy` (B, n) is 1, or over all: x (B, n, C) -> (B, C); zeros where none is kept."""
    if policy is None:
        return x.sum(1) / max(x.shape[1], 1)
    policy = policy.unsqueeze(-1).to(x.dtype)
    return (x * policy).sum(1) / policy.sum(1).clamp(min=1)


def _patches_first(cls_index: Tensor, length: int) -> Tensor:
    """The order (B, length) of a sequence that puts its patch tokens first and its class tokens (B, K) last."""
    batch, num_cls = cls_index.shape
    patches = torch.arange(length - num_cls, device=cls_index.device).expand(batch, -1)
    for at in cls_index.split(1, 1):
        patches = patches + (patches >= at)
    return torch.cat([patches, cls_index], 1)


class SiteMethod:
    """A method that acts at the sites of a model; the identity unless a subclass says otherwise.

    `attach(model)` runs once, when the model is built, and adds whatever parameters the method owns. The call wraps a
    site: `run(state, **mixer_args)` runs site `index`, handing `mixer_args` to its mixers, so that a method may change
    the sequence before it, what its mixers see, and the sequence after it.
    """

    def attach(self, model: nn.Module) -> None:
        """Add the method's parameters to `model`; none by default."""

    def __call__(self, index: int, state: TokenState, run: Callable[..., TokenState]) -> TokenState:
        return run(state)
