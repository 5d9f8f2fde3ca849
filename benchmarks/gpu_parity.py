"""Whether the CUDA kernels are right on the GPU at hand: against float64 on the CPU, with a limit for every figure.

    python -m benchmarks.gpu_parity                       # exit code 1 if a figure is past its limit
    python -m benchmarks.gpu_parity --tiny --parts operators   # small enough for compute-sanitizer

*operators*: scan, convolution, norm, merging, a mixer's inside: value and gradient, by dtype, layout, states, length.
*models*: every family, forward and backward. *ways*: other streams, threads and processes, a cold and a read-only
cache, CUDA graphs, training from one, repetition, DDP and FSDP2. Errors are the largest difference relative to the
largest value, of gradients of a model the norm of the difference relative to the norm.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from causal_conv1d import _nvrtc, backend
from causal_conv1d.ops.convolution import causal_conv1d_fn, causal_conv1d_ref
from mamba_ssm.kernels import torch as torch_kernels
from mamba_ssm.kernels.arguments import DIRECTION_TENSORS, Direction
from mamba_ssm.kernels.cuda.scan import MAX_DSTATE
from mamba_ssm.ops.directions import directions_fn, directions_ref
from mamba_ssm.ops.merging import match_tokens_fn, match_tokens_ref, merge_tokens_fn, merge_tokens_ref
from mamba_ssm.ops.pooled import Lines, Taps, pooled_conv_fn, pooled_conv_ref, pooled_gate_fn, pooled_gate_ref
from mamba_ssm.ops.triton.layernorm import layer_norm_fn
from torch import Tensor, nn

from benchmarks.cases import build, own_size
from benchmarks.command import command, device_name, parser, write_json
from models_mae import MaskedAutoencoder
from utils import UsageError, graphs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
MODEL_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 8e-2, torch.float16: 2e-2}
# Of a family the smallest; merging and pruning decide, and a rounding decides otherwise, so that they are in float32.
FAMILIES = {
    "vim_nano_patch4_32": True,
    "fastvim_nano_patch4_32": True,
    "mambareg_nano_patch4_32": True,
    "vim_nano_patch4_32:fusion_strategy=all,fusion_token=4": False,
    "dyvm_nano_patch4_32": False,
    "mae_vim_base_patch16_224:depth=2,img_size=64": False,
}
LENGTHS = (1, 14, 45, 197, 785, 4096)
PROCESSES = 8


class Figure(NamedTuple):
    """One thing that was checked: its error and how large it may be."""

    part: str
    what: str
    error: float
    limit: float

    @property
    def is_good(self) -> bool:
        return self.error <= self.limit  # false for NaN


@command("benchmarks.gpu_parity")
def main(argv: Sequence[str] | None = None) -> int:
    """Check and print; returns 1 if a figure is past its limit. Raises UsageError where there is no GPU."""
    options = _parser().parse_args(argv)
    if options.device is None and not torch.cuda.is_available():
        raise UsageError("No CUDA device is at hand; wanted one, or --device cpu.")
    device = torch.device(options.device or "cuda")
    torch.backends.cudnn.allow_tf32 = False  # patches would be embedded with ten bits
    figures = []
    for part in options.parts:
        for figure in PARTS[part](device, options):
            told = "ok" if figure.is_good else "WRONG"
            print(f"{told:5}  {figure.error:8.1e} of {figure.limit:7.1e}  {figure.part}: {figure.what}", flush=True)
            figures.append(figure)
    wrong = sum(not figure.is_good for figure in figures)
    print(f"{len(figures)} figures, {wrong} past their limits")
    write_json(options.output, [figure._asdict() | {"is_good": figure.is_good} for figure in figures])
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    found = parser("benchmarks.gpu_parity", __doc__)
    found.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    found.add_argument("--device", type=device_name, help="cpu checks the C++ kernels the same way (default: cuda)")
    found.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    found.add_argument("--tiny", action="store_true", help="a few small sizes, and the first model alone")
    found.add_argument("--output", type=Path, help="write the figures as JSON")
    return found


def relative_error(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest difference of any result from its float64, relative to the largest value of that."""
    worst = 0.0
    for one, other in zip(got, wanted, strict=True):
        one, other = one.detach().cpu().double(), other.detach().cpu().double()
        if one.shape != other.shape:
            raise ValueError(f"a result has shape {tuple(one.shape)}, wanted {tuple(other.shape)}")
        if other.numel():
            error = float((one - other).abs().max() / other.abs().max().clamp(min=1e-30))
            worst = error if error != error or error > worst else worst
    return worst


# --- operators -------------------------------------------------------------------------------------------------------


def _against_float64(
    call: Callable[..., Sequence[Tensor]],
    reference: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    device: torch.device,
) -> float:
    """The error of `call` of `inputs`, moved to `device`, in value and gradient."""
    own = [None if t is None else _moved(t, device).requires_grad_() for t in inputs]
    wide = [None if t is None else t.double().requires_grad_() for t in inputs]
    got, wanted = call(*own), reference(*wide)
    douts = [torch.randn(out.shape).to(out.dtype) for out in got]
    grads = torch.autograd.grad(got, [t for t in own if t is not None], [dout.to(device) for dout in douts])
    wanted_grads = torch.autograd.grad(wanted, [t for t in wide if t is not None], [dout.double() for dout in douts])
    return relative_error([*got, *grads], [*wanted, *wanted_grads])


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on `device` of the same strides."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device).copy_(tensor)


def scan_inputs(batch: int, dim: int, seqlen: int, dstate: int, dtype: torch.dtype, channel_last: bool) -> list[Tensor]:
    """u, delta, A, B, C, D, z, delta_bias."""

    def rows(size: int) -> Tensor:
        if channel_last:
            return torch.randn(batch, seqlen, size).to(dtype).transpose(1, 2)
        return torch.randn(batch, size, seqlen).to(dtype)

    u, delta, z = (rows(dim) for _ in range(3))
    A, B, C = -torch.rand(dim, dstate) * 3 - 0.1, rows(dstate), rows(dstate)
    return [u, delta, A, B, C, torch.randn(dim), z, torch.rand(dim) - 2]


class _Float64Scan(torch.autograd.Function):
    """The scan of the torch kernel set in float64, whose gradient is computed without a graph of every step."""

    @staticmethod
    def forward(ctx, reverse, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.reverse = reverse
        u, delta, A, B, C, *rest = tensors
        given = u, delta, A, B.unsqueeze(1), C.unsqueeze(1), *rest
        return torch_kernels.scan_forward(*given, True, reverse, False)[0]

    @staticmethod
    def backward(ctx, dout):
        u, delta, A, B, C, *rest = ctx.saved_tensors
        given = dout, u, delta, A, B.unsqueeze(1), C.unsqueeze(1), *rest, u.new_empty(0)
        du, ddelta, dA, dB, dC, *others = torch_kernels.scan_backward(*given, True, ctx.reverse)
        return None, du, ddelta, dA, dB.squeeze(1), dC.squeeze(1), *others


def scan_error(inputs: Sequence[Tensor], reverse: bool, device: torch.device) -> float:
    """The error of a scan, forward and backward."""
    from mamba_ssm.ops.scan import selective_scan_fn

    def call(*tensors):
        return [selective_scan_fn(*tensors, delta_softplus=True, reverse=reverse)]

    return _against_float64(call, lambda *tensors: [_Float64Scan.apply(reverse, *tensors)], inputs, device)


def direction_inputs(batch: int, dim: int, seqlen: int, dstate: int, dtype: torch.dtype) -> list[Tensor]:
    """xz and the parameters of two directions."""
    rank, found = max(1, dim // 32), [torch.randn(batch, seqlen, 2 * dim).to(dtype)]
    for _ in range(2):
        found += [torch.randn(dim, 4) / 2, torch.randn(dim), torch.randn(rank + 2 * dstate, dim) * dim**-0.5]
        found += [torch.randn(dim, rank) * rank**-0.5, torch.rand(dim) - 2, torch.randn(dim, dstate) / 2]
        found += [torch.randn(dim)]
    return found


def directions_of(tensors: Sequence[Tensor]) -> list[Direction]:
    """The parameters as two directions."""
    first, second = tensors[:DIRECTION_TENSORS], tensors[DIRECTION_TENSORS:]
    return [Direction(*first, False), Direction(*second, True)]


def operators(device: torch.device, options: argparse.Namespace) -> Iterator[Figure]:
    """Every operator, by dtype and layout, and the scan by states and length."""
    torch.manual_seed(0)
    for name in options.dtypes:
        dtype = DTYPES[name]
        limit = LIMITS[dtype]
        sizes = [(2, 24, 21, 16)] if options.tiny else [(2, 64, seqlen, 16) for seqlen in LENGTHS]
        if not options.tiny:
            sizes += [(2, 40, 50, dstate) for dstate in (3, 33, 64, MAX_DSTATE)]
            sizes += [(2, 37, 50, 16), (64, 384, 33, 16), (1, 16, 20_000, 16)]  # odd, many channels a thread, split
        for batch, dim, seqlen, dstate in sizes:
            for channel_last, reverse in ((True, False),) if options.tiny else ((True, True), (False, False)):
                inputs = scan_inputs(batch, dim, seqlen, dstate, dtype, channel_last)
                label = f"scan {batch},{dim},{seqlen},{dstate} {name} {'channel' if channel_last else 'time'}-last"
                error = scan_error(inputs, reverse, device)
                yield Figure("operators", label, error, limit * (10 if seqlen > 4096 else 2))
            inputs = direction_inputs(batch, dim - dim % 2, seqlen, dstate, dtype)
            error = (
                _against_float64(
                    lambda xz, *rest: [directions_fn(xz, directions_of(rest), 0.5, log_decay=True)],
                    lambda xz, *rest: [directions_ref(xz, directions_of(rest), 0.5, log_decay=True)],
                    inputs,
                    device,
                )
                if seqlen <= 1000
                else None
            )
            if error is not None:
                yield Figure("operators", f"directions {batch},{dim},{seqlen},{dstate} {name}", error, limit * 5)
        yield from _small_operators(name, device, options)


def _small_operators(name: str, device: torch.device, options: argparse.Namespace) -> Iterator[Figure]:
    dtype = DTYPES[name]
    for width, dim in ((4, 24),) if options.tiny else ((4, 384), (3, 37), (2, 64)):
        x = torch.randn(3, 45, dim).to(dtype).transpose(1, 2)
        error = _against_float64(
            lambda *tensors: [causal_conv1d_fn(*tensors, activation="silu", reverse=True)],
            lambda *tensors: [causal_conv1d_ref(*tensors, activation="silu", reverse=True)],
            [x, torch.randn(dim, width), torch.randn(dim)],
            device,
        )
        yield Figure("operators", f"convolution {dim} width {width} {name}", error, LIMITS[dtype] * 2)
        error = _against_float64(
            lambda x, mask, *rest: [causal_conv1d_fn(x, *rest, activation="silu", reverse=True, mask=mask)],
            lambda x, mask, *rest: [
                causal_conv1d_ref(x * mask[:, None], *rest, activation="silu", reverse=True) * mask[:, None]
            ],
            [x, (torch.rand(3, 45) < 0.6).float(), torch.randn(dim, width), torch.randn(dim)],
            device,
        )
        yield Figure("operators", f"masked convolution {dim} width {width} {name}", error, LIMITS[dtype] * 2)
    yield from _pooled_operators(name, device, options)
    yield from _merging_operators(name, device, options)
    for size, rms in ((48, True),) if options.tiny else ((192, True), (77, False), (1280, False)):

        def norm(x, residual, weight, bias, rms=rms):
            return layer_norm_fn(x, weight, bias, residual, 1e-5, True, True, rms)

        def reference(x, residual, weight, bias, rms=rms):
            total = x + residual
            centred = total if rms else total - total.mean(-1, keepdim=True)
            scale = (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
            return centred * scale * weight + bias, total

        inputs = [torch.randn(9, size).to(dtype), torch.randn(9, size), torch.randn(size), torch.randn(size)]
        error = _against_float64(norm, reference, inputs, device)
        yield Figure("operators", f"norm {size} {'rms' if rms else 'layer'} {name}", error, LIMITS[dtype] * 2)


def _pooled_operators(name: str, device: torch.device, options: argparse.Namespace) -> Iterator[Figure]:
    """The two passes over the tokens of FastVim's mixer, by the axis that is pooled."""
    dtype, tiny = DTYPES[name], [(24, Lines.of_grid((5, 6)))]
    for dim, lines in tiny if options.tiny else [(384, Lines.of_grid((14, 14))), (37, Lines.of_grid((5, 6), (1, 0)))]:
        tokens = lines.count * lines.length
        x, skip, z = (torch.randn(2, tokens, 2 * dim).to(dtype)[..., :dim] for _ in range(3))
        taps = [torch.randn(size) for _ in range(2) for size in ((dim, 4), (dim,), (dim,))]

        def conv(operator, x, *taps, lines=lines):
            return operator(x, Taps(*taps[:3]), Taps(*taps[3:]), lines)

        error = _against_float64(partial(conv, pooled_conv_fn), partial(conv, pooled_conv_ref), [x, *taps], device)
        yield Figure("operators", f"pooled convolution {dim} of {tokens} {name}", error, LIMITS[dtype] * 2)

        def gate(operator, *tensors, lines=lines):
            return [operator(*tensors, 1e-5, lines, 0.5)]

        groups = torch.randn(2, lines.count, dim).to(dtype)
        inputs = [skip, groups, z, torch.randn(dim), torch.randn(dim)]
        error = _against_float64(partial(gate, pooled_gate_fn), partial(gate, pooled_gate_ref), inputs, device)
        yield Figure("operators", f"pooled gate {dim} of {tokens} {name}", error, LIMITS[dtype] * 2)


def _merging_operators(name: str, device: torch.device, options: argparse.Namespace) -> Iterator[Figure]:
    """Famba-V's matching, to the token, and the means of what it fuses."""
    dtype = DTYPES[name]
    for tokens, channels in ((17, 24),) if options.tiny else ((197, 192), (197, 77), (1025, 384)):
        x, cls, fused = torch.randn(3, tokens, channels).to(dtype), torch.tensor([[tokens // 2]]), tokens // 5
        wanted = match_tokens_ref(x.double(), fused, cls, [-1], False, True, True)
        if dtype is torch.float32:  # two that are nearly alike may be told apart otherwise in half numbers
            matching = match_tokens_fn(x.to(device), fused, cls.to(device), [-1], raster=True)
            differs = sum(int((one.cpu() != other).sum()) for one, other in zip(matching, wanted))
            yield Figure("operators", f"matching {tokens},{channels} {name}", float(differs), 0.0)
        slot, _, count, _ = wanted
        error = _against_float64(
            lambda x, slot=slot, count=count: [merge_tokens_fn(x, slot.to(device), count.to(device))],
            lambda x, slot=slot, count=count: [merge_tokens_ref(x, slot, count)],
            [x],
            device,
        )
        yield Figure("operators", f"merging {tokens},{channels} {name}", error, LIMITS[dtype] * 2)


# --- models ----------------------------------------------------------------------------------------------------------


def _gradients(model: nn.Module, images: Tensor, context) -> tuple[Tensor, Tensor]:
    """(output, all gradients of its mean square, end to end), both in float64 on the CPU."""
    given = {}
    if isinstance(model, MaskedAutoencoder):
        patches = model.pos_embed.shape[1] - model.num_prefix_tokens
        noise = torch.rand(len(images), patches, generator=torch.Generator().manual_seed(1))
        given["noise"] = noise.to(images.device)
    with context:
        out = model(images, **given)
        out = out[0] if isinstance(out, (tuple, list)) else out
        loss = out.double().square().mean()
    model.zero_grad()
    loss.backward()
    grads = [p.grad.flatten().cpu().double() for p in model.parameters() if p.grad is not None]
    return out.detach().cpu().double(), torch.cat(grads)


def models(device: torch.device, options: argparse.Namespace) -> Iterator[Figure]:
    """Every family against itself in float64 on the CPU."""
    for spec, in_half in list(FAMILIES.items())[: 1 if options.tiny else None]:
        torch.manual_seed(0)
        model = build(spec, None, **({"depth": 1} if options.tiny else {}))
        images = torch.randn(2, 3, own_size(model), own_size(model))
        with backend.use("torch"):
            wanted = _gradients(model.double(), images.double(), nullcontext())
        model = model.float().to(device)
        for name in options.dtypes if in_half else ["float32"]:
            dtype = DTYPES[name]
            half = torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)
            out, grads = _gradients(model, images.to(device), half)
            limit = MODEL_LIMITS[dtype]
            yield Figure("models", f"{spec} {name}", relative_error([out], wanted[:1]), limit)
            error = float((grads - wanted[1]).norm() / wanted[1].norm())
            yield Figure("models", f"{spec} {name}, gradients", error, limit)


# --- ways of running -------------------------------------------------------------------------------------------------


def _probe(device: torch.device) -> Callable[[], list[Tensor]]:
    """A step that uses every kernel of a mixer; equal results each time."""
    torch.manual_seed(0)
    tensors = [t.to(device).requires_grad_() for t in direction_inputs(2, 64, 45, 16, torch.float32)]

    def step() -> list[Tensor]:
        out = directions_fn(tensors[0], directions_of(tensors[1:]), 0.5, log_decay=True)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), tensors)]

    return step


def ways(device: torch.device, options: argparse.Namespace) -> Iterator[Figure]:
    """Streams, threads, graphs, repetition, processes and caches, DDP and FSDP2: the same as plainly, bit by bit."""
    step = _probe(device)
    wanted = step()

    def same(what: str, got: Sequence[Tensor]) -> Figure:
        return Figure("ways", what, relative_error(got, wanted), 0.0)

    yield same("a second time", step())
    found: list[list[Tensor]] = []
    threads = [threading.Thread(target=lambda: found.append(step())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(found) != len(threads):
        found.append([torch.full_like(tensor, torch.nan) for tensor in wanted])
    for got in found:
        yield same("in another thread", got)
    if device.type == "cuda":
        yield from _cuda_ways(step, same)
    if not options.tiny:
        yield from _processes(device)


def _cuda_ways(step: Callable[[], list[Tensor]], same: Callable[[str, Sequence[Tensor]], Figure]) -> Iterator[Figure]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = step()
    torch.cuda.current_stream().wait_stream(stream)
    yield same("on another stream", got)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in captured:
        tensor.zero_()
    graph.replay()
    yield same("from a CUDA graph", captured)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step()
    except RuntimeError as error:
        print(f"a step waits for the device: {error}", file=sys.stderr)
        got = [torch.full_like(tensor, torch.nan) for tensor in captured]
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    yield same("without waiting for the device", got)
    yield Figure("ways", "training from a CUDA graph", replayed_error(torch.device("cuda")), 1e-5)


def replayed_error(device: torch.device) -> float:
    """How far weights lie apart after six steps of the program's own replay and after six that are called."""
    trained = []
    for is_replayed in (False, True):
        torch.manual_seed(0)
        model = build("vim_nano_patch4_32", None, depth=2, num_classes=10).to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

        def step(images: Tensor, targets: Tensor, model: nn.Module = model) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(model(images), targets)
            loss.backward()
            return loss.detach()

        call = graphs.Replayed(step, graphs.Recorder(device)) if is_replayed else step
        for number in range(2 * graphs.WARM_UP):
            optimizer.zero_grad(set_to_none=not is_replayed)
            generator = torch.Generator().manual_seed(number)
            call(torch.randn(4, 3, 32, 32, generator=generator).to(device), torch.arange(4, device=device))
            optimizer.step()
        if is_replayed and not call.replays:
            return float("nan")
        trained.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    return relative_error(trained[1:], trained[:1])


_CHILD = """
import sys, torch
from benchmarks import gpu_parity
device = torch.device(sys.argv[1])
torch.save([t.cpu() for t in gpu_parity._probe(device)()], sys.argv[2])
"""
_PARALLEL = """
import sys, torch
from torch.distributed import init_process_group
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from benchmarks.cases import build
device = torch.device(sys.argv[1])
init_process_group("nccl" if device.type == "cuda" else "gloo", f"file://{sys.argv[3]}", rank=0, world_size=1)
torch.manual_seed(0)
plain = build("vim_nano_patch4_32", None, depth=2).to(device)
images, losses = torch.randn(2, 3, 32, 32, device=device), []
for kind in ("plain", "ddp", "fsdp2"):
    model = plain
    if kind == "ddp":
        model = DistributedDataParallel(plain)
    if kind == "fsdp2":
        for layer in plain.layers:
            fully_shard(layer)
        model = fully_shard(plain)
    plain.zero_grad()
    model(images).square().mean().backward()
    grads = [p.grad for p in plain.parameters() if p.grad is not None]
    losses.append(torch.stack([getattr(g, "full_tensor", lambda g=g: g)().norm() for g in grads]).cpu())
torch.save(losses, sys.argv[2])
"""


def _child(code: str, *arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=os.environ | environment)


def _processes(device: torch.device) -> Iterator[Figure]:
    """Eight at once on a cold cache, one on a cache that it may not write, and parallel wrappers in one process."""
    wanted = [tensor.cpu() for tensor in _probe(device)()]
    with tempfile.TemporaryDirectory() as folder:
        for label, count, cache in (("cold", PROCESSES, "cold"), ("read-only", 1, "cold"), ("no", 1, "/dev/null/none")):
            cache = str(Path(folder) / cache)
            if label == "read-only":
                os.chmod(cache, 0o500)
            files = [str(Path(folder) / f"{label}{number}.pt") for number in range(count)]
            running = [_child(_CHILD, str(device), file, **{_nvrtc.CACHE_VARIABLE: cache}) for file in files]
            codes = [child.wait() for child in running]
            for file, code in zip(files, codes):
                error = relative_error(torch.load(file), wanted) if code == 0 else float("nan")
                yield Figure("ways", f"{count} process(es), {label} cache", error, 0.0)
        if Path(folder, "cold").is_dir():
            os.chmod(Path(folder, "cold"), 0o700)
        file = str(Path(folder) / "parallel.pt")
        code = _child(_PARALLEL, str(device), file, str(Path(folder) / "store")).wait()
        plain, *others = torch.load(file) if code == 0 else [torch.ones(1)] + 2 * [torch.full((1,), torch.nan)]
        for name, got in zip(("DDP", "FSDP2"), others):
            yield Figure("ways", name, relative_error([got], [plain]), 1e-4)


PARTS = {"operators": operators, "models": models, "ways": ways}

if __name__ == "__main__":
    sys.exit(main())
