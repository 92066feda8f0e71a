"""Proposal levels: the dynamic programme against all choices, and both means against played-out steps."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.files import UserError
from runtime.levels import closest, expected_tokens, optimal, steady_tokens

HISTOGRAMS = st.lists(st.integers(0, 30), min_size=2, max_size=9).filter(any)


def all_levels(drafts: int, count: int) -> list[tuple[int, ...]]:
    return [(0, *rest) for rest in itertools.combinations(range(1, drafts + 1), count - 1)]


@st.composite
def histogram_and_levels(draw: st.DrawFn) -> tuple[list[int], tuple[int, ...]]:
    histogram = draw(HISTOGRAMS)
    more = draw(st.sets(st.integers(1, len(histogram) - 1)))
    return histogram, (0, *sorted(more))


@settings(max_examples=150, deadline=None)
@given(histogram=HISTOGRAMS, data=st.data())
def test_no_other_choice_of_levels_expects_more(histogram: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(histogram)))
    found = optimal(histogram, count)
    choices = all_levels(len(histogram) - 1, count)
    assert found in choices
    best = max(expected_tokens(histogram, levels) for levels in choices)
    assert expected_tokens(histogram, found) == pytest.approx(best, abs=1e-12)


def play(histogram: list[int], levels: tuple[int, ...], steps: int, seed: int = 0) -> np.ndarray:
    """Tokens per step of one sequence whose fresh drafts would be accepted as the histogram says."""
    rng = np.random.default_rng(seed)
    pool = np.repeat(np.arange(len(histogram)), histogram)
    stale, tokens = 0, []
    for _ in range(steps):
        accepted = min(int(rng.choice(pool)), len(histogram) - 1 - stale)
        tokens.append(1 + accepted)
        stale = accepted - closest(levels, accepted)
    return np.array(tokens)


HISTOGRAM = [9, 5, 3, 2, 2, 3, 4, 6, 40]


@pytest.mark.parametrize("levels", [(0,), (0, 2), (0, 1, 3, 8), (0, 5), tuple(range(9))])
def test_the_means_are_those_of_played_out_steps(levels: tuple[int, ...]) -> None:
    chain = play(HISTOGRAM, levels, 20_000)
    assert chain.mean() == pytest.approx(steady_tokens(HISTOGRAM, levels), abs=0.08)
    second = np.mean([play(HISTOGRAM, levels, 2, seed)[1] for seed in range(4000)])
    assert second == pytest.approx(expected_tokens(HISTOGRAM, levels), abs=0.15)


def test_the_played_steps_tell_level_sets_apart() -> None:
    for mean in (steady_tokens, expected_tokens):
        assert mean(HISTOGRAM, range(9)) - mean(HISTOGRAM, (0,)) > 1


@given(case=histogram_and_levels())
def test_laws(case: tuple[list[int], tuple[int, ...]]) -> None:
    histogram, levels = case
    drafts = len(histogram) - 1
    fresh = 1 + np.average(range(drafts + 1), weights=histogram)
    for mean in (expected_tokens, steady_tokens):
        assert mean(histogram, range(drafts + 1)) == pytest.approx(fresh)
        assert 1 <= mean(histogram, levels) <= drafts + 1
        assert mean([7 * n for n in histogram], levels) == pytest.approx(mean(histogram, levels))


@given(case=histogram_and_levels(), more=st.integers(1, 8))
def test_a_level_more_is_never_worse(case: tuple[list[int], tuple[int, ...]], more: int) -> None:
    histogram, levels = case
    wider = sorted({*levels, min(more, len(histogram) - 1)})
    assert expected_tokens(histogram, wider) >= expected_tokens(histogram, levels) - 1e-12


def test_a_chain_with_a_period_has_a_long_run_too() -> None:
    """All four drafts always pass: fresh gives 5 tokens, then one token stale gives 4, then fresh again."""
    assert steady_tokens([0, 0, 0, 0, 9], (0, 3)) == pytest.approx(4.5)
    assert steady_tokens([0, 0, 0, 0, 9], (0,)) == pytest.approx((5 + 1) / 2)
    assert steady_tokens([9, 0, 0, 0, 0], (0,)) == 1


def test_the_levels_go_where_steps_end() -> None:
    assert optimal([0, 0, 0, 5], 2) == (0, 3)
    assert expected_tokens([0, 0, 0, 5], (0, 3)) == 4
    assert expected_tokens([0, 0, 0, 5], (0, 1)) == 2  # two of the three drafts are known by now
    assert optimal([0, 0, 0, 5, 0], 2) == (0, 2)  # one token stale, but the three drafts that pass are left
    assert optimal([1, 2, 3], 1) == (0,)
    assert optimal([1, 2, 3], 3) == (0, 1, 2)


@pytest.mark.parametrize("histogram", [[], [3], [0, 0, 0], [1, -1], [1, float("nan")], [[1, 2], [3, 4]]])
def test_impossible_histograms_are_refused(histogram: list[float]) -> None:
    for call in (lambda: optimal(histogram, 1), lambda: steady_tokens(histogram, (0,))):
        with pytest.raises(UserError, match="a histogram of accepted drafts must"):
            call()


@pytest.mark.parametrize("count", [0, 5])
def test_impossible_counts_are_refused(count: int) -> None:
    with pytest.raises(UserError, match=rf"1 <= count <= K \+ 1 = 4 must hold, but got {count}"):
        optimal([4, 3, 2, 1], count)


@pytest.mark.parametrize("levels", [(), (1,), (0, 2, 1), (0, 1, 1), (0, 4)])
def test_impossible_levels_are_refused(levels: tuple[int, ...]) -> None:
    for mean in (expected_tokens, steady_tokens):
        with pytest.raises(UserError, match="levels must ascend from 0 to at most K = 3"):
            mean([4, 3, 2, 1], levels)


def test_levels_need_no_torch() -> None:
    code = "import sys, runtime.levels; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
