"""Argument checks shared by the kernel packages: a failure is one sentence with argument, given and wanted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

STATE_DTYPES = (torch.float32, torch.float64)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, wanted a torch.Tensor")


def check_ndim(name: str, tensor: Tensor, layout: str) -> None:
    """Raise ValueError unless `tensor` has as many dimensions as `layout`, such as "(batch, dim, seqlen)"."""
    if tensor.dim() != layout.count(",") + 1:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, wanted {layout}")


def check_shape(name: str, tensor: Tensor, wanted: Sequence[int], layout: str) -> None:
    """Raise ValueError unless `tensor` has shape `wanted`; `layout` names the dimensions."""
    if tensor.shape != tuple(wanted):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, wanted {layout} = {tuple(wanted)}")


def check_dtype(name: str, tensor: Tensor, wanted: Sequence[torch.dtype]) -> None:
    """Raise TypeError unless the dtype of `tensor` is one of `wanted`."""
    if tensor.dtype not in wanted:
        raise TypeError(f"{name} has dtype {_names([tensor.dtype])}, wanted {_names(wanted)}")


def check_device(name: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    """Raise ValueError unless `tensor` is on the device of `like`."""
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, wanted {like.device}, the device of {like_name}")


def check_all(
    like: Tensor,
    like_name: str,
    given: Iterable[tuple[str, object, Sequence[int], str]],
    dtypes: Sequence[torch.dtype],
    optional: Sequence[str] = (),
) -> None:
    """Raise what the functions above raise unless each of `given` (its name, itself, the shape wanted, that one's
    layout) is a tensor of that shape, of one of `dtypes`, on the device of `like`, or None if it is `optional`."""
    device = like.device
    for name, tensor, shape, layout in given:
        if tensor is None and name in optional:
            continue
        # operators are called hundreds of times a step: what is right is looked at once
        if isinstance(tensor, Tensor) and tensor.shape == shape and tensor.dtype in dtypes and tensor.device == device:
            continue
        check_tensor(name, tensor)
        check_shape(name, tensor, shape, layout)
        check_dtype(name, tensor, dtypes)
        check_device(name, tensor, like, like_name)
