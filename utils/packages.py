"""Imported before all that needs them: whether the kernel packages are those of this checkout."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# the kernel packages, and what those of other projects with their names do not have
OWN_PACKAGES = {"causal_conv1d": "backend.py", "mamba_ssm": "kernels"}


def require_own_packages() -> None:
    """Raise ImportError, which a program that it ends tells in one sentence, unless both kernel packages are those of
    this checkout. None is imported: another project's may not load at all."""
    wanted = "wanted the one of this checkout: bash scripts/setup.sh, or pip install ./causal_conv1d ./mamba-1p1p1"
    for name, part in OWN_PACKAGES.items():
        spec = find_spec(name)
        folders = spec.submodule_search_locations or () if spec is not None else ()
        if any(Path(folder, part).exists() for folder in folders):
            continue
        told = "another project's" if folders else "missing"
        error = ImportError(f"{name} is {told}; {wanted}.")
        sys.excepthook = partial(_tell, error, sys.excepthook)
        raise error


def _tell(mistake: ImportError, otherwise: Callable[..., None], kind: type, error: BaseException, trace: Any) -> None:
    if error is mistake:
        print(f"{Path(sys.argv[0]).name or 'python'}: error: {error}", file=sys.stderr)
    else:
        otherwise(kind, error, trace)


require_own_packages()
