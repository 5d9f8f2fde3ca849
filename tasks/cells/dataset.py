"""Cells as a data set: reading, missing channels, statistics, and batches of one channel set."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from tasks.cells.images import in_range, read_header, read_image, read_plane
from tasks.cells.listing import Cell
from utils import UsageError

_logger = logging.getLogger(__name__)

_READERS = 8  # threads that read headers or images for a first look

ChannelSet = tuple[int, ...]


class Item(NamedTuple):
    """One cell: `image` (n, size, size) of stored values, float32; its class; which channels the n are; the number of
    its well, or -1."""

    image: Tensor
    label: int
    channels: ChannelSet
    well: int


class Batch(NamedTuple):
    """Cells of one channel set: images (B, n, size, size), labels (B,), channels (n,) and wells (B,), long."""

    images: Tensor
    labels: Tensor
    channels: Tensor
    wells: Tensor


def collate(items: Sequence[Item]) -> Batch:
    """Items of one channel set as a batch."""
    sets = {item.channels for item in items}
    if len(sets) > 1:
        raise ValueError(f"A batch has the channel sets {sorted(sets)}; wanted one, as ChannelSetSampler gives.")
    return Batch(
        torch.stack([item.image for item in items]),
        torch.tensor([item.label for item in items]),
        torch.tensor(items[0].channels),
        torch.tensor([item.well for item in items]),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Where images come from


class Source:
    """Images by number: `labels`, `wells` ('' where nobody says) and `channel_sets` of all of them, and `read`."""

    labels: list[int]
    wells: list[str]
    channel_sets: list[ChannelSet]

    def read(self, index: int) -> np.ndarray:
        """The present channels of one image, (n, rows, cols) float32, in the order of its channel set."""
        raise NotImplementedError


class ArraySource(Source):
    """Images held in memory, (N, channels, rows, cols) float32."""

    def __init__(self, images: np.ndarray, labels: Sequence[int]) -> None:
        self.images, self.labels = images, list(labels)
        self.wells = [""] * len(self.labels)
        self.channel_sets = [tuple(range(images.shape[1]))] * len(self.labels)

    def read(self, index: int) -> np.ndarray:
        return self.images[index]


class PlateSource(Source):
    """Cells of one file each that must all be of the `channels`, with stored values as they are: JUMP-CP."""

    def __init__(self, cells: Sequence[Cell], channels: int) -> None:
        self.cells, self.channels = list(cells), channels
        self.labels, self.wells = [cell.label for cell in cells], [cell.well for cell in cells]
        self.channel_sets = [tuple(range(channels))] * len(self.labels)

    def read(self, index: int) -> np.ndarray:
        path = self.cells[index].files[0]
        image = read_image(path).astype(np.float32)
        if len(image) != self.channels:
            raise UsageError(f"Image {path} has {len(image)} channels; wanted {self.channels}.")
        if not np.isfinite(image).all():
            raise UsageError(f"Image {path} has values that are not finite; wanted 0 to 255.")
        return image


class FileSource(Source):
    """Cells in files of any format; stored values are shares of their dtype's range.

    A channel is missing where it has no file, or is NaN throughout. `kinds`, one for each channel, says whether its
    numbers are whole or floating, as all must be: values of the two cannot be compared. Raises UsageError, naming the
    file, for what does not fit.
    """

    def __init__(self, cells: Sequence[Cell], channels: int, kinds: Sequence[str]) -> None:
        self.cells, self.channels, self.kinds = list(cells), channels, kinds
        self.labels, self.wells = [cell.label for cell in cells], [cell.well for cell in cells]
        with ThreadPoolExecutor(_READERS) as pool:
            self.channel_sets = list(pool.map(self._channel_set, self.cells))

    @classmethod
    def look(cls, cells: Sequence[Cell]) -> tuple[int, list[str]]:
        """The number of channels of a data set, and the kind of each, from the first files that have them."""
        first = cells[0].files
        if len(first) == 1:
            header = read_header(first[0])
            return header.channels, [_kind(header.dtype)] * header.channels
        examples = [next((each.files[at] for each in cells if each.files[at]), "") for at in range(len(first))]
        return len(first), [_kind(read_header(path).dtype) if path else "" for path in examples]

    def _channel_set(self, cell: Cell) -> ChannelSet:
        """Which channels of a cell are present; only floats have to be read for it."""
        present: list[int] = []
        for place, path in enumerate(cell.files):
            if not path:
                continue
            header = read_header(path)
            whole = len(cell.files) == 1
            if header.channels != (self.channels if whole else 1):
                wanted = f"{self.channels}, as the others have" if whole else "one, since each channel has its own file"
                raise UsageError(f"Image {path} has {header.channels} channels; wanted {wanted}.")
            if _kind(header.dtype) != self.kinds[place]:
                raise UsageError(
                    f"Image {path} holds {header.dtype}; wanted {self.kinds[place]} numbers, as the others hold."
                )
            channels = range(self.channels) if whole else (place,)
            if header.dtype.kind == "f":
                channels = [channel for channel, plane in zip(channels, read_image(path)) if not np.isnan(plane).all()]
            present += channels
        if not present:
            raise UsageError(f"Image {next(filter(None, cell.files))} has no channel that is not NaN throughout.")
        return tuple(present)

    def read(self, index: int) -> np.ndarray:
        files, channels = self.cells[index].files, self.channel_sets[index]
        if len(files) == 1:
            image = in_range(read_image(files[0])[list(channels)])
        else:
            planes = [in_range(read_plane(files[channel])) for channel in channels]
            odd = next((place for place, plane in enumerate(planes) if plane.shape != planes[0].shape), None)
            if odd is not None:
                raise UsageError(
                    f"Image {files[channels[odd]]} is {planes[odd].shape}; wanted {planes[0].shape}, as "
                    f"{files[channels[0]]} is."
                )
            image = np.stack(planes)
        if not np.isfinite(image).all():
            file = next(filter(None, files))
            raise UsageError(f"Image {file} has values that are not finite in a part of a channel.")
        return image


def _kind(dtype: np.dtype) -> str:
    return "floating" if dtype.kind == "f" else "whole"


class Cells(Dataset):
    """Items of a source, transformed, with the channels of `chosen` only (indices into all that the data know)."""

    def __init__(self, source: Source, transform: Callable[[Tensor], Tensor], chosen: Sequence[int]) -> None:
        self.source, self.transform = source, transform
        self.targets = source.labels
        self.wells = {well: number for number, well in enumerate(sorted(set(source.wells) - {""}))}
        self.channel_sets = [tuple(each for each in chosen if each in present) for present in source.channel_sets]
        if not all(self.channel_sets):
            number = self.channel_sets.index(())
            raise UsageError(f"--channels leaves image {number} of the set without any channel; wanted one or more.")

    def __len__(self) -> int:
        return len(self.targets)

    def stored(self, index: int) -> Tensor:
        """The chosen channels of an image before any transform, (n, rows, cols)."""
        present = self.source.channel_sets[index]
        image = self.source.read(index)
        wanted = self.channel_sets[index]
        return torch.from_numpy(image if wanted == present else image[[present.index(each) for each in wanted]])

    def __getitem__(self, index: int) -> Item:
        well = self.wells.get(self.source.wells[index], -1)
        return Item(self.transform(self.stored(index)), self.targets[index], self.channel_sets[index], well)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


@dataclass
class Statistics:
    """Mean and standard deviation of every channel's stored values."""

    mean: list[float]
    std: list[float]


@dataclass
class _Sums:
    """Pixels, their sum and their squares' sum by channel, in float64."""

    channels: int
    values: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.values = torch.zeros(3, self.channels, dtype=torch.float64)

    def add(self, image: Tensor, channels: ChannelSet) -> None:
        image = image.flatten(1).double()
        index = torch.tensor(channels)
        parts = torch.full((len(channels),), image.shape[1]), image.sum(1), image.square().sum(1)
        for row, part in zip(self.values, parts):
            row.index_add_(0, index, part.double())


def measure(
    cells: Cells, channels: int, share: tuple[int, int] = (0, 1), add_up: Callable[[list], list] = list
) -> Statistics:
    """The statistics of all images, each pixel counted once.

    `share` (rank, processes) is the part of them that this process reads, `add_up` sums over the processes. A channel
    that no image has gets mean 0 and deviation 1.
    """
    sums = _Sums(channels)
    indices = range(share[0], len(cells), share[1])
    with ThreadPoolExecutor(_READERS) as pool:
        # a few at a time, so that images that are read do not pile up
        for start in range(0, len(indices), 4 * _READERS):
            part = indices[start : start + 4 * _READERS]
            for index, image in zip(part, pool.map(cells.stored, part)):
                sums.add(image, cells.channel_sets[index])
    pixels, total, squares = torch.tensor(add_up(sums.values.flatten().tolist()), dtype=torch.float64).view(3, -1)
    mean = total / pixels.clamp(min=1)
    variance = (squares / pixels.clamp(min=1) - mean.square()).clamp(min=0)
    std = torch.where(pixels > 0, variance.sqrt(), 1.0)
    return Statistics(mean.tolist(), std.tolist())


# ---------------------------------------------------------------------------------------------------------------------
# Batches


class ChannelSetSampler(Sampler[list[Any]]):
    """Batches of one channel set each, the same steps in every process.

    In training (`shuffle`) images are shuffled by seed and epoch, and each comes with the seed of its place in the
    epoch, as (index, seed); batches of all sets are shuffled among each other. With `steps` an epoch is so many batches
    of an endless row of passes. The last, partial batch of a set is left
    out, but for sets with fewer images than a batch, which make one batch of as many as all processes can share. In
    evaluation every image comes once, in the order of the sets, and processes may get a batch more or less.
    """

    def __init__(
        self,
        channel_sets: Sequence[ChannelSet],
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = False,
        steps: int | None = None,
    ) -> None:
        self.batch_size, self.seed, self.rank, self.world_size, self.shuffle = (
            batch_size,
            seed,
            rank,
            world_size,
            shuffle,
        )
        self.members: dict[ChannelSet, list[int]] = {}
        for index, channels in enumerate(channel_sets):
            self.members.setdefault(channels, []).append(index)
        self.epoch = self.start = 0
        rare = [channels for channels, members in self.members.items() if len(members) < world_size]
        if shuffle and rare:
            _logger.warning("%d channel sets have fewer images than there are processes, and are left out.", len(rare))
        count = len(self._bounds())
        if shuffle and not count:
            raise UsageError(
                f"No channel set has an image for each of the {world_size} processes; wanted fewer of them."
            )
        self.steps = steps or (count if shuffle else math.ceil(count / world_size))

    def _bounds(self) -> list[tuple[ChannelSet, int, int]]:
        """Every batch (of all processes together, in training) as a channel set and its first and last image's
        place."""
        size = self.batch_size * (self.world_size if self.shuffle else 1)
        bounds = []
        for channels, members in self.members.items():
            count = len(members)
            if self.shuffle and count < size:
                count -= count % self.world_size
                bounds += [(channels, 0, count)] if count else []
                continue
            stops = range(size, count + 1, size) if self.shuffle else range(size, count + size, size)
            bounds += [(channels, stop - size, min(stop, count)) for stop in stops]
        return bounds

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Make the next pass that of `epoch`, without its first `start` batches."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.steps - self.start if self.shuffle else len(self._bounds()[self.rank :: self.world_size])

    def __iter__(self) -> Iterator[list[Any]]:
        if not self.shuffle:
            for channels, first, last in self._bounds()[self.rank :: self.world_size]:
                yield self.members[channels][first:last]
            return
        number, skipped = divmod(self.epoch * self.steps + self.start, len(self._bounds()))
        batches = itertools.chain.from_iterable(map(self._pass, itertools.count(number)))
        yield from itertools.islice(batches, skipped, skipped + len(self))

    def _pass(self, number: int) -> Iterator[list[tuple[int, int]]]:
        """This process's share of every batch of pass `number` through the whole set."""
        generator, bounds = np.random.default_rng([self.seed, number]), self._bounds()
        orders = {channels: generator.permutation(members) for channels, members in self.members.items()}
        own = slice(self.rank, None, self.world_size)
        for place in generator.permutation(len(bounds)):
            channels, first, last = bounds[place]
            seeds = generator.integers(2**32, size=last - first)
            yield [(int(index), int(seed)) for index, seed in zip(orders[channels][first:last][own], seeds[own])]
