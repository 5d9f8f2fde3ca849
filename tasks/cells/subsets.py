"""How well a model does on every subset of its channels."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tasks.cells.dataset import Batch, ChannelSet
from utils.files import write_if_possible

# images (B, n, H, W), normalised, of the given channels -> logits (B, classes)
Predict = Callable[[Tensor, ChannelSet], Tensor]


@dataclass
class SubsetResult:
    """Of one subset of the channels: how many of the images that have them all are told right."""

    channels: ChannelSet
    right: int = 0
    count: int = 0

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * self.right / max(self.count, 1)


def subsets_of(channels: Sequence[int]) -> list[ChannelSet]:
    """All subsets but the empty one, the smallest first."""
    return [chosen for size in range(1, len(channels) + 1) for chosen in itertools.combinations(channels, size)]


def evaluate_subsets(
    predict: Predict, batches: Iterable[tuple[Batch, Tensor]], subsets: Sequence[ChannelSet]
) -> list[SubsetResult]:
    """The accuracy on each of `subsets`; `batches` gives each batch with its normalised images, once.

    Images that lack a channel of a subset do not count for it; a subset that no image has is left out.
    """
    results = [SubsetResult(subset) for subset in subsets]
    for batch, images in batches:
        present = batch.channels.tolist()
        labels = batch.labels.to(images.device)
        for result in results:
            if set(result.channels) <= set(present):
                places = [present.index(channel) for channel in result.channels]
                answers = predict(images[:, places], result.channels).argmax(1)
                result.right += int((answers == labels).sum())
                result.count += len(labels)
    return [result for result in results if result.count]


def by_size(results: Iterable[SubsetResult]) -> dict[int, list[SubsetResult]]:
    """Results by their number of channels."""
    sizes: dict[int, list[SubsetResult]] = {}
    for result in results:
        sizes.setdefault(len(result.channels), []).append(result)
    return sizes


def table(results: Sequence[SubsetResult], names: Sequence[str]) -> list[str]:
    """Lines for a reader: mean, lowest and highest top-1 by number of channels, and which channels those are."""
    lines = ["Channels  Subsets  Mean    Lowest  Highest"]
    for size, group in by_size(results).items():
        accuracies = [result.accuracy for result in group]
        low, high = (pick(group, key=lambda result: result.accuracy) for pick in (min, max))
        mean = sum(accuracies) / len(group)
        told = f"{size:8d}  {len(group):7d}  {mean:6.2f}  {low.accuracy:6.2f}  {high.accuracy:7.2f}"
        if low is not high:
            low_names, high_names = (" ".join(names[each] for each in result.channels) for result in (low, high))
            told += f"  ({low_names}; {high_names})"
        lines.append(told)
    return lines


def write_csv(results: Sequence[SubsetResult], names: Sequence[str], path: Path) -> None:
    """Every subset as a row: its size, its channels, images, top-1 in percent. A file that cannot be written is told
    of."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(("size", "channels", "images", "acc1"))
    for result in results:
        channels = " ".join(names[channel] for channel in result.channels)
        writer.writerow((len(result.channels), channels, result.count, f"{result.accuracy:.4f}"))
    write_if_possible(path, lambda file: file.write(text.getvalue().encode()))
