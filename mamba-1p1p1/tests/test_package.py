"""How both kernel packages are installed: one command, what their metadata say, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "pip install ./causal_conv1d ./mamba-1p1p1"


def test_one_command_gives_both_packages():
    """As pip resolves it, with what is installed here: `mamba_ssm` wants this very `causal_conv1d`."""
    assert COMMAND in (ROOT / "README.md").read_text(encoding="utf-8")
    options = ["--dry-run", "--quiet", "--no-index", "--no-build-isolation", "--report", "-"]
    command = [sys.executable, "-m", *COMMAND.split()[:2], *options, *COMMAND.split()[2:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {each["metadata"]["name"]: each["metadata"] for each in json.loads(done.stdout)["install"]}
    assert {name.replace("-", "_") for name in found} == {"causal_conv1d", "mamba_ssm"}
    for metadata in found.values():
        assert metadata["version"] == version("mamba_ssm")
        assert metadata["author"] == "The authors of this project"
        assert metadata["description"].startswith("# ")
        assert "Typing :: Typed" in metadata["classifier"]


@pytest.fixture
def alone(tmp_path):
    """A copy of the package's folder, and how to call its set-up where causal_conv1d is nowhere."""
    ignored = shutil.ignore_patterns("*.so", "build", "*.egg-info", "__pycache__")
    folder = shutil.copytree(ROOT / "mamba-1p1p1", tmp_path / "mamba-1p1p1", ignore=ignored)

    def call(*words, **variables):
        # -S leaves out the entries of editable installs; the packages themselves are still there
        environment = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib")} | variables
        command = [sys.executable, "-S", "setup.py", "--quiet", *words]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    return folder, call


def test_no_package_without_kernels_by_oversight(alone):
    folder, call = alone
    done = call("build_py")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("mamba_ssm: its C++ kernels share headers with causal_conv1d")
    done = call("build_py", MAMBA_SSM_WITHOUT_KERNELS="1")
    assert done.returncode == 0, done.stderr
    built = folder / "build" / "lib" / "mamba_ssm"
    assert (built / "py.typed").is_file()
    assert (built / "csrc" / "scan.cpp").is_file()


def test_source_archive_holds_its_tests(alone):
    folder, call = alone
    done = call("sdist")
    assert done.returncode == 0, done.stderr
    with tarfile.open(next((folder / "dist").iterdir())) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"tests/conftest.py", "tests/golden/scan_plain.npz", "mamba_ssm/py.typed", "mamba_ssm/csrc/scan_kernels.h"}
    assert wanted | {"faster_mamba_ssm.py", "selective_scan_cuda.py", "README.md"} <= names
