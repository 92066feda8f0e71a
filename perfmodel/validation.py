"""Predicted against measured: per row and in summary, with rows that were fitted to kept apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from hardware.files import known
from hardware.profile import HardwareProfile
from perfmodel.decoding import ForwardTiming, StepTiming, setting, time_forward, time_step
from perfmodel.engine import EngineProfile, engine_for
from perfmodel.experts import CoveragePoint, ExpertCoverage
from perfmodel.model_spec import ModelSpec, load_spec, require_context
from perfmodel.operators import Array
from perfmodel.steps import Step, most_fillings, step_of, title
from runtime.config import Engine, require
from runtime.measurement import Kind, Measurement


@dataclass(frozen=True)
class Row:
    """One measured forward, one operator of it, or the mean step of a generation, and what was predicted for it."""

    name: str
    kind: Kind
    measured_seconds: float
    predicted_seconds: float
    bound_seconds: float
    fitted: bool | None  # None: the engine was not calibrated, so nothing was held out either
    simulated: str | None = None  # what of the measurement was not real

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted_seconds / self.measured_seconds - 1


@dataclass(frozen=True)
class Summary:
    """Errors of some rows, as shares of the measured time. bias is the median signed error."""

    count: int
    median_absolute_error: float
    mean_absolute_error: float
    bias: float
    bound_violations: int


SAMPLER = "sampler"  # an operator of records that is no part of a forward


def point_name(m: Measurement, *, operator: bool = True) -> str:
    """The operating point of a row, in words: what must agree for two rows to be the same point.

    operator: tell an operator's row from that of the forward it is part of.
    """
    tokens = m.workload.batch * m.slots
    threads = "default" if m.kernels.threads is None else m.kernels.threads
    run: str = m.forward or "forward"
    if m.kind == "generation":
        w, warmth = m.decoding.mixing_weight, m.decoding.temperature
        run = f"{title(m.decoding)} w={w:g} T={warmth:g} {m.batching}"
    elif m.forward == "single":
        run = title(m.decoding)
    if operator and m.operator is not None:
        run = f"{run}: {m.operator}"
    how = f"experts={m.kernels.expert_mode(tokens)}" if m.kernels.engine == "eager" else f"engine={m.kernels.engine}"
    return (
        f"{m.model} {m.workload.dtype} {run} batch={m.workload.batch} slots={m.slots} context={m.context} "
        f"{how} threads={threads}"
    )


def ran_by(measurements: Sequence[Measurement]) -> Engine:
    """The engine of our runtime that ran them all; UserError where several did: each is predicted by its own."""
    engines = sorted({m.kernels.engine for m in measurements})
    require(len(engines) == 1, f"rows of one engine are needed, but they were run by {', '.join(engines) or 'none'}")
    return engines[0]


def measured_seconds(m: Measurement) -> float:
    """Median seconds of a forward or an operator; mean seconds of a decoding step of a generation, over its samples."""
    if m.kind != "generation":
        return m.median_seconds
    require(m.forwards >= 1, f"a generation must have counted its forwards, but {point_name(m)} has none")
    return sum(m.seconds) * float(_step(m).forwards_per_step) / m.forwards


def _step(m: Measurement) -> Step:
    """The step of a generation. Where a confidence threshold ends a block, with as many forwards as it took on average.

    That average is exact for batches that were kept full, and too high for those that drained: nobody counted how many
    sequences were left in each forward.
    """
    if m.decoding.confidence_threshold is None:
        return step_of(m.decoding)
    steps = sum(m.acceptance_histogram) / m.workload.batch
    require(steps > 0, f"a generation must have counted its steps, but {point_name(m)} has none")
    most = float(most_fillings(m.decoding.draft_tokens, m.decoding.denoising_steps))
    return step_of(m.decoding, fillings=min(max(m.forwards / steps - m.decoding.verify, 1.0), most))


def _slots(m: Measurement) -> tuple[float, float, float]:
    """Slots of a measured forward, its rows through the LM head, and how often one of its slots sees another."""
    drafts = m.slots - 1.0
    if m.forward == "draft":
        return m.slots, drafts, 1 + drafts * m.slots
    if m.forward == "single":
        sampler = m.decoding.sampler
        require(
            sampler == "single_forward", f"a forward 'single' is one of single_forward, but the sampler is {sampler}"
        )
        (single,) = step_of(m.decoding).forwards
        return m.slots, float(np.asarray(single.head_rows)), float(np.asarray(single.pairs))
    return m.slots, m.slots, m.slots * (m.slots + 1) / 2


def forwards(measurements: Sequence[Measurement]) -> list[Measurement]:
    """The rows of kind "forward", and of operators in forwards; UserError when there is no forward."""
    found = [m for m in measurements if m.kind != "generation" and m.operator != SAMPLER]
    whole = any(m.kind == "forward" for m in found)
    require(whole, f"measurements of kind 'forward' are needed, but none of {len(measurements)} rows is one")
    return found


def recorded_coverage(measurements: Sequence[Measurement]) -> ExpertCoverage:
    """The distinct experts that the runtime recorded in these rows, by kind of forward, as measured coverage."""
    points = tuple(
        CoveragePoint(_forward_kind(m), m.workload.batch, m.slots, m.experts_per_layer)
        for m in measurements
        if m.experts_per_layer is not None
    )
    require(len(points) > 0, "recorded expert coverage needs rows with experts_per_layer, but none has it")
    return ExpertCoverage("measured", measured=points)


def _forward_kind(m: Measurement) -> str:
    """The kind of a measured forward; of a generation, that of its widest one, whose experts were counted."""
    if m.kind == "generation":
        return max(reversed(_step(m).forwards), key=lambda f: float(np.max(f.slots))).name
    return m.forward or ("decode" if m.slots == 1 else "verify")


class MeasuredPoints:
    """Measurements grouped by what a prediction cannot vary over (model, dtype, kernels, sampler), to be predicted.

    A forward and its operators are timed without a sampler, and with one projection by the LM head. A generation is
    compared at its mean context, with its batch kept full. Raises UserError for models that cannot be found and for
    contexts beyond theirs.
    """

    def __init__(self, rows: Sequence[Measurement], hardware: HardwareProfile, coverage: ExpertCoverage | str) -> None:
        require(len(rows) > 0, "there is no measurement to predict")
        self.rows = list(rows)
        self.measured = np.array([measured_seconds(m) for m in self.rows])
        self._hardware, self._coverage = hardware, coverage
        groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for index, m in enumerate(self.rows):
            sampler = str(_step(m)) if m.kind == "generation" else str(m.forward)
            groups[m.kind, m.model, m.workload.dtype, str(m.kernels), sampler].append(index)
        self._groups: list[tuple[ModelSpec, list[int]]] = []
        for members in groups.values():
            spec = load_spec(self.rows[members[0]].model)
            for m in self._of(members):
                reach = int(np.max(_step(m).reach)) if m.kind == "generation" else m.slots
                require_context(spec, m.context + reach)
            self._groups.append((spec, members))

    def _of(self, members: Sequence[int]) -> list[Measurement]:
        return [self.rows[i] for i in members]

    def predict(self, engine: EngineProfile) -> tuple[Array, Array]:
        """Estimated and bound seconds of every row, in the order of `rows`."""
        seconds, bound = np.zeros(len(self.rows)), np.zeros(len(self.rows))
        for spec, members in self._groups:
            first = self.rows[members[0]]
            at = setting(
                spec,
                self._hardware,
                first.workload.dtype,
                expert_coverage=self._coverage,
                engine=engine,
                kernels=first.kernels,
            )
            batch, context = np.array([(m.workload.batch, m.context) for m in self._of(members)]).T
            timing: ForwardTiming | StepTiming
            if first.kind != "generation":
                slots, head_rows, pairs = np.array([_slots(m) for m in self._of(members)]).T
                name = first.forward or "forward"
                structured = pairs if name in ("draft", "single") else None
                timing = time_forward(at, batch, slots, context, head_rows, name, pairs=structured)
            else:
                timing = time_step(at, _step(first), batch, context)
            if first.kind == "operator":
                assert isinstance(timing, ForwardTiming)
                parts = {op.name: np.broadcast_arrays(op.seconds, op.bound_seconds, batch) for op in timing.operators}
                for place, index in enumerate(members):
                    operator = str(self.rows[index].operator)
                    if operator not in parts:
                        raise known("operator of a forward", operator, parts)
                    seconds[index], bound[index] = parts[operator][0][place], parts[operator][1][place]
            else:
                seconds[members], bound[members] = timing.seconds, timing.bound_seconds
        return seconds, bound


def validate(
    measurements: Sequence[Measurement],
    hardware: HardwareProfile,
    *,
    engine: EngineProfile | str | None = None,
    expert_coverage: ExpertCoverage | str = "uniform",
) -> list[Row]:
    """Predict every measurement. A row counts as fitted when the engine was calibrated on the same point."""
    found = engine_for(hardware, engine, ran_by(measurements))
    data = MeasuredPoints(measurements, hardware, expert_coverage)
    seconds, bound = data.predict(found)
    fitted = set(found.fit.points) if found.fit else None
    return [
        Row(
            point_name(m),
            m.kind,
            float(took),
            float(estimate),
            float(low),
            None if fitted is None else point_name(m) in fitted,
            m.simulated,
        )
        for m, took, estimate, low in zip(data.rows, data.measured, seconds, bound, strict=True)
    ]


def summarise(rows: Sequence[Row]) -> Summary:
    """Median and mean absolute error, bias and bound violations; UserError for no rows."""
    require(len(rows) > 0, "a summary needs at least one row")
    errors = np.array([row.error for row in rows])
    return Summary(
        count=len(rows),
        median_absolute_error=float(np.median(np.abs(errors))),
        mean_absolute_error=float(np.mean(np.abs(errors))),
        bias=float(np.median(errors)),
        bound_violations=sum(row.measured_seconds < row.bound_seconds for row in rows),
    )


def summaries(rows: Sequence[Row]) -> dict[str, Summary]:
    """Summaries by kind: rows held out from the fit, fitted to, or of an engine without a fit; no empty groups."""
    groups: dict[str, list[Row]] = {}
    for kind in get_args(Kind):
        for name, state in (("held out", False), ("fitted", True), ("not calibrated", None)):
            groups[f"{kind}, {name}"] = [r for r in rows if r.kind == kind and r.fitted is state]
    return {name: summarise(members) for name, members in groups.items() if members}
