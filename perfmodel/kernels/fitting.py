"""Fitting a family of kernels: a frozen dataclass of positive floats to `perfmodel.fitting.Problem` and back.

A family is fitted to calls on devices. Calls that differ in sizes only are joined into one call of arrays, so that
hundreds of rows cost a handful of evaluations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from hardware.profile import HardwareProfile
from perfmodel import fitting
from perfmodel.kernels.call import Array, Parts, kind_of
from runtime.config import require


class Family(Protocol):
    """Fitted numbers that turn a call on a device into seconds."""

    def time(self, call: Any, hardware: HardwareProfile) -> Parts:
        """Seconds of the call by what they wait for."""


F = TypeVar("F", bound=Family)
Timed = tuple[Any, HardwareProfile]  # a call of the family, all its sizes scalars, and where it ran
_FIXED = (str, bool, type(None))  # fields of a call that are no sizes


@dataclass(frozen=True)
class _Joined:
    call: Any
    hardware: HardwareProfile
    rows: npt.NDArray[np.int64]


def _joined(calls: Sequence[Timed]) -> list[_Joined]:
    """Calls that differ in sizes only (equal names and switches, equal device) as one call of arrays each."""
    groups: dict[Any, list[int]] = {}
    for row, (call, hardware) in enumerate(calls):
        fixed = tuple(value for value in vars(call).values() if isinstance(value, _FIXED))
        groups.setdefault((type(call), hardware.name, fixed), []).append(row)
    joined = []
    for rows in groups.values():
        first, hardware = calls[rows[0]]
        sizes = {
            name: np.array([getattr(calls[row][0], name) for row in rows], dtype=float)
            for name, value in vars(first).items()
            if not isinstance(value, _FIXED)
        }
        joined.append(_Joined(dataclasses.replace(first, **sizes), hardware, np.array(rows)))
    return joined


def seconds_of(calls: Sequence[Timed], seconds: Callable[[Any, HardwareProfile], npt.ArrayLike]) -> Array:
    """[calls] what `seconds(call, device)` gives for each: a family's `bound`, or the seconds of its `time`."""
    found = np.zeros(len(calls))
    for part in _joined(calls):
        found[part.rows] = seconds(part.call, part.hardware)
    return found


def family_problem(
    start: F,
    calls: Sequence[Timed],
    measured: Sequence[float] | Array,
    series: Sequence[str],
    *,
    prior: float | Mapping[str, float] = 1.0,
    outlier: float = 0.1,
) -> fitting.Problem:
    """Every field of `start` is a parameter that falls back to its value there; `measured`: seconds by call.

    prior: by field, or one for all (see `Problem`); a field that the mapping lacks has 1.
    """
    require(len(calls) == len(measured), "every call must have its measured seconds")
    values = values_of(start)
    joined = _joined(calls)

    def predict(parameters: Mapping[str, float]) -> Array:
        kernels = dataclasses.replace(start, **parameters)  # type: ignore[type-var]
        found = np.zeros(len(calls))
        for part in joined:
            found[part.rows] = kernels.time(part.call, part.hardware).seconds
        return found

    priors = {name: prior.get(name, 1.0) for name in values} if isinstance(prior, Mapping) else prior
    kinds = [kind_of(call) for call, _ in calls]
    seconds = np.asarray(measured, dtype=float)
    return fitting.Problem(predict, seconds, series, values, priors, outlier, kinds=kinds if all(kinds) else None)


def values_of(kernels: F) -> dict[str, float]:
    """The fitted numbers by field; a family lets none be <= 0."""
    return {f.name: float(getattr(kernels, f.name)) for f in dataclasses.fields(kernels)}  # type: ignore[arg-type]
