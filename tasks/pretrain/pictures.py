"""What a masked autoencoder saw of an image, and what it made of the rest."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

from models_mae import MaskedAutoencoder
from tasks.augmentation import unnormalize

SIDE = 224  # least side of an image in the grid, in pixels
HIDDEN = 0.5  # the grey of a hidden patch


@torch.no_grad()
def draw_grid(model: MaskedAutoencoder, images: Tensor, noise: Tensor, mask_ratio: float, file: Path) -> None:
    """Write a grid with a row for each of `images` (N, 3, H, W), normalised: the image, its visible patches, and these
    with the hidden ones as `model` rebuilds them. Patches that the model normalises get their own mean and deviation
    back. The model is run in eval mode and left in the mode it was in."""
    training = model.training
    model.eval()
    try:
        _, pred, mask = model(images, mask_ratio, noise)
    finally:
        model.train(training)
    rebuilt = model.rebuild(images, pred, mask)
    hidden = model.unpatchify(mask.unsqueeze(-1).expand_as(pred)).bool()
    shown, rebuilt = unnormalize(images.float()), unnormalize(rebuilt)
    rows = torch.stack([shown, shown.masked_fill(hidden, HIDDEN), rebuilt], 1).flatten(0, 1).cpu()
    scale = -(-SIDE // min(images.shape[-2:]))
    rows = rows.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_image(make_grid(rows, nrow=3, padding=8, pad_value=1.0), file)
