"""The task `cells`: transforms, figures, models that know channels and others, and the program on every format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import small_cells as cells_data
from tasks.cells import transforms
from tasks.cells.dataset import Batch
from tasks.cells.metrics import CellsEvaluator, Targets
from tasks.cells.subsets import evaluate_subsets, subsets_of, table
from tasks.cells.task import spread
from tests.conftest import Result, finish, lines, start
from utils import UsageError

# a model of a second's size, and an epoch of full steps
QUICK = (
    *("--task", "cells", "--device", "cpu", "--num_workers", "0", "--epochs", "1", "--batch-size", "4"),
    *("--input-size", "16"),
)


# --- transforms ---


def test_rotation_is_that_of_right_angles_and_keeps_the_middle() -> None:
    image = torch.randn(3, 9, 9)
    torch.testing.assert_close(transforms.rotate(image, 90), image.rot90(1, (1, 2)), atol=1e-5, rtol=0)
    torch.testing.assert_close(transforms.rotate(image, 180), image.rot90(2, (1, 2)), atol=1e-5, rtol=0)
    turned = transforms.rotate(torch.ones(1, 9, 9), 37)
    torch.testing.assert_close(turned, torch.ones(1, 9, 9))  # what lies outside is reflected, not empty
    assert transforms.rotate(image, 30).shape == image.shape


def test_blur_is_the_mean_over_a_disc() -> None:
    image = torch.zeros(2, 9, 9)
    image[:, 4, 4] = 1
    blurred = transforms.blur(image, 1)
    assert int((blurred[0] > 0).sum()) == 5
    torch.testing.assert_close(blurred.sum((1, 2)), torch.ones(2))
    assert int((transforms.blur(image, 3)[0] > 0).sum()) == 29
    assert transforms.blur(image, 0.9) is image


def test_training_transform_keeps_channels_together() -> None:
    transform, image = transforms.TrainTransform(32), torch.rand(1, 32, 32).expand(3, -1, -1) + 1
    sizes, holes = set(), 0
    for seed in range(40):
        torch.manual_seed(seed)
        changed = transform(image)
        sizes.add(tuple(changed.shape))
        torch.testing.assert_close(changed[0], changed[2])
        holes += bool((changed == 0).any())
    assert sizes == {(3, 32, 32)}
    assert holes > 20
    upright = transforms.TrainTransform(32, upright=True)
    ramp = torch.arange(32.0).view(1, 1, -1).expand(1, 32, 32) + 1
    for seed in range(20):
        torch.manual_seed(seed)
        changed = upright(ramp)[0, 16]
        kept = changed[changed > 0]
        assert float((kept[1:] - kept[:-1]).min()) >= 0  # never mirrored nor turned


def test_evaluation_transform_cuts_the_middle() -> None:
    image = torch.rand(2, 32, 32)
    assert transforms.EvalTransform(32)(image) is not None
    torch.testing.assert_close(transforms.EvalTransform(32)(image), image)
    wide = torch.zeros(1, 16, 64)
    wide[:, :, 24:40] = 1
    torch.testing.assert_close(transforms.EvalTransform(16)(wide), torch.ones(1, 16, 16))
    assert transforms.EvalTransform(16)(torch.rand(1, 33, 47)).shape == (1, 16, 16)


def test_normalisations() -> None:
    images = torch.rand(2, 2, 8, 8) * 255
    own = transforms.normalize(images, "self", (3, 1))
    torch.testing.assert_close(own.mean((2, 3)), torch.zeros(2, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(own.std((2, 3), correction=0), torch.ones(2, 2))
    mean, std = torch.tensor([0.0, 10, 0, 20]), torch.tensor([1.0, 2, 1, 0])
    found = transforms.normalize(images, "dataset", (3, 1), mean, std)
    torch.testing.assert_close(found[:, 0], images[:, 0] - 20)  # no spread, no division
    torch.testing.assert_close(found[:, 1], (images[:, 1] - 10) / 2)
    assert float(transforms.normalize(images, "none", (3, 1), span=255.0).max()) <= 1


# --- figures ---


def test_figures() -> None:
    labels, answers = torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([0, 0, 1, 1, 0, 2])
    logits = torch.full((6, 4), -3.0).scatter(1, answers[:, None], torch.tensor([[3.0], [3], [0], [3], [0], [3]]))
    wells = torch.tensor([0, 0, 0, 1, -1, 2])
    whole = CellsEvaluator(4)
    whole.update(logits, Targets(labels, wells))
    stats = whole.compute()
    assert stats["acc1"] == pytest.approx(100 * 4 / 6)
    assert stats["balanced_acc1"] == pytest.approx(100 * (2 / 3 + 1 + 1 / 2) / 3)
    assert stats["well_acc1"] == 100  # three cells of well 0 outvote one
    assert stats["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)))
    parts = CellsEvaluator(4)
    for at in (slice(0, 2), slice(2, 6)):
        parts.update(logits[at], Targets(labels[at], wells[at]))
    assert parts.compute() == pytest.approx(stats)
    with pytest.raises(UsageError, match="holds no image"):
        CellsEvaluator(4).compute()
    parts = CellsEvaluator(4)
    parts.update(logits, Targets(labels, torch.full((6,), -1)))
    assert "well_acc1" not in parts.compute()


def test_subsets() -> None:
    # channel c of an image holds its label where c is odd, else nothing
    labels = torch.arange(8) % 4
    images = (
        torch.stack([labels * (channel % 2) for channel in range(3)], 1).float()[..., None, None].expand(-1, -1, 2, 2)
    )

    def predict(images: Tensor, channels: tuple[int, ...]) -> Tensor:
        assert images.shape[1] == len(channels)
        return torch.nn.functional.one_hot(images.amax((1, 2, 3)).long(), 4).float()

    subsets = subsets_of((0, 1, 2))
    assert len(subsets) == 7
    whole = (Batch(images, labels, torch.tensor([0, 1, 2]), labels), images)
    partial = (Batch(images[:, 1:], labels, torch.tensor([1, 2]), labels), images[:, 1:])
    results = {result.channels: result for result in evaluate_subsets(predict, [whole, partial], subsets)}
    assert results[1,].accuracy == results[0, 1, 2].accuracy == 100
    assert results[0, 2].accuracy == 25
    assert [results[each].count for each in ((0,), (1,), (1, 2))] == [8, 16, 16]
    told = table(list(results.values()), "abc")
    assert told[1].split() == ["1", "3", "50.00", "25.00", "100.00", "(a;", "b)"]
    assert told[3].split() == ["3", "1", "100.00", "100.00", "100.00"]


def test_other_models_see_zeros_and_more_of_the_rest() -> None:
    images = torch.ones(2, 2, 3, 3)
    whole = spread(images, (3, 0), 4)
    assert whole[:, :, 0, 0].tolist() == [[2, 0, 0, 2]] * 2


# --- the program ---


def micro(tmp_path: Path) -> tuple[str, ...]:
    return ("--output_dir", str(tmp_path / "output"))


def args_for(how: str, root: Path) -> tuple[object, ...]:
    """The flags of a small data set of one format."""
    if how in ("csv", "tsv", "parquet"):
        return "--data-set", "CELLS", "--index", cells_data.write_index(root, how), "--split-by", "well"
    if how.startswith("jumpcp"):
        return "--data-set", "JUMPCP", "--data-path", cells_data.write_jumpcp(root, text=how == "jumpcp-text")
    return "--data-set", "CELLS", "--data-path", cells_data.write_folder(root, how)


FORMATS = ("pages", "axis", "lzw", "npy", "planes", "csv", "parquet", "jumpcp", "jumpcp-text")


@pytest.mark.parametrize("how", FORMATS)
def test_an_epoch_on_every_format(how: str, tmp_path: Path) -> None:
    data = args_for(how, tmp_path / "data")
    flags = (*QUICK, *data, "--model", "fastchannelvim_nano_patch4_32", *micro(tmp_path))
    done = finish(start("main.py", *flags))
    assert done.code == 0, done.err
    line = lines(tmp_path / "output")[0]
    assert 0 < line["train_loss"] < 10
    assert {"test_acc1", "test_balanced_acc1", "test_loss"} <= set(line)
    assert ("test_well_acc1" in line) == (how in ("csv", "parquet", "jumpcp", "jumpcp-text"))


def test_two_processes(tmp_path: Path) -> None:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "main.py")
    data = args_for("pages", tmp_path / "data")
    flags = (*QUICK, *data, "--model", "fastchannelvim_nano_patch4_32", *micro(tmp_path), "--dist-eval")
    done = finish(start(*launch, *flags))
    assert done.code == 0, done.err
    state = torch.load(tmp_path / "output" / "checkpoint.pth", weights_only=True)["task_state"]
    images = [cells_data.read(path) / 65535.0 for path in sorted((tmp_path / "data" / "train").rglob("*.tif"))]
    np.testing.assert_allclose(state["mean"], np.stack(images).mean((0, 2, 3)), rtol=1e-5)
    assert state["channels"] == ["0", "1", "2"]


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint of one epoch on digits of five channels."""
    from tests.conftest import call_program

    output = tmp_path_factory.mktemp("digits") / "output"
    flags = (*QUICK, "--batch-size", "128", "--lr", "0.02", "--output_dir", output)
    done = call_program(*flags)
    assert done.code == 0, done.err
    return output


def test_evaluation_on_subsets_and_pictures(digits_run: Path, tmp_path: Path, program: Callable[..., Result]) -> None:
    trained = lines(digits_run)[0]
    flags = (*QUICK, "--batch-size", "128", "--eval", "--resume", digits_run / "checkpoint.pth")
    done = program(*flags, "--channel-subsets", "--output_dir", tmp_path, "--visualize", tmp_path / "pictures")
    assert done.code == 0, done.err
    told = done.out + done.err
    assert f"top-1 {trained['test_acc1']:.2f} %" in told
    rows = (tmp_path / "channel_subsets.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 1 + 31
    assert rows[-1].startswith("5,intensity edge0 edge45 edge90 edge135,360,")
    assert float(rows[-1].split(",")[3]) == pytest.approx(trained["test_acc1"], abs=0.01)
    for name in ("channels.png", "channel_subsets.png"):
        assert (tmp_path / "pictures" / name).stat().st_size > 5000
    some = program(*flags, "--channels", "intensity,edge0")
    assert some.code == 0
    row = next(row for row in rows if row.startswith("2,intensity edge0,"))
    assert f"top-1 {float(row.split(',')[3]):.2f} %" in some.out + some.err


def test_gaps_in_the_channels_and_resuming(tmp_path: Path, program: Callable[..., Result]) -> None:
    from tests.test_cells_data import write_gaps

    index = write_gaps(tmp_path)
    flags = (*QUICK, "--data-set", "CELLS", "--index", index, "--batch-size", "2", *micro(tmp_path))
    flags = (*flags, "--model", "channelvim_nano_patch4_32")
    assert program(*flags).code == 0
    again = program(*flags, "--epochs", "2", "--resume", "auto")
    assert again.code == 0, again.err
    assert [line["epoch"] for line in lines(tmp_path / "output")] == [0, 1]


def test_a_timm_model_and_a_plain_vim_on_the_same_data(tmp_path: Path, program: Callable[..., Result]) -> None:
    data = args_for("npy", tmp_path / "data")
    for model, more in (("resnet10t", ("--channel-sampling", "hcs")), ("vim_nano_patch4_32", ())):
        done = program(*QUICK, "--input-size", "32", *data, "--model", model, *more)
        assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--channels", "edge1"), "--channels names 'edge1'"),
        (("--channels", "0,intensity"), "--channels names channel 'intensity' twice"),
        (("--channel-subsets",), "--channel-subsets wants --eval"),
        (("--plates", "P"), "--plates belongs to --data-set JUMPCP"),
        (("--split-by", "well"), "--split-by splits JUMPCP or the rows of --index"),
        (("--data-set", "CELLS"), "--data-path is missing"),
        (("--data-set", "CELLS", "--data-path", "/nowhere"), "--data-path /nowhere is no folder"),
        (("--data-set", "CELLS", "--index", "/nowhere.csv"), "/nowhere.csv cannot be read"),
        (("--scan-order", "Spatial-First", "--model", "vim_nano_patch4_32"), "has none; wanted a ChannelVim"),
        (("--pool-dims", "2", "--model", "channelvim_nano_patch4_32"), "does not pool channels"),
        (("--model", "dyvm_nano_patch4_32"), "wanted --task classify"),
        (("--fsdp",), "--fsdp divides classifiers"),
    ],
)
def test_mistakes_are_one_sentence(flags: tuple[str, ...], said: str, program: Callable[..., Result]) -> None:
    done = program(*QUICK, *flags)
    assert done.code == 2
    assert said in done.err
    assert done.err.strip().count("\n") == 0


def test_a_checkpoint_of_other_data(digits_run: Path, tmp_path: Path, program: Callable[..., Result]) -> None:
    flags = (*QUICK, "--eval", "--resume", digits_run / "checkpoint.pth")
    other = program(*flags, "--channel-norm", "self")
    assert other.code == 2
    assert "the checkpoint was trained with dataset" in other.err
    checkpoint = torch.load(digits_run / "checkpoint.pth", weights_only=True)
    checkpoint["task_state"]["channels"][1] = "DNA"
    torch.save(checkpoint, tmp_path / "other.pth")
    other = program(*QUICK, "--eval", "--resume", tmp_path / "other.pth")
    assert other.code == 2
    assert "trained on the channels intensity, DNA, edge45" in other.err
    for name, junk, told in (
        ("", torch.ones(0), "names no channels and classes"),
        ("channels", 5, "names no channels and classes"),
        ("mean", [1.0], "task_state.mean has 1 entries, wanted 5"),
        ("std", ["x"] * 5, "task_state.std.0 is 'x', wanted a number"),
    ):
        state = torch.load(digits_run / "checkpoint.pth", weights_only=True)
        odd = state["task_state"] | {name: junk} if name else junk
        torch.save(state | {"task_state": odd}, tmp_path / "odd.pth")
        odd = program(*QUICK, "--eval", "--resume", tmp_path / "odd.pth")
        assert odd.code == 2
        assert told in odd.err
    # a tensor is neither true nor false
    torch.save(state | {"model_ema": torch.ones(0)}, tmp_path / "odd.pth")
    assert program(*QUICK, "--eval", "--resume", tmp_path / "odd.pth").code == 0


def test_recipe(program: Callable[..., Result], tmp_path: Path) -> None:
    import main

    args = main.parse(["--task", "cells", "--device", "cpu"])
    assert (args.epochs, args.batch_size, args.lr, args.warmup_epochs, args.warmup_lr) == (100, 32, 2e-3, 10, 0.0)
    assert (args.weight_decay, args.weight_decay_end, args.min_lr, args.drop_path) == (0.04, 0.4, 1e-6, 0.05)
    assert not args.model_ema
    assert not args.if_amp
    assert args.sched_on_updates
    args = main.parse(["--task", "cells", "--device", "cpu", "--weight-decay", "0.1", "--epochs", "20"])
    assert (args.weight_decay, args.weight_decay_end, args.warmup_epochs) == (0.1, None, 2)


def test_published_checkpoints(tmp_path: Path, program: Callable[..., Result]) -> None:
    """Lightning's form, with numpy arrays among the hyper-parameters."""
    import timm

    model = timm.create_model("fastchannelvim_nano_patch4_32", img_size=16)
    weights = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    checkpoint = {"state_dict": weights, "hyper_parameters": {"mean": np.arange(5.0), "cfg": {"std": np.ones(5)}}}
    torch.save(checkpoint, tmp_path / "published.ckpt")
    done = program(*QUICK, "--eval", "--finetune", tmp_path / "published.ckpt")
    assert done.code == 0, done.err
