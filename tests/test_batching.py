"""Batching: whoever shares the batch, a request gets the tokens that it gets alone; slots are refilled in order."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch

from hardware.files import UserError
from runtime import batching
from runtime.batching import Batcher, Event, Request
from runtime.checkpoint import model_hash
from runtime.config import DecodingConfig, KernelConfig, replace
from runtime.deployment import Deployment, Rule, rule_for
from runtime.engine import generate
from runtime.model.zaya import Zaya
from runtime.samplers import SAMPLERS
from runtime.samplers.state import Decode, Step
from tests.models import TINY, noisy_model

torch.set_num_threads(1)
AUTOREGRESSIVE = DecodingConfig()
SETTINGS = {
    "autoregressive": AUTOREGRESSIVE,
    "two_forward": DecodingConfig("two_forward", 4),
    "anchored": DecodingConfig("two_forward", 3, anchor_draft=True),
    "mixed": DecodingConfig("two_forward", 4, mixing_weight=0.5),
    "dense levels": DecodingConfig("single_forward", 4),
    "sparse levels": DecodingConfig("single_forward", 6, proposal_levels=(0, 2, 5)),
    "verified": DecodingConfig("denoising", 5, denoising_steps=2, confidence_threshold=0.4, verify=True),
    "unverified": DecodingConfig("denoising", 5, denoising_steps=3, confidence_threshold=0.4),
}
EACH = pytest.mark.parametrize("decoding", SETTINGS.values(), ids=SETTINGS)


@cache
def model() -> Zaya:
    return noisy_model(seed=2)


@cache
def requests(count: int, seed: int = 0) -> list[Request]:
    """Prompts of 1 to 12 tokens, 1 to 9 new ones, some of which meet a stop token."""
    rng = random.Random(seed)
    return [
        Request(
            tuple(rng.randrange(28) for _ in range(rng.randint(1, 12))),
            rng.randint(1, 9),
            seed=(7, index),
            stop_tokens=tuple(rng.sample(range(28), rng.randint(0, 2))),
        )
        for index in range(count)
    ]


def batcher(decoding: Any, batch: int) -> Batcher:
    return Batcher(model(), decoding, batch=batch, context=44)


def drain(found: Batcher, events: list[Event] | None = None) -> list[Event]:
    events = [] if events is None else events
    while found.active or found.waiting:
        events += found.step()
    return events


def outputs(events: Sequence[Event]) -> dict[int, tuple[list[int], str | None]]:
    """Tokens and finish reason per request, from its events in the order they came."""
    found: dict[int, tuple[list[int], str | None]] = {}
    for number, tokens, reason in events:
        before, ended = found.get(number, ([], None))
        assert ended is None, "an ended request has no more events"
        found[number] = (before + tokens, reason)
    return found


@cache
def alone(decoding: DecodingConfig, count: int, seed: int = 0) -> dict[int, tuple[list[int], str | None]]:
    found = {}
    for index, request in enumerate(requests(count, seed)):
        one = batcher(decoding, 1)
        one.submit(request)
        found[index] = outputs(drain(one))[0]
    return found


def together(decoding: Any, batch: int, chosen: Sequence[Request]) -> dict[int, tuple[list[int], str | None]]:
    found = batcher(decoding, batch)
    for request in chosen:
        found.submit(request)
    return outputs(drain(found))


@EACH
def test_200_requests_get_the_tokens_they_get_alone(decoding: DecodingConfig) -> None:
    count = 200 if decoding.lossless else 60
    reference = AUTOREGRESSIVE if decoding.lossless else decoding
    assert together(decoding, 13, requests(count)) == alone(reference, count)


@pytest.mark.parametrize("batch", [2, 5, 64])
@EACH
def test_any_number_of_slots_gives_the_same_tokens(decoding: DecodingConfig, batch: int) -> None:
    reference = AUTOREGRESSIVE if decoding.lossless else decoding
    expected = alone(reference, 200 if decoding.lossless else 60)
    assert together(decoding, batch, requests(200)[:16]) == {i: expected[i] for i in range(16)}


@EACH
def test_sampled_requests_get_the_tokens_they_get_alone(decoding: DecodingConfig) -> None:
    judged = decoding.drafts and decoding.sampler != "denoising"
    warm = replace(decoding, temperature=1.0, draft_temperature=0.7 if judged else 0.0)
    expected = alone(warm, 20, 1)
    assert len({tuple(tokens) for tokens, _ in expected.values()}) > 12
    for batch in (4, 20):
        assert together(warm, batch, requests(20, 1)) == expected


def without_columns(put: Callable[..., None]) -> Callable[..., None]:
    def wrong(decode: Decode, rows: list[int], source: Decode) -> None:
        before = [columns[rows].clone() for columns in decode.cache.columns]
        put(decode, rows, source)
        for columns, old in zip(decode.cache.columns, before, strict=True):
            columns[rows] = old

    return wrong


def with_the_drafts_of_who_was_there(put: Callable[..., None]) -> Callable[..., None]:
    def wrong(decode: Decode, rows: list[int], source: Decode) -> None:
        drafted = decode.drafted
        put(decode, rows, source)
        decode.drafted = drafted

    return wrong


def with_the_stream_of_who_was_there(put: Callable[..., None]) -> Callable[..., None]:
    def wrong(decode: Decode, rows: list[int], source: Decode) -> None:
        streams = list(decode.randomness.generators)
        put(decode, rows, source)
        decode.randomness.generators = streams

    return wrong


@pytest.mark.parametrize("wrong", [without_columns, with_the_drafts_of_who_was_there, with_the_stream_of_who_was_there])
def test_the_comparison_sees_a_slot_that_was_not_refilled_whole(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Any]
) -> None:
    warm = replace(SETTINGS["sparse levels"], temperature=1.0, draft_temperature=0.7)
    expected = alone(warm, 20, 1)
    monkeypatch.setattr(Decode, "put", wrong(Decode.put))
    assert together(warm, 4, requests(20, 1)) != expected


@EACH
def test_every_request_ends_by_its_stop_token_or_exactly_at_its_length(decoding: DecodingConfig) -> None:
    found = together(decoding, 6, requests(30, 2))
    for request, (tokens, reason) in zip(requests(30, 2), (found[i] for i in range(30)), strict=True):
        stopped = [i for i, token in enumerate(tokens) if token in (request.stop_tokens or ())]
        if reason == "stop":
            assert stopped == [len(tokens) - 1] and len(tokens) <= request.max_new_tokens
        else:
            assert reason == "length" and not stopped and len(tokens) == request.max_new_tokens
    assert {reason for _, reason in found.values()} == {"stop", "length"}


def test_requests_start_in_the_order_they_came_and_no_slot_stays_empty() -> None:
    found = batcher(SETTINGS["two_forward"], 5)
    for request in requests(40):
        found.submit(request)
    started: list[int] = []
    while found.active or found.waiting:
        expected = min(5, found.active + found.waiting)
        events = found.step()
        assert len(events) == expected
        started += [event.id for event in events if event.id not in started]
    assert started == list(range(40))


@EACH
def test_requests_that_come_later_change_nothing(decoding: DecodingConfig) -> None:
    """Also when the batch had shrunk: it grows again beside sequences in the middle of their text."""
    found, expected = batcher(decoding, 6), alone(decoding, 16, 3)
    waiting = list(requests(16, 3))
    events: list[Event] = []
    for arrivals in (4, 0, 1, 0, 0, 0, 5, 0, 0, 6):
        for request in [waiting.pop(0) for _ in range(arrivals)]:
            found.submit(request)
        events += found.step()
    assert outputs(drain(found, events)) == expected


@EACH
def test_a_cancelled_request_frees_its_slot_and_disturbs_nobody(decoding: DecodingConfig) -> None:
    long = [replace(r, max_new_tokens=24, stop_tokens=()) for r in requests(6, 4)]
    expected = together(decoding, 6, long)
    found = batcher(decoding, 3)
    for request in long:
        found.submit(request)
    events = found.step()
    assert {event.id for event in events} == {0, 1, 2}
    assert found.cancel(1) and found.cancel(4)  # one runs, one waits
    assert (found.active, found.waiting) == (2, 2)
    step = found.step()
    assert step[:2] == [(1, [], "cancelled"), (4, [], "cancelled")]
    assert {event.id for event in step[2:]} == {0, 2, 3}  # the next one has the slot at once
    assert not found.cancel(1) and not found.cancel(4) and not found.cancel(17)
    ended = outputs(drain(found, [*events, *step]))
    assert {number: ended[number] for number in (0, 2, 3, 5)} == {n: expected[n] for n in (0, 2, 3, 5)}
    cut, reason = ended[1]
    assert reason == "cancelled" and cut == expected[1][0][: len(cut)] != []
    assert ended[4] == ([], "cancelled")


def test_cancelling_the_last_one_leaves_an_idle_batcher_that_can_go_on() -> None:
    found = batcher(SETTINGS["dense levels"], 2)
    found.submit(requests(3)[0])
    found.step()
    assert found.cancel(0) and (found.active, found.waiting) == (0, 0)
    assert found.step() == [(0, [], "cancelled")]
    assert found.step() == []
    found.submit(requests(3)[0])
    assert outputs(drain(found))[1] == alone(AUTOREGRESSIVE, 200)[0]


@pytest.mark.parametrize("batch", [None, 3])
@EACH
def test_streaming_gives_exactly_the_tokens_in_order(decoding: DecodingConfig, batch: int | None) -> None:
    heard: list[Event] = []
    prompts = [r.prompt for r in requests(9, 5)]
    limits = [r.max_new_tokens for r in requests(9, 5)]
    result = generate(
        model(),
        prompts,
        decoding,
        max_new_tokens=limits,
        stop_tokens=(3, 11),
        batch=batch,
        on_tokens=lambda *event: heard.append(Event(*event)),
    )
    assert all(event.tokens for event in heard)
    found = outputs(heard)
    assert [found[i] for i in range(9)] == list(zip(result.tokens, result.finish_reasons, strict=True))
    assert Counter(event.id for event in heard) == Counter(dict(enumerate(result.steps)))
    assert result.batching == ("closed" if batch is None else "continuous")


# The two throughputs


def test_full_steps_are_those_with_a_sequence_in_every_slot() -> None:
    """Lengths 2, 5 and 5: a closed batch is full for 2 steps; on two slots it is full until one alone is left."""
    runs = {
        batch: generate(model(), [[1], [2], [3]], AUTOREGRESSIVE, max_new_tokens=[2, 5, 5], stop_tokens=(), batch=batch)
        for batch in (None, 2, 1, 8)
    }
    assert {batch: r.full_tokens for batch, r in runs.items()} == {None: 6, 2: 10, 1: 12, 8: 6}
    assert {batch: r.batching for batch, r in runs.items()} == {
        None: "closed", 2: "continuous", 1: "continuous", 8: "closed"
    }  # fmt: skip
    for r in runs.values():
        assert 0 < r.full_seconds <= r.decode_seconds
        assert r.full_tokens_per_second == r.full_tokens / r.full_seconds
        assert r.tokens_per_second == 12 / r.decode_seconds
    assert {batch: r.forwards for batch, r in runs.items()} == {None: 5, 2: 7, 1: 12, 8: 5}


def test_prefilling_is_not_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    prefill: Callable[..., None] = batching._prefill

    def slow(*arguments: Any) -> None:
        time.sleep(0.3)
        prefill(*arguments)

    monkeypatch.setattr(batching, "_prefill", slow)
    result = generate(model(), [[1], [2], [3]], AUTOREGRESSIVE, max_new_tokens=2, stop_tokens=(), batch=1)
    assert result.prefill_seconds >= 0.9 > result.decode_seconds


# Deployments


def deployment(*rules: Rule) -> Deployment:
    return Deployment("tiny", model_hash(model()), {}, rules, "2026-01-01", "test")


def served_steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, DecodingConfig, Any]]:
    """Filled, per step, with the sequences, their longest cached length, the settings, and how the experts run."""
    seen: list[tuple[int, int, DecodingConfig, Any]] = []

    def noted(step: Callable[[Decode], Step]) -> Callable[[Decode], Step]:
        def run(decode: Decode) -> Step:
            longest = max(n + len(row) for n, row in zip(decode.cache.lengths, decode.pending, strict=True))
            seen.append((len(decode.sequences), longest, decode.decoding, decode.model.kernels.experts))
            return step(decode)

        return run

    for name, step in list(SAMPLERS.items()):
        monkeypatch.setitem(SAMPLERS, name, noted(step))
    return seen


POLICY = (
    Rule(SETTINGS["two_forward"], KernelConfig({1000: "grouped"}), max_batch=1),
    Rule(SETTINGS["sparse levels"], KernelConfig({1000: "dense"}), max_batch=3, max_context=20),
    Rule(AUTOREGRESSIVE, KernelConfig({1000: "gather"}), max_batch=3),
    Rule(SETTINGS["verified"], KernelConfig(), max_batch=5),
    Rule(SETTINGS["dense levels"], KernelConfig({1000: "loop"})),
)


@pytest.mark.parametrize("batch", [None, 5, 2])
def test_the_rule_of_the_active_sequences_serves_and_the_text_stays_autoregressive(
    monkeypatch: pytest.MonkeyPatch, batch: int | None
) -> None:
    prompts = [list(range(1 + i % 3)) for i in range(8)]
    seen = served_steps(monkeypatch)
    result = generate(
        model(),
        prompts,
        deployment(*POLICY),
        max_new_tokens=[4 + 3 * i for i in range(8)],
        stop_tokens=(),
        batch=batch,
    )
    for active, longest, decoding, experts in seen:
        rule = rule_for(POLICY, active, longest)
        assert (decoding, experts) == (rule.decoding, rule.kernels.experts)
    used = {decoding for _, _, decoding, _ in seen}
    assert len(used) == (5 if batch is None else 4 if batch == 5 else 3)
    assert {s.decoding: s.steps for s in result.served} == Counter(decoding for _, _, decoding, _ in seen)
    monkeypatch.undo()
    expected = generate(model(), prompts, AUTOREGRESSIVE, max_new_tokens=25, stop_tokens=()).tokens
    assert result.tokens == [tokens[: 4 + 3 * i] for i, tokens in enumerate(expected)]


def test_after_a_block_that_was_not_verified_autoregressive_decoding_sees_all_of_it() -> None:
    """Without `settle` the cache would lack the block, and the tokens behind it would follow another text."""
    policy = deployment(Rule(AUTOREGRESSIVE, KernelConfig(), max_batch=1), Rule(SETTINGS["unverified"], KernelConfig()))
    result = generate(model(), [[5, 6], [7]], policy, max_new_tokens=[25, 10], stop_tokens=())
    assert [s.steps for s in result.served] == [15, 2] and result.counters["settle"].forwards == 1
    text = [5, 6, *result.tokens[0]]
    best = model().logits(torch.tensor([text])).argmax(-1)[0].tolist()
    assert best[11:-1] == text[12:]
    assert best[1:11] != text[2:12]  # what was not verified is another text


def test_kernel_settings_and_threads_are_put_back_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = [1]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    policy = deployment(
        Rule(AUTOREGRESSIVE, KernelConfig({1000: "dense"}, threads=3), max_batch=1),
        Rule(AUTOREGRESSIVE, KernelConfig({1000: "grouped"}), max_batch=2),
        Rule(AUTOREGRESSIVE, KernelConfig({1000: "gather"}, threads=2)),
    )
    before = model().kernels
    prompts, limits = [[1], [2], [3]], [2, 4, 6]

    def fail(index: int, tokens: list[int], reason: str | None) -> None:
        if reason == "length" and index == fails:
            raise ZeroDivisionError

    for fails in (0, 1, 2):
        threads[:] = [1]
        with pytest.raises(ZeroDivisionError):
            generate(model(), prompts, policy, max_new_tokens=limits, stop_tokens=(), on_tokens=fail)
        assert threads[-1] == 1 and model().kernels is before
        assert threads[1:-1] == [2, 1, 3][: fails + 1] or (fails, threads) == (1, [1, 2, 1])
    threads[:] = [1]
    result = generate(model(), prompts, policy, max_new_tokens=limits, stop_tokens=())
    assert [s.kernels.threads for s in result.served] == [3, 1, 2]  # a rule without threads has the process's own
    assert threads == [1, 2, 1, 3, 1] and model().kernels is before


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch >= 1 must hold, but got 0"),
        ({"batch": -2}, "batch >= 1 must hold, but got -2"),
        ({"max_new_tokens": [3]}, "one max_new_tokens per prompt must be given, but got 1"),
        ({"max_new_tokens": [3, 0]}, "max_new_tokens >= 1 must hold, but got 0"),
        ({"max_new_tokens": [3, 200]}, "the context of 128, but prompt 1 needs 1 \\+ 200 = 201"),
    ],
)
def test_impossible_batches(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(model(), [[1], [2]], AUTOREGRESSIVE, **({"max_new_tokens": 5} | changes))


def test_a_request_must_fit_the_batchers_context() -> None:
    found = batcher(AUTOREGRESSIVE, 1)
    with pytest.raises(UserError, match="the context of 44, but prompt 0 needs 40 \\+ 5 = 45"):
        found.submit(Request([1] * 40, 5))
    assert found.submit(Request([1] * 40, 4)) == 0 and found.waiting == 1


def test_a_cache_beyond_the_memory_is_one_line_that_says_how_large_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    large = noisy_model(replace(TINY, max_position_embeddings=10**12))
    with pytest.raises(UserError, match=r"out of memory on cpu: a cache of batch 2 and 300000000002 .* [\d,]{18,}"):
        generate(large, [[1], [2]], AUTOREGRESSIVE, max_new_tokens=300_000_000_000)
    found = batcher(AUTOREGRESSIVE, 1)
    found.submit(Request([1], 4))

    def full(*arguments: Any, **settings: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="batch 1 and 45 positions"):
        patch.setattr(torch, "zeros", full)
        found.step()
    assert (found.active, found.waiting) == (0, 1)  # the request still waits
    assert outputs(drain(found))[0][1] == "length"


def test_what_a_full_batch_needs_is_refused_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    one = model().new_cache(1, 45, 1)
    row = sum(tensor.nbytes for tensor in (*one.keys, *one.values, *one.columns))
    monkeypatch.setattr("runtime.cache.memory_bytes", lambda: 3 * row)
    found = batcher(AUTOREGRESSIVE, 4)
    found.submit(Request([1], 4))
    with pytest.raises(UserError, match="a cache of batch 4 and 45 positions"):
        found.step()


def test_the_cache_stays_where_it_is_as_the_batch_grows() -> None:
    found, stores = batcher(SETTINGS["dense levels"], 4), []
    for index in range(4):
        found.submit(Request([1, 2], 30 - index, (index,), ()))
        found.step()
        assert found._decode is not None
        stores.append([tensor.data_ptr() for tensor in found._decode.cache.keys])
    drain(found)
    assert all(store == stores[0] for store in stores)


def test_the_last_rows_fill_the_gaps() -> None:
    for rows in range(1, 7):
        for number in range(1 << rows):
            taken = [bool(number >> row & 1) for row in range(rows)]
            found = batching._packed(taken)
            assert sorted(found) == [row for row in range(rows) if taken[row]]
            assert sum(row != place for place, row in enumerate(found)) == sum(taken[len(found) :])
