"""Uneven routing: `zipf` against routings that are drawn, its laws, and the coverage an engine was fitted under."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.files import UserError
from hardware.profile import load_profile
from perfmodel.decoding import setting
from perfmodel.experts import ExpertCoverage, parse_coverage
from perfmodel.kernels.call import Array
from perfmodel.model_spec import load_spec
from runtime.routing import distinct_experts

TOKENS = (1, 3, 16, 64, 400)


def drawn(exponent: float, tokens: int, experts: int, per_token: int) -> float:
    """Mean distinct experts of forwards whose tokens each draw `per_token` different experts by their popularity."""
    random = np.random.default_rng(3)
    popularity = np.log(np.arange(1.0, experts + 1)) * -exponent
    keys = popularity + random.gumbel(size=(60, tokens, experts))  # the k largest: k draws without replacement
    chosen = np.argsort(-keys, axis=-1)[..., :per_token].reshape(60, -1)
    return float(distinct_experts(chosen, experts).mean())


@pytest.mark.parametrize(("experts", "per_token"), [(128, 8), (128, 4), (64, 8), (16, 1)])
@pytest.mark.parametrize("exponent", [0.0, 0.9, 1.5])
def test_zipf_hits_what_drawn_routings_do(exponent: float, experts: int, per_token: int) -> None:
    said = ExpertCoverage("zipf", exponent=exponent).distinct(np.array(TOKENS), 1, experts, per_token)
    counted = [drawn(exponent, tokens, experts, per_token) for tokens in TOKENS]
    assert said == pytest.approx(counted, rel=0.06)


@settings(deadline=None)
@given(st.integers(1, 300), st.floats(0, 1), st.floats(0, 3), st.floats(0, 0.9), st.floats(1, 5000), st.floats(1, 9))
def test_zipf_lies_between_one_token_and_an_even_routing(
    experts: int, share: float, exponent: float, skip: float, tokens: float, times: float
) -> None:
    per_token = max(1, round(share * experts))
    zipf, steeper = (ExpertCoverage("zipf", exponent=e, skip_share=skip) for e in (exponent, exponent + 0.5))

    def distinct(coverage: ExpertCoverage, of: float) -> float:
        return float(coverage.distinct(of, 1, experts, per_token))

    even = distinct(ExpertCoverage("uniform", skip_share=skip), tokens)
    found = distinct(zipf, tokens)
    assert distinct(zipf, 1) == pytest.approx(min(per_token * (1 - skip), experts), rel=1e-6)
    assert distinct(zipf, 1) * (1 - 1e-9) <= found <= even * (1 + 1e-4) <= experts * (1 + 2e-4)
    assert distinct(steeper, tokens) <= found * (1 + 1e-4)
    assert distinct(zipf, times * tokens) >= found * (1 - 1e-9)
    assert distinct(ExpertCoverage("zipf", skip_share=skip), tokens) == pytest.approx(even, rel=1e-3)


def test_a_grid_agrees_with_its_points() -> None:
    zipf = parse_coverage("zipf(0.9)")
    batch, slots = np.array([[1.0], [7.0], [64.0]]), np.array([1.0, 17.0])
    grid: Array = zipf.distinct(batch, slots, 128, 8)
    assert grid.shape == (3, 2)
    assert grid[1, 1] == float(zipf.distinct(7, 17, 128, 8)) == float(zipf.distinct(119, 1, 128, 8))


def test_its_name_is_read_back_and_impossible_ones_are_refused() -> None:
    assert str(parse_coverage("zipf(0.9)")) == "zipf(0.9)"
    assert parse_coverage("zipf(0.9)") == ExpertCoverage("zipf", exponent=0.9)
    for text, says in (("zipf", "exponent"), ("zipf(-1)", "0 <= exponent"), ("zipf(much)", "number")):
        with pytest.raises(UserError, match=says):
            parse_coverage(text)


def test_an_engine_names_the_coverage_it_was_fitted_under() -> None:
    """Which holds where the user names none."""
    model, device = load_spec("qwen3-30b-a3b"), load_profile("h200")
    for engine, named in (("vllm", "zipf(0.9)"), ("sglang", "zipf(0.9)"), ("ideal-graph", "uniform")):
        assert str(setting(model, device, "bfloat16", engine=engine).coverage) == named
    assert str(setting(model, device, "bfloat16", engine="vllm", expert_coverage="uniform").coverage) == "uniform"
