"""single_forward: every level's block is a draft forward of its own, and the sampler is lossless whatever it drafts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace as changed
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks import equivalence
from benchmarks import levels as program
from runtime.checkpoint import bundled, load_model, save_model
from runtime.config import DecodingConfig, ModelConfig, replace
from runtime.engine import generate
from runtime.layout import Layout, causal, draft, single_forward
from runtime.model.zaya import Zaya
from runtime.samplers import advance, state
from runtime.samplers import single_forward as sampler
from runtime.samplers.acceptance import Draft, Randomness
from runtime.samplers.state import Decode, Step
from tests.enumeration import RIGHT, WRONG, Enumeration
from tests.models import TINY, noisy_model, random_ids, relative_error
from tests.test_cache import CONFIGS, assert_same_state

torch.set_num_threads(1)
MODELS = {name: noisy_model(config, seed=1) for name, config in CONFIGS.items()}  # one with sliding layers
PREFIXES = ((9, 9, 9), (9, 1, 14), (0, 0, 0), (3, 0, 5))  # cached lengths of three sequences


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def single(drafts: int, levels: Sequence[int] | None = None, **settings: Any) -> DecodingConfig:
    return DecodingConfig(
        "single_forward", drafts, proposal_levels=None if levels is None else tuple(levels), **settings
    )


def prefilled(model: Zaya, sequences: Sequence[Sequence[int]], slots: int, capacity: int = 400) -> Any:
    cache = model.new_cache(len(sequences), capacity, slots)
    width, counts = max(map(len, sequences)), [len(s) for s in sequences]
    if width:
        padded = torch.tensor([[*s, *[0] * (width - len(s))] for s in sequences])
        model.forward(padded, causal(width), cache, counts=counts)
        cache.advance(counts)
    return cache


def drafted_alone(model: Zaya, tokens: Sequence[int], drafts: int) -> Tensor:
    """Logits [K + 1, V] of a plain draft forward whose anchor is the last of these tokens, all others committed."""
    cache = prefilled(model, [tokens[:-1]], drafts + 2)
    masks = [model.config.mask_token_id or 0] * (drafts + 1)
    hidden = model.forward(torch.tensor([[tokens[-1], *masks]]), draft(drafts + 1), cache)
    return model.project(hidden[0, 1:])


# The layout


def layout_error(name: str, prefixes: Sequence[int], drafts: int, levels: Sequence[int], layout: Layout) -> float:
    """How far a forward of this layout is from a verify forward, and each of its blocks from a draft forward."""
    model = MODELS[name]
    rows = random_ids(3, 20, TINY.vocab_size - 1, seed=5).tolist()
    known = [row[:n] for row, n in zip(rows, prefixes, strict=True)]
    judged = random_ids(3, drafts + 1, TINY.vocab_size - 1, seed=6)
    masks = torch.full((3, len(levels) * (drafts + 1)), TINY.mask_token_id or 0)
    cache = prefilled(model, known, layout.slots)
    found = model.project(model.forward(torch.cat([judged, masks], dim=1), layout, cache))
    found = found.view(3, 1 + len(levels), drafts + 1, -1)
    cache = prefilled(model, known, drafts + 1)
    errors = [relative_error(found[:, 0], model.project(model.forward(judged, causal(drafts + 1), cache)))]
    for row in range(3):
        for block, level in enumerate(levels):
            expected = drafted_alone(model, [*known[row], *judged[row, : level + 1].tolist()], drafts)
            errors.append(relative_error(found[row, 1 + block], expected))
    return max(errors)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("prefixes", PREFIXES)
@pytest.mark.parametrize(("drafts", "levels"), [(1, (0, 1)), (5, tuple(range(6))), (16, (0, 4, 7, 11)), (3, (0,))])
def test_a_block_is_a_draft_forward_behind_the_drafts_of_its_level(
    name: str, prefixes: tuple[int, ...], drafts: int, levels: tuple[int, ...]
) -> None:
    assert layout_error(name, prefixes, drafts, levels, single_forward(drafts, levels)) < 1e-5


def sees_one_draft_more(layout: Layout, levels: tuple[int, ...]) -> Layout:
    return single_visible(layout, levels, 1, 0)


def sees_one_draft_less(layout: Layout, levels: tuple[int, ...]) -> Layout:
    return single_visible(layout, levels, 0, -1)


def single_visible(layout: Layout, levels: tuple[int, ...], more: int, less: int) -> Layout:
    assert layout.visible is not None
    visible, width = layout.visible.clone(), layout.committed
    for block, level in enumerate(levels):
        rows = slice(width * (1 + block), width * (2 + block))
        visible[rows, level + 1 : level + 1 + more] = True
        visible[rows, level + 1 + less : level + 1] = False
    return changed(layout, visible=visible)


def sees_the_block_before(layout: Layout, levels: tuple[int, ...]) -> Layout:
    assert layout.visible is not None
    visible, width = layout.visible.clone(), layout.committed
    visible[2 * width :, width : 2 * width] = True
    return changed(layout, visible=visible)


def continues_the_slot_before(layout: Layout, levels: tuple[int, ...]) -> Layout:
    return changed(layout, previous=torch.arange(layout.slots) - 1)


def starts_one_position_late(layout: Layout, levels: tuple[int, ...]) -> Layout:
    return changed(layout, offsets=layout.offsets + (torch.arange(layout.slots) >= layout.committed))


def blocks_of_other_levels(layout: Layout, levels: tuple[int, ...]) -> Layout:
    return single_forward(layout.committed - 1, (0, *[level + 1 for level in levels[1:]]))


def verified_slots_see_a_mask(layout: Layout, levels: tuple[int, ...]) -> Layout:
    assert layout.visible is not None
    visible = layout.visible.clone()
    visible[: layout.committed, layout.committed] = True
    return changed(layout, visible=visible)


Wrong = Callable[[Layout, tuple[int, ...]], Layout]
WRONG_LAYOUTS: list[Wrong] = [
    sees_one_draft_more,
    sees_one_draft_less,
    sees_the_block_before,
    continues_the_slot_before,
    starts_one_position_late,
    blocks_of_other_levels,
    verified_slots_see_a_mask,
]


@pytest.mark.parametrize("prefixes", PREFIXES[:2])
@pytest.mark.parametrize("wrong", WRONG_LAYOUTS)
def test_the_same_test_rejects_wrong_layouts(wrong: Wrong, prefixes: tuple[int, ...]) -> None:
    levels = (0, 2, 3)
    assert layout_error("plain", prefixes, 4, levels, wrong(single_forward(4, levels), levels)) > 1e-3


def test_only_the_verified_slots_are_kept() -> None:
    """The levels' columns never reach the ring, so that one of K + 1 slots suffices."""
    layout = single_forward(3, (0, 2))
    assert (layout.slots, layout.committed) == (12, 4) == (single(3, (0, 2)).slots, 4)
    assert layout.offsets.tolist() == [0, 1, 2, 3, 1, 2, 3, 4, 3, 4, 5, 6]
    assert layout.previous is not None
    assert layout.previous.tolist() == [-1, 0, 1, 2, 0, 4, 5, 6, 2, 8, 9, 10]


# Steps, with the drafts of every step replaced by ones of which a chosen number is right


class Played:
    """A batch of sequences; `texts` is their greedy continuation, and `step` has chosen numbers of drafts accepted."""

    def __init__(self, name: str, decoding: DecodingConfig, prefixes: Sequence[int], ring_slots: int) -> None:
        self.model, self.decoding, self.ring_slots = MODELS[name], decoding, ring_slots
        self.texts = [row.tolist() for row in greedy(name, tuple(prefixes))]
        self.done = list(prefixes)  # committed tokens per sequence, the anchor not counted
        cache = prefilled(self.model, [t[:n] for t, n in zip(self.texts, prefixes, strict=True)], ring_slots)
        anchors = torch.tensor([[t[n]] for t, n in zip(self.texts, prefixes, strict=True)])
        self.decode = Decode(self.model, cache, decoding, anchors, Randomness(0, 3), [0, 1, 2])

    def step(self, wanted: Sequence[int]) -> None:
        """Accept wanted[b] drafts, as far as there are as many, and check what is committed and what is left."""
        decode, drafts = self.decode, self.decoding.draft_tokens
        left = [0] * 3
        if decode.drafted is not None:
            assert decode.drafted.lengths is not None
            left = decode.drafted.lengths.tolist()
            right = torch.tensor([t[n + 1 : n + 1 + drafts] for t, n in zip(self.texts, self.done, strict=True)])
            wrong = (right + 1) % TINY.vocab_size
            # Behind the drafts that count all padding is right: judging it would commit too much.
            place = torch.arange(drafts)
            taken = (place < torch.tensor(wanted)[:, None]) | (place >= decode.drafted.lengths[:, None])
            decode.drafted = decode.drafted._replace(tokens=torch.where(taken, right, wrong))
        committed = advance(decode)
        for row, tokens in enumerate(committed):
            accepted = min(wanted[row], left[row])
            assert tokens == self.texts[row][self.done[row] + 1 : self.done[row] + 2 + accepted]
            self.check_drafts(row, accepted)
            self.done[row] += 1 + accepted
        self.check_state()

    def check_drafts(self, row: int, accepted: int) -> None:
        """They are those of the closest level's block, without the masks of tokens known by now."""
        drafts, found = self.decoding.draft_tokens, self.decode.drafted
        level = max(n for n in self.decoding.levels if n <= accepted)
        stale = accepted - level
        assert found is not None and found.lengths is not None and found.lengths[row] == drafts - stale
        if stale < drafts:
            known = self.texts[row][: self.done[row] + level + 1]
            expected = drafted_alone(self.model, known, drafts)[stale + 1 :]
            assert relative_error(found.logits[row, : drafts - stale], expected) < 1e-5
            assert found.tokens[row, : drafts - stale].tolist() == expected.argmax(-1).tolist()

    def check_state(self) -> None:
        assert self.decode.cache.lengths == self.done
        for row, count in enumerate(self.done):
            fresh = prefilled(self.model, [self.texts[row][:count]], self.ring_slots)
            assert_same_state(self.decode.cache.state(row), fresh.state(0))


@cache
def greedy(name: str, prefixes: tuple[int, ...]) -> list[Tensor]:
    rows = random_ids(3, 15, TINY.vocab_size - 1, seed=8).tolist()
    prompts = [row[: n + 1] for row, n in zip(rows, prefixes, strict=True)]
    out = generate(MODELS[name], prompts, DecodingConfig(), max_new_tokens=100, stop_tokens=())
    return [torch.tensor(p + new) for p, new in zip(prompts, out.tokens, strict=True)]


@st.composite
def decodings(draw: st.DrawFn) -> DecodingConfig:
    drafts = draw(st.integers(1, 6))
    return single(drafts, [0, *sorted(draw(st.sets(st.integers(1, drafts))))])


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=15, deadline=None)
@given(
    decoding=decodings(),
    prefixes=st.sampled_from(PREFIXES),
    wanted=st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=3), min_size=1, max_size=7),
    tight=st.booleans(),
)
def test_any_acceptance_commits_the_greedy_text_and_drafts_what_its_level_says(
    name: str, decoding: DecodingConfig, prefixes: tuple[int, ...], wanted: list[list[int]], tight: bool
) -> None:
    with torch.no_grad():
        played = Played(name, decoding, prefixes, decoding.draft_tokens + 1 if tight else decoding.slots)
        for numbers in wanted:
            played.step(numbers)


def test_a_long_run_goes_round_the_ring_many_times() -> None:
    decoding = single(4, (0, 3))
    played = Played("sliding-biased-long", decoding, (9, 1, 14), 5)
    for step in range(24):
        played.step([step % 5, (step + 2) % 5, 0 if step % 2 else 4])
    assert min(played.done) > 4 * played.decode.cache.ring


# Greedy

LEVELS: list[tuple[int, tuple[int, ...] | None]] = [
    (1, None),
    (3, None),
    (16, None),
    (16, (0, 4, 7, 11)),
    (16, (0,)),
    (16, (0, 2)),
    (24, (0, 2)),
]


def prompts_of(count: int) -> list[list[int]]:
    """Prompts of lengths 1, 4, 7 ..."""
    rows = random_ids(count, 3 * count, TINY.vocab_size - 1, seed=3).tolist()
    return [row[: 1 + 3 * i] for i, row in enumerate(rows)]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("drafts", "levels"), LEVELS)
@pytest.mark.parametrize("batch", [1, 7])
def test_greedy_equals_greedy_autoregressive(
    batch: int, drafts: int, levels: tuple[int, ...] | None, name: str
) -> None:
    def run(decoding: DecodingConfig) -> list[list[int]]:
        return generate(MODELS[name], prompts_of(batch), decoding, max_new_tokens=32, stop_tokens=()).tokens

    assert run(single(drafts, levels)) == run(DecodingConfig())


def test_greedy_up_to_the_last_position_of_the_context() -> None:
    """The blocks reach beyond the context; what is committed does not."""
    context = TINY.max_position_embeddings
    prompt = random_ids(1, context - 20, TINY.vocab_size - 1, seed=4)[0].tolist()
    runs = [
        generate(MODELS["plain"], [prompt, prompt[:9]], decoding, max_new_tokens=20, stop_tokens=()).tokens
        for decoding in (DecodingConfig(), single(16), single(16, (0, 5)))
    ]
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.skipif("zaya-nano" not in bundled(), reason="zaya-nano is not in this checkout")
@pytest.mark.parametrize(("batch", "levels"), [(1, (0, 4, 7, 11)), (4, None), (4, (0,))])
def test_zaya_nano_greedy_equals_autoregressive(batch: int, levels: tuple[int, ...] | None) -> None:
    model = load_model("zaya-nano")
    prompts = equivalence.prompts_for(model, 4)
    expected = equivalence.autoregressive(model, prompts, batch=batch, new_tokens=40)
    found = equivalence.compare(model, prompts, expected, single(16, levels), batch=batch, new_tokens=40)
    assert found.different == []
    assert found.acceptance_length > 1.3


# Mixing, batches, randomness


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weight_one_never_reads_the_draft_logits(monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    """So it is bit-identical to mixing switched off, also where a row has no drafts."""
    decoding = single(4, (0, 1), temperature=temperature)

    def run() -> list[list[int]]:
        return generate(MODELS["plain"], prompts_of(4), decoding, max_new_tokens=30, stop_tokens=()).tokens

    expected = run()

    draw = Decode.draw

    def spoilt(*arguments: Any) -> Draft:
        draft = draw(*arguments)
        return draft._replace(logits=torch.full_like(draft.logits, torch.nan))

    monkeypatch.setattr(Decode, "draw", spoilt)
    assert run() == expected


def test_less_weight_accepts_more_and_is_not_lossless() -> None:
    runs = [
        generate(MODELS["plain"], prompts_of(6), single(6, mixing_weight=w), max_new_tokens=40, stop_tokens=())
        for w in (1.0, 0.5, 0.0)
    ]
    lengths = [r.acceptance_length for r in runs]
    assert lengths == sorted(lengths) and lengths[2] > 4
    assert runs[0].tokens != runs[1].tokens != runs[2].tokens


@pytest.mark.parametrize("levels", [None, (0, 2)])
def test_a_sequence_does_not_depend_on_its_neighbours(levels: tuple[int, ...] | None) -> None:
    """Which differ in prompt, length, and in when they leave."""
    decoding = single(5, levels, temperature=1.0, draft_temperature=1.0)
    prompts = prompts_of(6)
    others = [[7, 8]] + [[9] * 11] * 5

    def run(chosen: list[list[int]], stops: Sequence[int] = ()) -> list[list[int]]:
        return generate(MODELS["plain"], chosen, decoding, max_new_tokens=30, stop_tokens=stops, seed=6).tokens

    free = run(prompts)
    stops = [free[row][6 * row + 2] for row in range(3)]
    together = run(prompts, stops)
    assert len({len(row) for row in together}) >= 3
    for index in range(6):
        mixed = [prompts[i] if i == index else others[i] for i in range(6)]
        assert run(mixed, stops)[index] == together[index]


def test_it_costs_one_forward_per_step_of_as_many_slots_as_the_settings_say() -> None:
    decoding = single(5, (0, 2, 3))
    result = generate(MODELS["plain"], prompts_of(3), decoding, max_new_tokens=20, stop_tokens=())
    assert result.forwards == max(result.steps) and decoding.forwards_per_step == 1
    assert result.slots == sum(result.steps) * decoding.slots


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_slot_that_is_refilled_starts_without_drafts(temperature: float) -> None:
    """Its neighbours keep theirs, and every request's text is the one of a closed batch."""
    decoding = single(5, (0, 2), temperature=temperature, draft_temperature=temperature)
    limits = [20, 3, 30, 1, 11, 25]
    closed, refilled, alone = (
        generate(
            MODELS["plain"], prompts_of(6), decoding, max_new_tokens=limits, stop_tokens=(), batch=batch, seed=3
        ).tokens
        for batch in (None, 3, 1)
    )
    assert closed == refilled == alone


def test_the_levels_program_counts_every_step_but_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, decoding = MODELS["plain"], single(4, (0, 2))
    prompts = prompts_of(5)
    found = program.measure(model, prompts, decoding, batch=2, new_tokens=30)
    result = generate(model, prompts, decoding, max_new_tokens=30, stop_tokens=(), batch=2)
    assert [len(steps) for steps in found.by_sequence] == [n - 1 for n in result.steps]
    for steps, tokens in zip(found.by_sequence, result.tokens, strict=True):
        assert 1 + sum(steps) + len(steps) - len(tokens) in range(4 + 1)  # the last step may go beyond the limit
    assert sum(found.histogram(4)) == sum(result.steps) - 5

    save_model(model, tmp_path)
    arguments = ["--model", str(tmp_path), "--draft-tokens", "3", "--prompts", "4", "--new-tokens", "15"]
    assert program.main([*arguments, "--counts", "1,2", "--levels", "0,1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    dense, *sparse = document["choices"]
    assert dense["predicted"] == pytest.approx(dense["measured"]["value"])
    assert [len(c["levels"]) for c in sparse][:2] == [1, 2] and [0, 1] in [c["levels"] for c in sparse]
    assert program.main([*arguments, "--counts", "2"]) == 0
    assert "all " in capsys.readouterr().out


# Sampling

THREE: ModelConfig = replace(
    TINY, vocab_size=3, mask_token_id=2, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, num_experts=3, max_position_embeddings=32, layer_types=("hybrid",),
)  # fmt: skip


@cache
def outcomes(new_tokens: int = 5) -> Enumeration:
    """The first step has no drafts, the second judges fresh ones, and the third stale ones where levels are sparse."""
    return Enumeration(noisy_model(THREE, seed=20), (1, 0), new_tokens, 1.2)


def test_the_enumeration_is_a_distribution_that_no_outcome_dominates() -> None:
    exact = outcomes().probabilities
    assert abs(exact.sum() - 1) < 1e-9
    assert exact.max() < 0.1 and (exact * 4000 >= 5).sum() > 60


SAMPLED: list[tuple[int, tuple[int, ...] | None, float, int]] = [
    (1, None, 0.0, 4000),
    (1, None, 0.5, 4000),
    (1, (0,), 0.5, 4000),
    (3, None, 0.0, 4000),
    (3, None, 0.5, 4000),
    (3, (0,), 0.0, 4000),
    (3, (0, 2), 0.5, 4000),
    (16, (0, 4, 7, 11), 0.0, 1000),
    (16, (0, 2), 0.5, 2000),
    (24, (0,), 0.0, 1500),
    (24, (0, 1, 3), 0.5, 1000),
]


@pytest.mark.parametrize(("drafts", "levels", "draft_temperature", "draws"), SAMPLED)
def test_sampled_has_the_autoregressive_distribution(
    drafts: int, levels: tuple[int, ...] | None, draft_temperature: float, draws: int
) -> None:
    decoding = single(drafts, levels, draft_temperature=draft_temperature)
    assert outcomes().p_value(decoding, seed=1, draws=draws, at_once=500) > RIGHT


@pytest.mark.parametrize(("drafts", "draws"), [(16, 400), (24, 150)])
def test_sampled_with_long_drafts_at_all_levels_too(drafts: int, draws: int) -> None:
    """Few draws of few tokens, because one forward has 306 and 650 slots; no draft is ever stale here."""
    decoding = single(drafts, draft_temperature=0.5)
    assert outcomes(3).p_value(decoding, seed=1, draws=draws, at_once=50) > RIGHT


def q_of_another_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts of the right block, judged by what level 0's says of them."""

    def ahead(decode: Decode, hidden: Tensor, accepted: Tensor) -> Draft:
        found = right(decode, hidden, accepted)
        return found._replace(logits=right(decode, hidden, torch.zeros_like(accepted)).logits)

    right = sampler._draft_ahead
    monkeypatch.setattr(sampler, "_draft_ahead", ahead)


def padding_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no drafts, the padding counts as drafted at the draft temperature."""
    none = sampler.undrafted
    monkeypatch.setattr(sampler, "undrafted", lambda decode: none(decode)._replace(lengths=None))


def dropped_positions_are_not_dropped_in_q(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens are those of the open positions, their probabilities those from the block's start."""

    def ahead(decode: Decode, hidden: Tensor, accepted: Tensor) -> Draft:
        found = right(decode, hidden, accepted)
        assert found.lengths is not None
        return found._replace(
            logits=right(decode, hidden, accepted - decode.decoding.draft_tokens + found.lengths).logits
        )

    right = sampler._draft_ahead
    monkeypatch.setattr(sampler, "_draft_ahead", ahead)


def verification_sees_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    def layout(drafts: int, levels: tuple[int, ...], device: str) -> Layout:
        return verified_slots_see_a_mask(single_forward(drafts, levels), levels)

    monkeypatch.setattr(sampler, "single_forward", layout)


def a_rejected_draft_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache keeps the last draft's slot where the token behind it belongs, as a wrong rollback would."""

    def commit(decode: Decode, *arguments: Any) -> Step:
        committed = right(decode, *arguments)
        for layer, columns in enumerate(decode.cache.columns):
            decode.cache.columns[layer] = columns.roll(-1, dims=1)
        return committed

    right = state.commit
    monkeypatch.setattr(sampler, "commit", commit)


@pytest.mark.parametrize(
    "spoil",
    [
        q_of_another_level,
        padding_is_judged,
        dropped_positions_are_not_dropped_in_q,
        verification_sees_masks,
        a_rejected_draft_is_kept,
    ],
)
def test_the_same_test_rejects_wrong_samplers(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[pytest.MonkeyPatch], None]
) -> None:
    spoil(monkeypatch)
    levels = (0,) if spoil is dropped_positions_are_not_dropped_in_q else (0, 1, 2)
    decoding = single(3, levels, draft_temperature=0.5)
    assert outcomes().p_value(decoding, draws=4000) < WRONG
