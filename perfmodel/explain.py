"""Why an operating point is as fast as it is: what each operator waits for, and what would change tokens/s most."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from hardware.files import UserError
from hardware.profile import Curves, HardwareProfile, MemoryLevel
from perfmodel.contenders import Acceptance
from perfmodel.decoding import Setting, StepTiming, require_memory, time_step
from perfmodel.engine import HostCosts
from perfmodel.experts import ExpertCoverage
from perfmodel.kernels.library import CLASSES, Library
from perfmodel.model_spec import require_context
from perfmodel.operators import Array
from perfmodel.precision import Precision, quantised
from perfmodel.prediction import Bound
from perfmodel.roofline import BOUNDS, Device
from perfmodel.steps import step_of
from runtime.config import DecodingConfig, require

T = TypeVar("T")
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
        require_context(self.at.spec, int(self.context + np.max(self.step().reach)))
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
    stored = at.precision
    if at.device.library is not None:
        if stored.weights == stored.experts == "bfloat16":
            yield "weights fp8", partial(_with_precision, point, quantised("fp8", cache=stored.cache))
        if stored.cache == "bfloat16":
            yield "cache fp8", partial(_with_precision, point, replace(stored, cache="fp8"))


def _with_drafts(point: _Point, acceptance: Acceptance, draft_tokens: int) -> _Point:
    chosen = replace(point.decoding, draft_tokens=draft_tokens)
    return replace(point, decoding=chosen, length=acceptance.tokens(chosen))


def _with_precision(point: _Point, precision: Precision) -> _Point:
    at = point.at
    for weights, activations in (
        (precision.weights, precision.activations),
        (precision.experts, precision.expert_activations),
        (precision.cache, precision.cache),
    ):
        at.device.peak_of(weights, activations)  # refuses what the device has no peak for
    return replace(point, at=replace(at, precision=precision))


def on_hardware(at: Setting, hardware: HardwareProfile, library: Library | None = None) -> Setting:
    """The same setting on another device, with the same kernels (or those of `library`)."""
    device = Device(hardware, at.precision.head, at.kernels.threads)
    device.library = library or at.device.library
    return replace(at, device=device)


def scale_memory(hardware: HardwareProfile, factor: float, *, caches: bool = False) -> HardwareProfile:
    """Main memory (or the caches) with `factor` times the bandwidth, datasheet's and achieved; a probed curve whole."""

    def faster(level: MemoryLevel) -> MemoryLevel:
        peak, achieved = level.peak_bandwidth_bytes_per_second, level.achieved_bandwidth_bytes_per_second
        return replace(
            level,
            peak_bandwidth_bytes_per_second=peak and peak * factor,
            achieved_bandwidth_bytes_per_second=achieved and achieved * factor,
        )

    def curves(c: Curves) -> Curves:
        return replace(
            c, bandwidth=tuple(replace(p, bytes_per_second=p.bytes_per_second * factor) for p in c.bandwidth)
        )

    main = len(hardware.memory) - 1
    return replace(
        hardware,
        memory=tuple(faster(m) if (i < main) == caches else m for i, m in enumerate(hardware.memory)),
        measured=tuple(map(curves, hardware.measured)),
    )


def scale_arithmetic(hardware: HardwareProfile, factor: float) -> HardwareProfile:
    """All FLOPs per second times `factor`; the seconds of probed matmuls divided by it."""
    return replace(
        hardware,
        peak_flops_per_second={d: rate * factor for d, rate in hardware.peak_flops_per_second.items()},
        achieved_flops_per_second={d: rate * factor for d, rate in hardware.achieved_flops_per_second.items()},
        measured=tuple(
            replace(c, matmul=tuple(replace(p, seconds=p.seconds / factor) for p in c.matmul))
            for c in hardware.measured
        ),
    )


def scale_interconnect(hardware: HardwareProfile, factor: float) -> HardwareProfile:
    """`factor` times the bandwidth between devices; the latency stays."""
    link = hardware.interconnect
    if link is None:
        return hardware
    achieved, pair = link.achieved_bandwidth_bytes_per_second, link.pair_bandwidth_bytes_per_second
    changed = replace(
        link,
        peak_bandwidth_bytes_per_second=link.peak_bandwidth_bytes_per_second * factor,
        achieved_bandwidth_bytes_per_second=achieved and achieved * factor,
        pair_bandwidth_bytes_per_second=pair and pair * factor,
    )
    return replace(hardware, interconnect=changed)


def scale_overhead(at: Setting, factor: float) -> Setting:
    """Launches, gaps between graph nodes, kernels' fixed seconds, links' latency and host seconds times `factor`."""
    hardware = at.device.hardware
    link = hardware.interconnect
    changed = replace(
        hardware,
        launch_seconds=hardware.launch_seconds * factor,
        graph_node_seconds=hardware.graph_node_seconds * factor,
        interconnect=link and replace(link, latency_seconds=link.latency_seconds and link.latency_seconds * factor),
        measured=tuple(replace(c, elementwise_seconds=c.elementwise_seconds * factor) for c in hardware.measured),
    )
    hosts = {name: _longer_host(costs, factor) for name, costs in at.engine.hosts.items()}
    library = at.device.library and _longer_kernels(at.device.library, factor)
    return replace(on_hardware(at, changed, library), engine=replace(at.engine, hosts=hosts))


def _longer_host(costs: HostCosts, factor: float) -> HostCosts:
    kinds = {kind: seconds * factor for kind, seconds in costs.forwards.items()}
    return replace(_longer(costs, factor), forwards=kinds)


def _longer_kernels(library: Library, factor: float) -> Library:
    return replace(library, **{family: _longer(getattr(library, family), factor) for family in CLASSES})


def _longer(numbers: T, factor: float) -> T:
    """A dataclass with every number of seconds times `factor`."""
    seconds = {f.name: getattr(numbers, f.name) * factor for f in fields(numbers) if f.name.endswith("_seconds")}  # type: ignore[arg-type]
    return replace(numbers, **seconds)  # type: ignore[type-var]


@dataclass(frozen=True)
class _ScaledCoverage(ExpertCoverage):
    factor: float = 1.0

    def distinct(self, batch: npt.ArrayLike, slots: npt.ArrayLike, experts: int, per_token: int = 1) -> Array:
        return np.minimum(self.factor * super().distinct(batch, slots, experts, per_token), experts)


def scale_coverage(coverage: ExpertCoverage, factor: float) -> ExpertCoverage:
    """Coverage that reads `factor` times the experts, up to all of them."""
    return _ScaledCoverage(
        coverage.kind, coverage.rho, coverage.skip_share, coverage.measured, coverage.experts, factor=factor
    )
