"""Robust least squares on logarithms, with bootstrap intervals, and predictions of rows that a fit has not seen.

Every fitted number of the project comes through here: engines (`perfmodel.calibration`) and kernel families.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime.config import require

Array = npt.NDArray[np.float64]
Predict = Callable[[Mapping[str, float]], Array]  # parameters by name -> one positive number per row


@dataclass(frozen=True)
class Problem:
    """What to fit: `predict` gives all rows for some parameters; `series` names the series each row belongs to.

    start: the values that a parameter falls back to where no row shows it. prior: the log-scale distance from `start`
    that costs as much as one row off by `outlier`. Every parameter is positive and fitted in its logarithm.
    """

    predict: Predict
    measured: Array
    series: Sequence[str]
    start: Mapping[str, float]
    prior: float | Mapping[str, float] = 1.0
    outlier: float = 0.1
    weights: Array | None = None  # of rows; None: one each
    kinds: Sequence[str] | None = None  # of rows, whose spreads may differ

    def __post_init__(self) -> None:
        require(len(self.measured) == len(self.series), "every row must have a series")
        require(self.kinds is None or len(self.kinds) == len(self.measured), "every row must have a kind, or none")
        require(bool((np.asarray(self.measured) > 0).all()), "every measured value must be > 0")


@dataclass(frozen=True)
class Fitted:
    """Values by parameter, their bootstrap intervals (whole series drawn again), and the spread of what is left.

    spread: the 0.8 quantile of |log(predicted / measured)| over rows whose series the fit had not seen, where there
    are several series, else over the fitted rows: the estimate times or over exp(spread) is meant to hold 80% of rows.
    spreads: the same by kind of row, of kinds with enough rows to tell.
    """

    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    spread: float
    spreads: dict[str, float]


LEAST_OF_A_KIND = 15  # rows, for a spread of their own


def solve(problem: Problem, keep: npt.NDArray[np.bool_] | npt.NDArray[np.int64] | None = None) -> dict[str, float]:
    """The parameters for the rows that `keep` selects (a mask, or indices that may repeat; None: all)."""
    from scipy.optimize import least_squares

    names = list(problem.start)
    start = np.log([problem.start[name] for name in names])
    priors = problem.prior if isinstance(problem.prior, Mapping) else dict.fromkeys(names, problem.prior)
    pull = np.array([problem.outlier / priors[name] for name in names])
    every = np.arange(len(problem.measured))
    rows = every if keep is None else every[keep]
    weights = np.sqrt(np.ones(len(rows)) if problem.weights is None else problem.weights[rows])
    target = np.log(np.asarray(problem.measured)[rows])

    def residuals(logs: Array) -> Array:
        found = problem.predict(dict(zip(names, np.exp(logs).tolist(), strict=True)))[rows]
        return np.concatenate([weights * (np.log(found) - target), (logs - start) * pull])

    found = least_squares(residuals, start, loss="soft_l1", f_scale=problem.outlier, bounds=(start - 6, start + 6))
    return {name: float(f"{value:.4g}") for name, value in zip(names, np.exp(found.x), strict=True)}


def folds(names: Sequence[str], most: int = 8) -> list[str]:
    """Groups joined into at most `most` folds of about equal numbers of groups, by their names alone."""
    unique = sorted(set(names), key=lambda name: hashlib.sha256(name.encode()).digest())
    fold = {name: str(position % most) for position, name in enumerate(unique)}
    return [fold[name] for name in names]


def held_out(problem: Problem, groups: Sequence[str] | None = None) -> Array:
    """A prediction of every row by a fit to all rows of other groups (None: the problem's series)."""
    names = np.asarray(problem.series if groups is None else groups)
    found = np.zeros(len(problem.measured))
    for name in dict.fromkeys(names.tolist()):
        apart = names == name
        require(not apart.all(), "rows of several series are needed to hold one out")
        found[apart] = problem.predict(solve(problem, ~apart))[apart]
    return found


def fit(problem: Problem, *, draws: int = 40, seed: int = 0, groups: Sequence[str] | None = None) -> Fitted:
    """Values, 90% intervals by a bootstrap over series (over rows where there is one series), and the spread.

    A draw lacks a third of the series, so that what few of them show comes out nearer to its start than with all. An
    interval is therefore how far draws lie from their median, around the value.

    groups: what is held out together for the spread (None: each series).
    """
    values = solve(problem)
    names = np.asarray(problem.series)
    unique = np.unique(names)
    several = len(unique) > 1
    random = np.random.default_rng(seed)
    samples = []
    for _ in range(draws):
        if several:
            drawn = random.choice(unique, len(unique))
            keep = np.concatenate([np.flatnonzero(names == name) for name in drawn])
        else:
            keep = random.integers(0, len(names), len(names))
        samples.append(solve(problem, keep))
    intervals = {name: _interval(value, [sample[name] for sample in samples]) for name, value in values.items()}
    found = held_out(problem, groups) if several else problem.predict(values)
    left = np.abs(np.log(found / problem.measured))
    kinds = np.asarray(problem.kinds or [])
    spreads = {
        kind: _spread(left[kinds == kind]) for kind in np.unique(kinds) if (kinds == kind).sum() >= LEAST_OF_A_KIND
    }
    return Fitted(values, intervals, _spread(left), {str(kind): spread for kind, spread in spreads.items()})


def _interval(value: float, draws: Sequence[float]) -> tuple[float, float]:
    low, middle, high = np.quantile(draws, [0.05, 0.5, 0.95])
    return float(f"{value * low / middle:.4g}"), float(f"{value * high / middle:.4g}")


def _spread(left: Array) -> float:
    return float(f"{np.quantile(left, 0.8):.4g}")
