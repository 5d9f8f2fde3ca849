"""The CUDA kernel set: `csrc/*.cu`, compiled at first use for the device at hand, on torch's current stream.

`load()` returns this module, or raises why it cannot run here. What the kernels do not cover (dstate above 64, B or C
of shape (dim, dstate)) goes to the torch kernel set.

The kernels take their work as a list of one or two *directions*, `Scan` values of the same sizes, dtypes and options,
which share one launch; that is how both directions of a bidirectional block run at once.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from causal_conv1d import _nvrtc
from causal_conv1d._nvrtc import CPP_TYPES
from causal_conv1d._reduce import Sum, add_up
from mamba_ssm.ops import torch_kernels
from mamba_ssm.ops.cuda_norm import norm_backward, norm_forward
from torch import Tensor

__all__ = [
    "Scan",
    "backward",
    "forward",
    "load",
    "norm_backward",
    "norm_forward",
    "scan_backward",
    "scan_forward",
    "states_shape",
]

SOURCES = Path(__file__).parent.parent / "csrc"
MAX_DSTATE = 64
# Of scan_tile.h.
THREADS, STATES = 128, 4
# Steps between the states that forward keeps for backward, and steps in a tile of backward.
INTERVAL = 32
MAX_GRID = 65535

_SLAB, _MATRIX, _POINTER, _NONE = "4q", "5q", "q", (0, 0, 0, 0)
_SIZES = struct.Struct("14i")
_FORWARD = struct.Struct(4 * _SLAB + 2 * _MATRIX + 6 * _POINTER)
_STATES = struct.Struct(3 * _SLAB + _MATRIX + 4 * _POINTER)
_CARRY = struct.Struct(3 * _POINTER)
_BACKWARD = struct.Struct(7 * _SLAB + 2 * _MATRIX + 10 * _POINTER)


class Scan(NamedTuple):
    """One direction's arguments, as `mamba_ssm.ops.operators` describes them."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool
    reverse: bool


def load():
    """This kernel set.

    Raises:
        RuntimeError: the kernels cannot be compiled here.
    """
    _nvrtc.check()
    return sys.modules[__name__]


def states_shape(batch: int, dim: int, seqlen: int, dstate: int) -> tuple[int, ...]:
    """Shape of the float32 tensor a forward scan leaves for its backward: the state before every 32nd step."""
    return (batch, max(0, seqlen - 1) // INTERVAL, dim, dstate)


def lanes_for(dstate: int) -> int:
    """Threads that share the states of one channel."""
    return 1 << (-(-dstate // STATES) - 1).bit_length() if dstate > STATES else 1


def _slab(tensor: Tensor | None, reverse: bool) -> tuple[int, int, int, int]:
    """(address, batch, channel, time stride) of a (batch, dim, seqlen) tensor in scan order."""
    if tensor is None:
        return _NONE
    batch, channel, time = tensor.stride()
    if reverse:
        return tensor.data_ptr() + (tensor.shape[2] - 1) * time * tensor.element_size(), batch, channel, -time
    return tensor.data_ptr(), batch, channel, time


def _matrix(tensor: Tensor, reverse: bool) -> tuple[int, int, int, int, int]:
    """(address, batch, group, time, state stride) of a (batch, groups, dstate, seqlen) tensor in scan order."""
    batch, group, state, time = tensor.stride()
    if reverse:
        return tensor.data_ptr() + (tensor.shape[3] - 1) * time * tensor.element_size(), batch, group, -time, state
    return tensor.data_ptr(), batch, group, time, state


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _address_of(tensor: Tensor | None, index: int) -> int:
    """Address of `tensor[index]`."""
    return 0 if tensor is None else tensor.data_ptr() + index * tensor.stride(0) * tensor.element_size()


class _Plan(NamedTuple):
    """What the launches of one operator share."""

    device: _nvrtc.Device
    types: str
    lanes: int
    channels_per_thread: int
    batch: int
    dim: int
    seqlen: int
    dstate: int
    groups: int
    directions: int
    splits: int
    split_length: int
    softplus: bool
    time_fastest: bool
    state_fastest: bool

    def tiles(self, channels_per_thread: int) -> int:
        """Channel tiles in a group."""
        channels = THREADS // self.lanes * channels_per_thread
        return -(-(self.dim // self.groups) // channels)

    def sizes(self, channels_per_thread: int, slots: int = 0, splits: int | None = None) -> bytes:
        """`struct Sizes` of scan_tile.h."""
        return _SIZES.pack(
            *(self.batch, self.dim, self.seqlen, self.dstate),
            *(self.groups, self.tiles(channels_per_thread), slots),
            *(self.splits if splits is None else splits, self.split_length if splits is None else self.seqlen),
            *(self.directions, INTERVAL),
            *(self.softplus, self.time_fastest, self.state_fastest),
        )

    def launch(
        self,
        kernel: str,
        arguments: str,
        grid: tuple[int, int, int],
        params: list[bytes],
        sizes: bytes,
        dynamic_bytes: int = 0,
    ) -> None:
        """Launch a kernel whose argument is one struct per direction, twice, then `Sizes`."""
        directions = b"".join(params) if self.directions == 2 else params[0] + bytes(len(params[0]))
        self.device.kernel(SOURCES / f"{kernel}.cu", arguments, THREADS)(grid, directions + sizes, dynamic_bytes)


def _channels_per_thread(blocks_wanted: int, teams: int, lanes: int) -> int:
    """As many channels per thread as leave the device enough blocks: more channels mean fewer reads of B and C."""
    for channels in (4, 2):
        if channels <= lanes and teams * lanes // (channels * THREADS) >= blocks_wanted:
            return channels
    return 1


def _plan(scans: Sequence[Scan]) -> _Plan:
    first = scans[0]
    (batch, dim, seqlen), dstate, lanes = first.u.shape, first.A.shape[1], lanes_for(first.A.shape[1])
    device = _nvrtc.device(first.u.device.index)
    blocks_wanted = 2 * device.multiprocessors
    teams = batch * dim * len(scans)
    # A split costs a pass over u, delta and B, so only long sequences that leave most of the device idle are split.
    splits = min(blocks_wanted * THREADS // max(1, teams * lanes), seqlen // (8 * INTERVAL))
    split_length = seqlen if splits < 2 else -(-seqlen // (splits * INTERVAL)) * INTERVAL
    z = first.u if first.z is None else first.z
    types = ",".join(CPP_TYPES[tensor.dtype] for tensor in (first.u, first.delta, z, first.B))
    return _Plan(
        device,
        types,
        lanes,
        _channels_per_thread(blocks_wanted, teams, lanes),
        batch,
        dim,
        seqlen,
        dstate,
        first.B.shape[1],
        len(scans),
        -(-seqlen // split_length),
        split_length,
        first.delta_softplus,
        first.u.stride(2) == 1 and first.u.stride(1) != 1,
        first.B.stride(2) == 1,
    )


def _prepared(scan: Scan) -> Scan:
    """The same arguments with contiguous parameters, and B and C of one dtype."""
    B, C = scan.B, scan.C
    if B.dtype != C.dtype:
        B, C = B.float(), C.float()
    D = None if scan.D is None else scan.D.contiguous()
    bias = None if scan.delta_bias is None else scan.delta_bias.contiguous()
    return scan._replace(A=scan.A.contiguous(), B=B, C=C, D=D, delta_bias=bias)


def _covers(scan: Scan) -> bool:
    return scan.B.dim() == 4 and scan.C.dim() == 4 and scan.A.shape[1] <= MAX_DSTATE


def _empty(scan: Scan) -> bool:
    return scan.u.numel() == 0 or scan.A.shape[1] == 0


def _carried_states(plan: _Plan, scans: Sequence[Scan], inputs: Sequence[Tensor], backwards: bool) -> Tensor:
    """The state (backwards: the gradient) each split starts from, (directions, batch, splits, dim, dstate)."""
    shape = (plan.directions, plan.batch, plan.splits, plan.dim)
    states = scans[0].u.new_empty((*shape, plan.dstate), dtype=torch.float32)
    dt_sums = scans[0].u.new_empty(shape, dtype=torch.float32)
    sizes, flag = plan.sizes(1), "true" if backwards else "false"
    grid_x, grid_y = plan.groups * plan.tiles(1), min(plan.batch, MAX_GRID)
    params = [
        _STATES.pack(
            *_slab(given, scan.reverse),
            *_slab(scan.delta, scan.reverse),
            *(_slab(scan.z, scan.reverse) if backwards else _NONE),
            *_matrix(scan.C if backwards else scan.B, scan.reverse),
            *(_address(scan.A), _address(scan.delta_bias), _address_of(states, i), _address_of(dt_sums, i)),
        )
        for i, (scan, given) in enumerate(zip(scans, inputs))
    ]
    grid = (grid_x, grid_y, plan.directions * plan.splits)
    plan.launch("scan_states", f"{plan.types},{plan.lanes},{flag}", grid, params, sizes)
    params = [
        _CARRY.pack(_address(scan.A), _address_of(states, i), _address_of(dt_sums, i)) for i, scan in enumerate(scans)
    ]
    grid = (-(-plan.dim * plan.dstate // THREADS), grid_y, plan.directions)
    plan.launch("scan_carry", flag, grid, params, sizes)
    return states


def forward(scans: Sequence[Scan], save_states: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(out, last_state, states) of one or two directions, in one launch (three, if the sequence is split)."""
    scans = [_prepared(scan) for scan in scans]
    plan = _plan(scans)
    u = scans[0].u
    carried = _carried_states(plan, scans, [scan.u for scan in scans], False) if plan.splits > 1 else None
    results, params = [], []
    for i, scan in enumerate(scans):
        out = torch.empty_like(scan.u)
        last_state = u.new_empty((plan.batch, plan.dim, plan.dstate), dtype=torch.float32)
        kept = states_shape(plan.batch, plan.dim, plan.seqlen, plan.dstate) if save_states else (0,)
        states = u.new_empty(kept, dtype=torch.float32)
        results.append((out, last_state, states))
        params.append(
            _FORWARD.pack(
                *_slab(scan.u, scan.reverse),
                *_slab(scan.delta, scan.reverse),
                *_slab(scan.z, scan.reverse),
                *_slab(out, scan.reverse),
                *_matrix(scan.B, scan.reverse),
                *_matrix(scan.C, scan.reverse),
                *(_address(scan.A), _address(scan.D), _address(scan.delta_bias)),
                *(_address_of(carried, i), _address(last_state), _address(states) if states.numel() else 0),
            )
        )
    channels = plan.channels_per_thread
    grid = (plan.groups * plan.tiles(channels), min(plan.batch, MAX_GRID), plan.directions * plan.splits)
    plan.launch("scan_forward", f"{plan.types},{plan.lanes},{channels}", grid, params, plan.sizes(channels))
    return results


def scan_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    scan = Scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    if not _covers(scan) or _empty(scan):
        out, last_state, states = torch_kernels.scan_forward(*scan, save_states)
        if save_states:
            states = u.new_empty(states_shape(*u.shape, A.shape[1]), dtype=torch.float32)
        return out, last_state, states
    return forward([scan], save_states)[0]


def _backward_shared_bytes(lanes: int, channels_per_thread: int) -> int:
    """Shared memory of scan_backward.cu."""
    channels, dstate, sub, warps = THREADS // lanes * channels_per_thread, lanes * STATES, 4, THREADS // 32
    rows, matrices = 3 * INTERVAL * channels, 2 * INTERVAL * dstate
    starts = (INTERVAL // sub - 1) * channels_per_thread * THREADS * STATES
    return 4 * (rows + matrices + starts + 2 * warps * sub * 2 * dstate + 2 * channels)


class _Workspace(NamedTuple):
    """Where the blocks of a backward scan leave their sums, one row per block that shares a place: all float32."""

    matrices: Tensor  # (directions, slots, batch * groups, seqlen, 2, padded dstate)
    A: Tensor  # (directions, rows, dim, dstate)
    D: Tensor  # (directions, rows, dim)
    bias: Tensor  # (directions, rows, dim)


def _backward_grid(plan: _Plan, tiles: int) -> tuple[int, int]:
    """How many blocks share the channel tiles of a group, and how many share the batch.

    As many as there are, unless their sums over B and C would then take more memory than `u` in float32, or those over
    A more than half of it.
    """
    padded = plan.lanes * STATES
    slots = plan.dim // (plan.groups * padded * (2 if padded <= 16 else 4))
    rows = plan.batch * plan.seqlen // (2 * plan.dstate * plan.splits)
    rows = max(1, min(plan.batch, MAX_GRID, rows))
    return max(1, min(tiles, slots)), -(-plan.batch // -(-plan.batch // rows))


def backward(scans: Sequence[Scan], douts: Sequence[Tensor], saved: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Gradients (u, delta, A, B, C, D, z, delta_bias) of each direction; `saved` is what `forward` kept of each."""
    wanted, scans = scans, [_prepared(scan) for scan in scans]
    douts = [dout.to(scan.u.dtype) for dout, scan in zip(douts, scans)]
    plan, u = _plan(scans), scans[0].u
    carried = _carried_states(plan, scans, douts, True) if plan.splits > 1 else None
    teams, enough = plan.batch * plan.dim * len(scans), 2 * plan.device.multiprocessors
    channels = 2 if plan.lanes >= 4 and teams * plan.lanes // (2 * THREADS) >= enough else 1
    tiles = plan.tiles(channels)
    slots, rows = _backward_grid(plan, tiles)
    floats, many = {"dtype": torch.float32}, plan.directions
    work = _Workspace(
        u.new_empty((many, slots, plan.batch * plan.groups, plan.seqlen, 2, plan.lanes * STATES), **floats),
        u.new_empty((many, rows * plan.splits, plan.dim, plan.dstate), **floats),
        u.new_empty((many, rows * plan.splits, plan.dim), **floats),
        u.new_empty((many, rows * plan.splits, plan.dim), **floats),
    )
    results, params, sums, step = [], [], [], 2 * plan.lanes * STATES
    for i, (scan, dout) in enumerate(zip(scans, douts)):
        du, ddelta = torch.empty_like(scan.u), torch.empty_like(scan.delta)
        dz = None if scan.z is None else torch.empty_like(scan.z)
        params.append(
            _BACKWARD.pack(
                *_slab(scan.u, scan.reverse),
                *_slab(scan.delta, scan.reverse),
                *_slab(scan.z, scan.reverse),
                *_slab(dout, scan.reverse),
                *_slab(du, scan.reverse),
                *_slab(ddelta, scan.reverse),
                *_slab(dz, scan.reverse),
                *_matrix(scan.B, scan.reverse),
                *_matrix(scan.C, scan.reverse),
                *(_address(scan.A), _address(scan.D), _address(scan.delta_bias)),
                *(_address(saved[i]), _address_of(carried, i)),
                # The sums over B and C stand in the order of memory, so a reversed scan writes them backwards.
                _address_of(work.matrices, i) + (plan.seqlen - 1) * 4 * step * scan.reverse,
                -step if scan.reverse else step,
                _address_of(work.A, i),
                0 if scan.D is None else _address_of(work.D, i),
                0 if scan.delta_bias is None else _address_of(work.bias, i),
            )
        )
        parameters = scan.A, wanted[i].B, wanted[i].C, scan.D, scan.delta_bias
        grads = [u.new_empty(0) if t is None else t.new_empty(t.shape) for t in parameters]
        sums += _parameter_sums(scan, grads, work, i)
        dA, dB, dC, dD, dbias = grads
        results.append((du, ddelta, dA, dB, dC, dD, u.new_empty(0) if dz is None else dz, dbias))
    grid = (plan.groups * slots, rows, plan.directions * plan.splits)
    arguments = f"{plan.types},{plan.lanes},{channels}"
    shared = _backward_shared_bytes(plan.lanes, channels)
    plan.launch("scan_backward", arguments, grid, params, plan.sizes(channels, slots), shared)
    add_up(plan.device, sums)
    return results


def _parameter_sums(scan: Scan, grads: Sequence[Tensor], work: _Workspace, direction: int) -> list[Sum]:
    """How the gradients of A, B, C, D and delta_bias follow from what the blocks left."""
    dA, dB, dC, dD, dbias = grads
    sums = [Sum(work.A[direction][:, None], dA[None])]
    for number, grad in enumerate((dB, dC)):
        rows = work.matrices[direction][..., number, : scan.A.shape[1]]
        sums.append(Sum(rows, grad.flatten(0, 1).transpose(1, 2)))
    for argument, grad, rows in ((scan.D, dD, work.D), (scan.delta_bias, dbias, work.bias)):
        if argument is not None:
            sums.append(Sum(rows[direction][:, None, None], grad[None, None]))
    return sums


def scan_backward(
    dout: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    states: Tensor,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    scan = Scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    if not _covers(scan) or _empty(scan):
        given = u, delta, A, B, C, D, z, delta_bias
        return torch_kernels.scan_backward(dout, *given, states, delta_softplus, reverse)
    return backward([scan], [dout], [states])[0]
