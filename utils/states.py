"""What is read from a file, compared with what this run has made itself: by key, type and shape."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def check_like(found: Any, own: Any, name: str) -> None:
    """Raise ValueError, which names the entry, unless `found` is built as `own` is.

    Dictionaries may have more keys, and a whole number may stand for one with a fraction, or for a tensor of one.
    Where `own` is None it is not known what would be there: nothing, or a number.
    """
    if isinstance(own, Tensor):
        if own.dim() == 0 and _is_number(found):
            return
        _expect(isinstance(found, Tensor), found, f"a tensor of {tuple(own.shape)}", name)
        kinds = [each.is_floating_point() for each in (found, own)]
        _expect(found.shape == own.shape and kinds[0] == kinds[1], found, f"one of {tuple(own.shape)}", name)
    elif isinstance(own, dict):
        _expect(isinstance(found, dict), found, "a dictionary", name)
        for key, value in own.items():
            if key not in found:
                raise ValueError(f"{name} lacks {key}")
            check_like(found[key], value, f"{name}.{key}")
    elif isinstance(own, (list, tuple)):
        _expect(isinstance(found, (list, tuple)), found, "a list", name)
        if len(found) != len(own):
            raise ValueError(f"{name} has {len(found)} entries, wanted {len(own)}")
        for number, (value, wanted) in enumerate(zip(found, own)):
            check_like(value, wanted, f"{name}.{number}")
    elif own is None:
        _expect(found is None or _is_number(found), found, "a number", name)
    elif isinstance(own, float):
        _expect(_is_number(found), found, "a number", name)
    elif isinstance(own, int) and not isinstance(own, bool):
        _expect(_is_number(found) and isinstance(found, int), found, "a whole number", name)
    else:
        _expect(isinstance(found, type(own)), found, f"a {type(own).__name__}", name)


def check_optimizer_state(found: Any, optimizer: Optimizer, name: str = "optimizer") -> None:
    """Raise ValueError unless the state dictionary `found` is one that `optimizer` could have written after a step.

    What a step leaves is asked of a twin on tensors without memory; an optimiser that cannot step so is compared by its
    groups alone. Parameters that had no gradient may be missing.
    """
    _expect(isinstance(found, dict), found, "a dictionary", name)
    groups = [{"params": [0] * len(group["params"])} for group in optimizer.param_groups]
    check_like(found, {"state": {}, "param_groups": groups}, name)
    twin = _stepped_twin(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, entry in found["state"].items():
        _expect(isinstance(entry, dict), entry, "a dictionary", f"{name}.state.{key}")
        if not isinstance(key, int) or not 0 <= key < len(parameters):
            raise ValueError(f"{name}.state has an entry {key!r}, wanted numbers of {len(parameters)} parameters")
        if twin is not None and entry:
            check_like(entry, twin[0][key], f"{name}.state.{key}")
            _check_count(entry.get("step", 0), f"{name}.state.{key}.step")
    if twin is not None:
        for number, (group, made) in enumerate(zip(found["param_groups"], twin[1])):
            check_like({key: group.get(key, made[key]) for key in made}, made, f"{name}.param_groups.{number}")
            _check_count(group.get("step", 0), f"{name}.param_groups.{number}.step")


def _stepped_twin(optimizer: Optimizer) -> tuple[list[dict[str, Any]], list[dict[str, Any]]] | None:
    """What a step of `optimizer` leaves: each parameter's entry, and what is new in each group."""
    twin = copy.copy(optimizer)
    twin.state, twin.param_groups = defaultdict(dict), []
    for group in optimizer.param_groups:
        kept = [torch.empty(each.shape, dtype=each.dtype, device="meta") for each in group["params"]]
        parameters = [torch.nn.Parameter(each) for each in kept]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        # what is fused cannot step without memory, and leaves what the others leave
        fused = {"fused": False} if group.get("fused") else {}
        twin.param_groups.append(group | fused | {"params": parameters})
    try:
        twin.step()
    except Exception:  # it looks at values, or is no optimiser that a copy can stand for
        return None
    entries = [dict(twin.state[parameter]) for group in twin.param_groups for parameter in group["params"]]
    pairs = zip(twin.param_groups, optimizer.param_groups)
    return entries, [{key: value for key, value in group.items() if key not in own} for group, own in pairs]


def _check_count(value: Any, name: str) -> None:
    """Steps that were taken, which optimisers divide by powers of; a tensor has as many elements as was checked."""
    numbers = value.flatten().tolist() if isinstance(value, Tensor) else [value]
    _expect(all(0 <= number < math.inf for number in numbers), value, "a count", name)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _expect(is_so: bool, found: Any, wanted: str, name: str) -> None:
    if not is_so:
        kind = f"a tensor of {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)
        raise ValueError(f"{name} is {kind[:80]}, wanted {wanted}")
