"""All methods by name, and what is asked of all of them: flags, keywords, conflicts.

A method from outside takes part in all of it once it is registered, before a model is built or flags are read:

    @register
    class Mine(SiteMethod): ...
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from fusion.method import Meter, SiteMethod, methods_of

# Outermost first: what the last one does, it does closest to the site.
BESIDE = "OUTPUT_DIR/pictures"  # what --visualize alone stands for
METHODS: dict[str, type[SiteMethod]] = {}

_Method = TypeVar("_Method", bound=type[SiteMethod])


def register(method: _Method) -> _Method:
    """Add a method, innermost. Raises ValueError for a name or keyword that another one has."""
    if not method.name.isidentifier() or hasattr(Mapping, method.name):
        raise ValueError(f"A method is named {method.name!r}; wanted a plain identifier.")
    for other in METHODS.values():
        shared = {*other.keywords()} & {*method.keywords()} | {other.name} & {method.name}
        if shared:
            raise ValueError(f"Method {other.name!r} has {', '.join(sorted(shared))} already; wanted another name.")
    METHODS[method.name] = method
    return method


def unregister(name: str) -> None:
    """Take a method out again."""
    del METHODS[name]


class Methods(Mapping[str, Any]):
    """Every method's settings by name, None where it is off; also as attributes: `methods.merging`."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        vars(self).update(settings)

    @classmethod
    def from_keywords(cls, **keywords: Any) -> Methods:
        """Read the model keywords of all methods. Raises TypeError for a keyword of none of them, ValueError (one
        sentence) for a value that is wrong or methods that make no sense together."""
        unknown = sorted(set(keywords) - set(method_keywords()))
        if unknown:
            raise TypeError(f"No method knows {', '.join(unknown)}; wanted a method's keywords.")
        methods = cls({name: method.read_keywords(keywords) for name, method in METHODS.items()})
        for name, settings in methods.items():
            reason = None if settings is None else METHODS[name].conflicts(settings, methods)
            if reason is not None:
                raise ValueError(reason)
        return methods

    def __getitem__(self, name: str) -> Any:
        return vars(self)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(vars(self))

    def __len__(self) -> int:
        return len(vars(self))

    def __repr__(self) -> str:
        on = ", ".join(f"{name}={settings!r}" for name, settings in self.items() if settings is not None)
        return f"Methods({on})"


def method_keywords() -> tuple[str, ...]:
    """The model keywords of all methods."""
    return tuple(keyword for method in METHODS.values() for keyword in method.keywords())


def build_site_methods(methods: Methods) -> list[SiteMethod]:
    """The methods that are on, outermost first."""
    return [METHODS[name](settings) for name, settings in methods.items() if settings is not None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of all methods, each method's in a group."""
    for method in METHODS.values():
        method.add_arguments(parser.add_argument_group(method.title))
    group = parser.add_argument_group("pictures of the sites")
    group.add_argument(
        "--visualize",
        nargs="?",
        const=BESIDE,
        default="",
        metavar="DIR",
        help="save pictures of the first test images, after --eval or training (without DIR: in OUTPUT_DIR/pictures)",
    )


def check(args: argparse.Namespace, typed: set[str]) -> None:
    """Refuse flags of methods that cannot be, and a place for pictures that cannot hold them, with a ValueError (one
    sentence); say once what is accepted and changes nothing."""
    for method in METHODS.values():
        method.check_flags(args, typed)
    if args.visualize == BESIDE:
        if not getattr(args, "output_dir", ""):
            raise ValueError("--visualize without a folder wants --output_dir, where the pictures go.")
        args.visualize = str(Path(args.output_dir, "pictures"))
    if args.visualize and Path(args.visualize).exists() and not Path(args.visualize).is_dir():
        raise ValueError(f"--visualize {args.visualize} is a file; wanted a folder.")


def model_keywords(args: argparse.Namespace, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The method keywords that `args` ask for, on a registry entry with the keywords `defaults`.

    Only switched-on methods leave keywords, so a model that knows none of them can be built from the result. Raises
    ValueError (one sentence) for flags that contradict each other or the entry.
    """
    keywords: dict[str, Any] = {}
    for method in METHODS.values():
        keywords |= method.model_keywords(args, defaults)
    # contradictions show here, before a model or data set is touched
    known = method_keywords()
    Methods.from_keywords(**{name: value for name, value in {**defaults, **keywords}.items() if name in known})
    return keywords


def describe(model: nn.Module) -> None:
    """Log once, when a program starts, what the methods that are on will do."""
    for method in methods_of(model):
        method.describe()


def accept(
    model: nn.Module, args: argparse.Namespace, weights: Mapping[str, Tensor], saved: Mapping[str, Any], path: str
) -> None:
    """Let the methods that are on in `model` see the `weights` and flags of the file `path` that it starts from
    (`SiteMethod.accept`)."""
    for module in list(model.modules()):
        for method in getattr(module, "site_methods", []):
            settings = method.accept(args, weights, saved, path)
            if settings is not None:
                method.settings = settings
                module.methods = Methods({**module.methods, method.name: settings})


def meters_of(model: nn.Module) -> list[Meter]:
    """A new meter of every method that is on and has one."""
    meters = (method.meter() for method in methods_of(model))
    return [meter for meter in meters if meter is not None]


def draw(
    model: nn.Module,
    images: Tensor,
    directory: str | Path,
    meters: Sequence[Meter] = (),
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> None:
    """Write pictures of `images` (N, C, H, W), normalised by `mean` and `std`: what every site of `model` (a
    `VisionMamba`) makes of them, and what each method adds; `meters` are those of an evaluation of the same model."""
    from fusion.visualize import visualize_merging  # drawing is rare, and its imports are slow

    visualize_merging(model, images, directory, mean, std)
    for method in methods_of(model):
        meter = next((meter for meter in meters if meter.method is method), None)
        method.draw(model, images, Path(directory), meter, mean, std)
