"""From a file to weights: every published checkpoint format, read without running anything in it.

`python checkpoints.py IN OUT [--ema]` turns any readable checkpoint into bare weights, as `.safetensors` or `.pth`.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import logging
import math
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from embeddings import resize_pos_embed
from fusion.registry import accept as accept_by_methods
from fusion.token_state import join_cls
from models_registry import class_place, names_of_same_weights
from utils import UsageError, first_line
from utils.files import download, is_url, write_atomically
from utils.flags import Parser
from utils.telling import setup_logging

_logger = logging.getLogger(__name__)

EMA_ENTRIES = ("model_ema", "state_dict_ema", "ema_state_dict")
WEIGHT_ENTRIES = ("model", "state_dict", "model_state_dict")
EMA_PREFIXES = ("model_ema.", "ema_model.", "ema.")
WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "net.", "encoder.")
# beside these a backbone is a part of the model, and its prefix no wrapper's
DENSE_HEADS = ("decode_head.", "roi_head.", "roi_heads.", "rpn.", "rpn_head.", "proposal_generator.")
# Checkpoints carry settings and figures of these packages beside the weights; they are read as inert stand-ins.
INERT_PACKAGES = (
    *("omegaconf", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "pathlib"),
    *("numpy", "datetime"),
)
# kinds of values, as they stand beside weights and as what fills a dictionary's gaps
INERT_BUILTINS = {
    f"builtins.{kind}"
    for kind in (
        "list",
        "dict",
        "set",
        "frozenset",
        "tuple",
        "int",
        "float",
        "bool",
        "str",
        "bytes",
        "bytearray",
        "complex",
    )
}
# what is beside an encoder in the weights of self-supervised training
DECODER_PREFIXES = ("decoder", "mask_token")
# a part that every model here has, by which it is known under names that nobody has told
LANDMARK = "patch_embed.proj.weight"
PLACES_TOLD = {"front": "in front of the patches", "middle": "in the middle of the patches"}
REGISTER_KEYS = ("cls_token", "neck.weight", "norm_neck.weight", "pos_embed_cls")  # MambaReg's


def read(path: str) -> Any:
    """What the checkpoint at `path`, a file or an https URL, holds; nothing in it is run.

    Raises UsageError for a file that is broken, whose pickle calls anything but tensors, plain values and
    `argparse.Namespace`, or that holds tensors larger than itself.
    """
    file = download(path) if is_url(path) else Path(path)
    kind = _kind(file, path)
    if file.suffix == ".safetensors" or kind == "safetensors":
        try:
            return safetensors.torch.load_file(file)
        except Exception as error:  # safetensors raises its own error class, and OSError
            raise UsageError(f"{path} is no whole safetensors file: {error}.") from error
    try:
        checkpoint = _load_pickle(file)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        if foreign:
            raise UsageError(f"{path} is refused: its pickle calls {foreign[1]}, which could run code.") from error
        raise UsageError(f"{path} is no whole checkpoint, or holds more than weights.") from error
    except Exception as error:  # a truncated or flipped file trips torch's reader in any way
        raise UsageError(f"{path} is no whole checkpoint: {first_line(error)}.") from error
    _check_tensors(checkpoint, path)
    return checkpoint


def _kind(file: Path, path: str) -> str:
    """What `file` is by its first bytes. Raises UsageError for what is often taken for a checkpoint and is none, and
    for an archive whose records unfold to more than the file."""
    try:
        with open(file, "rb") as stream:
            head = stream.read(512)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from error
    if head.startswith(b"version https://git-lfs"):
        raise UsageError(f"{path} is a pointer of git-lfs; wanted the file itself, by `git lfs pull`.")
    if not head:
        raise UsageError(f"{path} is empty; wanted a checkpoint.")
    text = head.removeprefix(codecs.BOM_UTF8).strip()
    if text[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise UsageError(f"{path} is a web page; wanted the checkpoint that it links to.")
    if text and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in text):
        raise UsageError(f"{path} is no whole checkpoint but a text ({text.splitlines()[0][:40].decode()} ...).")
    if head.startswith(b"PK") and _is_compressed(file):
        raise UsageError(f"{path} is a compressed archive; wanted a checkpoint as torch.save writes it.")
    return "safetensors" if head[8:9] == b"{" and not head.startswith(b"PK") else ""


def _is_compressed(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist())
    except Exception:  # a broken archive: torch's reader says how
        return False


def _check_tensors(value: Any, path: str) -> None:
    """Refuse tensors that are more or less than numbers in a row, and those that claim more elements than their storage
    has: a small file would fill the memory."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, argparse.Namespace):
        value = list(vars(value).values())
    if isinstance(value, (list, tuple)):
        for part in value:
            _check_tensors(part, path)
    elif isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_nested or value.is_quantized or value.device.type != "cpu":
            told = ("nested", "quantised", "sparse", "meta")
            which = (value.is_nested, value.is_quantized, value.layout is not torch.strided, True)
            raise UsageError(f"{path} has a {told[which.index(True)]} tensor; wanted weights as they are in a model.")
        size = value.numel() * value.element_size()
        if size > max(value.untyped_storage().nbytes(), 1 << 20):
            raise UsageError(f"{path} has a tensor of {tuple(value.shape)} that repeats its elements; wanted weights.")


def _load_pickle(file: Path) -> Any:
    stand_ins: list[Any] = [argparse.Namespace]
    with contextlib.suppress(ValueError, RuntimeError):  # raised for files without an archive, which have none to list
        for name in torch.serialization.get_unsafe_globals_in_checkpoint(file):
            if name == "collections.defaultdict":
                stand_ins.append((_plain_dict, name))
            elif name.partition(".")[0] in INERT_PACKAGES or name in INERT_BUILTINS:
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


def _plain_dict(*args: Any) -> dict[Any, Any]:
    """Stands for a dictionary with a factory, which is never called."""
    return {}


def find_weights(checkpoint: Any, path: str, *, ema: bool = False) -> tuple[dict[str, Tensor], str]:
    """The model's weights in what `read` returned, with wrappers' prefixes stripped, and where they were found.

    Known are DeiT's and Vim's dictionaries (`model`, `model_ema`), timm's, bare state dicts, and Lightning's, where
    averaged weights are taken if there are any. `ema` asks for the averaged weights of the others too. An entry or a
    prefix of any other name is found if it is the only one with a patch embedding, or the `teacher` beside a student.
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
    for _ in range(_MOST_LEVELS):
        models = [] if _prefixes(found) else [name for name, value in found.items() if _holds_model(value)]
        if not models:
            break
        name = _chosen(models, path)
        found, origin = found[name], name if found is checkpoint else f"{origin}.{name}"
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
        is_dense = any(name.startswith(DENSE_HEADS) for name in weights)
        wrappers = [prefix for prefix in WRAPPER_PREFIXES if not (is_dense and prefix == "backbone.")]
        counts = {prefix: sum(name.startswith(prefix) for name in weights) for prefix in wrappers}
        prefix = max(counts, key=counts.__getitem__)
        if counts[prefix] * 2 <= len(weights):
            break
        weights = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        stripped += prefix
    prefixes = _prefixes(weights)
    if prefixes and "" not in prefixes and not is_dense:
        prefix = _chosen(prefixes, path)
        weights = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        stripped += prefix
    return weights, f"{origin} without prefix {stripped}" if stripped else origin


_MOST_LEVELS = 3


def _prefixes(entries: dict[Any, Any]) -> list[str]:
    """What stands before the names of models in `entries`."""
    names = [name for name in entries if isinstance(name, str) and name.endswith(LANDMARK)]
    return [name.removesuffix(LANDMARK) for name in names]


def _holds_model(value: Any, levels: int = _MOST_LEVELS) -> bool:
    if not isinstance(value, dict) or not levels:
        return False
    return bool(_prefixes(value)) or any(_holds_model(entry, levels - 1) for entry in value.values())


def _chosen(names: list[Any], path: str) -> Any:
    """The name of the only model in the file at `path`, or of the teacher: a student's average, and what is kept."""
    teachers = [name for name in names if str(name).startswith("teacher")]
    if len(names) > 1 and len(teachers) != 1:
        told = ", ".join(str(name).removesuffix(".") for name in names[:4])
        raise UsageError(f"{path} holds several models ({told}); wanted the weights of one.")
    return (teachers if len(names) > 1 else names)[0]


def load_strictly(
    model: nn.Module, weights: dict[str, Tensor], path: str, name: str, *, may_miss: Callable[[str], bool] | None = None
) -> None:
    """Load `weights` into `model`; raises UsageError with the first differences unless every key and shape agrees.

    Keys for which `may_miss` is true keep their initial value if `weights` lack them. A model with a method `renamed`
    gives published weights its own names by it.
    """
    weights = model.renamed(weights) if hasattr(model, "renamed") else weights
    own = model.state_dict()
    shapes = [key for key in own if key in weights and not _fits(weights[key], own[key])]
    fitting = {key: divided(value, own.get(key, value)) for key, value in weights.items() if key not in shapes}
    found = model.load_state_dict(fitting, strict=False)
    missing = [key for key in found.missing_keys if key not in shapes and not (may_miss and may_miss(key))]
    unexpected = found.unexpected_keys
    broken = [key for key, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        others = f", nor are {len(broken) - 1} more tensors" if len(broken) > 1 else ""
        _logger.warning("%s: %s is not finite%s.", path, broken[0], others)
    told = (
        [f"{key} is missing" for key in missing[:2]]
        + [f"{key} is unknown" for key in unexpected[:2]]
        + [
            f"{key} is {_build(weights[key], own[key])} instead of {_build(own[key], weights[key])}"
            for key in shapes[:2]
        ]
    )
    if told:
        more = len(missing) + len(unexpected) + len(shapes) - len(told)
        others = f", and {more} more differences" if more else ""
        if not missing and not shapes and all(".mixer.layernorm." in key for key in unexpected):
            others += "; it has a norm behind its scans, as the Vims of the masked autoencoder have: wanted"
            others += " vim_SIZE_final_pool_mean_abs_pos_embed_with_midclstok_div2"
        raise UsageError(f"{path} is no checkpoint of {name}: {', '.join(told)}{others}.")


def _fits(value: Tensor, own: Tensor) -> bool:
    """Whether `value` may stand for `own`: a number with a fraction for one such, of any width."""
    kinds = [(each.is_floating_point(), each.is_complex()) for each in (value, own)]
    return value.shape == own.shape and kinds[0] == kinds[1]


def _build(value: Tensor, other: Tensor) -> str:
    return str(tuple(value.shape)) if value.shape != other.shape else str(value.dtype).removeprefix("torch.")


def class_positions(model: nn.Module, num_patches: int) -> tuple[int, ...]:
    """Which rows of `pos_embed` are class tokens', for `num_patches` patch tokens; timm's models hold them in front."""
    if hasattr(model, "class_row_positions"):
        return tuple(model.class_row_positions(num_patches))
    return tuple(range(getattr(model, "num_prefix_tokens", 0)))


def adapt(
    weights: dict[str, Tensor], model: nn.Module, path: str, size: tuple[int, int] | None = None
) -> tuple[dict[str, Tensor], Callable[[str], bool]]:
    """Fit `weights` to `model`'s image size and class count; those of a masked autoencoder to a classifier too.

    The position embedding is resized, from the grid of images of `size` (height, width) where that is known, else from
    a square; a head for another number of classes, or none at all, registers of another number
    or width, and a decoder beside the encoder are left out; all of it is said. Returns the weights and a test for the
    keys that may be missing from them.
    """
    own, weights = model.state_dict(), dict(weights)
    decoder = [key for key in weights if key not in own and key.startswith(DECODER_PREFIXES)]
    if decoder:
        _logger.info("%s: its decoder is left out (%s, %d tensors).", path, decoder[0], len(decoder))
        weights = {key: value for key, value in weights.items() if key not in decoder}
    in_head = [key for key in own if key.startswith(("head.", "head_dist."))]
    dropped = [key for key in in_head if key in weights and weights[key].shape != own[key].shape]
    if dropped:
        heads = {key.partition(".")[0] for key in dropped}
        classes = weights[dropped[0]].shape[0] if weights[dropped[0]].ndim else 0
        _logger.info("%s: its head for %d classes is left out; the new one starts afresh.", path, classes)
        weights = {key: value for key, value in weights.items() if key.partition(".")[0] not in heads}
        dropped = [key for key in own if key.partition(".")[0] in heads]
    elif in_head and not any(key in weights for key in in_head):
        others = [key for key in weights if key.startswith("head.")]
        _logger.info("%s has %s; the new one starts afresh.", path, "another head" if others else "no head")
        weights = {key: value for key, value in weights.items() if key not in others}
        dropped = in_head
    _place_masked_rows(weights, own, bool(decoder), model)
    # registers, and what reads them, of another number or width start afresh
    registers = [] if "pos_embed_cls" not in own or "pos_embed_cls" not in weights else REGISTER_KEYS
    shapes = [{key: value.shape for key, value in entries.items() if key in registers} for entries in (own, weights)]
    others = sorted(key for key in {*shapes[0], *shapes[1]} if shapes[0].get(key) != shapes[1].get(key))
    if others:
        _logger.info("%s: %s are left out, of another shape; the new ones start afresh.", path, ", ".join(others))
        weights = {key: value for key, value in weights.items() if key not in others}
        dropped = [*dropped, *others]
    name = "pos_embed"
    is_table = name in own and name in weights and _is_table(weights[name], own[name])
    new_grid = getattr(model, "pos_embed_grid", None) or getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if is_table and new_grid:
        patches = weights[name].shape[1] - len(class_positions(model, new_grid[0] * new_grid[1]))
        old_grid = grid_of_rows(patches, model, size)
        # another number of class tokens leaves no grid; load_strictly then tells what differs
        if old_grid not in (None, new_grid):
            weights[name] = resize_pos_embed(weights[name], old_grid, new_grid, partial(class_positions, model))
            _logger.info("%s: position embedding resized from %dx%d to %dx%d.", path, *old_grid, *new_grid)
    return weights, lambda key: key in dropped


def grid_of_rows(patches: int, model: nn.Module, size: tuple[int, int] | None) -> tuple[int, int] | None:
    """The grid (rows, cols) that `patches` positions are of: that of images of `size` in `model`, the model's own, or a
    square, whichever first has as many; None if none has."""
    embed, turn = model.patch_embed, getattr(model, "position_grid", tuple)
    grids = [turn(embed.grid_size), (math.isqrt(max(patches, 0)),) * 2]
    if size is not None:
        patch, stride = (to_2tuple(getattr(embed, name, embed.patch_size)) for name in ("patch_size", "stride"))
        grids.insert(0, turn(tuple((side - own) // step + 1 for side, own, step in zip(size, patch, stride))))
    return next((grid for grid in grids if patches > 0 and grid[0] * grid[1] == patches), None)


def trained_size(checkpoint: Any) -> tuple[int, int] | None:
    """The height and width of the images that the run which wrote `checkpoint` trained on, if it says."""
    size = saved_flags(checkpoint).get("input_size")
    sides = [size, size] if isinstance(size, int) else size
    good = isinstance(sides, (list, tuple)) and len(sides) == 2
    return tuple(sides) if good and all(type(side) is int and side > 0 for side in sides) else None


def _is_table(value: Tensor, own: Tensor) -> bool:
    """Whether `value` (1, rows, width) holds positions as wide as those of `own`."""
    widths = [(each.shape[0], each.shape[2]) if each.ndim == 3 else None for each in (value, own)]
    return widths[0] is not None and widths[0] == widths[1] and value.is_floating_point()


def _place_masked_rows(weights: dict[str, Tensor], own: dict[str, Tensor], was_masked: bool, model: nn.Module) -> None:
    """Bring the positions of a masked autoencoder (`models_mae`) to where `model` has them.

    Another autoencoder's follow from its grid. In a classifier (`was_masked`: the decoder is left out already) the
    class token's row, which comes first in an autoencoder, moves to the place of the token.
    """
    for name in ("pos_embed", "decoder_pos_embed") if "decoder_pos_embed" in own else ():
        if name in weights:
            weights[name] = own[name]
    if was_masked and "cls_token" in weights and "pos_embed" in weights and weights["pos_embed"].ndim == 3:
        classes, patches = weights["pos_embed"].tensor_split([1], 1)
        weights["pos_embed"] = join_cls(classes, patches, class_positions(model, patches.shape[1]))


def divided(value: Tensor, like: Tensor) -> Tensor:
    """`value`, divided among the processes if `like` is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def start(model: nn.Module, path: str, name: str, *, fit: bool, may_miss: set[str] = frozenset()) -> Any:
    """Give `model`, which is called `name`, the weights of the file or address `path`; with `fit`, fitted to its image
    size and class count. Keys in `may_miss` keep their initial value where the file lacks them. Returns what the file
    holds."""
    checkpoint = read(path)
    weights, origin = find_weights(checkpoint, path)
    _logger.info("Weights from %s (%s).", path, origin)
    is_left_out: Callable[[str], bool] = may_miss.__contains__
    if fit:
        # a model around a backbone knows which part of it a classifier fills
        size = trained_size(checkpoint)
        fitted = model.adapt(weights, path, size) if hasattr(model, "adapt") else adapt(weights, model, path, size)
        weights, is_dropped = fitted
        is_left_out = lambda key: key in may_miss or is_dropped(key)  # noqa: E731
    load_strictly(model, weights, path, name, may_miss=is_left_out)
    return checkpoint


def saved_flags(checkpoint: Any) -> dict[str, Any]:
    """The flags of the run that wrote `checkpoint`; none where it does not say."""
    flags = checkpoint.get("args") if isinstance(checkpoint, dict) else None
    flags = vars(flags) if isinstance(flags, argparse.Namespace) else flags
    return {name: value for name, value in flags.items() if isinstance(name, str)} if isinstance(flags, dict) else {}


def accept(args: argparse.Namespace, model: nn.Module, checkpoint: Any, path: str) -> None:
    """Let the methods of `model` see what it starts from: settings follow from it, or contradict it (UsageError); and
    say where its class token is taken to stand."""
    tell_class_place(getattr(args, "model", ""), model, checkpoint, path)
    _check_grid(args, checkpoint, path)
    try:
        accept_by_methods(model, args, find_weights(checkpoint, path)[0], saved_flags(checkpoint), path)
    except ValueError as error:
        raise UsageError(str(error)) from error
    except (TypeError, LookupError, AttributeError) as error:
        raise UsageError(f"{path} holds flags that no run writes: {first_line(error)}; wanted its weights.") from error


def _check_grid(args: argparse.Namespace, checkpoint: Any, path: str) -> None:
    """Refuse weights as they are whose positions are as many as this run's, but of a grid of another shape."""
    size, own = trained_size(checkpoint), to_2tuple(getattr(args, "input_size", None))
    fitted = path == getattr(args, "finetune", "")
    if size is None or fitted or None in own or size == own or size[0] * size[1] != own[0] * own[1]:
        return
    told = [" ".join(map(str, each)) for each in (size, own)]
    raise UsageError(
        f"{path} was trained at --input-size {told[0]}, whose grid is another than that of {told[1]}; wanted the same, "
        "or --finetune, which fits it."
    )


def tell_class_place(name: str, model: nn.Module, checkpoint: Any, path: str) -> None:
    """Say where the class token of the weights in `path` is taken to stand, if nothing in the file does: keys and
    shapes are the same in front of the patches and in the middle. Of a run of this program the model is known: warn if
    its place is another. `name` is what `model`, or the backbone in it, is called."""
    classes = next((module.class_tokens for module in model.modules() if hasattr(module, "class_tokens")), None)
    if classes is None or classes.count != 1 or classes.positions != "shared" or classes.place not in PLACES_TOLD:
        return
    if any(key.startswith(DECODER_PREFIXES) for key in find_weights(checkpoint, path)[0]):
        return  # of a masked autoencoder, whose rows are put in their places
    here = PLACES_TOLD[classes.place]
    if isinstance(checkpoint, dict) and "processes" in checkpoint:
        saved = saved_flags(checkpoint).get("model", "")
        was = class_place(saved) if isinstance(saved, str) else ""
        if was not in ("", classes.place):
            told = PLACES_TOLD.get(was, was)
            _logger.warning(
                "%s is of --model %s, whose class token stands %s; here it stands %s.", path, saved, told, here
            )
        return
    place = next(place for place in PLACES_TOLD if place != classes.place)
    others = names_of_same_weights(name, place)
    wanted = f"--model {' or '.join(others)}" if others else "a model with the other use_middle_cls_token"
    _logger.info(
        "%s does not say where its class token stood: --model %s takes it to be %s. If it stood %s, wanted %s.",
        *(path, name, here, PLACES_TOLD[place], wanted),
    )


def main(argv: list[str] | None = None) -> None:
    """Convert a checkpoint to bare weights."""
    parser = Parser(description="Turn any readable checkpoint into bare weights.")
    parser.add_argument("source", help="a file or an https URL")
    parser.add_argument("target", type=Path, help="a .safetensors or .pth file")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights")
    args = parser.parse_args(argv)
    weights, origin = find_weights(read(args.source), args.source, ema=args.ema)
    weights = {name: value.clone().contiguous() for name, value in weights.items()}
    try:
        if args.target.suffix == ".safetensors":
            data = safetensors.torch.save(weights)
            write_atomically(args.target, lambda file: file.write(data))
        else:
            write_atomically(args.target, lambda file: torch.save(weights, file))
    except OSError as error:
        raise UsageError(f"{args.target} cannot be written: {error.strerror or error}.") from error
    _logger.info("%s: %d tensors from %s.", args.target, len(weights), origin)


if __name__ == "__main__":
    setup_logging()
    try:
        main()
    except UsageError as error:
        print(f"checkpoints.py: error: {error}", file=sys.stderr)
        sys.exit(2)
