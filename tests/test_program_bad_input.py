"""A mistake of the user's: one sentence, exit code 2, nothing written; and genuine bugs keep their traceback."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import engine
from tests.conftest import MICRO, QUICK, Result, finish, start
from tests.program_data import write_cifar100, write_image_folder

VIM = "vim_micro_patch8_32"


class _Shell:
    def __reduce__(self) -> tuple:
        import os

        return os.system, ("echo run",)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data sets and checkpoints, good and bad."""
    root = tmp_path_factory.mktemp("files")
    weights = timm.create_model(VIM, num_classes=10).state_dict()
    torch.save({"model": weights}, root / "vim.pth")
    torch.save({"model": timm.create_model("fastvim_micro_patch8_32").state_dict()}, root / "other.pth")
    torch.save([1, 2], root / "list.pth")
    torch.save({"epoch": 1}, root / "weightless.pth")
    whole = (root / "vim.pth").read_bytes()
    (root / "half.pth").write_bytes(whole[: len(whole) // 2])
    (root / "noise.pth").write_bytes(b"\x00\x01noise" * 100)
    (root / "empty.pth").touch()
    (root / "noise.safetensors").write_bytes(b"noise" * 100)
    (root / "shell.pth").write_bytes(pickle.dumps({"model": _Shell()}, protocol=2))
    (root / "shell_new.pth").write_bytes(pickle.dumps({"model": _Shell()}))
    torch.save({"model": _Shell()}, root / "shell_zip.pth")
    (root / "empty").mkdir()
    write_image_folder(root / "folder")
    write_image_folder(root / "broken")
    (root / "broken" / "train" / "n00000001" / "0.JPEG").write_bytes(b"")
    write_image_folder(root / "stranger")
    shutil.copytree(root / "stranger" / "val" / "n00000000", root / "stranger" / "val" / "zebra")
    (root / "trainless" / "val").mkdir(parents=True)
    write_cifar100(root / "labels", label=100)
    (root / "codecifar" / "cifar-100-python").mkdir(parents=True)
    for name in ("train", "test"):
        (root / "codecifar" / "cifar-100-python" / name).write_bytes(pickle.dumps({b"data": _Shell()}))
    return {path.name: path for path in root.iterdir()}


CASES = {
    "model": ("--model vim_tiny_patch16_242", "vim_tiny_patch16_242", "vim_tiny_patch16_224"),
    "timm model": ("--model resnet5", "resnet5", "nearest"),
    "flag": ("--batchsize 4", "--batchsize"),
    "number": ("--batch-size four", "--batch-size", "whole number"),
    "range": ("--drop-path 1.5", "--drop-path", "1.5"),
    "nan": ("--lr nan", "--lr"),
    "data set": ("--data-set CIFR", "CIFR", "CIFAR, CIFAR10, IMNET, INAT, INAT19, DIGITS"),
    "no path": ("--data-set IMNET", "--data-path"),
    "missing path": ("--data-set IMNET --data-path {root}/nowhere", "nowhere", "does not exist"),
    "empty path": ("--data-set IMNET --data-path {empty}", "empty"),
    "empty inat": ("--data-set INAT --data-path {empty}", "empty"),
    "not inat": ("--data-set INAT --data-path {folder}", "train2018.json"),
    "no train folder": ("--data-set IMNET --data-path {trainless}", "trainless"),
    "unknown class": ("--data-set IMNET --data-path {stranger}", "zebra"),
    "labels": ("--data-set CIFAR --data-path {labels}", "label 100", "0 to 99"),
    "code in data": ("--data-set CIFAR --data-path {codecifar}", "system"),
    "timm data set": ("--data-set timm/torch/nothing --data-path {folder}", "timm/torch/nothing"),
    "classes": ("--num-classes 7", "--num-classes"),
    "image size": ("--input-size 4", "img_size is (4, 4)"),
    "image size of a ViT": ("--model test_vit --input-size 40", "--input-size 40"),
    "eval": ("--eval", "--eval", "--resume"),
    "missing file": ("--eval --resume {root}/nowhere.pth", "nowhere.pth"),
    "other model": (
        "--eval --resume {other.pth}",
        "other.pth",
        "cls_token is missing",
        "layernorm",
        "more differences",
    ),
    "other model resumed": ("--resume {other.pth}", "cls_token is missing"),
    "other model finetuned": ("--finetune {other.pth}", "cls_token is missing"),
    "other classes": ("--eval --resume {vim.pth} --data-set CIFAR --data-path {codecifar}", "system"),
    "half": ("--eval --resume {half.pth}", "half.pth", "no whole checkpoint"),
    "noise": ("--finetune {noise.pth}", "noise.pth"),
    "empty file": ("--resume {empty.pth}", "empty.pth"),
    "noise safetensors": ("--finetune {noise.safetensors}", "noise.safetensors"),
    "list": ("--finetune {list.pth}", "list.pth", "list"),
    "list resumed": ("--resume {list.pth}", "list.pth"),
    "no weights": ("--eval --resume {weightless.pth}", "weightless.pth"),
    "code": ("--finetune {shell.pth}", "shell.pth", "refused", "system"),
    "code in a newer pickle": ("--finetune {shell_new.pth}", "shell_new.pth", "more than weights"),
    "code in an archive": ("--finetune {shell_zip.pth}", "shell_zip.pth", "refused", "system"),
    "http": ("--finetune http://example.com/a.pth", "https"),
    "auto": ("--resume auto", "--output_dir"),
    "auto for nothing": ("--eval --resume auto", "--resume auto"),
    "output": ("--output_dir {vim.pth}", "--output_dir", "wanted a folder"),
    "output in a file": ("--output_dir {vim.pth}/output", "--output_dir", "cannot be written"),
    "odd batch": ("--batch-size 7", "--batch-size is 7", "--mixup 0"),
    "teacher": ("--distillation-type hard", "--teacher-path"),
    "teacher's name": ("--distillation-type hard --teacher-model regnety_161", "regnety_160"),
    "cosub": ("--cosub --distillation-type hard", "--cosub"),
    "policy": ("--aa nonsense", "--aa"),
    "optimiser": ("--opt adamww", "adamw"),
    "second order": ("--opt adahessian", "second derivative"),
    "betas": ("--opt-betas 0.9", "--opt adamw"),
    "schedule": ("--sched cosin", "--sched", "cosine"),
    "device": ("--device tpu", "--device", "cuda"),
    "world": ("--world_size 2", "torchrun"),
    "division": ("--fsdp", "--fsdp", "torchrun"),
    "division in eval": ("--fsdp --eval --resume {vim.pth}", "--eval contradicts --fsdp"),
    "merging and pooling": ("--fusion-strategy all --spatial-pool row", "pooling", "merging"),
    "fusion layer": ("--fusion-strategy upper --fusion-layer 9 --fusion-token 1", "fusion_layer", "0 to 3"),
    "fusion token": ("--fusion-strategy all --fusion-token -1", "fusion_token"),
    "pruning": ("--model dyvm_micro_patch8_32", "--model-path"),
    "teacher of another size": ("--model dyvm_micro_patch8_32 --model-path {other.pth}", "other.pth"),
    "keep ratio": ("--model dyvm_micro_patch8_32 --token-keep-ratio 2", "--token-keep-ratio is 2"),
    "gate noise": ("--model dyvm_micro_patch8_32 --gate-noise-end 1.5", "--gate-noise-end is 1.5; wanted 0 to 1"),
    "gate noise without gates": (
        "--model dyvm_micro_patch8_32 --pruning token --gate-noise-end 0",
        "--gate-noise-end wants --pruning block or both",
    ),
    "gate noise of gates that do not learn": (
        "--model dyvm_micro_patch8_32 --pruning-policy static --gate-noise-end 0",
        "--gate-noise-end wants",
        "--pruning-policy learned",
    ),
    "random positions": ("--model test_vit --input-size 32 --if_random_token_rank", "--if_random_token_rank"),
    "cutmix": ("--cutmix-minmax 0.8 0.2", "--cutmix-minmax"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_sentence(
    case: str, program: Callable[..., Result], files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "device":
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    text, *wanted = CASES[case]
    for name, path in {"root": files["vim.pth"].parent, **files}.items():
        text = text.replace(f"{{{name}}}", str(path))
    output = tmp_path / "output"
    flags = [*QUICK, *([] if case == "auto" else ["--output_dir", output]), *text.split()]
    result = program(*flags)
    assert result.code == 2
    lines = [line for line in result.err.splitlines() if not line.endswith("changes nothing.")]
    assert len(lines) == 1, result.err
    assert lines[0].startswith("main.py: error: ")
    for part in wanted:
        assert part in lines[0]
    assert not output.exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_is_named(
    workers: int, program: Callable[..., Result], files: dict[str, Path], tmp_path: Path
) -> None:
    flags = [*QUICK, "--data-set", "IMNET", "--data-path", files["broken"], "--num_workers", workers]
    result = program(*flags, "--output_dir", tmp_path, "--no-repeated-aug")
    assert result.code == 2
    name = str(Path("train", "n00000001", "0.JPEG"))
    assert [name in line for line in result.err.splitlines()] == [True]
    assert not list(tmp_path.glob("*.pth"))


def test_odd_images_are_read(program: Callable[..., Result], tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "data", train=4)
    folder = root / "train" / "n00000000"
    picture = Image.open(next(folder.iterdir())).convert("RGB")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.quantize(16).save(folder / "palette.png")
    picture.convert("L").save(folder / "grey.png")
    picture.convert("LA").save(folder / "alpha.png")
    Image.new("I;16", (40, 40), 65535).save(folder / "deep.png")
    picture.save(folder / "really_a_png.jpg", format="PNG")
    result = program(*QUICK, "--data-set", "IMNET", "--data-path", root, "--no-repeated-aug", "--epochs", 2)
    assert result.code == 0, result.err


def test_bugs_keep_their_traceback(program: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(engine, "build_optimizer", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        program(*QUICK)


def test_exit_code_of_the_process() -> None:
    result = finish(start(MICRO, *QUICK, "--data-set", "NONE"))
    assert (result.code, result.out) == (2, "")
    assert result.err.count("\n") == 1
