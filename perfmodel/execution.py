"""A forward as an engine runs it: which matmuls, copies and launches its operators become."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hardware.files import UserError
from perfmodel.costs import Call, Matmul, OperatorCost, Shape
from perfmodel.engine import OURS, EngineProfile, OperatorHost
from perfmodel.kernels.call import Array, FusedMoe
from perfmodel.model_spec import ModelSpec
from perfmodel.operators import expert_matmuls
from perfmodel.parallel import Parallel
from perfmodel.precision import stored_bytes
from runtime.config import KernelConfig, require


@dataclass(frozen=True)
class Executed:
    """An operator as an engine runs it: its cost, the matmuls and bytes that really happen, and its host work.

    calls: the kernels of the library that do it, each with how often; empty where its matmuls and moves do.
    """

    cost: OperatorCost
    matmuls: tuple[Matmul, ...]
    weight_bytes: Array
    moved_bytes: Array  # activations, over all passes
    launches: Array
    host_units: Array  # launches, and views by their share
    calls: tuple[tuple[Array, Call], ...] = ()


def execute(cost: OperatorCost, host: OperatorHost, engine: EngineProfile, repeat: npt.ArrayLike = 1.0) -> Executed:
    """An operator that runs as it is, `repeat` times (its layers)."""
    repeat = np.asarray(repeat, dtype=float)
    launches = repeat * host.launches
    units = launches + repeat * host.views * engine.view_share
    moved = cost.activation_bytes * host.passes
    calls = tuple((np.asarray(count), call) for count, call in cost.calls)
    return Executed(cost, cost.matmuls, cost.weight_bytes, moved, launches, units, calls)


def execute_forward(
    spec: ModelSpec,
    costs: Sequence[OperatorCost],
    at: Shape,
    engine: EngineProfile,
    kernels: KernelConfig,
) -> list[Executed]:
    """Every operator of `forward_costs`, the experts in the mode that `kernels` names for each token count.

    `spec` is what one device holds; where experts are dealt out over devices, only grouped ones are (see
    `kernels_for`). UserError for an operator that the engine does not describe.
    """
    found = []
    for cost in costs:
        if cost.name == "experts":
            found.append(_experts(spec, cost, at, engine, kernels))
        else:
            host = EXCHANGE if cost.name == "collective" else engine.operator(cost.name)
            found.append(execute(cost, host, engine, cost.repeat))
    return found


def kernels_for(engine: EngineProfile, parallel: Parallel, kernels: KernelConfig | None = None) -> KernelConfig:
    """The given kernels, or the engine's own; where experts are dealt out over devices, its grouped ones.

    UserError for another mode there: each device has the tokens of its own experts, which only grouped kernels take.
    UserError for forwards that another engine of our runtime ran. A fused one has one way of running the experts.
    """
    fused = engine.kernels.engine
    if kernels is not None and engine.name.partition("@")[0] in OURS.values():
        require(
            kernels.engine == fused, f"engine {engine.name} describes {fused} forwards, but these are {kernels.engine}"
        )
    if kernels is not None and fused != "eager":
        kernels = dataclasses.replace(engine.kernels, threads=kernels.threads)
    if parallel.expert == 1:
        return kernels or engine.kernels
    if kernels is None and "grouped" in engine.experts:
        kernels = dataclasses.replace(engine.kernels, experts={max(engine.kernels.experts): "grouped"})
    chosen = kernels or engine.kernels
    for mode in chosen.experts.values():
        require(
            mode == "grouped",
            f"experts dealt out over {parallel.expert} devices must run in the mode grouped, but got {mode}",
        )
    return chosen


EXCHANGE = OperatorHost(launches=1)  # whatever the engine: one kernel of the communication library


def _experts(
    spec: ModelSpec,
    cost: OperatorCost,
    at: Shape,
    engine: EngineProfile,
    kernels: KernelConfig,
) -> Executed:
    if len(set(kernels.experts.values())) == 1:
        return _run_mode(next(iter(kernels.experts.values())), spec, cost, at, engine)
    buckets = sorted(kernels.experts)
    index = np.minimum(np.searchsorted(buckets, at.tokens), len(buckets) - 1)
    modes = {mode: np.isin(index, [i for i, b in enumerate(buckets) if kernels.experts[b] == mode])
             for mode in kernels.experts.values()}  # fmt: skip
    runs = [_run_mode(mode, spec, cost, at, engine) for mode in modes]

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
        tuple(
            (np.where(here, count, 0.0), call)
            for run, here in zip(runs, modes.values(), strict=True)
            for count, call in run.calls
        ),
    )


def _run_mode(mode: str, spec: ModelSpec, cost: OperatorCost, at: Shape, engine: EngineProfile) -> Executed:
    """loop and grouped multiply the experts that are hit, gather one per token, dense all of them as one wide matmul.

    gather first copies every token's expert, which moves it `weight_passes` times; a single token needs no copy. Only
    grouped is a kernel of the library; the others are its matmuls, and gather's its kernel over the copies.
    """
    if mode not in engine.experts:
        raise UserError(f"engine {engine.name} has no expert mode {mode!r}; it has {', '.join(sorted(engine.experts))}")
    host, n, tokens, experts = engine.experts[mode], spec.moe_layers, at.tokens, spec.num_experts
    ((_, fused),) = cost.calls
    assert isinstance(fused, FusedMoe)
    distinct = np.asarray(fused.distinct, dtype=float)  # on this device
    matmuls, weights, moved = cost.matmuls, cost.weight_bytes, cost.activation_bytes * host.passes
    assert cost.dtypes is not None  # experts multiply
    stored, met = cost.dtypes
    expert_bytes = n * spec.expert_parameters * stored_bytes(stored)
    calls: tuple[tuple[Array, Call], ...] = ()
    if mode == "grouped":
        calls = tuple((np.asarray(count), call) for count, call in cost.calls)
    elif mode == "dense":
        layers = np.full(np.shape(tokens), float(n))
        width = experts * spec.expert_size
        matmuls = (Matmul(layers, tokens, spec.hidden_size, 2 * width), Matmul(layers, tokens, width, spec.hidden_size))
        weights, moved = np.full(np.shape(tokens), experts * expert_bytes), moved * experts
    elif mode == "gather":
        copies = tokens * spec.experts_per_token
        matmuls = expert_matmuls(spec, n * copies, np.ones(np.shape(tokens)))
        moved = moved + np.where(tokens > 1, host.weight_passes * copies * expert_bytes, 0.0)
        call = FusedMoe(copies, spec.hidden_size, spec.expert_size, copies, 1, copies, stored, met)
        calls = ((np.asarray(float(n)), call),)
    launches = n * (host.launches + host.launches_per_expert * distinct)
    views = n * (host.views + host.views_per_expert * distinct)
    return Executed(cost, matmuls, weights, moved, launches, launches + views * engine.view_share, calls)
