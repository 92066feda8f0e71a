"""Served points predicted by `perfmodel.serving`, and engines' host costs fitted to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from perfmodel import fitting
from perfmodel.decoding import Setting, setting
from perfmodel.engine import EngineProfile, HostCosts, load_engine
from perfmodel.kernels.call import Array
from perfmodel.parallel import Parallel
from perfmodel.precision import Precision
from perfmodel.published.points import ServedPoint
from perfmodel.serving import Load, serve
from runtime.config import require

# Data sets that rows name without the lengths of their prompts: mean prompt tokens, and the coefficient of variation of
# the generated ones. Assumed from the kind of request (a chat's turn; a multiple-choice question; a file around a gap):
# the sources state the mean of what was generated alone. The last prompt is what its rows say: of 600, 1200 and 2000
# tokens it leaves them the smallest error; the other numbers, changed by half, change no error by more than 0.01.
WORKLOADS: dict[str, tuple[float, float]] = {
    "lm-arena-chat": (200.0, 0.7),
    "gpqa": (280.0, 0.4),
    "sourcegraph-fim": (2000.0, 0.8),
}
_METRICS = {"per_token": "mean_tpot", "between_tokens": "median_itl", "total": "mean_step"}
UNKNOWN_SPREAD = 0.3  # of an engine that was never fitted
# Where fits start, by the last part of a number's path; a factor on a kernel family starts from 1.
START = {
    "forward_seconds": 3e-4,
    "layer_seconds": 5e-6,
    "sequence_seconds": 1e-5,
    "step_seconds": 3e-4,
    "drawn_logit_seconds": 3e-10,
    "exchange_seconds": 1e-4,
    "exchange_token_seconds": 5e-7,
}
# How far, on a logarithmic scale, a fitted figure may reasonably be from there. Experts are held close: kernels that
# come this near to the memory's rate have little to gain, so that fewer distinct experts must explain shorter steps.
PRIOR = {"families.gemm": 0.1, "families.moe": 0.05, "families.attention": 0.15, "families.collective": 0.2,
         "families.elementwise": 0.3}  # fmt: skip


def precision_of(point: ServedPoint) -> Precision:
    """The point's precision, with what its engine chooses where that is not stated.

    TensorRT-LLM keeps the cache as the checkpoint says: in fp8 for NVIDIA's own fp8 and nvfp4 ones, those of Llama;
    Qwen publishes fp8 checkpoints itself, which say nothing of the cache. Blackwell multiplies mxfp4 experts with
    activations in fp8.
    """
    found = point.precision
    narrow = found.weights in ("fp8", "nvfp4") and point.model.architecture == "llama"
    if not point.cache_stated and point.engine == "tensorrt-llm" and narrow:
        found = dataclasses.replace(found, cache="fp8")
    if found.experts == "mxfp4" and "fp4" in {str(name) for name in point.hardware.peak_flops_per_second}:
        found = dataclasses.replace(found, expert_activations="fp8")
    return found


def model_kind(point: ServedPoint) -> str:
    """What the point's spread is that of."""
    return "moe" if point.model.moe_layers else "dense"


def load_of(points: Sequence[ServedPoint]) -> Load:
    """What the servers of points of one data set were kept busy with. UserError for a data set that is not known.

    Rows of a data set state the sequences that were active, and drew their tokens as each model's publisher sets it.
    """
    name = points[0].workload
    require(not name or name in WORKLOADS, f"the prompts of {name} are not known; known: {', '.join(WORKLOADS)}")
    prompt, variation = WORKLOADS.get(name, (0.0, 0.0))
    return Load(
        np.array([p.batch for p in points]),
        np.array([p.prompt or prompt for p in points]),
        np.array([p.generated for p in points]),
        variation,
        drawn=bool(name),
        admitted=bool(name),
    )


def setting_of(point: ServedPoint, engine: EngineProfile) -> Setting:
    """The model on its devices. UserError where it does not fit them."""
    parallel = Parallel(point.tensor, point.expert)
    return setting(point.model, point.hardware, precision_of(point), engine=engine, parallel=parallel)


def alike(points: Sequence[ServedPoint]) -> list[list[int]]:
    """Positions of points that differ in sizes alone, together: one call times them all."""
    joined: dict[object, list[int]] = {}
    for i, p in enumerate(points):
        device = id(p.hardware)  # its name would not do: rows may name a file that gives its device another's name
        same = (p.model, device, precision_of(p), p.engine, p.tensor, p.expert, p.workload, p.metric)
        joined.setdefault(same, []).append(i)
    return list(joined.values())


def served_seconds(points: Sequence[ServedPoint], engines: Mapping[str, EngineProfile]) -> tuple[Array, Array]:
    """[points] seconds and their bound, in each point's metric; points that differ in sizes alone are joined."""
    seconds, bound = np.zeros(len(points)), np.zeros(len(points))
    for members in alike(points):
        own = [points[i] for i in members]
        found = serve(setting_of(own[0], engines[own[0].engine]), load_of(own))
        together = found.active if own[0].metric == "total" else 1.0
        seconds[members] = found.seconds(_METRICS[own[0].metric]) / together  # type: ignore[arg-type]  # one of Metric
        bound[members] = found.bound_seconds / together
    return seconds, bound


@cache
def engine_of(name: str) -> EngineProfile:
    """A bundled engine, read once."""
    return load_engine(name)


def numbers_of(engine: EngineProfile) -> dict[str, float]:
    """An engine's host costs and factors that are not zero, as "default.forward_seconds", "default.families.gemm"."""
    found = {}
    for host, costs in engine.hosts.items():
        for field in dataclasses.fields(costs):
            value = getattr(costs, field.name)
            entries = value.items() if isinstance(value, dict) else [("", value)]
            for name, number in entries:
                if number > 0:
                    found[".".join(part for part in (host, field.name, name) if part)] = float(number)
    return found


def with_numbers(engine: EngineProfile, numbers: Mapping[str, float]) -> EngineProfile:
    """The engine with these host costs and factors in place of its own."""
    hosts: dict[str, HostCosts] = dict(engine.hosts)
    for path, value in numbers.items():
        host, field, *entry = path.split(".")
        new: Any = {**getattr(hosts[host], field), entry[0]: value} if entry else value
        hosts[host] = dataclasses.replace(hosts[host], **{field: new})
    return dataclasses.replace(engine, hosts=hosts)


def _start(path: str, own: float) -> float:
    field = path.split(".")[1]
    return 1.0 if field == "families" else START.get(field, own)


def served_problem(points: Sequence[ServedPoint]) -> fitting.Problem:
    """Host costs and factors of one engine fitted to its served points.

    A step's time is linear in them but where a larger part hides a smaller; so it is expanded around their start.
    """
    bundled = engine_of(points[0].engine)
    start = {path: _start(path, value) for path, value in numbers_of(bundled).items()}
    require(len(start) > 0, f"engine {bundled.name} has no host costs to fit")
    engine = with_numbers(bundled, start)
    base, _ = served_seconds(points, {engine.name: engine})
    slopes = {}
    for path, value in start.items():
        more, _ = served_seconds(points, {engine.name: with_numbers(engine, {path: 2 * value})})
        slopes[path] = (more - base) / value
    rest = base - sum((slope * start[path] for path, slope in slopes.items()), np.zeros(len(points)))

    def predict(numbers: Mapping[str, float]) -> Array:
        found = rest + sum((slope * numbers[path] for path, slope in slopes.items()), np.zeros(len(points)))
        return np.maximum(found, base / 100)

    priors = {path: PRIOR.get(path.partition(".")[2], 1.0) for path in start}
    measured = np.array([p.measured_seconds for p in points])
    series, kinds = [p.series for p in points], [model_kind(p) for p in points]
    return fitting.Problem(predict, measured, series, start, priors, kinds=kinds)
