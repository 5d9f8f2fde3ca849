"""Speed and memory of models, curves, and the comparison in its one-epoch form."""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import main as program
from benchmarks import aarch64, busy, cases, checkouts, compare, ops, plot, summary, throughput
from benchmarks.peers import PEERS
from benchmarks.small_data import write_shapes
from measure.flops import model_flops
from tasks import TASKS
from tests import micro_models
from tests.conftest import ROOT, with_onnx
from utils import UsageError


@pytest.fixture(autouse=True)
def _restore(one_thread: None) -> Iterator[None]:
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:], logging.root.level = handlers, level


# --- throughput ---


def test_spec_of_a_model() -> None:
    name, keywords = cases.parse_spec("vim_nano_patch4_32:fusion_strategy=upper,token_ratio=(0.5, 0.25),depth=2")
    assert name == "vim_nano_patch4_32"
    assert keywords == dict(fusion_strategy="upper", token_ratio=(0.5, 0.25), depth=2)
    with pytest.raises(ValueError, match="vim_nano_patch4_32"):
        cases.parse_spec("vim_nano_patch4_23")
    with pytest.raises(ValueError, match="key=value"):
        cases.parse_spec("vim_nano_patch4_32:depth")


def test_training_holds_more_than_inference() -> None:
    model = micro_models.timm.create_model("vim_micro_patch8_32")
    images = torch.randn(4, 3, 32, 32)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    inference = cases.Case(model, images).peak_bytes()
    training = cases.Case(model, images, train=True).peak_bytes()
    assert inference > weights
    assert training > inference + 3 * weights, "gradients and both moments"


def test_training_step_leaves_the_weights_alone() -> None:
    model = micro_models.timm.create_model("dyvm_micro_patch8_32")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cases.Case(model, torch.randn(2, 3, 32, 32), train=True)()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_throughput_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merging = "vim_micro_patch8_32:fusion_strategy=all,fusion_token=2"
    models = ["vim_micro_patch8_32", merging, "dyvm_micro_patch8_32", "test_vit"]
    flags = ["--img-size", "32", "48", "--batch-size", "2", "--dtype", "float32", "bfloat16", "--seconds", "0"]
    throughput.main([*models, *flags, "--train", "--device", "cpu", "--json", str(tmp_path / "sub" / "rows.json")])
    found = json.loads((tmp_path / "sub" / "rows.json").read_text(encoding="utf-8"))
    assert len(found["rows"]) == len(models) * 4
    for row in found["rows"]:
        assert min(row["eval_images_per_second"], row["train_images_per_second"]) > 0
        assert row["train_peak_bytes"] > row["eval_peak_bytes"] > 4 * row["parameters"]
    by_setting = {(row["model"], row["img_size"], row["dtype"]): row for row in found["rows"]}
    plain, merged = (by_setting[model, 48, "float32"] for model in models[:2])
    assert merged["flops_full"] < plain["flops_full"]
    assert plain["flops_full"] > 2 * by_setting[models[0], 32, "float32"]["flops_full"]
    out = capsys.readouterr().out
    assert "threads 1" in out
    assert out.count("\n| ") == 1 + len(found["rows"])


@with_onnx
def test_peers_and_onnx_runtime(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = cases.build("vim_micro_patch8_32:depth=1", None)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(cases.OnnxCase(model, images)(), model(images), rtol=1e-3, atol=1e-4)
    file = tmp_path / "rows.json"
    flags = ["--onnx", "--batch-size", "1", "--seconds", "0", "--threads", "1", "--device", "cpu", "--json", str(file)]
    assert throughput.main(["test_vit", "dyvm_micro_patch8_32:depth=4", *flags]) == 0
    rows = {(row["model"], row["way"]): row for row in json.loads(file.read_text(encoding="utf-8"))["rows"]}
    assert rows["test_vit", "ONNX Runtime"]["eval_images_per_second"] > 0
    assert rows["test_vit", "ONNX Runtime"]["eval_peak_bytes"] is None
    told = rows["dyvm_micro_patch8_32:depth=4", "ONNX Runtime"]["note"]
    assert "has no ONNX export" in told
    assert told in capsys.readouterr().out
    assert all(timm.is_model(name) for name in PEERS)


def test_an_epoch_beside_busy_processes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    spinning, start = [], subprocess.Popen

    def started(*args, **options) -> subprocess.Popen:
        spinning.append(start(*args, **options))
        return spinning[-1]

    monkeypatch.setattr(busy.subprocess, "Popen", started)

    def epoch() -> float:
        running = sum(process.poll() is None for process in spinning)
        return 2.0 + 1.5 * running

    monkeypatch.setattr(busy, "epoch", epoch)
    assert busy.main(["--busy", "2", "--rounds", "2"]) == 0
    out = capsys.readouterr().out
    assert "| alone | 2.0, 2.0 | 1.00 |" in out
    assert "| beside 2 | 5.0, 5.0 | 2.50 |" in out
    assert len(spinning) == 4
    assert all(process.poll() is not None for process in spinning)


def test_two_checkouts_in_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order = [str(ROOT), str(ROOT), "--models", "vim_nano_patch4_32", "--batch-size", "1", "--train"]
    assert checkouts.main([*order, "--seconds", "0", "--threads", "1", "--json", str(tmp_path / "x.json")]) == 0
    rows = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["rows"]
    assert [row["kind"] for row in rows] == ["eval", "train"]
    assert all(len(own) == 2 * checkouts.CALLS and min(own) > 0 for row in rows for own in row["seconds"])
    assert "time now over before" in capsys.readouterr().out
    assert checkouts.main([str(ROOT), str(ROOT), "--models", "nothing"]) == 1
    assert "does not run in" in capsys.readouterr().err


def test_gates_are_set_to_their_share() -> None:
    args = argparse.Namespace(
        models=["dyvm_micro_patch8_32:pruning=block,block_keep_ratio=0.5"],
        **dict(
            dtype=["float32"],
            compile=False,
            onnx=False,
            train=False,
            device="cpu",
            seconds=0.0,
            img_size=None,
            batch_size=[8],
        ),
    )
    (row,) = throughput.measure(args)
    model = cases.build(args.models[0], None)
    assert row["flops_full"] < model_flops(model, 32, 1.0).full


def test_models_are_trained_alike() -> None:
    # its registry has layers dropped in training, which timm's DeiT has not
    model = cases.without_drop_path(cases.build("vim_micro_patch8_32:drop_path_rate=0.5", None)).train()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), model(images))
    step = cases.Case(model, images, train=True)
    assert step.optimizer.param_groups[0]["fused"], "as the program's on a CPU"
    before = [parameter.clone() for parameter in model.parameters()]
    step()
    assert all(map(torch.equal, before, model.parameters())), "a step that is measured changes nothing"


# --- plots ---


def write_run(folder: Path, epochs: int, **more: float) -> Path:
    folder.mkdir(parents=True)
    lines = [
        dict(epoch=i, train_loss=2.0 - i, test_loss=2.5 - i, test_acc1=10.0 * i, train_lr=0.1, seconds=1.0) | more
        for i in range(epochs)
    ]
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def test_curves_overlay_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, pruned = write_run(tmp_path / "plain", 3), write_run(tmp_path / "pruned", 1, test_kept_tokens_1=0.7)
    figure = plot.curves({"plain": summary.read_log(plain), "pruned": summary.read_log(pruned)})
    loss, accuracy, rate, kept = figure.axes
    assert [line.get_xydata().tolist() for line in accuracy.lines] == [[[1, 0], [2, 10], [3, 20]], [[1, 0]]]
    assert [text.get_text() for text in accuracy.get_legend().get_texts()] == ["plain", "pruned"]
    drawn = [line.get_ydata().tolist() for line in loss.lines if len(line.get_xdata())]
    assert drawn == [[2.0, 1.0, 0.0], [2.5, 1.5, 0.5], [2.0], [2.5]]
    assert kept.lines[0].get_ydata().tolist() == [0.7]
    plot.main([str(plain), str(pruned), "--file", str(tmp_path / "curves.png")])
    assert str(tmp_path / "curves.png") in capsys.readouterr().out
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > 1000
    assert len(plot.curves({"plain": summary.read_log(plain)}).axes) == 3, "no panel for what no run logged"


def test_front_keeps_what_nothing_beats() -> None:
    points = [(1.0, 9.0), (2.0, 8.0), (2.0, 7.0), (3.0, 5.0), (2.5, 4.0), (3.0, 4.0)]
    assert plot.front(points) == [3, 1, 0]


# --- comparison ---


def in_process(run: compare.Run, args: argparse.Namespace) -> int:
    """Train here instead of in a process of its own."""
    (run.folder / "console.txt").touch()
    return program.main(run.command())


@pytest.fixture
def one_epoch(cifar: Path, tmp_path: Path) -> list[str]:
    """The comparison of nano models, one epoch each on a small CIFAR-100."""
    sizes = ["--size", "nano", "--epochs", "1", "--fine-tune-epochs", "1", "--speed-seconds", "0", "--device", "cpu"]
    more = ["--batch-size", "8", "--num_workers", "0", "--warmup-epochs", "0", "--no-model-ema"]
    return [str(cifar), "--data-set", "CIFAR", "--output_dir", str(tmp_path / "compare"), *sizes, *more]


def test_one_epoch_comparison(one_epoch: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([*one_epoch, "--seeds", "0", "1"], launch=in_process) == 0
    output = tmp_path / "compare"
    rows = {row["method"]: row for row in csv.DictReader((output / "table.csv").open(encoding="utf-8"))}
    assert list(rows) == ["none", "upper", "fastvim", "dyvm-token", "dyvm-block", "dyvm-both", "deit", "mambareg"]
    table = (output / "table.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    assert "mean ± standard deviation over 2 seeds" in table
    assert f"threads {torch.get_num_threads()}" in table
    for row in rows.values():
        assert f"| {row['title']} | " in table
        assert float(row["train_peak_bytes"]) > float(row["eval_peak_bytes"]) > 0
        assert float(row["images_per_second"]) > 0
    with Image.open(output / "pareto.png") as image:
        assert image.width > image.height > 300

    plain, peer = float(rows["none"]["parameters"]), float(rows["deit"]["parameters"])
    assert abs(plain - peer) < 0.05 * plain, "the peer is of the same size"
    for cheaper in ("upper", "fastvim", "dyvm-token"):
        assert float(rows[cheaper]["flops_full"]) < float(rows["none"]["flops_full"])
    assert float(rows["none"]["kept_tokens"]) == float(rows["none"]["kept_directions"]) == 1
    assert float(rows["upper"]["kept_tokens"]) == pytest.approx(25 / 65), "40 of 64 patches are fused"
    assert float(rows["dyvm-token"]["kept_tokens"]) < 1 == float(rows["dyvm-token"]["kept_directions"])
    assert 0 < float(rows["dyvm-block"]["kept_directions"]) <= 1 == float(rows["dyvm-block"]["kept_tokens"])
    assert float(rows["dyvm-both"]["train_peak_bytes"]) > float(rows["none"]["train_peak_bytes"]), "the teacher counts"

    found = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert len(found["runs"]) == 16
    by_name = {entry["run"]: entry for entry in found["runs"]}
    for name in ("none-seed0", "dyvm-token-seed1"):
        (line,) = summary.read_log(output / name)
        assert by_name[name]["top1"] == line["test_acc1"]
    own = summary.read_log(output / "dyvm-token-seed1")[0]["seconds"]
    start = summary.read_log(output / "none-seed1")[0]["seconds"]
    assert by_name["dyvm-token-seed1"]["train_seconds"] == pytest.approx(own + start)


def test_comparison_of_segmenters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs as long as so many steps, judged by mIoU, body and heads counted apart."""
    flags = [str(write_shapes(tmp_path / "shapes")), "--task", "segment", "--data-set", "SHAPES", "--size", "nano"]
    flags += ["--methods", "upper", "fastvim", "--seeds", "0", "--iterations", "2", "--speed-seconds", "0"]
    flags += ["--device", "cpu", "--output_dir", str(tmp_path / "compare"), "--warmup-iters", "0"]
    assert compare.main(flags, launch=in_process) == 0
    table = capsys.readouterr().out
    assert "| mIoU, % |" in table
    assert "| FLOPs of the heads, M |" in table
    assert "nano models, 2 steps, one seed" in table
    rows = {row["method"]: row for row in csv.DictReader((tmp_path / "compare" / "table.csv").open(encoding="utf-8"))}
    assert float(rows["fastvim"]["flops_full"]) < float(rows["upper"]["flops_full"])
    assert float(rows["upper"]["kept_tokens"]) < 1 == float(rows["fastvim"]["kept_tokens"])
    for name, row in rows.items():
        assert len(summary.read_log(tmp_path / "compare" / f"{name}-seed0")) == 2
        assert float(row["mIoU"]) >= 0 < float(row["flops_head"])
        assert float(row["train_peak_bytes"]) > float(row["eval_peak_bytes"]) > 0
    for name, told in compare.ELSEWHERE.items():
        assert compare.main(["--task", name]) == 2
        assert f"{name!r} is not compared; wanted one of classify, segment (the tables" in capsys.readouterr().err
        assert (ROOT / told.partition(",")[0]).is_file()
    # an example of this suite may have registered its own
    own = {name for name, task in TASKS.items() if task.__module__.startswith("tasks.")}
    assert {*compare.COMPARISONS, *compare.ELSEWHERE} == own


def test_finished_runs_are_not_repeated(
    one_epoch: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[str] = []

    def note(run: compare.Run, args: argparse.Namespace) -> int:
        trained.append(run.name)
        return in_process(run, args)

    def interrupt(run: compare.Run, args: argparse.Namespace) -> int:
        if trained:
            raise KeyboardInterrupt
        return note(run, args)

    flags = [*one_epoch, "--seeds", "0", "--methods", "deit", "none"]
    assert compare.main(flags, launch=interrupt) == 130
    assert "goes on" in capsys.readouterr().err
    assert compare.main(flags, launch=note) == 0
    assert trained == ["none-seed0", "deit-seed0"]
    assert compare.main(flags, launch=note) == 0
    assert trained == ["none-seed0", "deit-seed0"]
    assert "±" not in (tmp_path / "compare" / "table.md").read_text(encoding="utf-8"), "one seed has no spread"

    assert compare.main([*flags, "--lr", "1e-3"], launch=note) == 2
    assert "other flags" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "compare" / "deit-seed0")
    assert compare.main(flags, launch=note) == 0
    assert trained[2:] == ["deit-seed0"]


def test_mistakes_are_told_before_any_run(one_epoch: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for flags, told in (
        (["--batch-size", "7"], "--batch-size"),
        (["--methods", "dyvm-both"], "none"),
        (["--no-such-flag"], "--no-such-flag"),
    ):
        assert compare.main([*one_epoch, *flags], launch=lambda run, args: pytest.fail("a run began")) == 2
        assert told in capsys.readouterr().err


def test_failing_run_ends_the_comparison(one_epoch: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    def fail(run: compare.Run, args: argparse.Namespace) -> int:
        (run.folder / "console.txt").write_text("first\nThe disk is full.\n", encoding="utf-8")
        return 1

    assert compare.main([*one_epoch, "--methods", "none"], launch=fail) == 1
    assert "The disk is full." in capsys.readouterr().err


def test_seed_after_seed_and_what_others_start_from_first() -> None:
    args, more = compare.parse(["--methods", "dyvm-both", "none", "--seeds", "3", "4", "--mixup", "0.1"])
    runs = compare.plan(args, more)
    assert [run.name for run in runs] == ["none-seed3", "dyvm-both-seed3", "none-seed4", "dyvm-both-seed4"]
    assert runs[3].start is runs[2]
    parsed = program.get_args_parser().parse_args(runs[3].flags)
    assert (parsed.seed, parsed.mixup, parsed.epochs, parsed.model) == (4, 0.1, 12, "dyvm_nano_patch4_32")
    assert (args.data_set, args.data_path, args.size) == ("DIGITS", "", "nano")
    merging = compare.plan(compare.parse(["--methods", "merging", "--seeds", "0"])[0], [])
    assert len({tuple(run.flags) for run in merging}) == len(merging) == 9, "every strategy and order, and none"
    policies = compare.plan(compare.parse(["--methods", "policies", "--seeds", "0"])[0], [])
    assert [run.method for run in policies] == ["none", "dyvm-both", "dyvm-random", "dyvm-static"]
    args, more = compare.parse(["-", "--lr", "1"])
    assert (args.data_set, args.data_path, more) == ("DIGITS", "", ["--lr", "1"])
    args, _ = compare.parse(["/data", "--lr", "1"])
    assert (args.data_set, args.data_path, args.size, args.epochs) == ("IMNET", Path("/data"), "tiny", 300)
    with pytest.raises(UsageError, match="none"):
        compare.parse(["--methods", "dyvm-token"])


def test_processes_of_its_own_survive_a_signal(one_epoch: list[str], tmp_path: Path) -> None:
    flags = [*one_epoch, "--methods", "none", "--seeds", "0", "--epochs", "2000"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.compare", *flags], cwd=ROOT, env=environment, stderr=subprocess.PIPE
    )
    folder = tmp_path / "compare" / "none-seed0"
    end = time.monotonic() + 120
    while not (folder / "checkpoint.pth").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert b"goes on" in err
    assert "saved" in (folder / "console.txt").read_text(encoding="utf-8"), "the run saved itself first"


# --- operators ---


def test_operators_against_peers_and_ports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sub" / "ops.json"
    assert ops.main(["--sizes", "1,8,5", "--rounds", "2", "--threads", "1", "--json", str(file)]) == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    (result,) = found["sizes"].values()
    assert "selective_scan_ref forward" in result["scan"]["seconds"]
    median, fastest = result["scan"]["seconds"]["selective_scan_fn forward"]
    assert 0 < fastest <= median
    port = result["ports"]["selective_scan_fn forward"]
    assert port["steps_per_second"] == pytest.approx(8 * 5 * 16 / median)
    if found["settings"]["GHz"] is not None:
        lanes = {"plain": 4, "avx2": 8, "avx512": 16, "none": 1}[found["settings"]["isa"]]
        assert port["steps_per_cycle_and_lane"] * port["cycles_per_vector"] == pytest.approx(1)
        cycles = lanes * found["settings"]["GHz"] * 1e9 / port["steps_per_second"]
        assert port["cycles_per_vector"] == pytest.approx(cycles, rel=0.01)
    assert result["ratios"]["scan's extra memory / u"] >= 0
    out = capsys.readouterr().out
    assert "cycles for a vector" in out
    assert "processor " in out


# --- mistakes ---

MISTAKES = {
    "aarch64": [["--lops"], ["everything"]],
    "busy": [["--busy", "0"], ["--rounds", "x"]],
    "channel_sampling": [["--epochs", "0"], ["--nonsense"]],
    "channels": [["--models", "nothing"], ["--patch", "x"]],
    "checkouts": [["{here}", "{here}"], ["{here}"]],
    "cuda_kernels": [["--targets", "sm_1"], ["--dtypes", "int8"]],
    "detection": [["--models", "nothing"], ["--size", "3"], ["--heads", "x"]],
    "few_labels": [[], ["{here}"]],
    "flops": [["nothing"], ["vim_nano_patch4_32:depht=2"], ["--img-size", "0"]],
    "gpu_check": [["--device", "cuda:99"], ["--sizes", "1,2"], ["--models", "nothing"]],
    "gpu_parity": [["--device", "cuda:99"], ["--parts", "nothing"]],
    "mae": [["--model", "nothing"], ["--model", "vim_micro_patch8_32"], ["--mask-ratio", "1"]],
    "merging": [["--model", "nothing"], ["--model", "test_vit"], ["--rounds", "0"], ["--device", "meta"]],
    "ops": [["--sizes", "8,384"], ["--threads", "0"], ["--dtype", "int8"], ["--nonsense"]],
    "plot": [
        [],
        ["{here}"],
        ["{run}", "--file", "{here}/no/such/x.png"],
        ["{run}", "--file", "{here}/x.what"],
        ["{bad}"],
    ],
    "pruning": [["--model", "deit_tiny_patch16_224"], ["--token-keep", "1.5"], ["--batch-size", "x"]],
    "reliability": [["--kills", "-1"], ["--sections", "floods"]],
    "resolution": [["--models", "nothing"], ["--sizes", "0"], ["--device", "x"], ["--add", "--out", "{broken}"]],
    "segmentation": [["--models", "nothing"], ["--sizes", "8"], ["--seconds", "-1"]],
    "soak": [["--task", "nothing"], ["--steps", "0"]],
    "summary": [[], ["{here}"], ["{run}"], ["{bad}"]],
    "throughput": [
        *(["vim_nan_patch4_32"], ["vim_nano_patch4_32:depht=2"], ["vim_nano_patch4_32", "--batch-size", "0"]),
        *(["vim_nano_patch4_32:depth"], ["vim_nano_patch4_32", "--img-size", "3"]),
        ["vim_micro_patch8_32", "--seconds", "0", "--batch-size", "1", "--json", "{run}/log.txt/x.json"],
    ],
}


@pytest.mark.parametrize(("name", "flags"), [(name, flags) for name, rows in MISTAKES.items() for flags in rows])
def test_mistakes_are_one_sentence(
    name: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", 1)
    (write_run(tmp_path / "bad", 1) / "log.txt").write_text("[1]\n", encoding="utf-8")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "resolution.json").write_text("{", encoding="utf-8")
    places = dict(here=tmp_path, run=run, bad=tmp_path / "bad", broken=tmp_path / "broken")
    main = importlib.import_module(f"benchmarks.{name}").main
    assert main([flag.format(**places) for flag in flags]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith(f"benchmarks.{name}: error: ")
    assert sentence.endswith((".", "flags)."))


def test_every_command_is_tried() -> None:
    commands = {
        path.stem for path in (ROOT / "benchmarks").glob("*.py") if "@command(" in path.read_text(encoding="utf-8")
    }
    assert commands - {"command"} == MISTAKES.keys() | {"compare"}, "compare's mistakes have a test of their own"


def test_loops_of_aarch64_that_calculate_in_single_numbers_are_told() -> None:
    code = """
0000000000000000 <sum(float const*)>:
       0:\tldr\ts1, [x0], #4
       4:\tfadd\ts0, s0, s1
       8:\tb.ne\t0 <sum(float const*)>  // b.any
       c:\tret
0000000000000010 <void step<4>(float*)>:
      10:\tldr\tq1, [x1], #16
      14:\tfmla\tv0.4s, v1.4s, v2.4s
      18:\tcbnz\tx3, 14 <void step<4>(float*)+0x4>
      1c:\tb.ne\t10 <void step<4>(float*)>
      20:\tbl\t0 <sum(float const*)>
"""
    single, vector = aarch64.loops(code)
    assert (single.function, single.vectors, single.singles) == ("sum", 0, 1)
    assert (vector.function, vector.vectors, vector.singles) == ("void step<4>", 1, 0)
    assert vector.instructions == {"fmla": 1, "cbnz": 1}  # the outer loop is none of the innermost
