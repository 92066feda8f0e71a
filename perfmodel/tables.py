"""Tables of operating points on disk, as CSV or Parquet, by pyarrow (imported when one is written)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from hardware.files import write_atomic
from runtime.config import require

SUFFIXES = (".csv", ".parquet")


def check_table_path(path: Path) -> None:
    """UserError, before anything is computed, for an ending that `write_table` cannot write."""
    require(path.suffix in SUFFIXES, f"a table's file name must end in {' or '.join(SUFFIXES)}, but is {path.name!r}")


def write_table(path: Path, columns: Mapping[str, npt.NDArray[Any]]) -> Path:
    """Write columns of one length atomically, as the file's ending says; NaN is an empty field. UserError as above."""
    check_table_path(path)
    return write_atomic(path, _csv(columns) if path.suffix == ".csv" else _parquet(columns))


def _table(columns: Mapping[str, npt.NDArray[Any]]) -> Any:
    import pyarrow

    return pyarrow.table({name: pyarrow.array(column, from_pandas=True) for name, column in columns.items()})


def _csv(columns: Mapping[str, npt.NDArray[Any]]) -> bytes:
    import pyarrow.csv

    sink = pyarrow.BufferOutputStream()
    options = pyarrow.csv.WriteOptions(include_header=False, quoting_style="needed")  # it quotes every header
    pyarrow.csv.write_csv(_table(columns), sink, options)
    return ",".join(columns).encode() + b"\n" + bytes(sink.getvalue())


def _parquet(columns: Mapping[str, npt.NDArray[Any]]) -> bytes:
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(_table(columns), sink)
    return bytes(sink.getvalue())
