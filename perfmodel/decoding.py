"""One decoding step: the forwards a sampler makes, their time on a device, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from hardware.profile import HardwareProfile
from perfmodel.acceptance import judged, tokens_per_step
from perfmodel.closed_batch import closed_batch_throughput
from perfmodel.costs import shape
from perfmodel.economics import economics
from perfmodel.engine import EngineProfile, HostCosts, engine_for
from perfmodel.execution import execute, execute_forward, kernels_for
from perfmodel.experts import ExpertCoverage, parse_coverage
from perfmodel.memory import require_memory
from perfmodel.model_spec import ModelSpec, require_context
from perfmodel.operators import Array, forward_costs, sampler_cost
from perfmodel.parallel import ALONE, Parallel, divided
from perfmodel.precision import Precision, attention_dtypes, fastest_dtype, uniform
from perfmodel.prediction import Bound, ForwardPrediction, OperatorPrediction, Prediction
from perfmodel.roofline import BOUNDS, Device, Timing, Timings, any_of, engine_timing, time_operators, total
from perfmodel.sizes import require_sizes
from perfmodel.steps import Step, step_of
from runtime.config import DecodingConfig, KernelConfig, Workload, require


@dataclass(frozen=True)
class Setting:
    """What does not vary over a grid: model, device, engine, kernels, expert coverage, element types and division."""

    spec: ModelSpec
    device: Device
    engine: EngineProfile
    kernels: KernelConfig
    coverage: ExpertCoverage
    precision: Precision
    parallel: Parallel = ALONE

    @property
    def share(self) -> ModelSpec:
        """What one device holds of the model, but for its number of experts."""
        return divided(self.spec, self.parallel)

    @property
    def host_costs(self) -> HostCosts:
        """What the engine adds on this device."""
        return self.engine.host_costs(self.device.hardware)

    def spread(self, forward: str = "") -> float | None:
        """The engine's spread of steps of this model, and of those that begin with a kind of forward."""
        return self.engine.spread_of(forward, "moe" if self.spec.moe_layers else "dense")


@dataclass(frozen=True)
class ForwardTiming:
    """One forward over a grid, in arrays that broadcast."""

    name: str  # as in `perfmodel.steps`; "forward" on its own
    slots: Array
    experts_per_layer: Array
    timings: Timings
    times: Array = field(default_factory=lambda: np.ones(()))  # how often its step runs it; all else is of one

    @property
    def operators(self) -> list[Timing]:
        """The operators, which add up to the forward."""
        return self.timings.operators

    @property
    def seconds(self) -> Array:
        """Calibrated estimate."""
        return self.timings.seconds

    @property
    def bound_seconds(self) -> Array:
        """Roofline at datasheet peaks."""
        return self.timings.bound_seconds

    @property
    def clamped(self) -> npt.NDArray[np.bool_]:
        """Where an operator's estimate was below its bound, and is now the bound."""
        return self.timings.clamped


@dataclass(frozen=True)
class StepTiming:
    """One decoding step over a grid: its forwards, and what is done beside them by the sampler and the engine."""

    forwards: tuple[ForwardTiming, ...]
    beside: Timings
    reach: npt.ArrayLike  # positions beyond the cached ones

    @property
    def sampler(self) -> list[Timing]:
        """What is done beside the forwards."""
        return self.beside.operators

    @property
    def seconds(self) -> Array:
        """Calibrated estimate of the whole step."""
        return total([*(f.times * f.seconds for f in self.forwards), self.beside.seconds])

    @property
    def bound_seconds(self) -> Array:
        """Roofline of the whole step."""
        return total([*(f.times * f.bound_seconds for f in self.forwards), self.beside.bound_seconds])

    @property
    def clamped(self) -> npt.NDArray[np.bool_]:
        """Where an operator's estimate was below its bound, and is now the bound."""
        return any_of([*(f.clamped for f in self.forwards), self.beside.clamped])

    @property
    def sampler_seconds(self) -> Array:
        """Calibrated estimate of what is done beside the forwards."""
        return self.beside.seconds

    @property
    def forwards_per_step(self) -> Array:
        """How many forwards there are, of all kinds."""
        return sum((f.times for f in self.forwards), np.zeros(()))

    @property
    def operators(self) -> list[tuple[Timing, Array]]:
        """All operators of all forwards, and what is beside them, each with how often the step runs it."""
        return [(op, f.times) for f in self.forwards for op in f.operators] + [(op, np.ones(())) for op in self.sampler]


UNKNOWN_SPREAD = 0.4  # of what no measurement has shown: within a factor of 1.5


def interval(at: Setting, timing: ForwardTiming | StepTiming) -> tuple[Array, Array] | None:
    """Seconds between which 80% of measurements are meant to lie; None where no spread is known.

    The engine's own spread, which is that of whole steps. Else every kernel family errs by its spread in the same
    direction at once, which is wider than errors that partly cancel; what is not from the library errs by
    UNKNOWN_SPREAD. Nothing can be faster than the bound.
    """
    wide: Array | float | None = at.spread(timing.forwards[0].name if isinstance(timing, StepTiming) else "")
    if wide is None:
        library = at.device.library
        if library is None:
            return None
        once = np.ones(())
        operators = [(op, once) for op in timing.operators] if isinstance(timing, ForwardTiming) else timing.operators
        seconds = [times * op.seconds for op, times in operators]
        spreads = [library.evidence[op.family].spread if op.family else UNKNOWN_SPREAD for op, _ in operators]
        wide = total([took * spread for took, spread in zip(seconds, spreads, strict=True)]) / total(seconds)
    return np.maximum(timing.seconds / np.exp(wide), timing.bound_seconds), timing.seconds * np.exp(wide)


def setting(
    spec: ModelSpec,
    hardware: HardwareProfile,
    precision: Precision | str,
    *,
    expert_coverage: ExpertCoverage | str | None = None,
    engine: EngineProfile | str | None = None,
    kernels: KernelConfig | None = None,
    parallel: Parallel = ALONE,
) -> Setting:
    """Resolve names and defaults: our engine for the kind of hardware and of kernels, and what it names itself.

    precision: a dtype stands for everything in it. UserError for unknown names, a dtype without a peak on the device,
    sizes that do not divide over the devices, and more devices than the profile's interconnect joins.
    """
    found = engine_for(hardware, engine, kernels.engine if kernels is not None else None)
    named = expert_coverage or found.expert_coverage
    coverage = parse_coverage(named) if isinstance(named, str) else named
    chosen = kernels_for(found, parallel, kernels)
    stored = uniform(precision) if isinstance(precision, str) else precision
    device = Device(hardware, stored.head, chosen.threads)
    require_precision(device, stored)
    if parallel.devices > 1:
        divided(spec, parallel)
        link = hardware.interconnect
        most = link.devices if link else 1
        require(
            parallel.devices <= most,
            f"devices <= {most} of the interconnect of {hardware.name} must hold, but got {parallel.devices}",
        )
        require(
            link is not None and link.latency_seconds is not None,
            f"profile {hardware.name}: interconnect.latency_seconds must be given to divide a model over devices",
        )
    return Setting(spec, device, found, chosen, coverage, stored, parallel)


def require_precision(device: Device, stored: Precision) -> None:
    """UserError for element types that the device has no peak for, or was not probed in."""
    require(
        device.library is not None or stored == uniform(stored.head),
        f"{device.hardware.name} was probed in one dtype at a time, so {stored} cannot be predicted there",
    )
    for weights, activations in (
        (stored.weights, stored.activations),
        (stored.experts, stored.expert_activations),
        attention_dtypes(device.hardware, stored.cache),
    ):
        device.peak_of(weights, activations)


def time_forward(
    at: Setting,
    batch: npt.ArrayLike,
    slots: npt.ArrayLike,
    context: npt.ArrayLike,
    head_rows: npt.ArrayLike | None = None,
    name: str = "forward",
    *,
    pairs: Array | None = None,
    head_passes: int = 1,
) -> ForwardTiming:
    """One forward of batch x slots tokens over cached contexts; the LM head on `head_rows` per sequence (None: all).

    name: which kind of forward, for a measured expert coverage. pairs, head_passes: as in `steps.ForwardSizes`.
    """
    coverage = at.coverage.of(name)
    grid = shape(batch, slots, context, slots if head_rows is None else head_rows, pairs, head_passes)
    costs = forward_costs(at.spec, grid, at.precision, coverage, at.parallel)
    executed = execute_forward(at.share, costs, grid, at.engine, at.kernels)
    timings = time_operators(executed, at.device, at.engine)
    host = at.host_costs
    own = at.parallel.of_replica(grid.batch) * grid.slots  # tokens of one device
    extra = host.forward(name) + at.spec.layers * host.layer_seconds + host.token_seconds * own
    if host.cached_token_seconds:
        extra = extra + np.where(grid.slots > 1, host.cached_token_seconds * grid.context, 0.0)
    if at.parallel.replicas > 1:
        extra = extra + at.spec.moe_layers * (host.exchange_seconds + host.exchange_token_seconds * grid.tokens)
    if np.any(extra > 0):
        timings = timings.followed_by(engine_timing(np.asarray(extra)))
    distinct = np.zeros(())
    if at.spec.moe_layers:
        distinct = coverage.distinct(grid.batch, grid.slots, at.spec.num_experts, at.spec.experts_per_token)
    return ForwardTiming(name, grid.slots, distinct, timings)


def time_prefill(at: Setting, batch: npt.ArrayLike, prompt: npt.ArrayLike) -> ForwardTiming:
    """The forward that reads prompts of `prompt` tokens into an empty cache; of each the LM head projects the last."""
    return time_forward(at, batch, prompt, 0, 1, "prefill")


def time_step(at: Setting, step: Step, batch: npt.ArrayLike, context: npt.ArrayLike) -> StepTiming:
    """One step of a sampler (`steps.step_of` a setting) over a grid, whose arrays broadcast with those of the step."""
    forwards = tuple(
        replace(
            time_forward(at, batch, f.slots, context, f.head_rows, f.name, pairs=f.pairs, head_passes=f.head_passes),
            times=np.asarray(f.times, dtype=float),
        )
        for f in step.forwards
    )
    sequences = at.parallel.of_replica(np.asarray(batch, dtype=float))
    work = [
        execute(
            sampler_cost(at.share, sequences * np.asarray(w.rows) * np.asarray(w.times)),
            at.engine.work(w.entry),
            at.engine,
            w.times,
        )
        for w in step.work
    ]
    beside = time_operators(work, at.device, at.engine)
    host = at.host_costs
    drawn = total([np.asarray(w.rows) * np.asarray(w.times, dtype=float) for w in step.work if w.sampled])
    per_sequence = host.sequence_seconds + host.drawn_logit_seconds * at.spec.vocab_size * drawn
    extra = host.step_seconds + per_sequence * sequences
    if np.any(extra > 0):
        beside = beside.followed_by(engine_timing(np.asarray(extra)))
    return StepTiming(forwards, beside, step.reach)


def predict(
    spec: ModelSpec,
    hardware: HardwareProfile,
    workload: Workload,
    decoding: DecodingConfig,
    *,
    context: int,
    acceptance_length: float | None = None,
    histogram: Sequence[float] | None = None,
    acceptance_rates: Sequence[float] | None = None,
    fillings: float | None = None,
    expert_coverage: ExpertCoverage | str | None = None,
    engine: EngineProfile | str | None = None,
    kernels: KernelConfig | None = None,
    precision: Precision | None = None,
    parallel: Parallel = ALONE,
    request_spread: float | None = None,
) -> Prediction:
    """Predict one step of `decoding` with `context` cached tokens per sequence, `workload.batch` sequences kept going.

    A sampler whose drafts are verified needs one form of acceptance. fillings: the mean number of forwards that fill
    a denoising block, where a confidence threshold ends them before the most. precision: what the model is served in,
    where it is not `workload.dtype` throughout. request_spread: the coefficient of variation of the steps that
    requests of a closed batch take (None: the engine's); where none is rejected, they are alike. UserError: acceptance
    missing or impossible, context beyond the model's, weights and caches that do not fit the memory, unknown names,
    and what `setting` refuses.
    """
    batch = workload.batch
    require(context >= 1, f"context >= 1 must hold, but got {context}")
    require_sizes(batch=batch, context=context, draft_tokens=decoding.draft_tokens)
    parts = step_of(decoding, fillings=fillings)
    require_context(spec, context + int(np.max(parts.reach)))
    committed = tokens_per_step(decoding, length=acceptance_length, histogram=histogram, rates=acceptance_rates)
    at = setting(
        spec,
        hardware,
        precision or workload.dtype,
        expert_coverage=expert_coverage,
        engine=engine,
        kernels=kernels,
        parallel=parallel,
    )
    require_memory(at, batch, context, decoding.slots)
    step = time_step(at, parts, batch, context)
    baseline = time_step(at, step_of(decoding.autoregressive), batch, context) if decoding.drafts else step
    seconds, bound, single = float(step.seconds), float(step.bound_seconds), float(baseline.seconds)
    between = interval(at, step)
    rate = batch * committed / seconds
    closed: float | None = rate
    if judged(decoding) and request_spread != 0:
        spread = at.engine.requests.steps if request_spread is None and at.engine.requests else request_spread
        steps = partial(_step_seconds, at, parts, context)
        closed = None if spread is None else float(closed_batch_throughput(steps, batch, committed, spread))
    costs = economics(hardware, rate, parallel.devices)
    return Prediction(
        model=spec.name,
        hardware=hardware.name,
        engine=at.engine.name,
        workload=workload,
        decoding=decoding,
        context=context,
        expert_coverage=str(at.coverage),
        acceptance_length=committed,
        tokens_per_forward=committed / float(step.forwards_per_step),
        forwards=tuple(_forward(f) for f in step.forwards if f.times > 0),
        operators=_by_name(step.operators),
        sampler_seconds=float(step.sampler_seconds),
        step_seconds=seconds,
        bound_step_seconds=bound,
        bound=_binding(step.operators),
        tokens_per_second=rate,
        bound_tokens_per_second=batch * committed / bound,
        autoregressive_step_seconds=single,
        speedup_over_autoregressive=committed * single / seconds,
        experts_per_layer=max(float(f.experts_per_layer) for f in step.forwards),
        ridge_point_flops_per_byte=at.device.ridge_point,
        precision=str(at.precision),
        fastest_dtype=fastest_dtype(hardware, at.precision),
        parallel=parallel,
        closed_batch_tokens_per_second=closed,
        step_seconds_interval=None if between is None else (float(between[0]), float(between[1])),
        joules_per_million_tokens=_optional(costs.joules_per_million_tokens),
        dollars_per_million_tokens=_optional(costs.dollars_per_million_tokens),
    )


def _step_seconds(at: Setting, step: Step, context: int, active: Array) -> Array:
    return np.broadcast_to(time_step(at, step, active, context).seconds, active.shape)


def _optional(value: Array | None) -> float | None:
    return None if value is None else float(value)


def _forward(forward: ForwardTiming) -> ForwardPrediction:
    once = [(op, np.ones(())) for op in forward.operators]
    operators = _by_name(once)
    return ForwardPrediction(
        name=forward.name,
        times=float(forward.times),
        slots=int(forward.slots),
        seconds=float(forward.seconds),
        bound_seconds=float(forward.bound_seconds),
        bound=_binding(once),
        flops=sum(op.flops for op in operators),
        bytes=sum(op.bytes for op in operators),
        experts_per_layer=float(forward.experts_per_layer),
        operators=operators,
    )


def _by_name(timings: Sequence[tuple[Timing, Array]]) -> tuple[OperatorPrediction, ...]:
    """One entry per operator name, summed over the forwards it occurs in, each as often as it runs."""
    names = dict.fromkeys(t.name for t, _ in timings)
    return tuple(_operator(name, [(t, times) for t, times in timings if t.name == name]) for name in names)


def _operator(name: str, timings: Sequence[tuple[Timing, Array]]) -> OperatorPrediction:
    return OperatorPrediction(
        name=name,
        flops=float(sum(n * t.executed.cost.flops for t, n in timings)),
        bytes=float(sum(n * t.executed.cost.bytes for t, n in timings)),
        launches=float(sum(n * t.executed.launches for t, n in timings)),
        seconds=float(sum(n * t.seconds for t, n in timings)),
        bound_seconds=float(sum(n * t.bound_seconds for t, n in timings)),
        bound=_binding(timings),
    )


def _binding(timings: Sequence[tuple[Timing, Array]]) -> Bound:
    """What most of the time is made of."""
    totals = [float(sum(n * t.parts[i] for t, n in timings)) for i in range(len(BOUNDS))]
    return BOUNDS[int(np.argmax(totals))]
