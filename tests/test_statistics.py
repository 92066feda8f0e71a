"""Statistics against brute force and against scipy; intervals that cover; the laws of AUP."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from hardware.files import UserError
from runtime.statistics import (
    accuracy_under_parallelism,
    bootstrap,
    mcnemar,
    mean,
    pass_at_k,
    pass_rate,
    ratio,
    repetition,
    wilson,
)

Points = list[tuple[float, float]]


def test_wilson_covers_the_truth_as_often_as_it_says() -> None:
    rng = random.Random(1)
    for share in (0.05, 0.5, 0.9):
        covered = 0
        for _ in range(1000):
            covered += wilson(sum(rng.random() < share for _ in range(40)), 40).holds(share)
        assert 0.92 <= covered / 1000 <= 0.985
    assert wilson(0, 5).low == 0 and wilson(5, 5).high == 1
    assert wilson(0, 5).high > 0.3  # five failures prove little


@settings(max_examples=50, deadline=None)
@given(trials=st.integers(1, 300), data=st.data())
def test_wilson_is_scipys(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))
    found, expected = wilson(successes, trials), binomtest(successes, trials).proportion_ci(0.95, "wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_bootstrap_shrinks_with_the_problems_and_holds_the_value() -> None:
    values = [float(i % 7) for i in range(700)]

    def width(count: int) -> float:
        found = bootstrap(lambda index: sum(values[i] for i in index) / len(index), count)
        assert found.low < found.value < found.high
        return found.high - found.low

    assert 3 < width(28) / width(700) < 8  # about the square root of 25


def test_the_interval_of_a_ratio_covers_the_truth_and_not_that_of_unweighted_problems() -> None:
    """Longer outputs take more tokens a step here, so the mean of the outputs' own ratios is another quantity."""
    rng = np.random.default_rng(0)

    def drawn(count: int) -> tuple[list[float], list[float]]:
        steps = rng.integers(1, 10, count)
        return (steps * rng.uniform(0.5, 1.5, count) * steps).tolist(), steps.astype(float).tolist()

    # E[tokens] / E[steps] = E[steps^2] / E[steps]
    truth = sum(s * s for s in range(1, 10)) / sum(range(1, 10))
    covered, unweighted = 0, 0
    for seed in range(300):
        above, below = drawn(60)
        covered += ratio(above, below, seed=seed).holds(truth)
        unweighted += mean([a / b for a, b in zip(above, below, strict=True)], seed=seed).holds(truth)
    assert 0.9 <= covered / 300 <= 0.985
    assert unweighted < 60


def test_an_output_without_tokens_adds_nothing_to_a_ratio() -> None:
    assert ratio([3, 0, 6], [1, 0, 2]).value == 3.0
    assert ratio([3, 0, 6], [1, 0, 2]).low == ratio([3, 0, 6], [1, 0, 2]).high == 3.0


@settings(max_examples=60, deadline=None)
@given(samples=st.integers(1, 9), data=st.data())
def test_pass_at_k_is_the_share_of_all_subsets(samples: int, data: st.DataObject) -> None:
    right, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    marks = [True] * right + [False] * (samples - right)
    subsets = list(combinations(marks, k))
    assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize("chance", [0.1, 0.5, 0.8])
def test_pass_at_k_is_unbiased_and_the_plug_in_is_not(chance: float) -> None:
    """The expectation over every outcome of 6 samples, against 1 - (1 - p)^3 itself."""
    expected = plugged = 0.0
    for outcome in product((0, 1), repeat=6):
        weight = math.prod(chance if o else 1 - chance for o in outcome)
        expected += weight * pass_at_k(6, sum(outcome), 3)
        plugged += weight * (1 - (1 - sum(outcome) / 6) ** 3)
    assert expected == pytest.approx(1 - (1 - chance) ** 3)
    assert abs(plugged - expected) > 0.003


@settings(max_examples=50, deadline=None)
@given(rights=st.lists(st.integers(0, 6), min_size=1, max_size=12))
def test_pass_rate_rises_with_k_and_keeps_its_value_in_its_interval(rights: list[int]) -> None:
    found = [pass_rate(rights, 6, k) for k in range(1, 7)]
    values = [f.value for f in found]
    assert values == sorted(values)
    assert values[0] == pytest.approx(sum(rights) / (6 * len(rights)))
    assert values[-1] == pytest.approx(sum(r > 0 for r in rights) / len(rights))
    assert all(0 <= f.low <= f.value + 1e-12 and f.value - 1e-12 <= f.high <= 1 for f in found)


def test_problems_that_all_passed_do_not_prove_certainty() -> None:
    assert pass_rate([4, 4, 4], 4, 1).low < 0.5
    assert pass_rate([1, 2, 3], 4, 4).low < 0.5


@settings(max_examples=80, deadline=None)
@given(pairs=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_mcnemar_is_the_exact_binomial_test_of_discordant_pairs(pairs: list[tuple[bool, bool]]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    found, turned = mcnemar(first, second), mcnemar(second, first)
    assert found.pairs == len(pairs)
    assert (found.only_first, found.only_second) == (pairs.count((True, False)), pairs.count((False, True)))
    discordant = found.only_first + found.only_second
    expected = binomtest(found.only_first, discordant).pvalue if discordant else 1.0
    assert found.p_value == pytest.approx(expected) == turned.p_value


def test_mcnemar_rejects_equal_samplers_no_oftener_than_it_says() -> None:
    """Problems differ a lot and have several samples each; a worse sampler is found."""
    rng = random.Random(3)
    rejected, found = 0, 0
    for _ in range(300):
        chances = [rng.random() for _ in range(15) for _ in range(4)]
        first, second = ([rng.random() < c for c in chances] for _ in range(2))
        worse = [rng.random() < 0.4 * c for c in chances]
        rejected += mcnemar(first, second).p_value < 0.05
        found += mcnemar(first, worse).p_value < 0.05
    assert rejected / 300 < 0.06
    assert found / 300 > 0.7


@pytest.mark.parametrize("points", [[(1.0, 80.0)], [(1.0, 80.0), (2.5, 80.0), (7.0, 80.0)], [(3.0, 80.0), (1.0, 80.0)]])
def test_aup_without_a_loss_is_the_plain_area(points: Points) -> None:
    assert accuracy_under_parallelism(points) == pytest.approx(max(r for r, _ in points) * 80)


def test_aup_by_hand() -> None:
    """Two points, one left out for losing more than 5 points, and a better method elsewhere on the same task."""
    weight = math.exp(-3 * (1 - 76 / 80))
    area = 80 + 3 * (80 + 76 * weight) / 2
    assert accuracy_under_parallelism([(4.0, 76.0), (1.0, 80.0), (9.0, 74.9)]) == pytest.approx(area)
    first, second = (y * math.exp(-3 * (1 - y / 100)) for y in (80, 76))
    best = accuracy_under_parallelism([(1.0, 80.0), (4.0, 76.0)], best=100)
    assert best == pytest.approx(80 + 3 * (first + second) / 2)


curve = st.lists(st.tuples(st.floats(0.5, 20), st.floats(0, 100)), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(points=curve, scale=st.floats(0.1, 50), seed=st.integers(0, 9))
def test_aup_laws(points: Points, scale: float, seed: int) -> None:
    found = accuracy_under_parallelism(points)
    shuffled = points[:]
    random.Random(seed).shuffle(shuffled)
    if len({r for r, _ in points}) == len(points):
        assert accuracy_under_parallelism(shuffled) == pytest.approx(found)
    assert accuracy_under_parallelism([(r * scale, y) for r, y in points]) == pytest.approx(found * scale, abs=1e-9)
    # Never more than the fastest kept point at the best accuracy; a heavier penalty never gains.
    assert found <= max(r for r, _ in points) * max(y for _, y in points) + 1e-9
    assert accuracy_under_parallelism(points, penalty=9.0) <= found + 1e-9


@settings(max_examples=80, deadline=None)
@given(tokens=st.lists(st.integers(0, 2), max_size=40), length=st.integers(1, 6))
def test_repetition_counts_what_came_before(tokens: list[int], length: int) -> None:
    grams = [tokens[i : i + length] for i in range(len(tokens) - length + 1)]
    assert repetition(tokens, length) == (sum(gram in grams[:i] for i, gram in enumerate(grams)), len(grams))


def test_a_loop_repeats_and_a_ramp_does_not() -> None:
    assert repetition([1, 2, 3] * 40, 8) == (110, 113)
    assert repetition(list(range(120)), 8) == (0, 113)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson(0, 0), "at least one trial"),
        (lambda: wilson(3, 2), "successes <= trials must hold, but got 3 of 2"),
        (lambda: bootstrap(lambda index: 0.0, 0), "at least one problem"),
        (lambda: ratio([1.0], []), "a pair per problem, but got 1 and 0"),
        (lambda: ratio([1.0], [0.0]), "not all 0"),
        (lambda: pass_at_k(4, 1, 5), "pass@5 needs at least 5 samples, but got 4"),
        (lambda: pass_at_k(4, 5, 1), "right <= samples must hold, but got 5 of 4"),
        (lambda: pass_at_k(4, 1, 0), "k >= 1 must hold"),
        (lambda: pass_rate([], 4, 1), "at least one problem"),
        (lambda: mcnemar([True], []), "complete, but got 1 and 0"),
        (lambda: accuracy_under_parallelism([]), "at least one point"),
        (lambda: accuracy_under_parallelism([(0.0, 50.0)]), "parallelism > 0"),
        (lambda: accuracy_under_parallelism([(1.0, 101.0)]), "in percent"),
        (lambda: accuracy_under_parallelism([(1.0, 50.0)], best=40.0), "best must be the highest"),
        (lambda: repetition([1], 0), "length >= 1"),
    ],
)
def test_impossible_questions_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()
