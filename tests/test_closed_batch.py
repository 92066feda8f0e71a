"""A closed batch against its steady state: where they agree, and in which direction they part."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.files import UserError
from hardware.profile import load_profile
from perfmodel.closed_batch import Array, closed_batch_throughput, drain
from perfmodel.decoding import predict
from perfmodel.model_spec import load_spec
from perfmodel.prediction import Prediction
from runtime.config import DecodingConfig, Workload

BATCH = st.integers(1, 512)
CV = st.floats(0, 1.2)


def step(fixed: float, each: float, power: float = 1.0) -> Callable[[Array], Array]:
    """Seconds of a step: a fixed part, and one that grows with the active sequences, at most in proportion."""
    return lambda active: fixed + each * active**power


def lognormal(random: np.random.Generator, cv: float, shape: tuple[int, ...]) -> Array:
    """Steps of drawn requests with a coefficient of variation."""
    return random.lognormal(0, np.sqrt(np.log1p(cv**2)), shape)


def kept_full(step_seconds: Callable[[Array], Array], batch: int, tokens_per_step: float) -> float:
    """Tokens per second where every request that finishes is replaced at once."""
    return batch * tokens_per_step / float(step_seconds(np.array(float(batch))))


@given(BATCH, CV)
def test_no_work_is_lost(batch: int, cv: float) -> None:
    course = drain(batch, cv)
    assert (course.active * course.steps).sum() == pytest.approx(batch)
    assert course.active.max() <= batch and course.active.min() >= 1
    assert (course.steps >= 0).all() and (np.diff(course.active) <= 1e-9).all()


@given(BATCH, st.floats(1, 17), st.floats(0, 1), st.floats(1e-6, 1))
def test_equal_requests_are_the_steady_state(batch: int, tokens: float, fixed: float, each: float) -> None:
    seconds = step(fixed, each)
    assert closed_batch_throughput(seconds, batch, tokens, 0.0) == pytest.approx(kept_full(seconds, batch, tokens))


@given(CV, st.floats(1, 17))
def test_one_request_does_not_drain(cv: float, tokens: float) -> None:
    assert closed_batch_throughput(step(0.01, 0.001), 1, tokens, cv) == pytest.approx(tokens / 0.011)


@settings(deadline=None)
@given(BATCH, CV, CV, st.floats(0, 1), st.floats(1e-6, 1), st.floats(0.3, 1))
def test_more_spread_is_never_faster(
    batch: int, one: float, other: float, fixed: float, each: float, power: float
) -> None:
    low, high = sorted((one, other))
    seconds = step(fixed, each, power)
    even, uneven = (float(closed_batch_throughput(seconds, batch, 5.0, cv)) for cv in (low, high))
    assert uneven <= even * 1.002  # the tail's resolution
    assert even <= kept_full(seconds, batch, 5.0) * (1 + 1e-9)


def test_a_step_in_proportion_to_its_sequences_does_not_mind_the_drain() -> None:
    assert closed_batch_throughput(step(0.0, 0.01), 64, 5.0, 0.8) == pytest.approx(500.0)


def test_a_fixed_step_waits_for_the_slowest_request() -> None:
    """Against requests drawn one by one: the time is the slowest one's, on average."""
    random = np.random.default_rng(0)
    for batch, cv in ((2, 0.3), (8, 0.9), (16, 0.8), (64, 0.3), (256, 0.5)):
        steps = lognormal(random, cv, (4000, batch))
        slowest = steps.max(1).mean() / steps.mean()
        found = float(drain(batch, cv).steps.sum())
        assert found == pytest.approx(slowest, rel=0.02 if cv < 0.5 else 0.07)


def test_the_whole_course_equals_drawn_requests() -> None:
    """A step whose time depends on the active ones, against a simulation step by step."""
    random, cv, batch = np.random.default_rng(1), 0.35, 24
    seconds = step(0.02, 0.002, 0.8)
    totals, works = [], []
    for _ in range(400):
        finished = np.sort(lognormal(random, cv, (batch,)))
        phases = np.diff(finished, prepend=0.0)
        totals.append((seconds(np.arange(batch, 0, -1.0)) * phases).sum())
        works.append(finished.mean())
    assert float(closed_batch_throughput(seconds, batch, 1.0, cv)) == pytest.approx(
        batch * np.mean(works) / np.mean(totals), rel=0.02
    )


def test_grids_equal_single_points() -> None:
    batches, cvs = np.array([[1.0], [8.0], [100.0]]), np.array([0.0, 0.4])
    seconds = step(0.01, 0.0005)
    grid = closed_batch_throughput(seconds, batches, 4.0, cvs)
    assert grid.shape == (3, 2)
    single: list[Array] = [closed_batch_throughput(seconds, b, 4.0, c) for b in batches[:, 0] for c in cvs]
    assert grid.ravel() == pytest.approx(np.array(single))


def test_refuses_what_is_no_batch() -> None:
    with pytest.raises(UserError, match="batch >= 1 must hold, but got 0"):
        drain(0, 0.3)
    with pytest.raises(UserError, match=r"cv >= 0 must hold, but got -0\.1"):
        drain(4, -0.1)


def test_a_prediction_names_both_answers() -> None:
    """Of an engine that says how requests differ; where none does, the spread is the caller's to give."""
    two = DecodingConfig("two_forward", 16)

    def found(decoding: DecodingConfig, engine: str, batch: int = 16, spread: float | None = None) -> Prediction:
        return predict(
            load_spec("zaya1-8b"), load_profile("h100-sxm"), Workload(batch, 1000), decoding, context=1000,
            acceptance_length=5.0 if decoding.drafts else None, engine=engine, request_spread=spread,
        )  # fmt: skip

    drained = found(two, "zyphra-vllm")
    assert drained.closed_batch_tokens_per_second is not None
    assert drained.closed_batch_tokens_per_second < 0.8 * drained.tokens_per_second
    assert found(two, "ideal-graph").closed_batch_tokens_per_second is None
    even = found(two, "zyphra-vllm", spread=0.0)
    assert even.closed_batch_tokens_per_second == pytest.approx(even.tokens_per_second)
    for alike in (found(DecodingConfig(), "zyphra-vllm"), found(two, "zyphra-vllm", batch=1)):
        assert alike.closed_batch_tokens_per_second == pytest.approx(alike.tokens_per_second)
