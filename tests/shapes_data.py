"""A small SHAPES, made as the program makes the whole one."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

from tasks.dense import shapes


def write_shapes(folder: Path, train: int = 12, test: int = 5) -> Path:
    """SHAPES with fewer canvases in `folder`, which must be empty or new."""
    with mock.patch.object(shapes, "COUNTS", {True: train, False: test}):
        return shapes.find_shapes(str(folder))
