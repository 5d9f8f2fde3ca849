"""Images without labels, each with the seed of its mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from utils import UsageError


class SeededImages(Dataset):
    """The images (C, H, W) of `dataset`, each with a seed for its mask.

    In training it is drawn with the random state that the loader gives the item, so that masks are the same for any
    number of processes and workers and after any resume; in evaluation it is the item's number, so that every
    evaluation hides the same patches.
    """

    def __init__(self, dataset: Dataset, train: bool) -> None:
        if isinstance(dataset, IterableDataset):
            raise UsageError("Masks go by an image's number, which a stream does not have; wanted another --data-set.")
        self.dataset, self.train = dataset, train

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.dataset[index][0]
        return image, int(torch.randint(2**31, ())) if self.train else index


def noise_from(seeds: Tensor, num_patches: int) -> Tensor:
    """Uniform noise (B, `num_patches`), a row for each of `seeds` (B,)."""
    generator = torch.Generator()
    return torch.stack([torch.rand(num_patches, generator=generator.manual_seed(seed)) for seed in seeds.tolist()])
