"""Families of fitted numbers and the published points they are fitted to; predictions of points a fit has not seen."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from perfmodel import fitting
from perfmodel.kernels.fitting import Family, family_problem
from perfmodel.kernels.library import load_library
from perfmodel.published.points import KernelPoint, Point, ServedPoint
from perfmodel.published.served import served_problem
from runtime.config import require

Split = Literal["point", "series", "source"]
SPLITS: tuple[Split, ...] = ("point", "series", "source")


def family_of(point: Point) -> str:
    """The set of numbers that predicts a point: a kernel family, or an engine."""
    return point.family if isinstance(point, KernelPoint) else point.engine


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


def held_out(points: Sequence[Point], split: Split = "series") -> list[float | None]:
    """Seconds of every point by a fit of its family to points of other groups; None where there are none."""
    found: list[float | None] = [None] * len(points)
    names = groups(points, split)
    for members in by_family(points).values():
        own = [names[i] for i in members]
        if len(set(own)) < 2:
            continue
        seconds = fitting.held_out(problem([points[i] for i in members]), fitting.folds(own))
        for position, value in zip(members, np.asarray(seconds), strict=True):
            found[position] = float(value)
    return found
