"""Every command in README.md and docs/, and every script in scripts/, read from the files and run.

A script runs with a stand-in for Python that notes the command line it was given. Every command line of the program is
checked as it stands (flags, model built without memory), then run for one epoch with a model of the same family but
a second's size, on small data in the real formats.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import types
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import checkpoints
import fusion
import main as program
from benchmarks import aarch64, compare
from benchmarks import small_cells as cells_data
from benchmarks.small_data import write_shapes
from tasks import TASKS
from tasks.detect import build_detector
from tasks.segment import build_segmenter
from tests import micro_models, program_data
from tests.conftest import Result
from utils import UsageError
from utils.flags import Parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "scripts").rglob("*.sh"))
# not experiments: what each is, and which test runs it
SOURCED = {"scripts/launch.sh", "scripts/built_anew.sh", "scripts/fambav/experiment.sh"}
# the suite runs inside the first two; the others make an environment, or a build, of their own for a part of it
INSTALLS = {
    f"scripts/{name}.sh"
    for name in ("setup", "test", "test_transformers", "test_matrix", "asan", "asan_cuda", "avx512")
}
WHOLE = {
    "scripts/quickstart.sh",
    "scripts/compare.sh",
    "scripts/seg/quickstart.sh",
    "scripts/det/quickstart.sh",
    "scripts/mae/digits.sh",
}
EXPERIMENTS = [script for script in SCRIPTS if script not in SOURCED | INSTALLS | WHOLE]
# take minutes, or a GPU: that their flags are taken is all that is tried here
LONG = {
    f"benchmarks.{name}"
    for name in [
        "flops",
        "pruning",
        "merging",
        "resolution",
        "compare",
        "mae",
        "segmentation",
        "detection",
        "channels",
        "channel_sampling",
    ]
}
LONG_SCRIPTS = {"benchmarks/gpu_check.sh"}
CLASSES = {"CIFAR": 100, "IMNET": 3, "ADE20K": 3, "COCO": 3, "SHAPES": 3, "JUMPCP": 4, "CELLS": 2}
CHANNELS = {"JUMPCP": 8, "CELLS": 3}
TINY = ("--input-size", "32", "--batch-size", "4", "--num_workers", "0")
BY_STEPS = (*TINY, "--iterations", "1", "--eval-interval", "1", "--warmup-iters", "0")
SMALL = {
    "classify": (*TINY, "--epochs", "1", "--warmup-epochs", "0"),
    "pretrain": (*TINY, "--epochs", "1", "--warmup-epochs", "0"),
    "segment": BY_STEPS,
    "cells": (*TINY, "--epochs", "1", "--warmup-epochs", "0"),
    "detect": (
        *BY_STEPS,
        *("--det-channels", "8", "--det-fc-channels", "16", "--det-boxes", "16", "--det-proposals", "20"),
    ),
}
TOLD = {"classify": "top-1", "pretrain": "loss", "segment": "mIoU", "detect": "box AP", "cells": "top-1"}


# --- reading the pages ---


def commands(text: str) -> list[list[str]]:
    """The command lines in a page: in its code blocks, and in code spans that begin with a program's name."""
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if language in ("bash", "sh", ""):
            found += block.replace("\\\n", " ").splitlines()
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    found += [span.replace("\\|", "|") for span in re.findall(r"`([^`\n]+)`", text) if " " in span]
    split = [shlex.split(line, comments=True) for line in found if starts_command(line)]
    return [words for words in split if words]


def starts_command(line: str) -> bool:
    return bool(re.match(r"(python|bash|torchrun|pip|\S*/python) ", line.strip()))


DOCUMENTED = [
    pytest.param(words, id=f"{page.name}: {' '.join(words)[:70]}")
    for page in PAGES
    for words in commands(page.read_text(encoding="utf-8"))
]


# --- small stand-ins ---


class Files:
    """Data in the real formats and weights of micro models, made once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data = {
            "CIFAR": program_data.write_cifar100(root / "cifar", train=8, test=4),
            "IMNET": program_data.write_image_folder(root / "imnet", train=4, test=2),
            "JUMPCP": cells_data.write_jumpcp(root / "jumpcp"),
            "CELLS": root / "cells",
        }
        self.index = cells_data.write_index(root / "cells")
        self.data["ADE20K"] = self.data["COCO"] = self.data["SHAPES"] = write_shapes(root / "shapes", 4, 2)

    def weights(self, family: str, classes: int, channels: int = 3) -> Path:
        """Weights of an untrained micro model."""
        path = self.root / f"{family}-{classes}.pth"
        if not path.exists():
            classes = 0 if family.startswith("mae_") else classes
            model = micro_models.timm.create_model(f"{family}_micro_patch8_32", num_classes=classes, in_chans=channels)
            torch.save({"model": model.state_dict()}, path)
        return path

    def segmenter(self, family: str) -> Path:
        """Weights of an untrained micro segmenter for SHAPES."""
        path = self.root / f"{family}-segmenter.pth"
        if not path.exists():
            torch.save({"model": build_segmenter(f"{family}_micro_patch8_32", 6, img_size=32).state_dict()}, path)
        return path

    def detector(self, family: str) -> Path:
        """Weights of an untrained micro detector for SHAPES, as narrow as `SMALL` has it."""
        path = self.root / f"{family}-detector.pth"
        if not path.exists():
            model = build_detector(f"{family}_micro_patch8_32", 5, img_size=32, out_channels=8, fc_channels=16)
            torch.save({"model": model.state_dict()}, path)
        return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("files"))


def family_of(model: str) -> str:
    """The micro model's family that stands for `model`."""
    if model.startswith(("mambareg", "mambar_")):
        return "mambareg"
    if model.startswith(("dyvm_mambareg", "MambaReg-")):
        return "dyvm_mambareg"
    if model.startswith(("dyvm", "Vim-", "VideoMamba-")):
        return "dyvm"
    if "channelvim" in model:
        return "fastchannelvim" if model.startswith("fast") else "channelvim"
    if model.startswith("mae_"):
        return "mae_fastvim" if "fastvim" in model.lower() else "mae_vim"
    return "fastvim" if model.startswith("fastvim") or "noclstok" in model else "vim"


def value(flags: list[str], name: str, default: str = "") -> str:
    """The last value that `flags` give `name`."""
    places = [place for place, flag in enumerate(flags) if flag == name]
    return flags[places[-1] + 1] if places else default


def default_model(flags: list[str]) -> str:
    """The model of a command line that names none."""
    return "fastchannelvim" if value(flags, "--task") == "cells" else "vim_nano_patch4_32"


def substitute(flags: list[str], files: Files, folder: Path) -> list[str]:
    """`flags` with folders and weights that exist in the places of those that they name."""
    flags = list(flags)
    data_set, is_cells = value(flags, "--data-set"), value(flags, "--task") == "cells"
    if is_cells and data_set in ("", "CELLS_DIGITS"):
        data_set = "JUMPCP"
        flags += ["--data-set", data_set, "--data-path", str(files.data[data_set])]
    elif data_set in ("", "DIGITS"):
        data_set = "CIFAR"
        flags += ["--data-set", data_set, "--data-path", str(files.data[data_set])]
    if data_set == "SHAPES" and "--data-path" not in flags:
        flags += ["--data-path", ""]
    family = family_of(value(flags, "--model", default_model(flags)))
    plain = {"dyvm": "vim", "dyvm_mambareg": "mambareg"}
    start = plain.get(family, family) if "--eval" not in flags else family
    stands = {
        "--data-path": files.data[data_set],
        **dict.fromkeys(("--output_dir", "--visualize"), folder / "output"),
        **dict.fromkeys(
            ("--resume", "--finetune", "--model-path"),
            files.weights(start, CLASSES[data_set], CHANNELS.get(data_set, 3)),
        ),
        "--index": files.index,
    }
    if value(flags, "--task") == "segment":
        stands["--resume"] = files.segmenter(family)
    if value(flags, "--task") == "detect":
        stands["--resume"] = files.detector(family)
    return [str(stands.get(before, flag)) for before, flag in zip(["", *flags], flags)]


def check_and_run(flags: list[str], files: Files, folder: Path, run: Callable[..., Result]) -> None:
    """Check the program's `flags` as they stand, then run them small."""
    flags = substitute(flags, files, folder)
    program.parse(flags)
    model = value(flags, "--model", default_model(flags))
    task = program.choose_task(flags).name
    by_steps = task in ("classify", "pretrain") and "--iterations" in flags
    tiny = BY_STEPS if by_steps else SMALL[task]
    small = [*flags, "--model", f"{family_of(model)}_micro_patch8_32", *tiny, "--device", "cpu"]
    if value(flags, "--fusion-strategy", "no") != "no":
        small += ["--fusion-layer", "1", "--fusion-token", "2"]
    result = run(*small)
    assert result.code == 0, result.err
    assert TOLD[task] in result.out


# --- scripts ---

NOTE = """#!/usr/bin/env bash
printf '%s\\n' "$@" END >>"$NOTES"
"""


def noted(notes: Path) -> list[list[str]]:
    """The command lines that the stand-in for Python was given."""
    lines = notes.read_text(encoding="utf-8").split("END\n") if notes.exists() else []
    return [line.splitlines() for line in lines if line]


def run_script(script: Path | str, arguments: list[str], folder: Path, **environment: str) -> list[list[str]]:
    """Run a script with the stand-in for Python; returns the command lines it was given. `folder`/said holds what the
    script itself said."""
    python, notes = folder / "python", folder / "notes"
    python.write_text(NOTE, encoding="utf-8")
    python.chmod(0o755)
    notes.unlink(missing_ok=True)
    keep = {name: text for name, text in os.environ.items() if name not in ("OUTPUT_DIR", "NNODES", "GPUS")}
    keep |= {"PYTHON": str(python), "NOTES": str(notes), "GPUS": "1"} | environment
    done = subprocess.run(
        ["bash", str(script), *arguments], cwd=folder, env=keep, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    (folder / "said").write_text(done.stdout, encoding="utf-8")
    return noted(notes)


def program_flags(words: list[str]) -> list[str]:
    """What a command line hands to main.py."""
    place = next(number for number, word in enumerate(words) if Path(word).name == "main.py")
    return words[place + 1 :]


@pytest.mark.parametrize("script", EXPERIMENTS)
def test_experiment_script(script: str, files: Files, program: Callable[..., Result], tmp_path: Path) -> None:
    asks = "--model-path" in (ROOT / script).read_text(encoding="utf-8")
    start = "mambareg" if "mambareg" in script else "vim"
    extra = ["--model-path", str(files.weights(start, 3))] if asks else []
    if "--resume CHECKPOINT" in (ROOT / script).read_text(encoding="utf-8"):
        extra = ["--resume", "CHECKPOINT"]
    (command,) = run_script(ROOT / script, [str(tmp_path), *extra], tmp_path)
    assert Path(command[0]) == ROOT / "main.py"
    assert value(command, "--data-path") == str(tmp_path), "the first argument is the data path"
    check_and_run(program_flags(command), files, tmp_path, program)


def test_scripts_that_are_sourced_exist() -> None:
    assert set(SCRIPTS) >= SOURCED | INSTALLS | WHOLE
    assert len(EXPERIMENTS) > 30


@pytest.mark.parametrize("environment", [{"GPUS": "4"}, {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "host"}])
def test_launcher_starts_processes(environment: dict[str, str], tmp_path: Path) -> None:
    flags = ["/data", "--epochs", "7"]
    (command,) = run_script(ROOT / "scripts/vim/pt-vim-t.sh", flags, tmp_path, **({"GPUS": "4"} | environment))
    assert command[:2] == ["-m", "torch.distributed.run"]
    assert value(command, "--nproc-per-node") == "4"
    assert value(command, "--nnodes", "1") == environment.get("NNODES", "1")
    assert value(command, "--epochs") == "7", "the caller's flags come last"


def test_script_without_data_path_says_what_it_wants(tmp_path: Path) -> None:
    script = ROOT / "scripts/fambav/cifar-vim-t-upper.sh"
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 2
    assert "DATA_PATH" in done.stderr


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of what setup.sh looks at, whose .venv holds the stand-in for Python, so that nothing is installed."""
    folder = tmp_path / "clone"
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    shutil.copy(ROOT / "vim_requirements.txt", folder)
    for package in ("causal_conv1d/causal_conv1d", "mamba-1p1p1/mamba_ssm"):
        shutil.copytree(ROOT / package / "csrc", folder / package / "csrc")
        for name in ("setup.py", "pyproject.toml"):
            shutil.copy((ROOT / package).parent / name, (folder / package).parent)
    (folder / ".venv" / "bin").mkdir(parents=True)
    python = folder / ".venv" / "bin" / "python"
    python.write_text(NOTE, encoding="utf-8")
    python.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("free", "index", "refused"), [("6.9", "", True), ("1.9", "/cpu", True), ("2.1", "/cpu", False), ("7.1", "", False)]
)
def test_setup_looks_for_room_first(clone: Path, free: str, index: str, refused: bool) -> None:
    """The disk is looked at before anything is made; one with room goes on to make `.venv`."""
    shutil.rmtree(clone / ".venv")
    tools = clone / "tools"
    tools.mkdir()
    told = "Filesystem 1024-blocks Used Available Capacity Mounted on\n/dev/disk 9 9 {} 9% /"
    for name, lines in (
        ("df", f"echo '{told.format(int(float(free) * 2**20))}'"),
        ("uname", "echo Linux"),
        ("python", 'if [ "$1 $2" = "-m venv" ]; then echo "made $3"; exit 9; fi'),
    ):
        (tools / name).write_text(f"#!/bin/sh\n{lines}\n", encoding="utf-8")
        (tools / name).chmod(0o755)
    keep = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": "python", "PIP_EXTRA_INDEX_URL": index}
    done = subprocess.run(["bash", "scripts/setup.sh"], cwd=clone, env=keep, capture_output=True, text=True, timeout=60)
    if refused:
        assert done.returncode == 2
        assert not (clone / ".venv").exists()
        (line,) = done.stderr.splitlines()
        assert f"{int(float(free))} GiB are free" in line
        assert f"wanted {2 if index else 7} for .venv" in line
    else:
        assert (done.returncode, done.stdout) == (9, "made .venv\n"), done.stderr


def test_quickstart_installs_trains_and_evaluates(
    clone: Path, files: Files, program: Callable[..., Result], tmp_path: Path
) -> None:
    lines = run_script(clone / "scripts/quickstart.sh", [], clone, EPOCHS="1", OUTPUT_DIR=str(tmp_path / "quick"))
    installs = [line for line in lines if line[:2] == ["-m", "pip"]]
    assert any(".venv/requirements.txt" in line for line in installs)
    wanted = [line for line in (ROOT / "vim_requirements.txt").read_text(encoding="utf-8").splitlines() if line]
    assert (clone / ".venv/requirements.txt").read_text(encoding="utf-8").splitlines() == wanted
    assert {line[-1] for line in installs if "-e" in line} == {"./causal_conv1d", "./mamba-1p1p1"}
    runs = [line for line in lines if line[0] == "main.py"]
    assert len(runs) == 6
    assert (clone / "said").read_text(encoding="utf-8").count("\n   (") == 6, (
        "every stage says before it begins how long it takes"
    )
    for line in runs:
        # nothing is there yet to resume
        flags = line[1:] if "--eval" in line else without(line[1:], "--resume")
        check_and_run(flags, files, tmp_path, program)
    assert lines[-1][:2] == ["-m", "benchmarks.summary"]


def test_digits_pretrains_fine_tunes_and_probes(
    clone: Path, files: Files, program: Callable[..., Result], tmp_path: Path
) -> None:
    environment = dict(STEPS="8", FEW_STEPS="4", SEEDS="0 1", OUTPUT_DIR=str(tmp_path / "digits"))
    lines = run_script(clone / "scripts/mae/digits.sh", [], clone, **environment)
    runs = [without(line[1:], "--resume") for line in lines if line[0] == "main.py"]
    assert [Path(value(flags, "--output_dir")).name for flags in runs] == [
        *("pretrain", "finetuned-0", "scratch-0", "finetuned-1", "scratch-1", "probe")
    ]
    for flags in (runs[0], runs[1], runs[2], runs[5]):
        # CIFAR stands for the digits, with too few images for a tenth of them
        check_and_run(without(flags, "--label-share"), files, tmp_path, program)
    assert lines[-1] == ["-m", "benchmarks.few_labels", str(tmp_path / "digits")]
    lines = run_script(clone / "scripts/mae/digits.sh", [], clone, FAMILY="vim", SEEDS="0")
    encoder, classifier = dict.fromkeys(value(line, "--model") for line in lines if line[0] == "main.py")
    weights = tmp_path / "pretrained.pth"
    torch.save({"model": timm.create_model(encoder).state_dict()}, weights)
    checkpoints.start(timm.create_model(classifier, num_classes=10), str(weights), classifier, fit=True)
    with pytest.raises(UsageError, match="wanted vim_SIZE_final_pool_mean_abs_pos_embed_with_midclstok_div2"):
        checkpoints.start(timm.create_model("vim_nano_patch4_32"), str(weights), "vim_nano_patch4_32", fit=True)
    assert lines[-1][-1] == "output/mae-digits-vim"


def without(flags: list[str], name: str) -> list[str]:
    """`flags` without `name` and its value."""
    return [flag for before, flag in zip(["", *flags], flags) if name not in (before, flag)]


def test_compare_script_hands_its_arguments_on(clone: Path) -> None:
    lines = run_script(clone / "scripts/compare.sh", ["/data", "--epochs", "1"], clone, OUTPUT_DIR="there")
    assert lines[-1] == ["-m", "benchmarks.compare", "--output_dir", "there", "/data", "--epochs", "1"]


# --- pages ---


@pytest.mark.parametrize("words", DOCUMENTED)
def test_documented_command(
    words: list[str],
    files: Files,
    program: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if any(Path(word).name == "main.py" for word in words):
        if words[-1] == "--help":
            with pytest.raises(SystemExit, match="0"):
                program("--help")
            return
        check_and_run(program_flags(words), files, tmp_path, program)
    elif words[0] == "pip":
        assert all((ROOT / word).exists() for word in words if word.endswith(".txt") or word.startswith("./"))
    elif words[0] == "bash":
        check_documented_script(words[1:], files, program, tmp_path)
    else:
        assert words[1] == "-m", f"an unknown kind of command: {' '.join(words)}"
        run_module(words[2], words[3:], files, tmp_path, monkeypatch)


def check_documented_script(words: list[str], files: Files, program: Callable[..., Result], folder: Path) -> None:
    script = words[0]
    if "{" in script:
        kinds = re.search(r"\{(.*)\}", script)[1].split(",")
        assert all(any(path.startswith(f"scripts/{kind}/") for path in EXPERIMENTS) for kind in kinds)
    elif script in EXPERIMENTS:
        (command,) = run_script(ROOT / script, words[1:], folder)
        check_and_run(program_flags(command), files, folder, program)
    else:
        assert script in INSTALLS | WHOLE | LONG_SCRIPTS
        assert (ROOT / script).is_file()


def logged_run(folder: Path) -> Path:
    """A run's output folder with a log of two epochs."""
    folder.mkdir(parents=True)
    line = {"train_loss": 1.0, "test_loss": 1.0, "train_lr": 1e-3, "test_acc1": 50.0}
    lines = [{"epoch": epoch} | line for epoch in (0, 1)]
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def parse_and_leave(parser: Parser, argv: list[str] | None = None, namespace: object = None) -> None:
    """In the place of `parse_args`: read the flags, and go no further."""
    ArgumentParser.parse_args(parser, argv, namespace)
    raise SystemExit(0)


def run_module(name: str, arguments: list[str], files: Files, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `python -m name` in this process, small where it would take minutes."""
    if name == "benchmarks.aarch64" and (lacking := aarch64.missing()):
        pytest.skip(f"no {', '.join(lacking)}")
    small = {
        "benchmarks.throughput": ["--img-size", "32", "--batch-size", "1", "--seconds", "0"],
        "examples.new_method": ["--data-set", "CIFAR", "--data-path", str(files.data["CIFAR"]), *SMALL["classify"]],
        "examples.new_task": ["--model", "vim_micro_patch8_32", *SMALL["classify"], "--batch-size", "256"],
    }
    if name == "fusion.visualize":  # of a run that is yet to be made
        np.savez(folder / "saved.npz", layer_0=np.ones((4, 2)))
        arguments = [str(folder / "saved.npz")]
    if name == "benchmarks.plot":  # the folders of runs that are yet to be made
        arguments = [str(logged_run(folder / word)) if word.startswith("output/") else word for word in arguments]
        arguments += ["--file", str(folder / "curves.png")]
    arguments = [
        str(folder / "run") if before == "--output_dir" else word for before, word in zip(["", *arguments], arguments)
    ]
    if name == "benchmarks.compare":  # hands on what it does not know
        args, more = compare.parse([*arguments, "--output_dir", str(folder / "compare")])
        return compare.check(compare.plan(args, more)[:1])
    if name in LONG:
        monkeypatch.setattr(Parser, "parse_args", parse_and_leave)
    monkeypatch.setattr(sys, "argv", [name, *arguments, *small.get(name, [])])
    monkeypatch.chdir(ROOT)
    monkeypatch.delitem(sys.modules, name, raising=False)
    code, methods = 0, set(fusion.METHODS)
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
    finally:  # an example registers its method for the rest of its process
        for added in set(fusion.METHODS) - methods:
            fusion.unregister(added)
        TASKS.remove("rotate")
    assert code == 0


def test_flags_in_code_spans_exist() -> None:
    known = set().union(*(program.get_args_parser(TASKS[name])._option_string_actions for name in TASKS))
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for span in re.findall(r"`(--[^`\n]+)`", text):
            for flag in re.findall(r"(?<![\w-])--[\w-]+", span):
                assert flag in known, f"{page.name} names {flag}, which main.py does not know"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        if "register_model" not in block and "Operators(" not in block:  # tests/test_examples.py runs these
            module = types.ModuleType("page")  # which dataclasses look up
            monkeypatch.setitem(sys.modules, "page", module)
            exec(compile(block, str(page), "exec"), vars(module))


def test_index_names_every_page_and_picture() -> None:
    """Pictures with the command that makes each, which is documented and so tried."""
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {page.name for page in PAGES if page.parent.name == "docs" and page.name != "README.md"}
    assert set(re.findall(r"\]\((\w+\.md)\)", index)) == pages
    rows = [line for line in index.splitlines() if "](images/" in line]
    assert set(re.findall(r"images/(\w+\.png)", index)) == {file.name for file in (ROOT / "docs/images").iterdir()}
    assert all(commands(row.split("|")[2]) for row in rows)
    shown = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for text in re.findall(r"\]\(([^)#]+\.(?:md|png|csv|json))\)", shown):
        assert any((page.parent / text).is_file() for page in PAGES), f"{text} is not there"


def test_pages_hold_commands() -> None:
    assert len(DOCUMENTED) > 10, "a page's commands are found at all"
