"""Why an operating point is as fast as it is: what each operator waits for, and what would change tokens/s most."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from hardware.files import UserError
from hardware.profile import HardwareProfile
from perfmodel.contenders import Acceptance
from perfmodel.decoding import Setting, StepTiming, require_precision, time_step
from perfmodel.engine import load_engine
from perfmodel.execution import kernels_for
from perfmodel.kernels.call import Array
from perfmodel.memory import require_memory
from perfmodel.model_spec import require_context
from perfmodel.precision import Precision, quantised
from perfmodel.prediction import Bound
from perfmodel.roofline import BOUNDS
from perfmodel.sizes import require_sizes
from perfmodel.steps import step_of
from perfmodel.variation import (
    on_hardware,
    scale_arithmetic,
    scale_coverage,
    scale_interconnect,
    scale_memory,
    scale_overhead,
)
from runtime.config import DecodingConfig, require
from runtime.levels import optimal

NO_RUNTIME = "ideal-graph"  # what is left when a runtime costs nothing
CHANGE = 0.05  # each way, of a central difference: wide enough to look past a single tile


@dataclass(frozen=True)
class Share:
    """One operator's part of a step. `waits`: the share of its own time by what it waits for; they add up to 1."""

    name: str
    seconds: float
    share: float  # of the step; the shares of all operators add up to 1
    bound: Bound  # the largest of `waits`
    waits: dict[Bound, float]


@dataclass(frozen=True)
class Sensitivity:
    """How many per cent tokens per second (and the speedup over autoregression) gain per per cent of `name`."""

    name: str
    elasticity: float  # d ln(tokens per second) / d ln(name)
    speedup_elasticity: float


@dataclass(frozen=True)
class Change:
    """A whole change of the setting, and what it makes of tokens per second and of the speedup (1: nothing)."""

    name: str
    tokens_per_second_ratio: float
    speedup_ratio: float


@dataclass(frozen=True)
class Explanation:
    """One operating point. Sensitivities and changes are ordered by what they do, the strongest first."""

    step_seconds: float
    autoregressive_step_seconds: float
    acceptance_length: float
    tokens_per_second: float
    speedup_over_autoregressive: float
    bound: Bound
    waits: dict[Bound, float]  # shares of the step; they add up to 1
    operators: tuple[Share, ...]
    sensitivities: tuple[Sensitivity, ...]
    changes: tuple[Change, ...]
    refused: dict[str, str] = field(default_factory=dict)  # changes that cannot be, and why


@dataclass(frozen=True)
class _Point:
    at: Setting
    decoding: DecodingConfig
    batch: float
    context: float
    length: float
    fillings: float | None

    def step(self, decoding: DecodingConfig | None = None) -> StepTiming:
        chosen = decoding or self.decoding
        fillings = self.fillings if chosen is self.decoding else None
        return time_step(self.at, step_of(chosen, fillings=fillings), self.batch, self.context)

    def check(self) -> None:
        """UserError for positions beyond the model's, and for what does not fit the memory."""
        require_context(self.at.spec, int(self.context + np.max(step_of(self.decoding).reach)))
        require_memory(self.at, int(self.batch), int(self.context), self.decoding.slots)

    def rates(self) -> tuple[float, float]:
        """Tokens per second and the speedup over autoregression."""
        seconds = float(self.step().seconds)
        single = float(self.step(self.decoding.autoregressive).seconds)
        return self.batch * self.length / seconds, self.length * single / seconds


def explain(
    at: Setting,
    decoding: DecodingConfig,
    acceptance: Acceptance,
    *,
    batch: int,
    context: int,
    fillings: float | None = None,
) -> Explanation:
    """Explain the step that `decoding.predict` predicts. UserError as there."""
    require(context >= 1 and batch >= 1, f"batch, context >= 1 must hold, but got {batch}, {context}")
    require_sizes(batch=batch, context=context, draft_tokens=decoding.draft_tokens)
    point = _Point(at, decoding, float(batch), float(context), acceptance.tokens(decoding), fillings)
    point.check()
    step = point.step()
    single = float(point.step(decoding.autoregressive).seconds)
    rate, speedup = point.rates()
    operators = _shares(step)
    waits: dict[Bound, float] = {b: sum(o.share * o.waits[b] for o in operators) for b in BOUNDS}
    sensitivities = [_sensitivity(name, vary) for name, vary in _scaled(point)]
    changes, refused = [], {}
    for name, make in _changed(point, acceptance):
        try:
            changed = make()
            changed.check()
            changed_rate, changed_speedup = changed.rates()
        except UserError as error:
            refused[name] = str(error)
            continue
        changes.append(Change(name, changed_rate / rate, changed_speedup / speedup))
    return Explanation(
        step_seconds=float(step.seconds),
        autoregressive_step_seconds=single,
        acceptance_length=point.length,
        tokens_per_second=rate,
        speedup_over_autoregressive=speedup,
        bound=max(BOUNDS, key=lambda b: waits[b]),
        waits=waits,
        operators=tuple(sorted(operators, key=lambda o: -o.share)),
        sensitivities=tuple(sorted(sensitivities, key=lambda s: -abs(s.elasticity))),
        changes=tuple(sorted(changes, key=lambda c: -abs(math.log(c.tokens_per_second_ratio)))),
        refused=refused,
    )


def _shares(step: StepTiming) -> list[Share]:
    totals: dict[str, Array] = {}
    for timing, times in step.operators:
        parts = np.array([float(part) for part in timing.parts]) * float(times)
        totals[timing.name] = totals.get(timing.name, np.zeros(len(BOUNDS))) + parts
    whole = sum(float(parts.sum()) for parts in totals.values())
    found = []
    for name, parts in totals.items():
        seconds = float(parts.sum())
        waits = dict(zip(BOUNDS, (parts / seconds if seconds else np.array([1.0, 0.0, 0.0])).tolist(), strict=True))
        found.append(Share(name, seconds, seconds / whole, BOUNDS[int(np.argmax(parts))], waits))
    return found


def _sensitivity(name: str, vary: Callable[[float], _Point]) -> Sensitivity:
    """Central differences of the logarithms."""
    (rate_up, speedup_up), (rate_down, speedup_down) = vary(1 + CHANGE).rates(), vary(1 - CHANGE).rates()
    width = math.log((1 + CHANGE) / (1 - CHANGE))
    return Sensitivity(name, math.log(rate_up / rate_down) / width, math.log(speedup_up / speedup_down) / width)


def _scaled(point: _Point) -> Iterator[tuple[str, Callable[[float], _Point]]]:
    """Every quantity that a point is sensitive to, as a function of its factor."""
    at, hardware = point.at, point.at.device.hardware

    def on(changed: HardwareProfile) -> _Point:
        return replace(point, at=on_hardware(at, changed))

    yield "memory bandwidth", lambda f: on(scale_memory(hardware, f))
    if len(hardware.memory) > 1 and not hardware.measured:
        yield "cache bandwidth", lambda f: on(scale_memory(hardware, f, caches=True))
    yield "arithmetic rate", lambda f: on(scale_arithmetic(hardware, f))
    if at.parallel.devices > 1:
        yield "interconnect bandwidth", lambda f: on(scale_interconnect(hardware, f))
    yield "launch and host overhead", lambda f: replace(point, at=scale_overhead(at, f))
    yield "context", lambda f: replace(point, context=point.context * f)
    if at.spec.moe_layers > 0:
        yield "experts read", lambda f: replace(point, at=replace(at, coverage=scale_coverage(at.coverage, f)))
    if point.decoding.drafts:
        yield "acceptance length", lambda f: replace(point, length=point.length * f)


def _changed(point: _Point, acceptance: Acceptance) -> Iterator[tuple[str, Callable[[], _Point]]]:
    """Whole changes; each is made when called, and may be refused."""
    at, decoding, k = point.at, point.decoding, point.decoding.draft_tokens
    yield f"batch {2 * point.batch:g}", lambda: replace(point, batch=2 * point.batch)
    if point.batch > 1:
        yield f"batch {point.batch // 2:g}", lambda: replace(point, batch=point.batch // 2)
    if decoding.drafts:
        yield "autoregressive", lambda: replace(point, decoding=decoding.autoregressive, length=1.0, fillings=None)
    if decoding.drafts and acceptance.length is None:
        for other in (2 * k, k // 2):
            if other >= 1:
                yield f"K {other}", partial(_with_drafts, point, acceptance, other)
    shares = acceptance.shares("single_forward", k) if decoding.sampler == "single_forward" else None
    if shares is not None:
        for levels in dict.fromkeys((optimal(shares, 1), optimal(shares, min(4, k + 1)), tuple(range(k + 1)))):
            if levels != decoding.levels:
                chosen = replace(decoding, proposal_levels=levels)
                yield f"levels {','.join(map(str, levels))}", partial(_with_decoding, point, acceptance, chosen)
    stored = at.precision
    if at.device.library is not None:
        if at.engine.name != NO_RUNTIME:
            yield f"engine {NO_RUNTIME}", partial(_with_engine, point, NO_RUNTIME)
        if stored.weights == stored.experts == "bfloat16":
            yield "weights fp8", partial(_with_precision, point, quantised("fp8", cache=stored.cache))
        if stored.cache == "bfloat16":
            yield "cache fp8", partial(_with_precision, point, replace(stored, cache="fp8"))


def _with_drafts(point: _Point, acceptance: Acceptance, draft_tokens: int) -> _Point:
    return _with_decoding(point, acceptance, replace(point.decoding, draft_tokens=draft_tokens))


def _with_decoding(point: _Point, acceptance: Acceptance, decoding: DecodingConfig) -> _Point:
    return replace(point, decoding=decoding, length=acceptance.tokens(decoding))


def _with_engine(point: _Point, name: str) -> _Point:
    engine = load_engine(name)
    return replace(point, at=replace(point.at, engine=engine, kernels=kernels_for(engine, point.at.parallel)))


def _with_precision(point: _Point, precision: Precision) -> _Point:
    require_precision(point.at.device, precision)
    return replace(point, at=replace(point.at, precision=precision))
