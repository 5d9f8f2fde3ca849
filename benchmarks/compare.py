"""Train and evaluate the methods and a DeiT of the same size, several seeds each; then one table and one plot.

    python -m benchmarks.compare                                # handwritten digits, nano models: minutes on a CPU
    python -m benchmarks.compare DATA_PATH --data-set IMNET     # tiny models, on all GPUs of this machine: days
    python -m benchmarks.compare DATA_PATH --data-set CIFAR --size nano --epochs 50 --fine-tune-epochs 10
    python -m benchmarks.compare --methods merging              # every strategy and order of Famba-V
    python -m benchmarks.compare --methods policies             # DyVM's learned decisions against random and even ones

Flags that this program does not know go to every run. In --output_dir each run has a folder of its own; a finished run
is not repeated, and one that was interrupted goes on. There are then `table.md`, `table.csv`, `pareto.png`, and
`results.json` with every run and the machine.

Training time is the median epoch times the number of epochs, evaluation left out; where a method starts from a trained
model, that one's time is in it. Speed and peak memory are measured at the end, all models in turns in one process
(`benchmarks.throughput` says how), on test images and with the weights that training left: inference at one and a half
times the training batch, as in evaluation, and one whole training step, teacher included.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import benchmarks.peers  # noqa: F401 - its models join the registry
import checkpoints
import datasets
import engine
import main as program
import utils
from benchmarks import plot
from benchmarks.flops import model_flops
from benchmarks.summary import markdown, read_log
from benchmarks.throughput import Case, kept_directions, machine, peak_memory, time_in_turns
from fusion.token_merging import TokenMerging

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Method:
    """What is compared: its title, its model's name without the size, its flags at sizes other than nano and at nano,
    and whether it starts from the plain model's weights."""

    title: str
    family: str
    flags: tuple[str, ...] = ()
    nano_flags: tuple[str, ...] | None = None
    fine_tunes: bool = False


def _merging(strategy: str, tokens: int, layer: int = 0) -> tuple[str, ...]:
    return "--fusion-strategy", strategy, "--fusion-layer", str(layer), "--fusion-token", str(tokens)


# fifteen epochs do not make a gate sure of itself: without noise in the end, it decides as it does in inference
_SURE = ("--gate-noise-end", "0")
_BLOCK, _BOTH = ("--pruning", "block"), ("--pruning", "both")
METHODS = {
    "none": Method("Vim", "vim"),
    "upper": Method("Famba-V (upper)", "vim", _merging("upper", 8, 4), _merging("upper", 8, 2)),
    "fastvim": Method("FastVim", "fastvim"),
    "dyvm-token": Method("DyVM (token)", "dyvm", ("--pruning", "token"), fine_tunes=True),
    "dyvm-block": Method("DyVM (block)", "dyvm", _BLOCK, _BLOCK + _SURE, fine_tunes=True),
    "dyvm-both": Method("DyVM (both)", "dyvm", _BOTH, _BOTH + _SURE, fine_tunes=True),
    # attention does not stand the Vims' learning rate on the digits
    "deit": Method("DeiT", "deit", (), ("--lr", "1e-3")),
}
# what is compared unless --methods says otherwise
COMPARED = tuple(METHODS)
# The other strategies of Famba-V as published for Vim-S on CIFAR-100; at nano size each, "upper" too, fuses 40 of the
# 64 patches on the way.
METHODS |= {
    "all": Method("Famba-V (all)", "vim", _merging("all", 7), _merging("all", 5)),
    "alternate": Method("Famba-V (alternate)", "vim", _merging("alternate", 14), _merging("alternate", 10)),
    "lower": Method("Famba-V (lower)", "vim", _merging("lower", 9, 5), _merging("lower", 8, 5)),
}
_STRATEGIES = ("all", "alternate", "lower", "upper")
for _name in _STRATEGIES:
    _method, _raster = METHODS[_name], ("--fusion-order", "raster")
    METHODS[f"{_name}-raster"] = Method(
        f"{_method.title[:-1]}, raster order)", "vim", _method.flags + _raster, _method.nano_flags + _raster
    )
for _policy in ("random", "static"):
    _flags = (*_BOTH, "--pruning-policy", _policy)
    METHODS[f"dyvm-{_policy}"] = Method(f"DyVM (both, {_policy})", "dyvm", _flags, fine_tunes=True)
GROUPS = {
    "merging": ("none", *_STRATEGIES, *(f"{name}-raster" for name in _STRATEGIES)),
    "policies": ("none", "dyvm-both", "dyvm-random", "dyvm-static"),
}
SIZES = {"nano": "nano_patch4_32"} | {size: f"{size}_patch16_224" for size in ("tiny", "small", "base")}

# Few images want little augmentation and a high learning rate, like those of scripts/quickstart.sh, and no other for
# fine-tuning; many images get Vim-Ti's published recipe, and DyVM's.
DIGITS_RECIPE = (
    *("--batch-size", "32", "--unscale-lr", "--lr", "3e-3", "--warmup-epochs", "1", "--drop-path", "0"),
    *("--mixup", "0", "--cutmix", "0", "--reprob", "0", "--aa", "none", "--color-jitter", "0", "--no-repeated-aug"),
    *("--no-model-ema", "--num_workers", "0"),
)
RECIPE = ("--batch-size", "128", "--drop-path", "0", "--weight-decay", "0.1")
FINE_TUNING = ("--lr", "3e-5", "--min-lr", "1e-6", "--weight-decay", "1e-8", "--warmup-epochs", "5")


class Run(NamedTuple):
    """One training: a method and a seed, where it lies, the run it starts from, and the program's flags, those that
    name folders left out."""

    name: str
    method: str
    seed: int
    folder: Path
    start: Run | None
    epochs: int
    flags: list[str]

    def command(self) -> list[str]:
        """All flags of the program."""
        start = ["--model-path", str(self.start.folder / "checkpoint.pth")] if self.start else []
        return [*self.flags, *start, "--output_dir", str(self.folder), "--resume", "auto"]

    def finished(self) -> bool:
        """Whether the last epoch is done."""
        return (self.folder / "log.txt").is_file() and len(read_log(self.folder)) >= self.epochs


def plan(args: argparse.Namespace, more: Sequence[str]) -> list[Run]:
    """All runs in the order they are made: seed after seed, so that a machine's drift meets every method alike."""
    digits = args.data_set == "DIGITS"
    data = ["--data-set", args.data_set, *(["--data-path", str(args.data_path)] if args.data_path else [])]
    shared = [*(DIGITS_RECIPE if digits else RECIPE), *data, "--device", args.device]
    tuning = () if digits else FINE_TUNING
    runs: dict[str, Run] = {}
    for seed in args.seeds:
        for name in args.methods:
            method = METHODS[name]
            nano = args.size == "nano" and method.nano_flags is not None
            epochs = args.fine_tune_epochs if method.fine_tunes else args.epochs
            flags = ["--model", f"{method.family}_{SIZES[args.size]}", *shared]
            flags += [*(method.nano_flags if nano else method.flags), *(tuning if method.fine_tunes else ()), *more]
            flags += ["--epochs", str(epochs), "--seed", str(seed)]
            full = f"{name}-seed{seed}"
            start = runs[f"none-seed{seed}"] if method.fine_tunes else None
            runs[full] = Run(full, name, seed, args.output_dir / full, start, epochs, flags)
    return list(runs.values())


def check(runs: Sequence[Run]) -> None:
    """Refuse, before any work, flags that the program refuses and folders that hold runs with other flags."""
    for run in runs:
        # a model to start from is yet to be trained; any file will do to check the flags
        program.parse([*run.flags, *(["--model-path", __file__] if run.start else [])])
        known = run.folder / "flags.json"
        if known.exists() and json.loads(known.read_text()) != run.flags:
            raise utils.UsageError(f"{run.folder} holds a run with other flags; wanted another --output_dir.")


# ---------------------------------------------------------------------------------------------------------------------
# Training

Launch = Callable[[Run, argparse.Namespace], int]


def launch(run: Run, args: argparse.Namespace) -> int:
    """Train in processes of its own, what they say in console.txt; returns the exit code.

    A signal that ends this program lets the run save itself first.
    """
    command = [sys.executable, "-m"]
    if args.gpus > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(args.gpus), "-m"]
    with open(run.folder / "console.txt", "a") as console:
        child = subprocess.Popen(
            [*command, "benchmarks.peers", *run.command()], cwd=ROOT, stdout=console, stderr=subprocess.STDOUT
        )
        try:
            return child.wait()
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()


def train_all(runs: Sequence[Run], args: argparse.Namespace, launch: Launch) -> None:
    """Make the runs that are not finished; raises RunError for one that fails."""
    waiting = [run for run in runs if not run.finished()]
    if len(waiting) < len(runs):
        print(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished already.")
    began = time.perf_counter()
    for number, run in enumerate(waiting):
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "flags.json").write_text(json.dumps(run.flags) + "\n")
        print(f"[{number + 1}/{len(waiting)}] {run.name} ...", end=" ", flush=True)
        code = launch(run, args)
        if code != 0 or not run.finished():
            console = run.folder / "console.txt"
            last = console.read_text().splitlines()[-1:] if console.exists() else []
            raise utils.RunError(f"{run.name} failed with exit code {code}: {''.join(last)} (see {console})")
        elapsed = time.perf_counter() - began
        left = elapsed / (number + 1) * (len(waiting) - number - 1)
        accuracy = read_log(run.folder)[-1]["test_acc1"]
        print(f"top-1 {accuracy:.2f} %, {elapsed / 60:.1f} min gone, about {left / 60:.1f} min left", flush=True)


def training_seconds(run: Run) -> float:
    """The median epoch of `run` times its epochs, and the same for the run it starts from."""
    own = statistics.median(line["seconds"] for line in read_log(run.folder)) * run.epochs
    return own + (training_seconds(run.start) if run.start else 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def trained_case(run: Run, device: torch.device) -> tuple[Case, argparse.Namespace]:
    """The model of a finished run, and the first batch of its evaluation."""
    checkpoint = checkpoints.read(str(run.folder / "checkpoint.pth"))
    args = argparse.Namespace(**checkpoint["args"])
    model = program.build_model(args, args.nb_classes)
    model.load_state_dict(checkpoint["model"])
    test_set, _ = datasets.build_dataset(False, args)
    images = next(iter(datasets.EvalBatches(test_set, args)))[0]
    dtype = "float32"
    if args.if_amp:
        dtype = args.amp_dtype or ("bfloat16" if device.type == "cpu" or torch.cuda.is_bf16_supported() else "float16")
    return Case(model.eval().to(device), images.to(device), dtype=dtype), args


def training_peak(run: Run, device: torch.device) -> int:
    """Bytes in use at the peak of one training step of `run`, by the program's own code, on one device."""
    args = program.parse(run.command())
    args.distributed, args.output_dir = False, ""
    utils.seed_everything(args.seed)
    train_set, args.nb_classes = datasets.build_dataset(True, args)
    batches = datasets.TrainBatches(train_set, args)
    model = program.build_model(args, args.nb_classes)
    teacher = program.load_weights(args, model)
    model = model.to(device)
    state = program.build_run(args, model, teacher, device, batches.batch_size)
    one = _OneBatch(next(iter(batches.epoch(0))))

    def step() -> None:
        state.step = 0
        engine.train_one_epoch(state, one, args, utils.StopRequest(), utils.Board(None))

    step()
    state.optimizer.zero_grad()  # a step begins without gradients, whose release would go unseen
    averaged = [state.ema.module] if state.ema is not None else []
    held = [tensor for part in (model, state.criterion, *averaged) for tensor in (*part.parameters(), *part.buffers())]
    held += [value for entry in state.optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    return peak_memory(step, device, [tensor for tensor in (*held, *one.batch) if tensor.device.type == device.type])


class _OneBatch:
    """Stands for an epoch of a single batch."""

    steps = 1

    def __init__(self, batch: Sequence[Tensor]) -> None:
        self.batch = batch

    def epoch(self, epoch: int, start: int = 0) -> Any:
        return iter([self.batch])


def kept_shares(model: Any, line: dict[str, Any]) -> tuple[float, float]:
    """The shares of tokens that reach the end and of scan directions that run, by a trained model and its log's last
    line."""
    tokens = [value for name, value in sorted(line.items()) if name.startswith("test_kept_tokens_")]
    for method in getattr(model, "site_methods", ()):
        if isinstance(method, TokenMerging):
            tokens.append(method.schedule[-1] / method.num_tokens)
    return tokens[-1] if tokens else 1.0, line.get("test_kept_directions", 1.0)


def measure(runs: Sequence[Run], args: argparse.Namespace) -> list[dict[str, Any]]:
    """What every finished run achieved and costs, one entry a run."""
    device = torch.device(args.device)
    cases, found = [], []
    train_peaks: dict[str, int] = {}
    for run in runs:
        if run.method not in train_peaks:  # the same for every seed
            train_peaks[run.method] = training_peak(run, device)
        case, settings = trained_case(run, device)
        kept = kept_directions(case.model, case.images)
        flops = model_flops(case.model, settings.input_size, kept)
        tokens, directions = kept_shares(case.model, read_log(run.folder)[-1])
        cases.append(case)
        found.append(
            {
                "run": run.name,
                "method": run.method,
                "seed": run.seed,
                "top1": read_log(run.folder)[-1]["test_acc1"],
                "kept_tokens": tokens,
                "kept_directions": directions,
                "parameters": sum(parameter.numel() for parameter in case.model.parameters()),
                "flops_published": flops.published,
                "flops_full": flops.full,
                "train_seconds": training_seconds(run),
                "train_peak_bytes": train_peaks[run.method],
                "eval_peak_bytes": case.peak_bytes(),
            }
        )
    times = time_in_turns(cases, device, args.speed_seconds)
    for entry, case, taken in zip(found, cases, times):
        entry["images_per_second"] = len(case.images) / statistics.median(taken)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Table and plot

COLUMNS = {
    "method": "{title}",
    "top-1, %": "{top1_text}",
    "tokens at the end": "{kept_tokens_text}",
    "directions run": "{kept_directions_text}",
    "parameters, M": "{parameters_text}",
    "FLOPs published, M": "{flops_published_text}",
    "FLOPs full, M": "{flops_full_text}",
    "training, s": "{train_seconds_text}",
    "peak training memory, MiB": "{train_peak_bytes_text}",
    "inference, images/s": "{images_per_second_text}",
    "peak inference memory, MiB": "{eval_peak_bytes_text}",
}
# a figure's unit and decimals in the Markdown table, and whether its spread is shown
FIGURES = {
    "top1": (1, 2, True),
    "kept_tokens": (1, 2, False),
    "kept_directions": (1, 2, False),
    "parameters": (1e6, 3, False),
    "flops_published": (1e6, 2, False),
    "flops_full": (1e6, 2, False),
    "train_seconds": (1, 1, True),
    "train_peak_bytes": (2**20, 1, False),
    "images_per_second": (1, 0, True),
    "eval_peak_bytes": (2**20, 1, False),
}
PANELS = {"images_per_second": ("inference, images/s", True), "train_seconds": ("training time, s", False)}


def summarize(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a method: every figure's mean over the seeds, its standard deviation as `<name>_spread` (0 for one seed),
    lowest and highest, and as `<name>_text` what a reader sees of it."""
    rows = []
    for name in dict.fromkeys(entry["method"] for entry in found):
        entries = [entry for entry in found if entry["method"] == name]
        row: dict[str, Any] = {"method": name, "title": METHODS[name].title, "seeds": len(entries)}
        for figure, (unit, decimals, show_spread) in FIGURES.items():
            values = [entry[figure] for entry in entries]
            mean, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
            row |= {
                figure: mean,
                f"{figure}_spread": spread,
                f"{figure}_min": min(values),
                f"{figure}_max": max(values),
            }
            shown = f" ± {spread / unit:.{decimals}f}" if show_spread and len(values) > 1 else ""
            row[f"{figure}_text"] = f"{mean / unit:.{decimals}f}{shown}"
        rows.append(row)
    return rows


def report(
    runs: Sequence[Run], found: Sequence[dict[str, Any]], about: dict[str, Any], args: argparse.Namespace
) -> str:
    """Write table.md, table.csv, pareto.png and results.json; returns the Markdown table with what it was made on."""
    rows = summarize(found)
    seeds = f"mean ± standard deviation over {len(args.seeds)} seeds" if len(args.seeds) > 1 else "one seed"
    fine_tuned = [METHODS[name].title for name in args.methods if METHODS[name].fine_tunes]
    made = f"{args.data_set}, {args.size} models, {_epochs(args.epochs)}, {seeds}"
    if fine_tuned:
        made += (
            f"; {', '.join(fine_tuned)}: {_epochs(args.fine_tune_epochs)} from the trained Vim, whose training is in "
            "their time"
        )
    made += f". {', '.join(f'{name} {value}' for name, value in about.items())}.\n"
    text = f"{markdown(rows, COLUMNS)}\n\n{made}"
    output: Path = args.output_dir
    (output / "table.md").write_text(text)
    with open(output / "table.csv", "w", newline="") as file:
        kept = [name for name in rows[0] if not name.endswith("_text")]
        writer = csv.DictWriter(file, kept, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    plot.pareto(rows, "top1", PANELS).savefig(output / "pareto.png", dpi=150)
    results = {"machine": about, "flags": {run.name: run.flags for run in runs}, "runs": list(found)}
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return text


def _epochs(count: int) -> str:
    return f"{count} epoch{'s' if count > 1 else ''}"


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """This program's flags, and those that go to every run."""
    parser = utils.Parser(
        prog="benchmarks.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.usage = "%(prog)s [DATA_PATH] [FLAGS...]"
    parser.add_argument("--data-set", default=None, help="default: DIGITS, or IMNET with a DATA_PATH")
    parser.add_argument("--size", default=None, choices=SIZES, help="default: nano, or tiny with a DATA_PATH")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(COMPARED),
        choices=[*METHODS, *GROUPS],
        metavar="METHOD",
        help=f"{', '.join(METHODS)}, or {' or '.join(GROUPS)} (default: {' '.join(COMPARED)})",
    )
    parser.add_argument("--seeds", type=utils.number(int, 0), nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--epochs", type=utils.number(int, 1), default=None, help="default: 15, or 300")
    parser.add_argument("--fine-tune-epochs", type=utils.number(int, 1), default=None, help="default: 15, or 30")
    parser.add_argument("--output_dir", "--output-dir", type=Path, default=Path("output/compare"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument(
        "--gpus",
        type=utils.number(int, 1),
        default=int(os.environ.get("GPUS", torch.cuda.device_count() or 1)),
        help="processes of a run (default: $GPUS, or one a GPU)",
    )
    parser.add_argument(
        "--speed-seconds", type=utils.number(float, 0), default=60.0, help="for timing all models (default: 60)"
    )
    # first or not at all: the value of a flag that is not known here would be taken for it
    argv = list(sys.argv[1:] if argv is None else argv)
    data_path = argv.pop(0) if argv and not argv[0].startswith("--") and argv[0] != "-h" else ""
    args, more = parser.parse_known_args(argv)
    args.data_path = "" if data_path == "-" else data_path
    own_data = bool(args.data_path)
    args.data_set = args.data_set or ("IMNET" if own_data else "DIGITS")
    args.size = args.size or ("tiny" if own_data else "nano")
    args.epochs = args.epochs or (300 if own_data else 15)
    args.fine_tune_epochs = args.fine_tune_epochs or (30 if own_data else 15)
    args.output_dir = args.output_dir.resolve()
    if args.data_path:
        args.data_path = Path(args.data_path).resolve()
    args.methods = [name for given in args.methods for name in GROUPS.get(given, (given,))]
    if "none" not in args.methods and any(METHODS[name].fine_tunes for name in args.methods):
        raise utils.UsageError("DyVM starts from the trained Vim: wanted none among --methods.")
    # what others start from comes first
    args.methods = [name for name in METHODS if name in args.methods]
    return args, more


def main(argv: Sequence[str] | None = None, launch: Launch = launch) -> int:
    """Run what is missing, then write and print the table; returns the exit code."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        args, more = parse(argv)
        runs = plan(args, more)
        check(runs)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        train_all(runs, args, launch)
        print("Measuring speed and memory ...", flush=True)
        print(f"\n{report(runs, measure(runs, args), machine(torch.device(args.device)), args)}")
        print(f"In {args.output_dir}: table.md, table.csv, pareto.png, results.json.")
    except utils.UsageError as error:
        print(f"benchmarks.compare: error: {error}", file=sys.stderr)
        return 2
    except utils.RunError as error:
        print(f"\nbenchmarks.compare: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
