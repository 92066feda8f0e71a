"""Thresholds of probability and of entropy: what is written for the other guarantees it, and no wider bound would."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.export.confidence import entropy_bound, mean_entropy_bound, sure_probability
from hardware.files import UserError

EXAMPLES = settings(max_examples=100, deadline=None)
PROBABILITY = st.floats(0.02, 1.0)


def entropy(distribution: list[float]) -> float:
    return -sum(p * math.log(p) for p in distribution if p > 0)


@st.composite
def distributions(draw: st.DrawFn) -> list[float]:
    """Random ones, flat and peaked, some of a few equal outcomes."""
    weights = draw(st.lists(st.floats(0, 1) | st.just(1.0), min_size=1, max_size=40).filter(lambda w: sum(w) > 0))
    power = draw(st.sampled_from([1.0, 4.0, 20.0]))
    powered = [weight**power for weight in weights]
    total = sum(powered)
    return [weight / total for weight in powered] if total > 0 else [1.0]


@EXAMPLES
@given(distribution=distributions(), probability=PROBABILITY)
def test_below_the_bound_a_probability_exceeds_the_threshold(distribution: list[float], probability: float) -> None:
    if max(distribution) <= probability:
        assert entropy(distribution) >= entropy_bound(probability) - 1e-12
    if entropy(distribution) < entropy_bound(probability) - 1e-12:
        assert max(distribution) > probability


@EXAMPLES
@given(probability=PROBABILITY)
def test_no_larger_bound_would_do(probability: float) -> None:
    """A distribution has exactly this entropy, and no outcome above the threshold."""
    copies = math.floor(1 / probability)
    worst = [probability] * copies + [max(0.0, 1 - copies * probability)]
    assert max(worst) <= probability + 1e-12 and sum(worst) == pytest.approx(1)
    assert entropy(worst) == pytest.approx(entropy_bound(probability), abs=1e-12)


@EXAMPLES
@given(probability=st.floats(0.5, 1.0))
def test_from_a_half_on_it_is_the_binary_entropy(probability: float) -> None:
    assert entropy_bound(probability) == pytest.approx(entropy([probability, 1 - probability]), abs=1e-12)


@EXAMPLES
@given(one=PROBABILITY, other=PROBABILITY)
def test_a_higher_threshold_asks_for_less_entropy(one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert entropy_bound(low) >= entropy_bound(high) - 1e-12
    assert entropy_bound(1.0) == 0 and entropy_bound(1 / 4) == pytest.approx(math.log(4))


@EXAMPLES
@given(distribution=distributions(), bound=st.floats(0, 4))
def test_an_entropy_bound_is_read_as_the_probability_that_it_makes_sure(
    distribution: list[float], bound: float
) -> None:
    """The way back: what is below the bound exceeds that probability, and the two are each other's inverse."""
    sure = sure_probability(bound)
    if entropy(distribution) < bound - 1e-9:
        assert max(distribution) > sure - 1e-9
    assert entropy_bound(sure) == pytest.approx(bound, abs=1e-9)


@EXAMPLES
@given(block=st.lists(distributions(), min_size=1, max_size=8), probability=PROBABILITY)
def test_a_mean_below_its_bound_makes_every_position_sure(block: list[list[float]], probability: float) -> None:
    mean = sum(map(entropy, block)) / len(block)
    if mean < mean_entropy_bound(probability, len(block)) - 1e-12:
        assert all(max(distribution) > probability for distribution in block)


@pytest.mark.parametrize("value", [0.0, -0.1, 1.1, math.nan])
def test_what_is_no_probability_is_refused(value: float) -> None:
    with pytest.raises(UserError, match="0 < probability <= 1"):
        entropy_bound(value)
    with pytest.raises(UserError, match="0 <= entropy <= 500"):
        sure_probability(-value if value > 0 else -1.0)
    with pytest.raises(UserError, match="positions >= 1"):
        mean_entropy_bound(0.5, 0)
