"""A forward as an engine runs it: which matmuls, copies and launches its operators become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hardware.files import UserError
from perfmodel.engine import EngineProfile, OperatorHost
from perfmodel.experts import ExpertCoverage
from perfmodel.model_spec import ModelSpec
from perfmodel.operators import LAYER_OPERATORS, Array, Matmul, OperatorCost, Shape, expert_matmuls
from runtime.config import DTYPE_BYTES, KernelConfig


@dataclass(frozen=True)
class Executed:
    """An operator as an engine runs it: its cost, the matmuls and bytes that really happen, and its host work."""

    cost: OperatorCost
    matmuls: tuple[Matmul, ...]
    weight_bytes: Array
    moved_bytes: Array  # activations, over all passes
    launches: Array
    host_units: Array  # launches, and views by their share


def execute(cost: OperatorCost, host: OperatorHost, engine: EngineProfile, repeat: npt.ArrayLike = 1.0) -> Executed:
    """An operator that runs as it is, `repeat` times (its layers)."""
    repeat = np.asarray(repeat, dtype=float)
    launches = np.zeros(np.shape(cost.bytes)) + repeat * host.launches
    units = launches + repeat * host.views * engine.view_share
    return Executed(cost, cost.matmuls, cost.weight_bytes, cost.activation_bytes * host.passes, launches, units)


def execute_forward(
    spec: ModelSpec,
    costs: Sequence[OperatorCost],
    at: Shape,
    dtype: str,
    coverage: ExpertCoverage,
    engine: EngineProfile,
    kernels: KernelConfig,
) -> list[Executed]:
    """Every operator of `forward_costs`, the experts in the mode that `kernels` names for each token count."""
    found = []
    for cost in costs:
        if cost.name == "experts":
            found.append(_experts(spec, cost, at, dtype, coverage, engine, kernels))
        else:
            repeat = spec.layers if cost.name in LAYER_OPERATORS else at.head_passes if cost.name == "lm_head" else 1
            found.append(execute(cost, engine.operators[cost.name], engine, repeat))
    return found


def _experts(
    spec: ModelSpec,
    cost: OperatorCost,
    at: Shape,
    dtype: str,
    coverage: ExpertCoverage,
    engine: EngineProfile,
    kernels: KernelConfig,
) -> Executed:
    buckets = sorted(kernels.experts)
    index = np.minimum(np.searchsorted(buckets, at.tokens), len(buckets) - 1)
    modes = {mode: np.isin(index, [i for i, b in enumerate(buckets) if kernels.experts[b] == mode])
             for mode in kernels.experts.values()}  # fmt: skip
    runs = [_run_mode(mode, spec, cost, at, dtype, coverage, engine) for mode in modes]
    if len(runs) == 1:
        return runs[0]

    def pick(values: list[Array]) -> Array:
        return np.select(list(modes.values()), values)

    matmuls = tuple(
        Matmul(np.where(here, m.count, 0.0), m.rows, m.inner, m.outer)
        for run, here in zip(runs, modes.values(), strict=True)
        for m in run.matmuls
    )
    return Executed(
        cost,
        matmuls,
        pick([run.weight_bytes for run in runs]),
        pick([run.moved_bytes for run in runs]),
        pick([run.launches for run in runs]),
        pick([run.host_units for run in runs]),
    )


def _run_mode(
    mode: str,
    spec: ModelSpec,
    cost: OperatorCost,
    at: Shape,
    dtype: str,
    coverage: ExpertCoverage,
    engine: EngineProfile,
) -> Executed:
    """loop and grouped multiply the experts that are hit, gather one per token, dense all of them as one wide matmul.

    gather first copies every token's expert, which moves it `weight_passes` times; a single token needs no copy.
    """
    if mode not in engine.experts:
        raise UserError(f"engine {engine.name} has no expert mode {mode!r}; it has {', '.join(sorted(engine.experts))}")
    host, n, tokens, experts = engine.experts[mode], spec.layers, at.tokens, spec.num_experts
    distinct = coverage.distinct(at.batch, at.slots, experts)
    matmuls, weights, moved = cost.matmuls, cost.weight_bytes, cost.activation_bytes * host.passes
    expert_bytes = float(n * spec.expert_parameters * DTYPE_BYTES[dtype])
    if mode == "dense":
        layers = np.full(np.shape(tokens), float(n))
        width = experts * spec.expert_size
        matmuls = (Matmul(layers, tokens, spec.hidden_size, 2 * width), Matmul(layers, tokens, width, spec.hidden_size))
        weights, moved = np.full(np.shape(tokens), experts * expert_bytes), moved * experts
    elif mode == "gather":
        matmuls = expert_matmuls(spec, n * tokens, np.ones(np.shape(tokens)))
        moved = moved + np.where(tokens > 1, host.weight_passes * tokens * expert_bytes, 0.0)
    launches = n * (host.launches + host.launches_per_expert * distinct)
    views = n * (host.views + host.views_per_expert * distinct)
    return Executed(cost, matmuls, weights, moved, launches, launches + views * engine.view_share)
