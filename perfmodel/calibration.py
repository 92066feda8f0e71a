"""Fit an engine's few scales to measured forwards: per device and engine, never per workload."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import numpy as np

from hardware.profile import HardwareProfile
from perfmodel import fitting
from perfmodel.engine import EngineProfile, Fit
from perfmodel.experts import ExpertCoverage
from perfmodel.fitting import folds
from perfmodel.validation import MeasuredPoints, forwards, point_name
from runtime.config import require
from runtime.measurement import Measurement

# Log error beyond which a row's pull grows only linearly: other work on the machine must not bend the fit.
_OUTLIER = 0.1
# Log scale that costs as much as a row that is off by _OUTLIER: a parameter that no row shows keeps its value.
_PRIOR = 1.0
_VENDORS = ("AMD", "Intel", "NVIDIA")  # whose names stand in the names of their devices


def split(measurements: Sequence[Measurement], held_out: float) -> tuple[list[Measurement], list[Measurement]]:
    """Rows of forwards to fit to, and rows held out: about the share `held_out` of the operating points.

    The choice depends on the point's name alone, so that a point is wholly on one side and the split is repeatable.
    """
    require(0 <= held_out < 1, f"0 <= held_out < 1 must hold, but got {held_out}")
    kept: list[Measurement] = []
    apart: list[Measurement] = []
    for m in forwards(measurements):
        digest = hashlib.sha256(point_name(m, operator=False).encode()).digest()
        share = int.from_bytes(digest[:4], "big") / 2**32
        (apart if share < held_out else kept).append(m)
    return kept, apart


def require_device(measurements: Sequence[Measurement], hardware: HardwareProfile) -> None:
    """UserError where rows come from several machines, or from another kind of device or vendor than the profile's.

    Rows say what ran them by their fingerprint; one without it is taken on trust.
    """
    devices = {(str(m.device["device"]), str(m.device.get("cpu", ""))) for m in measurements if m.device.get("device")}
    names = ", ".join(sorted({device for device, _ in devices}))
    require(len(devices) <= 1, f"rows of one device are needed, but they come from {names}")
    for device, cpu in devices:
        kind = "cpu" if device == cpu else "gpu"
        require(
            kind == hardware.kind and (hardware.vendor.lower() in device.lower() or hardware.vendor not in _VENDORS),
            f"rows of {hardware.name} are needed ({hardware.vendor}, a {hardware.kind}), but they come from {device}, "
            f"a {kind}",
        )


def calibrate(
    measurements: Sequence[Measurement],
    hardware: HardwareProfile,
    engine: EngineProfile,
    *,
    source: str,
    expert_coverage: ExpertCoverage | str = "uniform",
    draws: int = 0,
) -> EngineProfile:
    """The engine with its scales fitted to the forwards among `measurements`, all from the device of `hardware`.

    Where operators were timed in place, they are fitted to as well: forwards alone hardly tell the scales apart.

    Robust least squares on the logarithm of predicted over measured seconds, with a weak pull to the starting scales.
    `draws` of a bootstrap over operating points give the scales' 90% intervals, and refits without an eighth of the
    points each the spread of what they predict; 0 leaves out both, which take most of the time.
    `source` says where the rows lie. UserError for fewer points than twice the parameters, and for rows of another
    device.
    """
    data = MeasuredPoints(forwards(measurements), hardware, expert_coverage)
    require_device(data.rows, hardware)
    names = [point_name(m, operator=False) for m in data.rows]
    points = tuple(sorted({point_name(m) for m in data.rows}))
    needed = 2 * len(engine.parameters)
    found = len(set(names))
    require(found >= needed, f"calibration needs at least {needed} operating points, but got {found}")

    def scaled(values: Mapping[str, float]) -> EngineProfile:
        return dataclasses.replace(engine, scale={p: values[p] for p in engine.parameters})

    problem = fitting.Problem(
        lambda values: data.predict(scaled(values))[0],
        data.measured,
        names,
        {p: engine.scale_of(p) for p in engine.parameters},
        prior=_PRIOR,
        outlier=_OUTLIER,
    )
    if draws:
        drawn = fitting.fit(problem, draws=draws, groups=folds(names))
        values, spread = drawn.values, drawn.spread
        intervals = {f"scale.{name}": interval for name, interval in drawn.intervals.items()}
    else:
        values, spread, intervals = fitting.solve(problem), None, {}
    error = float(np.median(np.abs(problem.predict(values) / data.measured - 1)))
    date = f"{datetime.now(UTC):%Y-%m-%d}"
    return dataclasses.replace(
        scaled(values),
        name=f"{engine.name.split('@')[0]}@{hardware.name}",
        sources={**engine.sources, "scale": f"fitted to {found} operating points of {source}, {date}"},
        fit=Fit(hardware.name, source, date, round(error, 4), points),
        intervals={**engine.intervals, **intervals},
        spread=spread if spread is not None else engine.spread,
        spreads={} if spread is not None else engine.spreads,
    )
