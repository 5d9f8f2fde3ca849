"""Whole checkpoints in which something is odd: each is gone on from, or refused in a sentence, before a step."""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor

import checkpoints
import main as program
import run as runs
from tasks import TASKS
from tests.conftest import QUICK
from tests.micro_models import timm
from utils import UsageError
from utils.states import check_optimizer_state

pytestmark = pytest.mark.usefixtures("one_thread")

ODD: dict[str, Any] = {
    "none": None,
    "negative": -1,
    "large": 10**12,
    "text": "x",
    "bytes": b"x",
    "list": [1, "x"],
    "dictionary": {"x": 1},
    "tensor": torch.ones(2, 3),
    "number in a tensor": torch.tensor(3.0),
    "complex": torch.ones(2, dtype=torch.complex64),
}


@pytest.fixture(scope="module")
def made(cifar: Path) -> tuple[argparse.Namespace, Any, dict[str, Any]]:
    """Flags, a task with its batches, and what a run of it captures after a step."""
    flags = [*QUICK, "--data-set", "CIFAR", "--data-path", str(cifar), "--sched", "plateau", "--if_amp"]
    args = program.parse([*flags, "--amp-dtype", "float16"])
    args.world_size = args.rank = args.local_rank = 1
    args.world_size, args.rank, args.distributed = 1, 0, False
    classify = TASKS[args.task]
    data = classify.build_data(args, train=True)
    args.nb_classes = data.num_classes
    batches = classify.train_batches(data, args)

    def build() -> runs.Run:
        torch.manual_seed(0)
        model = classify.build_model(args, data)
        model.layers = model.layers[:1]  # one stands for all
        task = classify(args, model, data, torch.device("cpu"), None)
        return program.build_run(args, task, batches)

    run = build()
    step(run)
    run.meters.update(2, loss=1.0)
    return args, build, run.capture(args, {"epoch": 0, "train_loss": 1.0})


def step(run: runs.Run) -> None:
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run.optimizer.step()


# what stands for its like: a parameter of the model, the first of the optimiser, flags that a resumed run looks at
STANDS = {
    "model": ["head.weight", "pos_embed"],
    "model_ema": ["head.weight"],
    "args": ["batch_size", "world_size", "opt", "lr", "epochs", "pool_scale", "model"],
}


def places(state: Any, at: tuple = ()) -> list[tuple]:
    """Where something may be odd: every entry, of lists and numbered entries the first."""
    found = [at] if at else []
    if isinstance(state, dict):
        keys = [key for key in STANDS.get(at[-1] if at else None, state) if key in state]
        keys = keys[:1] if keys and isinstance(keys[0], int) else keys
    elif isinstance(state, (list, tuple)):
        keys = range(len(state) if at[-1] in ("numpy", "python") else min(len(state), 1))
    else:
        keys = []
    return found + [place for key in keys for place in places(state[key], (*at, key))]


def changed(state: Any, place: tuple, value: Any) -> Any:
    """A copy of `state`, of which only the way to `place` is copied."""
    if not place:
        return value
    new = copy.copy(state)
    new = list(new) if isinstance(new, tuple) else new
    new[place[0]] = changed(state[place[0]], place[1:], value)
    return new


def without(state: Any, place: tuple) -> Any:
    new = copy.copy(state)
    if len(place) == 1:
        del new[place[0]]
    else:
        new[place[0]] = without(state[place[0]], place[1:])
    return new


def test_an_odd_entry_is_gone_on_from_or_refused(made: Any, monkeypatch: Any, tmp_path: Path) -> None:
    """In every place of what a run saves; each has one kind of oddity, in turn, and the larger are missing."""
    args, build, whole = made
    run, taken, told = build(), [], []
    for number, place in enumerate(places(whole)):
        kind = [*ODD][number % len(ODD)]
        versions = {kind: changed(whole, place, ODD[kind])}
        if len(place) == 1:
            versions["missing"] = without(whole, place)
        for kind, checkpoint in versions.items():
            monkeypatch.setattr(runs, "find", lambda args, checkpoint=checkpoint: ("odd.pth", checkpoint))
            try:
                last = runs.resume(run, args)
                step(run)
                runs.repair_log(tmp_path / "log.txt", run.epoch, last)
                taken.append((kind, place))
            except UsageError as error:
                told.append(str(error))
            except Exception as error:
                raise AssertionError(f"{kind} at {place}: {type(error).__name__}: {error}") from error
    assert len(taken) > 10
    assert len(told) > 40
    assert not [sentence for sentence in told if "\n" in sentence]


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "lamb", "adafactor", "muon", "lookahead_adam", "madgrad"])
def test_what_optimisers_write_is_taken(name: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    optimizer = create_optimizer_v2(model, opt=name, lr=0.01, momentum=0.9)
    check_optimizer_state(copy.deepcopy(optimizer.state_dict()), optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    check_optimizer_state(state, create_optimizer_v2(model, opt=name, lr=0.01, momentum=0.9))
    state["param_groups"].pop()
    with pytest.raises(ValueError, match="entries, wanted"):
        check_optimizer_state(state, optimizer)


def test_another_optimiser_s_entries_are_refused() -> None:
    model = torch.nn.Linear(3, 2)
    state = {"state": {0: {"momentum_buffer": torch.zeros(2, 3)}}, "param_groups": [{"params": [0, 1]}]}
    with pytest.raises(ValueError, match="optimizer.state.0 lacks step"):
        check_optimizer_state(state, torch.optim.AdamW(model.parameters()))
    state["state"][0] = {"step": 3, "exp_avg": torch.zeros(3, 2), "exp_avg_sq": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=r"optimizer.state.0.exp_avg is a tensor of \(3, 2\), wanted one of \(2, 3\)"):
        check_optimizer_state(state, torch.optim.AdamW(model.parameters()))


WEIGHTS = {
    "sparse": (torch.eye(3).to_sparse(), "a sparse tensor"),
    "meta": (torch.ones(2, device="meta"), "a meta tensor"),
    "quantised": (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "a quantised tensor"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("within", ["weights", "beside"])
def test_tensors_that_are_no_numbers_in_a_row(kind: str, within: str, tmp_path: Path) -> None:
    tensor, told = WEIGHTS[kind]
    content = {"model": {"a": tensor}} if within == "weights" else {"model": {}, "optimizer": {"state": {0: [tensor]}}}
    torch.save(content, tmp_path / "a.pth")
    for read in (checkpoints.read, lambda path: checkpoints.main([path, str(tmp_path / "b.pth")])):
        with pytest.raises(UsageError, match=told):
            read(str(tmp_path / "a.pth"))


@pytest.mark.parametrize("name", ["vim", "mambareg"])
@pytest.mark.parametrize("odd", ["number", "row", "empty", "whole numbers", "complex", "deep"])
def test_odd_weights_are_refused_or_left_out(name: str, odd: str) -> None:
    """0-d heads and their like: each tensor of a file in turn, as --finetune and --resume take it."""
    make = {
        "number": lambda value: value.flatten()[0],
        "row": lambda value: value.flatten(),
        "empty": lambda value: value[:0],
        "whole numbers": lambda value: value.long(),
        "complex": lambda value: value.to(torch.complex64),
        "deep": lambda value: value[None, None],
    }[odd]
    model = timm.create_model(f"{name}_micro_patch8_32", depth=1, num_classes=3)
    whole: dict[str, Tensor] = dict(model.state_dict())
    refused, told = [], []
    for key in [key for key in whole if not key.startswith("layers.") or "conv1d" in key]:
        weights = whole | {key: make(whole[key])}
        if weights[key].shape == whole[key].shape and weights[key].dtype == whole[key].dtype:
            continue
        try:
            fitted, may_miss = checkpoints.adapt(weights, model, "a.pth")
            checkpoints.load_strictly(model, fitted, "a.pth", name, may_miss=may_miss)
        except UsageError as error:
            refused.append(key)
            told.append(str(error))
        with pytest.raises(UsageError, match=key):
            checkpoints.load_strictly(model, weights, "a.pth", name)
    assert refused
    assert all(key in sentence for key, sentence in zip(refused, told))


def test_odd_flags_of_a_file_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def odd(*args: Any) -> None:
        raise TypeError("unsupported operand")

    monkeypatch.setattr(checkpoints, "accept_by_methods", odd)
    with pytest.raises(UsageError, match="a.pth holds flags that no run writes: unsupported operand"):
        checkpoints.accept(argparse.Namespace(), torch.nn.Identity(), {"a": torch.ones(1)}, "a.pth")


@pytest.mark.parametrize(
    "text",
    ["[1]", "3", "null", '{"epoch": "x"}', '{"epoch": null}', '{"epoch": 1e400}', "[" * 3000, "\0", '{"epoch": true}'],
)
def test_odd_lines_of_a_log_are_left_out(text: str, tmp_path: Path) -> None:
    file = tmp_path / "log.txt"
    file.write_bytes(b'{"epoch": 0}\n' + text.encode() + b"\n\xff\xfe\n")
    runs.repair_log(file, 2, {"epoch": 1})
    assert [json.loads(line)["epoch"] for line in file.read_text(encoding="utf-8").splitlines()] == [0, 1]
