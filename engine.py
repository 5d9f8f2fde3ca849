"""The one loop: an epoch of training and an evaluation of any task, its optimiser, schedule and precision."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.optim import create_optimizer, create_optimizer_v2, get_optimizer_info, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from loading import EvalBatches, TrainBatches
from run import Run
from tasks.task import Meter, Task
from utils import PeerError, RunError, UsageError, first_line, graphs, nearest
from utils.files import write_atomically
from utils.flags import add_switch, number
from utils.groups import layer_scales, parameter_groups
from utils.memory import reset_peak_memory
from utils.processes import any_process, rank, sum_over_processes, world_size
from utils.signals import StopRequest, StopWaiting
from utils.telling import Board, Progress

_logger = logging.getLogger(__name__)

SCHEDULES = ("cosine", "tanh", "step", "multistep", "plateau", "poly", "wsd", "rsqrt", "constant", "none")
MOST_BATCHES_KEPT = 3  # of a diverging run, for inspection
MOST_SKIPPED = 50  # steps without a finite loss in a row, after which a run has diverged
# How many steps later a step's numbers are looked at, by device: a GPU has the next steps to do while they arrive.
LATE = {"cpu": 0, "cuda": 2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the loop, optimiser, schedule, averaging and numbers."""
    positive, natural = number(float, 0, above=True), number(float, 0)
    group = parser.add_argument_group("loop")
    group.add_argument("--epochs", type=number(int, 1), default=300, help="default: 300")
    group.add_argument(
        "--iterations", type=number(int, 1), default=None, metavar="N", help="train for N steps instead of epochs"
    )
    group.add_argument(
        "--eval-interval", type=number(int, 1), default=None, metavar="N", help="steps per evaluation (default: all)"
    )
    group.add_argument(
        "--accum-iter",
        "--accum_iter",
        type=number(int, 1),
        default=1,
        metavar="N",
        help="batches whose gradients make one step (default: 1)",
    )
    group.add_argument("--eval", action="store_true", help="evaluate only")
    add_switch(
        group,
        ["--train-mode"],
        ["--no-train-mode"],
        default=True,
        help="train in training mode, with drop-path and so on",
    )

    group.add_argument(
        "--cuda-graph",
        action="store_true",
        help="replay forward and backward pass from a CUDA graph, where all batches have one shape",
    )

    group = parser.add_argument_group("optimiser")
    group.add_argument("--opt", default="adamw", metavar="NAME", help="timm optimiser (default: adamw)")
    group.add_argument("--opt-eps", type=positive, default=1e-8, help="default: 1e-8")
    group.add_argument("--opt-betas", type=number(float, 0, 1, below=True), nargs="+", default=None, metavar="BETA")
    group.add_argument("--clip-grad", type=positive, default=None, metavar="NORM", help="default: none")
    group.add_argument("--momentum", type=natural, default=0.9, help="default: 0.9")
    group.add_argument("--weight-decay", type=natural, default=0.05, help="default: 0.05")
    group.add_argument(
        "--weight-decay-end", type=natural, default=None, help="what weight decay becomes, along half a cosine"
    )
    group.add_argument(
        "--layer-decay",
        type=number(float, 0, 1, above=True),
        default=None,
        metavar="RATE",
        help="learn less the nearer to the image: factor on the learning rate from layer to layer",
    )
    group.add_argument("--attn-only", action="store_true", help="train only mixers, head and position embedding")

    group = parser.add_argument_group("learning rate")
    group.add_argument("--sched", default="cosine", choices=SCHEDULES, help="default: cosine")
    group.add_argument("--lr", type=natural, default=5e-4, help="learning rate at a total batch of 512 (default: 5e-4)")
    group.add_argument("--unscale-lr", action="store_true", help="take --lr as it is for any batch")
    group.add_argument(
        "--blr",
        type=natural,
        default=None,
        metavar="LR",
        help="--lr at a total batch of 256",
    )
    group.add_argument("--lr-noise", type=number(float, 0, 1), nargs="+", default=None, metavar="SHARE")
    group.add_argument("--lr-noise-pct", type=positive, default=0.67, help="default: 0.67")
    group.add_argument("--lr-noise-std", type=natural, default=1.0, help="default: 1.0")
    group.add_argument("--warmup-lr", type=natural, default=1e-6, help="default: 1e-6")
    group.add_argument("--min-lr", type=natural, default=1e-5, help="default: 1e-5")
    group.add_argument("--decay-epochs", type=positive, default=30.0, help="of 'step' (default: 30)")
    group.add_argument("--warmup-epochs", type=number(int, 0), default=5, help="default: 5")
    group.add_argument(
        "--warmup-iters", type=number(int, 0), default=None, metavar="N", help="steps of warm-up, by --sched-on-updates"
    )
    group.add_argument(
        "--sched-on-updates", action="store_true", help="change the learning rate at every step, not every epoch"
    )
    group.add_argument(
        "--cooldown-epochs", type=number(int, 0), default=10, help="accepted for published commands; changes nothing"
    )
    group.add_argument("--patience-epochs", type=number(int, 0), default=10, help="of 'plateau' (default: 10)")
    group.add_argument(
        "--decay-rate", "--dr", type=positive, default=0.1, help="of 'step', and the power of 'poly' (default: 0.1)"
    )

    group = parser.add_argument_group("weight averaging")
    add_switch(group, ["--model-ema"], ["--no-model-ema"], default=True, help="keep a moving average of the weights")
    group.add_argument("--model-ema-decay", type=number(float, 0, 1), default=0.99996, help="default: 0.99996")
    group.add_argument("--model-ema-force-cpu", action="store_true", help="keep the average in the CPU's memory")

    group = parser.add_argument_group("numbers")
    add_switch(
        group, ["--if_amp"], ["--no_amp"], default=True, help="automatic mixed precision; on a CPU only if asked for"
    )
    group.add_argument(
        "--amp-dtype", default=None, choices=("bfloat16", "float16"), help="default: bfloat16 if it is native"
    )
    group.add_argument(
        "--amp", default=None, choices=("bfloat16", "float16"), metavar="TYPE", help="--if_amp with --amp-dtype TYPE"
    )
    add_switch(
        group, ["--if_continue_inf"], ["--no_continue_inf"], default=False, help="skip steps with a non-finite loss"
    )


def check(args: argparse.Namespace, typed: set[str]) -> None:
    """Refuse loop, optimiser and schedule flags that contradict each other or name nothing; settle those that stand
    for others."""
    name = args.opt.lower().removeprefix("lookahead_")
    if name not in list_optimizers():
        raise UsageError(f"--opt {args.opt!r} is no timm optimiser{nearest(name, list_optimizers())}.")
    if get_optimizer_info(name).second_order:
        raise UsageError(f"--opt {args.opt} wants second derivatives, which the scan does not have; wanted another.")
    if args.cooldown_epochs != 10:
        _logger.warning(
            "--cooldown-epochs changes nothing: training ends with --epochs, as it did where it comes from."
        )
    if args.lr_noise is not None and len(args.lr_noise) > 2:
        raise UsageError(f"--lr-noise has {len(args.lr_noise)} numbers; wanted where it begins and, maybe, ends.")
    if args.blr is not None and typed & {"lr", "unscale_lr"}:
        raise UsageError("--blr contradicts --lr and --unscale-lr: wanted one learning rate.")
    if args.amp is not None:
        if args.amp_dtype not in (None, args.amp) or ("if_amp" in typed and not args.if_amp):
            raise UsageError(f"--amp {args.amp} contradicts --amp-dtype or --no_amp; wanted one of them.")
        args.if_amp, args.amp_dtype = True, args.amp
    if args.sched_on_updates and args.sched == "plateau":
        raise UsageError("--sched-on-updates contradicts --sched plateau, which waits for evaluations.")
    if args.warmup_iters is not None and not args.sched_on_updates:
        raise UsageError("--warmup-iters wants --sched-on-updates.")
    if args.cuda_graph and not graphs.available(args.device):
        raise UsageError("--cuda-graph wants a CUDA device, and this run is on the CPU; wanted it without.")
    args.steps_per_epoch = None
    if args.iterations is None:
        if args.eval_interval is not None:
            raise UsageError("--eval-interval wants --iterations.")
        return
    if "epochs" in typed:
        raise UsageError("--iterations contradicts --epochs: wanted one of them.")
    interval = args.iterations if args.eval_interval is None else args.eval_interval
    if args.iterations % interval:
        raise UsageError(f"--eval-interval {interval} does not divide --iterations {args.iterations}.")
    share = args.warmup_epochs / args.epochs  # as the recipe has it
    args.epochs, args.steps_per_epoch = args.iterations // interval, interval * args.accum_iter
    typed.add("epochs")  # an epoch is what lies between two evaluations now: no recipe's number of them holds
    if not typed & {"sched_on_updates", "warmup_epochs", "decay_epochs"}:
        args.sched_on_updates = args.sched != "plateau"
    if not typed & {"warmup_epochs", "warmup_iters"}:
        args.warmup_epochs = args.epochs * share if args.sched_on_updates else int(args.epochs * share)


def check_replay(task: type[Task], model: nn.Module, args: argparse.Namespace) -> None:
    """Refuse --cuda-graph where the task or the `model` varies from batch to batch; where evaluation alone does, a
    training says so, and `args.replay_eval` is False."""
    args.replay_eval = args.cuda_graph
    if not args.cuda_graph:
        return
    if args.fsdp:
        raise UsageError("--cuda-graph contradicts --fsdp, which gathers parameters in the middle of a pass.")
    reason = task.varies(model, args, training=not args.eval)
    if reason:
        raise UsageError(f"--cuda-graph replays one pass over a batch, but {reason}; wanted it without.")
    reason = task.varies(model, args, training=False)
    if reason:
        args.replay_eval = False
        _logger.info("Evaluations are not replayed from a CUDA graph: %s.", reason)


def check_processes(args: argparse.Namespace) -> None:
    """Refuse to train from a graph where gradients are shared, once the processes have met."""
    if args.cuda_graph and args.distributed and not args.eval:
        raise UsageError(
            "--cuda-graph trains in one process, since several share gradients in the middle of a backward pass; "
            "wanted one of --cuda-graph and a launcher."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Building


def amp_dtype(args: argparse.Namespace, device: torch.device) -> torch.dtype:
    """Of mixed precision: what the flags say, else bfloat16 where the device has it."""
    native = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    return getattr(torch, args.amp_dtype or ("bfloat16" if native else "float16"))


def build_precision(
    args: argparse.Namespace, device: torch.device
) -> tuple[Callable[[], contextlib.AbstractContextManager], torch.amp.GradScaler]:
    """The context of a forward pass, in the arithmetic that the flags ask for, and the gradient scaler, which only
    float16 needs."""
    dtype = amp_dtype(args, device)
    scaler = torch.amp.GradScaler(device.type, enabled=args.if_amp and dtype is torch.float16)
    return partial(torch.autocast, device.type, dtype=dtype, enabled=args.if_amp), scaler


def freeze_all_but_mixers(model: nn.Module) -> None:
    """Leave only the mixers (or a transformer's attention), the head and the position embedding to be trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = any(part in name for part in (".mixer.", ".attn.")) or name.startswith(
            ("head", "pos_embed")
        )


def shard(model: nn.Module, device: torch.device) -> None:
    """Divide the parameters of `model` among the processes, gathered layer by layer as they are used (FSDP2)."""
    # the marks on single parameters do not outlive the division
    undecayed = model.no_weight_decay()
    model.no_weight_decay = lambda: undecayed
    mesh = init_device_mesh(device.type, (world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def learning_rate(args: argparse.Namespace, total_batch: int) -> float:
    """The learning rate of the flags, linear in `total_batch` / 512, or / 256 for --blr, unless --unscale-lr."""
    if args.blr is not None:
        return args.blr * total_batch / 256
    return args.lr if args.unscale_lr else args.lr * total_batch / 512


def build_optimizer(
    args: argparse.Namespace, task: Task, total_batch: int, updates_per_epoch: int | None = None
) -> tuple[Optimizer, Scheduler | None]:
    """timm's optimiser and schedule for the model of `task`; `total_batch` images make one step."""
    settings = argparse.Namespace(**vars(args))
    settings.lr = learning_rate(args, total_batch)
    if args.opt.lower() == "adamw" and not args.fsdp and next(task.model.parameters()).device.type == "cpu":
        settings.opt_args = {"fused": True}  # one pass over the weights; by itself torch takes ten, on a CPU
    if args.sched_on_updates and not updates_per_epoch:
        raise UsageError("--sched-on-updates wants a data set that says how many images it has.")
    try:
        if args.layer_decay is None:
            optimizer = create_optimizer(settings, task.model)
        else:
            scales = task.layer_scales(args.layer_decay) or layer_scales(task.model, args.layer_decay)
            groups = parameter_groups(task.model, args.weight_decay, scales)
            # timm's own layer decay is of its models' grouping alone
            keywords = {name: value for name, value in optimizer_kwargs(settings).items() if name != "layer_decay"}
            optimizer = create_optimizer_v2(groups, **keywords)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # timm's farewell to 'plateau', whose state is saved here
            keywords = scheduler_kwargs(settings, decreasing_metric=not task.metric.higher_is_better)
            if args.warmup_iters is not None:
                keywords["warmup_epochs"] = args.warmup_iters / updates_per_epoch
            scheduler, _ = create_scheduler_v2(optimizer, **keywords, updates_per_epoch=updates_per_epoch or 0)
    except (TypeError, ValueError, AssertionError, IndexError) as error:
        raise UsageError(f"--opt {args.opt} with --sched {args.sched} cannot be built: {first_line(error)}.") from error
    if scheduler is None:
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
    return optimizer, scheduler


def set_weight_decay(optimizer: Optimizer, start: float, end: float, share: float) -> None:
    """Let the groups that decay do so at what lies between `start` and `end` once a `share` of the run is done."""
    now = end + (start - end) * (1 + math.cos(math.pi * min(share, 1.0))) / 2
    for group in optimizer.param_groups:
        if group["weight_decay"] > 0:
            group["weight_decay"] = now


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def _fetch(batches: Iterator[Any], stop: StopRequest | None, may_stop: bool = True) -> tuple[Any, bool]:
    """The next batch (None at the end) and whether any process wants to stop, if it `may_stop` here; one that fails to
    load ends all of them. A process that is alone waits no longer once it is to stop."""
    batch, failure = None, None
    is_alone = stop is not None and may_stop and world_size() == 1
    try:
        with stop.ends_waiting() if is_alone else contextlib.nullcontext():
            batch = next(batches, None)
    except StopWaiting:
        return None, True
    except UsageError as error:
        failure = error
    except (RuntimeError, OSError) as error:
        reason = re.search(r"DataLoader worker \(pid.*|[^\n]*(No space left on device|/torch_)[^\n]*", str(error))
        if reason is None:
            raise
        told = reason[0].strip().rstrip(".")
        failure = RunError(f"A loader worker died ({told}); wanted more memory (/dev/shm too), or fewer --num_workers.")
    stops, fails = any_process(bool(stop) and may_stop, failure is not None)
    if failure is not None:
        failure.is_own = True
        raise failure
    if fails:
        raise PeerError
    return batch, stops


def train_one_epoch(
    run: Run, batches: TrainBatches, args: argparse.Namespace, stop: StopRequest, board: Board
) -> dict[str, float] | None:
    """Train from `run.step` to the end of `run.epoch`; returns the epoch's means, or None if a signal stopped it
    before that.

    Either way `run` stands where an optimiser's step ended. Raises RunError, with the step named and the batch saved,
    for a non-finite loss, unless `--if_continue_inf` skips such steps; on a GPU that is found `LATE` steps on.
    """
    task = run.task
    task.train(args.train_mode)
    progress = Progress(f"Epoch {run.epoch}", batches.steps, run.device, start=run.step)
    source = batches.epoch(run.epoch, run.step)
    before = run.seconds
    reset_peak_memory(run.device)
    is_whole, passes = True, _Passes(run, args)
    waiting: deque[_Late] = deque()
    # a step is only left out by who knows its loss
    late = 0 if args.if_continue_inf else LATE[run.device.type]
    while batches.steps is None or run.step < batches.steps:
        place = run.step % args.accum_iter  # in the group of batches that make one step
        batch, stops = _fetch(source, stop, place == 0)
        if stops:
            stop.name = stop.name or "a signal to another process"
            while waiting:
                passes.look_at(waiting.popleft(), board)
            progress.close()
            return None
        if batch is None:
            break
        inputs, targets, count = task.prepare(batch, training=True)
        group = args.accum_iter
        if batches.steps is not None:
            group = min(group, batches.steps - (run.step - place))
        is_last = place + 1 == group
        if place == 0:
            run.optimizer.zero_grad(set_to_none=not args.cuda_graph)  # a graph adds to what it was recorded with
            is_whole = True
        with contextlib.nullcontext() if is_last else task.no_sync():
            reading = passes(inputs, targets, group)
        point = run.updates + 1 if is_last else 0
        waiting.append(_Late(run.step, inputs, targets, count, reading, _rate(run.optimizer), point))
        run.step += 1
        while len(waiting) > late:
            is_whole = passes.look_at(waiting.popleft(), board) and is_whole
        if is_last and is_whole:
            _update(run, args, batches.steps)
        run.seconds = before + progress.elapsed()
        progress.step(run.step, count * world_size(), lambda: str(run.meters))
    while waiting:
        passes.look_at(waiting.popleft(), board)
    progress.close()
    return run.meters.averages()


class _Late(NamedTuple):
    """A step whose numbers are still to be looked at; `point` is the update that it ends, 0 for none."""

    step: int
    inputs: Any
    targets: Any
    count: int
    reading: graphs.Reading
    rate: float
    point: int


class _Passes:
    """The forward and backward passes of an epoch, and what is read of them.

    A graph of them, with `--cuda-graph`, is of this epoch alone: what `begin_epoch` changes is recorded anew.
    """

    def __init__(self, run: Run, args: argparse.Namespace) -> None:
        self.run, self.args, self.meters = run, args, run.task.meters()
        self.names: list[str] = []
        self.before: list[tuple[Tensor, Tensor]] = []  # buffers, and what they were
        # which does not know of this object: a graph's memory is wanted back as soon as its epoch is over
        plain = partial(_forward_backward, run, self.meters, self.names)
        self._pass = graphs.Replayed(plain, graphs.Recorder(run.device)) if args.cuda_graph else plain

    def __call__(self, inputs: Any, targets: Any, group: int) -> graphs.Reading:
        """Add the gradients of a batch, of `group` that make one step, to the others'."""
        for meter in self.meters:  # a batch's own shares join the epoch's figures, which outlive an interruption
            meter.sums.zero_()
        if self.args.if_continue_inf:  # BatchNorm would keep what a batch without a finite loss has done to it
            self.before = [(buffer, buffer.clone()) for buffer in self.run.model.buffers()]
        return graphs.Reading([*self._pass(inputs, targets, group), *(meter.sums for meter in self.meters)])

    def look_at(self, late: _Late, board: Board) -> bool:
        """Add the numbers of a step to the run's; whether its loss is finite, on all processes, or else as
        `_skip_or_stop`."""
        run, numbers = self.run, late.reading.arrived()
        values = {name: float(number) for name, number in zip(self.names, numbers)}
        value = values.pop("loss")
        if late.point and late.point % Board.every == 1:
            board.add({"train/step_loss": value, "train/step_lr": late.rate}, late.point)
        if any_process(not math.isfinite(value))[0]:
            run.skipped += 1
            _skip_or_stop(run, self.args, value, late)
            for buffer, value in self.before:
                buffer.copy_(value)
            return False
        run.skipped = 0
        for meter, sums in zip(self.meters, numbers[len(self.names) :]):
            values |= meter.with_sums(sums).shares()
        run.meters.update(late.count, loss=value, **values)
        run.meters.update(lr=late.rate)
        return True


def _forward_backward(
    run: Run, meters: Sequence[Meter], names: list[str], inputs: Any, targets: Any, group: int
) -> list[Tensor]:
    """The loss of a batch and its parts, whose `names`, the same every time, are put into that list."""
    with run.autocast(), _active(meters):
        result = run.task(inputs, targets)
    loss = result["loss"]
    run.scaler.scale(loss / group if group > 1 else loss).backward()
    parts = {name: part for name, part in result.items() if name != "output"}
    names[:] = parts
    return [
        part.detach() if isinstance(part, Tensor) else torch.full((), part, device=loss.device, dtype=torch.double)
        for part in parts.values()
    ]


@contextlib.contextmanager
def _active(meters: Sequence[Meter]) -> Iterator[None]:
    """Let `meters` see what the model does."""
    with contextlib.ExitStack() as entered:
        for meter in meters:
            entered.enter_context(meter)
        yield


def _rate(optimizer: Optimizer) -> float:
    """The learning rate of what learns fastest."""
    return max(group["lr"] for group in optimizer.param_groups)


def _update(run: Run, args: argparse.Namespace, steps: int | None) -> None:
    """One step of the optimiser down the gradients that have gathered."""
    scaler = run.scaler
    if args.weight_decay_end is not None and steps:
        done = run.epoch + run.step / steps
        set_weight_decay(run.optimizer, args.weight_decay, args.weight_decay_end, done / args.epochs)
    if args.clip_grad is not None:
        scaler.unscale_(run.optimizer)
        parameters = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
        dispatch_clip_grad(parameters, args.clip_grad, mode="norm")
    scaler.step(run.optimizer)
    scaler.update()
    run.updates += 1
    if args.sched_on_updates and run.scheduler is not None:
        run.scheduler.step_update(run.updates)
    run.task.update_ema()


def _skip_or_stop(run: Run, args: argparse.Namespace, value: float, late: _Late) -> None:
    """Keep the batch of a non-finite loss for inspection; then go on without it, or end the run."""
    place = f"epoch {run.epoch} step {late.step}"
    kept = ""
    folder = Path(args.output_dir) if args.output_dir else None
    if folder and not math.isfinite(value) and len([*folder.glob("nonfinite_*.pt")]) < MOST_BATCHES_KEPT * world_size():
        file = folder / f"nonfinite_epoch{run.epoch}_step{late.step}_rank{rank()}.pt"
        batch = {"samples": _on_cpu(late.inputs), "targets": _on_cpu(late.targets), "loss": value}
        with contextlib.suppress(OSError, RuntimeError):
            write_atomically(file, lambda stream: torch.save(batch, stream))
            kept = f"; its batch is in {file}"
    told = f"The loss is {value} at {place}" if not math.isfinite(value) else f"Another process has no loss at {place}"
    if not args.if_continue_inf:
        if math.isfinite(value):
            raise PeerError
        raise RunError(f"{told}{kept}; the run stops (--if_continue_inf skips such steps).")
    if run.skipped >= MOST_SKIPPED:
        raise RunError(f"{told}, the {run.skipped}th step in a row without one; the run has diverged, and stops.")
    _logger.warning("%s%s; the step is skipped.", told, kept)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {name: _on_cpu(part) for name, part in value.items()}
    return [_on_cpu(part) for part in value] if isinstance(value, (list, tuple)) else value


@torch.no_grad()
def evaluate(
    task: Task,
    batches: EvalBatches,
    autocast: Callable[[], contextlib.AbstractContextManager],
    stop: StopRequest | None = None,
    meters: Sequence[Meter] = (),
    replayed: bool = False,
) -> dict[str, float] | None:
    """The figures of the task's evaluator over all of `batches`, exact for any number of processes, and those of the
    `meters` of its methods; passes are `replayed` from a CUDA graph where that is asked for.

    Returns None if a signal stopped it. Every process must call this together.
    """
    task.eval()
    evaluator = task.create_evaluator()
    progress = Progress("Test", batches.steps, task.device)
    source = iter(batches)
    step = 0

    def predict(inputs: Any) -> Any:
        with autocast():
            return task.predict(inputs)

    replay = graphs.Replayed(predict, graphs.Recorder(task.device)) if replayed else None
    with _active(meters):
        # a stream does not know its steps, and its processes may not have equally many: no talk among them then
        while batches.steps is None or step < batches.steps:
            batch, stops = _fetch(source, stop) if batches.steps is not None else (next(source, None), False)
            step += 1
            if stops:
                if stop is not None:
                    stop.name = stop.name or "a signal to another process"
                progress.close()
                return None
            if batch is None:
                if batches.steps is None:
                    break
                if isinstance(task.model, FSDPModule):  # others still need this process's share of the parameters
                    task.predict(task.filler())
                continue
            inputs, targets, count = task.prepare(batch, training=False)
            # an evaluator may keep what the next replay overwrites
            output = predict(inputs) if replay is None else tree_map(_cloned, replay(inputs))
            evaluator.update(output, targets)
            progress.step(step, count * (world_size() if batches.shared else 1), lambda: _told(evaluator.summary()))
    progress.close()
    for meter in meters:
        sums = meter.sums.tolist()
        meter.sums = torch.tensor(sum_over_processes(sums) if batches.shared else sums, dtype=torch.float64)
    stats = dict(evaluator.compute(distributed=batches.shared and world_size() > 1))
    for meter in meters:
        stats |= meter.shares()
    return stats


def _cloned(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _told(figures: dict[str, float]) -> str:
    return "  ".join(f"{name}: {value:.4f}" for name, value in figures.items())
