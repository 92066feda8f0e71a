"""One decoding step: the forwards a sampler makes, their time on a device, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
from runtime.config import DTYPE_BYTES, DecodingConfig, KernelConfig, Workload, replace, require


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

    name: str  # "decode", "draft", "verify"; "forward" on its own
    slots: Array
    experts_per_layer: Array
    operators: list[Timing]

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
    sampler: Timing

    @property
    def seconds(self) -> Array:
        """Calibrated estimate of the whole step."""
        return sum((f.seconds for f in self.forwards), self.sampler.seconds)

    @property
    def bound_seconds(self) -> Array:
        """Roofline of the whole step."""
        return sum((f.bound_seconds for f in self.forwards), self.sampler.bound_seconds)

    @property
    def operators(self) -> list[Timing]:
        """All operators of all forwards, and the sampler."""
        return [op for f in self.forwards for op in f.operators] + [self.sampler]


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
) -> ForwardTiming:
    """One forward of batch x slots tokens over cached contexts; the LM head on `head_rows` per sequence (None: all)."""
    grid = shape(batch, slots, context, slots if head_rows is None else head_rows)
    dtype = at.device.dtype
    costs = forward_costs(at.spec, grid, dtype, at.coverage)
    executed = execute_forward(at.spec, costs, grid, dtype, at.coverage, at.engine, at.kernels)
    stream = sum((cost.weight_bytes + cost.kv_bytes for cost in costs), np.zeros(()))
    distinct = at.coverage.distinct(grid.batch, grid.slots, at.spec.num_experts)
    return ForwardTiming(name, grid.slots, distinct, time_operators(executed, at.device, at.engine, stream))


def time_step(
    at: Setting, decoding: DecodingConfig, batch: npt.ArrayLike, context: npt.ArrayLike, draft_tokens: npt.ArrayLike
) -> StepTiming:
    """One step of the sampler; `draft_tokens` K (an array may be given) replaces the one in `decoding`.

    autoregressive: one forward of one slot. two_forward: a draft of the anchor and K masks whose LM head runs on K
    rows (the masks, or with `anchor_draft` the anchor and all masks but the first), then a verify of K + 1 rows.
    """
    k = np.asarray(draft_tokens, dtype=float)
    sequences = np.asarray(batch, dtype=float)
    forwards: tuple[ForwardTiming, ...]
    if decoding.sampler == "autoregressive":
        forwards = (time_forward(at, batch, 1, context, 1, "decode"),)
        rows = sequences
    else:
        forwards = (
            time_forward(at, batch, k + 1, context, k, "draft"),
            time_forward(at, batch, k + 1, context, k + 1, "verify"),
        )
        rows = sequences * (2 * k + 1)
    cost = sampler_cost(at.spec, rows)
    work = execute(cost, at.engine.sampler_host(decoding.sampler, decoding.temperature), at.engine)
    return StepTiming(forwards, time_operators([work], at.device, at.engine, np.zeros(()))[0])


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
    expert_coverage: ExpertCoverage | str = "uniform",
    engine: EngineProfile | str | None = None,
    kernels: KernelConfig | None = None,
) -> Prediction:
    """Predict one step of `decoding` with `context` cached tokens per sequence, `workload.batch` sequences kept going.

    A drafting sampler needs one form of acceptance. UserError: acceptance missing or impossible, context beyond the
    model's, a dtype without a peak on the device, weights and caches that do not fit its memory, unknown names.
    """
    batch, k, dtype = workload.batch, decoding.draft_tokens, workload.dtype
    require(context >= 1, f"context >= 1 must hold, but got {context}")
    require_context(spec, context + decoding.slots)
    committed = tokens_per_step(decoding, length=acceptance_length, histogram=histogram, rates=acceptance_rates)
    at = setting(spec, hardware, dtype, expert_coverage=expert_coverage, engine=engine, kernels=kernels)
    needed = float(memory_bytes(spec, dtype, batch, context + decoding.slots))
    capacity = hardware.main_memory.capacity_bytes
    require(
        needed <= capacity,
        f"weights and caches must fit the {capacity / 1e9:.1f} GB of {hardware.name}, but batch {batch} at context "
        f"{context} needs {needed / 1e9:.1f} GB",
    )
    step = time_step(at, decoding, batch, context, k)
    plain = replace(decoding, sampler="autoregressive")
    baseline = step if decoding.sampler == "autoregressive" else time_step(at, plain, batch, context, k)
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
        forwards=tuple(_forward(f) for f in step.forwards),
        operators=_by_name(step.operators),
        sampler_seconds=float(step.sampler.seconds),
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
    operators = _by_name(forward.operators)
    return ForwardPrediction(
        name=forward.name,
        slots=int(forward.slots),
        seconds=float(forward.seconds),
        bound_seconds=float(forward.bound_seconds),
        bound=_binding(forward.operators),
        flops=sum(op.flops for op in operators),
        bytes=sum(op.bytes for op in operators),
        experts_per_layer=float(forward.experts_per_layer),
        operators=operators,
    )


def _by_name(timings: Sequence[Timing]) -> tuple[OperatorPrediction, ...]:
    """One entry per operator name, summed over the forwards it occurs in."""
    names = dict.fromkeys(t.name for t in timings)
    return tuple(_operator(name, [t for t in timings if t.name == name]) for name in names)


def _operator(name: str, timings: Sequence[Timing]) -> OperatorPrediction:
    return OperatorPrediction(
        name=name,
        flops=float(sum(t.executed.cost.flops for t in timings)),
        bytes=float(sum(t.executed.cost.bytes for t in timings)),
        launches=float(sum(t.executed.launches for t in timings)),
        seconds=float(sum(t.seconds for t in timings)),
        bound_seconds=float(sum(t.bound_seconds for t in timings)),
        bound=_binding(timings),
    )


def _binding(timings: Sequence[Timing]) -> Bound:
    """What most of the time is made of."""
    totals = [float(sum(t.parts[i] for t in timings)) for i in range(len(BOUNDS))]
    return BOUNDS[int(np.argmax(totals))]
