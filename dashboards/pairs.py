"""Measurements beside their predictions, of one form wherever they come from: published, ours, local, uploaded.

docs/accuracy/rows.csv holds the published rows with predictions by numbers that were fitted without each row's series;
`python -m benchmarks.accuracy` writes it, because that takes a refit of all families.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from hardware.files import UserError
from perfmodel.published.evidence import FOLDER, PREDICTED, TABLES, Result, family_of
from perfmodel.published.points import KernelPoint, Point, ServedPoint, TidarForwardPoint
from perfmodel.published.rows import Row, number, read_rows
from runtime.config import require

Kind = Literal["published", "ours", "local", "upload"]
KINDS: tuple[Kind, ...] = ("published", "ours", "local", "upload")
Fit = Literal["held out", "fitted", "not fitted"]
FITS: tuple[Fit, ...] = ("held out", "fitted", "not fitted")
NO_CHECKOUT = "Published rows and this project's own measurements are part of a checkout, and this is none."
ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "docs" / "accuracy" / "rows.csv"
COLUMNS = tuple(
    "id status measured predicted shipped bound low high unit fit family operator device engine source series of "
    "measured_seconds predicted_seconds bound_seconds low_seconds high_seconds exception".split()
)
HELD_OUT_COMMAND = "ridgepoint validate --split series --json"


@dataclass(frozen=True)
class Pair:
    """A measurement and what was predicted for it.

    measured, predicted, bound, low, high: in `unit`; low and high hold 80% of rows like it, None where no interval is
    known. The seconds are the same as times of what `of` names. fit: what the numbers behind the prediction were fitted
    to; fit_detail says it in full. record: what is known of the measurement, by name. measured_by and predicted_by: the
    commands that repeat either; url: where it was published.
    """

    id: str
    kind: Kind
    family: str
    operator: str
    device: str
    engine: str
    source: str
    fit: Fit
    fit_detail: str
    of: str
    unit: str
    measured: float
    predicted: float
    bound: float | None
    low: float | None
    high: float | None
    measured_seconds: float
    predicted_seconds: float
    bound_seconds: float | None
    low_seconds: float | None
    high_seconds: float | None
    simulated: str | None = None
    exception: str | None = None
    record: tuple[tuple[str, str], ...] = ()
    measured_by: str | None = None
    predicted_by: str | None = None
    url: str | None = None

    @property
    def error(self) -> float:
        """(predicted - measured) / measured, in the row's own unit."""
        return self.predicted / self.measured - 1

    @property
    def below_bound(self) -> bool:
        """Whether the measurement is faster than datasheet peaks allow."""
        return self.bound_seconds is not None and self.measured_seconds < self.bound_seconds

    @property
    def inside(self) -> bool | None:
        """Whether the measurement lies in the interval; None where there is none."""
        return None if self.low is None or self.high is None else self.low <= self.measured <= self.high


@dataclass(frozen=True)
class Pairs:
    """What was found: pairs, how many rows have no prediction by reason, and what could not be read, a line each."""

    pairs: tuple[Pair, ...] = ()
    reasons: tuple[tuple[str, int], ...] = ()
    problems: tuple[str, ...] = ()


def joined(parts: Iterable[Pairs]) -> Pairs:
    """All of them as one; the most frequent reason first."""
    parts = list(parts)
    reasons: Counter[str] = Counter()
    for part in parts:
        reasons.update(dict(part.reasons))
    return Pairs(
        tuple(pair for part in parts for pair in part.pairs),
        tuple(reasons.most_common()),
        tuple(problem for part in parts for problem in part.problems),
    )


# --- published rows


def published_text(results: Sequence[Result], shipped: Sequence[Result]) -> str:
    """Results as CSV with `COLUMNS`, in their order; six digits, and no cell where there is no number.

    shipped: the same rows by the shipped numbers, which were fitted to most of them; a test sees by these that the file
    is of the present model.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for result, fitted in zip(results, shipped, strict=True):
        cells = _cells(result)
        if fitted.predicted is not None:
            cells["shipped"] = f"{fitted.predicted:.6g}"
        writer.writerow([cells.get(name, "") for name in COLUMNS])
    return stream.getvalue()


def _cells(result: Result) -> dict[str, str]:
    """What is known of a result, as text."""
    point = result.point
    cells = {"id": result.id, "status": result.status.split("; known:")[0], "unit": result.unit}
    if result.measured is not None:
        cells["measured"] = f"{result.measured:.6g}"
    if point is None:
        return cells
    numbers = {name: getattr(result, name) for name in ("predicted", "bound", "low", "high")}
    parts = ("measured", "predicted", "bound")
    seconds = {name: point.unit.seconds(value) for name in parts if (value := getattr(result, name))}
    ends = sorted(point.unit.seconds(v) for v in (result.low, result.high) if v)
    if len(ends) == 2:
        seconds |= {"low": ends[0], "high": ends[1]}
    cells |= {name: f"{value:.6g}" for name, value in numbers.items() if value is not None}
    cells |= {f"{name}_seconds": f"{value:.6g}" for name, value in seconds.items()}
    return cells | {
        "fit": result.fit or "",
        "family": family_of(point),
        "operator": point.operator,
        "device": point.hardware.name,
        "engine": point.engine,
        "source": point.source,
        "series": point.series,
        "of": _of(point),
        "exception": result.exception or "",
    }


def _of(point: Point) -> str:
    """What the seconds of a point are those of."""
    if isinstance(point, KernelPoint):
        return "one call"
    if isinstance(point, TidarForwardPoint):
        return "one rejection sampling" if point.part == "sampler" else f"one {point.part} forward"
    each = {"per_token": "a token of one sequence", "between_tokens": "the gap between two tokens of one sequence"}
    return each.get(point.metric if isinstance(point, ServedPoint) else "", "a token of all sequences together")


def published(path: Path = ROWS, folder: Path = FOLDER) -> Pairs:
    """The published rows of a checkout with the predictions that were committed. UserError: a file that is broken."""
    require(path.is_file() and folder.is_dir(), NO_CHECKOUT)
    rows = {row.id: row for name in TABLES for row in read_rows(folder / name)}
    lines = _lines(path)
    unknown = sorted({line["id"] for line in lines} - rows.keys())
    require(not unknown, f"{path.name} has rows that no table has, as {unknown[:1]}: run python -m benchmarks.accuracy")
    pairs = [_published_pair(line, rows[line["id"]]) for line in lines if line["status"] == PREDICTED]
    reasons = Counter(line["status"] for line in lines if line["status"] != PREDICTED)
    return Pairs(tuple(pairs), tuple(reasons.most_common()))


def _lines(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            require(
                tuple(reader.fieldnames or ()) == COLUMNS, f"{path.name} must have the columns {', '.join(COLUMNS)}"
            )
            lines = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path.name}: {error}") from error
    whole = [len(line) == len(COLUMNS) and all(isinstance(cell, str) for cell in line.values()) for line in lines]
    require(all(whole), f"{path.name} has a line with other than {len(COLUMNS)} cells")
    return lines


def _published_pair(line: dict[str, str], row: Row) -> Pair:
    def optional(name: str) -> float | None:
        value = number(line[name])
        require(value is not None or not line[name], f"{name} of {line['id']} must be a number, but is {line[name]!r}")
        return value

    def needed(name: str) -> float:
        value = optional(name)
        require(value is not None and 0 < value < math.inf, f"{name} of {line['id']} must be a positive number")
        assert value is not None
        return value

    return Pair(
        id=line["id"],
        kind="published",
        family=line["family"],
        operator=line["operator"],
        device=line["device"],
        engine=line["engine"],
        source=line["source"],
        fit=fit_of(line["fit"]),
        fit_detail=line["fit"],
        of=line["of"],
        unit=line["unit"],
        measured=needed("measured"),
        predicted=needed("predicted"),
        bound=optional("bound"),
        low=optional("low"),
        high=optional("high"),
        measured_seconds=needed("measured_seconds"),
        predicted_seconds=needed("predicted_seconds"),
        bound_seconds=optional("bound_seconds"),
        low_seconds=optional("low_seconds"),
        high_seconds=optional("high_seconds"),
        exception=line["exception"] or None,
        record=tuple((name, text) for name, text in row.cells.items() if text),
        predicted_by=HELD_OUT_COMMAND,
        url=_url(row),
    )


def fit_of(text: str) -> Fit:
    """The short form of what a result says about its fit: "held out by series", "fitted (...)", "not fitted (...)"."""
    if "held out" in text:
        return "held out"
    return "fitted" if text.startswith("fitted") else "not fitted"


def _url(row: Row) -> str | None:
    return row.cells.get("source_url") or row.cells.get("source") or None


def rows_of_file(results: Sequence[Result], rows: Sequence[Row], name: str) -> Pairs:
    """Rows of another file in a published table's form, by the shipped numbers; nothing is fitted to them."""
    pairs = []
    for result, row in zip(results, rows, strict=True):
        if result.status == PREDICTED:
            found = _published_pair({column: "" for column in COLUMNS} | _cells(result), row)
            command = f"ridgepoint validate --rows {name} --json"
            pairs.append(replace(found, id=f"{name}:{row.id}", kind="upload", predicted_by=command))
    reasons = Counter(r.status.split("; known:")[0] for r in results if r.status != PREDICTED)
    return Pairs(tuple(pairs), tuple(reasons.most_common()))
