"""Files that would harm a run, and runs that would harm each other: what is refused, kept apart or put aside."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoints
import datasets
import run as runs
from tests.conftest import QUICK, ROOT, Result, lines
from tests.program_data import write_image_folder
from utils import UsageError, files, randomness


class _Pointers:
    def __reduce__(self) -> tuple:
        return np.ndarray, ((8,), np.dtype("O"), b"AAAAAAAA" * 8)


class _Module:
    def __reduce__(self) -> tuple:
        return np.lib.format.open_memmap, ("x", "w+", np.uint8, (1,))


@pytest.mark.parametrize("data", [_Pointers(), _Module(), np.array([None]), np.zeros((1, 3072), np.float32)])
def test_cifar_holds_arrays_of_numbers_and_nothing_else(data: object, tmp_path: Path) -> None:
    (tmp_path / "train").write_bytes(pickle.dumps({b"data": data, b"fine_labels": [0]}, 2))
    with pytest.raises(UsageError, match="is no CIFAR file"):
        datasets._cifar_arrays(tmp_path, ["train"], b"fine_labels")


def test_random_states_name_places_inside_them() -> None:
    state = randomness.random_state(torch.device("cpu"))
    randomness.set_random_state(state, torch.device("cpu"))
    state["numpy"][2] = 2**30
    with pytest.raises(ValueError, match="position is 1073741824"):
        randomness.set_random_state(state, torch.device("cpu"))


def test_small_files_that_ask_for_all_memory_are_refused(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(1, 64).expand(10**7, 64)}}, tmp_path / "a.pth")
    with pytest.raises(UsageError, match="repeats its elements"):
        checkpoints.read(str(tmp_path / "a.pth"))
    whole = io.BytesIO()
    torch.save({"model": {"a": torch.zeros(1 << 20)}}, whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    with pytest.raises(UsageError, match="compressed archive"):
        checkpoints.read(str(tmp_path / "b.pth"))
    Image.new("L", (1, 1000)).save(tmp_path / "thin.png")
    with pytest.raises(UsageError, match="100 to 1"):
        datasets.load_image(str(tmp_path / "thin.png"))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (b"\xef\xbb\xbf<?xml version='1.0'?><Error>", "is a web page"),
        (b'{"error": "not found"}', "is no whole checkpoint but a text .*not found"),
        (b"", "is empty; wanted a checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_named(content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "vim.pth").write_bytes(content)
    with pytest.raises(UsageError, match=told):
        checkpoints.read(str(tmp_path / "vim.pth"))


def test_figures_beside_weights_are_no_code(tmp_path: Path) -> None:
    from collections import defaultdict
    from datetime import datetime

    beside = {"best": np.float64(76.1), "array": np.ones(3), "when": datetime(2026, 1, 1), "more": defaultdict(list)}
    beside |= {"full": defaultdict(list, {1: [2]}), "nested": defaultdict(dict, {"a": {"b": 1.0}}), "set": {1, 2}}
    beside |= {"counted": defaultdict(int, {3: 4}), "frozen": frozenset([1]), "number": 1j, "bytes": bytearray(b"a")}
    torch.save({"model": {"net.head.weight": torch.ones(2)}, **beside}, tmp_path / "a.pth")
    weights, _ = checkpoints.find_weights(checkpoints.read(str(tmp_path / "a.pth")), "a.pth")
    assert weights.keys() == {"head.weight"}


def test_pictures_keep_their_side_and_range(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(np.zeros((20, 40, 3), np.uint8)).save(tmp_path / "turned.jpg", exif=exif)
    assert datasets.load_image(str(tmp_path / "turned.jpg")).size == (20, 40)
    assert datasets.load_image(str(tmp_path / "turned.jpg"), upright=False).size == (40, 20)
    ramp = np.tile(np.linspace(0, 1, 40, dtype=np.float32), (20, 1))
    pictures = {
        "unit.tif": ramp,
        "bytes.tif": ramp * 255,
        "deep.png": (ramp * 4095).astype(np.uint16),
        "wide.tif": (ramp * 65535).astype(np.int32),
    }
    for name, values in pictures.items():
        Image.fromarray(values).save(tmp_path / name)
        loaded = np.asarray(datasets.load_image(str(tmp_path / name)))
        assert (loaded.min(), loaded.max()) == (0, 255), name
    ramp[0, 0] = np.nan
    Image.fromarray(ramp).save(tmp_path / "nan.tif")
    with pytest.raises(UsageError, match="not finite"):
        datasets.load_image(str(tmp_path / "nan.tif"))
    # numbers around 0, as normalised pictures and Hounsfield units are: half of them would be black
    ramp[0, 0] = 0
    for name, values in {"normal.tif": 2 * ramp - 1, "units.tif": (ramp * 2000).astype(np.int32) - 999}.items():
        Image.fromarray(values).save(tmp_path / name)
        with pytest.raises(UsageError, match="it holds values from -(1|999) to 1.*; wanted black at 0"):
            datasets.load_image(str(tmp_path / name))
    with pytest.raises(UsageError, match="--max-pixels 800 allows it"):
        datasets.load_image(str(tmp_path / "unit.tif"), max_pixels=799)
    (tmp_path / "program.JPEG").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\nshowpage\n%%EOF\n", encoding="utf-8"
    )
    with pytest.raises(UsageError, match="it is none of JPEG, PNG, WEBP, .* or of numbers that Pillow does not know"):
        datasets.load_image(str(tmp_path / "program.JPEG"))


def test_hidden_folders_are_no_classes(
    program: Callable[..., Result], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_image_folder(tmp_path / "data", train=4)
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "n00000000" / "notes.txt").write_text("no image", encoding="utf-8")
    names = datasets.class_names(root / "train")
    assert len(names) == 3
    numbers = {name: number for number, name in enumerate(names[:2])}
    folder = datasets.ClassFolders(root / "train", lambda image: image, datasets.load_image, numbers, cut=True)
    assert (folder.classes, len(folder)) == (names[:2], 8)
    assert "1 files that are no images are left out" in caplog.text
    args = (*QUICK, "--data-set", "IMNET", "--no-repeated-aug")
    for name in (root / "train").iterdir():
        for file in [*name.iterdir()]:
            file.rename(root / "train" / f"{name.name}_{file.name}") if file.suffix != ".txt" else file.unlink()
        name.rmdir()
    result = program(*args, "--data-path", root)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "train has no folder of images" in result.err


def test_runs_keep_apart(program: Callable[..., Result], cifar: Path, tmp_path: Path) -> None:
    common = (*QUICK, "--data-set", "CIFAR", "--data-path", cifar, "--output_dir", tmp_path / "run")
    assert program(*common).code == 0
    first = torch.load(tmp_path / "run" / "checkpoint.pth")
    # a run from the beginning puts the old one aside
    result = program(*common, "--seed", 1)
    assert "checkpoint.pth is now checkpoint_before.pth" in result.err
    aside = torch.load(tmp_path / "run" / "checkpoint_before.pth")
    assert torch.equal(aside["model"]["head.weight"], first["model"]["head.weight"])
    # a folder belongs to one process at a time
    holder = "import argparse, sys, time, run\nheld = run.claim_output(argparse.Namespace(output_dir=sys.argv[1]))\n"
    command = [sys.executable, "-c", f"{holder}print('held', flush=True)\ntime.sleep(60)", str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        result = program(*common, "--resume", "--epochs", 2)
        process.kill()
    assert result.code == 2
    assert "belongs to a run that is still going" in result.err
    # a new folder for a run that goes on; the schedule follows the flags
    moved = tmp_path / "moved"
    flags = (*common[:-1], moved, "--epochs", 3, "--lr", 0.01, "--resume", tmp_path / "run" / "checkpoint.pth")
    result = program(*flags)
    assert result.code == 0, result.err
    assert "--epochs 1 -> 3" in result.err
    assert "--lr 0.05 -> 0.01" in result.err
    assert [line["epoch"] for line in lines(moved)] == [0, 1, 2]
    result = program(*flags, "--opt", "sgd")
    assert result.code == 2
    assert "was trained with --opt adamw, and --opt sgd cannot go on from its state" in result.err


def test_auto_goes_by_progress_and_not_by_time(tmp_path: Path) -> None:
    for epoch, name in ((4, "checkpoint.pth"), (0, "best_checkpoint.pth")):
        torch.save({"epoch": epoch}, tmp_path / name)
    os.utime(tmp_path / "checkpoint.pth", (1, 1))
    args = argparse.Namespace(resume="auto", output_dir=str(tmp_path), eval=False)
    assert runs.find(args)[1] == {"epoch": 4}


def test_a_run_that_cannot_save_fails(
    program: Callable[..., Result], cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "save", lambda path, checkpoint: False)
    result = program(*QUICK, "--data-set", "CIFAR", "--data-path", cifar, "--output_dir", tmp_path / "run")
    assert result.code == 1
    assert "could not be written" in result.err


@pytest.mark.parametrize(("name", "told"), [("mamba_ssm", "mamba_ssm is another project's"), ("causal_conv1d", "")])
def test_a_foreign_package_is_named_and_not_loaded(name: str, told: str, tmp_path: Path) -> None:
    """Whatever it does when it is imported."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise OSError('undefined symbol')", encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", "import sys; sys.argv[0] = 'main.py'; import fusion"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"main.py: error: {told or name}")
    assert "wanted the one of this checkout: bash scripts/setup.sh" in line


def test_a_tilde_is_the_home_folder_in_every_path(
    program: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vim_weights: Path, cifar: Path
) -> None:
    """The shell leaves the tilde of --flag=~/place as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    here = set(os.listdir())
    (tmp_path / "w.pth").write_bytes(vim_weights.read_bytes())
    flags = [*QUICK, "--data-set", "CIFAR", "--data-path", cifar, "--eval", "--fusion-strategy", "all"]
    done = program(*flags, "--fusion-token", 2, "--resume=~/w.pth", "--output_dir=~/out", "--visualize=~/seen")
    assert done.code == 0, done.err
    assert [*(tmp_path / "seen").rglob("*.png")]
    for flag in ("--teacher-path=~/t.pth --distillation-type hard", "--finetune=~/t.pth", "--model-path=~/t.pth"):
        assert f"{tmp_path}/t.pth" in program(*QUICK, *flag.split()).err
    with pytest.raises(UsageError, match=str(tmp_path)):
        checkpoints.main(["~/nowhere.pth", "~/out.pth"])
    assert set(os.listdir()) == here


def test_the_first_epoch_is_saved_before_its_evaluation(program: Callable[..., Result], tmp_path: Path) -> None:
    data = write_image_folder(tmp_path / "data")
    broken = next((data / "val").rglob("*.JPEG"))
    whole = broken.read_bytes()
    broken.write_bytes(b"broken")
    flags = [*QUICK, "--data-set", "IMNET", "--data-path", data, "--output_dir", tmp_path / "out"]
    failed = program(*flags)
    assert failed.code == 2
    assert str(broken) in failed.err
    kept = checkpoints.read(str(tmp_path / "out" / "checkpoint.pth"))
    assert (kept["epoch"], kept["step"] > 0) == (-1, True)
    broken.write_bytes(whole)
    again = program(*flags, "--resume", "auto")
    assert again.code == 0, again.err
    assert [line["epoch"] for line in lines(tmp_path / "out")] == [0]
    over = program(*flags, "--resume", "auto")
    assert over.code == 0
    assert "has trained 1 epochs and --epochs is 1: nothing is left to do" in over.out + over.err


def test_the_best_checkpoint_is_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copying another over it leaves the last one as it is, whichever way it was made."""
    last, best = tmp_path / "checkpoint.pth", tmp_path / "best_checkpoint.pth"
    for content in (b"first" * 1000, b"second"):
        last.write_bytes(content)
        files.copy_whole(last, best)
        assert best.read_bytes() == content
        with open(best, "r+b") as file:
            file.write(b"other")
        assert last.read_bytes() == content
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    assert {file.name for file in tmp_path.iterdir()} == {last.name, best.name}
