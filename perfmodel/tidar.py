"""Runs of the ZAYA engine (zyphra-vllm): any run predicted, and the engine's costs fitted to the published ones.

A step is its forwards by the kernel library, what the engine adds to each, and the sampler's own work. A closed batch
drains (`perfmodel.closed_batch`); slots that are filled again add up several requests each, whose admission holds up
the others. The context is the mean one of a run, half of what is generated: prompts are short and not stated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hardware.profile import HardwareProfile
from perfmodel.closed_batch import Drain, drain
from perfmodel.decoding import ForwardTiming, Setting, StepTiming, setting, time_step
from perfmodel.engine import EngineProfile, Requests, load_engine
from perfmodel.fitting import Problem
from perfmodel.memory import require_memory
from perfmodel.model_spec import load_spec, require_context
from perfmodel.published.points import Point, TidarForwardPoint, TidarThroughputPoint
from perfmodel.roofline import Timings
from perfmodel.steps import step_of

Array = npt.NDArray[np.float64]
Run = TidarForwardPoint | TidarThroughputPoint

ENGINE = "zyphra-vllm"
BUILD = "9e2820f6"  # whose forwards of several slots are another program's: a later draft and verify path
MODEL = "zaya1-8b"
KERNELS = "ideal-graph"  # the engine without costs of its own, to which the fit adds them
REQUESTS_PER_SLOT = 10  # of the published runs whose slots are filled again: "n_sample=10"
FORWARD_WEIGHT = 4.0  # of a forward timed on the device, where no request differs from another
OUTLIER = 0.08
VENDORS = ("NVIDIA", "AMD")  # the host, and attention over several slots, differ between CUDA and ROCm

# What a fit starts from and falls back to, each with the log-scale distance that costs as much as a row off by OUTLIER.
# single_seconds: beyond forward_seconds, where single_forward's many layouts are not captured in a graph. families.moe:
# held close, since experts that were read much faster than the library says would exceed the memory's rate.
START: dict[str, tuple[float, float]] = {
    "NVIDIA.forward_seconds": (10e-3, 1.0),
    "AMD.forward_seconds": (14e-3, 1.0),
    "NVIDIA.cached_token_seconds": (0.2e-6, 1.0),
    "AMD.cached_token_seconds": (5e-6, 1.0),
    "NVIDIA.families.moe": (1.0, 0.08),
    "AMD.families.moe": (1.0, 0.08),
    "single_seconds": (15e-3, 0.5),
    "token_seconds": (10e-6, 1.0),
    "sequence_seconds": (20e-6, 1.0),
    "sampler.passes": (6.0, 0.5),
    f"builds.{BUILD}": (0.8, 0.3),
    "requests.steps": (0.33, 0.5),
    "requests.untold_steps": (0.7, 0.5),
    "requests.lengths": (0.1, 0.7),
    "requests.admission_forwards": (5.0, 1.0),
}


class Estimated(NamedTuple):
    """Seconds of a point, for a throughput those of a token; the bound; and how far 80% of unseen runs lie, in logs."""

    seconds: float
    bound_seconds: float
    spread: float


def estimate(run: Run, engine: EngineProfile | None = None) -> Estimated:
    """A run by the engine (None: the bundled one) in its build. The bound is that of a batch that is kept full.

    UserError where its last steps are beyond the model's context or the device's memory.
    """
    engine = engine or _bundled()
    _require_room(run, engine)
    spread, requests = engine.spread_of(_kind(run)) or 0.0, engine.requests or Requests()
    course = _course(run, requests)
    if isinstance(run, TidarForwardPoint):
        part = _parts(_step(_setting(run.hardware, engine), run, course.active), run)[0]
        return Estimated(float(part.seconds.flat[0]), float(part.bound_seconds.flat[0]), spread)
    step = _step(_setting(run.hardware, engine.of_build(run.build)), run, course.active)
    forwards = sum((f.times * f.seconds for f in step.forwards), np.zeros(()))
    waits = requests.admission_forwards * _admissions(run, course.active) * forwards / step.forwards_per_step
    tokens = run.batch * _committed(run)
    least = np.broadcast_to(step.bound_seconds, course.active.shape)[0]
    return Estimated(float(course.mean_seconds(step.seconds + waits)) / tokens, float(least) / tokens, spread)


def _require_room(run: Run, engine: EngineProfile) -> None:
    """Of all requests at once, though some of a batch may have ended, and others replaced, before the last steps."""
    at, generated = _setting(run.hardware, engine), math.ceil(run.generated_tokens)
    require_context(at.spec, generated + int(np.max(step_of(run.decoding).reach)))
    require_memory(at, run.batch, generated, run.decoding.slots)


@cache
def _bundled() -> EngineProfile:
    return load_engine(ENGINE)


def _setting(hardware: HardwareProfile, engine: EngineProfile | str) -> Setting:
    return setting(load_spec(MODEL), hardware, "bfloat16", engine=engine)


def _step(at: Setting, run: Run, active: Array) -> StepTiming:
    return time_step(at, step_of(run.decoding), active, run.generated_tokens / 2)


def _parts(step: StepTiming, run: Run) -> list[ForwardTiming | Timings]:
    """What of the step was timed: one forward, the sampler, or all of it."""
    if isinstance(run, TidarThroughputPoint):
        return [*step.forwards, step.beside]
    return [step.beside] if run.part == "sampler" else [f for f in step.forwards if f.name == run.part]


def _kind(run: Run) -> str:
    """What its spread is that of: steps that begin with this forward; parts of steps are too few for one."""
    return step_of(run.decoding).forwards[0].name if isinstance(run, TidarThroughputPoint) else ""


def _committed(run: Run) -> float:
    """Tokens that a step commits per sequence; of a part of a step, the part itself."""
    return (run.acceptance_length or 1.0) if isinstance(run, TidarThroughputPoint) else 1.0


def _admissions(run: Run, active: Array) -> Array:
    """How many requests are admitted per step, to replace those that finish."""
    refilled = isinstance(run, TidarThroughputPoint) and run.refilled
    return active * _committed(run) / run.generated_tokens * refilled


def _course(run: Run, requests: Requests) -> Drain:
    """How the run's batch empties. Only the steps of its phases depend on how requests differ, not who is active."""
    return drain(run.batch, _spread(run, requests))


def _spread(run: Run, requests: Requests) -> float:
    """The coefficient of variation of what the run's slots have to do."""
    if isinstance(run, TidarForwardPoint):
        return 0.0
    uneven = requests.untold_steps if run.thinking is False else requests.steps
    lengths = requests.lengths if run.ends_early else 0.0
    spread = math.hypot(uneven if run.decoding.drafts else 0.0, lengths)
    return spread / math.sqrt(REQUESTS_PER_SLOT) if run.refilled else spread


class _Work(NamedTuple):
    """What of a run's step does not depend on the engine's costs, by phase of the drain; and what they are paid for.

    kernels: seconds of the library in forwards, of the moe family apart. logits: of one pass of the sampler.
    """

    kernels: Array
    moe: Array
    forwards: Array  # of AR's one slot, of a block, and of all levels
    tokens: Array
    cached: Array
    launches: Array
    logits: Array
    sequences: Array
    admissions: Array


def _work(run: Run) -> _Work:
    active = _course(run, Requests()).active
    step, sizes = _step(_setting(run.hardware, KERNELS), run, active), step_of(run.decoding).forwards
    parts, zero = _parts(step, run), np.zeros_like(active)
    slots = {f.name: float(np.max(f.slots)) for f in sizes}
    timed = [p for p in parts if isinstance(p, ForwardTiming)]
    kernels, moe = zero, zero
    for operator in (op for forward in timed for op in forward.operators):
        if operator.family == "moe":
            moe = moe + operator.seconds
        else:
            kernels = kernels + operator.seconds
    beside = step.beside.operators if step.beside in parts else []
    names = [f.name for f in timed]
    kinds = [names.count("decode"), names.count("draft") + names.count("verify"), names.count("single")]
    several = sum(slots[name] > 1 for name in names)
    return _Work(
        kernels,
        moe,
        np.array(kinds, dtype=float),
        active * sum(slots[name] for name in names),
        zero + several * run.generated_tokens / 2,
        zero + sum(op.parts.overhead for op in beside),
        zero + sum(op.parts.memory + op.parts.compute for op in beside),
        active if beside else zero,
        _admissions(run, active),
    )


def tidar_problem(points: Sequence[Point]) -> Problem:
    """The fit of the engine's costs to its runs: seconds of a forward, of a sampler or of a token."""
    runs = [p for p in points if isinstance(p, TidarForwardPoint | TidarThroughputPoint)]
    work = _Work(*(np.array(values) for values in zip(*(_work(run) for run in runs), strict=True)))
    committed = np.array([run.batch * _committed(run) if isinstance(run, TidarThroughputPoint) else 1 for run in runs])
    timed = np.array([isinstance(run, TidarForwardPoint) for run in runs])
    amd = np.array([run.hardware.vendor == "AMD" for run in runs])
    built = np.array([isinstance(run, TidarThroughputPoint) and run.build == BUILD for run in runs])
    decodes, blocks, singles = work.forwards.T
    forwards = np.maximum(work.forwards.sum(1), 1.0)[:, None]
    batches = np.array([run.batch for run in runs])

    def predict(numbers: Mapping[str, float]) -> Array:
        def of_vendor(name: str) -> Array:
            return np.where(amd, numbers[f"AMD.{name}"], numbers[f"NVIDIA.{name}"])[:, None]

        each, factor = of_vendor("forward_seconds")[:, 0], np.where(built, numbers[f"builds.{BUILD}"], 1.0)
        fixed = each * decodes + factor * (each * blocks + (each + numbers["single_seconds"]) * singles)
        in_forwards = work.kernels + of_vendor("families.moe") * work.moe + fixed[:, None]
        in_forwards = in_forwards + numbers["token_seconds"] * work.tokens
        in_forwards = in_forwards + of_vendor("cached_token_seconds") * work.cached
        beside = work.launches + numbers["sampler.passes"] * work.logits + numbers["sequence_seconds"] * work.sequences
        waits = numbers["requests.admission_forwards"] * work.admissions * in_forwards / forwards
        courses = drain(batches, [_spread(run, _requests(numbers)) for run in runs])
        seconds = in_forwards + beside + waits
        return np.where(timed, seconds[:, 0], courses.mean_seconds(seconds) / committed)

    return Problem(
        predict,
        np.array([run.measured_seconds for run in runs]),
        [run.series for run in runs],
        {name: value for name, (value, _) in START.items()},
        {name: prior for name, (_, prior) in START.items()},
        OUTLIER,
        np.where([run.operator == "tidar forward_ms" for run in runs], FORWARD_WEIGHT, 1.0),
        [_kind(run) for run in runs],
    )


def _requests(numbers: Mapping[str, float]) -> Requests:
    return Requests(*(numbers[f"requests.{name}"] for name in Requests.__dataclass_fields__))


def engine_data(numbers: Mapping[str, float]) -> dict[str, Any]:
    """Fitted numbers as the entries of the engine's YAML that they stand in."""
    hosts = {}
    for vendor in VENDORS:
        each = numbers[f"{vendor}.forward_seconds"]
        hosts[vendor] = {
            "forward_seconds": each,
            "forwards": {"single": float(f"{each + numbers['single_seconds']:.4g}")},
            "token_seconds": numbers["token_seconds"],
            "sequence_seconds": numbers["sequence_seconds"],
            "cached_token_seconds": numbers[f"{vendor}.cached_token_seconds"],
            "families": {"moe": numbers[f"{vendor}.families.moe"]},
        }
    entries = load_engine(KERNELS).sampler
    return {
        "hosts": hosts,
        "builds": {BUILD: numbers[f"builds.{BUILD}"]},
        "requests": {name: numbers[f"requests.{name}"] for name in Requests.__dataclass_fields__},
        "sampler": {
            name: {"launches": entry.launches, "passes": numbers["sampler.passes"]}
            for name, entry in entries.items()
            if entry.passes > 0
        },
    }
