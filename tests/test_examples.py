"""Every example runs as its first lines say, and does what it says."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import fusion
import main as program
from examples import classify, export_onnx, merge_in_other_vim, new_method, new_operator, new_strategy, new_task
from tasks.backbone import build_backbone
from tests import conftest, micro_models

ROOT = Path(__file__).resolve().parents[1]
DIM = micro_models.SIZES["embed_dim"]


@pytest.fixture(autouse=True)
def _keep_logging(one_thread: None):
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:], logging.root.level = handlers, level


def test_every_example_is_tested() -> None:
    files = {path.stem for path in (ROOT / "examples").glob("*.py")}
    wanted = {"classify", "export_onnx", "merge_in_other_vim", "new_method", "new_operator", "new_strategy", "new_task"}
    assert files == wanted


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    return str(path)


def test_classify_reads_the_model_from_the_checkpoint(
    cifar: Path, picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    merging = ("--fusion-strategy", "all", "--fusion-token", "2")
    data = ("--data-set", "CIFAR", "--data-path", str(cifar), "--output_dir", str(output))
    assert program.main([*conftest.QUICK, *data, *merging]) == 0
    checkpoint = str(output / "checkpoint.pth")
    capsys.readouterr()
    classify.main([checkpoint, picture, picture])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert lines[0].startswith("picture.png: class ")

    saved = torch.load(checkpoint)
    model = build_backbone(argparse.Namespace(**saved["args"]), 100).eval()
    model.load_state_dict(saved["model"])
    assert model.site_methods, "the flags in the checkpoint switch merging on"
    probabilities = classify.classify(checkpoint, [picture])
    assert probabilities.shape == (1, 100)
    torch.testing.assert_close(probabilities.sum(), torch.tensor(1.0))


def test_classify_takes_weights_alone_with_a_name(picture: str, vim_weights: Path, tmp_path: Path) -> None:
    weights = torch.load(vim_weights)["model"]
    torch.save(weights, tmp_path / "bare.pth")
    found = classify.classify(str(tmp_path / "bare.pth"), [picture], "vim_micro_patch8_32")
    model = timm.create_model("vim_micro_patch8_32", num_classes=100).eval()
    model.load_state_dict(weights)
    images = timm.data.create_transform(
        (3, 32, 32), crop_pct=1.0, interpolation="bicubic", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )(Image.open(picture))
    with torch.no_grad():
        torch.testing.assert_close(found, model(images[None]).softmax(-1))


def test_merging_from_outside_equals_merging_inside() -> None:
    torch.manual_seed(0)
    sizes = dict(img_size=32, embed_dim=DIM, depth=4, patch_size=8, num_classes=10)
    merging = dict(fusion_strategy="upper", fusion_layer=0, fusion_token=3, fusion_order="raster")
    own = timm.create_model("vim_nano_patch4_32", use_middle_cls_token=False, **sizes, **merging).eval()
    theirs = merge_in_other_vim.TheirVim(32, 8, DIM, 4, 10).eval()
    theirs.load_state_dict(own.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = theirs(images)
        handles = merge_in_other_vim.add_token_merging(theirs.layers, layer=0, r=3)
        merged = theirs(images)
        torch.testing.assert_close(merged, own(images), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(merged, plain)
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(theirs(images), plain)


def test_merging_from_outside_runs(capsys: pytest.CaptureFixture[str]) -> None:
    merge_in_other_vim.main()
    assert "[65, 65, 65, 65, 57, 49, 41, 33] with merging" in capsys.readouterr().out


@pytest.fixture
def registered() -> Iterator[None]:
    """Both methods from outside, as their own programs register them."""
    for method in (new_strategy.RampMerging, new_method.EarlyReadout):
        fusion.register(method)
    yield
    for method in (new_strategy.RampMerging, new_method.EarlyReadout):
        fusion.unregister(method.name)


def code_lines(module: ModuleType, start: str) -> int:
    code = Path(module.__file__).read_text(encoding="utf-8").partition(start)[2]
    return len([line for line in code.splitlines() if line.strip()])


@pytest.mark.usefixtures("registered")
def test_new_strategy_merges_more_and_more() -> None:
    model = timm.create_model("vim_nano_patch4_32", ramp=10, depth=5, embed_dim=DIM).eval()
    assert model.methods.ramp.most == 10
    lengths: list[int] = []
    with torch.no_grad():
        model.encode(model.embed(torch.randn(1, 3, 32, 32)), lambda index, state: lengths.append(state.num_tokens))
    merged = [before - after for before, after in zip([65, *lengths], lengths)]
    assert merged == [0, 2, 5, 8, 10]


@pytest.mark.usefixtures("registered")
def test_new_strategy_is_thirty_lines_and_trains(cifar: Path, tmp_path: Path) -> None:
    assert code_lines(new_strategy, "@dataclass") < 30
    data = ("--data-set", "CIFAR", "--data-path", str(cifar), "--output_dir", str(tmp_path))
    assert program.main([*conftest.QUICK, "--ramp", "3", *data]) == 0
    assert (tmp_path / "checkpoint.pth").exists()


@pytest.mark.usefixtures("registered")
def test_new_method_has_a_flag_a_loss_and_a_parameter(cifar: Path, vim_weights: Path, tmp_path: Path) -> None:
    assert code_lines(new_method, "@dataclass") < 60
    data = ("--data-set", "CIFAR", "--data-path", str(cifar), "--output_dir", str(tmp_path))
    flags = ("--early-readout", "1", "--early-readout-weight", "0.5", "--finetune", str(vim_weights))
    assert program.main([*conftest.QUICK, *flags, *data]) == 0
    line = conftest.lines(tmp_path)[0]
    assert line["train_last"] + line["train_early"] == pytest.approx(line["train_loss"], rel=1e-4)
    assert line["train_early"] == pytest.approx(0.5 * line["train_last"], rel=0.2)  # the untrained heads know nothing
    saved = torch.load(tmp_path / "checkpoint.pth")["model"]
    assert saved["early_head.weight"].shape == (100, DIM)
    assert not torch.equal(saved["head.weight"], torch.load(vim_weights)["model"]["head.weight"])


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--ramp 3 --fusion-strategy all --fusion-token 2", "--ramp merges tokens itself: wanted it without another"),
        ("--early-readout 1 --pruning block", "--early-readout and pruning both replace what training returns"),
        ("--early-readout 4", "early_readout is 4; wanted a site, 0 to 3."),
    ],
)
def test_conflicts_of_methods_from_outside_are_refused_at_start(
    flags: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main([*conftest.QUICK, *flags.split()]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_methods_from_outside_are_gone_and_names_are_taken_once() -> None:
    with pytest.raises(TypeError, match="does not know ramp"):
        timm.create_model("vim_nano_patch4_32", ramp=10)
    with pytest.raises(ValueError, match="'merging' has fusion_layer, fusion_matching, fusion_order"):
        fusion.register(type("Copy", (fusion.METHODS["merging"],), {"name": "copy"}))


def test_examples_are_the_page_s() -> None:
    page = (ROOT / "docs" / "add_a_method.md").read_text(encoding="utf-8")
    for module in (new_strategy, new_method):
        assert Path(module.__file__).read_text(encoding="utf-8") in page


def test_new_task_trains_resumes_and_is_the_page_s_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_lines(new_task, "@TASKS.add") < 60
    flags = [
        *("--task", "rotate", "--model", "vim_micro_patch8_32", "--num_workers", "0", "--batch-size", "128"),
        *("--warmup-epochs", "0", "--output_dir", str(tmp_path), "--turns", "2", "--device", "cpu"),
    ]
    assert program.main([*flags, "--epochs", "1"]) == 0
    assert program.main([*flags, "--epochs", "2", "--resume"]) == 0
    assert [line["epoch"] for line in conftest.lines(tmp_path)] == [0, 1]
    assert 0 < conftest.lines(tmp_path)[1]["test_top1"] <= 100
    capsys.readouterr()
    assert program.main(["--turns", "2"]) == 2
    assert capsys.readouterr().err == "main.py: error: --turns belongs to --task rotate; this run is --task classify.\n"
    assert Path(new_task.__file__).read_text(encoding="utf-8") in (ROOT / "docs" / "add_a_task.md").read_text(
        encoding="utf-8"
    )


def test_new_operator_keeps_torch_s_rules_and_is_the_page_s_example() -> None:
    new_operator.check()
    assert Path(new_operator.__file__).read_text(encoding="utf-8") in (ROOT / "docs" / "add_an_operator.md").read_text(
        encoding="utf-8"
    )


@conftest.with_onnx
def test_onnx_export_runs(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    assert export_onnx.main(["vim_micro_patch8_32", str(tmp_path / "model.onnx")]) == 0
    assert (tmp_path / "model.onnx").stat().st_size > 0
