"""Families of fitted numbers and the published points they are fitted to; predictions of points a fit has not seen."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from hardware.files import plain, read_yaml
from perfmodel import fitting, tidar
from perfmodel.engine import list_engines, load_engine
from perfmodel.kernels.call import Array
from perfmodel.kernels.fitting import Family, family_problem
from perfmodel.kernels.library import CLASSES, KernelFit, fit_file, load_library
from perfmodel.published.points import KernelPoint, Point, ServedPoint, TidarForwardPoint, TidarThroughputPoint
from perfmodel.published.predict import Estimate, estimates
from perfmodel.published.served import served_problem, with_numbers
from runtime.config import require

Split = Literal["point", "series", "source"]
SPLITS: tuple[Split, ...] = ("point", "series", "source")
LEAST_SERIES = 2  # of a fit: with one there is nothing to tell how far off another is


def family_of(point: Point) -> str:
    """The set of numbers that predicts a point: a kernel family, or an engine."""
    return point.family if isinstance(point, KernelPoint) else point.engine


def bundled_file(family: str) -> Path:
    """Where the shipped numbers of a kernel family or an engine stand."""
    return fit_file(family) if family in CLASSES else list_engines()[family]  # type: ignore[arg-type]  # a family


def kernel_start(family: str) -> Family:
    """The numbers that a fit of a kernel family starts from and falls back to."""
    module = importlib.import_module(f"perfmodel.kernels.{family}")
    found: Family = getattr(module, "START", None) or getattr(load_library(), family)
    return found


def kernel_problem(points: Sequence[KernelPoint]) -> fitting.Problem:
    """What fitting a kernel family to points of it means: seconds of calls, by series."""
    family = points[0].family
    require(all(p.family == family for p in points), "the points of a fit must be of one kernel family")
    module = importlib.import_module(f"perfmodel.kernels.{family}")
    return family_problem(
        kernel_start(family),
        [(p.call, p.hardware) for p in points],
        [p.measured_seconds for p in points],
        [p.series for p in points],
        prior=getattr(module, "PRIOR", 1.0),
    )


PROBLEMS: dict[type[Point], Callable[[Sequence[Point]], fitting.Problem]] = {
    KernelPoint: kernel_problem,  # type: ignore[dict-item]  # called with points of this type alone
    ServedPoint: served_problem,  # type: ignore[dict-item]
    TidarForwardPoint: tidar.tidar_problem,
    TidarThroughputPoint: tidar.tidar_problem,
}


def problem(points: Sequence[Point]) -> fitting.Problem:
    """The fit of the one family that the points belong to."""
    return PROBLEMS[type(points[0])](points)


def by_family(points: Sequence[Point]) -> dict[str, list[int]]:
    """Positions of the points of every family."""
    found: dict[str, list[int]] = {}
    for position, point in enumerate(points):
        found.setdefault(family_of(point), []).append(position)
    return found


def groups(points: Sequence[Point], split: Split) -> list[str]:
    """What is held out together with each point: itself, its series, or all of its source."""
    require(split in SPLITS, f"the split must be {', '.join(SPLITS)}, but is {split!r}")
    return [{"point": p.id, "series": p.series, "source": p.source}[split] for p in points]


@dataclass(frozen=True)
class HeldOut:
    """Seconds of a point by a fit that had not seen its group, and their spread, which its group had no part in."""

    seconds: float
    spread: float | None  # None: no other group tells


def held_out(points: Sequence[Point], split: Split = "series") -> list[HeldOut | None]:
    """Every point by a fit of its family to points of other groups; None where there are none.

    The spread is that of the held-out errors of other groups (of other series, where each point is one by itself), of
    the point's own kind where there are enough of them. A fit's own spread contains the point's error, so that counting
    how many points lie within it would flatter it.
    """
    found: list[HeldOut | None] = [None] * len(points)
    names = groups(points, split)
    for members in by_family(points).values():
        own = [names[i] for i in members]
        if len(set(own)) < 2:
            continue
        what = problem([points[i] for i in members])
        seconds = np.asarray(fitting.held_out(what, fitting.folds(own)))
        apart = own if split != "point" else [points[i].series for i in members]
        spreads = _spreads_of_others(np.abs(np.log(seconds / what.measured)), apart, what.kinds or [""] * len(members))
        for position, value, spread in zip(members, seconds, spreads, strict=True):
            found[position] = HeldOut(float(value), spread)
    return found


def _spreads_of_others(left: Array, names: Sequence[str], kinds: Sequence[str]) -> list[float | None]:
    """The 0.8 quantile of |log error| over rows with other names, of the same kind where there are enough."""
    own, kind_of = np.asarray(names), np.asarray(kinds)
    known: dict[tuple[str, str], float | None] = {}
    for name, kind in set(zip(names, kinds, strict=True)):
        others = own != name
        alike = others & (kind_of == kind)
        kept = alike if alike.sum() >= fitting.LEAST_OF_A_KIND else others
        known[name, kind] = float(np.quantile(left[kept], 0.8)) if kept.any() else None
    return [known[key] for key in zip(names, kinds, strict=True)]


@dataclass(frozen=True)
class FamilyFit:
    """A family fitted to published points: its numbers, how well they are known, and how far off on unseen series."""

    family: str
    fitted: fitting.Fitted
    fit: KernelFit


def fit_family(points: Sequence[Point], draws: int) -> FamilyFit:
    """The numbers of the one family that the points belong to. UserError for points of fewer than two series."""
    family = family_of(points[0])
    told = zip(points, estimates(points), strict=True)
    points = [point for point, found in told if isinstance(found, Estimate)]  # not what its device cannot do
    names = [p.series for p in points]
    series = len(set(names))
    require(
        series >= LEAST_SERIES,
        f"a fit of {family} needs rows of {LEAST_SERIES} series, but has {len(points)} of {series}",
    )
    what = problem(points)
    fitted = fitting.fit(what, draws=draws, groups=fitting.folds(names))
    errors = np.abs(fitting.held_out(what, fitting.folds(names)) / what.measured - 1)
    return FamilyFit(
        family,
        fitted,
        KernelFit(
            rows=len(points),
            series=series,
            source="measurements/published",
            date=f"{datetime.now(UTC):%Y-%m-%d}",
            held_out_mean_error=float(f"{np.mean(errors):.4g}"),
            held_out_median_error=float(f"{np.median(errors):.4g}"),
        ),
    )


def fitted_text(found: FamilyFit) -> str:
    """The YAML file of a fit, to stand where the bundled one does: a kernel family's numbers, or an engine."""
    values, intervals = found.fitted.values, {name: list(ends) for name, ends in found.fitted.intervals.items()}
    if found.family in CLASSES:
        head = "# Fitted to published rows by `ridgepoint calibrate --published`.\n"
        data: dict[str, Any] = {"numbers": values, "intervals": intervals, "spread": found.fitted.spread}
        if found.fitted.spreads:
            data["spreads"] = found.fitted.spreads
        return head + yaml.safe_dump({**data, "fit": vars(found.fit)}, sort_keys=False, default_flow_style=None)
    path = list_engines()[found.family]
    data = read_yaml(path)
    data.pop("spreads", None)
    if found.family == tidar.ENGINE:
        data |= tidar.engine_data(values)
    else:
        hosts = plain(with_numbers(load_engine(path), values).hosts)
        data["hosts"] = {host: {k: v for k, v in costs.items() if v} for host, costs in hosts.items()}
    data |= {"intervals": intervals, "spread": found.fitted.spread}
    if found.fitted.spreads:
        data["spreads"] = found.fitted.spreads
    data["sources"] = {**data.get("sources", {}), "hosts": in_words(found.fit)}
    comments = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.startswith("#")]
    return "".join(comments) + yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=118)


def in_words(fit: KernelFit) -> str:
    """What a fit was made from and how far off it is."""
    return (
        f"fitted to {fit.rows} rows of {fit.series} series in {fit.source}, {fit.date}; mean error of seconds "
        f"{fit.held_out_mean_error:.1%}, median {fit.held_out_median_error:.1%}, on series that the fit had not seen"
    )
