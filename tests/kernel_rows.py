"""What the tests of kernel families share: the devices, the committed rows of a family, and what its numbers claim."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from hardware.files import UserError
from hardware.profile import HardwareProfile, list_profiles, load_profile
from perfmodel import fitting
from perfmodel.decoding import ForwardTiming, Setting
from perfmodel.kernels.call import Array, FusedMoe, Parts, main_bandwidth
from perfmodel.kernels.fitting import values_of
from perfmodel.kernels.library import Family, load_library
from perfmodel.published import fits
from perfmodel.published.interpret import interpret
from perfmodel.published.names import Catalog
from perfmodel.published.points import KernelPoint
from perfmodel.published.rows import read_rows

DEVICES = [profile for profile in map(load_profile, sorted(list_profiles())) if profile.kind == "gpu"]


@cache
def _all_points() -> tuple[KernelPoint, ...]:
    catalog = Catalog()
    found = (interpret(row, catalog) for row in read_rows("measurements/published/gpu_measured.csv"))
    return tuple(p for p in found if isinstance(p, KernelPoint))


def points(family: Family) -> list[KernelPoint]:
    """The committed rows of the family that can be read."""
    return [p for p in _all_points() if p.family == family]


def held_out_errors(family: Family) -> Array:
    """|predicted / measured - 1| of every row by a fit that has not seen its series."""
    problem = fits.kernel_problem(points(family))
    return np.abs(fitting.held_out(problem) / problem.measured - 1)


def rows_below_their_bound(family: Family, bound: Any) -> list[str]:
    """Ids of rows that claim to be faster than datasheet peaks allow."""
    return [p.id for p in points(family) if p.measured_seconds < float(bound(p.call, p.hardware))]


def reading_over_achieved(forward: ForwardTiming, at: Setting) -> float:
    """Seconds in which an engine's experts read and multiply, over those of their weights at the achieved bandwidth.

    By the library and the engine's factor alone, whatever a bound then makes of them.
    """
    (experts,) = (op for op in forward.operators if op.name == "experts")
    assert at.device.library is not None
    seconds = 0.0
    for count, call in experts.executed.calls:
        assert isinstance(call, FusedMoe)
        parts = at.device.library.moe.time(call, at.device.hardware)
        seconds += float(np.sum(count * (parts.memory + parts.compute)))
    least = float(np.sum(experts.executed.weight_bytes)) / main_bandwidth(at.device.hardware)
    return at.host_costs.factor("moe") * seconds / least


def assert_fitted(family: Family) -> None:
    """The committed numbers are what the committed rows give, and the file says truly how many those are."""
    library = load_library()
    problem = fits.kernel_problem(points(family))
    assert values_of(getattr(library, family)) == pytest.approx(fitting.solve(problem), rel=0.02)
    evidence = library.evidence[family]
    assert set(evidence.intervals) == set(problem.start)
    assert (evidence.fit.rows, evidence.fit.series) == (len(problem.measured), len(set(problem.series)))


def assert_parts(parts: Parts) -> None:
    """No part is negative, and they add up to the whole."""
    assert all((np.asarray(part) >= 0).all() for part in parts)
    assert np.allclose(parts.seconds, parts.memory + parts.compute + parts.overhead, rtol=1e-12, atol=0)


def can(bound: Any, call: Any, device: HardwareProfile) -> bool:
    """Whether the device multiplies the element types of the call."""
    try:
        bound(call, device)
    except UserError:
        return False
    return True
