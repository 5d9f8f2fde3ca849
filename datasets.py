"""Image classification sets, as DeiT's `build_dataset` knows them: folders, CIFAR, iNaturalist, timm's, digits."""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import json
import logging
import os
import pickle
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.layers import to_2tuple
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from utils import UsageError, first_line, nearest
from utils.flags import add_switch, number
from utils.processes import once_per_node

_logger = logging.getLogger(__name__)

Image.init()  # all of Pillow's readers, of which `FORMATS` are used
Image.MAX_IMAGE_PIXELS = None  # `load_image` counts them itself, and names the flag
MAX_PIXELS = 2 * 89_478_485  # what Pillow refuses by default
MOST_ASPECT = 100
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")
WHITES = (1.0, 255.0, 4095.0, 65535.0)
DATA_SETS = ("CIFAR", "CIFAR10", "IMNET", "INAT", "INAT19", "DIGITS", "IMNET_100")
INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of image classification sets."""
    group = parser.add_argument_group("image sets")
    group.add_argument("--inat-category", default="name", choices=INAT_CATEGORIES, help="what INAT's classes are")
    group.add_argument("--train-split", default="train", help="training split of a timm/ data set (default: train)")
    group.add_argument("--val-split", default="validation", help="its evaluation split (default: validation)")
    group.add_argument(
        "--num-classes", type=number(int, 1), default=None, help="classes of a timm/ set that does not say"
    )
    group.add_argument(
        "--label-share",
        type=number(float, 0, 1, above=True),
        default=1.0,
        metavar="SHARE",
        help="train on this share of each class, chosen by --seed (default: 1)",
    )
    group.add_argument(
        "--max-pixels", type=number(int, 1), default=MAX_PIXELS, metavar="N", help="of an image (default: %(default)s)"
    )
    add_switch(group, ["--exif"], ["--no-exif"], default=True, help="turn photographs as their EXIF orientation says")


def check(args: argparse.Namespace) -> None:
    """Refuse an unknown data set or a path that cannot hold it, before anything is read."""
    name, path = args.data_set, Path(args.data_path)
    if not name.startswith("timm/"):
        if name not in DATA_SETS:
            close = nearest(name.upper(), DATA_SETS)
            raise UsageError(f"--data-set {name!r} is unknown; wanted {', '.join(DATA_SETS)} or timm/NAME{close}.")
        if args.num_classes is not None:
            raise UsageError(f"--num-classes is for timm/ data sets; {name} says itself how many it has.")
    if name == "DIGITS" or (name.startswith("timm/") and not args.data_path):
        return
    if not args.data_path:
        raise UsageError(f"--data-path is missing; wanted the folder of {name}.")
    if name in ("CIFAR", "CIFAR10"):
        return
    if not path.exists():
        raise UsageError(f"--data-path {path} does not exist; wanted the folder of {name}.")
    if path.is_dir() and not any(path.iterdir()):
        raise UsageError(f"--data-path {path} is empty; wanted the folder of {name}.")


# ---------------------------------------------------------------------------------------------------------------------
# Images


def load_image(path: str, *, upright: bool = True, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image in file `path` as RGB.

    `upright` turns it as its EXIF orientation says. Greys of more than 8 bits, and floats, keep their range: full white
    is the least of 1 (floats), 255, 4,095 and 65,535 that is not below their highest value. Raises UsageError, naming
    the file, if it is unreadable, of a format that is none of `FORMATS`, has more than `max_pixels` or a side over
    `MOST_ASPECT` times the other, or holds values that are not finite or well below 0.
    """
    try:
        # an allow-list, since some of Pillow's readers start other programs
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ValueError(f"it has {width} x {height} pixels; --max-pixels {width * height} allows it")
            if max(width, height) > MOST_ASPECT * min(width, height):
                raise ValueError(f"it is {width} x {height}; wanted sides of at most {MOST_ASPECT} to 1")
            if upright:
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith(("I", "F")):
                return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise UsageError(
            f"Image {path} cannot be read: it is none of {', '.join(FORMATS)}, or of numbers that Pillow does not know."
        ) from error
    except Exception as error:  # Pillow's readers raise whatever a broken file makes them trip over
        raise UsageError(f"Image {path} cannot be read: {first_line(error)}.") from error


def image_loader(args: argparse.Namespace) -> Callable[[str], Image.Image]:
    """`load_image` as the flags want it."""
    return partial(load_image, upright=args.exif, max_pixels=args.max_pixels)


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    lowest, highest = float(values.min()), float(values.max())
    # a little is what filters leave; half of a range is not to be lost
    if lowest < -0.02 * max(highest, 0):
        raise ValueError(f"it holds values from {lowest:g} to {highest:g}; wanted black at 0")
    white = next((white for white in WHITES[values.dtype.kind != "f" :] if highest <= white), highest)
    return np.rint(values.astype(np.float32).clip(0) * (255 / white)).astype(np.uint8)


class ImageArrays(Dataset):
    """Images held in memory: `images` uint8 (N, H, W, 3) or grey (N, H, W), shown at `size`, a side or (height, width),
    if it is given."""

    def __init__(
        self,
        images: np.ndarray,
        targets: Sequence[int],
        transform: Callable[[Image.Image], Any],
        size: int | tuple[int, int] | None = None,
    ) -> None:
        self.images, self.targets, self.transform, self.size = images, list(targets), transform, size

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index]).convert("RGB")
        if self.size is not None:
            image = image.resize(to_2tuple(self.size)[::-1], Image.Resampling.BICUBIC)
        return self.transform(image), self.targets[index]


def class_names(folder: Path) -> list[str]:
    """The folders in `folder` that are not hidden, sorted; UsageError if there is none."""
    if not folder.is_dir():
        raise UsageError(f"--data-path {folder.parent} wants train and val, with a folder of images per class.")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UsageError(f"{folder} has no folder of images; wanted one per class.")
    return names


class ClassFolders(ImageFolder):
    """A folder of images per class; hidden folders and files are none, and what is no image is left out, with a count.

    `class_to_idx` gives the class numbers, so that a number means the same in training and evaluation; with `cut`,
    classes that are not among them are left out. Raises UsageError for a set without classes or images.
    """

    def __init__(
        self,
        root: Path,
        transform: Callable[..., Any],
        loader: Callable[[str], Image.Image],
        class_to_idx: dict[str, int],
        cut: bool = False,
    ) -> None:
        self._known, self._cut = class_to_idx, cut
        self._others = 0
        try:
            super().__init__(str(root), transform, loader=loader, is_valid_file=self._is_image)
        except FileNotFoundError as error:
            raise UsageError(f"{root} is no folder of classes: {first_line(error)}.") from error
        if self._others:
            _logger.warning("%s: %d files that are no images are left out.", root, self._others)

    def _is_image(self, path: str) -> bool:
        name = os.path.basename(path)
        if name.startswith("."):
            return False
        is_image = name.lower().endswith(IMG_EXTENSIONS)
        self._others += not is_image
        return is_image

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        names = class_names(Path(directory))
        unknown = sorted(set(names) - set(self._known))
        names = [name for name in names if name in self._known]
        if unknown and not self._cut:
            raise UsageError(f"{directory} has a class {unknown[0]!r} that the training set does not have.")
        return names, {name: self._known[name] for name in names}


class INatDataset(Dataset):
    """iNaturalist 2018 and 2019: `{train,val}{year}.json`, `categories.json` and the images under `root`.

    Classes are the values of `category`, numbered as they first come up in the training annotations. An image lies
    where its `file_name` says, or there without the level of its super-category.
    """

    def __init__(
        self,
        root: Path,
        is_train: bool,
        year: int,
        category: str,
        transform: Callable[..., Any],
        loader: Callable[[str], Image.Image] = load_image,
    ) -> None:
        self.transform, self.loader = transform, loader
        train = _read_json(root / f"train{year}.json")
        data = train if is_train else _read_json(root / f"val{year}.json")
        catalogue = root / "categories.json"
        listed = _read_json(catalogue) if catalogue.exists() else None
        try:
            entries = train.get("categories", []) if listed is None else listed
            categories = {entry.get("id", place): entry for place, entry in enumerate(entries)}
            self.class_to_idx: dict[str, int] = {}
            for annotation in train["annotations"]:
                value = categories[int(annotation["category_id"])][category]
                self.class_to_idx.setdefault(value, len(self.class_to_idx))
            category_of = {entry["image_id"]: int(entry["category_id"]) for entry in data["annotations"]}
            self.samples = [
                (str(Path(entry["file_name"])), self.class_to_idx[categories[category_of[entry["id"]]][category]])
                for entry in data["images"]
            ]
        except KeyError as error:
            raise UsageError(
                f"{root} is no iNaturalist {year} for --inat-category {category}: {error} is missing."
            ) from None
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UsageError(
                f"{root} is no iNaturalist {year}: its files hold something else ({first_line(error)})."
            ) from None
        self.root = root
        self.targets = [target for _, target in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        name, target = self.samples[index]
        path = self.root / name
        if not path.exists():
            parts = Path(name).parts
            path = self.root.joinpath(*parts[:1], *parts[2:])
        return self.transform(self.loader(str(path))), target


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {first_line(error)}.") from None


class _PickledDtype:
    """Stands for numpy's dtype in a CIFAR file: bytes or whole numbers, and nothing that holds pointers."""

    codes: ClassVar[dict[str, str]] = {"u1": "u1", "|u1": "u1", "i8": "<i8", "<i8": "<i8"}

    def __init__(self, code: Any, *args: Any) -> None:
        code = code.decode() if isinstance(code, bytes) else code
        if code not in self.codes:
            raise pickle.UnpicklingError(f"it holds an array of {code!r}")
        self.code = self.codes[code]

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", "|", b"<", b"|"):
            raise pickle.UnpicklingError("it holds an array of another byte order")


class _PickledArray:
    """Stands for numpy's array in a CIFAR file, and is made of the bytes that are there."""

    values: np.ndarray

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, raw = state
        raw = raw.encode("latin-1") if isinstance(raw, str) else raw
        self.values = np.frombuffer(raw, dtype.code).reshape(shape, order="F" if is_fortran else "C")


def _from_buffer(raw: Any, dtype: _PickledDtype, shape: tuple[int, ...], order: str) -> _PickledArray:
    array = _PickledArray()
    array.__setstate__((1, shape, dtype, order == "F", bytes(raw)))
    return array


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it wants the encoding {encoding!r}")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles what CIFAR's files hold, numpy arrays and plain values; no name in them is looked up or run."""

    known: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy", "ndarray"): _PickledArray,
        ("numpy", "dtype"): _PickledDtype,
        ("numpy.core.multiarray", "_reconstruct"): lambda *ignored: _PickledArray(),
        ("numpy._core.multiarray", "_reconstruct"): lambda *ignored: _PickledArray(),
        ("numpy.core.numeric", "_frombuffer"): _from_buffer,
        ("numpy._core.numeric", "_frombuffer"): _from_buffer,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.known:
            raise pickle.UnpicklingError(f"it wants {module}.{name}")
        return self.known[module, name]


def _cifar_arrays(folder: Path, files: Sequence[str], label: bytes) -> tuple[np.ndarray, list[int]]:
    images, targets = [], []
    for name in files:
        try:
            with open(folder / name, "rb") as file:
                entry = _ArrayUnpickler(file, encoding="bytes").load()
            data = entry[b"data"].values.astype(np.uint8, casting="safe")
            images.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            labels = entry[label]
            labels = labels.values.tolist() if isinstance(labels, _PickledArray) else labels
            targets += [int(target) for target in labels]
        except Exception as error:  # a broken pickle can raise nearly anything
            raise UsageError(f"{folder / name} is no CIFAR file: {error}.") from error
    return np.ascontiguousarray(np.concatenate(images)), targets


def _build_cifar(is_train: bool, args: argparse.Namespace, transform: Callable[..., Any]) -> tuple[Dataset, int]:
    source = CIFAR100 if args.data_set == "CIFAR" else CIFAR10
    label, classes = (b"fine_labels", 100) if args.data_set == "CIFAR" else (b"labels", 10)
    files = [name for name, _ in (source.train_list if is_train else source.test_list)]
    path = Path(args.data_path)
    folder = path if path.name == source.base_folder or (path / files[0]).is_file() else path / source.base_folder
    if not folder.is_dir():

        def download() -> None:
            _logger.info("%s is not there: downloading %s.", folder, source.url)
            try:
                source(folder.parent, download=True)
            except Exception as error:  # network, disk and archive errors alike
                raise UsageError(f"{folder} does not exist and {source.url} cannot be downloaded: {error}.") from error

        once_per_node(download)
    return ImageArrays(*_cifar_arrays(folder, files, label), transform), classes


def _build_digits(is_train: bool, args: argparse.Namespace, transform: Callable[..., Any]) -> tuple[Dataset, int]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    train, test = train_test_split(np.arange(len(images)), test_size=360, stratify=digits.target, random_state=0)
    chosen = train if is_train else test
    return ImageArrays(images[chosen], digits.target[chosen].tolist(), transform, args.input_size), 10


def _build_folder(is_train: bool, args: argparse.Namespace, transform: Callable[..., Any]) -> tuple[Dataset, int]:
    root, part = Path(args.data_path), "train" if is_train else "val"
    source = root / "train" if (root / "train").is_dir() or is_train else root / "val"
    most = 100 if args.data_set == "IMNET_100" else None
    names = class_names(source)[:most]
    classes = {name: number for number, name in enumerate(names)}
    return ClassFolders(root / part, transform, image_loader(args), classes, cut=most is not None), len(classes)


def _import_huggingface() -> None:
    """Give the name `datasets` to the Hugging Face package, which this file hides from timm's readers."""
    here = Path(__file__).resolve().parent
    paths = [path for path in sys.path if Path(path or ".").resolve() != here]
    spec = importlib.machinery.PathFinder.find_spec("datasets", paths)
    if spec is None or spec.loader is None:
        raise UsageError("--data-set timm/hfds/... wants the Hugging Face package; wanted pip install datasets.")
    own = sys.modules.get("datasets")
    if own is not None and getattr(own, "__file__", None) != spec.origin:
        del sys.modules["datasets"]
        module = importlib.util.module_from_spec(spec)
        sys.modules["datasets"] = module
        spec.loader.exec_module(module)


def _build_timm(is_train: bool, args: argparse.Namespace, transform: Callable[..., Any]) -> tuple[Dataset, int]:
    from timm.data import create_dataset

    name = args.data_set.removeprefix("timm/")
    if name.lower().startswith(("hfds/", "hfids/")):
        _import_huggingface()
    try:
        dataset = create_dataset(
            name,
            root=args.data_path or None,
            split=args.train_split if is_train else args.val_split,
            is_training=is_train,
            batch_size=args.batch_size,
            seed=args.seed,
        )
    except Exception as error:  # each of timm's readers has its own way to fail
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise UsageError(f"--data-set {args.data_set} cannot be opened: {reason}.") from error
    dataset.transform = transform
    known = getattr(dataset, "classes", None) or getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    if args.num_classes is None and not known:
        raise UsageError(f"--data-set {args.data_set} does not say how many classes it has; wanted --num-classes.")
    return dataset, args.num_classes or len(known)


def build_dataset(
    is_train: bool, args: argparse.Namespace, transform: Callable[[Image.Image], Any]
) -> tuple[Dataset, int]:
    """The training or evaluation set that the flags ask for, and its number of classes.

    Items are (what `transform` makes of the image, class number). Raises UsageError for data that are not there,
    broken, or labelled outside the classes.
    """
    name = args.data_set
    if name.startswith("timm/"):
        dataset, classes = _build_timm(is_train, args, transform)
    elif name in ("INAT", "INAT19"):
        year = 2018 if name == "INAT" else 2019
        dataset = INatDataset(Path(args.data_path), is_train, year, args.inat_category, transform, image_loader(args))
        classes = len(dataset.class_to_idx)
    else:
        build = {
            "CIFAR": _build_cifar,
            "CIFAR10": _build_cifar,
            "DIGITS": _build_digits,
            "IMNET": _build_folder,
            "IMNET_100": _build_folder,
        }[name]
        dataset, classes = build(is_train, args, transform)
    targets = getattr(dataset, "targets", None)
    if targets is not None:
        check_labels(torch.as_tensor(targets), classes, "training" if is_train else "evaluation")
    if is_train and args.label_share < 1:
        dataset = _share(dataset, targets, args)
    return dataset, classes


def _share(dataset: Dataset, targets: Sequence[int] | None, args: argparse.Namespace) -> Subset:
    """--label-share of every class, at least one image each."""
    if targets is None:
        raise UsageError(f"--label-share wants a data set that lists its labels; {args.data_set} does not.")
    targets, chosen = np.asarray(targets), []
    generator = np.random.default_rng(args.seed)
    for target in np.unique(targets):
        members = generator.permutation(np.flatnonzero(targets == target))
        chosen.append(members[: max(1, round(args.label_share * len(members)))])
    return Subset(dataset, np.sort(np.concatenate(chosen)).tolist())


def check_labels(targets: Tensor, num_classes: int, what: str) -> None:
    """Refuse class numbers outside 0 to `num_classes` - 1."""
    wrong = targets[(targets < 0) | (targets >= num_classes)]
    if len(wrong):
        raise UsageError(f"The {what} set has label {int(wrong[0])}; wanted 0 to {num_classes - 1}.")
