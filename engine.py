"""Training for one epoch, and evaluation."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F
from torch.optim import Optimizer

import utils
from checkpoints import Run
from datasets import EvalBatches, TrainBatches, check_labels
from fusion import Meter
from utils import PeerError, Progress, RunError, StopRequest, UsageError, nearest, number

_logger = logging.getLogger(__name__)

SCHEDULES = ("cosine", "tanh", "step", "multistep", "plateau", "poly", "wsd", "rsqrt", "constant", "none")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of optimiser, schedule, averaging and numbers."""
    positive, natural = number(float, 0, above=True), number(float, 0)
    group = parser.add_argument_group("optimiser")
    group.add_argument("--opt", default="adamw", metavar="NAME", help="timm optimiser (default: adamw)")
    group.add_argument("--opt-eps", type=positive, default=1e-8, help="default: 1e-8")
    group.add_argument("--opt-betas", type=number(float, 0, 1, below=True), nargs="+", default=None, metavar="BETA")
    group.add_argument("--clip-grad", type=positive, default=None, metavar="NORM", help="default: none")
    group.add_argument("--momentum", type=natural, default=0.9, help="default: 0.9")
    group.add_argument("--weight-decay", type=natural, default=0.05, help="default: 0.05")
    group.add_argument("--attn-only", action="store_true", help="train only mixers, head and position embedding")
    utils.add_switch(
        group,
        ["--train-mode"],
        ["--no-train-mode"],
        default=True,
        help="train in training mode, with drop-path and so on",
    )

    group = parser.add_argument_group("learning rate")
    group.add_argument("--sched", default="cosine", choices=SCHEDULES, help="default: cosine")
    group.add_argument("--lr", type=natural, default=5e-4, help="learning rate at a total batch of 512 (default: 5e-4)")
    group.add_argument("--unscale-lr", action="store_true", help="take --lr as it is for any batch")
    group.add_argument("--lr-noise", type=number(float, 0, 1), nargs="+", default=None, metavar="SHARE")
    group.add_argument("--lr-noise-pct", type=positive, default=0.67, help="default: 0.67")
    group.add_argument("--lr-noise-std", type=natural, default=1.0, help="default: 1.0")
    group.add_argument("--warmup-lr", type=natural, default=1e-6, help="default: 1e-6")
    group.add_argument("--min-lr", type=natural, default=1e-5, help="default: 1e-5")
    group.add_argument("--decay-epochs", type=positive, default=30.0, help="of 'step' (default: 30)")
    group.add_argument("--warmup-epochs", type=number(int, 0), default=5, help="default: 5")
    group.add_argument(
        "--cooldown-epochs", type=number(int, 0), default=10, help="accepted for published commands; changes nothing"
    )
    group.add_argument("--patience-epochs", type=number(int, 0), default=10, help="of 'plateau' (default: 10)")
    group.add_argument("--decay-rate", "--dr", type=positive, default=0.1, help="default: 0.1")

    group = parser.add_argument_group("weight averaging")
    utils.add_switch(
        group, ["--model-ema"], ["--no-model-ema"], default=True, help="keep a moving average of the weights"
    )
    group.add_argument("--model-ema-decay", type=number(float, 0, 1), default=0.99996, help="default: 0.99996")
    group.add_argument("--model-ema-force-cpu", action="store_true", help="keep the average in the CPU's memory")

    group = parser.add_argument_group("numbers")
    utils.add_switch(
        group, ["--if_amp"], ["--no_amp"], default=True, help="automatic mixed precision; on a CPU only if asked for"
    )
    group.add_argument(
        "--amp-dtype", default=None, choices=("bfloat16", "float16"), help="default: bfloat16 if it is native"
    )
    utils.add_switch(
        group, ["--if_continue_inf"], ["--no_continue_inf"], default=False, help="skip steps with a non-finite loss"
    )
    utils.add_switch(
        group, ["--if_nan2num"], ["--no_nan2num"], default=False, help="replace non-finite outputs by numbers"
    )
    utils.add_switch(
        group,
        ["--if_random_cls_token_position"],
        ["--no_random_cls_token_position"],
        default=False,
        help="put the class token anywhere in training",
    )
    utils.add_switch(
        group,
        ["--if_random_token_rank"],
        ["--no_random_token_rank"],
        default=False,
        help="shuffle the tokens in training",
    )


def check(args: argparse.Namespace) -> None:
    """Refuse optimiser flags that contradict each other or name nothing."""
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
    if not args.train_mode and (args.if_random_cls_token_position or args.if_random_token_rank):
        raise UsageError("--no-train-mode contradicts random token positions, which belong to training.")


def build_precision(
    args: argparse.Namespace, device: torch.device
) -> tuple[Callable[[], contextlib.AbstractContextManager], torch.amp.GradScaler]:
    """The context of a forward pass, in the arithmetic that the flags ask for, and the gradient scaler, which only
    float16 needs."""
    native = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = getattr(torch, args.amp_dtype or ("bfloat16" if native else "float16"))
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
    mesh = init_device_mesh(device.type, (utils.world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def build_optimizer(args: argparse.Namespace, model: nn.Module, total_batch: int) -> tuple[Optimizer, Scheduler | None]:
    """timm's optimiser and schedule for `model`, the learning rate linear in `total_batch` / 512 unless
    --unscale-lr."""
    settings = argparse.Namespace(**vars(args))
    settings.lr = args.lr if args.unscale_lr else args.lr * total_batch / 512
    try:
        optimizer = create_optimizer(settings, model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # timm's farewell to 'plateau', whose state is saved here
            scheduler, _ = create_scheduler(settings, optimizer)
    except (TypeError, ValueError, AssertionError, IndexError) as error:
        raise UsageError(f"--opt {args.opt} with --sched {args.sched} cannot be built: {error}.") from error
    return optimizer, scheduler


def _fetch(batches: Iterator[tuple[Tensor, Tensor]], stop: StopRequest) -> tuple[Any, bool]:
    """The next batch (None at the end) and whether any process wants to stop; one that fails to load ends all of
    them."""
    batch, failure = None, None
    try:
        batch = next(batches, None)
    except UsageError as error:
        failure = error
    stops, fails = utils.any_process(bool(stop), failure is not None)
    if failure is not None:
        failure.is_own = True
        raise failure
    if fails:
        raise PeerError
    if stops and not stop:
        stop.name = "a signal to another process"
    return batch, stops


def train_one_epoch(
    run: Run, batches: TrainBatches, args: argparse.Namespace, stop: StopRequest, board: utils.Board
) -> dict[str, float] | None:
    """Train from `run.step` to the end of `run.epoch`; returns the epoch's means, or None if a signal stopped it
    before that.

    Either way `run` stands at a step boundary. Raises RunError, with the step named and the batch saved, for a
    non-finite loss, unless `--if_continue_inf` skips such steps.
    """
    run.model.train(args.train_mode)
    run.trained.train(args.train_mode)
    classes = args.nb_classes
    options = {name: True for name in ("if_random_cls_token_position", "if_random_token_rank") if getattr(args, name)}
    progress = Progress(f"Epoch {run.epoch}", batches.steps, run.device, start=run.step)
    source = batches.epoch(run.epoch, run.step)
    before = run.seconds
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    while batches.steps is None or run.step < batches.steps:
        batch, stops = _fetch(source, stop)
        if stops:
            progress.close()
            return None
        if batch is None:
            break
        images, targets = batch[0], batch[1]
        check_labels(targets, classes, "training")
        samples = images.to(run.device, non_blocking=True)
        labels = targets.to(run.device, non_blocking=True)
        if run.mixup is not None:
            samples, labels = run.mixup(samples, labels)
        if args.cosub:
            samples = torch.cat([samples, samples])
        with run.autocast():
            outputs = run.trained(samples, **options)
            if args.if_nan2num:
                outputs = _nan_to_num(outputs)
            loss = run.criterion(samples, outputs, labels)
        value = loss.item()
        run.step += 1
        if utils.any_process(not math.isfinite(value))[0]:
            _skip_or_stop(run, args, value, samples, labels)
        else:
            _update(run, args, loss)
            parts = {name: float(part) for name, part in getattr(run.criterion, "parts", {}).items()}
            run.meters.update(len(images), loss=value, **parts)
            run.meters.update(lr=run.optimizer.param_groups[0]["lr"])
        run.seconds = before + progress.elapsed()
        progress.step(run.step, len(images) * utils.world_size(), str(run.meters))
        if run.updates % utils.Board.every == 1:
            board.add({"train/step_loss": value, "train/step_lr": run.optimizer.param_groups[0]["lr"]}, run.updates)
    progress.close()
    return run.meters.averages()


def _nan_to_num(outputs: Any) -> Any:
    if isinstance(outputs, Tensor):
        return torch.nan_to_num(outputs)
    if hasattr(outputs, "_replace"):  # a named tuple, such as PruningOutput: the logits are what the loss sees
        return outputs._replace(logits=torch.nan_to_num(outputs.logits))
    return tuple(torch.nan_to_num(output) for output in outputs)


def _update(run: Run, args: argparse.Namespace, loss: Tensor) -> None:
    """One step of the optimiser down the gradient of `loss`."""
    scaler = run.scaler
    run.optimizer.zero_grad()
    scaler.scale(loss).backward()
    if args.clip_grad is not None:
        scaler.unscale_(run.optimizer)
        parameters = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
        dispatch_clip_grad(parameters, args.clip_grad, mode="norm")
    scaler.step(run.optimizer)
    scaler.update()
    run.updates += 1
    if run.ema is not None:
        run.ema.update(run.model)


def _skip_or_stop(run: Run, args: argparse.Namespace, value: float, samples: Tensor, labels: Tensor) -> None:
    """Keep the batch of a non-finite loss for inspection; then go on without it, or end the run."""
    place = f"epoch {run.epoch} step {run.step - 1}"
    kept = ""
    if args.output_dir and not math.isfinite(value):
        file = Path(args.output_dir, f"nonfinite_epoch{run.epoch}_step{run.step - 1}_rank{utils.rank()}.pt")
        batch = {"samples": samples.cpu(), "targets": labels.cpu(), "loss": value}
        with contextlib.suppress(OSError, RuntimeError):
            torch.save(batch, file)
            kept = f"; its batch is in {file}"
    told = f"The loss is {value} at {place}" if not math.isfinite(value) else f"Another process has no loss at {place}"
    if not args.if_continue_inf:
        if math.isfinite(value):
            raise PeerError
        raise RunError(f"{told}{kept}; the run stops (--if_continue_inf skips such steps).")
    _logger.warning("%s%s; the step is skipped.", told, kept)


@torch.no_grad()
def evaluate(
    batches: EvalBatches,
    model: nn.Module,
    device: torch.device,
    autocast: Callable[[], contextlib.AbstractContextManager],
    num_classes: int,
    stop: StopRequest | None = None,
    meters: Sequence[Meter] = (),
) -> dict[str, float] | None:
    """Loss, acc1 and acc5 (percent) of `model` over all of `batches`, exact for any number of processes, and the shares
    that `meters` find kept on the way.

    Returns None if a signal stopped it. Every process must call this together.
    """
    model.eval()
    stop = stop if stop is not None else StopRequest()
    sums = [0.0, 0.0, 0.0, 0.0]  # loss, top 1, top 5, images
    progress = Progress("Test", batches.steps, device)
    source = iter(batches)
    step = 0
    # a stream does not know its steps, and its processes may not have equally many: no talk among them then
    while batches.steps is None or step < batches.steps:
        batch, stops = _fetch(source, stop) if batches.steps is not None else (next(source, None), False)
        step += 1
        if stops:
            progress.close()
            return None
        if batch is None:
            if batches.steps is None:
                break
            if isinstance(model, FSDPModule):  # others still need this process's share of the parameters
                model(torch.zeros(1, 3, *model.patch_embed.img_size, device=device))
            continue
        check_labels(batch[1], num_classes, "evaluation")
        images, targets = (part.to(device, non_blocking=True) for part in batch[:2])
        with contextlib.ExitStack() as active:
            for context in (autocast(), *meters):
                active.enter_context(context)
            outputs = model(images)
        outputs = (outputs if isinstance(outputs, Tensor) else outputs[0]).float()
        sums[0] += F.cross_entropy(outputs, targets, reduction="sum").item()
        top1, top5 = utils.accuracy(outputs, targets)
        sums = [sums[0], sums[1] + top1, sums[2] + top5, sums[3] + len(images)]
        shares = utils.world_size() if batches.shared else 1
        progress.step(step, len(images) * shares, f"acc1: {100 * sums[1] / sums[3]:.2f}  loss: {sums[0] / sums[3]:.4f}")
    progress.close()
    if batches.shared:
        sums = utils.sum_over_processes(sums)
        for meter in meters:
            meter.sums = torch.tensor(utils.sum_over_processes(meter.sums.tolist()), dtype=torch.float64)
    if sums[3] == 0:
        raise UsageError("The evaluation set holds no image.")
    stats = {"loss": sums[0] / sums[3], "acc1": 100 * sums[1] / sums[3], "acc5": 100 * sums[2] / sums[3]}
    for meter in meters:
        stats |= meter.shares()
    return stats
