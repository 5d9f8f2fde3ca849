"""The data sets on disk, the order and the randomness of what is loaded."""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

import datasets
import loading
import main
from loading import SeededDataset, SeededSampler
from tasks import augmentation
from tasks.classify.task import Classify
from tasks.task import Data
from tests import program_data
from utils import UsageError, randomness


@pytest.fixture
def flags() -> Callable[..., argparse.Namespace]:
    """Parsed flags, without any check: `flags("--data-set", "CIFAR", ...)`."""

    def parse(*argv: object) -> argparse.Namespace:
        args, _ = main.get_args_parser().parse(["--input-size", "32", "--num_workers", "0", *map(str, argv)])
        args.steps_per_epoch = None
        return args

    return parse


def build(is_train: bool, args: argparse.Namespace) -> tuple[Dataset, int]:
    """The set as classification builds it."""
    transform = augmentation.build_transform(is_train, args, flip=args.data_set != "DIGITS")
    return datasets.build_dataset(is_train, args, transform)


def test_digits(flags: Callable[..., argparse.Namespace]) -> None:
    train, classes = build(True, flags())
    test, _ = build(False, flags())
    assert (len(train), len(test), classes) == (1437, 360, 10)
    counts = np.bincount(test.targets)
    assert counts.min() >= 34
    assert counts.max() <= 37
    image, target = test[0]
    assert image.shape == (3, 32, 32)
    assert target == test.targets[0]
    # the same split each time, and no image in both
    again, _ = build(False, flags())
    assert np.array_equal(again.images, test.images)
    seen = {array.tobytes() for array in train.images}
    assert sum(array.tobytes() in seen for array in test.images) == 0


def test_digits_are_not_mirrored(flags: Callable[..., argparse.Namespace]) -> None:
    train, _ = build(True, flags("--aa", "none", "--reprob", 0, "--color-jitter", 0))
    names = [type(part).__name__ for part in train.transform.transforms]
    assert "RandomHorizontalFlip" not in names
    assert "RandomCrop" in names


@pytest.mark.parametrize("inside", [False, True])
def test_cifar_path_may_be_the_folder_itself(
    inside: bool, flags: Callable[..., argparse.Namespace], tmp_path: Path
) -> None:
    root = program_data.write_cifar100(tmp_path)
    path = root / "cifar-100-python" if inside else root
    test, classes = build(False, flags("--data-set", "CIFAR", "--data-path", path))
    assert (len(test), classes) == (15, 100)
    assert test.targets == list(range(15))
    assert np.array_equal(test.images, program_data.pictures(15, seed=15))


def test_cifar_is_downloaded_only_if_absent(
    flags: Callable[..., argparse.Namespace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []

    class Source(datasets.CIFAR100):
        def __init__(self, root: Path, download: bool) -> None:
            fetched.append(root)
            program_data.write_cifar100(Path(root))

    monkeypatch.setattr(datasets, "CIFAR100", Source)
    for _ in range(2):
        build(True, flags("--data-set", "CIFAR", "--data-path", tmp_path))
    assert fetched == [tmp_path]

    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(Source, "__init__", offline)
    with pytest.raises(UsageError, match="cannot be downloaded: no network"):
        build(True, flags("--data-set", "CIFAR", "--data-path", tmp_path / "other"))


def test_image_folder(flags: Callable[..., argparse.Namespace], tmp_path: Path) -> None:
    args = flags("--data-set", "IMNET", "--data-path", program_data.write_image_folder(tmp_path))
    for is_train, count in ((True, 18), (False, 9)):
        dataset, classes = build(is_train, args)
        assert (len(dataset), classes) == (count, 3)
        assert dataset[count - 1][1] == 2
    # a class that the evaluation set lacks keeps the others' numbers
    (tmp_path / "val" / "n00000000").rename(tmp_path / "elsewhere")
    dataset, classes = build(False, args)
    assert classes == 3
    assert sorted(set(dataset.targets)) == [1, 2]


@pytest.mark.parametrize("families_on_disk", [True, False])
def test_inat(families_on_disk: bool, flags: Callable[..., argparse.Namespace], tmp_path: Path) -> None:
    program_data.write_inat(tmp_path, families_on_disk=families_on_disk)
    args = flags("--data-set", "INAT19", "--data-path", tmp_path, "--inat-category", "genus")
    train, classes = build(True, args)
    test, _ = build(False, args)
    assert classes == 2
    # classes are numbered as the training annotations bring them up, which begin with the last category
    assert train.class_to_idx == {"genus 1": 0, "genus 0": 1}
    assert {target for _, target in test.samples} == {0, 1}
    assert train[0][0].shape == (3, 32, 32)
    by_name, classes = build(False, flags("--data-set", "INAT19", "--data-path", tmp_path))
    assert classes == 4
    with pytest.raises(UsageError, match="'family' is missing"):
        build(True, flags("--data-set", "INAT19", "--data-path", tmp_path, "--inat-category", "family"))
    assert len(by_name) == len(test)


@pytest.mark.parametrize("file", ["train2019.json", "categories.json"])
@pytest.mark.parametrize(
    "content", ["[]", "3", "null", "{}", '{"annotations": 3}', '[{"id": []}]', "[" * 100_000, '"x"', "[[1]]", "\x00"]
)
def test_odd_inat_files_are_refused(
    file: str, content: str, flags: Callable[..., argparse.Namespace], tmp_path: Path
) -> None:
    program_data.write_inat(tmp_path)
    (tmp_path / file).write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match="is no iNaturalist 2019|cannot be read"):
        build(True, flags("--data-set", "INAT19", "--data-path", tmp_path, "--inat-category", "genus"))


def test_timm_folder(flags: Callable[..., argparse.Namespace], tmp_path: Path) -> None:
    program_data.write_image_folder(tmp_path)
    for name in ("timm/folder/any", "timm/torch/folder"):
        dataset, classes = build(True, flags("--data-set", name, "--data-path", tmp_path))
        assert (len(dataset), classes) == (18, 3)
        assert dataset[0][0].shape == (3, 32, 32)


def test_web_dataset_shards(flags: Callable[..., argparse.Namespace], tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    splits = {}
    for split, count in (("train", 16), ("validation", 6)):
        file = f"{split}-0000.tar"
        splits[split] = dict(name=split, num_samples=count, filenames=[file], shard_lengths=[count])
        with tarfile.open(tmp_path / file, "w") as shard:
            for number, picture in enumerate(program_data.pictures(count)):
                buffer = io.BytesIO()
                Image.fromarray(picture).save(buffer, "JPEG")
                for suffix, content in (("jpg", buffer.getvalue()), ("cls", str(number % 4).encode())):
                    entry = tarfile.TarInfo(f"{number:05}.{suffix}")
                    entry.size = len(content)
                    shard.addfile(entry, io.BytesIO(content))
    (tmp_path / "_info.json").write_text(json.dumps({"name": "small", "splits": splits}), encoding="utf-8")
    args = flags("--data-set", "timm/wds/small", "--data-path", tmp_path, "--num-classes", 4, "--batch-size", 4)
    dataset, classes = build(True, args)
    assert classes == 4
    loader = loading.TrainBatches(dataset, args)
    assert loader.steps == 4
    assert [images.shape for images, _ in loader.epoch(0)] == 4 * [(4, 3, 32, 32)]
    whole, rest = ([targets.tolist() for _, targets in loader.epoch(1, start)] for start in (0, 2))
    assert whole[2:] == rest
    test, _ = build(False, args)
    assert sum(len(targets) for _, targets in loading.EvalBatches(test, args)) == 6


def test_hugging_face_package_is_found_behind_this_module(
    flags: Callable[..., argparse.Namespace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm's reader imports `datasets`, and must get the package of that name, or the user a sentence."""
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)
    monkeypatch.setattr(sys, "path", [str(Path(datasets.__file__).parent), str(tmp_path)])
    args = flags("--data-set", "timm/hfds/someone/pictures")
    with pytest.raises(UsageError, match="pip install datasets"):
        build(True, args)
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text(
        "def load_dataset(name, **kwargs):\n    raise FileNotFoundError(f'{name} is not on the hub')\n",
        encoding="utf-8",
    )
    with pytest.raises(UsageError, match="someone/pictures is not on the hub"):
        build(True, args)
    assert sys.modules["datasets"].__file__.startswith(str(tmp_path))


def batches(args: argparse.Namespace, epoch: int, start: int = 0) -> list[torch.Tensor]:
    dataset, _ = build(True, args)
    loader = Classify.train_batches(Data(dataset, dataset), args)
    return [torch.cat([images.flatten(1), targets[:, None]], 1) for images, targets in loader.epoch(epoch, start)]


@pytest.mark.parametrize("repeat", ["--repeated-aug", "--no-repeated-aug"])
def test_batches_do_not_depend_on_workers_or_interruptions(
    repeat: str, flags: Callable[..., argparse.Namespace], cifar: Path
) -> None:
    common = ["--data-set", "CIFAR", "--data-path", cifar, "--batch-size", 8, repeat, "--seed", 5]
    whole = batches(flags(*common), 3)
    assert len(whole) == 5
    state = torch.get_rng_state()
    for other in (batches(flags(*common, "--num_workers", 2), 3), batches(flags(*common), 3)):
        assert all(map(torch.equal, whole, other))
    assert torch.equal(torch.get_rng_state(), state)
    rest = batches(flags(*common, "--num_workers", 1), 3, start=2)
    assert len(rest) == 3
    assert all(map(torch.equal, whole[2:], rest))
    assert not torch.equal(batches(flags(*common), 4)[0], whole[0])
    assert not torch.equal(batches(flags(*common[:-1], 6), 3)[0], whole[0])


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("size", [40, 41, 300])
def test_processes_share_what_one_would_see(size: int, repeats: int) -> None:
    one = SeededSampler(range(size), 7, 0, 1, repeats)
    one.set_epoch(2)
    shares = []
    for rank in range(2):
        sampler = SeededSampler(range(size), 7, rank, 2, repeats)
        sampler.set_epoch(2)
        shares.append(list(sampler))
        assert len(shares[-1]) == len(sampler)
    together = [pair for both in zip(*shares) for pair in both]
    assert together[: len(one)] == list(one)[: len(together)]
    assert len(shares[0]) == len(shares[1])


def test_seed_is_the_item_s_own() -> None:
    class Noise(torch.utils.data.Dataset):
        def __getitem__(self, index: int) -> tuple[float, float]:
            return float(torch.rand(())), np.random.rand()  # noqa: NPY002

    noise = SeededDataset(Noise())
    randomness.seed_everything(0)
    before = torch.rand(3)
    randomness.seed_everything(0)
    first, again, other = noise[0, 11], noise[5, 11], noise[0, 12]
    assert first == again != other
    assert torch.equal(torch.rand(3), before)


@pytest.mark.parametrize("world", [2, 4, 7])
def test_dist_eval_shares_have_no_duplicates(
    world: int, flags: Callable[..., argparse.Namespace], cifar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = flags("--data-set", "CIFAR", "--data-path", cifar, "--dist-eval", "--batch-size", 2)
    dataset, _ = build(False, args)
    monkeypatch.setattr(loading, "world_size", lambda: world)
    seen, steps = [], set()
    for rank in range(world):
        monkeypatch.setattr(loading, "rank", lambda rank=rank: rank)
        loader = loading.EvalBatches(dataset, args)
        own = [targets for _, targets in loader]
        assert len(own) <= loader.steps
        seen += torch.cat(own).tolist()
        steps.add(loader.steps)
    assert sorted(seen) == list(range(15))
    assert len(steps) == 1


def test_small_sets_give_smaller_batches(flags: Callable[..., argparse.Namespace], tmp_path: Path) -> None:
    root = program_data.write_cifar100(tmp_path, train=7)
    common = ["--data-set", "CIFAR", "--data-path", root, "--batch-size", 128]
    assert [len(batch) for batch in batches(flags(*common), 0)] == [6]
    assert [len(batch) for batch in batches(flags(*common, "--mixup", 0, "--cutmix", 0), 0)] == [7]
    one = program_data.write_cifar100(tmp_path / "one", train=1)
    with pytest.raises(UsageError, match="mixup wants 2"):
        batches(flags("--data-set", "CIFAR", "--data-path", one), 0)


def test_labels_outside_the_classes() -> None:
    datasets.check_labels(torch.tensor([0, 9]), 10, "training")
    for label in (-1, 10):
        with pytest.raises(UsageError, match=f"label {label}; wanted 0 to 9"):
            datasets.check_labels(torch.tensor([0, label]), 10, "training")
