"""From image to tensor: DeiT's and timm's transforms, 3-Augment, and mixup."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms import ResizeKeepRatio
from timm.layers import to_2tuple
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from loading import TrainBatches
from utils import UsageError
from utils.flags import number

_logger = logging.getLogger(__name__)

REPEATS = 3  # of repeated augmentation
SMALL_IMAGE = 32  # at and under this size images are cropped with padding instead of at random scale


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of augmentation and mixup."""
    group = parser.add_argument_group("augmentation")
    share = number(float, 0, 1)
    group.add_argument("--color-jitter", type=number(float, 0), default=0.3, help="jitter without --aa (default: 0.3)")
    group.add_argument(
        "--aa",
        default="rand-m9-mstd0.5-inc1",
        metavar="POLICY",
        help="timm auto-augment policy, or 'none' (default: %(default)s)",
    )
    group.add_argument("--train-interpolation", default="bicubic", choices=("random", "bilinear", "bicubic"))
    group.add_argument("--ThreeAugment", action="store_true", help="DeiT III's 3-Augment instead of --aa")
    group.add_argument(
        "--scale",
        type=number(float, 0, 1, above=True),
        nargs=2,
        default=(0.08, 1.0),
        metavar=("LOW", "HIGH"),
        help=f"share of the image that a random crop takes, above {SMALL_IMAGE} pixels (default: 0.08 1)",
    )
    group.add_argument("--src", action="store_true", help="simple random crop instead of a random resized crop")
    group.add_argument("--reprob", type=share, default=0.25, help="probability of random erasing (default: 0.25)")
    group.add_argument(
        "--remode", default="pixel", choices=("const", "rand", "pixel"), help="what erased pixels become"
    )
    group.add_argument("--recount", type=number(int, 1), default=1, help="at most so many erased boxes (default: 1)")
    group.add_argument("--eval-crop-ratio", type=number(float, 0, 1, above=True), default=0.875, help="default: 0.875")
    group.add_argument("--resplit", action="store_true", help="accepted for published commands; changes nothing")

    group = parser.add_argument_group("mixup")
    group.add_argument("--mixup", type=number(float, 0), default=0.8, help="mixup alpha, 0 is off (default: 0.8)")
    group.add_argument("--cutmix", type=number(float, 0), default=1.0, help="cutmix alpha, 0 is off (default: 1.0)")
    group.add_argument(
        "--cutmix-minmax", type=share, nargs=2, default=None, help="share of a side cut; overrides --cutmix"
    )
    group.add_argument("--mixup-prob", type=share, default=1.0, help="probability of mixing a batch (default: 1.0)")
    group.add_argument("--mixup-switch-prob", type=share, default=0.5, help="probability of cutmix over mixup")
    group.add_argument(
        "--mixup-mode", default="batch", choices=("batch", "pair", "elem"), help="what shares one mixture"
    )


def mixes(args: argparse.Namespace) -> bool:
    """Whether the flags switch mixup or cutmix on."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def train_batches(images: Dataset, args: argparse.Namespace) -> TrainBatches:
    """Training `images` in batches, repeated where the flags ask for it, and of even size where images are mixed."""
    repeats = REPEATS if args.repeated_aug else 1
    return TrainBatches(images, args, repeats=repeats, even=mixes(args), steps=args.steps_per_epoch)


def check(args: argparse.Namespace) -> None:
    """Refuse augmentation flags that contradict each other or name no policy."""
    if mixes(args) and args.batch_size % 2:
        raise UsageError(
            f"--batch-size is {args.batch_size} but mixup pairs images; wanted an even one, or --mixup 0 --cutmix 0."
        )
    if args.cutmix_minmax is not None and not args.cutmix_minmax[0] < args.cutmix_minmax[1]:
        raise UsageError(f"--cutmix-minmax is {args.cutmix_minmax}; wanted a lower share and a higher one.")
    if args.scale[0] > args.scale[1]:
        raise UsageError(f"--scale is {args.scale[0]:g} {args.scale[1]:g}; wanted a lower share and a higher one.")
    if args.resplit:
        _logger.warning("--resplit changes nothing: there are no augmentation splits to leave out of the erasing.")
    build_transform(True, args, size=SMALL_IMAGE + 1)


def build_transform(
    is_train: bool, args: argparse.Namespace, *, size: int | tuple[int, int] | None = None, flip: bool = True
) -> Callable[[Image.Image], Tensor]:
    """PIL image -> normalised float tensor (3, size, size), or of the height and width that `size` is.

    Training: timm's transforms at a random scale (or `--src`), or with padding 4 at or under 32 pixels; `flip` off
    leaves out mirroring, for images that have a side. Evaluation: the shorter side to size / --eval-crop-ratio,
    bicubic, centre crop. Images keep their shape: one of another shape is cropped.
    """
    size = args.input_size if size is None else size
    sides = to_2tuple(size)
    small = max(sides) <= SMALL_IMAGE
    if not is_train:
        ratio = 1.0 if small else args.eval_crop_ratio
        return transforms.Compose(
            [
                _cover([int(side / ratio) for side in sides]),
                transforms.CenterCrop(size),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
            ]
        )
    policy = None if args.aa in ("none", "None", "") else args.aa
    try:
        transform = create_transform(
            size,
            is_training=True,
            scale=tuple(args.scale),
            hflip=0.5 if flip else 0.0,
            color_jitter=args.color_jitter,
            auto_augment="3a" if args.ThreeAugment else policy,
            interpolation="bicubic" if args.ThreeAugment else args.train_interpolation,
            re_prob=0.0 if args.ThreeAugment else args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
        )
    except (AssertionError, KeyError, ValueError, IndexError) as error:
        raise UsageError(f"--aa is {args.aa!r}; wanted a timm policy such as rand-m9-mstd0.5-inc1, or none.") from error
    if small:
        crop = [_cover(sides), transforms.RandomCrop(size, padding=4)]
    elif args.src:
        crop = [_cover(sides), transforms.RandomCrop(size, padding=4, padding_mode="reflect")]
    else:
        return transform
    return transforms.Compose(crop + transform.transforms[1:])


def _cover(sides: Sequence[int]) -> Callable[[Image.Image], Image.Image]:
    """Resize, in shape, to the least that covers `sides`, (height, width)."""
    if sides[0] == sides[1]:
        return transforms.Resize(sides[0], InterpolationMode.BICUBIC)
    return ResizeKeepRatio(tuple(sides), interpolation="bicubic")


def build_mixup(args: argparse.Namespace, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """timm's mixup and cutmix: images (B, 3, H, W), classes (B,) -> mixed images, soft targets (B, num_classes); None
    if off."""
    if not mixes(args):
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def unnormalize(images: Tensor) -> Tensor:
    """Undo the normalisation of images (B, 3, H, W); values from 0 to 1."""
    mean = torch.tensor(IMAGENET_DEFAULT_MEAN, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_DEFAULT_STD, device=images.device).view(1, 3, 1, 1)
    return (images * std + mean).clamp(0, 1)
