"""Token merging in two operators: which tokens become one, and their means.

Bolya et al. 2023 (arXiv:2210.09461), section 3; Shen et al. 2024 (arXiv:2409.09808). Both can be written in torch, in
some fifty operations on small tensors, which cost more than their work. Where no kernel set has them (`has_kernels`),
the references run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from causal_conv1d._nvrtc import KernelError
from causal_conv1d.backend import KERNEL_DTYPES, tell
from causal_conv1d.checks import check_device, check_dtype, check_ndim, check_shape, check_tensor
from causal_conv1d.derivatives import wants_reference
from mamba_ssm.kernels.registry import backends
from mamba_ssm.ops.operators import OPERATORS
from torch import Tensor

_DTYPES = (*KERNEL_DTYPES, torch.float64)
_INDICES = (torch.long,)


def has_kernels(x: Tensor) -> bool:
    """Whether there are kernels for `x`."""
    return backends.has(x, "match_tokens")


def foretell(x: Tensor, weighted: bool) -> None:
    """Say before a model's first layer, x (batch, tokens, channels), that tokens are going to be merged, `weighted` or
    plainly: what is compiled at first use is compiled while those layers run."""

    def coming() -> tuple[torch.dtype, bool, bool]:
        kind, wants_gradient = x.device.type, torch.is_grad_enabled()
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return dtype, weighted, wants_gradient

    backends.foretell(x, "foretell_merging", coming)


def match_tokens_fn(
    metric: Tensor,
    fused: int,
    cls: Tensor,
    moved: Sequence[int],
    *,
    odd_first: bool = False,
    raster: bool = False,
    sort: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose `fused` pairs of similar tokens, class tokens apart. Not differentiable.

    Set a is the patch tokens at even places among patch tokens (odd ones with `odd_first`), set b the others. Each
    a-token picks its most similar b-token by cosine; the a-tokens with the highest similarity are fused into theirs,
    ties going to the lower index. The order of what is left is `raster`, or else a before b, a in the order of its
    indices (`sort`) or the most similar first.

    Args:
        metric: (batch, tokens, channels), float32, bfloat16, float16 or float64.
        fused: 1 to half of the patch tokens, rounded down.
        cls: (batch or 1, K), long, rising: where class tokens are.
        moved: K rising indices that class tokens go to, in the shorter sequence; -1 for all of them leaves each between
            the same patch tokens.

    Returns:
        slot (batch, tokens), long: where each token goes; kept (batch, tokens), bool: False for fused ones; count
        (batch, tokens - fused), long: the size of each group; places (batch, K), long: where class tokens went.

    Raises:
        ValueError: a shape, number or device that does not fit. TypeError: not a tensor, or another dtype.
        IndexError: `cls` holds other than rising indices (where no GPU does the work: it tells nobody).
    """
    check_tensor("metric", metric)
    check_ndim("metric", metric, "(batch, tokens, channels)")
    check_dtype("metric", metric, _DTYPES)
    check_tensor("cls", cls)
    check_ndim("cls", cls, "(batch or 1, K)")
    check_dtype("cls", cls, _INDICES)
    check_device("cls", cls, metric, "metric")
    if len(moved) != cls.shape[1] or len(cls) not in (1, len(metric)):
        raise ValueError(
            f"cls is {tuple(cls.shape)} of {cls.dtype} and moved has {len(moved)} indices; wanted"
            f" ({len(metric)} or 1, K) of torch.int64 and K"
        )
    _check_numbers(metric, fused, moved)
    return torch.ops.mamba_ssm.match_tokens(metric.detach(), fused, cls, list(moved), odd_first, raster, sort)


def _check_numbers(metric: Tensor, fused: int, moved: Sequence[int]) -> None:
    if not all(isinstance(number, (int, torch.SymInt)) for number in (fused, *moved)):
        raise TypeError(f"fused is {fused!r} and moved is {list(moved)}; wanted whole numbers")
    patches = metric.shape[1] - len(moved)
    if not 1 <= fused <= patches // 2:
        raise ValueError(f"fused is {fused}; wanted 1 to {patches // 2}, half of the patch tokens")
    length, stay = metric.shape[1] - fused, all(place == -1 for place in moved)
    if not stay and not _rise(moved, length):
        raise ValueError(f"moved is {list(moved)}; wanted rising indices from 0 to {length - 1}, or one -1 for each")


def _rise(index: Sequence[int], length: int) -> bool:
    """Whether these are rising indices of a sequence."""
    return list(index) == sorted({*index}) and not (index and not 0 <= index[0] <= index[-1] < length)


def merge_tokens_fn(x: Tensor, slot: Tensor, count: Tensor) -> Tensor:
    """The mean of each group of tokens, summed in float32; one that is alone keeps its value.

    Args:
        x: (batch, tokens, channels), float32, bfloat16, float16 or float64.
        slot: (batch, tokens), long: the group of each token.
        count: (batch, groups), long: the size of each, at least 1.

    Returns:
        (batch, groups, channels) in the dtype of `x`.

    Raises:
        ValueError: a shape or device that does not fit. TypeError: not a tensor, or another dtype. IndexError: a slot
        that is no group, or a group without a size.
    """
    check_tensor("x", x)
    check_ndim("x", x, "(batch, tokens, channels)")
    check_dtype("x", x, _DTYPES)
    for name, tensor in (("slot", slot), ("count", count)):
        check_tensor(name, tensor)
        check_dtype(name, tensor, _INDICES)
        check_device(name, tensor, x, "x")
    check_shape("slot", slot, x.shape[:2], "(batch, tokens)")
    check_ndim("count", count, "(batch, groups)")
    check_shape("count", count, (len(x), count.shape[1]), "(batch, groups)")
    if wants_reference(x):
        return merge_tokens_ref(x, slot, count)
    return torch.ops.mamba_ssm.merge_tokens(x, slot, count)


class Merging(NamedTuple):
    """The same merging for all images, of a sequence and, by the same pairs, of its residual: what `match_tokens_fn` is
    told beside the tokens, class tokens standing at `cls`, rising, and going to `moved`, which has no -1."""

    fused: int
    cls: tuple[int, ...]
    moved: tuple[int, ...]
    odd_first: bool = False
    raster: bool = False
    sort: bool = True

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x, residual (batch, tokens, channels) -> (batch, tokens - fused, channels); x says which are similar."""
        self.check(x)
        fused, cls, moved, odd_first, raster, sort = self.given(x.device)
        slot, _, count, _ = match_tokens_fn(x, fused, cls, moved, odd_first=odd_first, raster=raster, sort=sort)
        return merge_tokens_fn(x, slot, count), None if residual is None else merge_tokens_fn(residual, slot, count)

    def given(self, device: torch.device) -> tuple[int, Tensor, tuple[int, ...], bool, bool, bool]:
        """What `match_tokens` is given beside the tokens, which are there."""
        return self.fused, index_tensor(self.cls, device), *self[2:]

    def check(self, x: Tensor) -> None:
        """Raise ValueError or TypeError unless all of this fits x."""
        _check_numbers(x, self.fused, self.moved)
        for name, index, length in (("cls", self.cls, x.shape[1]), ("moved", self.moved, x.shape[1] - self.fused)):
            if len(index) != len(self.moved) or not _rise(index, length):
                raise ValueError(
                    f"{name} is {list(index)}; wanted {len(self.moved)} rising indices from 0 to {length - 1}"
                )


def index_tensor(index: Sequence[int], device: torch.device) -> Tensor:
    """Rising indices as a tensor (1, K), made on the device: a copy from the host would wait for all that it does."""
    runs: list[range] = []
    for at in index:
        last = runs[-1] if runs else range(0)
        step = at - last[-1] if last else 1
        if last and (len(last) == 1 or step == last.step):
            runs[-1] = range(last.start, at + 1, step)
        else:
            runs.append(range(at, at + 1))
    parts = [torch.arange(run.start, run.stop, run.step, device=device) for run in runs]
    return (torch.cat(parts) if parts else torch.empty(0, dtype=torch.long, device=device)).unsqueeze(0)


def sum_tokens(x: Tensor, slot: Tensor, groups: int) -> Tensor:
    """The sum of each group of tokens, added up in one order: x (batch, tokens, channels), slot (batch, tokens), long
    -> (batch, groups, channels), zero for a group without tokens."""
    if has_kernels(x):
        return torch.ops.mamba_ssm.merge_tokens(x, slot, slot.new_ones(len(x), groups))
    if x.is_cuda:
        return _sums_in_order(x, slot, groups)
    batch, _, channels = x.shape
    # rows of a matrix instead of a batch of sequences: torch adds whole rows much faster
    rows = (slot + groups * torch.arange(batch, device=x.device).unsqueeze(1)).reshape(-1, 1).expand(-1, channels)
    total = x.new_zeros(batch * groups, channels).scatter_add(0, rows, x.reshape(-1, channels))
    return total.view(batch, groups, channels)


def _sums_in_order(x: Tensor, slot: Tensor, groups: int) -> Tensor:
    """The same, where `scatter_add` adds as threads come along."""
    order = slot.argsort(dim=1, stable=True).unsqueeze(-1).expand_as(x)
    count = slot.new_zeros(len(x), groups).scatter_add_(1, slot, torch.ones_like(slot))
    rows = x.gather(1, order).view(-1, x.shape[2])
    # unsafe: lengths are not read back by the host to be checked
    total = torch.segment_reduce(rows, "sum", lengths=count.view(-1), axis=0, unsafe=True)
    return total.view(len(x), groups, x.shape[2])


def spread_tokens(y: Tensor, slot: Tensor) -> Tensor:
    """What each token's group has, y (batch, groups, channels), slot (batch, tokens), long -> (batch, tokens,
    channels). With kernels, the gradient is added up in one order."""
    if has_kernels(y):
        return torch.ops.mamba_ssm.merge_tokens_backward(y, slot, slot.new_ones(y.shape[:2]))
    return y.gather(1, slot.unsqueeze(-1).expand(-1, -1, y.shape[2]))


# --- references ------------------------------------------------------------------------------------------------------


def match_tokens_ref(
    metric: Tensor, fused: int, cls: Tensor, moved: Sequence[int], odd_first: bool, raster: bool, sort: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `match_tokens_fn` computes, one image and one token at a time."""
    results = []
    for image, tokens in enumerate(metric):
        own = cls[image % len(cls)].tolist()
        if own != sorted({*own}) or any(not 0 <= index < len(tokens) for index in own):
            raise IndexError(f"cls holds other than rising indices; wanted such from 0 to {len(tokens) - 1}")
        patches = [index for index in range(len(tokens)) if index not in own]
        a_tokens, b_tokens = patches[odd_first::2], patches[1 - odd_first :: 2]
        unit = torch.nn.functional.normalize(tokens.to(torch.promote_types(tokens.dtype, torch.float32)), dim=-1)
        best, partner = (unit[a_tokens] @ unit[b_tokens].t()).max(-1)
        ranking = [a_tokens[index] for index in best.argsort(descending=True, stable=True).tolist()]
        into = {a: b_tokens[b] for a, b in zip(a_tokens, partner.tolist()) if a in ranking[:fused]}
        left = ranking[fused:] if not sort else [a for a in a_tokens if a not in into]
        order = [index for index in patches if index not in into] if raster else left + b_tokens
        places = list(moved)
        if moved and moved[0] < 0:
            places = [sum(token < index for token in order) + number for number, index in enumerate(own)]
        for index, place in zip(own, places):
            order.insert(place, index)
        slot = [order.index(into.get(index, index)) for index in range(len(tokens))]
        count = [slot.count(place) for place in range(len(order))]
        results.append((slot, [index not in into for index in range(len(tokens))], count, places))
    shapes = metric.shape[:2], metric.shape[:2], (len(metric), metric.shape[1] - fused), (len(metric), cls.shape[1])
    dtypes = torch.long, torch.bool, torch.long, torch.long
    columns = zip(*results) if results else ([],) * 4
    return tuple(
        torch.tensor(list(column), dtype=dtype, device=metric.device).reshape(shape)
        for column, dtype, shape in zip(columns, dtypes, shapes)
    )


def merge_tokens_ref(x: Tensor, slot: Tensor, count: Tensor) -> Tensor:
    """What `merge_tokens_fn` computes."""
    groups = count.shape[1]
    readable = not torch._C._are_functorch_transforms_active() and x.device.type != "meta"
    within = not (readable and slot.numel()) or 0 <= int(slot.min()) <= int(slot.max()) < groups
    if not within or (readable and bool((count < 1).any())):
        raise IndexError(f"slot holds no place of the merged sequence, or count no size; wanted 0 to {groups - 1}")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    member = (slot.unsqueeze(1) == torch.arange(groups, device=x.device).unsqueeze(1)).to(wide.dtype)
    return (member @ wide / count.unsqueeze(-1)).to(x.dtype)


# --- registration ----------------------------------------------------------------------------------------------------


def _match(metric, *given):
    return _by_kernels("match_tokens", match_tokens_ref, metric, *given)


def _merge(x, slot, count):
    return _by_kernels("merge_tokens", merge_tokens_ref, x, slot, count)


def _merge_backward(dout, slot, count):
    return _by_kernels("merge_tokens_backward", _merge_backward_reference, dout, slot, count)


def _by_kernels(name, reference, x, *given):
    kernels = backends.pick(x)
    if hasattr(kernels, name):
        try:
            return getattr(kernels, name)(x, *given)
        except KernelError as error:
            tell("CUDA", error)
    return reference(x, *given)


def _merge_backward_reference(dout, slot, count):
    dmean = (dout.to(torch.promote_types(dout.dtype, torch.float32)) / count.unsqueeze(-1)).to(dout.dtype)
    return dmean.gather(1, slot.unsqueeze(-1).expand(-1, -1, dout.shape[2]))


def _fake_match(metric, fused, cls, moved, odd_first, raster, sort):
    batch, tokens, _ = metric.shape
    slot, count = cls.new_empty(batch, tokens), cls.new_empty(batch, tokens - fused)
    return slot, cls.new_empty(batch, tokens, dtype=torch.bool), count, cls.new_empty(batch, cls.shape[1])


def _fake_merge(x, slot, count):
    return x.new_empty(x.shape[0], count.shape[1], x.shape[2])


def _fake_merge_backward(dout, slot, count):
    return dout.new_empty(*slot.shape, dout.shape[2])


def _save_merge(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _differentiate_merge(ctx, dout: Tensor) -> tuple:
    return torch.ops.mamba_ssm.merge_tokens_backward(dout, *ctx.saved_tensors), None, None


def _differentiate_merge_backward(ctx, ddx: Tensor) -> tuple:
    return torch.ops.mamba_ssm.merge_tokens(ddx, *ctx.saved_tensors), None, None


OPERATORS.register(
    "match_tokens(Tensor metric, int fused, Tensor cls, int[] moved, bool odd_first, bool raster, bool sort)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _match,
    _fake_match,
)
OPERATORS.register(
    "merge_tokens(Tensor x, Tensor slot, Tensor count) -> Tensor",
    _merge,
    _fake_merge,
    save=_save_merge,
    differentiate=_differentiate_merge,
)
OPERATORS.register(
    "merge_tokens_backward(Tensor dout, Tensor slot, Tensor count) -> Tensor",
    _merge_backward,
    _fake_merge_backward,
    save=_save_merge,
    differentiate=_differentiate_merge_backward,
)
