"""Inputs that may be broken, drawn by hypothesis, and judges of what becomes of them.

Shared by `benchmarks.sweeps` and the tests. A judge returns ACCEPTED, REFUSED (one sentence) or what
else happened; it never raises.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import io
import os
import pickle
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from hypothesis import strategies as st

import main as program
from benchmarks.jobs import JOBS, Job
from benchmarks.program import EPOCH, call_program
from tasks import TASKS

ACCEPTED, REFUSED = "accepted", "refused"
SECONDS = 60  # what takes longer hangs


@contextlib.contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the block once `seconds` have passed, without those in which the process is stopped."""
    left = seconds

    def ring(number: int, frame: object) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            raise TimeoutError(f"nothing after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judge_program(*flags: object) -> str:
    """Run the program: accepted if it ends well, refused if it ends with one sentence on stderr."""
    try:
        with alarm(SECONDS):
            result = call_program(*flags)
    except BaseException as error:  # SystemExit is no clean end either
        return f"{type(error).__name__}: {error}"
    told = [line for line in result.err.splitlines() if line.startswith("main.py: ")]
    if "Traceback" in result.err:
        return "Traceback shown: " + result.err[-300:]
    if result.code == 0 and not told:
        return ACCEPTED
    if result.code in (1, 2) and len(told) == 1:
        return REFUSED
    return f"exit code {result.code} with {len(told)} sentences: {result.err[-300:]}"


# ---------------------------------------------------------------------------------------------------------------------
# Flags

NUMBERS = [
    "0",
    "1",
    "2",
    "0.5",
    "1e-5",
    "-1",
    "1e9",
    "1e308",
    "1e-320",
    "nan",
    "-inf",
    "",
    "x",
    "0x1",
    "1_0",
    " ",
    "\u0661",
]
WORDS = {
    "--model": ["vim_micro_patch8_32", "fambav_micro_patch8_32", "fastvim_micro_patch8_32", "test_vit", "vim_nan", ""],
    "--input-size": ["32", "33", "31", "8", "7", "40", "0"],
    "--batch-size": ["2", "5", "8", "64", "0"],
    "--data-set": ["DIGITS", "CIFAR", "CIFAR10", "IMNET", "INAT", "timm/folder/x", "timm/", "timm/torch/cifar100", "x"],
    "--opt": ["adamw", "sgd", "lion", "lamb", "muon", "adahessian", "rmsprop", "lookahead_sgd", "no"],
    "--sched": ["cosine", "tanh", "step", "multistep", "plateau", "poly", "wsd", "rsqrt", "constant", "none", "x"],
    "--aa": ["none", "rand-m9-mstd0.5-inc1", "v0", "original", "augmix-m3-w2", "3a", "rand", "rand-x", "x", ""],
    "--mixup-mode": ["batch", "pair", "elem", "half"],
    "--remode": ["const", "rand", "pixel", "x"],
    "--train-interpolation": ["random", "bilinear", "bicubic", "x"],
    "--distillation-type": ["none", "soft", "hard"],
    "--teacher-model": ["vim_micro_patch8_32", "x"],
    "--amp-dtype": ["bfloat16", "float16"],
    "--fusion-strategy": ["no", "all", "alternate", "interleaved", "lower", "upper"],
    "--fusion-order": ["published", "raster"],
    "--fusion-matching": ["similar", "random", "kth"],
    "--fusion-layer": ["-1", "0", "2", "4"],
    "--fusion-token": ["-1", "0", "3", "99"],
    "--spatial-pool": ["none", "alternate", "row", "col"],
    "--pool-method": ["mean", "max"],
    "--pruning": ["none", "token", "block", "both"],
    "--pruning-policy": ["learned", "static", "random"],
    "--predictor-input": ["hidden", "delta", "B"],
    "--pruning-teacher": ["both", "logits"],
    "--resume": ["auto", "nowhere", "http://x/y.pth", "/", "\0"],
    "--finetune": ["", "nowhere", "ftp://x/y.pth"],
    "--device": ["cpu", "meta", "x", "cuda:x", ""],
    "--inat-category": ["genus", "x"],
    "--dist_url": ["env://", "nowhere"],
    "--nonsense": ["", "1"],
}
SWITCHES = [
    *("--bce-loss", "--unscale-lr", "--no-model-ema", "--model-ema-force-cpu", "--no-repeated-aug", "--no-train-mode"),
    *("--ThreeAugment", "--src", "--resplit", "--cosub", "--attn-only", "--eval", "--dist-eval", "--no-pin-mem"),
    *("--distributed", "--if_amp", "--no_amp", "--if_continue_inf", "--if_nan2num", "--if_random_token_rank"),
    *("--if_random_cls_token_position", "--bi-merge", "--no-norm-after-ssm", "--deterministic", "--fsdp", "-x", "y"),
    "--fusion-weighted",
]
VALUES = [
    *("--drop", "--drop-path", "--model-ema-decay", "--opt-eps", "--clip-grad", "--momentum", "--weight-decay", "--lr"),
    *("--lr-noise-pct", "--lr-noise-std", "--warmup-lr", "--min-lr", "--decay-epochs", "--warmup-epochs", "--dr"),
    *("--cooldown-epochs", "--patience-epochs", "--color-jitter", "--smoothing", "--reprob", "--recount", "--mixup"),
    *("--cutmix", "--mixup-prob", "--mixup-switch-prob", "--distillation-alpha", "--distillation-tau", "--seed"),
    *("--start_epoch", "--eval-crop-ratio", "--world_size", "--pool-scale", "--token-keep-ratio", "--num-classes"),
    *("--batch-size", "--num_workers", "--local-rank"),
]
LISTS = ["--opt-betas", "--lr-noise", "--cutmix-minmax", "--pruning-loc"]

# what a task's own flags are not tried with: they write elsewhere, or take as long as they say
UNTRIED = {"--data-path", "--index", "--visualize", "--det-proposals"}


def own_flags(task: str) -> list[st.SearchStrategy[list[str]]]:
    """The flags that `task` has and classification has not, with values that may fit."""
    general = program.get_args_parser()._option_string_actions
    found = []
    for name, action in program.get_args_parser(TASKS[task])._option_string_actions.items():
        if name in general or name in UNTRIED:
            continue
        values = st.sampled_from([*map(str, action.choices), "x"] if action.choices else NUMBERS)
        if action.nargs == 0:
            found.append(st.just([name]))
        elif action.nargs is None:
            found.append(values.map(lambda value, name=name: [name, value]))
        else:
            found.append(st.lists(values, max_size=3).map(lambda given, name=name: [name, *given]))
    return found


def flags_of(task: str = "classify") -> st.SearchStrategy[list[str]]:
    """One to six flags of `task`, and a few that it does not know."""
    shared = st.one_of(
        st.sampled_from([[name, word] for name, words in WORDS.items() for word in words]),
        st.sampled_from([[name] for name in SWITCHES]),
        st.tuples(st.sampled_from(VALUES), st.sampled_from(NUMBERS)).map(list),
        st.tuples(st.sampled_from(LISTS), st.lists(st.sampled_from(NUMBERS), max_size=3)).map(
            lambda pair: [pair[0], *pair[1]]
        ),
    )
    own = own_flags(task)
    known = program.get_args_parser(TASKS[task])._option_string_actions
    # a flag of another task ends it at once, and would hide all else that is wrong
    shared = shared.filter(lambda flag: task == "classify" or flag[0] in known)
    flag = st.one_of(shared, st.one_of(own)) if own else shared
    return st.lists(flag, min_size=1, max_size=6).map(lambda flags: [part for flag in flags for part in flag])


# ---------------------------------------------------------------------------------------------------------------------
# Bytes


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """`whole`, cut short, with flipped bits, or with a stretch overwritten, taken out or put in; or mere noise."""
    way = draw(st.sampled_from(["cut", "flip", "zero", "remove", "insert", "noise", "empty"]))
    place = draw(st.integers(0, len(whole) - 1))
    length = draw(st.sampled_from([1, 4, 100, 5000]))
    if way == "cut":
        return whole[:place]
    if way == "flip":
        # headers stand in the first and last bytes, and would seldom be hit otherwise
        near = st.integers(0, min(len(whole), 400) - 1)
        places = draw(st.lists(st.one_of(st.just(place), near, near.map(lambda i: len(whole) - 1 - i)), min_size=1))
        data = bytearray(whole)
        for each in places:
            data[each] ^= 1 << draw(st.integers(0, 7))
        return bytes(data)
    if way == "zero":
        return whole[:place] + bytes(len(whole[place : place + length])) + whole[place + length :]
    if way == "remove":
        return whole[:place] + whole[place + length :]
    if way == "insert":
        return whole[:place] + whole[-length:] + whole[place:]
    return draw(st.binary(max_size=2000)) if way == "noise" else b""


@dataclass
class File:
    """Bytes, and the name they are given."""

    name: str
    data: bytes = field(repr=False)


class _Calls:
    """Pickles to a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


@st.composite
def _with_code(draw: st.DrawFn, made: Checkpoints) -> File:
    marker = made.marker
    command = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w')"
    call = draw(
        st.sampled_from(
            [
                _Calls(os.system, command),
                _Calls(eval, code),
                _Calls(exec, code),
                _Calls(subprocess.check_output, ["touch", str(marker)]),
                _Calls(open, str(marker), "w"),
                _Calls(getattr, _Calls(__import__, "os"), "system"),
                _Calls(Path.touch, marker),
                _Calls(torch.load, str(marker)),
                _Calls(builtins.compile, code, "x", "exec"),
            ]
        )
    )
    content = draw(st.sampled_from([call, {"model": call}, {"model": {"a": call}}, {call.call[0]: 1}, [call]]))
    content = made.run | content if isinstance(content, dict) and draw(st.booleans()) else content
    protocol = draw(st.integers(0, 5))
    stream = io.BytesIO()
    if draw(st.booleans()):
        torch.save(content, stream, pickle_protocol=protocol)
    else:
        pickle.dump(content, stream, protocol=protocol)
    return File("code.pth", stream.getvalue())


@st.composite
def _odd(draw: st.DrawFn, made: Checkpoints) -> File:
    junk = [None, -1, 10**12, 2.5, float("nan"), "x", b"x", [], {}, [1], {"x": 1}, torch.ones(2), torch.ones(0), (1, 2)]
    content = dict(made.run)
    for _ in range(draw(st.integers(1, 3))):
        part, key = content, draw(st.sampled_from(list(made.run)))
        below = part.get(key)
        if isinstance(below, dict) and below and key not in ("optimizer", "lr_scheduler") and draw(st.booleans()):
            part[key] = part = below.copy()
            key = draw(st.sampled_from(list(part)))
        if draw(st.integers(0, 4)) == 0:
            part.pop(key, None)
        else:
            part[key] = draw(st.sampled_from(junk))
    stream = io.BytesIO()
    torch.save(content, stream)
    return File("odd.pth", stream.getvalue())


@dataclass(repr=False)
class Checkpoints:
    """Checkpoints of a real run and what they may be turned into. `marker` is a file that foreign code would write."""

    flags: list[str]
    wholes: dict[str, bytes] = field(repr=False)
    run: dict[str, Any] = field(repr=False)
    marker: Path
    folder: Path

    def __repr__(self) -> str:
        return "Checkpoints"  # hypothesis would print all that they hold

    @classmethod
    def make(cls, folder: Path, job: Job = JOBS["classify"]) -> Checkpoints:
        """Train for an epoch under `folder`."""
        flags = [*job.data(folder, 8), *EPOCH]
        assert judge_program(*flags, "--output_dir", folder / "run") == ACCEPTED
        run = torch.load(folder / "run" / "checkpoint.pth", weights_only=True)
        weights = {name: value.clone() for name, value in run["model"].items()}
        wholes = {"run.pth": (folder / "run" / "checkpoint.pth").read_bytes()}
        for name, content, options in (
            ("weights.pth", {"model": weights}, {}),
            ("old.pth", {"model": weights}, {"_use_new_zipfile_serialization": False}),
            ("args.pth", {"model": weights, "args": argparse.Namespace(lr=1)}, {}),
        ):
            stream = io.BytesIO()
            torch.save(content, stream, **options)
            wholes[name] = stream.getvalue()
        wholes["weights.safetensors"] = safetensors.torch.save(weights)
        return cls(flags, wholes, run, folder / "marker", folder)

    def damaged(self) -> st.SearchStrategy[File]:
        """A file that is broken."""
        return st.sampled_from(list(self.wholes)).flatmap(
            lambda name: damaged(self.wholes[name]).map(lambda data: File(name, data))
        )

    def with_code(self) -> st.SearchStrategy[File]:
        """A pickle that calls something."""
        return _with_code(self)

    def odd(self) -> st.SearchStrategy[File]:
        """A whole checkpoint of a run in which entries are missing or are something else."""
        return _odd(self)

    def judge(self, file: File, use: str) -> str:
        """Give `file` to the program, as `use` says: one or more flags, of which the last takes a file."""
        path = self.folder / file.name
        path.write_bytes(file.data)
        verdict = judge_program(*self.flags, "--epochs", 2, *use.split(), path)
        if self.marker.exists():
            self.marker.unlink()
            return "foreign code ran"
        return verdict


USES = st.sampled_from(["--resume", "--finetune", "--eval --resume", "--eval --model-path"])
