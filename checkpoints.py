"""Saving, resuming, and reading every published checkpoint format.

`python checkpoints.py IN OUT [--ema]` turns any readable checkpoint into bare weights, as `.safetensors` or `.pth`.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import urllib.request
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from timm.scheduler import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

import utils
from embeddings import resize_pos_embed
from fusion.token_state import join_cls
from utils import Meters, RunError, UsageError

_logger = logging.getLogger(__name__)

OUTPUT_FILES = ("checkpoint.pth", "best_checkpoint.pth", "log.txt", "args.json")
EMA_ENTRIES = ("model_ema", "state_dict_ema", "ema_state_dict")
WEIGHT_ENTRIES = ("model", "state_dict", "model_state_dict")
EMA_PREFIXES = ("model_ema.", "ema_model.", "ema.")
WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")
# Lightning checkpoints carry settings of these packages beside the weights; they are read as inert stand-ins.
INERT_PACKAGES = ("omegaconf", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "pathlib")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of checkpoints."""
    group = parser.add_argument_group("checkpoints")
    group.add_argument("--output_dir", "--output-dir", default="", metavar="DIR", help="where checkpoints and logs go")
    group.add_argument(
        "--resume", default="", metavar="FILE", help="go on from FILE, or from the newest of --output_dir (auto)"
    )
    group.add_argument(
        "--finetune", default="", metavar="FILE", help="start from FILE's weights, at any image size and class count"
    )


def check(args: argparse.Namespace) -> None:
    """Refuse checkpoint flags that contradict each other or name no file."""
    model_path = getattr(args, "model_path", "")
    for flag, value in (("--resume", args.resume), ("--finetune", args.finetune), ("--model-path", model_path)):
        if value and not is_url(value) and not (flag == "--resume" and value == "auto") and not Path(value).is_file():
            raise UsageError(f"{flag} {value} is no file.")
    if args.resume == "auto" and not args.output_dir:
        raise UsageError("--resume auto looks in --output_dir, which is missing.")
    if args.eval and not (args.resume or args.finetune or model_path):
        raise UsageError("--eval wants weights: --resume FILE, --finetune FILE or --model-path FILE.")
    if args.output_dir and Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        raise UsageError(f"--output_dir {args.output_dir} is a file; wanted a folder.")


# ---------------------------------------------------------------------------------------------------------------------
# Files


def is_url(path: str) -> bool:
    """Whether `path` is an address rather than a file."""
    return "://" in path


class _OnlyHttps(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.startswith("https://"):
            raise UsageError(f"{req.full_url} redirects to {newurl}; wanted https all the way.")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(url: str) -> Path:
    """Fetch `url` once into torch.hub's cache; returns the file.

    A name such as `vim-0123abcd.pth` carries the start of its SHA-256, which is then checked. Raises UsageError for
    anything but https, a wrong hash, or a failed transfer.
    """
    if not url.startswith("https://"):
        raise UsageError(f"{url} is not fetched; wanted a file or an https:// address.")
    target = Path(torch.hub.get_dir(), "checkpoints", url.partition("?")[0].rpartition("/")[2] or "checkpoint.pth")
    if target.is_file():
        return target
    digest = hashlib.sha256()

    def copy(file: IO[bytes]) -> None:
        with urllib.request.build_opener(_OnlyHttps).open(url, timeout=60) as response:
            while chunk := response.read(1 << 20):
                digest.update(chunk)
                file.write(chunk)
        wanted = re.search(r"-([0-9a-f]{8,64})\.", target.name)
        if wanted and not digest.hexdigest().startswith(wanted[1]):
            raise UsageError(f"{url} has SHA-256 {digest.hexdigest()[:12]}...; wanted {wanted[1]}.")

    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_atomically(target, copy)
    except OSError as error:
        raise UsageError(f"{url} cannot be fetched: {error}.") from error
    return target


def write_atomically(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in the place of `path` once it is whole on the
    disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save(path: Path, checkpoint: dict[str, Any]) -> bool:
    """Write `checkpoint` to `path`, replacing it only once the new file is whole; False, with a warning, if that
    fails."""
    try:
        write_atomically(path, lambda file: torch.save(checkpoint, file))
    except (OSError, RuntimeError) as error:
        _logger.warning("%s could not be written (%s); the one before it stays.", path, str(error).splitlines()[0])
        return False
    return True


def copy_whole(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, at once and without writing it again where the file system allows."""
    try:
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
            os.replace(temporary, target)
        except OSError:
            with open(source, "rb") as whole:
                write_atomically(target, lambda file: shutil.copyfileobj(whole, file))
    except OSError as error:
        _logger.warning("%s could not be written (%s); the one before it stays.", target, error)


def read(path: str) -> Any:
    """What the checkpoint at `path`, a file or an https URL, holds; nothing in it is run.

    Raises UsageError for a file that is broken or whose pickle calls anything but tensors, plain values and
    `argparse.Namespace`.
    """
    file = download(path) if is_url(path) else Path(path)
    if file.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(file)
        except Exception as error:  # safetensors raises its own error class, and OSError
            raise UsageError(f"{path} is no whole safetensors file: {error}.") from error
    try:
        return _load_pickle(file)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        if foreign:
            raise UsageError(f"{path} is refused: its pickle calls {foreign[1]}, which could run code.") from error
        raise UsageError(f"{path} is no whole checkpoint, or holds more than weights.") from error
    except Exception as error:  # a truncated or flipped file trips torch's reader in any way
        raise UsageError(f"{path} is no whole checkpoint: {_first_line(error)}.") from error


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _load_pickle(file: Path) -> Any:
    stand_ins: list[Any] = [argparse.Namespace]
    with contextlib.suppress(ValueError, RuntimeError):  # raised for files without an archive, which have none to list
        for name in torch.serialization.get_unsafe_globals_in_checkpoint(file):
            if name.partition(".")[0] in INERT_PACKAGES:
                stand_ins.append((type(name.rpartition(".")[2], (_Inert,), {}), name))
    with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # on pickle protocols: what cannot be read raises
        return torch.load(file, map_location="cpu", weights_only=True)


class _Inert:
    """Stands for an object of a package that is not needed; keeps nothing and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def find_weights(checkpoint: Any, path: str, *, ema: bool = False) -> tuple[dict[str, Tensor], str]:
    """The model's weights in what `read` returned, with wrappers' prefixes stripped, and where they were found.

    Known are DeiT's and Vim's dictionaries (`model`, `model_ema`), timm's, bare state dicts, and Lightning's, where
    averaged weights are taken if there are any. `ema` asks for the averaged weights of the others too.
    """
    if not isinstance(checkpoint, dict):
        raise UsageError(f"{path} holds a {type(checkpoint).__name__}; wanted a dictionary of weights.")
    found, origin = checkpoint, "bare weights"
    averaged = [name for name in EMA_ENTRIES if isinstance(checkpoint.get(name), dict)]
    plain = [name for name in WEIGHT_ENTRIES if isinstance(checkpoint.get(name), dict)]
    if averaged and (ema or not plain):
        found, origin = checkpoint[averaged[0]], averaged[0]
    elif ema:
        raise UsageError(f"{path} holds no averaged weights.")
    elif plain:
        found, origin = checkpoint[plain[0]], plain[0]
    weights = {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not weights:
        raise UsageError(f"{path} holds no weights.")
    for prefix in EMA_PREFIXES:
        chosen = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if chosen:
            weights, origin = chosen, f"{origin}, averaged weights under {prefix}"
            break
    stripped = ""
    while True:
        counts = {prefix: sum(name.startswith(prefix) for name in weights) for prefix in WRAPPER_PREFIXES}
        prefix = max(counts, key=counts.__getitem__)
        if counts[prefix] * 2 <= len(weights):
            break
        weights = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        stripped += prefix
    return weights, f"{origin} without prefix {stripped}" if stripped else origin


def load_strictly(
    model: nn.Module, weights: dict[str, Tensor], path: str, name: str, *, may_miss: Callable[[str], bool] | None = None
) -> None:
    """Load `weights` into `model`; raises UsageError with the first differences unless every key and shape agrees.

    Keys for which `may_miss` is true keep their initial value if `weights` lack them.
    """
    own = model.state_dict()
    shapes = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    fitting = {key: _divided(value, own.get(key, value)) for key, value in weights.items() if key not in shapes}
    found = model.load_state_dict(fitting, strict=False)
    missing = [key for key in found.missing_keys if key not in shapes and not (may_miss and may_miss(key))]
    unexpected = found.unexpected_keys
    told = (
        [f"{key} is missing" for key in missing[:2]]
        + [f"{key} is unknown" for key in unexpected[:2]]
        + [f"{key} is {tuple(weights[key].shape)} instead of {tuple(own[key].shape)}" for key in shapes[:2]]
    )
    if told:
        more = len(missing) + len(unexpected) + len(shapes) - len(told)
        raise UsageError(
            f"{path} is no checkpoint of {name}: {', '.join(told)}{f', and {more} more differences' if more else ''}."
        )


def class_positions(model: nn.Module, num_patches: int) -> tuple[int, ...]:
    """Where class tokens stand in a sequence of `num_patches` patch tokens; timm's models hold them in front."""
    if hasattr(model, "class_token_positions"):
        return tuple(model.class_token_positions(num_patches))
    return tuple(range(getattr(model, "num_prefix_tokens", 0)))


def adapt(weights: dict[str, Tensor], model: nn.Module, path: str) -> tuple[dict[str, Tensor], Callable[[str], bool]]:
    """Fit `weights` to `model`'s image size and class count, and those of a masked autoencoder to a classifier.

    The position embedding is resized, a head for another number of classes is left out, and both are said. Returns the
    weights and a test for the keys that may be missing from them.
    """
    own, weights = model.state_dict(), dict(weights)
    if "decoder_pred.weight" in weights:
        return _adapt_masked(weights, model, path)
    dropped = [
        key
        for key in own
        if key.startswith(("head.", "head_dist.")) and key in weights and weights[key].shape != own[key].shape
    ]
    if dropped:
        heads = {key.partition(".")[0] for key in dropped}
        classes = weights[dropped[0]].shape[0]
        _logger.info("%s: its head for %d classes is left out; the new one starts afresh.", path, classes)
        weights = {key: value for key, value in weights.items() if key.partition(".")[0] not in heads}
        dropped = [key for key in own if key.partition(".")[0] in heads]
    _fit_positions(weights, model, path)
    return weights, lambda key: key in dropped


def _adapt_masked(
    weights: dict[str, Tensor], model: nn.Module, path: str
) -> tuple[dict[str, Tensor], Callable[[str], bool]]:
    """`adapt` for the weights of a masked autoencoder (models_mae.py)."""
    own = model.state_dict()
    if "decoder_pred.weight" in own:
        # fixed positions follow from the grid
        return weights | {key: own[key] for key in ("pos_embed", "decoder_pos_embed")}, lambda key: False
    weights = {key: value for key, value in weights.items() if not key.startswith(("decoder_", "mask_token"))}
    if "cls_token" in weights and "pos_embed" in weights:
        # its class token's row comes first, wherever the token stands
        classes, patches = weights["pos_embed"].tensor_split([1], 1)
        weights["pos_embed"] = join_cls(classes, patches, class_positions(model, patches.shape[1]))
    _fit_positions(weights, model, path)
    _logger.info("%s: the encoder of a masked autoencoder; the head starts afresh.", path)
    return weights, lambda key: key.startswith("head.")


def _fit_positions(weights: dict[str, Tensor], model: nn.Module, path: str) -> None:
    """Resize the position embedding in `weights` to the token grid of `model`."""
    own, name = model.state_dict(), "pos_embed"
    if name in own and name in weights and own[name].shape[1] != weights[name].shape[1]:
        new_grid = tuple(getattr(model, "pos_embed_grid", None) or model.patch_embed.grid_size)
        count = len(class_positions(model, new_grid[0] * new_grid[1]))
        patches = weights[name].shape[1] - count
        side = round(patches**0.5)
        # another number of class tokens leaves no square; load_strictly then tells what differs
        if side * side == patches:
            weights[name] = resize_pos_embed(weights[name], (side, side), new_grid, partial(class_positions, model))
            _logger.info("%s: position embedding resized from %dx%d to %dx%d.", path, side, side, *new_grid)


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@dataclass
class Run:
    """Everything that changes while a model trains, and what it is trained with; a checkpoint holds the former.

    `epoch` is the epoch to train next or now, `step` how many of its steps are done, `updates` how many steps were
    taken in all, `seconds` the time spent on the epoch so far.
    """

    model: nn.Module
    trained: nn.Module  # `model`, or the wrapper around it that shares gradients among processes
    criterion: nn.Module
    optimizer: Optimizer
    scheduler: Scheduler | None
    autocast: Callable[[], contextlib.AbstractContextManager]
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None
    device: torch.device
    epoch: int = 0
    step: int = 0
    updates: int = 0
    best_accuracy: float = 0.0
    seconds: float = 0.0
    meters: Meters = field(default_factory=Meters)
    unwritten: list[dict[str, Any]] = field(default_factory=list)  # lines of log.txt that found the disk full

    def end_epoch(self) -> None:
        """Go to the beginning of the next epoch."""
        self.epoch, self.step, self.seconds, self.meters = self.epoch + 1, 0, 0.0, Meters()

    def capture(self, args: argparse.Namespace, log: dict[str, Any] | None = None) -> dict[str, Any]:
        """The checkpoint of this moment; `log` is the line of the epoch that just ended. Every process must call this
        together."""
        own = {"random": utils.random_state(self.device), "meters": self.meters.state_dict()}
        return {
            "model": _whole(self.model.state_dict()),
            "optimizer": _whole(self.optimizer.state_dict()),
            "lr_scheduler": _scheduler_state(self.scheduler),
            "scaler": self.scaler.state_dict(),
            "model_ema": _whole(self.ema.module.state_dict()) if self.ema is not None else None,
            "args": dict(vars(args)),
            "epoch": self.epoch - 1,  # the last whole one, as DeiT counts
            "step": self.step,
            "updates": self.updates,
            "best_accuracy": self.best_accuracy,
            "seconds": self.seconds,
            "log": log,
            "processes": utils.gather_objects(own),
        }

    def restore(self, checkpoint: dict[str, Any], path: str, name: str) -> None:
        """Go on where `capture` left off, or from the weights alone where another program saved less."""
        weights, origin = find_weights(checkpoint, path)
        load_strictly(self.model, weights, path, name)
        averaged = checkpoint.get("model_ema")
        if self.ema is not None:
            if averaged is None:
                self.ema.set(self.model)
            else:
                load_strictly(self.ema.module, find_weights(checkpoint, path, ema=True)[0], path, name)
        if "optimizer" not in checkpoint or "epoch" not in checkpoint:
            _logger.warning("%s holds %s and no state of a run: training starts from these weights.", path, origin)
            return
        try:
            self.optimizer.load_state_dict(_divided_optimizer(checkpoint["optimizer"], self.optimizer))
            _load_scheduler_state(self.scheduler, checkpoint.get("lr_scheduler") or {})
            if checkpoint.get("scaler"):
                self.scaler.load_state_dict(checkpoint["scaler"])
        except (ValueError, KeyError, RuntimeError) as error:
            raise UsageError(f"{path} was trained with another optimiser: {_first_line(error)}.") from error
        self.epoch = checkpoint["epoch"] + 1
        self.step, self.updates = checkpoint.get("step", 0), checkpoint.get("updates", 0)
        self.best_accuracy, self.seconds = checkpoint.get("best_accuracy", 0.0), checkpoint.get("seconds", 0.0)
        processes = checkpoint.get("processes", [])
        if len(processes) == utils.world_size():
            own = processes[utils.rank()]
            utils.set_random_state(own["random"], self.device)
            self.meters.load_state_dict(own["meters"])
        else:
            _logger.warning("%s was saved by %d processes: random states start afresh.", path, len(processes))


def _whole(state: Any) -> Any:
    """`state` with the tensors that are divided among processes put together, in the memory of the main process."""
    if isinstance(state, DTensor):
        whole = state.full_tensor()
        return whole.cpu() if utils.is_main_process() else None
    if isinstance(state, dict):
        return {name: _whole(value) for name, value in state.items()}
    return state


def _divided(value: Tensor, like: Tensor) -> Tensor:
    """`value`, divided among the processes if `like` is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def _divided_optimizer(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = {
        index: {
            name: _divided(value, parameters[index])
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for name, value in entry.items()
        }
        for index, entry in state["state"].items()
        if index < len(parameters)
    }
    return state | {"state": entries}


def _scheduler_state(scheduler: Scheduler | None) -> dict[str, Any]:
    # timm leaves most of the state of 'plateau' out
    if isinstance(scheduler, PlateauLRScheduler):
        return {"plateau": scheduler.lr_scheduler.state_dict(), "restore_lr": scheduler.restore_lr}
    return scheduler.state_dict() if scheduler is not None else {}


def _load_scheduler_state(scheduler: Scheduler | None, state: dict[str, Any]) -> None:
    if isinstance(scheduler, PlateauLRScheduler) and "plateau" in state:
        scheduler.lr_scheduler.load_state_dict(state["plateau"])
        scheduler.restore_lr = state["restore_lr"]
    elif scheduler is not None and not isinstance(scheduler, PlateauLRScheduler):
        scheduler.load_state_dict(state)


def save_run(
    run: Run, args: argparse.Namespace, output: Path, log: dict[str, Any] | None = None, is_best: bool = False
) -> bool:
    """Write the checkpoint of this moment and, once it is whole, the line of the epoch that just ended.

    Returns whether the checkpoint is on the disk. Raises RunError instead of saving weights that are not finite. Every
    process must call this together.
    """
    broken = [
        name
        for name, parameter in run.model.named_parameters()
        if not bool((parameter.to_local() if isinstance(parameter, DTensor) else parameter).isfinite().all())
    ]
    if utils.any_process(bool(broken))[0]:
        name = broken[0] if broken else "Another process's share of the weights"
        raise RunError(f"{name} is not finite in epoch {run.epoch}; it is not saved, and the run stops.")
    checkpoint = run.capture(args, log)
    if not utils.is_main_process():
        return True
    is_saved = save(output / "checkpoint.pth", checkpoint)
    if is_saved and is_best:
        copy_whole(output / "checkpoint.pth", output / "best_checkpoint.pth")
    if log is not None:
        run.unwritten = append_log(output / "log.txt", [*run.unwritten, log])
    return is_saved


def find(args: argparse.Namespace) -> tuple[str, Any]:
    """The checkpoint that --resume names and where it lies; ("", None) if it is auto and there is none yet.

    Raises UsageError if there are checkpoints and none of them is whole, since going on from nothing would bury them.
    """
    if args.resume != "auto":
        return args.resume, read(args.resume)
    output = Path(args.output_dir)
    files = [file for name in OUTPUT_FILES[:2] if (file := output / name).is_file()]
    for file in sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True):
        try:
            return str(file), read(str(file))
        except UsageError as error:
            _logger.warning("%s Trying the one before it.", error)
    if files or args.eval:
        raise UsageError(f"--resume auto: no checkpoint in {output} is whole; wanted one, or an empty folder to train.")
    return "", None


def _check_run(checkpoint: dict[str, Any]) -> None:
    """Raise ValueError for entries that no run writes and that would only come to light later."""
    for name, kinds, low in (
        ("epoch", int, -1),
        ("step", int, 0),
        ("updates", int, 0),
        ("best_accuracy", (int, float), 0),
        ("seconds", (int, float), 0),
    ):
        value = checkpoint.get(name, 0)
        if not isinstance(value, kinds) or not value >= low:
            raise ValueError(f"{name} is {value!r}")
    for name, kinds in (("log", dict), ("args", (dict, argparse.Namespace))):
        value = checkpoint.get(name)
        if value is not None and not isinstance(value, kinds):
            raise ValueError(f"{name} is a {type(value).__name__}")


def resume(run: Run, args: argparse.Namespace) -> None:
    """Go on from the checkpoint that --resume names, in the middle of an epoch if it was saved there."""
    path, checkpoint = find(args)
    if checkpoint is None:
        _logger.info("--resume auto: no checkpoint in %s yet, starting from the beginning.", args.output_dir)
        return
    if not isinstance(checkpoint, dict):
        raise UsageError(f"{path} holds a {type(checkpoint).__name__}; wanted the checkpoint of a run.")
    try:
        _check_run(checkpoint)
        run.restore(checkpoint, path, args.model)
    except UsageError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, OverflowError) as error:
        told = f"{type(error).__name__}: {_first_line(error)}"
        raise UsageError(f"{path} holds no state to go on from ({told}); wanted --finetune for its weights.") from error
    before = checkpoint.get("args") or {}
    before = vars(before) if isinstance(before, argparse.Namespace) else before
    total, now = before.get("batch_size", 0) * before.get("world_size", 1), args.batch_size * utils.world_size()
    if run.step and total != now:
        run.step = run.step * total // now
        _logger.warning("The total batch was %d and is %d: the epoch goes on at step %d.", total, now, run.step)
    if args.output_dir and utils.is_main_process():
        repair_log(Path(args.output_dir, "log.txt"), run.epoch, checkpoint.get("log"))
    _logger.info("Resumed %s at epoch %d step %d.", path, run.epoch, run.step)


def append_log(file: Path, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add `entries`, a line each, to log.txt; returns those that found no room, of which the file keeps nothing."""
    for number, entry in enumerate(entries):
        size = None
        try:
            with open(file, "ab", buffering=0) as stream:
                size = stream.tell()
                line = json.dumps(entry).encode() + b"\n"
                if stream.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            _logger.warning("log.txt could not be written (%s): its lines wait for the next epoch.", error)
            if size is not None:
                with contextlib.suppress(OSError):
                    os.truncate(file, size)
            return entries[number:]
    return []


def repair_log(file: Path, epoch: int, last: dict[str, Any] | None) -> None:
    """Make log.txt end with epoch `epoch` - 1, whose line is `last`: a kill leaves a line too many or too few."""
    lines = []
    if file.exists():
        for text in file.read_text().splitlines():
            with contextlib.suppress(ValueError):  # a line that a kill cut short
                lines.append(json.loads(text))
    lines = [line for line in lines if line.get("epoch", epoch) < epoch]
    if last is not None and not any(line["epoch"] == last["epoch"] for line in lines):
        lines.append(last)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    if text or file.exists():
        write_atomically(file, lambda stream: stream.write(text.encode()))


def prepare_output(args: argparse.Namespace) -> None:
    """Make --output_dir, remove what killed writes left there, put an earlier run's log aside, and keep the flags."""
    output = Path(args.output_dir)
    text = json.dumps(vars(args), indent=2, default=str)
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name in OUTPUT_FILES:
            for file in output.glob(f".{name}.*.tmp"):
                file.unlink(missing_ok=True)
        if not args.resume and (output / "log.txt").exists():
            os.replace(output / "log.txt", output / "log_before.txt")
            _logger.warning("%s has a run already: its log is now log_before.txt.", output)
        write_atomically(output / "args.json", lambda file: file.write(text.encode()))
    except OSError as error:
        raise UsageError(f"--output_dir {output} cannot be written: {error}.") from error


def main(argv: list[str] | None = None) -> None:
    """Convert a checkpoint to bare weights."""
    parser = utils.Parser(description="Turn any readable checkpoint into bare weights.")
    parser.add_argument("source", help="a file or an https URL")
    parser.add_argument("target", type=Path, help="a .safetensors or .pth file")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights")
    args = parser.parse_args(argv)
    weights, origin = find_weights(read(args.source), args.source, ema=args.ema)
    weights = {name: value.clone().contiguous() for name, value in weights.items()}
    if args.target.suffix == ".safetensors":
        data = safetensors.torch.save(weights)
        write_atomically(args.target, lambda file: file.write(data))
    else:
        write_atomically(args.target, lambda file: torch.save(weights, file))
    _logger.info("%s: %d tensors from %s.", args.target, len(weights), origin)


if __name__ == "__main__":
    utils.setup_logging()
    try:
        main()
    except UsageError as error:
        raise SystemExit(f"{error}") from None
