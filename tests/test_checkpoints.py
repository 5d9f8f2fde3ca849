"""Reading every format, refusing code, and writing so that nothing is lost."""

from __future__ import annotations

import argparse
import errno
import hashlib
import io
import json
import logging
import os
import sys
import types
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch.nn import functional as F

import checkpoints
import run as runs
from tests import micro_models  # noqa: F401 (registers the models)
from utils import UsageError, files

VIM = "vim_micro_patch8_32"


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return timm.create_model(VIM, num_classes=10).state_dict()


def prefixed(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in weights.items()}


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "model.", "model.backbone.", "_orig_mod.module."])
@pytest.mark.parametrize("entry", [None, "model", "state_dict"])
def test_wrappers_are_stripped(
    entry: str | None, prefix: str, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    content = prefixed(weights, prefix)
    torch.save({entry: content, "epoch": 3} if entry else content, tmp_path / "a.pth")
    found, origin = checkpoints.find_weights(checkpoints.read(str(tmp_path / "a.pth")), "a.pth")
    assert found.keys() == weights.keys()
    assert (entry or "bare") in origin
    model = timm.create_model(VIM, num_classes=10)
    checkpoints.load_strictly(model, found, "a.pth", VIM)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("entries", "prefix", "told"),
    [
        ([], "network.", "bare weights without prefix network."),
        ([], "vision.trunk.", "bare weights without prefix vision.trunk."),
        (["network"], "_forward_module.", "network without prefix _forward_module."),
        (["state", "net"], "", "state.net"),
        (["model", "state_dict"], "encoder_q.", "model.state_dict without prefix encoder_q."),
    ],
)
def test_wrappers_of_other_names(entries: list[str], prefix: str, told: str, weights: dict[str, torch.Tensor]) -> None:
    content = prefixed(weights, prefix) | {"projector.weight": torch.ones(3)}
    content = content if prefix else weights
    for entry in reversed(entries):
        content = {entry: content, "step": torch.tensor(3), "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}
    found, origin = checkpoints.find_weights(content, "a.pth")
    assert found.keys() == weights.keys()
    assert origin == told


def test_of_several_models_the_teacher(weights: dict[str, torch.Tensor]) -> None:
    """A teacher is the average of its student; of others nobody knows which is meant."""
    later = {name: value + 1 for name, value in weights.items()}
    bare = prefixed(weights, "student.") | prefixed(later, "teacher.")
    for content in (bare, {"student": weights, "teacher": later}, {"student": weights, "teacher": {"net": later}}):
        assert torch.equal(checkpoints.find_weights(content, "a")[0]["head.bias"], later["head.bias"])
    for content in ({"one": weights, "two": later}, prefixed(weights, "one.") | prefixed(later, "two.")):
        with pytest.raises(UsageError, match=r"a holds several models \(one, two\); wanted the weights of one"):
            checkpoints.find_weights(content, "a")


def test_averaged_weights(weights: dict[str, torch.Tensor]) -> None:
    averaged = {name: value + 1 for name, value in weights.items()}
    deit = {"model": weights, "model_ema": averaged}
    assert checkpoints.find_weights(deit, "a")[0]["head.bias"] is weights["head.bias"]
    assert checkpoints.find_weights(deit, "a", ema=True)[0]["head.bias"] is averaged["head.bias"]
    assert checkpoints.find_weights({"state_dict_ema": averaged}, "a")[0]["head.bias"] is averaged["head.bias"]
    with pytest.raises(UsageError, match="no averaged"):
        checkpoints.find_weights({"model": weights}, "a", ema=True)


def test_lightning(weights: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Averaged weights come first, other modules' are left, and settings of other packages are not run."""
    omegaconf = types.ModuleType("omegaconf.dictconfig")

    class DictConfig(dict):
        def __setstate__(self, state: object) -> None:
            raise AssertionError("ran")

    DictConfig.__module__, DictConfig.__qualname__ = "omegaconf.dictconfig", "DictConfig"
    omegaconf.DictConfig = DictConfig
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
    monkeypatch.setitem(sys.modules, "omegaconf.dictconfig", omegaconf)
    settings = DictConfig()
    settings.content = {"lr": 1}
    averaged = {name: value + 1 for name, value in weights.items()}
    state = prefixed(weights, "backbone.") | prefixed(averaged, "ema_model.module.backbone.")
    state |= {"criterion.weight": torch.ones(3), "ema_model.n_averaged": torch.tensor(3)}
    content = {
        "state_dict": state,
        "hyper_parameters": settings,
        "callbacks": {"checkpoint": {"dirpath": Path("/somewhere")}},
        "pytorch-lightning_version": "2.1",
    }
    torch.save(content, tmp_path / "last.ckpt")
    found, origin = checkpoints.find_weights(checkpoints.read(str(tmp_path / "last.ckpt")), "last.ckpt")
    assert found.keys() == weights.keys()
    assert torch.equal(found["head.bias"], averaged["head.bias"])
    assert "averaged" in origin
    assert "backbone." in origin
    plain = {"state_dict": prefixed(weights, "backbone.") | {"criterion.weight": torch.ones(3)}}
    found, origin = checkpoints.find_weights(plain, "last.ckpt")
    assert found.keys() == weights.keys()
    assert "averaged" not in origin


def test_namespace_is_read_and_safetensors_too(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save({"model": weights, "args": argparse.Namespace(lr=1, model=VIM)}, tmp_path / "a.pth")
    assert checkpoints.read(str(tmp_path / "a.pth"))["args"].lr == 1
    checkpoints.main([str(tmp_path / "a.pth"), str(tmp_path / "a.safetensors")])
    loaded = safetensors.torch.load_file(tmp_path / "a.safetensors")
    found, _ = checkpoints.find_weights(checkpoints.read(str(tmp_path / "a.safetensors")), "a.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in loaded.items())
    assert found.keys() == loaded.keys() == weights.keys()


def test_differences_are_listed(weights: dict[str, torch.Tensor]) -> None:
    model = timm.create_model(VIM, num_classes=10)
    changed = {name: value for name, value in weights.items() if name != "cls_token"}
    changed |= {"extra": torch.ones(1), "head.bias": torch.ones(7)}
    with pytest.raises(UsageError) as caught:
        checkpoints.load_strictly(model, changed, "a.pth", VIM)
    assert str(caught.value) == (
        f"a.pth is no checkpoint of {VIM}: cls_token is missing, extra is unknown, head.bias is (7,) instead of (10,)."
    )


@pytest.mark.parametrize("family", ["vim", "fambav", "fastvim"])
def test_finetune_at_another_size(family: str, caplog: pytest.LogCaptureFixture) -> None:
    """Class rows keep their value and their place, patch rows are resized, another head is left out and said."""
    name = f"{family}_micro_patch8_32"
    old = timm.create_model(name, num_classes=5)
    new = timm.create_model(name, num_classes=10, img_size=48)
    head = new.head.weight.clone()
    with caplog.at_level(logging.INFO):
        weights, may_miss = checkpoints.adapt(old.state_dict(), new, "a.pth")
    checkpoints.load_strictly(new, weights, "a.pth", name, may_miss=may_miss)
    assert "5 classes" in caplog.text
    assert "4x4 to 6x6" in caplog.text
    assert torch.equal(new.head.weight, head)
    assert torch.equal(new.layers[3].mixer.in_proj.weight, old.layers[3].mixer.in_proj.weight)
    before, after = old.pos_embed.detach()[0], new.pos_embed.detach()[0]
    place = {"vim": (8, 18), "fambav": (0, 0), "fastvim": None}[family]
    if place is not None:
        assert torch.equal(after[place[1]], before[place[0]])
        before, after = (torch.cat([x[:i], x[i + 1 :]]) for x, i in zip((before, after), place))
    grid = F.interpolate(before.T.reshape(1, -1, 4, 4), size=(6, 6), mode="bicubic", align_corners=False)
    torch.testing.assert_close(after, grid[0].flatten(1).T)


def test_failed_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "checkpoint.pth"
    assert runs.save(path, {"epoch": 0})

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert not runs.save(path, {"epoch": 1})
    assert "No space left" in caplog.text
    assert checkpoints.read(str(path)) == {"epoch": 0}
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_full_disk_in_the_middle_of_a_write(tmp_path: Path) -> None:
    """A limit on the size of files stands for a disk that is full."""
    import resource

    path = tmp_path / "checkpoint.pth"
    assert runs.save(path, {"epoch": 0})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        assert not runs.save(path, {"epoch": 1, "model": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoints.read(str(path)) == {"epoch": 0}
    assert len(list(tmp_path.iterdir())) == 1


def test_auto_is_the_newest_whole_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = argparse.Namespace(resume="auto", output_dir=str(tmp_path), eval=False)
    assert runs.find(args) == ("", None)
    for epoch, name in enumerate(("best_checkpoint.pth", "checkpoint.pth")):
        torch.save({"epoch": epoch}, tmp_path / name)
        os.utime(tmp_path / name, (epoch, epoch))
    assert runs.find(args) == (str(tmp_path / "checkpoint.pth"), {"epoch": 1})
    (tmp_path / "checkpoint.pth").write_bytes(b"half")
    assert runs.find(args) == (str(tmp_path / "best_checkpoint.pth"), {"epoch": 0})
    assert "checkpoint.pth is no whole checkpoint" in caplog.text
    (tmp_path / "best_checkpoint.pth").write_bytes(b"")
    with pytest.raises(UsageError, match="is whole"):
        runs.find(args)


def test_every_truncation_and_flip_is_refused_or_harmless(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"model": {"head.bias": weights["head.bias"]}}, path)
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), 37):
        for damaged in (whole[:place], whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :]):
            path.write_bytes(damaged)
            try:
                checkpoints.find_weights(checkpoints.read(str(path)), "a.pth")
            except UsageError:
                refused += 1
    assert refused > len(whole) // 37  # every truncation, and those flips that are no padding


def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    torch.save({"model": {"a": torch.ones(1)}}, buffer)
    content = buffer.getvalue()
    opened = []

    class Opener:
        def open(self, url: str, timeout: float) -> io.BytesIO:
            opened.append(url)
            return io.BytesIO(content)

    monkeypatch.setattr("urllib.request.build_opener", lambda *handlers: Opener())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    good = f"https://example.com/vim-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    for _ in range(2):
        assert checkpoints.read(good)["model"]["a"] == 1
    assert opened == [good]
    with pytest.raises(UsageError, match="SHA-256"):
        checkpoints.read("https://example.com/vim-00000000.pth")
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1
    with pytest.raises(UsageError, match="https"):
        checkpoints.read("ftp://example.com/vim.pth")
    request = types.SimpleNamespace(full_url=good)
    with pytest.raises(UsageError, match="redirects to http://"):
        files._OnlyHttps().redirect_request(request, None, 302, "", {}, "http://example.com/vim.pth")


def test_log_lines_wait_for_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A full disk keeps no half of a line, and the next epoch writes the lines that waited."""
    import resource

    file, entries = tmp_path / "log.txt", [{"epoch": epoch} for epoch in range(3)]
    assert runs.append_log(file, entries[:1]) == []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(file.read_bytes()) + 5, before[1]))
    try:
        assert runs.append_log(file, entries[1:2]) == entries[1:2]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "its lines wait" in caplog.text
    assert file.read_text(encoding="utf-8") == '{"epoch": 0}\n'
    assert runs.append_log(file, entries[1:]) == []
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == entries


@pytest.mark.parametrize(
    ("name", "value"), [("epoch", None), ("epoch", "x"), ("step", 2.5), ("processes", 3), ("log", [1]), ("args", 1)]
)
def test_odd_entries_of_a_run_are_refused(name: str, value: object, tmp_path: Path) -> None:
    run = types.SimpleNamespace(restore=lambda checkpoint, path, args: len(checkpoint["processes"]))
    checkpoint = {"model": {}, "epoch": 0, "processes": []} | {name: value}
    torch.save(checkpoint, tmp_path / "a.pth")
    args = argparse.Namespace(resume=str(tmp_path / "a.pth"), output_dir="", model=VIM)
    with pytest.raises(UsageError, match="holds no state to go on from"):
        runs.resume(run, args)


def test_repair_log(tmp_path: Path) -> None:
    file = tmp_path / "log.txt"
    lines = [{"epoch": epoch, "train_loss": 0.1 * epoch} for epoch in range(4)]

    def write(*rows: object) -> None:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def read() -> list[object]:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    runs.repair_log(file, 0, None)
    assert not file.exists()
    write(*lines)
    runs.repair_log(file, 3, lines[2])
    assert read() == lines[:3]
    write(*lines[:2])
    runs.repair_log(file, 3, lines[2])
    assert read() == lines[:3]


# --- where the class token stood, which no key and no shape tells ---


@pytest.fixture(scope="module")
def places() -> dict[str, torch.nn.Module]:
    names = ("vim_small_patch16_224", "fambav_small_unpaired_patch16_224", "mambareg_small_patch16_224")
    with torch.device("meta"):
        return {name.split("_")[0]: timm.create_model(name, depth=2) for name in (*names, "fastvim_small_patch16_224")}


def test_the_small_model_of_the_release_is_not_paired(places: dict[str, torch.nn.Module]) -> None:
    vim, fambav = places["vim"], places["fambav"]
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (vim, fambav)]
    assert shapes[0] == shapes[1]
    assert (vim.class_token_positions(196), fambav.class_token_positions(196)) == ((98,), (0,))
    assert not fambav.if_bidirectional


def test_the_place_that_is_assumed_is_said(
    places: dict[str, torch.nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    small, unpaired = "vim_small_patch16_224", "fambav_small_unpaired_patch16_224"
    weights = {"model": {"cls_token": torch.zeros(1, 1, 384)}}

    def told(name: str, family: str, checkpoint: object = weights) -> str:
        caplog.clear()
        args = argparse.Namespace(model=name)
        checkpoints.accept(args, places[family], checkpoint, "small.pth")
        return caplog.text

    first = told(small, "vim")
    assert f"small.pth does not say where its class token stood: --model {small} takes it to be in the middle" in first
    assert f"If it stood in front of the patches, wanted --model fambav_small_patch16_224 or {unpaired} or" in first
    assert (
        f"takes it to be in front of the patches. If it stood in the middle of the patches, wanted --model {small}."
        in (told(unpaired, "fambav"))
    )
    assert "wanted a model with the other use_middle_cls_token" in told("mine", "vim")
    # a run of this program says which model it was, and in some models there is but one place
    run = weights | {"processes": [], "args": {"model": small}}
    assert told(small, "vim", run) == ""
    warned = told(unpaired, "fambav", run)
    assert f"small.pth is of --model {small}, whose class token stands in the middle of the patches; here it" in warned
    assert told("mambareg_small_patch16_224", "mambareg") == told("fastvim_small_patch16_224", "fastvim") == ""
    masked = {"model": {"cls_token": torch.zeros(1), "mask_token": torch.zeros(1)}}
    assert told(small, "vim", masked) == ""
