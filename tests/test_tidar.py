"""The publisher's engine: published runs held out of the fit, the engine that ships, what must hold of any run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from hardware.files import UserError
from hardware.profile import load_profile
from perfmodel import tidar
from perfmodel.decoding import setting, time_step
from perfmodel.engine import EngineProfile, HostCosts, Requests, load_engine, save_engine
from perfmodel.fitting import Array, Problem, folds, held_out, solve
from perfmodel.model_spec import load_spec
from perfmodel.published.interpret import interpret
from perfmodel.published.points import TidarForwardPoint, TidarThroughputPoint, Unit
from perfmodel.published.rows import read_rows
from perfmodel.steps import step_of
from runtime.config import DecodingConfig
from tests.kernel_rows import reading_over_achieved

PUBLISHED = Path(__file__).resolve().parents[1] / "measurements" / "published" / "zaya_tidar_measured.csv"
POINTS = [interpret(row) for row in read_rows(PUBLISHED)]
RUNS: list[tidar.Run] = [p for p in POINTS if isinstance(p, TidarForwardPoint | TidarThroughputPoint)]
FORWARD = np.array([r.operator == "tidar forward_ms" for r in RUNS])
RATE = np.array([isinstance(r, TidarThroughputPoint) for r in RUNS])


@pytest.fixture(scope="module")
def problem() -> Problem:
    return tidar.tidar_problem(RUNS)


@pytest.fixture(scope="module")
def unseen(problem: Problem) -> Array:
    """Every run's seconds by a fit to other series."""
    return held_out(problem, folds(problem.series))


def error(seconds: Array, problem: Problem, rows: Array) -> Array:
    """Of the published figure: of a rate for throughput, of a time for forwards."""
    ratio = seconds / problem.measured
    return np.abs(np.where(RATE, 1 / ratio, ratio) - 1)[rows]


def beats_autoregressive(seconds: Sequence[float]) -> list[tuple[str, bool]]:
    """Of each drafting run that has an autoregressive one beside it: whether it commits more tokens a second."""
    rates = [(i, r) for i, r in enumerate(RUNS) if isinstance(r, TidarThroughputPoint)]
    return [
        (run.id, seconds[i] < seconds[j])
        for i, run in rates
        for j, other in rates
        if run.decoding.drafts
        and not other.decoding.drafts
        and (run.prefix, run.hardware.name, run.batch) == (other.prefix, other.hardware.name, other.batch)
    ]


def test_throughput_of_series_that_the_fit_had_not_seen(problem: Problem, unseen: Array) -> None:
    errors = error(unseen, problem, RATE)
    assert errors.mean() <= 0.09
    assert np.median(errors) <= 0.06


def test_whether_drafting_pays_is_right_in_nine_of_ten(problem: Problem, unseen: Array) -> None:
    measured, predicted = beats_autoregressive(problem.measured.tolist()), beats_autoregressive(unseen.tolist())
    assert len(measured) >= 12
    assert {pays for _, pays in measured} == {True, False}  # so that one answer for all would not do
    right = np.mean([m == p for m, p in zip(measured, predicted, strict=True)])
    assert right >= 0.9


def test_each_forward_by_a_fit_to_all_other_rows(problem: Problem) -> None:
    for row in np.flatnonzero(FORWARD):
        others = np.arange(len(RUNS)) != row
        found = problem.predict(solve(problem, others))[row]
        assert found == pytest.approx(problem.measured[row], rel=0.1), RUNS[row].id


def test_the_bundled_engine_is_what_its_rows_give(problem: Problem) -> None:
    again = problem.predict(solve(problem))
    bundled = np.array([tidar.estimate(run).seconds for run in RUNS])
    assert np.abs(bundled / again - 1).max() <= 0.03
    assert np.abs(bundled / again - 1).mean() <= 0.01


def test_the_fit_and_the_engine_are_one_formula(problem: Problem, tmp_path: Path) -> None:
    """Any numbers, written as an engine and read back, give every run the seconds that the fit gives them."""
    bundled = save_engine(load_engine("zyphra-vllm"), tmp_path / "engine.yaml")
    factors = np.random.default_rng(1).uniform(1.0, 1.5, len(tidar.START)).tolist()
    numbers = {name: value * factor for (name, (value, _)), factor in zip(tidar.START.items(), factors, strict=True)}
    data = yaml.safe_load(bundled.read_text()) | tidar.engine_data(numbers) | {"intervals": {}}
    bundled.write_text(yaml.safe_dump(data))
    engine = load_engine(bundled)
    found = np.array([tidar.estimate(run, engine).seconds for run in RUNS])
    assert found == pytest.approx(problem.predict(numbers), rel=1e-3)


def test_no_run_is_faster_than_its_bound(problem: Problem) -> None:
    bounds = np.array([tidar.estimate(run).bound_seconds for run in RUNS])
    assert (bounds < problem.measured).all()


def test_the_stated_interval_holds_most_unseen_runs(problem: Problem, unseen: Array) -> None:
    """Of all, and of the kinds that have a spread of their own."""
    engine, left = load_engine("zyphra-vllm"), np.abs(np.log(unseen / problem.measured))
    assert engine.spread is not None and problem.kinds is not None
    assert 0.7 <= (left <= engine.spread).mean() <= 0.9
    assert set(engine.spreads) == {"decode", "draft"}
    for kind, spread in engine.spreads.items():
        assert 0.7 <= (left <= spread)[[k == kind for k in problem.kinds]].mean() <= 0.9


def test_no_rate_of_a_run_is_beyond_its_device() -> None:
    """No operator takes its bound for want of time of its own; experts are read no faster than the device achieves."""
    for run in RUNS:
        at = setting(load_spec("zaya1-8b"), run.hardware, "bfloat16", engine="zyphra-vllm")
        step = time_step(at, step_of(run.decoding), run.batch, run.generated_tokens / 2)
        assert not step.clamped.any(), run.id
        for forward in step.forwards:
            assert reading_over_achieved(forward, at) >= 1, run.id


def run(**changes: Any) -> TidarThroughputPoint:
    """A run of the engine, of which a test says what matters to it."""
    point = TidarThroughputPoint(
        "made up", "here", "series", "tidar throughput two_forward", "zyphra-vllm", load_profile("h100-sxm"),
        Unit("tok/s", 1.0, 1.0), 1.0, DecodingConfig("two_forward", 16), 16, 4000.0, 6.0,
        refilled=False, ends_early=False, thinking=None, build="0bfa5c58", prefix="made up",
    )  # fmt: skip
    return dataclasses.replace(point, **changes)


def rate(**changes: Any) -> float:
    return 1 / tidar.estimate(run(**changes)).seconds


AUTOREGRESSIVE: dict[str, Any] = {"decoding": DecodingConfig(), "acceptance_length": None}
SINGLE = DecodingConfig("single_forward", 16)


def test_a_run_that_cannot_drain_is_the_engines_step() -> None:
    engine = load_engine("zyphra-vllm")
    at = setting(load_spec("zaya1-8b"), load_profile("h100-sxm"), "bfloat16", engine=engine)
    for batch, decoding, length in ((1, DecodingConfig("two_forward", 16), 6.0), (64, DecodingConfig(), None)):
        step = float(time_step(at, step_of(decoding), batch, 2000.0).seconds)
        found = rate(decoding=decoding, acceptance_length=length, batch=batch)
        assert found == pytest.approx(batch * (length or 1.0) / step)


def test_uneven_requests_cost_a_closed_batch_more_than_one_that_is_filled_again() -> None:
    even = load_engine("zyphra-vllm")
    even = dataclasses.replace(even, requests=Requests())
    full = 1 / tidar.estimate(run(), even).seconds
    thinking, untold, refilled = rate(thinking=True), rate(thinking=False), rate(refilled=True)
    assert untold < thinking < full
    assert thinking < refilled < full
    assert rate(**AUTOREGRESSIVE, ends_early=True) < rate(**AUTOREGRESSIVE)
    assert rate(**AUTOREGRESSIVE, thinking=False) == rate(**AUTOREGRESSIVE)  # it drafts nothing to be uneven


def test_rates_follow_what_the_step_has_to_do() -> None:
    lengths = [rate(acceptance_length=a) for a in (2.0, 6.0, 12.0)]
    assert lengths == pytest.approx([lengths[0], 3 * lengths[0], 6 * lengths[0]])
    assert rate(generated_tokens=20000.0) < rate()  # a longer context
    assert rate(batch=64) > rate(batch=16) > rate(batch=1)
    levels = [dataclasses.replace(SINGLE, proposal_levels=levels) for levels in ((0,), (0, 6, 16), None)]
    rates = [rate(decoding=decoding) for decoding in levels]
    assert rates == sorted(rates, reverse=True)  # at the same acceptance: more levels are more slots
    assert rate(hardware=load_profile("mi300x")) < rate()


def test_a_build_changes_forwards_of_several_slots_alone() -> None:
    assert rate(build="9e2820f6") > rate()
    assert rate(build="9e2820f6", decoding=SINGLE) > rate(decoding=SINGLE)
    assert rate(build="9e2820f6", **AUTOREGRESSIVE) == rate(**AUTOREGRESSIVE)
    assert rate(build="unheard of") == rate()


def test_costs_of_a_kind_of_forward_stand_in_for_those_of_all() -> None:
    costs = HostCosts(forward_seconds=0.01, forwards={"single": 0.03})
    assert (costs.forward("decode"), costs.forward("single")) == (0.01, 0.03)
    with pytest.raises(UserError, match=r"unknown kind of forward 'guess'.*verify"):
        HostCosts(forwards={"guess": 0.01})
    with pytest.raises(UserError, match=r"forwards\.draft >= 0 must hold, but got -1"):
        HostCosts(forwards={"draft": -1.0})
    with pytest.raises(UserError, match=r"requests\.steps >= 0 must hold, but got -1"):
        Requests(steps=-1.0)


def test_an_unsplit_cache_costs_by_context_and_not_by_batch() -> None:
    """And only where a sequence has several slots."""
    base = load_engine("ideal-graph")
    serial = dataclasses.replace(
        base, hosts={"default": HostCosts(cached_token_seconds=1e-6)}, sources={**base.sources, "hosts": "made up"}
    )
    extra = {}
    for decoding in (DecodingConfig(), DecodingConfig("two_forward", 16)):
        for batch, context in ((1, 1000), (64, 1000), (1, 3000)):
            seconds = [_step(engine, decoding, batch, context) for engine in (serial, base)]
            extra[decoding.sampler, batch, context] = seconds[0] - seconds[1]
    assert extra["autoregressive", 1, 3000] == 0
    assert extra["two_forward", 1, 1000] == pytest.approx(2e-3)
    assert extra["two_forward", 64, 1000] == pytest.approx(2e-3)
    assert extra["two_forward", 1, 3000] == pytest.approx(6e-3)


def _step(engine: EngineProfile, decoding: DecodingConfig, batch: int, context: int) -> float:
    at = setting(load_spec("zaya1-8b"), load_profile("mi300x"), "bfloat16", engine=engine)
    return float(time_step(at, step_of(decoding), batch, context).seconds)
