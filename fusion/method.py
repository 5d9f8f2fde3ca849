"""What a method is: settings that give its keywords and flags, something that acts at the sites, and its training side.

A method that is on is an instance of a subclass of `SiteMethod`, made of its settings. It wraps every site, and the
program calls its other hooks at their time; nothing else needs to know its name. `fusion.registry` holds them all.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from mamba_ssm.ops.merging import Merging
from torch import Tensor, nn

from fusion.token_state import TokenState

_UNSET: Any = object()


def option(
    default: Any,
    help: str = "",
    *,
    flag: str = "",
    aliases: Sequence[str] = (),
    flag_default: Any = _UNSET,
    keyword: str = "",
    choices: Sequence[Any] = (),
    **argument: Any,
) -> Any:
    """A field of a `Settings` class: its default and, in the same place, its model keyword and its flag.

    `keyword` is the field's own name unless given. Without `flag` there is none; with one, which `aliases` may stand
    for, `help` and `argument` (type, nargs, metavar, action) go to argparse. `flag_default` is the flag's default where
    it differs from the field's: None for a flag that leaves the choice to the model's registry entry unless it is
    typed. `choices` are all valid values; the flag offers these.
    """
    about = dict(flag=flag, aliases=tuple(aliases), flag_default=flag_default, keyword=keyword, choices=tuple(choices))
    about |= dict(help=help, argument=argument)
    return dataclasses.field(default=default, metadata=about)


def one_of(what: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise ValueError (one sentence) unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{what} is {value!r}; wanted one of {', '.join(map(str, allowed))}.")


@dataclass(frozen=True)
class Settings:
    """One frozen value that says all of a method, or of its training; every field is an `option`.

    Building one checks it: ValueError, one sentence, for what makes no sense. Subclasses that check more call
    `super().__post_init__()` first.
    """

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            if each.metadata["choices"]:
                one_of(keyword_of(each), getattr(self, each.name), each.metadata["choices"])

    @classmethod
    def add_arguments(
        cls, group: argparse._ActionsContainer, more_choices: Mapping[str, Sequence[Any]] | None = None
    ) -> None:
        """Add the flags of all fields; `more_choices`: values, by keyword, that a flag takes and a field does not."""
        for each in dataclasses.fields(cls):
            about = each.metadata
            if not about["flag"]:
                continue
            default = each.default if about["flag_default"] is _UNSET else about["flag_default"]
            argument = {"default": default, "help": about["help"], **about["argument"]}
            if about["choices"]:
                more = (more_choices or {}).get(keyword_of(each), ())
                more = [value for value in more if value not in about["choices"]]
                argument.setdefault("choices", (*more, *about["choices"]))
            group.add_argument(about["flag"], *about["aliases"], **argument)

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> dict[str, Any]:
        """What the flags say, by keyword; flags left to the registry entry are not in it."""
        given = {}
        for each in dataclasses.fields(cls):
            flag = each.metadata["flag"]
            value = getattr(args, flag.lstrip("-").replace("-", "_"), None) if flag else None
            if value is not None:
                given[keyword_of(each)] = tuple(value) if isinstance(value, list) else value
        return given


def keyword_of(field: dataclasses.Field) -> str:
    """The model keyword of a field of a `Settings` class."""
    return field.metadata["keyword"] or field.name


class Meter:
    """Sums up what one method decides while it is active: `with meter: model(images)`.

    `sums` (float64) may be added to another meter's of the same method, over processes for instance. They lie where
    the model runs once it has run, so that none of its passes waits for them.
    """

    def __init__(self, method: SiteMethod, size: int) -> None:
        self.method = method
        self.sums = torch.zeros(size, dtype=torch.float64)

    def __enter__(self) -> Meter:
        self.method.meters = (*self.method.meters, self)
        return self

    def __exit__(self, *error: object) -> None:
        self.method.meters = tuple(meter for meter in self.method.meters if meter is not self)

    def with_sums(self, sums: Tensor) -> Meter:
        """This meter with other sums."""
        other = copy.copy(self)
        other.sums = sums
        return other

    def update(self, state: TokenState) -> None:
        """Add what `state`, the sequence behind the last site, says was decided on the way."""
        raise NotImplementedError

    def shares(self) -> dict[str, float]:
        """What was summed up, by name, for a log; nothing where nothing was seen."""
        raise NotImplementedError


class SitePlan(NamedTuple):
    """What is done at a site: `mixer_args` are handed to its mixers, and tokens become one behind it as `merging` says,
    if it is not None."""

    mixer_args: Mapping[str, Any] = MappingProxyType({})
    merging: Merging | None = None


class SiteMethod:
    """A method that acts at the sites of a model; the identity unless a subclass says otherwise.

    Class side: `name` is its name in `model.methods`; `title` heads its flags; `Settings` gives its keywords and flags,
    `Training` flags that only training needs; `switch` is the keyword that switches it on, and `off` the value that
    does not. Class methods are asked for every method, the hooks of instances for those that are on.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    Settings: ClassVar[type[Settings]]
    Training: ClassVar[type[Settings] | None] = None
    switch: ClassVar[str]
    off: ClassVar[Any] = False
    teacher_title: ClassVar[str] = "Teacher"  # of a line with the figures of what it learns from

    meters: tuple[Meter, ...] = ()  # the active ones
    added: frozenset[str] = frozenset()  # names in the state dict that `attach` brought, written down by the model

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "__call__" in cls.__dict__ and "plan" not in cls.__dict__:
            cls.plan = lambda self, index, state: None  # what it does is not known, so that it is called

    # --- class side: flags and keywords ---

    @classmethod
    def keywords(cls) -> tuple[str, ...]:
        """All model keywords of this method."""
        own = tuple(keyword_of(each) for each in dataclasses.fields(cls.Settings))
        return own if cls.switch in own else (cls.switch, *own)

    @classmethod
    def read_keywords(cls, given: Mapping[str, Any]) -> Any:
        """The settings that model keywords ask for; None if the method is off, its keywords checked all the same."""
        is_on = given.get(cls.switch, cls.off) != cls.off
        names = {keyword_of(each): each.name for each in dataclasses.fields(cls.Settings)}
        values = {
            names[keyword]: tuple(value) if isinstance(value, list) else value
            for keyword, value in given.items()
            if keyword in names and (is_on or keyword != cls.switch)
        }
        settings = cls.Settings(**values)
        return settings if is_on else None

    @classmethod
    def add_arguments(cls, group: argparse._ActionsContainer) -> None:
        """Add the method's flags to its group of the parser."""
        cls.Settings.add_arguments(group, {cls.switch: (cls.off,)})
        if cls.Training is not None:
            cls.Training.add_arguments(group)

    @classmethod
    def model_keywords(cls, args: argparse.Namespace, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """The model keywords that the flags ask for, none if the method is off; `defaults` are those of the registry
        entry. Raises ValueError (one sentence) for flags that contradict each other."""
        given = cls.Settings.from_arguments(args)
        return given if cls.is_on(given, defaults) else {}

    @classmethod
    def is_on(cls, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
        """Whether the keywords `given`, before the registry entry's `defaults`, switch the method on."""
        return given.get(cls.switch, defaults.get(cls.switch, cls.off)) != cls.off

    @classmethod
    def check_flags(cls, args: argparse.Namespace, typed: set[str]) -> None:
        """At the start, on or off: say what is accepted and changes nothing; ValueError for flags that cannot be.
        `typed` holds the names of the flags that were typed."""
        if cls.Training is not None:
            cls.Training(**cls.Training.from_arguments(args))

    @classmethod
    def conflicts(cls, settings: Any, others: Mapping[str, Any]) -> str | None:
        """One sentence that says why `settings` make no sense with `others`, all methods' settings by name (None where
        off); None if they do."""
        return None

    # --- the model's side ---

    def attach(self, model: nn.Module) -> None:
        """Once, when the model is built: learn its sizes, and add the parameters that the method owns. Raises
        ValueError for a model that it does not fit."""

    def resize(self, model: nn.Module) -> None:
        """Learn the sizes of `model` again, whose image size has changed."""

    def __call__(self, index: int, state: TokenState, run: Callable[..., TokenState]) -> TokenState:
        """Wrap site `index`: `run(state, **mixer_args)` runs it, handing `mixer_args` to its mixers."""
        return run(state)

    def plan(self, index: int, state: TokenState) -> SitePlan | None:
        """All that this does at site `index` with a sequence like `state`: then sites may be run together, and this is
        not called. None if it is more than a plan can say."""
        return SitePlan()

    def finish(self, state: TokenState) -> None:
        """See the sequence behind the last site; active meters do."""
        for meter in self.meters:
            meter.update(state)

    def output(self, output: Any, state: TokenState, tokens: Tensor) -> Any:
        """What the model returns in training in place of `output`, its logits unless another method has replaced them;
        `tokens` are those of `forward_features`."""
        return output

    # --- the program's side ---

    @property
    def needs_teacher(self) -> bool:
        """Whether training starts from, and compares with, a trained model in which this method is off."""
        return False

    def added_parameters(self) -> set[str]:
        """The names in the model's state dict that weights trained without this method lack."""
        return set(self.added)

    def check(self, args: argparse.Namespace, typed: set[str]) -> None:
        """At the start, the model built without memory: ValueError (one sentence) for flags that do not fit."""

    def accept(
        self, args: argparse.Namespace, weights: Mapping[str, Tensor], saved: Mapping[str, Any], path: str
    ) -> Any:
        """See what the model starts from: the `weights` of file `path`, and the flags `saved` with them. Returns the
        settings that follow from them, None where they stay; ValueError (one sentence) for what contradicts them."""

    def describe(self) -> None:
        """Log once, when a program starts, what the method will do."""

    def criterion(self, base: nn.Module, teacher: nn.Module | None, args: argparse.Namespace) -> nn.Module:
        """The criterion of training, `(samples, outputs, targets) -> loss`, around the task's own, `base`."""
        return base

    def begin_epoch(self, epoch: int, epochs: int, args: argparse.Namespace) -> None:
        """Before `epoch` of `epochs`, counted from 0."""

    def varies(self, training: bool) -> str:
        """What differs from one pass of the model to the next beside numbers on the device (shapes, what the host draws
        or reads back), so that a CUDA graph cannot be replayed for another batch; "" if nothing does."""
        return ""

    def meter(self) -> Meter | None:
        """A new meter of what the method decides; None if it decides nothing."""
        return None

    def report(self, meter: Meter) -> list[str]:
        """What `meter` saw, in lines for a reader."""
        return []

    def draw(
        self,
        model: nn.Module,
        images: Tensor,
        directory: Path,
        meter: Meter | None,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        """Write pictures of what the method does to `images` (N, C, H, W), normalised by `mean` and `std`."""


def methods_of(model: nn.Module) -> list[SiteMethod]:
    """The methods that are on in `model` or in a model inside it, outermost first."""
    found: Iterable[list[SiteMethod]] = (getattr(module, "site_methods", []) for module in model.modules())
    return [method for methods in found for method in methods]


def added_parameters(model: nn.Module) -> set[str]:
    """The names in the state dict of `model` that weights trained without the methods in it lack."""
    return {
        f"{place}.{name}" if place else name
        for place, module in model.named_modules()
        for method in getattr(module, "site_methods", ())
        for name in method.added_parameters()
    }


def varies(model: nn.Module, training: bool) -> str:
    """What `model`, a part of it or one of its methods says that differs from pass to pass (`SiteMethod.varies`; a
    module may have one too); "" if nothing does."""
    parts = [*methods_of(model), *(module for module in model.modules() if hasattr(module, "varies"))]
    return next((reason for part in parts if (reason := part.varies(training))), "")


def plans_of(methods: Sequence[SiteMethod], sites: Iterable[int], state: TokenState) -> list[SitePlan]:
    """All that `methods` do at each of `sites`, the first with a sequence like `state`, up to one at which a method
    does more than it can plan. Nothing while a graph is made, which has what is called."""
    found: list[SitePlan] = []
    for index in sites if not torch.compiler.is_compiling() else ():
        parts = [method.plan(index, state) for method in methods]
        mergings = [part.merging for part in parts if part is not None and part.merging is not None]
        if None in parts or len(mergings) > 1:
            break
        mixer_args = {name: value for part in parts for name, value in part.mixer_args.items()}
        found.append(SitePlan(mixer_args, *mergings))
        for merging in mergings:
            # only their length is looked at
            left = (None if each is None else each[:, merging.fused :] for each in (state.hidden, state.residual))
            state = state.merged(*left, merging.moved)
    return found
