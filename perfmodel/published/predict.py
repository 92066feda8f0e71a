"""Published points predicted: one predictor for each type of point, in the point's own unit."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hardware.files import UserError
from perfmodel.kernels.call import kind_of
from perfmodel.kernels.library import Library, load_library
from perfmodel.published.points import KernelPoint, Point, ServedPoint, TidarForwardPoint, TidarThroughputPoint

BEYOND = "its sizes are beyond what can be calculated"


@dataclass(frozen=True)
class Estimate:
    """Seconds of a point (per unit of its work), their bound, and the spread: 80% lie within exp(+-spread) of them."""

    seconds: float
    bound_seconds: float
    spread: float

    def in_unit(self, point: Point) -> tuple[float, float | None, float, float]:
        """Prediction, bound (None where nothing bounds it), and the interval's ends, low first, in the point's unit."""
        unit = point.unit
        ends = sorted(unit.value(self.seconds * math.exp(sign * self.spread)) for sign in (-1, 1))
        bound = unit.value(self.bound_seconds) if self.bound_seconds > 0 else None
        return unit.value(self.seconds), bound, ends[0], ends[1]


Predictor = Callable[[Any], Estimate]


def kernel_estimate(point: KernelPoint, library: Library | None = None) -> Estimate:
    """One call of a kernel by the library's numbers; UserError where the device cannot run it."""
    kernels = library or load_library()
    call, hardware = point.call, point.hardware
    seconds = getattr(kernels, point.family).time(call, hardware).seconds
    return Estimate(float(seconds), float(kernel_bound(point)), kernels.evidence[point.family].spread_of(kind_of(call)))


def kernel_bound(point: KernelPoint) -> float:
    """The call's roofline at datasheet peaks."""
    module = importlib.import_module(f"perfmodel.kernels.{point.family}")
    return float(module.bound(point.call, point.hardware))


def served_estimate(point: ServedPoint) -> Estimate:
    """A served model by its engine's profile; UserError where it does not fit the devices."""
    return served_estimates([point])[0]


def served_estimates(points: Sequence[ServedPoint]) -> list[Estimate]:
    """Served models by their engines' profiles; UserError where one does not fit the devices."""
    from perfmodel.published.served import UNKNOWN_SPREAD, engine_of, model_kind, served_seconds

    engines = {name: engine_of(name) for name in {point.engine for point in points}}
    seconds, bound = served_seconds(points, engines)
    spreads = [engines[point.engine].spread_of(model_kind(point)) or UNKNOWN_SPREAD for point in points]
    return [Estimate(float(s), float(b), spread) for s, b, spread in zip(seconds, bound, spreads, strict=True)]


def tidar_estimate(point: TidarForwardPoint | TidarThroughputPoint) -> Estimate:
    """A run of the ZAYA engine."""
    from perfmodel.tidar import estimate as of_run

    return Estimate(*of_run(point))


PREDICTORS: dict[type[Point], Predictor] = {
    KernelPoint: kernel_estimate,
    ServedPoint: served_estimate,
    TidarForwardPoint: tidar_estimate,
    TidarThroughputPoint: tidar_estimate,
}


def estimate(point: Point) -> Estimate | str:
    """The point's estimate, or why it has none: what the device or the model cannot do."""
    return _checked(point, lambda: PREDICTORS[type(point)](point))


def estimates(points: Sequence[Point]) -> list[Estimate | str]:
    """`estimate` of every point. Served points that differ in sizes alone are timed in one call, which is quicker."""
    from perfmodel.published.served import alike

    served = [(i, point) for i, point in enumerate(points) if isinstance(point, ServedPoint)]
    known: dict[int, Estimate] = {}
    for members in alike([point for _, point in served]):
        own = [served[member] for member in members]
        try:
            known.update(zip([i for i, _ in own], served_estimates([point for _, point in own]), strict=True))
        except (UserError, ArithmeticError, MemoryError):
            continue  # one of them cannot be timed: each by itself
    return [
        _checked(point, lambda found=known[i]: found) if i in known else estimate(point)  # type: ignore[misc]
        for i, point in enumerate(points)
    ]


def _checked(point: Point, predictor: Callable[[], Estimate]) -> Estimate | str:
    load_library()  # outside of what follows: a broken file is not the row's fault
    try:
        found = predictor()
        predicted, bound, low, high = found.in_unit(point)
    except UserError as error:
        return str(error)
    except (ArithmeticError, MemoryError):
        return BEYOND
    values = (found.seconds, predicted, low, high, 1.0 if bound is None else bound)
    if not all(0 < value < math.inf for value in values) or not found.bound_seconds < math.inf:
        return BEYOND
    return found
