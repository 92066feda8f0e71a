"""What `perfmodel.explain` says of an operating point holds against predictions of changed ones."""

from __future__ import annotations

import pytest

from hardware.files import UserError
from hardware.profile import load_profile
from perfmodel.contenders import Acceptance
from perfmodel.decoding import Setting, predict, setting
from perfmodel.experts import ExpertCoverage
from perfmodel.explain import Explanation, explain
from perfmodel.model_spec import load_spec
from perfmodel.parallel import Parallel
from perfmodel.variation import on_hardware, scale_coverage, scale_memory
from runtime.config import SAMPLER_NAMES, DecodingConfig, Workload
from tests.perfmodel_cpu import made_up_cpu

SPEC, NANO = load_spec("zaya1-8b"), load_spec("zaya-nano")
H100 = load_profile("h100-sxm")
PLACES = {
    "ideal": setting(SPEC, H100, "bfloat16", engine="ideal-graph"),
    "eager": setting(SPEC, H100, "bfloat16", engine="ridgepoint-eager"),
    "cpu": setting(NANO, made_up_cpu(), "float32"),
}
TWO = DecodingConfig("two_forward")
RATED = Acceptance(rates=(0.8,))


def by_name(e: Explanation) -> dict[str, float]:
    return {s.name: s.elasticity for s in e.sensitivities}


@pytest.mark.parametrize("place", sorted(PLACES))
@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_shares_are_those_of_the_prediction(place: str, sampler: str) -> None:
    at = PLACES[place]
    decoding = DecodingConfig(sampler, draft_tokens=8)  # type: ignore[arg-type]
    e = explain(at, decoding, RATED, batch=3, context=200)
    judged = sampler in ("two_forward", "single_forward")
    p = predict(
        at.spec,
        at.device.hardware,
        Workload(batch=3, dtype=at.device.dtype),  # type: ignore[arg-type]
        decoding,
        context=200,
        acceptance_rates=[0.8] if judged else None,
        engine=at.engine,
    )
    assert sum(o.share for o in e.operators) == pytest.approx(1)
    assert sum(e.waits.values()) == pytest.approx(1) and e.bound == p.bound
    for o in e.operators:
        (same,) = [op for op in p.operators if op.name == o.name]
        assert o.seconds == pytest.approx(same.seconds) and o.bound == same.bound
        assert sum(o.waits.values()) == pytest.approx(1) and min(o.waits.values()) >= 0
    assert [o.share for o in e.operators] == sorted((o.share for o in e.operators), reverse=True)
    assert e.tokens_per_second == pytest.approx(p.tokens_per_second)
    assert e.speedup_over_autoregressive == pytest.approx(p.speedup_over_autoregressive)


@pytest.mark.parametrize(("batch", "context"), [(1, 100), (16, 2048), (300, 1500)])
def test_rates_and_overheads_are_all_that_time_is_made_of(batch: int, context: int) -> None:
    """A machine whose rates are all 1% higher and whose overheads are all 1% shorter is 1% faster (Euler's theorem)."""
    e = explain(PLACES["ideal"], TWO, RATED, batch=batch, context=context)
    found = by_name(e)
    rates = ("memory bandwidth", "cache bandwidth", "arithmetic rate")
    assert sum(found[name] for name in rates) - found["launch and host overhead"] == pytest.approx(1, abs=0.02)
    assert found["acceptance length"] == pytest.approx(1)
    assert found["context"] <= 0 and found["experts read"] <= 0
    assert [abs(s.elasticity) for s in e.sensitivities] == sorted(abs(s.elasticity) for s in e.sensitivities)[::-1]


@pytest.mark.parametrize("engine", ["vllm", "tensorrt-llm"])
def test_an_engines_own_seconds_are_overhead(engine: str) -> None:
    """Of a dense model on two devices: rates, overheads and the link between the devices are all there is."""
    at = setting(load_spec("llama-3.1-8b"), H100, "bfloat16", engine=engine, parallel=Parallel(tensor=2))
    found = by_name(explain(at, DecodingConfig(), Acceptance(), batch=8, context=3000))
    rates = ("memory bandwidth", "cache bandwidth", "arithmetic rate", "interconnect bandwidth")
    assert sum(found[name] for name in rates) - found["launch and host overhead"] == pytest.approx(1, abs=0.03)
    assert found["launch and host overhead"] < -0.05 and found["interconnect bandwidth"] >= 0
    assert "experts read" not in found


def test_the_strongest_lever_follows_the_regime() -> None:
    """The host of eager launches, the memory of few sequences in a graph, the arithmetic of a very wide step."""

    def first(at: Setting, batch: int, context: int) -> str:
        levers = [s.name for s in explain(at, TWO, RATED, batch=batch, context=context).sensitivities]
        return next(name for name in levers if name not in ("acceptance length", "context", "experts read"))

    assert first(PLACES["eager"], 1, 500) == "launch and host overhead"
    assert first(PLACES["ideal"], 4, 500) == "memory bandwidth"
    assert first(PLACES["ideal"], 700, 100) == "arithmetic rate"
    assert by_name(explain(PLACES["ideal"], TWO, RATED, batch=12, context=100_000))["context"] < -0.5


def test_an_elasticity_is_what_a_small_change_does() -> None:
    at = PLACES["ideal"]
    e = explain(at, TWO, RATED, batch=8, context=4000)
    faster = explain(on_hardware(at, scale_memory(H100, 1.01)), TWO, RATED, batch=8, context=4000)
    gained = faster.tokens_per_second / e.tokens_per_second - 1
    assert 100 * gained == pytest.approx(by_name(e)["memory bandwidth"], abs=0.03)


def test_whole_changes_are_predictions() -> None:
    at = PLACES["ideal"]
    e = explain(at, TWO, RATED, batch=8, context=1000)
    changes = {c.name: c.tokens_per_second_ratio for c in e.changes}
    assert {"batch 16", "batch 4", "K 32", "K 8", "autoregressive"} <= set(changes)
    for name, batch, drafts in (("batch 16", 16, 16), ("batch 4", 4, 16), ("K 32", 8, 32), ("K 8", 8, 8)):
        p = predict(
            SPEC,
            H100,
            Workload(batch=batch, dtype="bfloat16"),
            DecodingConfig("two_forward", draft_tokens=drafts),
            context=1000,
            acceptance_rates=[0.8],
            engine="ideal-graph",
        )
        assert changes[name] == pytest.approx(p.tokens_per_second / e.tokens_per_second)
    assert changes["autoregressive"] == pytest.approx(1 / e.speedup_over_autoregressive)
    known_length = explain(at, TWO, Acceptance(length=3.0), batch=1, context=1000)
    assert not [c for c in known_length.changes if c.name.startswith("K")]  # a length says nothing of another K


def test_levels_and_engines_are_changes_too() -> None:
    single = DecodingConfig("single_forward", draft_tokens=8)
    at = PLACES["eager"]
    changes = {c.name: c for c in explain(at, single, RATED, batch=4, context=1000).changes}
    sparse = explain(at, DecodingConfig("single_forward", 8, proposal_levels=(0,)), RATED, batch=4, context=1000)
    dense = explain(at, single, RATED, batch=4, context=1000)
    assert changes["levels 0"].tokens_per_second_ratio == pytest.approx(
        sparse.tokens_per_second / dense.tokens_per_second
    )
    assert "levels 0,1,2,3,4,5,6,7,8" in {c.name for c in sparse.changes} - set(changes)
    bare = explain(PLACES["ideal"], single, RATED, batch=4, context=1000)
    ratio = changes["engine ideal-graph"].tokens_per_second_ratio
    assert ratio == pytest.approx(bare.tokens_per_second / dense.tokens_per_second) and ratio > 1


def test_a_change_that_cannot_be_is_refused_with_its_reason() -> None:
    e = explain(PLACES["ideal"], TWO, RATED, batch=1, context=131_050)
    assert "131072" in e.refused["K 32"] and "K 32" not in {c.name for c in e.changes}
    e = explain(PLACES["ideal"], TWO, RATED, batch=40, context=30_000)
    assert "fits there" in e.refused["batch 80"]


def test_scaled_coverage_stays_between_nothing_and_every_expert() -> None:
    uniform = ExpertCoverage()
    more, fewer = scale_coverage(uniform, 1.05), scale_coverage(uniform, 0.95)
    assert float(more.distinct(1, 4, 16)) == pytest.approx(1.05 * float(uniform.distinct(1, 4, 16)))
    assert float(fewer.of("verify").distinct(1, 4, 16)) == pytest.approx(0.95 * float(uniform.distinct(1, 4, 16)))
    assert float(more.distinct(64, 17, 16)) == 16
    assert str(more) == str(uniform)


def test_acceptance_is_never_invented() -> None:
    with pytest.raises(UserError, match="exactly one of"):
        explain(PLACES["ideal"], TWO, Acceptance(), batch=1, context=100)
