"""Published figures as rows of a CSV file, read strictly: columns are known, a broken cell is its own row's status."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hardware.files import UserError
from runtime.config import require

Table = Literal["gpu", "tidar"]
COLUMNS: dict[Table, tuple[str, ...]] = {
    "gpu": tuple(
        "id kind hardware model_or_op dtype engine batch context_or_shape metric value unit source_url notes".split()
    ),
    "tidar": tuple(
        "id hardware mode batch draft_tokens proposal_levels generated_tokens temperature metric value "
        "mean_acceptance_length source note".split()
    ),
}
LEAST, MOST = 1e-9, 1e15  # values and sizes beyond these are no measurement of anything
# Parts of a run's name that say device, mode, batch, drafts, levels and part of a step: columns say them too.
_SETTING = re.compile(r"h100|mi300x|sxm|ar|tf|sf|[bcKP]\d+|verify|draft|reject|2k", re.IGNORECASE)


@dataclass(frozen=True)
class Row:
    """One line of a table: its cells as text without outer spaces, and its value (None where that is broken).

    problem: why the line cannot be read, naming the cell; such a row keeps its place in every result.
    """

    id: str
    table: Table
    line: int
    cells: Mapping[str, str]
    value: float | None
    problem: str | None = None

    @property
    def unit(self) -> str:
        """The unit's name: a column of one table, the end of the metric's name in the other."""
        if self.table == "gpu":
            return self.cells["unit"]
        return {"throughput_tok_s": "tok/s", "forward_ms": "ms", "sampler_ms": "ms"}.get(self.cells["metric"], "")

    @property
    def known_value(self) -> float:
        """The value of a row without a problem."""
        assert self.value is not None
        return self.value

    @property
    def source(self) -> str:
        """Where the row comes from, short: the owner and name of a repository, or a host.

        Files of one repository are one source: whoever measured one of them measured the others.
        """
        text = self.cells["source_url" if self.table == "gpu" else "source"]
        repository = re.match(r"(?:https?://github\.com/)?([^/\s:]+/[^/\s]+)", text)
        if repository:
            return repository[1]
        host = re.match(r"https?://(?:www\.)?([^/]+)", text)
        return host[1] if host else text.split(" @")[0] or "not stated"

    @property
    def run(self) -> str:
        """Of a TiDAR row: the run that its name says it belongs to."""
        return "-".join(part for part in self.id.split("-") if not _SETTING.fullmatch(part))

    @property
    def series(self) -> str:
        """What rows share that one run of one program gave: device, operator or model, element type and engine."""
        if self.table == "gpu":
            return " | ".join(self.cells[c] for c in ("hardware", "model_or_op", "dtype", "engine"))
        return " | ".join((*(self.cells[c] for c in ("hardware", "mode", "metric")), self.run))


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a CSV file with exactly the columns of either table, in any order.

    UserError: a file that cannot be read or is empty, and columns that are unknown or missing. A line with a broken
    cell, or an id given before, is a row with a `problem`.
    """
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as stream:
            return parse_rows(stream, str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def parse_rows(stream: Iterable[str], path: str) -> list[Row]:
    """The rows in the lines of a CSV file; `path` names it. UserError as `read_rows`."""
    try:
        lines = list(csv.reader(stream, strict=True))
    except csv.Error as error:
        raise UserError(f"{path} is not valid CSV: {error}") from error
    require(len(lines) > 0, f"{path} is empty")
    header = [name.strip() for name in lines[0]]
    table = _table(header, path)
    rows: list[Row] = []
    seen: dict[str, int] = {}
    for number, cells in enumerate(lines[1:], start=2):
        if cells:  # a blank line
            rows.append(_row(table, header, cells, number, seen))
    require(len(rows) > 0, f"{path} has a header and no rows")
    return rows


def _table(header: list[str], path: str) -> Table:
    for table, columns in COLUMNS.items():
        if sorted(header) == sorted(columns):
            return table
    nearest = max(COLUMNS, key=lambda t: len(set(COLUMNS[t]) & set(header)))
    unknown = [name for name in header if name not in COLUMNS[nearest]]
    missing = [name for name in COLUMNS[nearest] if name not in header]
    twice = sorted({name for name in header if header.count(name) > 1})
    wrong = [
        f"{what} {', '.join(repr(n) for n in names)}"
        for what, names in (("unknown", unknown), ("missing", missing), ("given twice", twice))
        if names
    ]
    known = "; or ".join(", ".join(columns) for columns in COLUMNS.values())
    raise UserError(f"{path} must have the columns of a published table, but has {' and '.join(wrong)}; known: {known}")


def _row(table: Table, header: list[str], cells: list[str], line: int, seen: dict[str, int]) -> Row:
    problem = None
    if len(cells) != len(header):
        problem = f"line {line} has {len(cells)} cells, but the header has {len(header)}"
        cells = [*cells, *[""] * len(header)][: len(header)]
    text = {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
    name = text["id"]
    if not name:
        name = f"line {line}"
        problem = problem or f"line {line} has no id"
    elif name in seen:
        problem = problem or f"the id {name!r} of line {line} was given in line {seen[name]}"
    seen.setdefault(name, line)
    value = number(text["value"])
    if problem is None and (value is None or not LEAST <= value <= MOST):
        problem = f"value must be a number from {LEAST:g} to {MOST:g}, but is {text['value']!r}"
    return Row(name, table, line, text, value if problem is None else None, problem)


def number(text: str) -> float | None:
    """A finite number in plain notation, else None."""
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text, re.ASCII):
        return None
    value = float(text)
    return value if math.isfinite(value) else None
