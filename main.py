"""Train or evaluate a Vision Mamba at any of the project's tasks, plain or with its efficiency methods.

    python main.py --model vim_nano_patch4_32 --input-size 32
    torchrun --nproc-per-node 8 main.py --model vim_tiny_patch16_224 --data-set IMNET --data-path ...

Flags and defaults are DeiT's and Vim's; `--help` lists those of `--task`. A mistake of the user's ends with one
sentence and exit code 2.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import sys
from pathlib import Path
from typing import Any

import utils.threads  # noqa: F401  before torch

# isort: split

import torch
import torch.distributed as dist
from mamba_ssm.kernels import products
from torch import nn

import checkpoints
import engine
import fusion
import loading
import run as runs
from loading import EvalBatches, TrainBatches
from run import Run
from tasks import TASKS, backbone, implied_task
from tasks.task import Data, Task
from utils import PeerError, RunError, UsageError, nearest, processes
from utils.flags import Parser
from utils.memory import keep_freed_memory, peak_memory_mib
from utils.processes import init_processes, is_main_process, rank, world_size
from utils.randomness import seed_everything, use_deterministic_algorithms
from utils.signals import StopRequest
from utils.telling import Board, setup_logging

_logger = logging.getLogger("main")


def get_args_parser(task: type[Task] | None = None) -> Parser:
    """The parser of all flags of `task`."""
    task = TASKS["classify"] if task is None else task
    parser = Parser(prog="main.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("task and data")
    group.add_argument("--task", default=task.name, choices=[*TASKS], help="default: classify")
    group.add_argument("--data-path", default="", metavar="DIR", help="where the data set lies")
    group.add_argument(
        "--data-set",
        default=task.default_data_set,
        metavar="NAME",
        help=f"{', '.join(task.data_sets)} (default: %(default)s)",
    )
    for owner in (backbone, task, fusion, engine, loading, runs, processes):
        owner.add_arguments(parser)
    return parser


def choose_task(argv: list[str] | None = None) -> type[Task]:
    """The task that the flags name, or imply."""
    parser = Parser(prog="main.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--task")
    name = parser.parse_known_args(argv)[0].task or implied_task(argv)
    if name not in TASKS:
        raise UsageError(f"--task {name!r} is unknown; wanted {', '.join(TASKS)}{nearest(name, TASKS)}.")
    return TASKS[name]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the flags and refuse, before any work, those that contradict each other or name what is not there."""
    task = choose_task(argv)
    parser = get_args_parser(task)
    _refuse_others_flags(parser, task, argv)
    args, typed = parser.parse(argv)
    args.with_teacher = task.with_teacher
    task.set_defaults(args, typed)
    backbone.check(args, typed)
    cpu = args.device == "cpu" or (args.device is None and not torch.cuda.is_available())
    if cpu and not typed & {"if_amp", "amp_dtype", "amp"}:
        args.if_amp = False
    engine.check(args, typed)
    task.check(args, typed)
    runs.check(args)
    with torch.device("meta"):
        model = task.build_model(args, None)
        _check_model(task, model, args, typed)
    return args


def _refuse_others_flags(parser: Parser, task: type[Task], argv: list[str] | None) -> None:
    """Name the task that a flag belongs to, if it is not this one's."""
    for flag in parser.parse_known_args(argv)[1]:
        name = flag.partition("=")[0]
        for other in TASKS if name.startswith("--") else ():
            if other != task.name and name in get_args_parser(TASKS[other])._option_string_actions:
                raise UsageError(f"{name} belongs to --task {other}; this run is --task {task.name}.")


def _check_model(task: type[Task], model: nn.Module, args: argparse.Namespace, typed: set[str]) -> None:
    """Refuse flags that do not fit `model`, which is on the meta device, or one of its methods."""
    if args.fsdp:
        for flag, wrong in (
            ("--eval", args.eval),
            ("--visualize", args.visualize),
            ("--amp-dtype float16", args.amp_dtype == "float16"),
            ("--model-ema-force-cpu", args.model_ema_force_cpu),
            ("--accum-iter", args.accum_iter > 1),
        ):
            if wrong:
                raise UsageError(f"{flag} contradicts --fsdp, which divides plain training.")
    task.check_model(model, args)
    try:
        for method in fusion.methods_of(model):
            method.check(args, typed)
    except ValueError as error:
        raise UsageError(str(error)) from error
    engine.check_replay(task, model, args)


def load_weights(args: argparse.Namespace, task: type[Task], model: nn.Module, data: Data) -> nn.Module | None:
    """Start `model` from --finetune, fitted to its image size and class count, or from --model-path, as it is.

    Returns the teacher of a method that wants one, which --model-path holds unless it is all that --eval is given.
    """
    teacher, may_miss = None, set()
    learners = [method for method in fusion.methods_of(model) if method.needs_teacher and task.with_teacher]
    if learners and args.model_path and not (args.eval and not args.resume and not args.finetune):
        teacher = task.plain_model(args, model, data)
        weights, _ = checkpoints.find_weights(checkpoints.read(args.model_path), args.model_path)
        checkpoints.load_strictly(teacher, weights, args.model_path, f"the model that {args.model} starts from")
    if not args.eval:
        may_miss = fusion.added_parameters(model)
    path = args.finetune or ("" if args.eval and args.resume else args.model_path)
    if path:
        checkpoint = checkpoints.start(model, path, args.model, fit=bool(args.finetune), may_miss=may_miss)
        checkpoints.accept(args, model, checkpoint, path)
    return teacher


def build_run(args: argparse.Namespace, task: Task, batches: TrainBatches) -> Run:
    """Optimiser, schedule and averages around `task`, and its wrapper for several processes."""
    device = task.device
    if args.attn_only:
        engine.freeze_all_but_mixers(task.model)
    if args.model_ema:
        task.setup_ema(args.model_ema_decay, device=torch.device("cpu") if args.model_ema_force_cpu else None)
    if args.fsdp:
        engine.shard(task.model, device)
        if task.has_ema():
            engine.shard(task.get_trainable_module(ema=True).module, device)
    total_batch = batches.batch_size * world_size() * args.accum_iter
    updates = None if batches.steps is None else -(-batches.steps // args.accum_iter)
    optimizer, scheduler = engine.build_optimizer(args, task, total_batch, updates)
    if args.distributed and not args.fsdp:
        task.prepare_distributed(
            [device.index] if device.type == "cuda" else None,
            find_unused_parameters=getattr(task.model, "find_unused_parameters", False),
        )
    autocast, scaler = engine.build_precision(args, device)
    task.begin_training()
    return Run(task, optimizer, scheduler, autocast, scaler, device)


def evaluate_only(args: argparse.Namespace, task: Task, batches: EvalBatches) -> None:
    """Report the figures of the weights that the flags name, and of their moving average if it was saved; of a teacher
    before them, and what methods did on the way."""
    autocast, _ = engine.build_precision(args, task.device)
    versions: list[tuple[str, dict[str, Any] | None]] = [("", None)]
    path = ""
    if args.resume:
        path, checkpoint = runs.find(args)
        versions = [("", checkpoints.find_weights(checkpoint, path)[0])]
        checkpoints.accept(args, task.model, checkpoint, path)
        if isinstance(checkpoint, dict):
            task.load_task_state(checkpoint.get("task_state"))
            averaged = checkpoint.get("model_ema")
            if args.model_ema and isinstance(averaged, dict) and averaged:
                versions.append((", moving average", checkpoints.find_weights(checkpoint, path, ema=True)[0]))
    if task.teacher is not None:
        plain = type(task)(args, task.teacher.to(task.device), task.data, task.device)
        stats = engine.evaluate(plain, batches, autocast, replayed=args.replay_eval)
        title = next(method.teacher_title for method in task.methods if method.needs_teacher)
        _logger.info("%s (%s): %s", title, args.model_path, task.tell(stats))
    for title, weights in versions:
        if weights is not None:
            checkpoints.load_strictly(task.model, weights, path, args.model)
        meters = task.meters()
        stats = engine.evaluate(task, batches, autocast, meters=meters, replayed=args.replay_eval)
        _logger.info("%s on the %d test images%s: %s", task.title, len(batches.dataset), title, task.tell(stats))
        if is_main_process():
            for line in task.report(batches, meters, autocast):
                _logger.info("%s", line)
        if not title:
            draw(args, task, batches, meters)


def train(args: argparse.Namespace, run: Run, batches: TrainBatches, tests: EvalBatches, stop: StopRequest) -> None:
    """Train to the last epoch; after each, test, save and log."""
    task, metric = run.task, run.task.metric
    output = Path(args.output_dir) if args.output_dir else None
    is_main = is_main_process()
    board = Board(output if is_main else None, run.updates, vars(args) if args.mlflow and is_main else None)
    parameters = sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad)
    is_saved, is_tested = True, False
    try:
        while run.epoch < args.epochs:
            task.begin_epoch(run.epoch)
            trained = engine.train_one_epoch(run, batches, args, stop, board)
            tested = None
            if trained is not None:
                memory = peak_memory_mib(run.device)
                if output and not is_tested:  # the first evaluation may fail, by its images for one
                    runs.save_run(run, args, output)
                tested = engine.evaluate(task, tests, run.autocast, stop, task.meters(), args.replay_eval)
            if tested is None:
                break
            is_tested = True
            value = tested[metric.name]
            if run.scheduler is not None:
                run.scheduler.step(run.epoch + 1, value)
            is_best = metric.is_better(value, run.best)
            run.best = value if is_best else run.best
            log = {f"train_{name}": number for name, number in trained.items()}
            log |= {f"test_{name}": number for name, number in tested.items()}
            log |= {"epoch": run.epoch, "n_parameters": parameters, "seconds": run.seconds, "peak_memory_mib": memory}
            if batches.steps is not None:
                log["n_images"] = batches.steps * batches.batch_size * world_size()
            run.end_epoch()
            if output:
                is_saved = runs.save_run(run, args, output, log, is_best)
            board.add({name.replace("_", "/", 1): number for name, number in log.items()}, run.updates)
            _logger.info(
                "Epoch %d: test %s %s (best %s), loss %.4f, %.1f s",
                *(log["epoch"], metric.label or metric.name, metric.told(value), metric.told(run.best)),
                *(tested.get("loss", trained.get("loss", math.nan)), log["seconds"]),
            )
    finally:
        board.close()
    if run.epoch < args.epochs:
        kept = "nothing is saved"
        if output and runs.save_run(run, args, output):
            kept = f"saved in {output}; --resume auto goes on from there"
        _logger.warning("Stopped by %s at epoch %d step %d: %s.", stop.name, run.epoch, run.step, kept)
    elif not is_saved:
        raise RunError(f"The last checkpoint could not be written to {output}; the run's weights are lost.")


def draw(args: argparse.Namespace, task: Task, batches: EvalBatches, meters: list[Any]) -> None:
    """Save pictures of what the task's model does to the first test images, if --visualize asks for them."""
    if not args.visualize or not is_main_process():
        return
    try:
        task.draw(batches.dataset, Path(args.visualize), meters)
    except OSError as error:
        _logger.warning("%s cannot hold the pictures (%s); there are none.", args.visualize, error)


def tell_of_precision(args: argparse.Namespace, device: torch.device) -> None:
    """Say so if mixed precision is a loss here."""
    dtype = engine.amp_dtype(args, device)
    if args.if_amp and device.type == "cpu" and dtype in products.WIDENED:
        name = str(dtype).removeprefix("torch.")
        _logger.warning("--if_amp makes this processor slower, since it has no instructions that multiply %s.", name)


def work(args: argparse.Namespace, stop: StopRequest) -> None:
    """Everything after the flags are read: processes, data, model, weights, then training or evaluation."""
    device = init_processes(args)
    engine.check_processes(args)
    if args.deterministic:
        use_deterministic_algorithms()
    seed_everything(args.seed)
    tell_of_precision(args, device)
    task_class = TASKS[args.task]
    data = task_class.build_data(args, train=not args.eval)
    args.nb_classes = data.num_classes
    tests = task_class.eval_batches(data, args)
    batches = None if args.eval else task_class.train_batches(data, args)
    model = task_class.build_model(args, data)
    teacher = load_weights(args, task_class, model, data)
    fusion.describe(model)
    task = task_class(args, model.to(device), data, device, teacher)
    if batches is None:
        return evaluate_only(args, task, tests)
    run = build_run(args, task, batches)
    seed_everything(args.seed + rank())
    run.epoch = args.start_epoch
    if run.epoch and run.scheduler is not None:
        run.scheduler.step(run.epoch)
    with contextlib.ExitStack() as held:
        last = runs.resume(run, args) if args.resume else None
        if args.output_dir and is_main_process():
            held.enter_context(runs.claim_output(args, task.written))
            runs.prepare_output(args, run.epoch, last)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        _logger.info("%s: %.3f M parameters, %d process(es) on %s.", args.model, parameters / 1e6, world_size(), device)
        train(args, run, batches, tests, stop)
    if not stop:
        draw(args, task, tests, [])


def main(argv: list[str] | None = None, stop: StopRequest | None = None) -> int:
    """Run the program; returns its exit code: 0, 1 for a run that failed, 2 for a mistake of the user's.

    After a run that a signal ended early, which is no failure, `stop` is true.
    """
    setup_logging()
    keep_freed_memory()
    try:
        with stop if stop is not None else StopRequest() as stop:
            work(parse(argv), stop)
        if dist.is_initialized():
            dist.destroy_process_group()
    except UsageError as error:
        processes.tell_mistake(error)
        return 2
    except (RunError, PeerError) as error:
        if str(error):
            print(f"main.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("main.py: interrupted.", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if not processes.is_lost_peer(error):
            raise
        print(f"main.py: process {rank()} lost another process and ends.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
