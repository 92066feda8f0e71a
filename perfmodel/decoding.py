"""One decoding step: the forwards a sampler makes, their time on a device, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hardware.profile import HardwareProfile
from perfmodel.acceptance import tokens_per_step
from perfmodel.engine import EngineProfile, engine_for
from perfmodel.execution import execute, execute_forward
from perfmodel.experts import ExpertCoverage, parse_coverage
from perfmodel.model_spec import ModelSpec, require_context
from perfmodel.operators import Array, forward_costs, sampler_cost, shape
from perfmodel.prediction import Bound, ForwardPrediction, OperatorPrediction, Prediction
from perfmodel.roofline import BOUNDS, Device, Timing, time_operators
from perfmodel.steps import Step, step_of
from runtime.config import DTYPE_BYTES, DecodingConfig, KernelConfig, Workload, require


@dataclass(frozen=True)
class Setting:
    """What does not vary over a grid of operating points: model, device, engine, kernels and expert coverage."""

    spec: ModelSpec
    device: Device
    engine: EngineProfile
    kernels: KernelConfig
    coverage: ExpertCoverage


@dataclass(frozen=True)
class ForwardTiming:
    """One forward over a grid: arrays of the grid's shape."""

    name: str  # as in `perfmodel.steps`; "forward" on its own
    slots: Array
    experts_per_layer: Array
    operators: list[Timing]
    times: Array = field(default_factory=lambda: np.ones(()))  # how often its step runs it; all else is of one

    @property
    def seconds(self) -> Array:
        """Calibrated estimate."""
        return sum((op.seconds for op in self.operators), np.zeros(()))

    @property
    def bound_seconds(self) -> Array:
        """Roofline at datasheet peaks."""
        return sum((op.bound_seconds for op in self.operators), np.zeros(()))


@dataclass(frozen=True)
class StepTiming:
    """One decoding step over a grid: its forwards and the sampler's own work."""

    forwards: tuple[ForwardTiming, ...]
    sampler: list[Timing]
    reach: npt.ArrayLike  # positions beyond the cached ones

    @property
    def seconds(self) -> Array:
        """Calibrated estimate of the whole step."""
        return sum((f.times * f.seconds for f in self.forwards), self.sampler_seconds)

    @property
    def bound_seconds(self) -> Array:
        """Roofline of the whole step."""
        own = sum((op.bound_seconds for op in self.sampler), np.zeros(()))
        return sum((f.times * f.bound_seconds for f in self.forwards), own)

    @property
    def sampler_seconds(self) -> Array:
        """Calibrated estimate of the sampler's own work."""
        return sum((op.seconds for op in self.sampler), np.zeros(()))

    @property
    def forwards_per_step(self) -> Array:
        """How many forwards there are, of all kinds."""
        return sum((f.times for f in self.forwards), np.zeros(()))

    @property
    def operators(self) -> list[tuple[Timing, Array]]:
        """All operators of all forwards, and the sampler's work, each with how often the step runs it."""
        return [(op, f.times) for f in self.forwards for op in f.operators] + [(op, np.ones(())) for op in self.sampler]


def setting(
    spec: ModelSpec,
    hardware: HardwareProfile,
    dtype: str,
    *,
    expert_coverage: ExpertCoverage | str = "uniform",
    engine: EngineProfile | str | None = None,
    kernels: KernelConfig | None = None,
) -> Setting:
    """Resolve names and defaults: our engine for the kind of hardware, and the kernels that the engine names."""
    coverage = parse_coverage(expert_coverage) if isinstance(expert_coverage, str) else expert_coverage
    found = engine_for(hardware, engine)
    chosen = kernels or found.kernels
    return Setting(spec, Device(hardware, dtype, chosen.threads), found, chosen, coverage)


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
    dtype = at.device.dtype
    costs = forward_costs(at.spec, grid, dtype, coverage)
    executed = execute_forward(at.spec, costs, grid, dtype, coverage, at.engine, at.kernels)
    stream = sum((cost.weight_bytes + cost.kv_bytes for cost in costs), np.zeros(()))
    distinct = coverage.distinct(grid.batch, grid.slots, at.spec.num_experts)
    return ForwardTiming(name, grid.slots, distinct, time_operators(executed, at.device, at.engine, stream))


def time_step(at: Setting, step: Step, batch: npt.ArrayLike, context: npt.ArrayLike) -> StepTiming:
    """One step of a sampler (`steps.step_of` a setting) over a grid, whose arrays broadcast with those of the step."""
    forwards = tuple(
        replace(
            time_forward(at, batch, f.slots, context, f.head_rows, f.name, pairs=f.pairs, head_passes=f.head_passes),
            times=np.asarray(f.times, dtype=float),
        )
        for f in step.forwards
    )
    sequences = np.asarray(batch, dtype=float)
    work = [
        execute(
            sampler_cost(at.spec, sequences * np.asarray(w.rows) * np.asarray(w.times)),
            at.engine.work(w.entry),
            at.engine,
            w.times,
        )
        for w in step.work
    ]
    return StepTiming(forwards, time_operators(work, at.device, at.engine, np.zeros(())), step.reach)


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
    expert_coverage: ExpertCoverage | str = "uniform",
    engine: EngineProfile | str | None = None,
    kernels: KernelConfig | None = None,
) -> Prediction:
    """Predict one step of `decoding` with `context` cached tokens per sequence, `workload.batch` sequences kept going.

    A sampler whose drafts are verified needs one form of acceptance. fillings: the mean number of forwards that fill
    a denoising block, where a confidence threshold ends them before the most. UserError: acceptance missing or
    impossible, context beyond the model's, a dtype without a peak on the device, weights and caches that do not fit
    its memory, unknown names.
    """
    batch, dtype = workload.batch, workload.dtype
    require(context >= 1, f"context >= 1 must hold, but got {context}")
    parts = step_of(decoding, fillings=fillings)
    require_context(spec, context + int(np.max(parts.reach)))
    committed = tokens_per_step(decoding, length=acceptance_length, histogram=histogram, rates=acceptance_rates)
    at = setting(spec, hardware, dtype, expert_coverage=expert_coverage, engine=engine, kernels=kernels)
    needed = float(memory_bytes(spec, dtype, batch, context + decoding.slots))
    capacity = hardware.main_memory.capacity_bytes
    require(
        needed <= capacity,
        f"weights and caches must fit the {capacity / 1e9:.1f} GB of {hardware.name}, but batch {batch} at context "
        f"{context} needs {needed / 1e9:.1f} GB",
    )
    step = time_step(at, parts, batch, context)
    baseline = time_step(at, step_of(decoding.autoregressive), batch, context) if decoding.drafts else step
    seconds, bound, single = float(step.seconds), float(step.bound_seconds), float(baseline.seconds)
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
        tokens_per_second=batch * committed / seconds,
        bound_tokens_per_second=batch * committed / bound,
        autoregressive_step_seconds=single,
        speedup_over_autoregressive=committed * single / seconds,
        experts_per_layer=max(float(f.experts_per_layer) for f in step.forwards),
        ridge_point_flops_per_byte=at.device.ridge_point,
    )


def memory_bytes(spec: ModelSpec, dtype: str, batch: npt.ArrayLike, positions: npt.ArrayLike) -> Any:
    """Bytes that must lie in main memory: all weights, and cache and state of `batch` sequences of `positions`."""
    per_sequence = np.asarray(positions, dtype=float) * spec.stored_kv_bytes_per_token(dtype)
    state = spec.state_bytes_per_sequence(dtype)
    return spec.parameters * DTYPE_BYTES[dtype] + np.asarray(batch, dtype=float) * (per_sequence + state)


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
