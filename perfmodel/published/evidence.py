"""Published rows against predictions: per row, and in summary by family, operator, source, device and engine."""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from perfmodel.published import fits
from perfmodel.published.interpret import interpret
from perfmodel.published.names import Catalog
from perfmodel.published.points import KernelPoint, Point, ServedPoint, TidarThroughputPoint
from perfmodel.published.predict import Estimate, estimates
from perfmodel.published.rows import Row, read_rows
from runtime.config import require

FOLDER = Path(__file__).resolve().parents[2] / "measurements" / "published"  # in a checkout; not packaged
TABLES = ("gpu_measured.csv", "zaya_tidar_measured.csv")
PREDICTED = "predicted"
Dimension = Literal["family", "operator", "source", "device", "engine"]
DIMENSIONS: tuple[Dimension, ...] = ("family", "operator", "source", "device", "engine")


@dataclass(frozen=True)
class Result:
    """A row and what was predicted for it, in the row's unit; all None but `measured` where status is a reason.

    low and high: the interval that is meant to hold 80% of rows like it. fit: whether the numbers behind the prediction
    were fitted to this row ("fitted", "not fitted", "not fitted (its series fitted)", "held out by series", or "engine
    held out by source": its kernels may be fitted to kernel rows of that source). exception: what is known to be odd.
    """

    id: str
    status: str
    unit: str
    measured: float | None
    predicted: float | None = None
    bound: float | None = None
    low: float | None = None
    high: float | None = None
    fit: str | None = None
    exception: str | None = None
    point: Point | None = None

    @property
    def error(self) -> float:
        """(predicted - measured) / measured, of a predicted row."""
        assert self.predicted is not None and self.measured is not None
        return self.predicted / self.measured - 1

    @property
    def below_bound(self) -> bool:
        """Whether the row claims to be faster than datasheet peaks allow: a time below the bound, a rate above it."""
        if self.point is None or self.measured is None or self.bound is None:
            return False  # not predicted, or nothing bounds it
        return self.measured > self.bound if self.point.unit.is_rate else self.measured < self.bound


@dataclass(frozen=True)
class Group:
    """Errors of some rows as shares of what was measured, each in its own unit.

    bias: the median signed error. rank_correlation: Spearman's, of measured and predicted seconds; None for fewer than
    three rows. coverage: share of rows within their interval. below_bound: ids of rows beyond datasheet peaks.
    """

    by: str
    name: str
    fit: str
    count: int
    median_absolute_error: float
    mean_absolute_error: float
    bias: float
    rank_correlation: float | None
    coverage: float
    below_bound: tuple[str, ...]


@dataclass(frozen=True)
class Direction:
    """Of samplers measured beside autoregressive decoding: how often the faster of the two was predicted to be."""

    comparable: int
    right: int
    wrong: tuple[str, ...]  # ids


class Oddities:
    """Why some rows are no measure of a prediction: what their own notes suspect, and what exceptions.csv says."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._reasons: dict[str, str] = {}
        path = folder / "exceptions.csv"
        if path.exists():
            with path.open(encoding="utf-8", newline="") as stream:
                self._reasons = {line["id"]: line["reason"] for line in csv.DictReader(stream)}

    def of(self, row: Row) -> str | None:
        """The reason, or None for a row like others."""
        notes = row.cells.get("notes") or row.cells.get("note") or ""
        suspected = re.search(r"SUSPECT[^;]*", notes)
        return self._reasons.get(row.id) or (suspected[0].strip() if suspected else None)


def shipped_rows(folder: Path = FOLDER) -> list[Row]:
    """The published rows of a checkout; UserError elsewhere."""
    require(folder.is_dir(), "the published rows are part of a checkout (measurements/published), and this is none")
    return [row for name in TABLES for row in read_rows(folder / name)]


@cache
def fitted_rows(folder: Path = FOLDER) -> frozenset[tuple[str, float, str]] | None:
    """Id, value and series of the rows that the shipped numbers were fitted to; None where no tables are at hand."""
    if not all((folder / name).exists() for name in TABLES):
        return None
    return frozenset((point.id, point.measured, point.series) for point in fitted_points(folder))


def _fit_of(row: Row, folder: Path) -> str:
    """Whether the shipped numbers were fitted to this row. Another file's row of the same id may be another row."""
    known = fitted_rows(folder)
    if known is None:
        return "unknown"
    if (row.id, row.value, row.series) in known:
        return "fitted"
    return "not fitted (its series fitted)" if row.series in _fitted_series(folder) else "not fitted"


@cache
def _fitted_series(folder: Path) -> frozenset[str]:
    return frozenset(series for _, _, series in fitted_rows(folder) or ())


def fitted_points(folder: Path = FOLDER) -> list[Point]:
    """The shipped rows that fits use: interpreted, not odd, and not of the one series that their family has."""
    catalog, odd = Catalog(), Oddities(folder)
    found = [interpret(row, catalog) for row in shipped_rows(folder) if odd.of(row) is None]
    points = [point for point in found if not isinstance(point, str)]
    enough = {
        position
        for members in fits.by_family(points).values()
        if len({points[i].series for i in members}) >= fits.LEAST_SERIES
        for position in members
    }
    return [point for position, point in enumerate(points) if position in enough]


def predicted_rows(rows: Sequence[Row], folder: Path = FOLDER, *, paths: bool = True) -> list[Result]:
    """Every row by the shipped numbers, nothing fitted. paths: rows may name files of profiles and models."""
    catalog, odd = Catalog(paths), Oddities(folder)
    points = [interpret(row, catalog) for row in rows]
    return [
        _result(row, point, told, _fit_of(row, folder), odd.of(row))
        for row, point, told in zip(rows, points, _estimated(points), strict=True)
    ]


def _estimated(points: Sequence[Point | str]) -> list[Estimate | str]:
    """By the shipped numbers; what is no point keeps its reason."""
    told = iter(estimates([point for point in points if not isinstance(point, str)]))
    return [point if isinstance(point, str) else next(told) for point in points]


def held_out_rows(rows: Sequence[Row], split: fits.Split, folder: Path = FOLDER) -> list[Result]:
    """Every row by numbers that were fitted without its group; odd rows and lone groups by the shipped numbers.

    Its interval comes from the errors of other groups (see `fits.held_out`). Odd rows are in no fit.
    """
    catalog, odd = Catalog(), Oddities(folder)
    points = [interpret(row, catalog) for row in rows]
    shipped = _estimated(points)
    used = [
        i
        for i, (row, found) in enumerate(zip(rows, shipped, strict=True))
        if isinstance(found, Estimate) and odd.of(row) is None
    ]
    without = dict(zip(used, fits.held_out([points[i] for i in used], split), strict=True))  # type: ignore[misc]
    results = []
    for i, (row, point, found) in enumerate(zip(rows, points, shipped, strict=True)):
        apart, fit = without.get(i), _fit_of(row, folder)
        if apart is not None and isinstance(found, Estimate):
            spread = found.spread if apart.spread is None else apart.spread
            found, fit = Estimate(apart.seconds, found.bound_seconds, spread), f"held out by {split}"
            if split == "source" and isinstance(point, ServedPoint):
                fit = f"engine {fit}"
        elif fit == "fitted":
            fit = f"fitted (its family has no other {split})"
        results.append(_result(row, point, found, fit, odd.of(row)))
    return results


def _result(row: Row, point: Point | str, found: Estimate | str, fit: str, odd: str | None) -> Result:
    if isinstance(point, str) or isinstance(found, str):
        return Result(row.id, str(found), row.unit, row.value)
    predicted, bound, low, high = found.in_unit(point)
    return Result(row.id, PREDICTED, row.unit, row.value, predicted, bound, low, high, fit, odd, point)


def summarise(results: Iterable[Result]) -> list[Group]:
    """Groups of predicted rows by every dimension and by what was fitted; rows without a prediction are left out."""
    predicted = [r for r in results if r.status == PREDICTED]
    found = []
    for by in DIMENSIONS:
        of = _of(by)
        names = sorted({(of(r), r.fit or "") for r in predicted})
        found += [
            _group(by, name, fit, [r for r in predicted if (of(r), r.fit or "") == (name, fit)]) for name, fit in names
        ]
    return found


def _of(by: Dimension) -> Callable[[Result], str]:
    def name(result: Result) -> str:
        point = result.point
        assert point is not None  # of a predicted row
        if by == "device":
            return point.hardware.name
        if by == "family":
            return family_of(point)
        return {"operator": point.operator, "source": point.source, "engine": point.engine}[by]

    return name


def family_of(point: Point) -> str:
    """The family of a point's operator: "gemm", "served TPOT", "tidar throughput"."""
    words = point.operator.split(" ")
    return words[0] if isinstance(point, KernelPoint) else " ".join(words[:2])


def _group(by: str, name: str, fit: str, members: Sequence[Result]) -> Group:
    errors = np.array([r.error for r in members])
    inside = [r.low <= r.measured <= r.high for r in members if r.low and r.high and r.measured]
    return Group(
        by,
        name,
        fit,
        len(members),
        float(np.median(np.abs(errors))),
        float(np.mean(np.abs(errors))),
        float(np.median(errors)),
        _rank_correlation(members),
        sum(inside) / len(members),
        tuple(r.id for r in members if r.below_bound),
    )


def _rank_correlation(members: Sequence[Result]) -> float | None:
    """Spearman's, over seconds; None where there are fewer than three rows, or all are equal."""
    if len(members) < 3:
        return None
    pairs = [[r.point.unit.seconds(v) for v in (r.measured, r.predicted) if v] for r in members if r.point]
    measured, predicted = (_ranks(np.array(values)) for values in zip(*pairs, strict=True))
    if np.ptp(measured) == 0 or np.ptp(predicted) == 0:
        return None
    return float(np.corrcoef(measured, predicted)[0, 1])


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Ranks with ties at their mean."""
    ordered = np.sort(values)
    return np.asarray((np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / 2)


def compared(results: Iterable[Result]) -> list[tuple[Result, Result]]:
    """Each throughput with drafts beside an autoregressive one of the same run, device, batch and length."""
    runs: dict[tuple[str, str, int, float], list[Result]] = {}
    for result in results:
        point = result.point
        if isinstance(point, TidarThroughputPoint):
            key = (point.prefix, point.hardware.name, point.batch, point.generated_tokens)
            runs.setdefault(key, []).append(result)
    return [
        (result, other)
        for members in runs.values()
        for other in members
        for result in members
        if _sampler(other) == "autoregressive" != _sampler(result)
    ]


def direction(results: Iterable[Result]) -> Direction:
    """Rows of one run, device and batch: whether a sampler beats autoregressive decoding as it was measured to."""
    pairs, wrong = compared(results), []
    for result, other in pairs:
        # Tokens per second: more is better.
        measured = math.copysign(1, (result.measured or 0) - (other.measured or 0))
        predicted = math.copysign(1, (result.predicted or 0) - (other.predicted or 0))
        if measured != predicted:
            wrong.append(result.id)
    return Direction(len(pairs), len(pairs) - len(wrong), tuple(wrong))


def _sampler(result: Result) -> str:
    assert isinstance(result.point, TidarThroughputPoint)
    return result.point.decoding.sampler


def row_of(result: Result) -> dict[str, Any]:
    """A result as it stands in a JSON document."""
    names = ("id", "measured", "predicted", "bound", "low", "high", "unit", "status", "fit", "exception")
    return {name: getattr(result, name) for name in names}


def statuses(results: Iterable[Result]) -> dict[str, int]:
    """How many rows have each status, the most frequent first."""
    return dict(Counter(r.status for r in results).most_common())
