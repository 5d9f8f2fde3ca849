"""Masked pre-training as a task of the program: data, evaluation, pictures, wrong input, and the three stages."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

import datasets
import main
from benchmarks import few_labels
from loading import SeededDataset
from models_mae import MaskedAutoencoder
from tasks.pretrain.data import SeededImages, noise_from
from tasks.pretrain.task import Pretrain
from tests.conftest import MICRO, Result, finish, lines, same, start
from tests.program_data import write_cifar100, write_image_folder
from utils import UsageError

QUICK = (
    *("--task", "pretrain", "--model", "mae_fastvim_micro_patch8_32", "--batch-size", "8", "--num_workers", "0"),
    *("--device", "cpu", "--epochs", "1", "--warmup-epochs", "0", "--lr", "0.01"),
)


class Ramp(Dataset):
    """Image n is filled with n, and with noise of the random state in its first row."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.full((3, 32, 32), float(index))
        image[:, 0] = torch.rand(3, 32)
        return image, 7


def parsed(*flags: str) -> argparse.Namespace:
    return main.parse(["--task", "pretrain", "--model", "mae_fastvim_micro_patch8_32", "--device", "cpu", *flags])


def new_task(*flags: str) -> Pretrain:
    args = parsed("--batch-size", "4", "--num_workers", "0", *flags)
    torch.manual_seed(0)
    data = Pretrain.build_data(args, train=False)
    return Pretrain(args, Pretrain.build_model(args, data), data, torch.device("cpu"))


# --- data ---


def test_masks_belong_to_the_image_in_evaluation_and_to_its_place_in_training() -> None:
    tests, train = SeededImages(Ramp(), False), SeededDataset(SeededImages(Ramp(), True))
    assert [tests[index][1] for index in range(5)] == [0, 1, 2, 3, 4]
    assert train[2, 11][1] == train[2, 11][1] != train[2, 12][1]
    assert torch.equal(train[2, 11][0], train[2, 11][0])
    noise = noise_from(torch.tensor([3, 1, 3]), 16)
    assert noise.shape == (3, 16)
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], noise[1])


def test_streams_are_refused() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[None]:
            return iter(())

    with pytest.raises(UsageError, match="stream"):
        SeededImages(Stream(), True)


# --- evaluation ---


def test_loss_of_an_image_does_not_depend_on_its_batch() -> None:
    task = new_task()
    task.eval()
    items = [task.data.test[index] for index in range(6)]

    def losses(*parts: list) -> Tensor:
        batches = [task.prepare(torch.utils.data.default_collate(part), training=False)[0] for part in parts]
        return torch.cat([task.predict(inputs) for inputs in batches])

    with torch.no_grad():
        whole = losses(items)
        torch.testing.assert_close(losses(items[:1], items[1:4], items[4:]), whole, rtol=1e-5, atol=1e-6)
        assert torch.equal(losses(items), whole), "an evaluation can be repeated"
        images, noise = task.prepare(torch.utils.data.default_collate(items), training=False)[0]
        loss = task.model(images, 0.75, noise)[0]
    assert float(whole[:, 0].mean()) == pytest.approx(float(loss), rel=1e-5)
    evaluator = task.create_evaluator()
    evaluator.update(whole[:4], None)
    evaluator.update(whole[4:], None)
    assert evaluator.compute() == pytest.approx(
        {"loss": float(whole[:, 0].mean()), "loss_of_means": float(whole[:, 1].mean())}
    )


def test_means_of_patches_are_what_training_must_beat() -> None:
    task = new_task("--no-norm-pix-loss")
    images = torch.rand(2, 3, 32, 32)
    means = task.model.mean_prediction(images)
    patches = task.model.patchify(images)
    assert torch.allclose(task.model.patch_losses(images, means), patches.var(-1, correction=0), atol=1e-6)


# --- pictures ---


def test_picture_shows_image_what_was_seen_and_what_was_rebuilt(tmp_path: Path) -> None:
    task = new_task()
    task.draw(task.data.test, tmp_path)
    grid = Image.open(tmp_path / "rebuilt.png")
    side = 224 + 8
    assert grid.size == (3 * side + 8, 8 * side + 8)
    pixels = torch.from_numpy(np.array(grid.convert("L")))
    image, seen, rebuilt = (pixels[8 : 8 + 224, 8 + at * side : 8 + at * side + 224] for at in range(3))
    hidden = seen == 128
    assert 0.6 < float(hidden.float().mean()) < 0.8
    assert torch.equal(image[~hidden], seen[~hidden])
    assert torch.equal(image[~hidden], rebuilt[~hidden])
    assert not torch.equal(image[hidden], rebuilt[hidden])


def test_rebuilt_patches_get_their_mean_and_deviation_back() -> None:
    model = new_task().model
    assert isinstance(model, MaskedAutoencoder)
    images, mask = torch.rand(2, 3, 32, 32), torch.tensor([[1.0, 0.0] * 8, [0.0, 1.0] * 8])
    patches = model.patchify(images)
    perfect = (patches - patches.mean(-1, keepdim=True)) / patches.std(-1, keepdim=True)
    assert torch.allclose(model.rebuild(images, perfect, mask), images, atol=1e-4)
    mean = model.patchify(model.rebuild(images, torch.zeros_like(perfect), mask))
    assert torch.allclose(mean[0, 0], patches[0, 0].mean().expand(192), atol=1e-6)
    assert torch.equal(mean[0, 1], patches[0, 1])


# --- flags ---


def test_defaults_are_those_of_pre_training() -> None:
    args = parsed()
    assert (args.opt_betas, args.scale, args.aa, args.mask_ratio) == ([0.9, 0.95], [0.2, 1.0], "none", 0.75)
    off = ("drop_path", "model_ema", "mixup", "cutmix", "reprob", "color_jitter", "repeated_aug")
    assert not any(getattr(args, name) for name in off)
    typed = parsed("--opt-betas", "0.9", "0.999", "--mixup", "0.8", "--scale", "0.3", "0.9", "--model-ema")
    assert (typed.opt_betas, typed.mixup, typed.scale, typed.model_ema) == ([0.9, 0.999], 0.8, [0.3, 0.9], True)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("fastvim_base_patch16_224", "mae_fastvim_base_patch16_224"),
        ("vim_tiny_patch16_224", "mae_vim_tiny_patch16_224"),
        ("vim_base_patch16_224_final_pool_mean_abs_pos_embed_with_midclstok_div2", "mae_vim_base_patch16_224"),
        ("mae_FastVim_base_dec512d2b", "mae_FastVim_base_dec512d2b"),
    ],
)
def test_pretrain_flag_makes_an_autoencoder_of_a_name(name: str, wanted: str) -> None:
    args = main.parse(["--pretrain", "mae", "--model", name])
    assert (args.task, args.model, args.input_size) == ("pretrain", wanted, 224)


def test_autoencoders_name_is_enough() -> None:
    assert main.parse(["--model", "mae_vim_nano_patch4_32"]).task == "pretrain"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--mask-ratio", "1"), "below 1"),
        (("--mask-ratio", "0"), "above 0"),
        (("--mask-ratio", "0.99"), "leaves some of 16 patches visible"),
        (("--pool-method", "max"), "mean"),
        (("--fusion-strategy", "all", "--fusion-token", "2"), "merging"),
        (("--pruning", "token"), "pruning"),
        (("--model", "deit_tiny_patch16_224"), "no masked autoencoder"),
        (("--model", "dyvm_tiny_patch16_224"), "no masked autoencoder"),
        (("--label-share", "0.5"), "--label-share"),
        (("--attn-only",), "--attn-only"),
        (("--linear-probe",), "classify"),
    ],
)
def test_wrong_flags_are_told_in_a_sentence(flags: tuple[str, ...], told: str, program: Callable[..., Result]) -> None:
    result = program(*QUICK, *flags)
    assert result.code == 2
    assert told in result.err
    assert result.err.count("main.py: error:") == 1


# --- the program ---


def test_three_stages_on_a_folder_of_images(tmp_path: Path) -> None:
    data = write_image_folder(tmp_path / "data", classes=3, train=8, test=4)
    where = ("--data-set", "IMNET", "--data-path", data, "--input-size", 32, "--num_workers", 0, "--device", "cpu")
    stage = (*where, "--batch-size", 8, "--epochs", 1, "--warmup-epochs", 0, "--drop-path", 0)
    masked, tuned, probe = (tmp_path / name for name in ("masked", "tuned", "probe"))
    flags = ("--pretrain", "mae", "--model", "fastvim_micro_patch8_32", "--mask-ratio", 0.5, "--output_dir", masked)
    result = finish(start(MICRO, *stage, *flags, "--visualize", tmp_path / "pictures"))
    assert result.code == 0, result.err
    assert (tmp_path / "pictures" / "rebuilt.png").is_file()
    (line,) = lines(masked)
    assert line["test_loss_of_means"] == pytest.approx(191 / 192, abs=1e-3)
    assert torch.load(masked / "checkpoint.pth", weights_only=True)["best_metric"] == line["test_loss"]

    weights = masked / "checkpoint.pth"
    model = ("--model", "fastvim_micro_patch8_32", "--finetune", weights)
    result = finish(start(MICRO, *stage, *model, "--layer-decay", 0.65, "--output_dir", tuned))
    assert result.code == 0, result.err
    assert "--pool-scale 0.5" in result.out
    assert json.loads((tuned / "args.json").read_text(encoding="utf-8"))["pool_scale"] == 0.5

    result = finish(start(MICRO, *stage, *model, "--linear-probe", "--output_dir", probe))
    assert result.code == 0, result.err
    ends = [torch.load(folder / "checkpoint.pth", weights_only=True)["model"] for folder in (masked, probe)]
    shared = [name for name in ends[1] if name in ends[0]]
    assert len(shared) > 50
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in shared)
    assert ends[1]["head.1.weight"].shape == (3, 32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An epoch of pre-training on 16 images of CIFAR."""
    from tests.conftest import call_program

    root = tmp_path_factory.mktemp("masked")
    write_cifar100(root / "data", train=16, test=6)
    where = ("--data-set", "CIFAR", "--data-path", root / "data")
    assert call_program(*QUICK, *where, "--output_dir", root / "run").code == 0
    return root


def test_evaluation_repeats_and_is_shared_among_processes(trained: Path, program: Callable[..., Result]) -> None:
    where = ("--data-set", "CIFAR", "--data-path", trained / "data", "--resume", trained / "run" / "checkpoint.pth")
    told = [program(*QUICK, *where, "--eval", "--batch-size", size).out for size in (8, 2)]
    (figure,) = {
        line.partition("loss ")[2] for text in told for line in text.splitlines() if line.startswith("Loss on")
    }
    logged = lines(trained / "run")[-1]
    assert figure.startswith(f"{logged['test_loss']:.4f}")


def test_two_processes_see_the_masks_of_one(tmp_path: Path, program: Callable[..., Result]) -> None:
    data = write_cifar100(tmp_path / "data", train=8, test=7)
    flags = [*QUICK, "--data-set", "CIFAR", "--data-path", data, "--dist-eval", "--epochs", 2]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    two = finish(start(*launcher, MICRO, *flags, "--batch-size", 4, "--output_dir", tmp_path / "two"))
    assert two.code == 0, two.err
    assert program(*flags, "--output_dir", tmp_path / "one").code == 0
    for first, second in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert first["train_loss"] == pytest.approx(second["train_loss"], rel=1e-4 if first["epoch"] else 1e-6)
        assert first["test_loss"] == pytest.approx(second["test_loss"], rel=1e-4)


def test_resume_in_the_middle_is_exact(
    program: Callable[..., Result], stop_after: Callable[[int], None], tmp_path: Path
) -> None:
    data = write_cifar100(tmp_path / "data", train=40, test=4)
    flags = [*QUICK, "--data-set", "CIFAR", "--data-path", data, "--epochs", 3, "--accum-iter", 2, "--sched-on-updates"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert program(*flags, "--output_dir", whole).code == 0
    # an epoch is 5 batches, 3 updates and 1 step of evaluation: in the middle of the second epoch's second update
    stop_after(6 + 3)
    assert "Stopped by SIGTERM" in program(*flags, "--output_dir", parts, "--resume", "auto").err
    state = torch.load(parts / "checkpoint.pth", weights_only=True)
    assert (state["epoch"], state["step"], state["updates"]) == (0, 4, 5)
    assert program(*flags, "--output_dir", parts, "--resume", "auto").code == 0
    ends = [torch.load(folder / "checkpoint.pth", weights_only=True) for folder in (whole, parts)]
    assert ends[0]["updates"] == 9
    assert same(*ends)
    assert not same(state["model"], ends[0]["model"])


def test_what_the_weights_do_not_show_is_asked_for(
    trained: Path, program: Callable[..., Result], tmp_path: Path
) -> None:
    flags = ("--model", "fastvim_micro_patch8_32", "--data-set", "CIFAR", "--data-path", trained / "data")
    flags += ("--num_workers", "0", "--device", "cpu", "--batch-size", "8", "--epochs", "1", "--warmup-epochs", "0")
    weights = trained / "run" / "checkpoint.pth"
    tuned = program(*flags, "--finetune", weights, "--output_dir", tmp_path)
    assert tuned.code == 0, tuned.err
    assert "--pool-scale 0.25" in tuned.out
    result = program(*flags, "--eval", "--resume", tmp_path / "checkpoint.pth")
    assert result.code == 2
    assert "wanted --pool-scale 0.25" in result.err
    assert program(*flags, "--eval", "--resume", tmp_path / "checkpoint.pth", "--pool-scale", "0.25").code == 0
    typed = program(*flags, "--finetune", weights, "--pool-scale", "0.5", "--output_dir", tmp_path / "typed")
    assert typed.code == 0
    assert "--pool-scale 0.25" not in typed.out


def test_a_classifier_is_no_autoencoder(cifar: Path, vim_weights: Path, program: Callable[..., Result]) -> None:
    flags = (*QUICK, "--model", "mae_vim_micro_patch8_32", "--data-set", "CIFAR", "--data-path", cifar)
    result = program(*flags, "--finetune", vim_weights)
    assert result.code == 2
    assert "no checkpoint of mae_vim_micro_patch8_32" in result.err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--distillation-type", "hard"), "distillation"),
        ((), "--finetune"),
    ],
)
def test_wrong_probes_are_told_in_a_sentence(
    flags: tuple[str, ...], told: str, vim_weights: Path, program: Callable[..., Result]
) -> None:
    model = ("--model", "vim_micro_patch8_32", "--device", "cpu", "--linear-probe")
    result = program(*model, *flags, *(("--finetune", vim_weights) if flags else ()))
    assert result.code == 2
    assert told in result.err


def test_share_of_the_labels() -> None:
    args = main.parse(
        ["--model", "vim_micro_patch8_32", "--device", "cpu", "--data-set", "DIGITS", "--label-share", "0.1"]
    )
    shares = [datasets.build_dataset(True, args, lambda image: image)[0] for _ in range(2)]
    assert shares[0].indices == shares[1].indices
    classes = torch.tensor([shares[0].dataset.targets[index] for index in shares[0].indices]).bincount(minlength=10)
    assert classes.min() >= 13
    assert 140 <= int(classes.sum()) < 148
    args.seed = 1
    assert datasets.build_dataset(True, args, lambda image: image)[0].indices != shares[0].indices
    assert len(datasets.build_dataset(False, args, lambda image: image)[0]) == 360


def test_table_of_few_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, top1 in (("finetuned-0", 90.0), ("finetuned-1", 92.0), ("scratch-0", 80.0), ("probe", 70.0)):
        (tmp_path / name).mkdir()
        line = json.dumps({"epoch": 0, "seconds": 2.0, "test_acc1": top1})
        (tmp_path / name / "log.txt").write_text(line + "\n", encoding="utf-8")
        (tmp_path / name / "args.json").write_text(
            json.dumps({"label_share": 1.0 if name == "probe" else 0.1}), encoding="utf-8"
        )
    assert few_labels.main([str(tmp_path)]) == 2
    assert "log.txt" in capsys.readouterr().err
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "args.json").write_text(json.dumps({"iterations": 7}), encoding="utf-8")
    line = {"epoch": 0, "seconds": 30.0, "test_loss": 0.5, "test_loss_of_means": 0.75}
    (tmp_path / "pretrain" / "log.txt").write_text(json.dumps(line) + "\n", encoding="utf-8")
    assert few_labels.main([str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "7 steps and 30 s without labels: 0.5000; of predicting each patch's mean: 0.7500" in told
    assert "| pre-trained, fine-tuned | 10% | 2 | 91.00 ± 1.41 | 2.0 |" in told
    assert "| pre-trained, linear probe | 100% | 1 | 70.00 | 2.0 |" in told
