"""Fit an engine's few scales to measured forwards: per device and engine, never per workload."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from hardware.profile import HardwareProfile
from perfmodel.engine import PARAMETERS, EngineProfile, Fit
from perfmodel.experts import ExpertCoverage
from perfmodel.validation import MeasuredPoints, forwards, point_name
from runtime.config import require
from runtime.measurement import Measurement

# Log error beyond which a row's pull grows only linearly: other work on the machine must not bend the fit.
_OUTLIER = 0.1
# Log scale that costs as much as a row that is off by _OUTLIER: a parameter that no row shows keeps its value.
_PRIOR = 1.0


def split(measurements: Sequence[Measurement], held_out: float) -> tuple[list[Measurement], list[Measurement]]:
    """Forward rows to fit to, and rows held out: about the share `held_out` of the operating points.

    The choice depends on the point's name alone, so that a point is wholly on one side and the split is repeatable.
    """
    require(0 <= held_out < 1, f"0 <= held_out < 1 must hold, but got {held_out}")
    kept: list[Measurement] = []
    apart: list[Measurement] = []
    for m in forwards(measurements):
        digest = hashlib.sha256(point_name(m).encode()).digest()
        share = int.from_bytes(digest[:4], "big") / 2**32
        (apart if share < held_out else kept).append(m)
    return kept, apart


def calibrate(
    measurements: Sequence[Measurement],
    hardware: HardwareProfile,
    engine: EngineProfile,
    *,
    source: str,
    expert_coverage: ExpertCoverage | str = "uniform",
) -> EngineProfile:
    """The engine with its scales fitted to the forwards among `measurements`, all from the device of `hardware`.

    Robust least squares (soft L1) on the logarithm of predicted over measured seconds, with a weak pull to the
    starting scales. `source` says where the rows lie. UserError for fewer points than twice the parameters.
    """
    from scipy.optimize import least_squares

    data = MeasuredPoints(forwards(measurements), hardware, expert_coverage)
    points = tuple(sorted({point_name(m) for m in data.rows}))
    needed = 2 * len(PARAMETERS)
    require(len(points) >= needed, f"calibration needs at least {needed} operating points, but got {len(points)}")
    start = np.log([engine.scale_of(p) for p in PARAMETERS])

    def scaled(logs: Any) -> EngineProfile:
        scale = {p: float(value) for p, value in zip(PARAMETERS, np.exp(logs), strict=True)}
        return dataclasses.replace(engine, scale=scale)

    def residuals(logs: Any) -> Any:
        predicted, _ = data.predict(scaled(logs))
        return np.concatenate([np.log(predicted / data.measured), (logs - start) * (_OUTLIER / _PRIOR)])

    found = least_squares(residuals, start, loss="soft_l1", f_scale=_OUTLIER, bounds=(start - 5, start + 5))
    rounded = np.log([float(f"{v:.4g}") for v in np.exp(found.x)])
    fitted = scaled(rounded)
    predicted, _ = data.predict(fitted)
    error = float(np.median(np.abs(predicted / data.measured - 1)))
    date = f"{datetime.now(UTC):%Y-%m-%d}"
    return dataclasses.replace(
        fitted,
        name=f"{engine.name.split('@')[0]}@{hardware.name}",
        sources={**engine.sources, "scale": f"fitted to {len(points)} operating points of {source}, {date}"},
        fit=Fit(hardware.name, source, date, round(error, 4), points),
    )
