"""Whole decoding steps over static buffers, replayed as CUDA or HIP graphs: forwards, sampling, acceptance, lengths.

A graph belongs to a number of rows and to decoding settings. Fewer sequences than rows are padded: what stands behind
them reads no expert and its length stays 0. All that a replay needs from the host are random numbers, and all that it
gives back are the tokens, in one transfer. Without a GPU nothing is recorded and a replay runs the step itself, on the
same buffers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeAlias, cast
from weakref import ReferenceType, proxy, ref

import numpy as np
import torch
from torch import Tensor

from runtime.cache import Cache
from runtime.config import DecodingConfig, require
from runtime.engines import bound, on_device, sampling_of
from runtime.fused import FusedForward
from runtime.layout import Layout
from runtime.model.zaya import Zaya
from runtime.samplers import SAMPLERS, advance, capturable, reads_draft_logits
from runtime.samplers.acceptance import Draft, Randomness
from runtime.samplers.single_forward import undrafted
from runtime.samplers.state import Decode, ForwardCounter, Step, distinct_experts

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # rows of a graph
CAPACITY_STEP = 256  # positions of a leased cache are a multiple of these, so that the next owner finds room
MOST_GRAPHS = 24  # kept of one cache; each holds some tens of MB, beside what they share


def bucket(batch: int) -> int:
    """The rows of the graph that serves so many sequences."""
    return next((rows for rows in BUCKETS if rows >= batch), -(-batch // BUCKETS[-1]) * BUCKETS[-1])


@torch.inference_mode()
def lease(model: Zaya, owner: object, batch: int, capacity: int, max_slots: int, rows: int) -> Cache:
    """`Zaya.new_cache` for as long as `owner` lives. The engine `graphs` gives its cache of before to the next owner,
    with the graphs that were captured on it, where it is large enough and nobody uses it any more.
    """
    if model.kernels.engine != "graphs":
        return model.new_cache(batch, capacity, max_slots, rows=rows)
    found: tuple[Cache, ReferenceType[object]] | None = model.leased
    if found is not None and found[1]() in (None, owner):
        cache = found[0]
        model.leased = None  # or the memory of two would be needed
        if cache.rows >= rows and cache.capacity >= capacity and cache.ring >= max_slots + model.config.conv_history:
            cache.reset(batch)
            model.leased = cache, ref(owner)
            return cache
        del cache, found
    capacity = -(-capacity // CAPACITY_STEP) * CAPACITY_STEP
    cache = model.new_cache(batch, capacity, max_slots, rows=bucket(rows))
    if model.leased is None:
        model.leased = cache, ref(owner)
    return cache


def step(decode: Decode) -> list[list[int]]:
    """One step of the decode's sampler: the committed tokens per sequence. Replayed where the engine is `graphs`.

    Logits that are traced are not kept by a graph, and some settings follow lists of the host: those steps run as they
    are.
    """
    if decode.model.kernels.engine != "graphs" or decode.trace is not None or not capturable(decode.decoding):
        return advance(decode)
    total = max(decode.cache.lengths) + decode.decoding.slots
    require(total <= decode.cache.capacity, f"{total} positions do not fit the cache of {decode.cache.capacity}")
    kept = bound(decode.model, decode.cache)
    with on_device(decode.anchors.device):
        try:
            if kept.graphs is None:
                kept.graphs = StepGraphs(decode, kept.forward)
            graph: StepGraph = kept.graphs.ready(decode)
        except BaseException:  # too little memory, say; nothing more can be captured into a pool that failed
            kept.graphs = None
            raise
        return graph.step(decode)


@cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """The stream of all warm-ups: cuBLAS keeps a workspace for every stream that it has run on."""
    return torch.cuda.Stream(device)


def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that nothing else runs on. With any graph torch frees the cuBLAS workspace of the stream it was captured
    on, though other graphs write there (pytorch #193402): they may share a stream only where they share a pool, which
    the others keep, and never with a warm-up, whose workspace lies in no pool.
    """
    stream = torch.cuda.Stream(device)
    return torch.cuda.Stream(device) if stream == _aside(device) else stream  # torch hands a few streams out in turn


def captured(
    function: Callable[[], Any],
    device: torch.device,
    *,
    warm: Callable[[], Any] | None = None,
    pool: Any = None,
    stream: torch.cuda.Stream | None = None,
) -> Callable[[], Any]:
    """What replays `function` as one graph; on a CPU the function itself. It must read and write static tensors only.

    warm: what is called before, twice, on a stream beside; by default the function. pool, stream: what graphs that live
    together share; by default each has its own.
    """
    warm = warm or function
    if device.type != "cuda":
        warm()
        return function
    with on_device(device):
        current, aside = torch.cuda.current_stream(device), _aside(device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            warm()
            warm()
        current.wait_stream(aside)
        graph, stream = torch.cuda.CUDAGraph(), stream or _capture_stream(device)
        capture = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        with torch.cuda.stream(current), capture:  # current: a capture that fails may leave its own stream in place
            function()
    return graph.replay


class _Shared:
    """What the graphs of one cache have in common: they run one after the other."""

    def __init__(self, device: torch.device, rows: int) -> None:
        on_gpu = device.type == "cuda"
        self.rows = rows  # of the largest graph
        self.pool: Any = torch.cuda.graph_pool_handle() if on_gpu else None
        self.stream = _capture_stream(device) if on_gpu else None
        self._logits: dict[int, Tensor] = {}  # by the number of drafts

    def logits(self, unread: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory for the logits [rows, K, V] of drafts: no two graphs need theirs at once, as `select` makes copies."""
        rows, drafts, vocabulary = unread.shape
        if drafts not in self._logits:
            self._logits[drafts] = torch.zeros(self.rows, drafts, vocabulary, dtype=dtype, device=unread.device)
        return self._logits[drafts][:rows]


class StepGraphs:
    """The graphs of one cache, the least recently used one dropped when there are too many."""

    def __init__(self, decode: Decode, fused: FusedForward) -> None:
        self._fused = fused
        self._shared = _Shared(decode.anchors.device, decode.cache.rows)
        self._graphs: OrderedDict[tuple[int, DecodingConfig], StepGraph] = OrderedDict()

    def ready(self, decode: Decode) -> StepGraph:
        """The graph for these sequences and settings; it is captured the first time."""
        key = min(bucket(len(decode.sequences)), decode.cache.rows), decode.decoding
        graph = self._graphs.get(key)
        if graph is None:
            graph = StepGraph(decode, self._fused, key[0], self._shared)
            graph.capture(decode)
            self._graphs[key] = graph
            if len(self._graphs) > MOST_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        return graph


class StaticRandomness(Randomness):
    """Uniforms in one device buffer, handed out in the order of the calls of a step, and drawn before each replay.

    A sequence draws the same numbers from its stream as it does from `Randomness`.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.generators = []
        self.rows, self.device = rows, device
        self.counts: list[int] = []  # numbers per sequence of each call
        self._calls = 0
        self._parts: list[Tensor] = []
        self._flat: Tensor | None = None

    def rewind(self) -> None:
        """A step begins."""
        self._calls = 0

    def uniform(self, count: int, device: torch.device) -> Tensor:
        """float64 [rows, count], the buffer of this call."""
        index, self._calls = self._calls, self._calls + 1
        if self._flat is None:  # the first step, which finds out what is drawn
            self.counts.append(count)
            return torch.zeros(self.rows, count, dtype=torch.float64, device=self.device)
        assert self.counts[index] == count, "a step always draws the same"
        return self._parts[index]

    def allocate(self) -> None:
        """Make the buffers, once a step has run."""
        if self._flat is not None:
            return
        numbers = self.rows * sum(self.counts)
        pinned = self.device.type == "cuda"
        self._flat = torch.zeros(numbers, dtype=torch.float64, device=self.device)
        self._host = torch.zeros(numbers, dtype=torch.float64, pin_memory=pinned)
        sizes = [self.rows * count for count in self.counts]
        self._parts = [p.view(self.rows, -1) for p in self._flat.split(sizes)] if sizes else []
        self._places = [p.view(self.rows, -1).numpy() for p in self._host.split(sizes)] if sizes else []

    def fill(self, generators: list[np.random.Generator]) -> None:
        """Draw for the sequences of these streams."""
        if not self.counts or self._flat is None:
            return
        for row, generator in enumerate(generators):
            for place in self._places:
                generator.random(out=place[row])
        self._flat.copy_(self._host, non_blocking=True)


Tally: TypeAlias = tuple[int, int, Tensor]  # of one kind: forwards, slots per sequence, distinct experts [layers]


@dataclass
class PaddedDecode(Decode):
    """What a sampler works on in a graph: static buffers of `rows` sequences, of which the first `active` are real."""

    fused: FusedForward = field(kw_only=True)
    lengths: Tensor = field(kw_only=True)  # int32 [rows]
    active: int = field(kw_only=True)
    kept: int = 0  # the most slots that a forward of the step writes to the ring
    tallies: dict[str, Tally] = field(default_factory=dict)
    limits: dict[int, Tensor] = field(default_factory=dict)  # int32 [1], active tokens by slots per sequence

    def forward(self, kind: str, tokens: Tensor, layout: Layout, *, counts: list[int] | None = None) -> Tensor:
        """Run and count one forward; hidden states [rows, S, hidden]."""
        slots = tokens.shape[1]
        if slots not in self.limits:
            self.limits[slots] = torch.tensor([self.active * slots], dtype=torch.int32, device=tokens.device)
        hidden, routes = self.fused.forward(tokens, layout, self.lengths, active=self.limits[slots])
        self.kept = max(self.kept, layout.committed)
        experts = distinct_experts(routes, self.model.config.num_experts + 1)
        if kind in self.tallies:
            forwards, width, before = self.tallies[kind]
            self.tallies[kind] = forwards + 1, width + slots, before + experts
        else:
            self.tallies[kind] = 1, slots, experts
        return hidden

    def project(self, hidden: Tensor) -> Tensor:
        """The logits in the model's dtype: sampling kernels raise it where they read."""
        return self.fused.project(hidden)

    def resize(self, active: int) -> None:
        """So many sequences are real from here on."""
        self.active = active
        for slots, limit in self.limits.items():
            limit.fill_(active * slots)


class StepGraph:
    """The step of one sampler and setting on `rows` sequences."""

    @torch.inference_mode()
    def __init__(self, decode: Decode, fused: FusedForward, rows: int, shared: _Shared) -> None:
        device, decoding = decode.anchors.device, decode.decoding
        self._shared, self._device = shared, device
        self._anchors = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._alive = torch.zeros(rows, dtype=torch.int64, device=device)
        self._randomness = StaticRandomness(rows, device)
        self._decode = PaddedDecode(
            cast(Zaya, proxy(decode.model)),  # which keeps the cache, as this keeps the graph: neither is kept by it
            proxy(decode.cache),
            decoding,
            self._anchors,
            self._randomness,
            list(range(rows)),
            sampling=sampling_of(decode.model),
            fused=fused,
            lengths=decode.cache.device_lengths()[:rows],
            active=0,
        )
        self._drafted: Draft | None = None
        if decoding.sampler == "single_forward":
            drafted = undrafted(self._decode)
            if reads_draft_logits(decoding):
                drafted = drafted._replace(logits=shared.logits(drafted.logits, fused.weights.table.dtype))
            self._drafted = drafted
        self._loaded: tuple[Tensor | None, Draft | None] = (None, None)  # what the caller's decode has of these buffers
        self._committed: Tensor | None = None  # int64 [rows, 1 + W], where a replay leaves its result
        self._host: Tensor | None = None
        self._replay: Callable[[], None] | None = None  # None: `_run`, which kept here would keep its owner

    @torch.inference_mode()
    def step(self, decode: Decode) -> list[list[int]]:
        """Commit one step for the sequences of `decode`."""
        cache, batch = decode.cache, len(decode.sequences)
        cache.device_lengths()  # which the step reads, brought up to date
        self._load(decode, batch)
        self._randomness.fill(decode.randomness.generators)
        (self._replay or self._run)()
        rows = self._read(decode, batch)
        tokens = [row[1 : 1 + row[0]] for row in rows]
        cache.wrote([self._decode.kept] * batch)
        cache.advance([len(row) for row in tokens], on_device=True)
        decode.anchors, decode.drafted = self._loaded = self._views(batch)
        return tokens

    def _run(self) -> None:
        """The step on the static buffers."""
        padded = self._decode
        padded.anchors, padded.drafted, padded.tallies = self._anchors, self._drafted, {}
        self._randomness.rewind()
        step: Step = SAMPLERS[padded.decoding.sampler](padded)
        padded.lengths.add_(step.counts * self._alive)
        self._anchors.copy_(padded.anchors)
        if self._drafted is not None:
            assert padded.drafted is not None and padded.drafted.lengths is not None
            _copy(self._drafted, padded.drafted, reads_draft_logits(padded.decoding))
        self._committed = step.committed
        padded.anchors, padded.drafted = self._anchors, self._drafted  # or logits would stay in the graph's memory

    @torch.inference_mode()
    def capture(self, decode: Decode) -> None:
        """Warm the step up on these sequences, which compiles kernels and finds what is drawn, and record it."""
        lengths = decode.cache.device_lengths()
        before = lengths.clone()
        self._load(decode, len(decode.sequences))

        def warm() -> None:
            self._run()
            self._randomness.allocate()
            lengths.copy_(before)  # or the next run would write further behind

        try:
            shared = self._shared
            replay = captured(self._run, self._device, warm=warm, pool=shared.pool, stream=shared.stream)
        finally:
            lengths.copy_(before)
        if replay != self._run:
            self._replay = replay
        if self._device.type == "cuda":
            assert self._committed is not None
            self._host = torch.zeros(self._committed.shape, dtype=torch.int64, pin_memory=True)
            self._arrived = torch.cuda.Event()

    def _load(self, decode: Decode, batch: int) -> None:
        """Copy what is not in the static buffers yet: after a change of sequences, or of the graph."""
        if batch != self._decode.active:
            self._decode.resize(batch)
            self._alive[:batch], self._alive[batch:] = 1, 0
        anchors, drafted = self._loaded
        if decode.anchors is not anchors:
            self._anchors[:batch].copy_(decode.anchors)
        if self._drafted is not None and (decode.drafted is not drafted or drafted is None):
            if decode.drafted is None:
                assert self._drafted.lengths is not None
                self._drafted.tokens.zero_()
                self._drafted.lengths.zero_()
            else:
                _copy(self._drafted.leading(batch), decode.drafted, reads_draft_logits(decode.decoding))

    def _views(self, batch: int) -> tuple[Tensor, Draft | None]:
        """The sequences' part of the buffers; the same objects as long as their number stays."""
        anchors, drafted = self._loaded
        if anchors is not None and len(anchors) == batch:
            return anchors, drafted
        return self._anchors[:batch], None if self._drafted is None else self._drafted.leading(batch)

    def _read(self, decode: Decode, batch: int) -> list[list[int]]:
        """Wait for the tokens of the replay; what is counted is added meanwhile."""
        assert self._committed is not None
        if self._host is not None:
            self._host.copy_(self._committed, non_blocking=True)
            self._arrived.record()
        for kind, (forwards, slots, experts) in self._decode.tallies.items():
            decode.counters.setdefault(kind, ForwardCounter()).merge(forwards, slots * batch, experts)
        if self._host is None:
            return self._committed[:batch].tolist()  # type: ignore[no-any-return]
        self._arrived.synchronize()
        return self._host[:batch].tolist()  # type: ignore[no-any-return]


def _copy(to: Draft, source: Draft, logits: bool) -> None:
    """Put drafts into a buffer. logits: those are read later."""
    to.tokens.copy_(source.tokens)
    assert to.lengths is not None
    if source.lengths is None:
        to.lengths.fill_(source.tokens.shape[1])
    else:
        to.lengths.copy_(source.lengths)
    if logits:
        to.logits.copy_(source.logits)
