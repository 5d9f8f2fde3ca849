"""What a mixer does: here, and nowhere above, kernels are chosen.

Where a kernel set makes one operator of it all, or of what is between the outer projections, that is taken, unless
something wants to see or change what is in between; else it is put together from the projections, the convolution and
the scan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from causal_conv1d.kernels.registry import backends as conv_backends
from mamba_ssm.kernels.arguments import Direction, Ends, Lines, MixerSizes, Projections, Taps, VisibleLines
from mamba_ssm.kernels.registry import backends
from mamba_ssm.ops.bidirectional import bidirectional_scan_fn
from mamba_ssm.ops.directions import directions_fn, has_masked
from mamba_ssm.ops.pooled import has_scan_gradients, pooled_conv_fn, pooled_gate_fn, pooled_scan_fn
from mamba_ssm.ops.scan import selective_scan_fn
from mamba_ssm.ops.visible import visible_conv_fn, visible_gate_fn
from mamba_ssm.ops.whole import WholeMixer, WholePooledMixer, alike, has_whole
from torch import Tensor, nn

# called with (delta (B, L, d_inner) after softplus, B (B, L, d_state))
ScanObserver = Callable[..., None]


class Outside(Protocol):
    """A mixer's outer projections."""

    in_proj: Callable[[Tensor], Tensor]  # (B, L, d_model) -> (B, L, 2 * d_inner), x first, z second
    out_proj: Callable[[Tensor], Tensor]  # (B, L, d_inner) -> (B, L, d_model)

    @property
    def plain(self) -> bool:
        """Whether what follows from their parameters is all that they do."""

    def ends(self) -> Ends:
        """Their parameters."""


class Branch(Protocol):
    """One scan direction of a mixer."""

    reverse: bool  # of the scan
    plain: bool  # whether what follows from its parameters is all that its modules do

    @property
    def A(self) -> Tensor:
        """(d_inner, d_state), float32, or float64 in a model of that."""

    @property
    def D(self) -> Tensor:
        """(d_inner,), in the dtype of `A`."""

    def convolve(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """The causal convolution and silu of x (B, L, d_inner), tokens zeroed by token_mask (B, L) before and after."""

    def project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """u (B, L, d_inner) -> delta (B, L, d_inner), B and C (B, L, d_state), and delta's bias (d_inner,), or None
        where delta has it."""

    def direction(self) -> Direction:
        """Its parameters, as `directions_fn` takes them with `log_decay`."""

    def taps(self) -> Taps:
        """Its parameters, as `pooled_conv_fn` takes them."""

    def projections(self) -> Projections:
        """Its parameters, as `pooled_scan_fn` takes them."""


class TokenPooling(Protocol):
    """A map from tokens to scan groups and back, handed to the mixer; every tensor is channel-last.

    `lines` says so where the groups are pooled lines of a grid, full or in part, for which there are kernels; the
    methods do for any map what the kernels do for those. `backward` is the map of the second branch, where that is
    another one.
    """

    lines: Lines | VisibleLines | None
    backward: TokenPooling | None

    def order(self, x: Tensor) -> Tensor:
        """(B, L, C) tokens in the order the convolution and the groups run in."""

    def restore(self, x: Tensor) -> Tensor:
        """Inverse of `order`."""

    def reduce(self, x: Tensor) -> Tensor:
        """(B, L, C) ordered tokens -> (B, G, C) groups."""

    def expand_add(self, x: Tensor, groups: Tensor) -> Tensor:
        """(B, L, C) ordered tokens, each plus its group's value out of (B, G, C)."""


def whole_mixer(
    x: Tensor,
    branches: Sequence[Branch],
    outside: Outside,
    share: float = 1.0,
    *,
    shared: bool = False,
    norm: nn.LayerNorm | None = None,
    pooling: TokenPooling | None = None,
    token_mask: Tensor | None = None,
    gates: Tensor | None = None,
) -> WholeMixer | WholePooledMixer | None:
    """The one operator that does what `mix`, or with `pooling` `mix_pooled`, does for x (B, L, d_model); None where it
    takes several, as where a module has to be called."""
    if shared or not outside.plain or not all(branch.plain for branch in branches):
        return None
    if pooling is None:
        if norm is not None or not has_whole(x, "mixer"):
            return None
        directions = [branch.direction() for branch in branches]
        factors = (None if each is None else each.to(x.dtype) for each in (token_mask, gates))
        return WholeMixer(outside.ends(), directions, share, *factors) if alike(directions) else None
    if token_mask is not None:
        return None
    # while a graph is exported there are no kernels, and its sizes are not to be looked at
    if len(branches) != 2 or not has_whole(x, "pooled_mixer") or not isinstance(pooling.lines, Lines):
        return None
    taps, projections = ([getattr(branch, name)() for branch in branches] for name in ("taps", "projections"))
    if not alike(taps) or not alike(projections):
        return None
    given = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    return WholePooledMixer(outside.ends(), taps, projections, given, pooling.lines, share)


def mix(
    hidden_states: Tensor,
    branches: Sequence[Branch],
    outside: Outside,
    share: float = 1.0,
    *,
    shared: bool = False,
    norm: nn.LayerNorm | None = None,
    token_mask: Tensor | None = None,
    gates: Tensor | None = None,
    observe: ScanObserver | None = None,
) -> Tensor:
    """A whole mixer: `share` times the sum of the branches' scans, gated by silu(z), between the projections `outside`.

    Args:
        hidden_states: (B, L, d_model).
        branches: one or two, of which the second is reversed.
        outside: the outer projections.
        share: what the sum is multiplied with.
        shared: all branches run on what the first one's convolution and projections give.
        norm: stands before the gate.
        token_mask: (B, L), 1 or 0; zeroes tokens before and after the convolution.
        gates: (B, branches); one factor per image and branch.
        observe: shown the step sizes and B of each branch, in turn.

    Returns:
        (B, L, d_model).
    """
    bare = token_mask is None and gates is None
    if observe is None:
        factors = {"token_mask": token_mask, "gates": gates}
        found = whole_mixer(hidden_states, branches, outside, share, shared=shared, norm=norm, **factors)
        if found is not None:
            return found(hidden_states)
    whole = norm is None and not shared and observe is None and all(branch.plain for branch in branches)
    xz = outside.in_proj(hidden_states)
    if whole and (_has_between(xz) if bare else backends.has(xz, "can_mask")):
        directions = [branch.direction() for branch in branches]
        if bare or has_masked(xz, directions):
            return outside.out_proj(_between(xz, directions, share, token_mask, gates))
    x, z = xz.chunk(2, dim=-1)
    backends.foretell(xz, "foretell_mixer", lambda: (_sizes(x, branches, x.shape[1]), token_mask is not None))
    convolve, inputs, scans = _convolving(x, token_mask), None, []
    for branch in branches:
        if inputs is None or not shared:
            u = convolve(branch)
            inputs = u, *branch.project(u)
        u, delta, B, C, bias = inputs
        if observe is not None:
            observe(F.softplus(delta if bias is None else delta + bias), B)
        # C and D are the least of what the share can be multiplied into
        C, D = (C, branch.D) if share == 1 else (C * share, branch.D * share)
        scans.append(_scan(branch, u, delta, B, C, bias, D, z if norm is None else None))
    y = None
    for number, part in enumerate(_run(branches, scans)):
        if gates is not None:
            part = part * gates[:, number].view(-1, 1, 1).to(part.dtype)
        y = part if y is None else y + part
    # without a norm the scan applies the gate itself
    return outside.out_proj(y if norm is None else norm(y) * F.silu(z))


def _between(
    xz: Tensor, directions: Sequence[Direction], share: float, token_mask: Tensor | None, gates: Tensor | None
) -> Tensor:
    """What stands between the projections; each direction by itself where it has a gate."""
    if gates is None:
        return directions_fn(xz, directions, share, log_decay=True, mask=token_mask)
    parts = (directions_fn(xz, [each], share, log_decay=True, mask=token_mask) for each in directions)
    factors = gates.to(xz.dtype)[..., None, None].unbind(1)
    return sum(part * factor for part, factor in zip(parts, factors))


def _has_between(xz: Tensor) -> bool:
    return backends.has(xz, "directions_forward") or backends.has(xz, "stacked_forward")


def mix_pooled(
    hidden_states: Tensor,
    branches: Sequence[Branch],
    pooling: TokenPooling,
    outside: Outside,
    share: float = 1.0,
    *,
    shared: bool = False,
    norm: nn.LayerNorm | None = None,
    token_mask: Tensor | None = None,
) -> Tensor:
    """A whole mixer whose scans run over groups of tokens, hidden_states (B, L, d_model) -> (B, L, d_model).

    D * u needs no scan, so it stays with the tokens; the scans meet it once, as the sum of both over the groups. `norm`
    stands before the gate silu(z). Tokens are put in order where they are narrow, outside the projections.
    """
    options = {"shared": shared, "norm": norm, "pooling": pooling, "token_mask": token_mask}
    found = whole_mixer(hidden_states, branches, outside, share, **options)
    if found is not None:
        return found(hidden_states)
    pair = len(branches) == 2 and not shared and all(branch.plain for branch in branches)
    # while a graph is exported there are no kernels, and its sizes are not to be looked at
    may_have = pair and token_mask is None and backends.has(hidden_states, Lines.kernel)
    lines = pooling.lines if may_have else None
    if lines is not None and backends.has(hidden_states, lines.kernel):
        given = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
        conv_fn, gate_fn = (
            (pooled_conv_fn, pooled_gate_fn) if isinstance(lines, Lines) else (visible_conv_fn, visible_gate_fn)
        )
        x, z = outside.in_proj(hidden_states).chunk(2, dim=-1)
        norm_dtype = None if norm is None else norm.weight.dtype
        backends.foretell(x, "foretell_pooled", lambda: (_sizes(x, branches, lines.count, with_D=False), norm_dtype))
        skip, *groups = conv_fn(x, *(branch.taps() for branch in branches), lines)
        scanned = _scan_groups(branches, groups, pair)
        return outside.out_proj(gate_fn(skip, scanned, z, *given, lines, share))
    x, z = outside.in_proj(pooling.order(hidden_states)).chunk(2, dim=-1)
    # of so few groups the number does not matter
    backends.foretell(x, "foretell_mixer", lambda: (_sizes(x, branches, 1, with_D=False), token_mask is not None))
    if isinstance(lines, VisibleLines):
        backends.foretell(x, "foretell_sums", lambda: (x.dtype,))
    convolve, u, skip, groups = _convolving(x, token_mask), None, None, []
    maps = pooling, pooling.backward or pooling
    for branch, own in zip(branches, maps):
        u = convolve(branch) if u is None or not shared else u
        D = (branch.D if share == 1 else branch.D * share).to(u.dtype)
        skip = u * D if skip is None else torch.addcmul(skip, u, D)
        groups.append(own.reduce(u))
    if pooling.backward is None:
        scanned = _scan_groups(branches, groups, pair)
        y = pooling.expand_add(skip, scanned if share == 1 else scanned * share)
    else:
        y = skip
        for branch, own, group in zip(branches, maps, groups):
            y = own.expand_add(y, _scan_groups([branch], [group], pair=False) * share)
    y = y if norm is None else norm(y)
    return pooling.restore(outside.out_proj(y * F.silu(z)))


def _sizes(x: Tensor, branches: Sequence[Branch], length: int, with_D: bool = True) -> MixerSizes:
    """What the kernels of a mixer depend on that convolves x (B, L, d_inner) and scans over `length` tokens or groups,
    `with_D` or without."""
    weight, bias, D = branches[0].taps()
    sizes = len(x), length, x.shape[2], branches[0].projections().A_log.shape[1]
    taps = weight.dtype, None if bias is None else bias.dtype, D.dtype
    pair = [branch.reverse for branch in branches] == [False, True]
    trains = torch.is_grad_enabled() and x.requires_grad
    return MixerSizes(x.dtype, *sizes, taps, weight.shape[1], 1 + pair, with_D, trains)


def _convolving(x: Tensor, token_mask: Tensor | None) -> Callable[[Branch], Tensor]:
    """The branches' convolutions of x (B, L, C), whose tokens are zero before and after where token_mask (B, L) is:
    within them where there are kernels for that, else x is masked once for all."""
    if token_mask is None or conv_backends.has(x, "conv_forward_masked"):
        return lambda branch: branch.convolve(x, token_mask)
    factor = token_mask.unsqueeze(-1).to(x.dtype)
    masked = x * factor
    return lambda branch: branch.convolve(masked) * factor


def _scan(
    branch: Branch,
    u: Tensor,
    delta: Tensor,
    B: Tensor,
    C: Tensor,
    bias: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The tensors that the scan takes, out of channel-last ones."""
    u, delta, B, C = (x.transpose(1, 2) for x in (u, delta, B, C))
    return u, delta, branch.A, B, C, D, None if z is None else z.transpose(1, 2), bias


def _run(branches: Sequence[Branch], scans: Sequence[tuple[Tensor | None, ...]]) -> list[Tensor]:
    """The branches' scans, channel-last; two are one operator where there are kernels for both at once."""
    if [branch.reverse for branch in branches] == [False, True]:
        parts = bidirectional_scan_fn(*scans, delta_softplus=True)
    else:
        parts = [
            selective_scan_fn(*scan, delta_softplus=True, reverse=branch.reverse)
            for branch, scan in zip(branches, scans)
        ]
    return [part.transpose(1, 2) for part in parts]


def _scan_groups(branches: Sequence[Branch], groups: Sequence[Tensor], pair: bool) -> Tensor:
    """The sum of the branches' scans, each over its own groups (B, G, d_inner), without D and z."""
    trains = torch.is_grad_enabled()
    if pair and (has_scan_gradients(groups[0]) if trains else backends.has(groups[0], "pooled_scan")):
        return pooled_scan_fn(*groups, *(branch.projections() for branch in branches))
    scans = [_scan(branch, u, *branch.project(u), None, None) for branch, u in zip(branches, groups)]
    parts = _run(branches, scans)
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]
