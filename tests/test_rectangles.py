"""Images that are no squares: `--input-size H W` from flags to pictures, for every task that takes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import checkpoints
import fusion
from benchmarks import flops, throughput
from benchmarks.small_data import write_shapes
from tasks import augmentation
from tasks.detect.data import LargeScaleJitter
from tasks.detect.detector import FitAndPad
from tasks.segment.transforms import TestTransform, TrainTransform
from tests import detection_data, micro_models  # noqa: F401 - their names join the registry
from tests.conftest import QUICK, Result, call_program
from utils.flags import Parser, Sides

SIZE = (16, 48)
DIGITS = [*QUICK, "--data-set", "DIGITS", "--batch-size", "240", "--input-size", "16", "48", "--no-repeated-aug"]
CLASSIFY = [*DIGITS, "--label-share", "0.1", "--no-model-ema", "--output_dir"]


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        (["48"], 48),
        (["32", "64"], (32, 64)),
        (["32x64"], (32, 64)),
        (["32X32"], 32),
        (["32", "32"], 32),
        (["1", "2", "3"], "'1 2 3' is not a side, or height and width"),
        (["32x64", "3"], "'32x64 3' is not a side"),
        (["3x4x5"], "'3x4x5' is not a side"),
        (["32x"], "'' is not a whole number from 1"),
        (["0x4"], "'0' is not a whole number from 1"),
        (["a"], "'a' is not a whole number from 1"),
    ],
)
def test_sizes_are_read(typed: list[str], wanted: object) -> None:
    parser = Parser(prog="p")
    parser.add_argument("--size", action=Sides, default=224)
    assert parser.parse_args([]).size == 224
    if isinstance(wanted, str):
        with pytest.raises(ValueError, match="Argument --size: .*".replace(".*", wanted)):
            parser.parse_args(["--size", *typed])
    else:
        assert parser.parse_args(["--size", *typed]).size == wanted


def arguments(*flags: str) -> object:
    import main

    return main.parse(["--device", "cpu", *flags])


@pytest.mark.parametrize("size", [(16, 32), (48, 32), (20, 90)])
@pytest.mark.parametrize("flags", [[], ["--src"], ["--ThreeAugment"]])
@pytest.mark.parametrize("image", [(10, 100), (100, 10), (40, 40)])
def test_images_keep_their_shape(size: tuple[int, int], flags: list[str], image: tuple[int, int]) -> None:
    """What is seen of an image is cropped from it: a line of one column stays as wide as it is high."""
    args = arguments("--model", "vim_micro_patch8_32", "--input-size", *map(str, size), *flags)
    picture = Image.new("RGB", image)
    for is_train in (True, False):
        assert augmentation.build_transform(is_train, args)(picture).shape == (3, *size)
    square = Image.new("L", (200, 200))
    square.paste(255, (60, 60, 140, 140))
    seen = augmentation.build_transform(False, args)(square.convert("RGB"))[0] > 0
    rows, cols = seen.any(1).sum(), seen.any(0).sum()
    assert rows == min(cols, size[0]) or cols == min(rows, size[1]) or abs(rows - cols) <= 1


@pytest.mark.parametrize("family", ["vim", "fambav", "fastvim", "dyvm", "mambareg", "dyvm_mambareg", "mae_fastvim"])
def test_models(family: str) -> None:
    """Each is the model of its transposed images where it scans rows, but for the grid."""
    model = timm.create_model(f"{family}_micro_patch8_32", img_size=SIZE).eval()
    assert model.patch_embed.grid_size == (2, 6)
    out = model(torch.randn(2, 3, *SIZE))
    assert all(part.isfinite().all() for part in (out if isinstance(out, tuple) else (out,)))
    with pytest.raises(ValueError, match="48 x 16") if "fastvim" not in family or "mae" in family else torch.no_grad():
        model(torch.randn(2, 3, *SIZE[::-1]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    result = call_program(*CLASSIFY, output)
    assert result.code == 0, result.err
    return output / "checkpoint.pth"


def test_training_and_going_on(trained: Path, tmp_path: Path, program: Callable[..., Result]) -> None:
    again = program(*CLASSIFY, trained.parent, "--epochs", 2, "--resume", "auto")
    assert again.code == 0, again.err
    # as many patches as before, but elsewhere
    turned = program(*CLASSIFY, tmp_path, "--eval", "--resume", trained, "--input-size", "48x16")
    assert turned.code == 2
    assert "was trained at --input-size 16 48, whose grid is another than that of 48 16" in turned.err


@pytest.mark.parametrize("keywords", [dict(fusion_strategy="all", fusion_token=2), dict(pruning="both")])
def test_pictures(keywords: dict[str, object], tmp_path: Path) -> None:
    more = dict(pruning_loc=(1, 2, 3)) if "pruning" in keywords else {}
    model = timm.create_model("vim_micro_patch8_32", img_size=SIZE, **keywords, **more).eval()
    fusion.draw(model, torch.randn(1, 3, *SIZE), tmp_path)
    pictures = [*tmp_path.rglob("*.png")]
    assert pictures
    assert any(Image.open(file).width > Image.open(file).height for file in pictures)


@pytest.mark.parametrize(("size", "grid"), [(["48", "16"], "2x6 to 6x2"), (["32"], "2x6 to 4x4")])
def test_fine_tuning_at_another_size(
    size: list[str], grid: str, trained: Path, tmp_path: Path, program: Callable[..., Result]
) -> None:
    result = program(*CLASSIFY, tmp_path, "--input-size", *size, "--finetune", trained, "--lr", 0)
    assert result.code == 0, result.err
    assert f"position embedding resized from {grid}" in result.out + result.err


@pytest.mark.parametrize("name", ["mae_vim", "dyvm"])
def test_others_train(name: str, tmp_path: Path, program: Callable[..., Result], trained: Path) -> None:
    flags = ["--model", f"{name}_micro_patch8_32", *(["--model-path", trained] if name == "dyvm" else [])]
    flags += ["--label-share", 0.1] if name != "mae_vim" else []
    result = program(*DIGITS, *flags, "--output_dir", tmp_path, "--visualize", tmp_path)
    assert result.code == 0, result.err
    assert [*tmp_path.rglob("*.png")]


def test_positions_are_of_the_grid_that_the_file_names() -> None:
    """Without its size, twelve rows are of no square and stay what they are; with it, they are resized."""
    old, new = (timm.create_model("vim_micro_patch8_32", img_size=size) for size in (SIZE, SIZE[::-1]))
    with torch.no_grad():
        old.pos_embed.copy_(torch.arange(13).view(1, 13, 1).expand_as(old.pos_embed))
    kept, _ = checkpoints.adapt(old.state_dict(), new, "a.pth")
    assert torch.equal(kept["pos_embed"], old.pos_embed)
    fitted, _ = checkpoints.adapt(old.state_dict(), new, "a.pth", SIZE)
    assert not torch.equal(fitted["pos_embed"], old.pos_embed)
    assert fitted["pos_embed"].shape == old.pos_embed.shape
    for flags in (None, {"input_size": "32"}, {"input_size": [1, 2, 3]}, {"input_size": [0, 4]}, {"input_size": True}):
        assert checkpoints.trained_size({"model": {}, "args": flags}) is None
    assert checkpoints.trained_size({"args": {"input_size": [16, 48]}}) == SIZE
    assert checkpoints.trained_size({"args": {"input_size": 32}}) == (32, 32)


def test_crops_and_windows_of_dense_tasks(tmp_path: Path) -> None:
    image, labels = torch.randint(256, (3, 40, 90), dtype=torch.uint8), torch.randint(5, (40, 90), dtype=torch.uint8)
    pixels, mask = TrainTransform(SIZE)(image, labels)
    assert (pixels.shape, mask.shape) == ((3, *SIZE), SIZE)
    assert TestTransform(SIZE)(image, labels)[0].shape == (3, 21, 48)
    target = dict(masks=torch.ones(1, 40, 90, dtype=torch.uint8), labels=torch.ones(1), boxes=torch.ones(1, 4))
    for _ in range(5):
        cropped, found = LargeScaleJitter(SIZE, (0.5, 2.0))(image, target)
        assert all(side <= most for side, most in zip(cropped.shape[1:], SIZE))
        assert found["masks"].shape[1:] == cropped.shape[1:]
    batch, _ = FitAndPad(SIZE).eval()([image.float() / 255, image.mT.float() / 255])
    assert batch.tensors.shape == (2, 3, *SIZE)
    assert batch.image_sizes == [(16, 36), (16, 7)]


def test_dense_tasks_train(tmp_path: Path, program: Callable[..., Result], trained: Path) -> None:
    steps = ["--iterations", 1, "--eval-interval", 1, "--warmup-iters", 0, "--num_workers", 0, "--device", "cpu"]
    shapes = write_shapes(tmp_path / "shapes", 4, 2)
    flags = ["--data-path", shapes, "--batch-size", 2, "--input-size", "16x48", "--finetune", trained, *steps]
    result = program("--task", "segment", "--model", "vim_micro_patch8_32", *flags, "--seg-channels", 8)
    assert result.code == 0, result.err
    root = detection_data.write(tmp_path / "coco")
    flags = ["--data-set", "COCO", "--data-path", root, "--input-size", "32", "48", "--batch-size", 2, *steps]
    flags += ["--det-channels", 8, "--det-fc-channels", 8, "--visualize", tmp_path / "seen"]
    result = program("--task", "detect", "--model", "fastvim_micro_patch8_32", *flags)
    assert result.code == 0, result.err
    assert [*(tmp_path / "seen").glob("image_*.png")]


def test_what_takes_none_says_so(program: Callable[..., Result], vim_weights: Path) -> None:
    cells = ["--task", "cells", "--data-set", "CELLS_DIGITS", "--model", "fastchannelvim_micro_patch8_32"]
    for flags, told in (
        ([*cells, "--input-size", 16, 32], "--input-size 16x32: cells are turned by quarters in training"),
        ([*QUICK, "--model", "test_vit", "--input-size", 40, 48], "--input-size 40x48 does not fit test_vit"),
        ([*QUICK, "--task", "segment", "--input-size", "16x32", "--slide-stride", 20], "more than --input-size 16x32"),
    ):
        result = program(*flags)
        assert result.code == 2, result.err
        assert told in result.err, result.err


def test_speed_and_multiply_adds(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    name = "vim_micro_patch8_32"
    quick = ["--seconds", "0", "--batch-size", "1", "--threads", "1", "--json", str(tmp_path / "a.json")]
    throughput.main([name, "--img-size", "16x48", *quick])
    assert "| 16x48 |" in capsys.readouterr().out
    flops.main([name, "--img-size", "16", "48"])
    flops.main([name, "--img-size", "24", "32"])
    first, second = (line.split("|", 2)[2] for line in capsys.readouterr().out.splitlines() if name in line)
    assert first == second  # of twelve patches each
