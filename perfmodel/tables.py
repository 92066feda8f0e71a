"""Tables of operating points on disk: CSV by the standard library, Parquet by pyarrow (imported when it is written)."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hardware.files import UserError, write_atomic
from runtime.config import require

SUFFIXES = (".csv", ".parquet")


def check_table_path(path: Path) -> None:
    """UserError, before anything is computed, for an ending that `write_table` cannot write."""
    require(path.suffix in SUFFIXES, f"a table's file name must end in {' or '.join(SUFFIXES)}, but is {path.name!r}")


def write_table(path: Path, columns: Mapping[str, npt.NDArray[Any]]) -> Path:
    """Write columns of one length atomically, as the file's ending says; NaN is an empty field. UserError as above."""
    check_table_path(path)
    return write_atomic(path, _csv(columns) if path.suffix == ".csv" else _parquet(columns))


def _csv(columns: Mapping[str, npt.NDArray[Any]]) -> str:
    def values(column: npt.NDArray[Any]) -> list[Any]:
        listed = column.tolist()
        if column.dtype.kind == "f" and np.isnan(column).any():
            return ["" if value != value else value for value in listed]
        return listed

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*map(values, columns.values()), strict=True))
    return text.getvalue()


def _parquet(columns: Mapping[str, npt.NDArray[Any]]) -> bytes:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("a .parquet file needs pyarrow: install it, or name a .csv file") from error
    table = pyarrow.table({name: pyarrow.array(column, from_pandas=True) for name, column in columns.items()})
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    return bytes(sink.getvalue())
