"""The order of the house: who imports whom, and how long a file may be; docs of the order are in CONTRIBUTING.md.

Every `import` counts, wherever in a file it stands, but for those that only a type checker sees. The checks work on any
folder laid out as this repository is; that they fail when they should is shown on small ones.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
MOST_LINES = 600
SOURCES = (".py", ".cpp", ".cu", ".h", ".sh")
# where imports start from: the checkout itself, and the folders that hold the kernel packages
PACKAGE_FOLDERS = ("causal_conv1d", "mamba-1p1p1")


class Room(NamedTuple):
    """Files by pattern (the first room that fits is a file's), and the rooms that they may import beside their own."""

    files: tuple[str, ...]
    may_import: tuple[str, ...] = ()


_PACKAGES = ("causal_conv1d", "kernels", "ops", "modules")
_BELOW_TASKS = (*_PACKAGES, "utils", "fusion", "models", "measure", "files", "contract")
# from the ground up
ROOMS = {
    "tests": Room(
        ("tests/**", "*/tests/**", "conftest.py"),
        (
            *_BELOW_TASKS,
            "run",
            "engine",
            "tasks",
            "dense",
            "shared task files",
            "main",
            "benchmarks",
            "programs",
            "set-up",
            "compiled names",
        ),
    ),
    "set-up": Room(("*/setup.py",)),
    "causal_conv1d": Room(("causal_conv1d/causal_conv1d/**",)),
    "kernels": Room(("mamba-1p1p1/mamba_ssm/kernels/**",), ("causal_conv1d",)),
    "ops": Room(("mamba-1p1p1/mamba_ssm/ops/**",), ("causal_conv1d", "kernels")),
    "modules": Room(("mamba-1p1p1/mamba_ssm/**",), ("causal_conv1d", "kernels", "ops")),
    # the names of the releases' compiled modules and packages
    "compiled names": Room(
        ("*/causal_conv1d_cuda.py", "*/selective_scan_cuda.py", "*/faster_mamba_ssm.py"),
        ("causal_conv1d", "ops", "modules"),
    ),
    "utils": Room(("utils/**", "utils.py")),
    "fusion": Room(("fusion/**",), (*_PACKAGES, "utils")),
    "models": Room(("models_*.py", "embeddings.py"), (*_PACKAGES, "utils", "fusion")),
    "measure": Room(("measure/**",), (*_PACKAGES, "utils", "fusion", "models")),
    "files": Room(("loading.py", "datasets.py", "checkpoints.py"), ("utils", "fusion", "models")),
    "contract": Room(("tasks/task.py",), ("utils", "fusion", "files")),
    "run": Room(("run.py",), ("utils", "fusion", "files", "contract")),
    "engine": Room(("engine.py",), ("utils", "files", "contract", "run")),
    "shared task files": Room(("tasks/*.py",), _BELOW_TASKS),
    "dense": Room(("tasks/dense/**",), (*_BELOW_TASKS, "shared task files")),
    "tasks": Room(("tasks/**",), (*_BELOW_TASKS, "shared task files", "dense")),
    "main": Room(("main.py",), (*_BELOW_TASKS, "run", "engine", "shared task files")),
    "programs": Room(
        ("examples/*", "run_with_submitit.py"),
        (*_BELOW_TASKS, "run", "engine", "tasks", "dense", "shared task files", "main"),
    ),
    "benchmarks": Room(
        ("benchmarks/*",),
        (*_BELOW_TASKS, "run", "engine", "tasks", "dense", "shared task files", "main", "programs"),
    ),
}
# what engine.py and main.py, which know methods and tasks by their contracts, do not name
NAMELESS = ("engine.py", "main.py")
REGISTRIES = {"TASKS", "METHODS"}
METHOD_NAMES = {"merging", "pooling", "pruning", "famba", "fambav", "fastvim", "dyvm"}


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass(frozen=True)
class Import:
    """`importer`, a file, names `imported`, another, in a line."""

    importer: str
    line: int
    imported: str


def files_of(root: Path) -> list[str]:
    """The sources under `root` by their path from there."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [
            name for name in folders if name[0] != "." and name not in ("output", "datasets", "build", "__pycache__")
        ]
        found += [Path(folder, name).relative_to(root).as_posix() for name in names if name.endswith(SOURCES)]
    return sorted(found)


def modules_of(files: list[str]) -> dict[str, str]:
    """The Python files by the names that they are imported under."""
    found = {}
    for file in files:
        if file.endswith(".py"):
            parts = file.removesuffix(".py").split("/")
            if parts[0] in PACKAGE_FOLDERS and "tests" not in parts:
                parts = parts[1:]
            if parts[-1] == "__init__":
                parts = parts[:-1]
            found[".".join(parts)] = file
    return found


def imports_of(root: Path, files: list[str]) -> list[Import]:
    """What every Python file imports of the others."""
    modules = modules_of(files)
    names = {file: name for name, file in modules.items()}
    found: dict[Import, None] = {}
    for file in names:
        package = names[file] if file.endswith("__init__.py") else names[file].rpartition(".")[0]
        for line, name in _named(ast.parse((root / file).read_text(encoding="utf-8")), package):
            while name and name not in modules:  # a name in a module, or a module of someone else's
                name = name.rpartition(".")[0]
            if name and modules[name] != file:
                found[Import(file, line, modules[name])] = None
    return list(found)


def _named(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """The modules that `tree` imports, each maybe with a name in it behind it, and the lines where it does."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        else:
            yield from _named(node, package)


def room_of(file: str) -> str | None:
    """The room that `file` belongs to."""
    return next((name for name, room in ROOMS.items() if any(_fits(file, pattern) for pattern in room.files)), None)


def _fits(file: str, pattern: str) -> bool:
    """Whether `file` is what `pattern` says: `*` within a folder, `**` anything."""
    parts = {"**": ".*", "*": "[^/]*"}
    return bool(re.fullmatch("".join(parts.get(part, re.escape(part)) for part in re.split(r"(\*+)", pattern)), file))


# ---------------------------------------------------------------------------------------------------------------------
# Checking


def arrows_up(imports: list[Import]) -> list[str]:
    """Imports that the order of the rooms does not allow, and files that no room takes."""
    found = []
    for each in imports:
        own, other = room_of(each.importer), room_of(each.imported)
        where = f"{each.importer}:{each.line} imports {each.imported}"
        if own is None or other is None:
            found.append(f"{where}: ROOMS has no place for {each.importer if own is None else each.imported}")
        elif own != other and other not in ROOMS[own].may_import:
            found.append(f"{where}: {own} may import {', '.join(ROOMS[own].may_import) or 'nothing'}, not {other}")
        elif own == other == "tasks" and each.imported.endswith("/task.py") and not _same_folder(each):
            found.append(f"{where}: one task does not import another")
    return found


def _same_folder(each: Import) -> bool:
    return each.importer.rpartition("/")[0] == each.imported.rpartition("/")[0]


def circles(imports: list[Import]) -> list[str]:
    """Files that import each other in a ring, one ring for each import that closes one."""
    onward: dict[str, dict[str, Import]] = {}
    for each in imports:
        onward.setdefault(each.importer, {}).setdefault(each.imported, each)
    found, finished = [], set()

    def walk(file: str, path: list[str]) -> None:
        path.append(file)
        for other in onward.get(file, ()):
            if other in path:
                found.append("a circle: " + " -> ".join([*path[path.index(other) :], other]))
            elif other not in finished:
                walk(other, path)
        finished.add(path.pop())

    for file in onward:
        if file not in finished:
            walk(file, [])
    return found


def long_files(root: Path, files: list[str]) -> list[str]:
    """Files of more lines than one reads at a sitting."""
    counts = {file: (root / file).read_text(errors="replace", encoding="utf-8").count("\n") for file in files}
    return [
        f"{file} has {count} lines, {MOST_LINES} are the most" for file, count in counts.items() if count > MOST_LINES
    ]


def names_told(root: Path, files: list[str]) -> list[str]:
    """Methods and tasks that the files named NAMELESS name: in an identifier, a keyword or a text. Docstrings, what
    `--help` says, the default of a flag and what a registry is asked for (`TASKS["name"]`) are left out."""
    tasks = {file.split("/")[1] for file in files if re.fullmatch(r"tasks/\w+/\w+\.py", file)}
    found = []
    for file in NAMELESS:
        if file not in files:
            continue
        tree = ast.parse((root / file).read_text(encoding="utf-8"))
        for line, text in _spoken(tree):
            for word in re.findall(r"[a-z]+", text.lower()):
                if word in METHOD_NAMES or word in tasks:
                    kind = "method" if word in METHOD_NAMES else "task"
                    found.append(f"{file}:{line} names the {kind} {word!r}: {text[:60]}")
    return found


def _spoken(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Identifiers and texts of `tree`, by line."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.keyword) and node.arg in ("help", "default", "description"):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in REGISTRIES:
            continue
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Name):
            yield line, node.id
        elif isinstance(node, ast.Attribute):
            yield line, node.attr
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            yield line, node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield line, node.name
        elif isinstance(node, ast.alias):
            yield line, f"{node.name} {node.asname or ''}".strip()
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield line, node.module
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield line, node.value
        yield from _spoken(node)


def violations(root: Path) -> list[str]:
    """Everything in the checkout `root` that is against the order."""
    files = files_of(root)
    imports = imports_of(root, files)
    return [*arrows_up(imports), *circles(imports), *long_files(root, files), *names_told(root, files)]


# ---------------------------------------------------------------------------------------------------------------------
# The checkout, and trees that are wrong


def test_the_house_is_in_order() -> None:
    found = violations(ROOT)
    assert not found, "\n".join(["", *found])


def test_all_rooms_are_found() -> None:
    files = [file for file in files_of(ROOT) if file.endswith(".py")]
    assert [file for file in files if room_of(file) is None] == []
    imports = imports_of(ROOT, files)
    seen = {(room_of(each.importer), room_of(each.imported)) for each in imports}
    for arrow in (("main", "engine"), ("models", "fusion"), ("fusion", "ops"), ("ops", "kernels"), ("tests", "main")):
        assert arrow in seen, "the reader sees the imports that are there"


GOOD = {
    "main.py": "import engine\nfrom tasks import TASKS\n\n\ndef main():\n    '''Prunes by pruning.'''\n",
    "engine.py": "from tasks.task import Task\nfrom utils import errors\n",
    "tasks/__init__.py": "from tasks.task import Task\n",
    "tasks/task.py": "from utils.errors import UsageError\n",
    "tasks/classify/task.py": "from tasks.task import Task\nimport models_mamba\n",
    "tasks/detect/task.py": "from tasks.dense import body\n",
    "tasks/dense/body.py": "",
    "models_mamba.py": "import fusion.pruning\nfrom mamba_ssm.modules.mixer import Mixer\n",
    "fusion/pruning.py": "from mamba_ssm.ops import scan\n",
    "measure/timing.py": "",
    "benchmarks/speed.py": "from measure import timing\nimport main\n",
    "utils/__init__.py": "from utils.errors import UsageError\n",
    "utils/errors.py": "import os\nimport torch.nn\n",
    "mamba-1p1p1/mamba_ssm/modules/mixer.py": "from ..ops import scan\n",
    "mamba-1p1p1/mamba_ssm/ops/scan.py": "from mamba_ssm.kernels import cpp\nimport causal_conv1d\n",
    "mamba-1p1p1/mamba_ssm/kernels/cpp.py": "",
    "causal_conv1d/causal_conv1d/__init__.py": "",
    "tests/test_main.py": "import main\nfrom benchmarks import speed\n",
}


def write_tree(root: Path, files: dict[str, str]) -> Path:
    """The files under `root`."""
    for file, text in files.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text, encoding="utf-8")
    return root


def test_a_small_house_in_order(tmp_path: Path) -> None:
    assert violations(write_tree(tmp_path, GOOD)) == []
    assert Import("mamba-1p1p1/mamba_ssm/modules/mixer.py", 1, "mamba-1p1p1/mamba_ssm/ops/scan.py") in imports_of(
        tmp_path, files_of(tmp_path)
    )


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("utils/errors.py", "from utils import UsageError\n", "a circle: utils/"),
        ("mamba-1p1p1/mamba_ssm/kernels/cpp.py", "from mamba_ssm.ops import scan\n", "not ops"),
        ("fusion/pruning.py", "def late():\n    import models_mamba\n", "fusion/pruning.py:2 imports models_mamba.py"),
        ("measure/timing.py", "from benchmarks import speed\n", "measure may import"),
        ("engine.py", "import tasks.classify.task\n", "not tasks"),
        ("main.py", "import tests.test_main\n", "not tests"),
        ("main.py", "import benchmarks.speed\n", "not benchmarks"),
        ("tasks/detect/task.py", "from tasks.classify.task import Task\n", "one task does not import another"),
        ("tasks/dense/body.py", "import tasks.detect.task\n", "dense may import"),
        ("causal_conv1d/causal_conv1d/__init__.py", "import utils.errors\n", "causal_conv1d may import nothing"),
        ("attic.py", "import utils.errors\n", "no place for attic.py"),
        ("fusion/long.py", "x = 1\n" * 601, "fusion/long.py has 601 lines"),
        ("mamba-1p1p1/mamba_ssm/csrc/scan.cpp", "\n" * 700, "scan.cpp has 700 lines"),
        (
            "main.py",
            "def is_pruned(model):\n    return model.methods.pruning\n",
            "main.py:2 names the method 'pruning'",
        ),
        ("main.py", "if task == 'detect':\n    pass\n", "main.py:1 names the task 'detect'"),
        ("engine.py", "def step(dyvm_meter):\n    pass\n", "engine.py:1 names the method 'dyvm'"),
        ("engine.py", "from fusion.pruning import Loss\n", "engine.py:1 names the method 'pruning'"),
    ],
)
def test_it_fails_when_it_should(file: str, text: str, told: str, tmp_path: Path) -> None:
    found = violations(write_tree(tmp_path, GOOD | {file: text}))
    assert any(told in each for each in found), found


def test_what_only_a_type_checker_sees_is_no_import(tmp_path: Path) -> None:
    text = "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    import models_mamba\n"
    assert violations(write_tree(tmp_path, GOOD | {"fusion/pruning.py": text})) == []


def test_help_and_docstrings_may_name_what_they_explain(tmp_path: Path) -> None:
    text = (
        "def add(p):\n    '''Flags of pruning.'''\n    p.add_argument('--task', default='classify', help='or detect')\n"
    )
    assert violations(write_tree(tmp_path, GOOD | {"main.py": text})) == []
