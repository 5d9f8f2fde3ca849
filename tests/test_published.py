"""The releases' command lines, and the table of their experiments, held to what this program and its scripts do.

`published_commands.txt` says of every command what it means here, or why it is refused and what to type instead;
`docs/experiments.md` says which script runs which published experiment, with which settings.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import main as program
from benchmarks.program import ROOT
from tests.test_scripts import EXPERIMENTS, program_flags, run_script
from utils import UsageError

COMMANDS = Path(__file__).with_name("published_commands.txt")
EXPERIMENTS_PAGE = ROOT / "docs" / "experiments.md"


class Published(NamedTuple):
    """A command line of a release: where it stands, its words, and what the file says of it by `means`, `refused`,
    `ours`."""

    title: str
    words: list[str]
    said: dict[str, str]


def published() -> list[Published]:
    """What the file of commands holds."""
    found = []
    for block in re.split(r"\n\s*\n", COMMANDS.read_text(encoding="utf-8"))[1:]:
        title, command, *rest = block.strip().splitlines()
        said = dict(line.split(" ", 1) for line in rest)
        found.append(Published(title.lstrip("# "), shlex.split(command), said))
    return found


PUBLISHED = published()


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What stands for the paths of the commands."""
    root = tmp_path_factory.mktemp("published")
    for part in ("train", "val"):
        (root / "data" / part / "n00000000").mkdir(parents=True)
    torch.save({"model": {}}, root / "weights.pth")
    return {"DATA": str(root / "data"), "OUTPUT": str(root / "output"), "WEIGHTS": str(root / "weights.pth")}


def filled(text: str, places: dict[str, str]) -> str:
    """`text` with paths in it that are there."""
    for name, place in places.items():
        text = re.sub(rf"\b{name}\b", place, text)
    return text


def as_text(value: Any) -> str:
    return "" if value is None else str(value)


@pytest.mark.parametrize("each", [each for each in PUBLISHED if "means" in each.said], ids=lambda each: each.title)
def test_a_published_command_means_what_it_meant(each: Published, places: dict[str, str]) -> None:
    flags = [filled(word, places) for word in program_flags(each.words)]
    args = program.parse(flags)
    means = dict(pair.partition("=")[::2] for pair in shlex.split(each.said["means"]))
    for name, wanted in means.items():
        assert as_text(getattr(args, name)) == filled(wanted, places), name
    # whatever else was typed means what it says
    actions = program.get_args_parser(program.choose_task(flags))._option_string_actions
    for name, given in values_of(flags).items():
        if name in actions and actions[name].dest not in means:
            value = getattr(args, actions[name].dest)
            own = value if isinstance(value, (list, tuple)) else [value]
            assert [plain(as_text(part)) for part in own] == [plain(as_text(x)) for x in given or [actions[name].const]]


@pytest.mark.parametrize("each", [each for each in PUBLISHED if "refused" in each.said], ids=lambda each: each.title)
def test_what_is_refused_has_a_counterpart(each: Published) -> None:
    if "main.py" in each.words:
        with pytest.raises(UsageError):
            program.parse(program_flags(each.words))
    kind, script, *rest = each.said["ours"].split()
    assert kind == "bash"
    if "install" in each.words:
        assert (script, rest) == ("scripts/setup.sh", [])
    else:
        assert script in EXPERIMENTS
        assert rest[0] == "DATA"


def test_every_release_is_there() -> None:
    systems = ("Vim", "Famba-V", "DyVM", "MambaReg", "FastVim")
    assert {each.title.partition(",")[0].removesuffix(" on MambaReg") for each in PUBLISHED} == set(systems)
    assert all(("means" in each.said) != ("refused" in each.said) for each in PUBLISHED)


# --- the table of experiments ---


class Row(NamedTuple):
    """An experiment: what it is called there, its script and the flags that the table gives it."""

    published: str
    script: str
    flags: list[str]


def rows() -> list[Row]:
    """The lines of the page's tables."""
    found = []
    for line in EXPERIMENTS_PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[1].startswith("scripts/"):
            assert len(cells) == 4, line
            spans = re.findall(r"`(--[^`]+)`", cells[2])
            found.append(Row(cells[0], cells[1], [word for span in spans for word in span.split()]))
    return found


ROWS = rows()


def values_of(words: list[str]) -> dict[str, list[str]]:
    """The values behind every flag, of the last one that is given twice."""
    found: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name = word
            found[name] = []
        else:
            found[name].append(word)
    return found


def plain(value: str) -> str:
    """A number in one spelling."""
    try:
        return repr(float(value))
    except ValueError:
        return value


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.script)
def test_a_script_does_what_its_row_says(row: Row, tmp_path: Path) -> None:
    (command,) = run_script(ROOT / row.script, [str(tmp_path), "--model-path", "weights.pth"], tmp_path)
    given = values_of(program_flags(command))
    for name, wanted in values_of(row.flags).items():
        assert name in given, f"{row.script} does not give {name}"
        assert list(map(plain, given[name])) == list(map(plain, wanted)), f"{row.script}: {name}"


def test_every_script_has_a_row() -> None:
    scripts = {script for script in EXPERIMENTS if Path(script).stem not in ("digits", "quickstart")}
    assert scripts == {row.script for row in ROWS}


def test_what_is_rebuilt_is_marked() -> None:
    """A page types out the command of a row, or the row says that it is made from what is recorded."""
    typed = {each.title for each in PUBLISHED if "read-me: training" in each.title and "means" in each.said}
    assert len(typed) == 1
    assert [row.published for row in ROWS if not row.published.endswith("†")] == ["read-me, Vim-Ti, CIFAR-100"]


def test_sweep_takes_r_and_k(tmp_path: Path) -> None:
    chosen = dict(STRATEGY="upper", R="15", K="13", SIZE="s")
    (command,) = run_script(ROOT / "scripts/fambav/cifar-sweep.sh", [str(tmp_path)], tmp_path, **chosen)
    given = values_of(program_flags(command))
    assert given["--model"][0].startswith("vim_small_")
    flags = ("--fusion-strategy", "--fusion-token", "--fusion-layer")
    assert [given[name] for name in flags] == [["upper"], ["15"], ["13"]]
