"""Kernels compiled ahead: several at once, of all that is known to come when a model's first layer begins.

A model that is run for the first time waits for its first norm and its first mixer, while the rest compiles beside
them. That is so where sizes allow whole packs, as those of all published models do; what another model needs is
compiled when it is asked for.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from causal_conv1d import _nvrtc
from causal_conv1d._nvrtc import CPP_TYPES
from causal_conv1d._reduce import SOURCE as REDUCE_SOURCE
from causal_conv1d.kernels.cuda import convolution
from mamba_ssm.kernels.arguments import MixerSizes
from mamba_ssm.kernels.cuda import merging, norm, pooled, scan

Jobs = list[tuple[Path, str]]


def foretell_stacked(index: int, mixer: MixerSizes, directions: int) -> None:
    """What a mixer needs whose directions are stacked (`directions.py`), and the norms around it."""
    _stacked(_nvrtc.device(index), mixer, directions)


def foretell_mixer(index: int, mixer: MixerSizes, masked: bool) -> None:
    """What a mixer needs that is put together from convolutions, `masked` or not, and scans; and the norms around
    it."""
    _composed(_nvrtc.device(index), mixer, masked)


def foretell_pooled(index: int, mixer: MixerSizes, norm_dtype: torch.dtype | None) -> None:
    """What a mixer over pooled lines needs, with a norm of this dtype before its gate; and the norms around it."""
    _pooled(_nvrtc.device(index), mixer, norm_dtype)


def foretell_norm(index: int, dtypes: tuple[torch.dtype, ...], size: int, weights: int) -> None:
    """What the way back needs through a norm over `size` channels: `dtypes` of x, the residual (or x), their sum and
    the weight, and how many parameters there are."""
    _norm(_nvrtc.device(index), dtypes, size, weights)


def foretell_merging(index: int, dtype: torch.dtype, weighted: bool, trains: bool) -> None:
    """What merging tokens of this dtype needs, with their residuals in float32; `weighted`, what counts them, too."""
    _merging(_nvrtc.device(index), dtype, weighted, trains)


def foretell_sums(index: int, dtype: torch.dtype) -> None:
    """What sums up groups of tokens of this dtype, and spreads them out, either of which is the other's gradient."""
    _nvrtc.device(index).prepare(_sums(dtype, True))


@lru_cache(maxsize=256)
def _stacked(device: _nvrtc.Device, mixer: MixerSizes, directions: int) -> None:
    if _is_known(mixer):
        device.prepare([*_convolutions(mixer, directions), *_around(device, mixer, directions)])


@lru_cache(maxsize=256)
def _composed(device: _nvrtc.Device, mixer: MixerSizes, masked: bool) -> None:
    if _is_known(mixer):
        device.prepare([*_convolutions(mixer, 1, masked), *_around(device, mixer, mixer.directions)])


@lru_cache(maxsize=256)
def _pooled(device: _nvrtc.Device, mixer: MixerSizes, norm_dtype: torch.dtype | None) -> None:
    if not _is_known(mixer) or mixer.dim > norm.MAX_SIZE:
        return
    own, gate = CPP_TYPES[mixer.dtype], CPP_TYPES.get(norm_dtype, "float")
    found = [
        (pooled.CONV_SOURCE, f"{own},{_taps(mixer.taps)},{convolution.VECTOR},{mixer.width}"),
        (pooled.GATE_SOURCE, f"{own},{gate},{norm.layout_arguments(mixer.dim, 4)}"),
        *_around(device, mixer, mixer.directions),
    ]
    device.prepare(found + (_convolutions(mixer, 1) if mixer.trains else []))


@lru_cache(maxsize=256)
def _norm(device: _nvrtc.Device, dtypes: tuple[torch.dtype, ...], size: int, weights: int) -> None:
    if size % 4 == 0 and size <= norm.MAX_SIZE and all(dtype in CPP_TYPES for dtype in dtypes):
        arguments = f"{','.join(CPP_TYPES[dtype] for dtype in dtypes)},{norm.layout_arguments(size, 4)}"
        device.prepare([(norm.BACKWARD_SOURCE, arguments), (REDUCE_SOURCE, str(weights))])


@lru_cache(maxsize=256)
def _merging(device: _nvrtc.Device, dtype: torch.dtype, weighted: bool, trains: bool) -> None:
    # weighted means are taken in float32
    found = [*_sums(torch.float32, trains), *([] if weighted else _sums(dtype, trains))]
    found += [(merging.PAIRS_SOURCE, CPP_TYPES[dtype]), (merging.ARRANGE_SOURCE, "")]
    device.prepare(found + [(merging.FORWARD_SOURCE, "float,1")] * weighted)


def _sums(dtype: torch.dtype, both_ways: bool) -> Jobs:
    sources = (merging.FORWARD_SOURCE, merging.BACKWARD_SOURCE)[: 1 + both_ways]
    return [(source, f"{CPP_TYPES[dtype]},4") for source in sources]


def _is_known(mixer: MixerSizes) -> bool:
    """Whether there are kernels for it, and work."""
    dtypes = mixer.dtype, *(dtype for dtype in mixer.taps if dtype is not None)
    known = all(dtype in CPP_TYPES for dtype in dtypes)
    return known and 0 < mixer.dstate <= scan.MAX_DSTATE and mixer.batch > 0 and mixer.dim > 0


def _taps(dtypes: tuple[torch.dtype | None, ...]) -> str:
    """The type in which parameters are handed over together."""
    there = {dtype for dtype in dtypes if dtype is not None}
    return CPP_TYPES[there.pop()] if len(there) == 1 else "float"


def _convolutions(mixer: MixerSizes, directions: int, masked: bool = False) -> Jobs:
    """Those of so many directions in a launch."""
    weight_and_bias = mixer.taps[:2]
    arguments = f"{CPP_TYPES[mixer.dtype]},{_taps(weight_and_bias)},{convolution.VECTOR},{mixer.width}"
    arguments += ",true" if masked else ""
    if not mixer.trains:
        return [(convolution.FORWARD_SOURCE, arguments)]
    sums = directions * sum(dtype is not None for dtype in weight_and_bias) + masked
    sources = convolution.FORWARD_SOURCE, convolution.BACKWARD_SOURCE
    return [*((source, arguments) for source in sources), (REDUCE_SOURCE, str(sums))]


def _around(device: _nvrtc.Device, mixer: MixerSizes, directions: int) -> Jobs:
    """A mixer's scans, the sums behind those of so many directions, and norms of half as many channels."""
    sums = directions * (4 + mixer.with_D)  # of A, B, C and the bias of delta
    found = [*scan.kernels_for(device, mixer), *norm.kernels_for(mixer.dtype, mixer.dim // 2, mixer.trains)]
    return [*found, (REDUCE_SOURCE, str(sums))] if mixer.trains else found
