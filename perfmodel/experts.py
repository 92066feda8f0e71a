"""How many distinct experts a forward reads per layer: an input with a name, since it decides the weight bytes."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from hardware.files import UserError, known
from runtime.config import require
from runtime.routing import RoutingFacts, read_routing

Array = npt.NDArray[np.float64]
Kind = Literal["uniform", "all", "min", "correlated", "zipf", "measured"]
_KINDS = ("uniform", "all", "min", "correlated", "zipf", "measured")
_FORM = re.compile(r"(?P<kind>[a-z]+)(?:\((?P<number>[^)]*)\)|:(?P<path>.+))?")


@dataclass(frozen=True)
class CoveragePoint:
    """Distinct experts of a layer that one kind of forward was seen to touch; see `ForwardKind` for the kinds."""

    kind: str
    batch: float
    slots: float
    distinct: float
    skip_share: float = 0.0


@dataclass(frozen=True)
class ExpertCoverage:
    """Distinct experts of a layer that a forward of batch x slots tokens touches.

    uniform: every token picks an expert independently and evenly. correlated: each further token of a sequence's block
    repeats an earlier choice with probability `rho`, else picks evenly. zipf: every token picks independently, the r-th
    most popular expert of a layer in proportion to r^-exponent (0: evenly). all, min: the two limits that published
    tools assume (every expert; as few as tokens allow one each, min(E, T)). measured: points recorded by the runtime,
    those of `of(kind)` where it names one, and interpolated.
    `skip_share` is the share of tokens routed to the skip expert, which reads nothing (measured counts exclude it).
    `experts` is what the recorded model has, where that is known.
    """

    kind: Kind = "uniform"
    rho: float = 0.0
    skip_share: float = 0.0
    measured: tuple[CoveragePoint, ...] = ()
    experts: int | None = None
    exponent: float = 0.0

    def __post_init__(self) -> None:
        require(0 <= self.rho <= 1, f"0 <= rho <= 1 must hold, but got {self.rho}")
        require(0 <= self.exponent <= 5, f"0 <= exponent <= 5 must hold, but got {self.exponent}")
        require(0 <= self.skip_share < 1, f"0 <= skip_share < 1 must hold, but got {self.skip_share}")
        if self.kind != "measured":
            return
        require(len(self.measured) >= 1, "measured coverage must have at least one point")
        for p in self.measured:
            require(
                p.batch >= 1 and p.slots >= 1 and p.distinct >= 0,
                f"a point of measured coverage must have batch >= 1, slots >= 1 and experts >= 0, but got {p}",
            )

    def of(self, kind: str) -> ExpertCoverage:
        """The coverage of one kind of forward: what was measured of it, where blocks of one slot are decoded tokens.

        Where nothing was, and for every other coverage, it is this one as it is.
        """
        own = [p for p in self.measured if p.kind == kind]
        if not own:
            return self
        near = [p for p in self.measured if p.kind == "decode" and kind != "decode"]
        skipped = float(np.mean([p.skip_share for p in own]))
        return dataclasses.replace(self, measured=(*own, *near), skip_share=skipped)

    def distinct(self, batch: npt.ArrayLike, slots: npt.ArrayLike, experts: int, per_token: int = 1) -> Array:
        """Expected distinct experts, broadcast over `batch` and `slots`; at most `experts`.

        uniform: E (1 - (1 - p)^T) with p = k (1 - skip_share) / E, T = batch * slots, where every token takes k =
        `per_token` different ones. correlated: the same with 1 + (slots - 1)(1 - rho) independent choices per
        sequence. zipf: sum over experts of 1 - exp(-T c r^-exponent), with the c that makes it k (1 - skip_share) for
        one token (a token's k different choices as the first k of E exponential clocks). Raises UserError beyond what
        was measured, and for another number of experts than the recorded model's.
        """
        batch, slots = np.asarray(batch, dtype=float), np.asarray(slots, dtype=float)
        tokens = batch * slots
        if self.kind == "all":
            return np.full(tokens.shape, float(experts))
        if self.kind == "min":
            return np.minimum(experts, tokens * per_token * (1 - self.skip_share))
        if self.kind == "measured":
            require(
                self.experts in (None, experts),
                f"expert coverage was measured on a model of {self.experts} experts, but this one has {experts}",
            )
            return np.minimum(self._interpolate(batch, slots, experts), experts)
        if self.kind == "zipf":
            logs, hit = _zipf(self.exponent, per_token * (1 - self.skip_share), experts)
            return np.interp(np.log2(np.maximum(tokens, _LEAST_TOKENS)), logs, hit)
        choices = batch * (1 + (slots - 1) * (1 - self.rho)) if self.kind == "correlated" else tokens
        rate = per_token * (1 - self.skip_share) / experts
        return experts * -np.expm1(choices * math.log1p(-rate)) if rate < 1 else np.full(tokens.shape, float(experts))

    def _interpolate(self, batch: Array, slots: Array, experts: int) -> Array:
        """Each recorded block length is a curve over log batch; between the nearest two that reach the batch, linear
        in log slots. Where only shorter or only longer blocks do, the nearest that reaches as many tokens in all."""
        batch, slots = np.broadcast_arrays(batch, slots)
        curves = _curves(self.measured, experts, 1 - self.skip_share)
        shorter, longer = _nearest(curves, batch, slots, lambda s: batch)
        same, _ = shorter
        between = (np.log(slots) - np.log(same)) / np.maximum(np.log(longer[0]) - np.log(same), np.finfo(float).tiny)
        found = shorter[1] + np.clip(between, 0, 1) * (longer[1] - shorter[1])
        if np.isnan(found).any():
            below, above = _nearest(curves, batch, slots, lambda s: batch * slots / s)
            for one_sided in (below[1], above[1]):
                found = np.where(np.isnan(found), one_sided, found)
        missing = np.isnan(found)
        if missing.any():
            first = int(np.flatnonzero(missing)[0])
            most = max(p.batch * p.slots for p in self.measured)
            raise UserError(
                f"measured expert coverage reaches {most:.0f} tokens per forward, but {batch.flat[first]:.0f} x "
                f"{slots.flat[first]:.0f} tokens are asked for: record more or name another coverage"
            )
        return found

    def __str__(self) -> str:
        """The name a prediction carries; `parse_coverage` reads it back, except for measured pairs."""
        if self.kind == "correlated":
            return f"correlated({self.rho:g})"
        if self.kind == "zipf":
            return f"zipf({self.exponent:g})"
        return f"uniform({self.skip_share:g})" if self.kind == "uniform" and self.skip_share else self.kind


def parse_coverage(text: str) -> ExpertCoverage:
    """Read `uniform`, `uniform(SKIP_SHARE)`, `correlated(RHO)`, `zipf(EXPONENT)`, `all`, `min` or
    `measured:FILE.json`.

    The file holds routing facts (`runtime.routing`), which `python -m benchmarks.routing` writes.
    """
    match = _FORM.fullmatch(text)
    kind = match["kind"] if match else ""
    if match is None or kind not in _KINDS:
        raise known(
            "expert coverage",
            text,
            (*_KINDS[:3], "uniform(SKIP_SHARE)", "correlated(RHO)", "zipf(EXPONENT)", "measured:FILE"),
        )
    if kind == "measured":
        require(match["path"] is not None, "measured expert coverage needs its file: measured:FILE.json")
        return load_measured(Path(match["path"]))
    require(match["path"] is None, f"only measured expert coverage takes a file, but got {text!r}")
    number = _number(match["number"], text)
    if kind == "correlated":
        require(number is not None, "correlated expert coverage needs its correlation: correlated(0.3)")
        return ExpertCoverage("correlated", rho=number or 0.0)
    if kind == "zipf":
        require(number is not None, "zipf expert coverage needs its exponent: zipf(0.9)")
        return ExpertCoverage("zipf", exponent=number or 0.0)
    if kind == "uniform":
        return ExpertCoverage("uniform", skip_share=number or 0.0)
    require(number is None, f"{kind} expert coverage takes no number, but got {text!r}")
    return ExpertCoverage("all" if kind == "all" else "min")


def _number(text: str | None, whole: str) -> float | None:
    if text is None:
        return None
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"expert coverage {whole!r} must have a number in its brackets") from error


def load_measured(path: Path) -> ExpertCoverage:
    """Read coverage that the runtime recorded (`runtime.routing`, written by `benchmarks.routing`)."""
    return coverage_of(read_routing(path))


def coverage_of(facts: RoutingFacts) -> ExpertCoverage:
    """The points of routing facts; the skip share is the mean over them until `of` names a kind."""
    points = tuple(
        CoveragePoint(p.kind, p.batch, p.slots, p.distinct, facts.skip_share(p.kind, p.slots)) for p in facts.points
    )
    skipped = float(np.mean([p.skip_share for p in points]))
    return ExpertCoverage("measured", skip_share=skipped, measured=points, experts=facts.experts)


def fit_rho(measured: ExpertCoverage, experts: int) -> float:
    """The rho with which `correlated` is closest to measured points of blocks, in least squares."""
    blocks = [p for p in measured.measured if p.slots > 1]
    require(len(blocks) > 0, "a correlation within blocks needs points with more than one slot")
    batch, slots, distinct = np.array([(p.batch, p.slots, p.distinct) for p in blocks]).T

    def error(rho: float) -> float:
        said = ExpertCoverage("correlated", rho, measured.skip_share).distinct(batch, slots, experts)
        return float(((said - distinct) ** 2).sum())

    return min(np.linspace(0, 1, 1001).tolist(), key=error)


_LEAST_TOKENS = 2.0**-10
_OCTAVE = 64  # points between which a curve over tokens is linear in their logarithm: within 1e-4 of an expert's share


@lru_cache(maxsize=64)
def _zipf(exponent: float, per_token: float, experts: int) -> tuple[Array, Array]:
    """Logarithms (base 2) of numbers of tokens, up to where every expert is hit, and the distinct experts at each."""
    if per_token >= experts:
        return np.zeros(1), np.full(1, float(experts))
    shares = np.arange(1.0, experts + 1) ** -exponent
    low, high = -40.0, 40.0  # of the logarithm of c
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if -np.expm1(-math.exp(middle) * shares).sum() < per_token else (low, middle)
    rates = math.exp(high) * shares
    last = math.ceil(math.log2(40 / rates[-1]))
    logs = np.arange(round(math.log2(_LEAST_TOKENS)) * _OCTAVE, max(last, 1) * _OCTAVE + 1) / _OCTAVE
    return logs, -np.expm1(-np.exp2(logs)[:, None] * rates).sum(1)


def _curves(points: Sequence[CoveragePoint], experts: int, one: float) -> dict[float, Callable[[Array], Array]]:
    """By slots, ascending: distinct experts over the batch, NaN beyond the largest recorded one unless it had them all.

    A curve starts from the one expert of a single token (`one`, less what skips), however long its blocks are.
    """
    found: dict[float, Callable[[Array], Array]] = {}
    for slots in sorted({p.slots for p in points}):
        by_batch: dict[float, list[float]] = defaultdict(list)
        for p in points:
            if p.slots == slots:
                by_batch[p.batch].append(p.distinct)
        batches, distinct = zip(*((b, float(np.mean(d))) for b, d in sorted(by_batch.items())), strict=True)
        beyond = distinct[-1] if distinct[-1] >= 0.99 * experts else np.nan
        if batches[0] * slots > 1:
            batches, distinct = (1 / slots, *batches), (min(one, distinct[0]), *distinct)
        found[slots] = partial(_over_log, xp=np.log(batches), fp=np.array(distinct), right=beyond)
    return found


def _over_log(batch: Array, xp: Array, fp: Array, right: float) -> Array:
    return np.interp(np.log(batch), xp, fp, right=right)


def _nearest(
    curves: dict[float, Callable[[Array], Array]], batch: Array, slots: Array, at: Callable[[float], Array]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """(slots, distinct) on the nearest curve of at most and of at least as many slots that has a value at `at(slots)`.

    NaN where there is none.
    """
    nothing = np.full(np.shape(slots), np.nan)
    sides = []
    for names, counts in ((list(curves), np.less_equal), (list(curves)[::-1], np.greater_equal)):
        where, value = nothing, nothing
        for s in names:
            found = curves[s](at(s))
            here = counts(s, slots) & ~np.isnan(found)
            where, value = np.where(here, s, where), np.where(here, found, value)
        sides.append((where, value))
    return sides[0], sides[1]
