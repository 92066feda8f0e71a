"""Denoising: with a verification it is autoregressive decoding; without one it is what a plain recomputation says.

The reference below keeps no cache: it runs every forward of a block from scratch, over the training layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import equivalence
from hardware.files import UserError
from runtime.checkpoint import bundled, load_model
from runtime.config import DecodingConfig, replace
from runtime.conversion.objective import conversion_layout
from runtime.engine import GenerationResult, generate
from runtime.layout import Layout, block, causal
from runtime.model.zaya import Zaya
from runtime.samplers import advance, denoising
from runtime.samplers.acceptance import Randomness
from runtime.samplers.state import Decode
from tests.enumeration import RIGHT, WRONG
from tests.models import TINY, noisy_model, random_ids, relative_error
from tests.test_cache import CONFIGS, assert_same_state, fresh
from tests.test_samplers import TEMPERATURE, outcomes, prompts_of

torch.set_num_threads(1)
AUTOREGRESSIVE = DecodingConfig()


@cache
def model_of(name: str) -> Zaya:
    return noisy_model(CONFIGS[name], seed=2)


MODELS = pytest.mark.parametrize("name", CONFIGS)  # "sliding-biased-long" has all that a layout can get wrong


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def run(
    model: Zaya, prompts: list[list[int]], decoding: DecodingConfig, new_tokens: int = 24, **kwargs: Any
) -> GenerationResult:
    return generate(model, prompts, decoding, max_new_tokens=new_tokens, stop_tokens=(), **kwargs)


def denoise(block_size: int, steps: int, threshold: float | None = None, **settings: Any) -> DecodingConfig:
    return DecodingConfig("denoising", block_size, denoising_steps=steps, confidence_threshold=threshold, **settings)


# Verified


@MODELS
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize(
    "decoding", [denoise(1, 1), denoise(4, 2), denoise(5, 5, 0.3), denoise(8, 3, 0.2), denoise(16, 4)]
)
def test_greedy_denoising_with_a_verification_is_greedy_autoregressive(
    name: str, batch: int, decoding: DecodingConfig
) -> None:
    model, prompts = model_of(name), prompts_of(batch)
    found = run(model, prompts, replace(decoding, verify=True))
    assert found.tokens == run(model, prompts, AUTOREGRESSIVE).tokens
    assert set(found.counters) == {"draft", "verify"}
    assert found.counters["verify"].forwards <= found.counters["draft"].forwards


def test_the_steps_change_the_drafts_and_never_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = model_of("plain"), prompts_of(5)
    expected = run(model, prompts, AUTOREGRESSIVE).tokens
    histograms = set()
    for settings in (denoise(6, 1), denoise(6, 2), denoise(6, 6), denoise(6, 6, 0.1)):
        found = run(model, prompts, replace(settings, verify=True))
        assert found.tokens == expected
        histograms.add(tuple(found.acceptance_histogram))
    assert len(histograms) > 1
    monkeypatch.setattr(denoising, "unmask", least_confident)
    assert run(model, prompts, denoise(6, 3, verify=True)).tokens == expected


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mixing_weight": 0.4},
        {"temperature": 1.0, "draft_temperature": 0.9},
        {"temperature": 0.7, "draft_temperature": 0.9, "mixing_weight": 0.6},
    ],
)
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_one_verified_step_is_two_forward_bit_for_bit(settings: dict[str, Any], threshold: float | None) -> None:
    model, prompts = model_of("plain"), prompts_of(5)
    runs = []
    for decoding in (DecodingConfig("two_forward", 5, **settings), denoise(5, 1, threshold, verify=True, **settings)):
        decode = start(model, prompts, decoding, seed=3)
        committed = [advance(decode) for _ in range(6)]
        runs.append((committed, decode.trace, {k: (c.forwards, c.slots) for k, c in decode.counters.items()}))
    (tokens, trace, counts), (denoised, denoised_trace, denoised_counts) = runs
    assert denoised == tokens and denoised_counts == counts
    assert trace is not None and denoised_trace is not None
    for step, other in zip(trace, denoised_trace, strict=True):
        assert step.draft is not None and other.draft is not None and step.committed == other.committed
        assert torch.equal(step.logits, other.logits) and torch.equal(step.draft.logits, other.draft.logits)


@pytest.mark.parametrize("decoding", [denoise(2, 2), denoise(3, 2, 0.4)])
def test_sampled_and_verified_it_has_the_autoregressive_distribution(decoding: DecodingConfig) -> None:
    assert outcomes().p_value(replace(decoding, verify=True, temperature=TEMPERATURE), seed=2) > RIGHT


def test_the_same_test_rejects_sampling_without_a_verification() -> None:
    assert outcomes().p_value(denoise(3, 2, temperature=TEMPERATURE), draws=4000) < WRONG


def test_the_same_test_rejects_warm_drafts_of_several_steps() -> None:
    """Which is why the configuration refuses them: a draft kept for being likely was not drawn with probability q."""
    settings: dict[str, Any] = {"verify": True, "temperature": TEMPERATURE, "draft_temperature": 1.5}
    with pytest.raises(UserError, match=r"at draft_temperature 0 only, but got 1\.5"):
        denoise(3, 3, **settings)
    decoding = denoise(3, 1, **settings)
    object.__setattr__(decoding, "denoising_steps", 3)
    assert outcomes().p_value(decoding, draws=8000) < WRONG


@pytest.mark.skipif("zaya-nano" not in bundled(), reason="zaya-nano is not in this checkout")
@pytest.mark.parametrize(("batch", "decoding"), [(1, denoise(16, 4, 0.9)), (3, denoise(8, 3))])
def test_zaya_nano_verified_equals_autoregressive(batch: int, decoding: DecodingConfig) -> None:
    model = load_model("zaya-nano")
    prompts = equivalence.prompts_for(model, 3)
    expected = equivalence.autoregressive(model, prompts, batch=batch, new_tokens=20)
    found = equivalence.compare(model, prompts, expected, replace(decoding, verify=True), batch=batch, new_tokens=20)
    assert found.different == []
    assert found.acceptance_length > 1.5


# Unverified, against a reference


class Reference(NamedTuple):
    tokens: list[int]
    logits: list[Tensor]  # [V] each, that the token was drawn from
    forwards: list[int]  # per block


def block_logits(model: Zaya, clean: list[int], filled: list[int]) -> Tensor:
    """[K, V] of a partly decided block behind clean tokens, from the training layout: [clean, copy], no cache."""
    length, size = len(clean), len(filled)
    starts = torch.tensor([[*range(length), *[length] * size]])
    tokens = torch.tensor([[*clean, *[7] * size, *[9] * length, *filled]])  # what a block must not see is arbitrary
    return model.project(model.forward(tokens, conversion_layout(starts)))[0, -size:]


def reference(
    model: Zaya, prompt: list[int], decoding: DecodingConfig, blocks: int, seed: int, index: int
) -> Reference:
    """One sequence, position by position. Uniforms: one per position and block, from the sequence's own stream."""
    size, mask, rng = decoding.draft_tokens, model.config.mask_token_id, np.random.default_rng([seed, index])
    assert mask is not None
    found = Reference([], [], [])
    for _ in range(blocks):
        decided: dict[int, tuple[int, Tensor]] = {}
        uniforms = rng.random(size) if decoding.temperature else None
        forwards = 0
        while len(decided) < size:
            forwards += 1
            filled = [decided[j][0] if j in decided else mask for j in range(size)]
            logits = block_logits(model, [*prompt, *found.tokens], filled)
            candidates = []
            for j in set(range(size)) - set(decided):
                token = int(logits[j].argmax())
                if uniforms is not None:
                    total = torch.softmax(logits[j] / decoding.temperature, -1).double().cumsum(0)
                    token = int((total <= uniforms[j] * total[-1]).sum())
                candidates.append((float(torch.softmax(logits[j], -1)[token]), j, token))
            candidates.sort(key=lambda c: (-c[0], c[1]))
            threshold = math.inf if decoding.confidence_threshold is None else decoding.confidence_threshold
            for rank, (confidence, j, token) in enumerate(candidates):
                if rank < math.ceil(size / decoding.denoising_steps) or confidence >= threshold:
                    decided[j] = token, logits[j]
        found.tokens.extend(decided[j][0] for j in range(size))
        found.logits.extend(decided[j][1] for j in range(size))
        found.forwards.append(forwards)
    return found


def start(model: Zaya, prompts: list[list[int]], decoding: DecodingConfig, *, seed: int = 0) -> Decode:
    """A prefilled batch, with a cache no larger than the engine's."""
    cache = model.new_cache(len(prompts), 80 + decoding.slots, decoding.slots)
    counts = [len(p) - 1 for p in prompts]
    if max(counts):
        tokens = torch.tensor([p[:-1] + [0] * (max(counts) + 1 - len(p)) for p in prompts])
        model.forward(tokens, causal(max(counts)), cache, counts=counts)
        cache.advance(counts)
    anchors = torch.tensor([p[-1:] for p in prompts])
    rows = list(range(len(prompts)))
    return Decode(model, cache, decoding, anchors, Randomness(seed, len(prompts)), rows, trace=[])


def least_confident(confidence: Tensor, decided: Tensor, share: int, threshold: float | None) -> Tensor:
    order = confidence.masked_fill(decided, math.inf).argsort(dim=-1, stable=True)
    return (order.argsort(-1) < share) & ~decided


UNVERIFIED = [
    denoise(1, 1),
    denoise(5, 1),
    denoise(4, 2),
    denoise(5, 4),
    denoise(6, 6),
    denoise(6, 4, 0.2),
    denoise(7, 7, 0.0),
    denoise(6, 3, temperature=1.0),
    denoise(6, 6, 0.2, temperature=0.6),
]


@MODELS
@pytest.mark.parametrize("decoding", UNVERIFIED)
def test_unverified_tokens_are_those_of_a_recomputation_without_a_cache(name: str, decoding: DecodingConfig) -> None:
    """Alone and in a ragged batch, whose rows need different numbers of steps: a row's draws are its own."""
    model, prompts, blocks = model_of(name), prompts_of(4), 5
    size = decoding.draft_tokens
    expected = [reference(model, p, decoding, blocks, 11, i) for i, p in enumerate(prompts)]
    found = run(model, prompts, decoding, blocks * size, seed=11)
    assert found.tokens == [r.tokens for r in expected]
    assert run(model, prompts[:1], decoding, blocks * size, seed=11).tokens == found.tokens[:1]
    assert found.steps == [blocks] * 4 and found.acceptance_histogram == [0] * (size - 1) + [4 * blocks]

    together = [max(r.forwards[b] for r in expected) for b in range(blocks)]  # the slowest row's steps
    assert {kind: c.forwards for kind, c in found.counters.items()} == {"draft": sum(together)}
    assert run(model, prompts, decoding, blocks * size, seed=11, batch=3).tokens == found.tokens  # slots are refilled
    if decoding.confidence_threshold:
        assert any(len({r.forwards[b] for r in expected}) > 1 for b in range(blocks))  # some rows wait for others
    pending = 1 + (blocks - 1) * size
    assert found.slots == 4 * (pending + size * sum(together))  # nothing is run twice, and full rows are counted


def test_the_forwards_of_a_block() -> None:
    model, prompts = model_of("plain"), prompts_of(4)

    def forwards(size: int, steps: int, threshold: float | None = None) -> float:
        return run(model, prompts, denoise(size, steps, threshold), 4 * size).forwards / 4

    assert [forwards(8, steps) for steps in (1, 2, 4, 8)] == [1, 2, 4, 8]
    assert forwards(8, 5) == 4  # ceil(8 / 5) = 2 positions a step
    assert forwards(8, 8, 0.0) == 1 and forwards(8, 8, 1.0) == 8
    assert 1 < forwards(8, 8, 0.3) < 8


def test_another_order_of_unmasking_gives_another_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts, decoding = model_of("plain"), prompts_of(4), denoise(6, 3)
    right = run(model, prompts, decoding).tokens
    monkeypatch.setattr(denoising, "unmask", least_confident)
    assert all(wrong != row for wrong, row in zip(run(model, prompts, decoding).tokens, right, strict=True))


def test_unmasking_takes_the_share_and_what_passes() -> None:
    confidence = torch.tensor([[0.2, 0.9, 0.5, 0.5, 0.7]])
    none, some = torch.zeros(1, 5, dtype=torch.bool), torch.tensor([[False, True, False, False, True]])

    def positions(decided: Tensor, share: int, threshold: float | None) -> list[int]:
        return denoising.unmask(confidence, decided, share, threshold)[0].nonzero().flatten().tolist()

    assert positions(none, 2, None) == [1, 4]
    assert positions(none, 1, 0.5) == [1, 2, 3, 4]
    assert positions(none, 1, 0.95) == [1]  # at least the share, whatever the threshold
    assert positions(some, 1, None) == [2]  # the first of a tie; what is decided stays
    assert positions(some, 4, 0.0) == [0, 2, 3]


@pytest.mark.parametrize("decoding", [denoise(4, 2), denoise(5, 5, 0.1, temperature=0.8)])
def test_a_trace_has_the_logits_that_each_token_was_drawn_from(decoding: DecodingConfig) -> None:
    model, prompts = model_of("plain"), prompts_of(3)
    decode = start(model, prompts, decoding)
    for _ in range(3):
        advance(decode)
    expected = [reference(model, p, decoding, 3, 0, i) for i, p in enumerate(prompts)]
    assert decode.trace is not None and len(decode.trace) == 3
    for row in range(3):
        found = torch.cat([step.logits[row] for step in decode.trace])
        assert relative_error(found, torch.stack(expected[row].logits)) < 1e-5
    assert all(step.committed == [decoding.draft_tokens] * 3 and step.draft is None for step in decode.trace)


# The tokens that the cache lacks


def catch_up(decode: Decode, counts: list[int]) -> None:
    """Bring `counts[r]` of the tokens behind row r into the cache, as if it had joined or settled apart."""
    assert decode.behind is not None
    rows = [row[:n] + [0] * (max(counts) - n) for row, n in zip(decode.behind, counts, strict=True)]
    decode.model.forward(torch.tensor(rows), causal(max(counts)), decode.cache, counts=counts)
    decode.cache.advance(counts)
    decode.behind = [row[n:] for row, n in zip(decode.behind, counts, strict=True)]


@MODELS
@pytest.mark.parametrize("decoding", [denoise(4, 2), denoise(5, 5, 0.15, temperature=0.9)])
def test_rows_may_lack_different_numbers_of_tokens(name: str, decoding: DecodingConfig) -> None:
    """As in continuous batching, where a new sequence lacks one token and the others lack a block."""
    model, prompts, blocks, size = model_of(name), prompts_of(4), 8, decoding.draft_tokens
    decode = start(model, prompts, decoding, seed=5)
    texts: list[list[int]] = [[] for _ in prompts]
    seen = set()
    for number in range(blocks):
        for row, committed in enumerate(advance(decode)):
            texts[row] += committed
        counts = [(row * 3 + number) % size for row in range(4)]
        if number % 3 < 2:
            catch_up(decode, counts)
        seen.add(tuple(map(len, decode.pending)))
        assert [(p + t)[n:] for p, t, n in zip(prompts, texts, decode.cache.lengths, strict=True)] == decode.pending
    assert len(seen) > 3 and (size,) * 4 in seen
    assert texts == [reference(model, p, decoding, blocks, 5, i).tokens for i, p in enumerate(prompts)]
    assert min(decode.cache.lengths) > 2 * decode.cache.ring  # round the ring more than twice


@MODELS
@pytest.mark.parametrize("ragged", [False, True])
def test_settled_the_cache_is_that_of_a_fresh_prefill_and_others_can_go_on(name: str, ragged: bool) -> None:
    model, prompts, decoding = model_of(name), prompts_of(4), denoise(5, 2)
    decode = start(model, prompts, decoding)
    texts = [list(p) for p in prompts]
    for _ in range(5):
        for text, committed in zip(texts, advance(decode), strict=True):
            text += committed
    if ragged:
        catch_up(decode, [0, 4, 1, 2])
    decode.select([3, 1, 0])
    texts = [texts[3], texts[1], texts[0]]
    decode.settle()
    assert decode.behind is None and decode.counters["settle"].forwards == 1
    assert decode.counters["settle"].slots == 3 * 4
    for row, text in enumerate(texts):
        assert_same_state(decode.cache.state(row), fresh(model, text[:-1]).state(0))
    decode.settle()
    assert decode.counters["settle"].forwards == 1  # nothing is left to do

    for following in (AUTOREGRESSIVE, DecodingConfig("two_forward", 3), decoding, AUTOREGRESSIVE):
        expected = run(model, texts, following, 5).tokens
        decode.decoding = following
        added: list[list[int]] = [[] for _ in texts]
        while min(map(len, added)) < 5:
            for row, committed in enumerate(advance(decode)):
                added[row] += committed
        assert [row[:5] for row in added] == expected
        texts = [text + new for text, new in zip(texts, added, strict=True)]
        decode.settle()


# Layout


def test_padding_is_seen_by_nobody_and_leaves_nothing() -> None:
    model, pending, size = model_of("sliding-biased-long"), (2, 1, 4), 3
    layout = block(size, pending)
    assert layout.slots == 7 and layout.visible is not None
    real = torch.arange(7) < torch.tensor(pending)[:, None] + size
    for row in range(3):
        assert not layout.visible[row][real[row]][:, ~real[row]].any()
    outcomes = []
    for padding in (0, 11):
        _, cache = ragged_cache(model)
        tokens = torch.where(real, random_ids(3, 7, TINY.vocab_size, seed=4), padding)
        hidden = model.forward(tokens, layout, cache, counts=list(pending))
        cache.advance(list(pending))
        outcomes.append((hidden[real], [cache.state(row) for row in range(3)]))
    assert relative_error(outcomes[0][0], outcomes[1][0]) < 1e-5
    for one, other in zip(outcomes[0][1], outcomes[1][1], strict=True):
        assert_same_state(one, other)


def ragged_cache(model: Zaya) -> tuple[Tensor, Any]:
    """Three sequences of 19, 0 and 8 tokens; the ring holds 8 to 9 columns."""
    tokens, lengths = random_ids(3, 19, TINY.vocab_size, seed=6), [19, 0, 8]
    cache = model.new_cache(3, 40, 6)
    model.forward(tokens, causal(19), cache, counts=lengths)
    cache.advance(lengths)
    return tokens, cache


@MODELS
def test_slots_may_lie_in_any_order_and_differ_by_row(name: str) -> None:
    """A layout's offsets, sight and predecessors may be given per row: nothing but the order of the slots changes."""
    model, pending, size = model_of(name), (2, 1, 4), 3
    plain = block(size, pending)
    assert plain.visible is not None
    tokens = random_ids(3, 7, TINY.vocab_size, seed=8)
    expected = model.forward(tokens, plain, ragged_cache(model)[1], counts=list(pending))
    order = torch.stack([torch.randperm(7, generator=torch.Generator().manual_seed(row)) for row in range(3)])
    place = order.argsort(-1)  # where a slot went
    previous = torch.where(order == 0, -1, place.gather(1, (order - 1).clamp_min(0)))
    visible = torch.stack([plain.visible[row][order[row]][:, order[row]] for row in range(3)])
    mixed = Layout(order, visible, previous, 0)
    found = model.forward(tokens.gather(1, order), mixed, ragged_cache(model)[1])
    for row, count in enumerate(pending):
        assert relative_error(found[row][place[row]][: count + size], expected[row, : count + size]) < 1e-5
