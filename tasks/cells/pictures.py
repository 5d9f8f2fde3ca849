"""Pictures of cells: their channels side by side with what each is worth, and accuracy by number of channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from tasks.cells.data import CellsInfo
from tasks.cells.dataset import Item
from tasks.cells.subsets import SubsetResult, by_size
from utils.files import write_if_possible


def draw_channels(
    items: Sequence[Item],
    info: CellsInfo,
    accuracy: float | None,
    lost: Mapping[int, float],
    num_images: int,
    path: Path,
) -> None:
    """One sheet: a row for each of `items`, a column for each chosen channel in grey from its 1st to its 99th
    percentile, and under the columns the accuracy `lost` without the channel, in percentage points."""
    columns, rows = len(info.chosen), len(items)
    figure = Figure(figsize=(1.6 * columns + 1, 1.6 * rows + 1.8), layout="constrained", dpi=100)
    axes = figure.subplots(rows + 1, columns, squeeze=False, height_ratios=[1] * rows + [0.8])
    for row, item in zip(axes, items):
        planes = dict(zip(item.channels, item.image.numpy()))
        for place, (axis, channel) in enumerate(zip(row, info.chosen)):
            axis.set_xticks([])
            axis.set_yticks([])
            if channel in planes:
                low, high = np.percentile(planes[channel], (1, 99))
                axis.imshow(planes[channel], cmap="gray", vmin=low, vmax=max(high, low + 1e-6))
            else:
                axis.text(0.5, 0.5, "missing", ha="center", va="center", fontsize=8, transform=axis.transAxes)
            if place == 0:
                axis.set_ylabel(info.classes[item.label], fontsize=8)
    highest = max([1e-6, *(abs(value) for value in lost.values())])
    for axis, channel in zip(axes[-1], info.chosen):
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_xlabel(info.channels[channel], fontsize=9)
        value = lost.get(channel)
        if value is not None:
            axis.bar([0], [value], color="tab:blue" if value >= 0 else "tab:orange")
            axis.axhline(0, color="black", linewidth=0.5)
            axis.set_ylim(-1.2 * highest, 1.2 * highest)
            axis.set_title(f"{value:+.1f}", fontsize=8)
    told = (
        ""
        if accuracy is None
        else f"top-1 {accuracy:.1f} % on {num_images} images; bars: points lost without the channel"
    )
    figure.suptitle(told, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def draw_subsets(runs: Mapping[str, Sequence[SubsetResult]], path: Path) -> None:
    """Top-1 by number of channels: the mean over the subsets, and the range from the lowest to the highest, of every
    run by its name; a PNG. A file that cannot be written is told of."""
    figure = Figure(figsize=(5, 3.6), layout="constrained", dpi=120)
    axis = figure.subplots()
    for name, results in runs.items():
        sizes = by_size(results)
        accuracies = [[result.accuracy for result in group] for group in sizes.values()]
        (line,) = axis.plot(list(sizes), [sum(group) / len(group) for group in accuracies], marker="o", label=name)
        axis.fill_between(
            list(sizes), [*map(min, accuracies)], [*map(max, accuracies)], alpha=0.2, color=line.get_color()
        )
    axis.set_xlabel("channels")
    axis.set_xticks(sorted({len(result.channels) for results in runs.values() for result in results}))
    axis.set_ylabel("top-1, %")
    axis.legend()
    write_if_possible(path, lambda file: figure.savefig(file, format="png"))
