"""How data sets reach the model: which item comes when, with which random state, in which batch.

The same for any number of workers, and after any resume.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterator, Sized
from typing import Any, Protocol

import numpy as np
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler, get_worker_info

from utils import UsageError
from utils.flags import add_switch, number
from utils.processes import rank, world_size
from utils.randomness import seeded
from utils.signals import ignore_stop_signals

_logger = logging.getLogger(__name__)

Collate = Callable[[list[Any]], Any]


class BatchSampler(Protocol):
    """Which items make a batch, where a task has a say in it: lists of indices, in training of (index, seed) pairs.

    Every process takes `steps` batches from its own; in evaluation one may have fewer.
    """

    steps: int

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Make the next pass that of `epoch`, without its first `start` batches."""

    def __len__(self) -> int:
        """How many batches the next pass gives."""

    def __iter__(self) -> Iterator[list[Any]]:
        """The batches of the next pass."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of batches and loaders."""
    group = parser.add_argument_group("batches")
    group.add_argument("--batch-size", type=number(int, 1), default=64, help="images a process and step (default: 64)")
    group.add_argument("--dist-eval", action="store_true", help="share the evaluation set among the processes")
    group.add_argument("--num_workers", "--num-workers", type=number(int, 0), default=10, help="default: 10")
    add_switch(group, ["--pin-mem"], ["--no-pin-mem"], default=True, help="page-locked batches for faster copies")


class SeededSampler(Sampler[tuple[int, int]]):
    """Yields (index, seed) pairs of one process's share of an epoch; see `SeededDataset`.

    The seed belongs to the place in the epoch over all processes, so that it does not matter how many processes and
    workers there are, nor whether the epoch was interrupted. `repeats` > 1 is DeiT's repeated augmentation (Hoffer et
    al., 2020): every image comes that often in a row, spread over the processes, in an epoch no longer than without.
    With `length` an epoch is so many items of an endless row of shuffled passes, whatever the size of the set.
    """

    def __init__(
        self, dataset: Sized, seed: int, rank: int, world_size: int, repeats: int = 1, length: int | None = None
    ) -> None:
        self.seed, self.rank, self.world_size, self.length = seed, rank, world_size, length
        self.epoch = 0
        self.start = 0
        self._base: RepeatAugSampler | DistributedSampler
        if repeats > 1:
            self._base = RepeatAugSampler(dataset, world_size, rank, num_repeats=repeats)
        else:
            self._base = DistributedSampler(dataset, world_size, rank, seed=seed)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Make the next pass that of `epoch`, without its first `start` images."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return (len(self._base) if self.length is None else self.length) - self.start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        count = self.start + len(self)
        seeds = np.random.default_rng([self.seed, self.epoch]).integers(2**32, size=count * self.world_size)
        own = seeds[self.rank :: self.world_size].tolist()
        indices = itertools.islice(self._indices(), self.start, None)
        for place, index in zip(range(self.start, count), indices):
            yield int(index), own[place]

    def _indices(self) -> Iterator[int]:
        if self.length is None:
            yield from self._pass(self.epoch)
            return
        number, skipped = divmod(self.epoch * self.length, len(self._base))
        yield from itertools.islice(self._pass(number), skipped, None)
        for later in itertools.count(number + 1):
            yield from self._pass(later)

    def _pass(self, number: int) -> Iterator[int]:
        """The whole set once, shuffled as pass `number` has it."""
        # RepeatAugSampler shuffles by the epoch alone; DistributedSampler adds the seed itself
        self._base.set_epoch(number + (self.seed << 20) if isinstance(self._base, RepeatAugSampler) else number)
        return iter(self._base)


class SeededDataset(Dataset):
    """Loads an item with the random state that its sampler chose for it: `dataset[index, seed]`."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: tuple[int, int]) -> object:
        index, seed = key
        with seeded(seed, restore=get_worker_info() is None):
            return self.dataset[index]


def _workers(args: argparse.Namespace) -> int:
    """Loader processes for each process: as many as asked for, at most its share of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if args.num_workers > share:
        _logger.info(
            "%d loader workers a process instead of %d: that is its share of the cores.", share, args.num_workers
        )
    return min(args.num_workers, share)


class TrainBatches:
    """The training set in batches, the same after any interruption.

    `batch_size` is the flag's, less where a process has fewer items than that; the last, partial batch of an epoch is
    left out. `steps` is the number of batches in an epoch, None where the data set does not know; if it is given, an
    epoch is that many batches of an endless stream. `even` asks for an even batch size, as mixup wants it; `repeats` is
    `SeededSampler`'s, `collate` the DataLoader's. With a `batch_sampler` the batches and their number are its own.
    """

    def __init__(
        self,
        dataset: Dataset,
        args: argparse.Namespace,
        *,
        repeats: int = 1,
        even: bool = False,
        steps: int | None = None,
        collate: Collate | None = None,
        batch_sampler: BatchSampler | None = None,
    ) -> None:
        self.seed, self.batch_size = args.seed, args.batch_size
        self.dataset, self.generator = dataset, torch.Generator()
        self.sampler: SeededSampler | None = None
        self.batch_sampler = batch_sampler
        self.steps: int | None
        workers = _workers(args)
        options: dict[str, Any] = {}
        if isinstance(dataset, IterableDataset):
            # timm's readers share their samples among processes, and count those of one
            workers = max(workers, 1)  # in this process a stream would remember its last epoch
            if hasattr(dataset, "set_loader_cfg"):
                dataset.set_loader_cfg(num_workers=workers)
            self.steps = len(dataset) // self.batch_size or None  # type: ignore[arg-type]
        elif batch_sampler is not None:
            self.steps = len(batch_sampler)
            dataset, options = SeededDataset(dataset), {"batch_sampler": batch_sampler}
            options["persistent_workers"] = workers > 0
        else:
            length = None if steps is None else steps * self.batch_size
            self.sampler = SeededSampler(dataset, args.seed, rank(), world_size(), repeats, length)
            count = len(self.sampler)
            if count < self.batch_size:
                self.batch_size = count - count % 2 if even else count
                _logger.warning("Batches of %d: each process has only %d images.", self.batch_size, count)
            if self.batch_size == 0:
                raise UsageError(
                    f"The training set gives each process {count} images; mixup wants 2, or --mixup 0 --cutmix 0."
                )
            self.steps = count // self.batch_size
            dataset, options = SeededDataset(dataset), {"sampler": self.sampler, "persistent_workers": workers > 0}
        if batch_sampler is None:
            options |= {"batch_size": self.batch_size, "drop_last": True}
        self.loader = _loader(dataset, args, workers, collate, generator=self.generator, **options)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """The batches of `epoch` from number `start` on."""
        self.generator.manual_seed(int(np.random.SeedSequence([self.seed, epoch, rank()]).generate_state(1)[0]))
        if self.batch_sampler is not None:
            self.batch_sampler.set_epoch(epoch, start)
            return iter(self.loader)
        if self.sampler is not None:
            self.sampler.set_epoch(epoch, start * self.batch_size)
            return iter(self.loader)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        return itertools.islice(iter(self.loader), start, None)


class EvalBatches:
    """The evaluation set in order, in batches of `batch_size`: half as large again as in training, unless it is given.

    With `--dist-eval` a process gets every world_size-th item, and no item comes twice: `steps` is the longest share,
    so that all processes can go through the same number of steps. With a `batch_sampler` the batches are its own, and
    it has to share them so.
    """

    def __init__(
        self,
        dataset: Dataset,
        args: argparse.Namespace,
        *,
        batch_size: int | None = None,
        collate: Collate | None = None,
        batch_sampler: BatchSampler | None = None,
    ) -> None:
        batch_size = int(1.5 * args.batch_size) if batch_size is None else batch_size
        shares = world_size() if args.dist_eval else 1
        streams = isinstance(dataset, IterableDataset)
        self.dataset = dataset
        self.steps: int | None = None
        options: dict[str, Any] = {}
        if batch_sampler is not None:
            self.steps, options = batch_sampler.steps, {"batch_sampler": batch_sampler}
        elif not streams:
            size = len(dataset)  # type: ignore[arg-type]
            self.steps = math.ceil(math.ceil(size / shares) / batch_size)
            options = {"sampler": range(rank() % shares, size, shares)}
        # timm's readers share streams themselves, as evenly as their shards allow
        self.shared = (shares if not streams else world_size()) > 1
        workers = max(_workers(args), int(streams))
        if batch_sampler is None:
            options["batch_size"] = batch_size
        keep = workers > 0 and not streams
        self.loader = _loader(
            dataset, args, workers, collate, generator=torch.Generator(), persistent_workers=keep, **options
        )

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


def _loader(
    dataset: Dataset, args: argparse.Namespace, workers: int, collate: Collate | None, **options: Any
) -> DataLoader:
    return DataLoader(
        dataset,
        num_workers=workers,
        pin_memory=args.pin_mem and torch.cuda.is_available(),
        collate_fn=collate,
        worker_init_fn=ignore_stop_signals,
        **options,
    )
