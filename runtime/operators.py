"""Time each operator where it stands, in a real forward of the model's engine: where the time of a forward goes.

The names are the performance model's, so that every operator has a predicted and a measured time.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from runtime.bench import Identity, Point, Prefilled, dtype_of, point_of, record, wait
from runtime.config import KernelConfig, Workload, require
from runtime.engines import on_device, operators, sampling_of, serves
from runtime.fused import FusedForward, wrap
from runtime.measurement import ForwardKind, Measurement
from runtime.model.zaya import Zaya
from runtime.policy import using
from runtime.samplers.acceptance import Draft, Plain, Sampling, constant

SAMPLER = "sampler"  # what follows a forward, and is no part of its time
_HELD_OPERATORS = 32  # behind one hold: some 150 commands, where a queue takes about 1,000 before the host must wait
_LONGEST_HOLD_SECONDS = 0.1
_FASTEST_CLOCK_HZ = 2.5e9  # of a GPU: so many cycles are at least a second

Seconds: TypeAlias = dict[str, float]  # by operator
Function: TypeAlias = Callable[..., Any]


@torch.inference_mode()
def measure_operators(
    model: Zaya,
    identity: Identity,
    *,
    kind: ForwardKind,
    batch: int,
    slots: int,
    context: int,
    levels: tuple[int, ...] = (0,),
    repeats: int = 10,
    warmup: int = 2,
    prefilled: Prefilled | None = None,
) -> list[Measurement]:
    """A record per operator of the forward that `bench.measure_forward` would time: the seconds of all its layers.

    On a GPU, events around each call tell its time, and the queue is kept full, so that launches do not show; the
    engine `graphs` runs what it would capture. Where an operator waits for the device (eager experts that run in a
    loop), its time has that wait. On a CPU the host's clock tells it, and the native forward counts its own operators.
    `sampler` is the greedy draw or verdict that follows such a forward. UserError for the engine `compiled`, whose
    operators are no longer apart.
    """
    require(repeats >= 1, f"repeats >= 1 must hold, but got {repeats}")
    require_apart(model)
    point = point_of(model, kind=kind, batch=batch, slots=slots, context=context, levels=levels, prefilled=prefilled)
    device = point.tokens.device
    clock = _DeviceClock(device) if device.type == "cuda" else _HostClock()
    samples: dict[str, list[float]] = defaultdict(list)
    with on_device(device), using(model) as used, _timed(model, point, used, kind, clock) as run:
        for index in range(warmup + repeats):
            clock.begin()
            routes = run()
            spent = clock.end()
            for name, seconds in spent.items() if index >= warmup else ():
                samples[name].append(seconds)
    experts = [len(set(chosen) - {model.config.num_experts}) for chosen in routes.tolist()]
    return [
        record(
            "operator",
            identity,
            model,
            Workload(batch, max(1, context), slots, dtype_of(model)),
            point.decoding,
            used,
            slots=slots,
            context=context,
            seconds=seconds,
            forwards=1,
            experts_per_layer=statistics.fmean(experts),
            forward=kind,
            operator=name,
        )
        for name, seconds in samples.items()
    ]


def require_apart(model: Zaya) -> None:
    """UserError where the model's engine leaves no operators to time."""
    engine = model.kernels.engine
    require(engine != "compiled", f"operators are timed with eager, lean or graphs: {engine} fuses them into others")


def total_seconds(records: list[Measurement]) -> float:
    """What the operators of a forward take together, by their medians; the sampler is none of them."""
    return sum(record.median_seconds for record in records if record.operator != SAMPLER)


class _HostClock:
    """Adds up the time of each operator from `begin` to `end`, where operators are done when they return.

    also: other counters, which are read and reset with this one.
    """

    def __init__(self) -> None:
        self._spent: Seconds = defaultdict(float)
        self.also: list[Callable[[], Seconds]] = []

    def around(self, name: str, function: Function) -> Function:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            self._spent[name] += time.perf_counter() - began
            return result

        return timed

    def begin(self) -> None:
        self._spent.clear()
        for counter in self.also:
            counter()

    def end(self) -> Seconds:
        found: Seconds = {}
        for counter in self.also:
            found |= counter()
        return found | self._spent


class _DeviceClock:
    """The same where a GPU queues them: it is held back until some of them wait, so that none waits for its launch.

    Every few operators it is held for twice what the host takes to queue them. All behind one hold would not do: with
    a full queue the host waits, and queues the rest while the GPU runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[tuple[str, Any, Any]] = []
        self._began: list[float] = []  # when the host came to each operator
        # From each operator to the next, in the pass where the host was fastest: in others it compiled, or waited.
        self._host_seconds: list[float] = []

    def around(self, name: str, function: Function) -> Function:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._began.append(time.perf_counter())
            self._hold()
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            result = function(*args, **kwargs)
            last.record()
            self._events.append((name, first, last))
            return result

        return timed

    def begin(self) -> None:
        self._events.clear()
        self._began.clear()
        wait(self._device)

    def _hold(self) -> None:
        index = len(self._events)
        if index % _HELD_OPERATORS or not self._host_seconds:
            return
        seconds = min(2 * sum(self._host_seconds[index : index + _HELD_OPERATORS]), _LONGEST_HOLD_SECONDS)
        torch.cuda._sleep(int(seconds * _FASTEST_CLOCK_HZ))

    def end(self) -> Seconds:
        took = [after - began for began, after in pairwise([*self._began, time.perf_counter()])]
        self._host_seconds = list(map(min, took, self._host_seconds or took))
        wait(self._device)
        spent: Seconds = defaultdict(float)
        for name, first, last in self._events:
            spent[name] += first.elapsed_time(last) * 1e-3
        return dict(spent)


@contextmanager
def _timed(
    model: Zaya, point: Point, kernels: KernelConfig, kind: ForwardKind, clock: _HostClock | _DeviceClock
) -> Iterator[Callable[[], Tensor]]:
    """What runs the forward, the LM head and the sampler once, every operator timed; returns the chosen experts."""
    sampling: Sampling = sampling_of(model) if kernels.engine == "graphs" else Plain()
    sample = clock.around(SAMPLER, _sampler(sampling, point, kind))
    if kernels.engine == "eager" or not serves(model, point.layout, point.cache, None):
        with _replaced(_eager_parts(model), clock.around):
            yield lambda: _run(lambda: model.run(point.tokens, point.layout, point.cache), model.project, sample, point)
        return
    ops = operators(model, kernels)
    if ops.whole is not None and isinstance(clock, _HostClock):
        native: list[Any] = []

        def whole(forward: FusedForward) -> Any:
            assert ops.whole is not None
            native.append(ops.whole(forward))
            return native[0]

        fused = FusedForward(model, dataclasses.replace(ops, whole=whole), point.cache)
        clock.also.append(native[0].times)
        project = clock.around("lm_head", model.project)
    else:
        fused = FusedForward(model, wrap(ops, clock.around), point.cache)
        project = fused.project
    lengths = point.cache.device_lengths()
    yield lambda: _run(lambda: fused.forward(point.tokens, point.layout, lengths), project, sample, point)


def _run(forward: Callable[[], tuple[Tensor, Tensor]], project: Function, sample: Function, point: Point) -> Tensor:
    hidden, routes = forward()
    sample(project(hidden[:, point.rows]))
    return routes


def _sampler(sampling: Sampling, point: Point, kind: ForwardKind) -> Function:
    """What a greedy step does with the logits [B, R, V] of such a forward."""
    drafts, device = point.decoding.draft_tokens, str(point.tokens.device)

    def draw(logits: Tensor) -> Tensor:
        return sampling.draw(logits, constant((0.0,) * logits.shape[1], torch.float32, device), None)

    def verify(logits: Tensor) -> Any:
        temperatures = constant((0.0,) * drafts, torch.float32, device)
        judged = Draft(point.tokens[:, 1 : drafts + 1], logits[:, :drafts], temperatures)
        return sampling.verify(logits, judged, 0.0, 1.0, None)

    if kind in ("decode", "draft"):
        return draw
    if kind == "verify":
        return verify if point.tokens.shape[1] > 1 else draw
    return lambda logits: (verify(logits[:, : drafts + 1]), draw(logits[:, drafts + 1 :]))


def _eager_parts(model: Zaya) -> list[tuple[Any, str, str]]:
    """What an eager forward calls: the object, its method, and the operator that it belongs to."""
    parts: list[tuple[Any, str, str]] = [
        (model.model, "embed", "embedding"),
        (model.model.norm, "forward", "norms_residual"),
        (model, "project", "lm_head"),
    ]
    for layer in model.stack:
        attention = layer.self_attn
        parts += [(attention, name, name) for name in ("qkv", "cca", "attention", "output")]
        parts += [(layer.mlp.gate, "forward", "router"), (layer.mlp.experts, "forward", "experts")]
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        scalings = (layer.post_attention_residual_scale, layer.post_mlp_residual_scale)
        parts += [(module, "forward", "norms_residual") for module in (*norms, *scalings)]
    return parts


@contextmanager
def _replaced(parts: list[tuple[Any, str, str]], around: Callable[[str, Function], Function]) -> Iterator[None]:
    """Methods of single objects, timed; their classes stay as they are."""
    before = [vars(owner).get(method) for owner, method, _ in parts]  # what hides the class's method already
    for owner, method, operator in parts:
        setattr(owner, method, around(operator, getattr(owner, method)))
    try:
        yield
    finally:
        for (owner, method, _), hiding in zip(parts, before, strict=True):
            if hiding is None:
                delattr(owner, method)
            else:
                setattr(owner, method, hiding)
