"""The program from flags to files: every data set, every kind of training, evaluation and fine-tuning."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

import checkpoints
import engine
from tasks.classify import losses
from tests.conftest import QUICK, ROOT, Result, finish, lines, start
from tests.program_data import write_cifar100, write_image_folder, write_inat
from utils import telling


def top1(text: str, what: str = "") -> float:
    """The accuracy that --eval told."""
    return float(re.search(rf"test images{what}: top-1 ([\d.]+) %", text)[1])


def last_line(output: Path) -> dict[str, float]:
    return json.loads((output / "log.txt").read_text(encoding="utf-8").splitlines()[-1])


@pytest.mark.parametrize("data_set", ["CIFAR", "IMNET", "INAT19"])
def test_one_epoch_as_a_command(data_set: str, tmp_path: Path) -> None:
    """The published command's form, on small files in the real format; iNaturalist with two processes."""
    write = {"CIFAR": write_cifar100, "IMNET": write_image_folder, "INAT19": write_inat}[data_set]
    write(tmp_path / "data")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2] if data_set == "INAT19" else []
    path = tmp_path / "data" / "cifar-100-python" if data_set == "CIFAR" else tmp_path / "data"
    flags = ["--model", "vim_nano_patch4_32", "--batch-size", 128, "--drop-path", "0.0", "--weight-decay", 0.1]
    flags += ["--num_workers", 25, "--data-set", data_set, "--data-path", path, "--output_dir", tmp_path / "output"]
    flags += ["--no_amp", "--fusion-strategy", "upper", "--fusion-layer", 4, "--fusion-token", 8, "--epochs", 1]
    result = finish(start(*launcher, ROOT / "main.py", *flags, "--device", "cpu"))
    assert result.code == 0, result.err
    assert "Traceback" not in result.err
    line = last_line(tmp_path / "output")
    assert line["epoch"] == 0
    assert line["n_parameters"] > 300_000
    assert line["n_images"] > 0
    assert {"train_loss", "train_lr", "test_loss", "test_acc1", "test_acc5", "seconds", "peak_memory_mib"} <= set(line)
    assert {file.name.split(".")[0] for file in (tmp_path / "output").iterdir()} >= {
        "checkpoint",
        "log",
        "args",
        "events",
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a short training on DIGITS that learns something."""
    import main

    output = tmp_path_factory.mktemp("trained")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    flags = [
        *QUICK,
        "--epochs",
        "3",
        "--batch-size",
        "32",
        "--aa",
        "none",
        "--mixup",
        "0",
        "--cutmix",
        "0",
        "--lr",
        "0.02",
    ]
    assert main.main([*flags, "--no-repeated-aug", "--model-ema-decay", "0.9", "--output_dir", str(output)]) == 0
    torch.set_num_threads(threads)
    return output


def test_output(trained: Path) -> None:
    logged = lines(trained)
    assert [line["epoch"] for line in logged] == [0, 1, 2]
    assert logged[-1]["train_loss"] < logged[0]["train_loss"]
    best = max(line["test_acc1"] for line in logged)
    assert best > 30
    state = checkpoints.read(str(trained / "checkpoint.pth"))
    assert {"model", "optimizer", "lr_scheduler", "epoch", "model_ema", "scaler", "args"} <= set(state)
    assert state["epoch"] == 2
    assert state["args"]["lr"] == 0.02
    assert checkpoints.read(str(trained / "best_checkpoint.pth"))["best_metric"] == best
    assert json.loads((trained / "args.json").read_text(encoding="utf-8"))["model"] == "vim_micro_patch8_32"
    events = EventAccumulator(str(trained)).Reload()
    points = events.Scalars("test/acc1")
    assert [point.value for point in points] == pytest.approx([line["test_acc1"] for line in logged], rel=1e-5)
    assert [point.step for point in points] == [44, 88, 132]
    assert events.Scalars("train/step_loss")


def test_curves_go_to_mlflow_until_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[tuple[str, object]] = []

    class MLflow:
        def __getattr__(self, name: str) -> Callable[..., None]:
            def called(*given: object, **named: object) -> None:
                if named.get("step") == 2:
                    raise ConnectionError("no server")
                calls.append((name, given or named))

            return called

    monkeypatch.setitem(sys.modules, "mlflow", MLflow())
    board = telling.Board(tmp_path / "run", 0, {"lr": 0.1, "model": None})
    for step in (1, 2, 3):
        board.add({"test/acc1": 50.0 + step}, step)
    board.close()
    wanted = [("start_run", {"run_name": "run"}), ("log_params", ({"lr": "0.1", "model": "None"},))]
    assert calls == [*wanted, ("log_metrics", ({"test/acc1": 51.0},))]
    assert caplog.messages == ["MLflow could not be reached (no server): no more goes there."]
    assert len(EventAccumulator(str(tmp_path / "run")).Reload().Scalars("test/acc1")) == 3


def test_eval_of_weights_and_their_average(trained: Path, program: Callable[..., Result], tmp_path: Path) -> None:
    line = last_line(trained)
    result = program(*QUICK, "--eval", "--resume", trained / "checkpoint.pth")
    assert result.code == 0
    assert top1(result.out) == pytest.approx(line["test_acc1"], abs=0.01)
    averaged = top1(result.out, ", moving average")
    # the average, exported on its own
    checkpoints.main([str(trained / "checkpoint.pth"), str(tmp_path / "average.safetensors"), "--ema"])
    for flag in ("--finetune", "--model-path", "--resume"):
        result = program(*QUICK, "--eval", flag, tmp_path / "average.safetensors")
        assert top1(result.out) == averaged, result.err
        assert "moving average" not in result.out
    result = program(*QUICK, "--eval", "--no-model-ema", "--resume", trained / "checkpoint.pth")
    assert "moving average" not in result.out
    auto = program(*QUICK, "--eval", "--resume", "auto", "--output_dir", trained)
    assert top1(auto.out) == pytest.approx(line["test_acc1"], abs=0.01)


def test_eval_batches_are_half_as_large_again(trained: Path, program: Callable[..., Result]) -> None:
    result = program(*QUICK, "--batch-size", 90, "--eval", "--resume", trained / "checkpoint.pth", "--no-model-ema")
    assert "[3/3]" in result.out


def test_finetune_at_another_size_and_class_count(
    trained: Path, program: Callable[..., Result], tmp_path: Path
) -> None:
    flags = ["--finetune", trained / "best_checkpoint.pth", "--input-size", 48, "--lr", 0]
    result = program(*QUICK, *flags, "--batch-size", 64, "--output_dir", tmp_path)
    assert result.code == 0, result.err
    assert "resized from 4x4 to 6x6" in result.out
    # nothing was learned at a rate of 0, and still it knows digits
    assert last_line(tmp_path)["test_acc1"] > 15
    data = write_cifar100(tmp_path / "data")
    result = program(*QUICK, "--data-set", "CIFAR", "--data-path", data, *flags[:2])
    assert result.code == 0, result.err
    assert "head for 10 classes is left out" in result.out


TRAININGS = {
    "soft": "--distillation-type soft --teacher-model vim_micro_patch8_32 --teacher-path {teacher}",
    "hard": "--distillation-type hard --teacher-model vim_micro_patch8_32 --teacher-path {teacher}",
    "distilled heads": "--model deit_tiny_distilled_patch16_224 --input-size 32 --distillation-type hard "
    "--teacher-model vim_micro_patch8_32 --teacher-path {teacher}",
    "cosub": "--cosub",
    "cosub bce": "--cosub --bce-loss --smoothing 0",
    "bce": "--bce-loss",
    "bce without mixup": "--bce-loss --mixup 0 --cutmix 0",
    "no mixup": "--mixup 0 --cutmix 0 --smoothing 0",
    "3-augment": "--ThreeAugment --src --color-jitter 0.3",
    "large images": "--input-size 48 --src --aa v0 --train-interpolation random --remode rand --recount 2",
    "mixup": "--mixup-mode pair --cutmix-minmax 0.2 0.8 --mixup-switch-prob 0.3 --mixup-prob 0.9",
    "float16": "--if_amp --amp-dtype float16 --if_nan2num",
    "bfloat16": "--if_amp",
    "attention only": "--attn-only",
    "no train mode": "--no-train-mode --no-model-ema",
    "random tokens": "--if_random_cls_token_position --if_random_token_rank",
    "average on the CPU": "--model-ema-force-cpu",
    "one process group": "--distributed",
    "schedules": "--sched step --lr-noise 0 1 --decay-rate 0.5 --opt sgd --momentum 0.5 --opt-betas 0.9 0.95",
    "no schedule": "--sched none --opt lookahead_adamw --opt-betas 0.9 0.95 --clip-grad 1",
    "deterministic": "--deterministic --resplit",
    "a model of timm's": "--model test_vit --input-size 32",
    "a convolutional model": "--model test_resnet --input-size 64",
    "pairs": "--model fambav_micro_patch8_32 --drop-path 0.2 --drop 0.1",
    "pooling": "--spatial-pool alternate",
}


@pytest.mark.parametrize("name", TRAININGS)
def test_trainings(name: str, program: Callable[..., Result], cifar: Path, vim_weights: Path, tmp_path: Path) -> None:
    flags = TRAININGS[name].replace("{teacher}", str(vim_weights)).split()
    result = program(*QUICK, "--data-set", "CIFAR", "--data-path", cifar, "--output_dir", tmp_path, *flags)
    assert result.code == 0, result.err
    line = last_line(tmp_path)
    assert 0 < line["train_loss"] < 10
    if "cosub" not in name and "bce" not in name:
        assert line["train_loss"] > 1
    state = checkpoints.read(str(tmp_path / "checkpoint.pth"))
    if name == "attention only":
        before = 100 * 32 + 100
        assert line["n_parameters"] < sum(value.numel() for value in state["model"].values()) - before
    assert bool(state["scaler"]) == (name == "float16")
    assert (state["model_ema"] is None) == (name == "no train mode")


def test_attention_only_trains_nothing_else(program: Callable[..., Result], cifar: Path, tmp_path: Path) -> None:
    flags = [*QUICK, "--data-set", "CIFAR", "--data-path", cifar, "--output_dir", tmp_path, "--attn-only"]
    assert program(*flags, "--weight-decay", 0.5, "--epochs", 1).code == 0
    first = checkpoints.read(str(tmp_path / "checkpoint.pth"))["model"]
    assert program(*flags, "--weight-decay", 0.5, "--epochs", 2, "--resume", "auto").code == 0
    second = checkpoints.read(str(tmp_path / "checkpoint.pth"))["model"]
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed == {name for name in first if ".mixer." in name or name.startswith(("head", "pos_embed"))}


def test_an_earlier_log_is_put_aside(program: Callable[..., Result], cifar: Path, tmp_path: Path) -> None:
    flags = [*QUICK, "--data-set", "CIFAR", "--data-path", cifar, "--output_dir", tmp_path]
    assert program(*flags).code == 0
    before = (tmp_path / "log.txt").read_text(encoding="utf-8")
    result = program(*flags, "--seed", 1)
    assert "log_before.txt" in result.err
    assert (tmp_path / "log_before.txt").read_text(encoding="utf-8") == before
    assert len((tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()) == 1


def test_full_disk_does_not_end_the_run(
    program: Callable[..., Result], cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*QUICK, "--data-set", "CIFAR", "--data-path", cifar, "--epochs", 3, "--output_dir", tmp_path]
    plain, calls = os.fsync, [0]

    def full(handle: int) -> None:
        calls[0] += 1
        if calls[0] in (3, 4):  # the first file and its folder are the flags'
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(handle)

    monkeypatch.setattr(os, "fsync", full)
    result = program(*flags)
    assert result.code == 0
    assert "No space left" in result.err
    assert checkpoints.read(str(tmp_path / "checkpoint.pth"))["epoch"] == 2
    assert len((tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()) == 3


def test_learning_rate_is_scaled(program: Callable[..., Result], cifar: Path, tmp_path: Path) -> None:
    common = [*QUICK, "--data-set", "CIFAR", "--data-path", cifar, "--lr", 0.01, "--sched", "constant"]
    for flags, rate in (([], 0.01 * 8 / 512), (["--unscale-lr"], 0.01)):
        assert program(*common, *flags, "--output_dir", tmp_path / str(len(flags))).code == 0
        assert last_line(tmp_path / str(len(flags)))["train_lr"] == pytest.approx(rate)


def test_published_defaults() -> None:
    """Every published flag, spelled as published, at its published default."""
    import main

    parser = main.get_args_parser()
    args = vars(parser.parse_args([]))
    published = dict(
        batch_size=64, epochs=300, bce_loss=False, unscale_lr=False, input_size=224, drop=0.0, drop_path=0.1,
        model_ema=True, model_ema_decay=0.99996, model_ema_force_cpu=False, opt="adamw", opt_eps=1e-8, opt_betas=None,
        clip_grad=None, momentum=0.9, weight_decay=0.05, sched="cosine", lr=5e-4, lr_noise=None, lr_noise_pct=0.67,
        lr_noise_std=1.0, warmup_lr=1e-6, min_lr=1e-5, decay_epochs=30, warmup_epochs=5, cooldown_epochs=10,
        patience_epochs=10, decay_rate=0.1, color_jitter=0.3, aa="rand-m9-mstd0.5-inc1", smoothing=0.1,
        train_interpolation="bicubic", repeated_aug=True, train_mode=True, ThreeAugment=False, src=False, reprob=0.25,
        remode="pixel", recount=1, resplit=False, mixup=0.8, cutmix=1.0, cutmix_minmax=None, mixup_prob=1.0,
        mixup_switch_prob=0.5, mixup_mode="batch", teacher_model="regnety_160", teacher_path="",
        distillation_type="none", distillation_alpha=0.5, distillation_tau=1.0, cosub=False, finetune="",
        attn_only=False, inat_category="name", output_dir="", seed=0, resume="", start_epoch=0, eval=False,
        eval_crop_ratio=0.875, dist_eval=False, num_workers=10, pin_mem=True, distributed=False, world_size=1,
        dist_url="env://", if_amp=True, if_continue_inf=False, if_nan2num=False, if_random_cls_token_position=False,
        if_random_token_rank=False, local_rank=0, data_set="DIGITS",
    )  # fmt: skip
    assert {name: args[name] for name in published} == published
    spelled = {option for action in parser._actions for option in action.option_strings}
    underscored = {"output_dir", "start_epoch", "num_workers", "world_size", "dist_url"}
    for name in published:
        option = f"--{name}" if name.startswith("if_") or name in underscored else "--" + name.replace("_", "-")
        assert option in spelled
    assert spelled >= {
        *("--no-model-ema", "--dr", "--no-repeated-aug", "--no-train-mode", "--no-pin-mem", "--no_amp", "--local_rank"),
        *("--no_continue_inf", "--no_nan2num", "--no_random_cls_token_position", "--no_random_token_rank"),
    }


def test_non_finite_loss(
    program: Callable[..., Result], cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is named, the batch kept, and no checkpoint holds a NaN; or the step is skipped."""
    plain, calls = losses.Classification.forward, [0]

    def forward(self: losses.Classification, *args: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        loss = plain(self, *args)
        return loss * float("nan") if calls[0] == 8 else loss

    monkeypatch.setattr(losses.Classification, "forward", forward)
    flags = [*QUICK, "--data-set", "CIFAR", "--data-path", cifar, "--epochs", 3, "--output_dir", tmp_path]
    result = program(*flags)
    assert result.code == 1
    assert "The loss is nan at epoch 1 step 2" in result.err
    assert checkpoints.read(str(tmp_path / "checkpoint.pth"))["epoch"] == 0
    batch = torch.load(tmp_path / "nonfinite_epoch1_step2_rank0.pt", weights_only=True)
    assert batch["samples"].shape == (8, 3, 32, 32)
    assert batch["targets"].shape == (8, 100)
    calls[0] = 0
    result = program(*flags, "--if_continue_inf")
    assert result.code == 0
    assert "the step is skipped" in result.err
    state = checkpoints.read(str(tmp_path / "checkpoint.pth"))
    assert state["updates"] == 14
    assert all(bool(value.isfinite().all()) for value in state["model"].values())


def test_an_epoch_of_which_every_step_is_skipped(program: Callable[..., Result], cifar: Path, tmp_path: Path) -> None:
    flags = [*QUICK, "--data-set", "CIFAR", "--data-path", cifar, "--epochs", 3, "--output_dir", tmp_path]
    result = program(*flags, "--lr", 1e30, "--if_continue_inf")
    assert result.code == 0, result.err
    assert ["train_loss" in line for line in lines(tmp_path)] == [True, False, False]
    assert checkpoints.read(str(tmp_path / "checkpoint.pth"))["updates"] == 1


def test_steps_that_are_skipped_are_counted_over_epochs(
    program: Callable[..., Result], cifar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "MOST_SKIPPED", 7)  # of five an epoch
    flags = [*QUICK, "--data-set", "CIFAR", "--data-path", cifar, "--epochs", 3, "--lr", 1e30, "--if_continue_inf"]
    result = program(*flags)
    assert result.code == 1
    assert "epoch 1 step 2, the 7th step in a row without one; the run has diverged, and stops." in result.err


def test_broken_weights_are_not_saved(
    program: Callable[..., Result], cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *args: object) -> None:
        plain(self, *args)
        self.param_groups[0]["params"][0].data.fill_(float("inf"))

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    flags = [*QUICK, "--data-set", "CIFAR", "--data-path", cifar, "--batch-size", 40, "--output_dir", tmp_path]
    result = program(*flags)
    assert result.code == 1
    assert "is not finite in epoch" in result.err
    assert not list(tmp_path.glob("*.pth"))


def test_progress_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = telling.Progress("Epoch 0", 10, torch.device("cpu"), start=3)
    progress.step(4, 8, "loss: 1.0")
    progress.close()
    assert "Epoch 0" in capsys.readouterr().err
    monkeypatch.setattr(telling, "is_main_process", lambda: False)
    telling.Progress("Epoch 0", 10, torch.device("cpu")).step(1, 8, "loss: 1.0")
    assert capsys.readouterr().err == ""


def test_distillation_values() -> None:
    """The published formulas, written out."""
    torch.manual_seed(0)
    samples, targets = torch.randn(4, 6), torch.tensor([0, 1, 2, 3])
    student, second, teacher = (torch.randn(4, 5) for _ in range(3))
    base = losses.Classification(0.0)

    class Fixed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return teacher

    loss = losses.Distillation(base, Fixed(), "soft", 0.3, 2.0)(samples, (student, second), targets)
    p, q = (teacher / 2).softmax(1), (second / 2).log_softmax(1)
    wanted = 0.7 * F.cross_entropy(student, targets) + 0.3 * (p * (p.log() - q)).sum() * 4 / 20
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    loss = losses.Distillation(base, Fixed(), "hard", 0.3, 1.0)(samples, student, targets)
    wanted = 0.7 * F.cross_entropy(student, targets) + 0.3 * F.cross_entropy(student, teacher.argmax(1))
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_bce_asks_which_classes_are_present() -> None:
    outputs = torch.randn(2, 5)
    smoothed = torch.tensor([[0.42, 0.02, 0.52, 0.02, 0.02], [0.02, 0.92, 0.02, 0.02, 0.02]])
    present = torch.tensor([[1.0, 0, 1, 0, 0], [0, 1, 0, 0, 0]])
    loss = losses.Classification(0.1, bce=True)(outputs, outputs, smoothed)
    assert loss.item() == pytest.approx(F.binary_cross_entropy_with_logits(outputs, present).item())


def test_cosub_value() -> None:
    first, second = torch.randn(3, 4), torch.randn(3, 4)
    targets = torch.eye(4)[:3]
    loss = losses.Cosub(losses.Classification(0.0))(first, torch.cat([first, second]), targets)
    bce = F.binary_cross_entropy_with_logits
    wanted = bce(first, targets) + bce(second, targets) + bce(first, second.sigmoid()) + bce(second, first.sigmoid())
    assert loss.item() == pytest.approx(wanted.item() / 4)


def test_teacher_s_weights_are_loaded(vim_weights: Path) -> None:
    import main

    flags = [
        "--distillation-type",
        "hard",
        "--teacher-model",
        "vim_micro_patch8_32",
        "--teacher-path",
        str(vim_weights),
    ]
    criterion = losses.build_criterion(main.get_args_parser().parse_args(flags), 100)
    torch.manual_seed(0)
    wanted = timm.create_model("vim_micro_patch8_32", num_classes=100).state_dict()
    assert torch.equal(criterion.teacher.state_dict()["head.weight"], wanted["head.weight"])
    assert not any(parameter.requires_grad for parameter in criterion.teacher.parameters())
