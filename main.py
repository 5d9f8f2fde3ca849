"""Train or evaluate a Vision Mamba, plain or with any of the three efficiency methods.

    python main.py --model vim_nano_patch4_32 --input-size 32
    torchrun --nproc-per-node 8 main.py --model vim_tiny_patch16_224 --data-set IMNET --data-path ...

Flags and defaults are DeiT's and Vim's; `--help` lists them. A mistake of the user's ends with one sentence and exit
code 2.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import augment
import checkpoints
import datasets
import engine
import fusion
import losses
import models_mamba
import utils
from checkpoints import Run
from utils import PeerError, RunError, StopRequest, UsageError, number

_logger = logging.getLogger("main")


def get_args_parser() -> utils.Parser:
    """The parser of all flags."""
    parser = utils.Parser(prog="main.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("model and run")
    group.add_argument("--model", default="vim_nano_patch4_32", metavar="NAME", help="a name of timm's registry")
    group.add_argument(
        "--input-size",
        type=number(int, 1),
        default=224,
        help="image side (default: the model's own, 224 for published names)",
    )
    group.add_argument("--drop", type=number(float, 0, 1, below=True), default=0.0, metavar="RATE", help="default: 0")
    group.add_argument(
        "--drop-path", type=number(float, 0, 1, below=True), default=0.1, metavar="RATE", help="default: 0.1"
    )
    group.add_argument("--batch-size", type=number(int, 1), default=64, help="images a process and step (default: 64)")
    group.add_argument("--epochs", type=number(int, 1), default=300, help="default: 300")
    group.add_argument("--start_epoch", "--start-epoch", type=number(int, 0), default=0, help="default: 0")
    group.add_argument("--eval", action="store_true", help="evaluate only")
    for owner in (engine, losses, augment, datasets, checkpoints, utils, fusion):
        owner.add_arguments(parser)
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the flags and refuse, before any work, those that contradict each other or name what is not there."""
    args, typed = get_args_parser().parse(argv)
    try:
        fusion.check(args, typed)
        name = models_mamba.registry_name(args.model)
        fusion.model_keywords(args, models_mamba.registry_keywords(name))
    except ValueError as error:
        raise UsageError(str(error)) from error
    if not timm.is_model(name):
        own = timm.list_models(module="models_mamba")
        raise UsageError(
            f"--model {name!r} is unknown{utils.nearest(name, own) or utils.nearest(name, timm.list_models())}."
        )
    if "input_size" not in typed:
        args.input_size = timm.get_pretrained_cfg(name).input_size[-1]
    cpu = args.device == "cpu" or (args.device is None and not torch.cuda.is_available())
    if cpu and not typed & {"if_amp", "amp_dtype"}:
        args.if_amp = False
    for owner in (engine, losses, augment, datasets, checkpoints):
        owner.check(args)
    with torch.device("meta"):
        check_model(build_model(args, num_classes=1), args, typed)
    return args


def check_model(model: nn.Module, args: argparse.Namespace, typed: set[str]) -> None:
    """Refuse flags that do not fit `model`, which may be on the meta device."""
    if args.fsdp:
        for flag, wrong in (
            ("--eval", args.eval),
            ("--visualize", args.visualize),
            ("--amp-dtype float16", args.amp_dtype == "float16"),
            ("--model-ema-force-cpu", args.model_ema_force_cpu),
            (f"--model {args.model}", not isinstance(model, models_mamba.VisionMamba)),
        ):
            if wrong:
                raise UsageError(f"{flag} contradicts --fsdp, which trains Vision Mambas without pruning.")
    if not isinstance(model, models_mamba.VisionMamba):
        try:
            model.eval()(torch.empty(2, 3, args.input_size, args.input_size))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise UsageError(f"--input-size {args.input_size} does not fit {args.model}: {error}") from error
        for name in ("if_random_cls_token_position", "if_random_token_rank", "visualize"):
            if getattr(args, name):
                raise UsageError(f"--{name} wants a Vision Mamba; {args.model} does not know it.")
    for method in fusion.methods_of(model):
        try:
            method.check(args, typed)
        except ValueError as error:
            raise UsageError(str(error)) from error


def build_model(args: argparse.Namespace, num_classes: int, **overrides: Any) -> nn.Module:
    """The model that the flags ask for, from timm's registry; `overrides` are keywords that come before the flags."""
    name = models_mamba.registry_name(args.model)
    keywords = fusion.model_keywords(args, models_mamba.registry_keywords(name)) | overrides
    own = name in timm.list_models(module="models_mamba")
    if own or timm.get_pretrained_cfg(name).fixed_input_size:
        keywords["img_size"] = args.input_size
    rates = {"drop_rate": args.drop, "drop_path_rate": args.drop_path}
    if not own:
        # not every model knows these two, and timm leaves out what is None
        rates = {key: rate or None for key, rate in rates.items()}
    keywords |= rates
    try:
        return timm.create_model(name, num_classes=num_classes, **keywords)
    except (ValueError, TypeError) as error:
        raise UsageError(f"--model {name}: {error}") from error


def load_weights(args: argparse.Namespace, model: nn.Module) -> nn.Module | None:
    """Start `model` from --finetune, fitted to its image size and class count, or from --model-path, as it is.

    Returns the teacher that a method wants, which --model-path holds unless it is all that --eval is given.
    """
    teacher, may_miss = None, set()
    taught = [method for method in fusion.methods_of(model) if method.needs_teacher]
    if taught and args.model_path and not (args.eval and not args.resume and not args.finetune):
        teacher = build_plain_model(args, args.nb_classes, model)
        weights, _ = checkpoints.find_weights(checkpoints.read(args.model_path), args.model_path)
        checkpoints.load_strictly(teacher, weights, args.model_path, f"the model that {args.model} prunes")
    if not args.eval:
        may_miss = set().union(*(method.added_parameters() for method in fusion.methods_of(model)))
    path = args.finetune or ("" if args.eval and args.resume else args.model_path)
    if path:
        weights, origin = checkpoints.find_weights(checkpoints.read(path), path)
        _logger.info("Weights from %s (%s).", path, origin)
        if args.finetune:
            weights, is_dropped = checkpoints.adapt(weights, model, path)
            may_miss |= set(filter(is_dropped, model.state_dict()))
        checkpoints.load_strictly(model, weights, path, args.model, may_miss=may_miss.__contains__)
    return teacher


def build_plain_model(args: argparse.Namespace, num_classes: int, model: nn.Module) -> nn.Module:
    """`model` without the methods that want a teacher: their teacher's shape."""
    off = {method.switch: method.off for method in fusion.methods_of(model) if method.needs_teacher}
    return build_model(args, num_classes, **off)


def build_run(
    args: argparse.Namespace, model: nn.Module, teacher: nn.Module | None, device: torch.device, batch_size: int
) -> Run:
    """Optimiser, schedule, averages and loss around `model`, and its wrapper for several processes."""
    if args.attn_only:
        engine.freeze_all_but_mixers(model)
    ema = None
    if args.model_ema:
        ema = ModelEmaV3(model, args.model_ema_decay, device=torch.device("cpu") if args.model_ema_force_cpu else None)
    if args.fsdp:
        engine.shard(model, device)
        if ema is not None:
            engine.shard(ema.module, device)
    optimizer, scheduler = engine.build_optimizer(args, model, batch_size * utils.world_size())
    trained = model
    if args.distributed and not args.fsdp:
        trained = DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            find_unused_parameters=getattr(model, "find_unused_parameters", False),
        )
    autocast, scaler = engine.build_precision(args, device)
    criterion = losses.build_criterion(args, args.nb_classes)
    for method in fusion.methods_of(model):
        criterion = method.criterion(criterion, teacher, args)
    criterion = criterion.to(device)
    mixup = augment.build_mixup(args, args.nb_classes)
    return Run(model, trained, criterion, optimizer, scheduler, autocast, scaler, ema, mixup, device)


def evaluate_only(
    args: argparse.Namespace,
    model: nn.Module,
    teacher: nn.Module | None,
    device: torch.device,
    batches: datasets.EvalBatches,
) -> None:
    """Report the accuracy of the weights that the flags name, and of their moving average if it was saved; of a pruned
    model, whose unpruned `teacher` may be given, what it keeps and saves as well."""
    autocast, _ = engine.build_precision(args, device)
    versions: list[tuple[str, dict[str, Any] | None]] = [("", None)]
    if args.resume:
        path, checkpoint = checkpoints.find(args)
        versions = [("", checkpoints.find_weights(checkpoint, path)[0])]
        if args.model_ema and isinstance(checkpoint, dict) and checkpoint.get("model_ema"):
            versions.append((", moving average", checkpoints.find_weights(checkpoint, path, ema=True)[0]))
    if teacher is not None:
        stats = engine.evaluate(batches, teacher.to(device), device, autocast, args.nb_classes)
        _logger.info("Unpruned (%s): top-1 %.2f %%", args.model_path, stats["acc1"])
    for title, weights in versions:
        if weights is not None:
            checkpoints.load_strictly(model, weights, path, args.model)
        meters = fusion.meters_of(model)
        stats = engine.evaluate(batches, model, device, autocast, args.nb_classes, meters=meters)
        _logger.info(
            "Accuracy on the %d test images%s: top-1 %.2f %%, top-5 %.2f %%, loss %.4f",
            *(len(batches.loader.dataset), title, stats["acc1"], stats["acc5"], stats["loss"]),
        )
        if meters and utils.is_main_process():
            report_methods(args, model, meters, teacher, device, batches, autocast)
        if not title:
            visualize(args, model, batches.loader.dataset, device, meters)


def report_methods(
    args: argparse.Namespace,
    model: nn.Module,
    meters: Sequence[fusion.Meter],
    teacher: nn.Module | None,
    device: torch.device,
    batches: datasets.EvalBatches,
    autocast: Callable[[], contextlib.AbstractContextManager],
) -> None:
    """Say what `meters` saw decided, and how fast and large the model and its plain one are."""
    from benchmarks import pruning

    # speed does not depend on the weights
    plain = build_plain_model(args, args.nb_classes, model) if teacher is None else teacher
    images = next(iter(batches))[0].to(device)
    for meter in meters:
        for line in pruning.report(meter, model, plain.to(device), images, autocast):
            _logger.info("%s", line)


def train(
    args: argparse.Namespace,
    run: Run,
    batches: datasets.TrainBatches,
    tests: datasets.EvalBatches,
    stop: StopRequest,
) -> None:
    """Train to the last epoch; after each, test, save and log."""
    output = Path(args.output_dir) if args.output_dir else None
    board = utils.Board(output if utils.is_main_process() else None, run.updates)
    parameters = sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad)
    while run.epoch < args.epochs:
        for method in fusion.methods_of(run.model):
            method.begin_epoch(run.epoch, args.epochs, args)
        trained = engine.train_one_epoch(run, batches, args, stop, board)
        tested = None
        if trained is not None:
            memory = utils.peak_memory_mib(run.device)
            meters = fusion.meters_of(run.model)
            tested = engine.evaluate(tests, run.model, run.device, run.autocast, args.nb_classes, stop, meters)
        if tested is None:
            break
        if run.scheduler is not None:
            run.scheduler.step(run.epoch + 1, tested["acc1"])
        is_best = tested["acc1"] > run.best_accuracy
        run.best_accuracy = max(run.best_accuracy, tested["acc1"])
        log = {f"train_{name}": value for name, value in trained.items()}
        log |= {f"test_{name}": value for name, value in tested.items()}
        log |= {"epoch": run.epoch, "n_parameters": parameters, "seconds": run.seconds, "peak_memory_mib": memory}
        if batches.steps is not None:
            log["n_images"] = batches.steps * batches.batch_size * utils.world_size()
        run.end_epoch()
        if output:
            checkpoints.save_run(run, args, output, log, is_best)
        board.add({name.replace("_", "/", 1): value for name, value in log.items()}, run.updates)
        _logger.info(
            "Epoch %d: test top-1 %.2f %% (best %.2f %%), loss %.4f, %.1f s",
            *(log["epoch"], tested["acc1"], run.best_accuracy, tested["loss"], log["seconds"]),
        )
    board.close()
    if run.epoch < args.epochs:
        kept = "nothing is saved"
        if output and checkpoints.save_run(run, args, output):
            kept = f"saved in {output}; --resume auto goes on from there"
        _logger.warning("Stopped by %s at epoch %d step %d: %s.", stop.name, run.epoch, run.step, kept)


def visualize(
    args: argparse.Namespace,
    model: nn.Module,
    test_set: Iterable[Any],
    device: torch.device,
    meters: Sequence[fusion.Meter] = (),
) -> None:
    """Save pictures of what `model` does to the first test images, if --visualize asks for them; what `meters` saw its
    methods decide is among them."""
    if not args.visualize or not utils.is_main_process():
        return
    from fusion.visualize import NUM_IMAGES

    images = torch.stack([item[0] for item in itertools.islice(iter(test_set), NUM_IMAGES)]).to(device)
    try:
        fusion.draw(model, images, args.visualize, meters)
    except OSError as error:
        _logger.warning("%s cannot hold the pictures (%s); there are none.", args.visualize, error)


def work(args: argparse.Namespace, stop: StopRequest) -> None:
    """Everything after the flags are read: processes, data, model, weights, then training or evaluation."""
    device = utils.init_processes(args)
    if args.deterministic:
        utils.use_deterministic_algorithms()
    utils.seed_everything(args.seed)
    test_set, args.nb_classes = datasets.build_dataset(False, args)
    tests = datasets.EvalBatches(test_set, args)
    if not args.eval:
        train_set, args.nb_classes = datasets.build_dataset(True, args)
        batches = datasets.TrainBatches(train_set, args)
    model = build_model(args, args.nb_classes)
    teacher = load_weights(args, model)
    model = model.to(device)
    fusion.describe(model)
    if args.eval:
        return evaluate_only(args, model, teacher, device, tests)
    run = build_run(args, model, teacher, device, batches.batch_size)
    utils.seed_everything(args.seed + utils.rank())
    run.epoch = args.start_epoch
    if run.epoch and run.scheduler is not None:
        run.scheduler.step(run.epoch)
    if args.resume:
        checkpoints.resume(run, args)
    if args.output_dir and utils.is_main_process():
        checkpoints.prepare_output(args)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    _logger.info(
        "%s: %.3f M parameters, %d process(es) on %s.", args.model, parameters / 1e6, utils.world_size(), device
    )
    train(args, run, batches, tests, stop)
    if not stop:
        visualize(args, model, test_set, device)


def main(argv: list[str] | None = None, stop: StopRequest | None = None) -> int:
    """Run the program; returns its exit code: 0, 1 for a run that failed, 2 for a mistake of the user's.

    After a run that a signal ended early, which is no failure, `stop` is true.
    """
    utils.setup_logging()
    try:
        with stop if stop is not None else StopRequest() as stop:
            work(parse(argv), stop)
        if dist.is_initialized():
            dist.destroy_process_group()
    except UsageError as error:
        utils.tell_mistake(error)
        return 2
    except (RunError, PeerError) as error:
        if str(error):
            print(f"main.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("main.py: interrupted.", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if not utils.is_lost_peer(error):
            raise
        print(f"main.py: process {utils.rank()} lost another process and ends.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
