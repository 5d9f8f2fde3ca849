"""The selective scan of the CUDA kernel set: `csrc/scan_*.cu`.

What the kernels do not cover (dstate above 128, B or C of shape (dim, dstate)) goes to the torch kernel set. They take
their work as a list of one or two *directions*, `Scan` values of the same sizes, dtypes and options, which share one
launch; that is how both directions of a bidirectional block run at once.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, chain
from pathlib import Path
from typing import NamedTuple

import torch
from causal_conv1d import _nvrtc
from causal_conv1d._nvrtc import CPP_TYPES
from causal_conv1d._reduce import Sum, add_up, dense_sum
from causal_conv1d.backend import tell_of
from causal_conv1d.layout import Slab, address, slab
from mamba_ssm.kernels import torch as torch_kernels
from mamba_ssm.kernels.arguments import MixerSizes, Scan, ScanGradients
from torch import Tensor

SOURCES = Path(__file__).resolve().parents[2] / "csrc"
FORWARD_SOURCE, BACKWARD_SOURCE = SOURCES / "scan_forward.cu", SOURCES / "scan_backward.cu"
STATES_SOURCE, CARRY_SOURCE = SOURCES / "scan_states.cu", SOURCES / "scan_carry.cu"
MAX_DSTATE = 128
# Of scan_tile.h.
THREADS, STATES = 128, 4
# Steps between the states that forward keeps for backward, and steps in a tile of backward.
INTERVAL = 16
# Steps in a split of a sequence, at least.
MIN_SPLIT = 256
MAX_GRID = 65535

_SLAB, _MATRIX, _POINTER = "4q", "5q", "q"
_SIZES = struct.Struct("15if")
_FORWARD = struct.Struct(4 * _SLAB + 2 * _MATRIX + 6 * _POINTER)
_STATES = struct.Struct(3 * _SLAB + _MATRIX + 4 * _POINTER)
_CARRY = struct.Struct(3 * _POINTER)
_BACKWARD = struct.Struct(7 * _SLAB + 2 * _MATRIX + 10 * _POINTER)


class How(NamedTuple):
    """What a scan does beside the usual: `accumulate` adds to out and dz (before the gate), `log_decay` takes A for
    log(-A), `share` multiplies out."""

    accumulate: bool = False
    log_decay: bool = False
    share: float = 1.0


PLAIN = How()


def states_shape(batch: int, dim: int, seqlen: int, dstate: int) -> tuple[int, ...]:
    """Shape of the float32 tensor a forward scan leaves for its backward: the state before every 16th step."""
    return (batch, max(0, seqlen - 1) // INTERVAL, dim, dstate)


def lanes_for(dstate: int) -> int:
    """Threads that share the states of one channel."""
    return 1 << (-(-dstate // STATES) - 1).bit_length() if dstate > STATES else 1


def _matrix(tensor: Tensor, reverse: bool) -> tuple[int, int, int, int, int]:
    """(address, batch, group, time, state stride) of a (batch, groups, dstate, seqlen) tensor in scan order."""
    batch, group, state, time = tensor.stride()
    if reverse:
        return tensor.data_ptr() + (tensor.shape[3] - 1) * time * tensor.element_size(), batch, group, -time, state
    return tensor.data_ptr(), batch, group, time, state


def _pack(slabs: Sequence[Slab], itemsizes: Sequence[int], group_size: int) -> int:
    """PACK of scan_tile.h: 4 neighbouring channels at once, 1, or 0 where time is the dense dimension of the first."""
    _, _, channel, time = slabs[0]
    if channel != 1:
        return 0 if abs(time) == 1 else 1
    rest = group_size
    for (start, batch, channel, time), itemsize in zip(slabs, itemsizes):
        if start:
            rest |= batch | time | (channel != 1) | start // itemsize
    return 1 if rest % 4 else 4


def _address_of(tensor: Tensor | None, index: int) -> int:
    """Address of `tensor[index]`."""
    return 0 if tensor is None else tensor.data_ptr() + index * tensor.stride(0) * tensor.element_size()


class _Plan(NamedTuple):
    """What the launches of one operator share; see `_plan`."""

    device: _nvrtc.Device
    types: str
    lanes: int
    batch: int
    dim: int
    seqlen: int
    dstate: int
    groups: int
    directions: int
    splits: int
    split_length: int
    softplus: bool
    state_fastest: bool
    how: How
    blocks_wanted: int
    itemsizes: tuple[int, int, int]  # of u, delta and z

    @property
    def group_size(self) -> int:
        """Channels that share B and C."""
        return self.dim // self.groups

    def tiles(self, channels_per_thread: int) -> int:
        """Channel tiles in a group."""
        channels = THREADS // self.lanes * channels_per_thread
        return -(-self.group_size // channels)

    def fills(self, channels_per_thread: int) -> bool:
        """Whether so many channels per thread are possible and leave the device enough blocks."""
        blocks = self.batch * self.dim * self.directions * self.lanes // (channels_per_thread * THREADS)
        return channels_per_thread <= self.lanes and blocks >= self.blocks_wanted

    def sizes(self, channels_per_thread: int, slots: int = 0) -> bytes:
        """`struct Sizes` of scan_tile.h."""
        return _SIZES.pack(
            *(self.batch, self.dim, self.seqlen, self.dstate),
            *(self.groups, self.tiles(channels_per_thread), slots),
            *(self.splits, self.split_length, self.directions, INTERVAL, self.softplus, self.state_fastest),
            *self.how,
        )

    def launch(
        self,
        source: Path,
        arguments: str,
        grid: tuple[int, int, int],
        params: list[bytes],
        sizes: bytes,
        dynamic_bytes: int = 0,
    ) -> None:
        """Launch a kernel whose argument is one struct per direction, twice, then `Sizes`."""
        directions = b"".join(params) if self.directions == 2 else params[0] + bytes(len(params[0]))
        self.device.kernel(source, arguments, THREADS)(grid, directions + sizes, dynamic_bytes)


class _ForwardPlan(NamedTuple):
    """How forward is launched."""

    arguments: str
    grid: tuple[int, int, int]
    sizes: bytes


class _BackwardPlan(NamedTuple):
    """How backward is launched: beside that, how many blocks share the channel tiles of a group, and the batch."""

    arguments: str
    grid: tuple[int, int, int]
    sizes: bytes
    shared_bytes: int
    slots: int
    rows: int


@lru_cache(maxsize=256)
def _plan(
    device: _nvrtc.Device,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, int, int],
    dstate: int,
    groups: int,
    directions: int,
    options: tuple[bool, bool, How],
) -> _Plan:
    (batch, dim, seqlen), lanes = shape, lanes_for(dstate)
    blocks_wanted = 2 * device.multiprocessors
    # A split costs a pass over u, delta and B, so only long sequences that leave most of the device idle are split.
    splits = min(blocks_wanted * THREADS // (batch * dim * directions * lanes), seqlen // MIN_SPLIT)
    split_length = seqlen if splits < 2 else -(-seqlen // (splits * INTERVAL)) * INTERVAL
    types, splits = ",".join(CPP_TYPES[dtype] for dtype in dtypes), -(-seqlen // split_length)
    sizes = lanes, batch, dim, seqlen, dstate, groups, directions, splits, split_length
    return _Plan(device, types, *sizes, *options, blocks_wanted, tuple(dtype.itemsize for dtype in dtypes[:3]))


def _plan_for(scans: Sequence[Scan], how: How = PLAIN) -> _Plan:
    u, delta, A, B, _, _, z, _, softplus, _ = scans[0]
    dtypes = u.dtype, delta.dtype, u.dtype if z is None else z.dtype, B.dtype
    options = softplus, B.stride(2) == 1, how
    return _plan(_nvrtc.device(u.device.index), dtypes, u.shape, A.shape[1], B.shape[1], len(scans), options)


def kernels_for(device: _nvrtc.Device, mixer: MixerSizes) -> list[tuple[Path, str]]:
    """The kernels of a mixer's scans, whose channels can be moved in packs."""
    shape, options = (mixer.batch, mixer.dim, mixer.seqlen), (True, True, PLAIN)
    plan, trains = _plan(device, (mixer.dtype,) * 4, shape, mixer.dstate, 1, mixer.directions, options), mixer.trains
    found = [(FORWARD_SOURCE, f"{_forward_plan(plan).arguments},4")]
    if trains:
        found.append((BACKWARD_SOURCE, f"{_backward_plan(plan).arguments},4"))
    for backwards in ("false", "true")[: 1 + trains] if plan.splits > 1 else ():
        found.append((STATES_SOURCE, f"{plan.types},{plan.lanes},{backwards},4"))
        found.append((CARRY_SOURCE, backwards))
    return found


@lru_cache(maxsize=256)
def _forward_plan(plan: _Plan) -> _ForwardPlan:
    # More channels per thread mean fewer reads of B and C.
    channels = next((channels for channels in (4, 2) if plan.fills(channels)), 1)
    grid = plan.groups * plan.tiles(channels), min(plan.batch, MAX_GRID), plan.directions * plan.splits
    return _ForwardPlan(f"{plan.types},{plan.lanes},{channels}", grid, plan.sizes(channels))


@lru_cache(maxsize=256)
def _backward_plan(plan: _Plan) -> _BackwardPlan:
    """Blocks share places in the workspace where it would else take more than `u` in float32 for the sums over B and C,
    or more than half of that for the sums over A."""
    channels = 2 if plan.lanes >= 4 and plan.fills(2) else 1
    padded, tiles = plan.lanes * STATES, plan.tiles(channels)
    slots = max(1, min(tiles, plan.dim // (plan.groups * padded * (2 if padded <= 16 else 4))))
    rows = plan.batch * plan.seqlen // (2 * plan.dstate * plan.splits)
    rows = max(1, min(plan.batch, MAX_GRID, rows))
    rows = -(-plan.batch // -(-plan.batch // rows))
    grid = plan.groups * slots, rows, plan.directions * plan.splits
    shared = backward_shared_bytes(plan.lanes, channels)
    arguments = f"{plan.types},{plan.lanes},{channels}"
    return _BackwardPlan(arguments, grid, plan.sizes(channels, slots), shared, slots, rows * plan.splits)


def backward_shared_bytes(lanes: int, channels_per_thread: int) -> int:
    """Shared memory of scan_backward.cu."""
    channels, dstate, sub, warps = THREADS // lanes * channels_per_thread, lanes * STATES, 4, THREADS // 32
    rows, matrices = 3 * INTERVAL * channels, 2 * INTERVAL * dstate
    starts = (INTERVAL // sub - 1) * channels_per_thread * THREADS * STATES
    return 4 * (rows + matrices + starts + 2 * warps * sub * 2 * dstate + 2 * channels)


def _prepared(scan: Scan) -> Scan:
    """The same arguments with contiguous parameters, and B and C of one dtype."""
    B, C = scan.B, scan.C
    if B.dtype != C.dtype:
        B, C = B.float(), C.float()
    D = None if scan.D is None else scan.D.contiguous()
    bias = None if scan.delta_bias is None else scan.delta_bias.contiguous()
    return scan._replace(A=scan.A.contiguous(), B=B, C=C, D=D, delta_bias=bias)


def covers(scan: Scan) -> bool:
    """Whether there is a kernel for these arguments, and work for it."""
    dstate = scan.A.shape[1]
    if scan.u.numel() == 0 or dstate == 0:
        return False
    if scan.B.dim() != 4 or scan.C.dim() != 4:
        tell_of("a scan whose B or C is the same at every step")
    elif dstate > MAX_DSTATE:
        tell_of(f"a scan with a d_state above {MAX_DSTATE}")
    else:
        return True
    return False


def _carried_states(plan: _Plan, scans: Sequence[Scan], inputs: Sequence[Tensor], backwards: bool) -> Tensor:
    """The state (backwards: the gradient) each split starts from, (directions, batch, splits, dim, dstate)."""
    shape = (plan.directions, plan.batch, plan.splits, plan.dim)
    states = scans[0].u.new_empty((*shape, plan.dstate), dtype=torch.float32)
    dt_sums = scans[0].u.new_empty(shape, dtype=torch.float32)
    sizes, flag = plan.sizes(1), "true" if backwards else "false"
    grid_x, grid_y = plan.groups * plan.tiles(1), min(plan.batch, MAX_GRID)
    params, slabs = [], []
    for i, (scan, given) in enumerate(zip(scans, inputs)):
        z = scan.z if backwards else None
        rows = [slab(tensor, scan.reverse) for tensor in (given, scan.delta, z)]
        matrix = _matrix(scan.C if backwards else scan.B, scan.reverse)
        addresses = address(scan.A), address(scan.delta_bias), _address_of(states, i), _address_of(dt_sums, i)
        params.append(_STATES.pack(*chain(*rows), *matrix, *addresses))
        slabs += rows
    grid = (grid_x, grid_y, plan.directions * plan.splits)
    pack = _pack(slabs, plan.itemsizes * plan.directions, plan.group_size)
    plan.launch(STATES_SOURCE, f"{plan.types},{plan.lanes},{flag},{pack}", grid, params, sizes)
    params = [
        _CARRY.pack(address(scan.A), _address_of(states, i), _address_of(dt_sums, i)) for i, scan in enumerate(scans)
    ]
    grid = (-(-plan.dim * plan.dstate // THREADS), grid_y, plan.directions)
    plan.launch(CARRY_SOURCE, flag, grid, params, sizes)
    return states


def _torch_forward(scan: Scan, save_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    out, last_state, states = torch_kernels.scan_forward(*scan, save_states)
    if save_states:
        states = scan.u.new_empty(states_shape(*scan.u.shape, scan.A.shape[1]), dtype=torch.float32)
    return out, last_state, states


def _torch_backward(scan: Scan, dout: Tensor, states: Tensor) -> tuple[Tensor, ...]:
    return torch_kernels.scan_backward(dout, *scan[:8], states, *scan[8:])


def _all_by_torch(scans: Sequence[Scan], save_states: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [_torch_forward(scan, save_states) for scan in scans]


def _all_back_by_torch(
    scans: Sequence[Scan], douts: Sequence[Tensor], saved: Sequence[Tensor]
) -> list[tuple[Tensor, ...]]:
    return [_torch_backward(*each) for each in zip(scans, douts, saved)]


@_nvrtc.or_else(_all_by_torch)
def forward(scans: Sequence[Scan], save_states: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(out, last_state, states) of one or two directions, in one launch (three, if the sequence is split)."""
    if not all(map(covers, scans)):
        return _all_by_torch(scans, save_states)
    u, dstate, results = scans[0].u, scans[0].A.shape[1], []
    kept = states_shape(*u.shape, dstate) if save_states else (0,)
    for scan in scans:
        last_state = u.new_empty((*u.shape[:2], dstate), dtype=torch.float32)
        results.append((torch.empty_like(scan.u), last_state, u.new_empty(kept, dtype=torch.float32)))
    forward_into(scans, *zip(*results))
    return results


def forward_into(
    scans: Sequence[Scan],
    outs: Sequence[Tensor],
    last_states: Sequence[Tensor | None],
    states: Sequence[Tensor],
    how: How = PLAIN,
) -> None:
    """One launch for one or two directions that `covers` (three, if the sequence is split), into what is given: outs
    like u, last_states (batch, dim, dstate) or None, states of `states_shape` or empty, which keeps none."""
    scans = [_prepared(scan) for scan in scans]
    plan = _plan_for(scans, how)
    carried = _carried_states(plan, scans, [scan.u for scan in scans], False) if plan.splits > 1 else None
    params, slabs = [], []
    for i, (scan, out, last_state, kept) in enumerate(zip(scans, outs, last_states, states)):
        rows = [slab(tensor, scan.reverse) for tensor in (scan.u, scan.delta, scan.z, out)]
        slabs += rows
        params.append(
            _FORWARD.pack(
                *chain(*rows),
                *_matrix(scan.B, scan.reverse),
                *_matrix(scan.C, scan.reverse),
                *(address(scan.A), address(scan.D), address(scan.delta_bias)),
                *(_address_of(carried, i), address(last_state), address(kept) if kept.numel() else 0),
            )
        )
    arguments, grid, sizes = _forward_plan(plan)
    pack = _pack(slabs, (*plan.itemsizes, plan.itemsizes[0]) * plan.directions, plan.group_size)
    plan.launch(FORWARD_SOURCE, f"{arguments},{pack}", grid, params, sizes)


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
    return forward([Scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)], save_states)[0]


class _Workspace(NamedTuple):
    """Where the blocks of a backward scan leave their sums, one row per block that shares a place: float32, in one
    piece, and of each direction the addresses in it."""

    memory: Tensor
    matrices: list[int]  # (slots, batch, groups, seqlen, 2, padded dstate)
    A: list[int]  # (rows, dim, dstate)
    D: list[int]  # (rows, dim)
    bias: list[int]  # (rows, dim)

    @classmethod
    def of(cls, plan: _Plan, how: _BackwardPlan, u: Tensor) -> _Workspace:
        """Memory for it."""
        sequences = how.slots * plan.batch * plan.groups * plan.seqlen
        floats = sequences * 2 * plan.lanes * STATES, how.rows * plan.dim * plan.dstate, *[how.rows * plan.dim] * 2
        starts = list(accumulate((-(-size // 4) * 4 for size in floats * plan.directions), initial=0))
        memory = u.new_empty(starts[-1], dtype=torch.float32)
        places = [memory.data_ptr() + 4 * start for start in starts[:-1]]
        return cls(memory, *(places[part::4] for part in range(4)))

    def sums(self, plan: _Plan, how: _BackwardPlan, direction: int, grads: ScanGradients) -> list[Sum]:
        """How the gradients of A, B, C, D and delta_bias follow from what the blocks left."""
        sums = [dense_sum(self.A[direction], how.rows, grads.A)]
        step, sequences = 2 * plan.lanes * STATES, plan.batch * plan.groups
        for number, grad in enumerate((grads.B, grads.C)):
            parts = self.matrices[direction] + number * plan.lanes * STATES * 4
            strides = plan.seqlen * step, step, 1
            grad_strides = grad.stride(0 if plan.groups == 1 else 1), grad.stride(3), grad.stride(2)
            sizes = sequences, plan.seqlen, plan.dstate
            sums.append(Sum(parts, how.slots, sequences * plan.seqlen * step, strides, grad, grad_strides, sizes))
        for places, grad in ((self.D, grads.D), (self.bias, grads.delta_bias)):
            if grad is not None:
                sums.append(dense_sum(places[direction], how.rows, grad))
        return sums


@_nvrtc.or_else(_all_back_by_torch)
def backward(scans: Sequence[Scan], douts: Sequence[Tensor], saved: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Gradients (u, delta, A, B, C, D, z, delta_bias) of each direction; `saved` is what `forward` kept of each."""
    if not all(map(covers, scans)):
        return _all_back_by_torch(scans, douts, saved)
    u, results = scans[0].u, []
    for scan in scans:
        like = (torch.empty_like(scan.u), torch.empty_like(scan.delta))
        small = [None if t is None else t.new_empty(t.shape) for t in (scan.A, scan.B, scan.C, scan.D)]
        dz, dbias = (None if t is None else torch.empty_like(t) for t in (scan.z, scan.delta_bias))
        results.append(ScanGradients(*like, *small, dz, dbias))
    sums, _workspace = backward_into(scans, douts, saved, results)
    add_up(_nvrtc.device(u.device.index), sums)
    return [tuple(u.new_empty(0) if grad is None else grad for grad in grads) for grads in results]


def backward_into(
    scans: Sequence[Scan],
    douts: Sequence[Tensor],
    saved: Sequence[Tensor],
    results: Sequence[ScanGradients],
    how: How = PLAIN,
) -> tuple[list[Sum], Tensor]:
    """Gradients of one or two directions that `covers`, into `results`: those of u, delta and z in one launch; the
    others once the sums that this returns are taken, out of memory that it returns too."""
    scans = [_prepared(scan) for scan in scans]
    douts = [dout.to(scan.u.dtype) for dout, scan in zip(douts, scans)]
    plan, u = _plan_for(scans, how), scans[0].u
    launch = _backward_plan(plan)
    carried = _carried_states(plan, scans, douts, True) if plan.splits > 1 else None
    work, step = _Workspace.of(plan, launch, u), 2 * plan.lanes * STATES
    params, sums, slabs = [], [], []
    for i, (scan, dout, grads) in enumerate(zip(scans, douts, results)):
        tensors = scan.u, scan.delta, scan.z, dout, grads.u, grads.delta, grads.z
        rows = [slab(tensor, scan.reverse) for tensor in tensors]
        slabs += rows
        params.append(
            _BACKWARD.pack(
                *chain(*rows),
                *_matrix(scan.B, scan.reverse),
                *_matrix(scan.C, scan.reverse),
                *(address(scan.A), address(scan.D), address(scan.delta_bias)),
                *(address(saved[i]), _address_of(carried, i)),
                # The sums over B and C stand in the order of memory, so a reversed scan writes them backwards.
                work.matrices[i] + (plan.seqlen - 1) * 4 * step * scan.reverse,
                -step if scan.reverse else step,
                work.A[i],
                0 if scan.D is None else work.D[i],
                0 if scan.delta_bias is None else work.bias[i],
            )
        )
        sums += work.sums(plan, launch, i, grads)
    # u, delta, z, dout, du, ddelta, dz: dout and du are as wide as u
    itemsizes = (*plan.itemsizes, plan.itemsizes[0], *plan.itemsizes) * plan.directions
    arguments = f"{launch.arguments},{_pack(slabs, itemsizes, plan.group_size)}"
    plan.launch(BACKWARD_SOURCE, arguments, launch.grid, params, launch.sizes, launch.shared_bytes)
    return sums, work.memory


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
    return backward([Scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)], [dout], [states])[0]


def scan_forward_both(
    first: Sequence[Tensor | None], second: Sequence[Tensor | None], delta_softplus: bool, save_states: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both directions of a bidirectional block, the second against the sequence: outputs, then states kept."""
    scans = Scan(*first, delta_softplus, False), Scan(*second, delta_softplus, True)
    (out, _, states), (out_b, _, states_b) = forward(scans, save_states)
    return out, out_b, states, states_b


def scan_backward_both(
    douts: Sequence[Tensor],
    first: Sequence[Tensor | None],
    second: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    delta_softplus: bool,
) -> tuple[Tensor, ...]:
    """The gradients of both directions' tensors, in their order."""
    scans = Scan(*first, delta_softplus, False), Scan(*second, delta_softplus, True)
    first_grads, second_grads = backward(scans, douts, saved)
    return *first_grads, *second_grads
