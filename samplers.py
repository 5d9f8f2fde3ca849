"""Which image comes when, and with which random state: the same for any number of workers, and after any resume."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import numpy as np
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Dataset, DistributedSampler, Sampler, get_worker_info

import utils


class SeededSampler(Sampler[tuple[int, int]]):
    """Yields (index, seed) pairs of one process's share of an epoch; see `SeededDataset`.

    The seed belongs to the place in the epoch over all processes, so that it does not matter how many processes and
    workers there are, nor whether the epoch was interrupted. `repeats` > 1 is DeiT's repeated augmentation (Hoffer et
    al., 2020): every image comes that often in a row, spread over the processes, in an epoch no longer than without.
    """

    def __init__(self, dataset: Sized, seed: int, rank: int, world_size: int, repeats: int = 1) -> None:
        self.seed, self.rank, self.world_size = seed, rank, world_size
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
        # RepeatAugSampler shuffles by the epoch alone; DistributedSampler adds the seed itself.
        self._base.set_epoch(epoch + (self.seed << 20) if isinstance(self._base, RepeatAugSampler) else epoch)

    def __len__(self) -> int:
        return len(self._base) - self.start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        count = len(self._base)
        seeds = np.random.default_rng([self.seed, self.epoch]).integers(2**32, size=count * self.world_size)
        own = seeds[self.rank :: self.world_size].tolist()
        for place, index in enumerate(self._base):
            if place >= self.start:
                yield int(index), own[place]


class SeededDataset(Dataset):
    """Loads an item with the random state that its sampler chose for it: `dataset[index, seed]`."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: tuple[int, int]) -> object:
        index, seed = key
        with utils.seeded(seed, restore=get_worker_info() is None):
            return self.dataset[index]
