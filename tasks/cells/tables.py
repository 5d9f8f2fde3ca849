"""Tables of plates and cells: parquet, or text whose columns are parted by tabs, commas or semicolons."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils import UsageError, first_line, nearest

_PARQUET = b"PAR1"


@dataclass(frozen=True)
class Table:
    """The columns of the file `path`, each a list of text; what is empty, null or NaN is ''."""

    path: Path
    columns: dict[str, list[str]]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def column(self, name: str) -> list[str]:
        """One column. Raises UsageError, naming the file, if there is none of that name."""
        if name not in self.columns:
            close = nearest(name, self.columns) or f"; it has {', '.join(list(self.columns)[:10])}"
            raise UsageError(f"{self.path} has no column {name!r}{close}.")
        return self.columns[name]


def read_table(path: Path) -> Table:
    """Read a table, whichever of the formats its content shows it to be. Raises UsageError, naming the file."""
    try:
        with open(path, "rb") as file:
            is_parquet = file.read(len(_PARQUET)) == _PARQUET
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    table = Table(path, _read_parquet(path) if is_parquet else _read_text(path))
    if not len(table):
        raise UsageError(f"{path} has no rows; wanted a table.")
    return table


def _read_parquet(path: Path) -> dict[str, list[str]]:
    try:
        from pyarrow.parquet import read_table as read
    except ImportError:
        raise UsageError(f"{path} is a parquet file, which wants pyarrow; wanted pip install pyarrow.") from None
    try:
        columns = read(path).to_pydict()
    except Exception as error:  # its own, and what Python raises for values that it has no type for
        raise UsageError(f"{path} is no parquet file that can be read: {first_line(error)}.") from None
    return {str(name): [_text(value) for value in values] for name, values in columns.items()}


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    # a column of whole numbers with gaps is stored as floats
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _read_text(path: Path) -> dict[str, list[str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise UsageError(f"{path} is neither parquet nor text; wanted a table.")
        header = text.partition("\n")[0]
        separator = next((each for each in "\t,;" if each in header), ",")
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator))
    except UnicodeDecodeError:
        raise UsageError(f"{path} is neither parquet nor text; wanted a table.") from None
    except csv.Error as error:
        raise UsageError(f"{path} is no table: {error}.") from None
    names = [name.strip() for name in rows[0]] if rows else []
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"{path} has the column {twice!r} twice.")
    body = [(number, row) for number, row in enumerate(rows[1:], 2) if row]
    for number, row in body:
        if len(row) != len(names):
            raise UsageError(f"{path} has {len(row)} values in line {number}; wanted {len(names)}, as in its header.")
    cells = [["" if cell.strip().lower() == "nan" else cell.strip() for cell in row] for _, row in body]
    return {name: [row[place] for row in cells] for place, name in enumerate(names)}
