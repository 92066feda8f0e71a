"""Many requests on a fixed number of slots: a finished sequence's slot is refilled from a queue."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np
import torch

from runtime.cache import Cache
from runtime.config import DecodingConfig, KernelConfig, require
from runtime.deployment import Rule, rule_for
from runtime.graphs import lease, step
from runtime.layout import causal
from runtime.model.zaya import Zaya
from runtime.policy import Settings, apply_kernels, rules_of
from runtime.samplers.acceptance import Randomness
from runtime.samplers.state import Decode, ForwardCounter, TraceStep

PREFILL_TOKENS = 512  # prompt tokens of a sequence per forward: bounds the memory of the attention mask
FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    seed: of the request's own random stream, so that its tokens do not depend on its neighbours.
    stop_tokens: end the sequence, as its last token; None: the model's end-of-sequence tokens.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    seed: tuple[int, ...] = (0,)
    stop_tokens: Sequence[int] | None = None


class Event(NamedTuple):
    """What a step did for one request: its new tokens, and why it ended, if it did."""

    id: int
    tokens: list[int]
    finish_reason: FinishReason | None


class Served(NamedTuple):
    """How many steps some settings decoded."""

    decoding: DecodingConfig
    kernels: KernelConfig
    steps: int


@dataclass
class _Running:
    """A request in a slot."""

    id: int
    length: int  # tokens so far, the prompt's included
    room: int  # tokens that may still come
    stops: frozenset[int]


class Batcher:
    """Decodes at most `batch` requests at a time, the others wait in the order they came.

    The settings follow the deployment as the number of active sequences and their longest context change. Kernel
    settings stay as the last rule left them: run a batcher of a deployment inside `policy.using(model)`.
    """

    def __init__(
        self,
        model: Zaya,
        decoding: Settings,
        *,
        batch: int,
        context: int,
        trace: list[TraceStep] | None = None,
        ignore_mismatch: bool = False,
    ) -> None:
        """context: the most tokens a request can have, new ones included. trace: filled with every step's logits.

        ignore_mismatch: follow a deployment of another model or device, too (see `policy.rules_of`).
        """
        require(batch >= 1, f"batch >= 1 must hold, but got {batch}")
        self.model, self.batch, self.trace = model, batch, trace
        self.context = min(context, model.config.max_position_embeddings)
        self.rules = rules_of(model, decoding, ignore_mismatch=ignore_mismatch)
        self.counters: dict[str, ForwardCounter] = {}
        self.prefill_seconds = self.decode_seconds = 0.0
        self.full_tokens, self.full_seconds = 0, 0.0  # of the steps with a sequence in every slot
        self._steps = [0] * len(self.rules)
        self._slots = max(rule.decoding.slots for rule in self.rules)  # of the widest rule: the cache serves all
        self._kept = max(rule.decoding.kept_slots for rule in self.rules)
        self._queue: OrderedDict[int, Request] = OrderedDict()
        self._ended: list[Event] = []  # cancellations to report
        self._submitted = 0
        self._decode: Decode | None = None
        self._rows: list[_Running | None] = []  # of the decode's rows; None: free
        self._rule: Rule | None = None

    @property
    def active(self) -> int:
        """Requests being decoded."""
        return sum(running is not None for running in self._rows)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def served(self) -> list[Served]:
        """The settings that decoded, in the order of the deployment's rules."""
        return [
            Served(rule.decoding, rule.kernels, steps)
            for rule, steps in zip(self.rules, self._steps, strict=True)
            if steps
        ]

    def submit(self, request: Request) -> int:
        """Queue a request; its number, counting from 0. UserError for what cannot be decoded."""
        number, vocabulary = self._submitted, self.model.config.vocab_size
        require(request.max_new_tokens >= 1, f"max_new_tokens >= 1 must hold, but got {request.max_new_tokens}")
        require(min(request.seed, default=0) >= 0, f"seed >= 0 must hold, but got {request.seed}")
        require(len(request.prompt) >= 1, f"a prompt must have at least one token, but prompt {number} is empty")
        require(
            min(request.prompt) >= 0 and max(request.prompt) < vocabulary,
            f"0 <= token < vocab_size = {vocabulary} must hold, but prompt {number} breaks it",
        )
        needed = len(request.prompt) + request.max_new_tokens
        require(
            needed <= self.context,
            f"prompt and new tokens must fit the context of {self.context}, but prompt {number} needs "
            f"{len(request.prompt)} + {request.max_new_tokens} = {needed}",
        )
        self._queue[number] = request
        self._submitted += 1
        return number

    def cancel(self, number: int) -> bool:
        """Drop a request, queued or running, and free its slot. False when it has ended already or never was."""
        row = next((r for r, running in enumerate(self._rows) if running and running.id == number), None)
        if row is not None:
            self._rows[row] = None
        elif self._queue.pop(number, None) is None:
            return False
        self._ended.append(Event(number, [], "cancelled"))
        return True

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Fill free slots from the queue, then decode one step. Every active request has one event."""
        new = list(islice(self._queue.items(), self.batch - self.active))
        lengths = [running.length for running in self._rows if running] + [len(r.prompt) for _, r in new]
        if not lengths:
            self._leave()
            return self._cancellations()
        rule = rule_for(self.rules, len(lengths), max(lengths))
        if rule is not self._rule:
            apply_kernels(self.model, rule.kernels)
        if new:
            self._admit(new, rule)
        began, committed = time.perf_counter(), 0
        self._leave()
        decode = self._decode
        assert decode is not None
        if decode.decoding != rule.decoding:
            # What a switch costs: drafts made ahead are lost, and a denoising block takes a forward of its own into
            # the cache. Another thread count also restarts the pool.
            decode.settle()
            decode.decoding = rule.decoding
        self._rule = rule
        rows, events = step(decode), self._cancellations()
        for row, (running, tokens) in enumerate(zip(self._rows, rows, strict=True)):
            assert running is not None  # free rows have been filled or have left
            kept, reason = _truncate(tokens, running.room, running.stops)
            running.length += len(kept)
            running.room -= len(kept)
            committed += len(kept)
            events.append(Event(running.id, kept, reason))
            if reason is not None:
                self._rows[row] = None
        seconds = time.perf_counter() - began
        self._steps[self.rules.index(rule)] += 1
        self.decode_seconds += seconds
        if len(lengths) == self.batch:
            self.full_tokens += committed
            self.full_seconds += seconds
        return events

    def _cancellations(self) -> list[Event]:
        """Those not yet reported."""
        events, self._ended = self._ended, []
        return events

    def _admit(self, new: list[tuple[int, Request]], rule: Rule) -> None:
        """Prefill the requests together, and put them into free rows; the other rows stay where they are."""
        began, decode = time.perf_counter(), self._decode
        device = self.model.model.embed_tokens.weight.device
        if decode is None:
            cache = lease(self.model, self, len(new), self.context + self._slots, self._kept, self.batch)
        else:
            kept = decode.cache.ring - self.model.config.conv_history
            cache = self.model.new_cache(len(new), max(len(r.prompt) for _, r in new), kept)
        _prefill(self.model, cache, [list(r.prompt[:-1]) for _, r in new])
        randomness = Randomness(0, 0)
        randomness.generators = [np.random.default_rng(r.seed) for _, r in new]
        anchors = torch.tensor([[r.prompt[-1]] for _, r in new], device=device)
        numbers = [number for number, _ in new]
        fresh = Decode(self.model, cache, rule.decoding, anchors, randomness, numbers, self.counters, self.trace)
        if decode is None:
            self._decode, self._rows, rows = fresh, [None] * len(new), list(range(len(new)))
        else:
            rows = [row for row, running in enumerate(self._rows) if running is None][: len(new)]
            grown = len(new) - len(rows)
            if grown:
                rows += range(len(self._rows), len(self._rows) + grown)
                decode.select([*range(len(self._rows)), *[0] * grown])
                self._rows += [None] * grown
            decode.put(rows, fresh)
        for row, (number, request) in zip(rows, new, strict=True):
            stops = self.model.config.stop_token_ids if request.stop_tokens is None else request.stop_tokens
            self._rows[row] = _Running(number, len(request.prompt), request.max_new_tokens, frozenset(stops))
            del self._queue[number]
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # or what is left of the prefill would count as decoding
        self.prefill_seconds += time.perf_counter() - began

    def _leave(self) -> None:
        """Drop the rows that nothing waits for."""
        if self._decode is None or None not in self._rows:
            return
        rows = _packed([running is not None for running in self._rows])
        if rows:
            self._decode.select(rows)
        else:
            self._decode = None
        self._rows = [self._rows[row] for row in rows]


def _packed(taken: list[bool]) -> list[int]:
    """The rows that are taken, in the order that moves the fewest: the last ones fill the gaps."""
    count = sum(taken)
    last = [row for row in range(count, len(taken)) if taken[row]]
    return [row if taken[row] else last.pop() for row in range(count)]


def _prefill(model: Zaya, cache: Cache, prompts: list[list[int]]) -> None:
    """Fill the cache with prompts of different lengths, PREFILL_TOKENS positions at a time."""
    device = model.model.embed_tokens.weight.device
    for begin in range(0, max(map(len, prompts)), PREFILL_TOKENS):
        parts = [p[begin : begin + PREFILL_TOKENS] for p in prompts]
        width = max(map(len, parts))
        tokens = torch.tensor([p + [0] * (width - len(p)) for p in parts], dtype=torch.int64, device=device)
        counts = [len(p) for p in parts]
        model.forward(tokens, causal(width, str(device)), cache, counts=counts)
        cache.advance(counts)


def _truncate(
    committed: list[int], room: int, stops: frozenset[int]
) -> tuple[list[int], Literal["stop", "length"] | None]:
    """Cut what a step committed at a stop token or at the length limit."""
    for i, token in enumerate(committed[:room]):
        if token in stops:
            return committed[: i + 1], "stop"
    return committed[:room], "length" if len(committed) >= room else None
