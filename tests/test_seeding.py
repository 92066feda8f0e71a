"""What is predicted of settings before they run, which run first, and what is tried next."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from autotune.guide import Guide
from autotune.results import TrialRecord
from autotune.seeding import Acceptance, Prediction, Predictor, coverage, pilots
from autotune.space import MAX_DRAFT_TOKENS, Candidate, Space, decoding_space, default_candidate
from hardware.files import UserError
from perfmodel.acceptance import histogram_from_rates, judged
from perfmodel.decoding import setting, time_step
from perfmodel.model_spec import spec_from_config
from perfmodel.steps import step_of
from runtime.config import SAMPLER_NAMES, DecodingConfig, KernelConfig, Sampler, Workload
from tests.made_up import blind, oracle, speed
from tests.models import TINY
from tests.perfmodel_cpu import made_up_cpu


@pytest.mark.parametrize("anchor", [False, True])
def test_acceptance_of_shorter_drafts_follows_from_the_longest(anchor: bool) -> None:
    """A machine with a constant rate per draft: the expected length is known in closed form for every K."""
    rate, steps = 0.8, 10**6
    histogram = tuple(steps * rate**n * (1 if n == 24 else 1 - rate) for n in range(25))
    acceptance = Acceptance({1.0: histogram})  # type: ignore[dict-item]
    for k in (1, 5, 24):
        free = sum(rate**j for j in range(k + 1))
        given = 1 + sum(rate**j for j in range(k))  # the first draft is always accepted
        found = acceptance.length(DecodingConfig("two_forward", draft_tokens=k, anchor_draft=anchor))
        assert found == pytest.approx(given if anchor else free)
        assert 1 <= found <= k + 1


def test_acceptance_of_every_sampler_follows_from_the_pilots() -> None:
    """At a constant rate: levels can only lose, a verified block is as two_forward's, another is kept whole.

    A single forward's first draft is two_forward's second one, which needs two to be right.
    """
    histogram = tuple(10**6 * s for s in histogram_from_rates([0.8], MAX_DRAFT_TOKENS))
    acceptance = Acceptance({1.0: histogram})  # type: ignore[dict-item]
    for k in (2, 7, 24):
        fresh = acceptance.length(DecodingConfig("two_forward", draft_tokens=k))
        found = [
            acceptance.length(DecodingConfig("single_forward", draft_tokens=k, proposal_levels=levels))
            for levels in ((0,), (0, k // 2), tuple(range(k)), None)
        ]
        assert found == sorted(found)
        assert found[-1] == pytest.approx(1 + sum(0.8 ** (j + 1) for j in range(1, min(k, 23) + 1)))
        assert found[-1] < fresh
        assert acceptance.length(DecodingConfig("denoising", draft_tokens=k, verify=True)) == pytest.approx(fresh)
        assert acceptance.length(DecodingConfig("denoising", draft_tokens=k)) == k


def test_experts_beyond_the_pilots_tokens_go_on_as_they_began() -> None:
    """Independent even choices are carried on exactly; beyond saturation there is nothing to carry."""
    pairs = tuple((float(t), 16 * (1 - (15 / 16) ** t)) for t in (1, 9, 25))
    found = coverage(pairs, 16, 650)
    for tokens in (25, 100, 600):
        assert found.distinct(tokens, 1, 16) == pytest.approx(16 * (1 - (15 / 16) ** tokens), rel=0.02)
    assert coverage((), 16, 650).kind == "uniform"
    assert len(coverage(((1.0, 1.0), (25.0, 16.0)), 16, 650).measured) == 2
    every = [float(coverage(((1.0, 1.0), (25.0, 7.0)), 16, 650).distinct(t, 1, 16)) for t in (25, 60, 300, 650)]
    assert every[0] == 7 and every == sorted(every) and every[-1] < 16.001


def test_an_engine_of_its_own_is_a_choice_beside_the_eager_modes() -> None:
    space = decoding_space(batch=2, cores=1, engine="lean")
    default = default_candidate(space, 1)
    assert default.kernels.engine == "lean"
    assert {pilot.kernels.engine for pilot in pilots(space, default)} == {"lean"}
    assert {c.kernels.engine for c in space.grid({"draft_tokens": (4,), "mixing_weight": (1.0,)})} == {"lean", "eager"}
    assert space.candidate(space.encode(default)) == default
    spec = spec_from_config(TINY, "tiny")
    predict = Predictor(spec, made_up_cpu(), Workload(batch=2, prompt_tokens=20, generated_tokens=64))
    eager = default_candidate(decoding_space(batch=2, cores=1), 1)
    found = [predict(candidate, None) for candidate in (default, eager)]
    assert found[0] and found[1] and found[0].tokens_per_second > found[1].tokens_per_second


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_every_sampler_is_predicted(sampler: Sampler) -> None:
    """For all settings of the space, from what the pilots recorded, as the performance model says it directly."""
    spec = spec_from_config(TINY, "tiny")
    space = decoding_space(batch=2, cores=1)
    predictor = Predictor(spec, made_up_cpu(), Workload(2, 20, 64))
    acceptance = Acceptance({1.0: tuple(range(30, 5, -1))}, ((2.0, 1.7), (50.0, 3.0)))
    coarse = {"draft_tokens": (1, 4, 24), "mixing_weight": (1.0,), "experts_block": ("loop",)}
    settings = [c for c in space.grid(coarse) if c.decoding.sampler == sampler]
    assert settings
    for candidate in settings:
        decoding, kernels = candidate
        found = predictor(candidate, acceptance)
        at = setting(
            spec,
            made_up_cpu(),
            "float32",
            expert_coverage=coverage(acceptance.experts, spec.num_experts, 1400),
            kernels=KernelConfig({1_000_000: kernels.expert_mode(2 * decoding.slots)}, 1),
        )
        seconds = float(time_step(at, step_of(decoding), 2, 52).seconds)
        steps = 64 / acceptance.length(decoding)
        if sampler == "single_forward":  # the first step of a request commits one of its 64 tokens
            steps = 1 + 63 / acceptance.length(decoding)
        assert found and found.tokens_per_second == pytest.approx(2 * 64 / (steps * seconds), rel=0.02)
        assert (predictor(candidate, None) is None) == judged(decoding)


def test_acceptance_between_mixing_weights_lies_between() -> None:
    acceptance = Acceptance({1.0: (5, 3, 2), 0.5: (0, 0, 10)})
    lengths = [acceptance.length(DecodingConfig("two_forward", mixing_weight=w)) for w in (1.0, 0.8, 0.5, 0.3)]
    assert lengths == sorted(lengths) and lengths[0] < lengths[1] < lengths[2] == lengths[3] == 3.0


def test_no_draft_accepted_is_one_token_a_step() -> None:
    acceptance = Acceptance({1.0: (10,)})
    assert acceptance.length(DecodingConfig("two_forward")) == 1.0
    assert acceptance.length(DecodingConfig("two_forward", anchor_draft=True)) == 2.0


def test_what_no_profile_describes_is_not_predicted_and_what_is_wrong_is_said() -> None:
    spec = spec_from_config(TINY, "tiny")
    predict = Predictor(spec, made_up_cpu(), Workload())
    default = default_candidate(decoding_space(batch=1, cores=2, engine="lean"), 1)
    assert predict(default, None) is not None
    for kernels in (replace(default.kernels, threads=64), replace(default.kernels, engine="compiled")):
        assert predict(Candidate(default.decoding, kernels), None) is None
    with pytest.raises(UserError):  # an element type that was not probed concerns every setting: no silent None
        Predictor(spec, made_up_cpu(), Workload(dtype="float16"))(default, None)


# --- pilots


@pytest.mark.parametrize("engine", ["eager", "lean"])
def test_the_pilots_begin_with_the_default_and_ask_what_no_model_says(engine: Any) -> None:
    space = decoding_space(batch=1, cores=4, engine=engine)
    default = default_candidate(space, 4)
    found = pilots(space, default)
    assert found[0] == default and len({space.key(c) for c in found}) == len(found)
    assert {c.kernels.engine for c in found} == {engine}
    verified = [c for c in found if judged(c.decoding)]
    assert {c.decoding.mixing_weight for c in verified} == {1.0, 0.5, 0.25}
    assert {c.kernels.threads for c in verified if c.decoding.lossless} == {1, 4}  # what threads give here
    assert [c.decoding.sampler for c in found if c.decoding.drafts and not judged(c.decoding)] == ["denoising"]
    assert {c.decoding.draft_tokens for c in found[1:]} == {MAX_DRAFT_TOKENS}


def test_pilots_of_smaller_spaces() -> None:
    single = decoding_space(batch=1, cores=2, drafts=False)
    assert pilots(single, default_candidate(single, 1)) == [default_candidate(single, 1)]
    lossless = decoding_space(batch=1, cores=1, lossless=True)
    found = pilots(lossless, default_candidate(lossless, 1))
    assert len(found) == 2 and all(c.decoding.lossless for c in found)


# --- what is tried next


ACCEPTANCE = Acceptance({1.0: (1, 1), 0.5: (1, 2)})


def trial(number: int, candidate: Candidate, **found: Any) -> TrialRecord:
    space = decoding_space(batch=1, cores=2)
    facts = {"outcome": "correct", "tokens_per_second": speed(candidate), "divergence": 0.0, **found}
    return TrialRecord(number, space.encode(candidate), **facts)


def test_seeds_are_successive_fronts_of_expected_speed_and_divergence() -> None:
    """The fastest lossless setting is the first of its kind, as is the fastest of all; those alike are apart in K."""
    space = decoding_space(batch=1, cores=2)
    tried = [
        trial(i, c, source="pilot", divergence=0.0 if c.decoding.lossless else 0.02 if judged(c.decoding) else 0.3)
        for i, c in enumerate(pilots(space, default_candidate(space, 2)))
    ]
    found = Guide(space, oracle).seeds(tried, ACCEPTANCE, 12)
    assert len({space.key(c) for c in found}) == 12
    grid = space.grid({"mixing_weight": (1.0, 0.5), "confidence_threshold": ("none",)})
    lossless = [c for c in found if c.decoding.lossless]
    assert 3 <= len(lossless) <= 6
    assert speed(lossless[0]) > 0.97 * max(speed(c) for c in grid if c.decoding.lossless)
    assert speed(found[0]) > 0.97 * max(map(speed, grid))
    assert all(c.decoding.confidence_threshold is None for c in found)
    for one in found:
        for other in found:
            if one is not other and replace(one.decoding, draft_tokens=24) == replace(other.decoding, draft_tokens=24):
                same = all(space.encode(one).get(n) == space.encode(other).get(n) for n in ("threads", "experts_block"))
                assert not same or abs(one.decoding.draft_tokens - other.decoding.draft_tokens) >= 4
    tried_keys = {space.key(space.candidate(t.params)) for t in tried}
    assert not tried_keys.intersection(map(space.key, found))


def test_lossless_settings_are_seeded_where_mixed_ones_showed_no_difference() -> None:
    """None in a few hundred tokens proves nothing: settings that are no faster must not stand before lossless ones."""
    space = decoding_space(batch=1, cores=2)

    def alike(candidate: Candidate, acceptance: Acceptance | None) -> Prediction:
        decoding = candidate.decoding
        if judged(decoding):
            decoding = replace(decoding, mixing_weight=1.0)
        found = oracle(Candidate(decoding, candidate.kernels), acceptance)
        assert found is not None
        return found

    tried = [
        trial(i, c, source="pilot", tokens=(500,), tokens_per_second=alike(c, ACCEPTANCE).tokens_per_second)
        for i, c in enumerate(pilots(space, default_candidate(space, 2)))
    ]
    tried[-1] = replace(tried[-1], divergence=0.03)  # of the block that nothing verifies
    found = Guide(space, alike).seeds(tried, ACCEPTANCE, 8)
    assert any(c.decoding.lossless for c in found[:3]) and sum(c.decoding.lossless for c in found) >= 2


def test_without_predictions_nothing_is_proposed() -> None:
    space = decoding_space(batch=1, cores=2)
    guide = Guide(space, blind)
    assert guide.seeds([], ACCEPTANCE, 8) == [] and guide.next([], ACCEPTANCE) is None


def misled(candidate: Candidate, acceptance: Acceptance | None) -> Prediction | None:
    """A model that takes denoising for three times as fast as it is: the best of its settings for the best of all."""
    found = oracle(candidate, acceptance)
    factor = 3.0 if candidate.decoding.sampler == "denoising" else 1.0
    return found and found._replace(tokens_per_second=found.tokens_per_second * factor)


def piloted(space: Space) -> list[TrialRecord]:
    return [trial(i, c, source="pilot") for i, c in enumerate(pilots(space, default_candidate(space, 2)))]


def test_a_wrong_model_is_corrected_by_what_is_measured() -> None:
    """It begins where the model points, learns that all of these are slower, and ends at the best setting there is."""
    space = decoding_space(batch=1, cores=2, lossless=True)
    guide, tried = Guide(space, misled), piloted(space)
    samplers = []
    for number in range(20):
        candidate = guide.next(tried, ACCEPTANCE)
        assert candidate is not None
        samplers.append(candidate.decoding.sampler)
        tried.append(trial(number, candidate))
    assert samplers[0] == "denoising" and samplers[-1] == "single_forward"
    assert len({space.key(space.candidate(t.params)) for t in tried}) == len(tried)  # nothing is tried twice
    best = max(speed(c) for c in space.grid())
    assert max(t.tokens_per_second or 0 for t in tried) > 0.97 * best


@pytest.mark.parametrize(
    "failure",
    [
        {"outcome": "runtime", "tokens_per_second": None},
        {"outcome": "slower", "tokens_per_second": None, "step_seconds": 1},
    ],
    ids=lambda failure: failure["outcome"],
)
def test_what_fails_is_left_alone(failure: dict[str, Any]) -> None:
    """The sampler that is predicted to be the fastest never runs: a few trials are enough to look elsewhere."""
    space = decoding_space(batch=1, cores=2, lossless=True)
    guide, tried = Guide(space, misled), piloted(space)
    for number in range(10):
        candidate = guide.next(tried, ACCEPTANCE)
        assert candidate is not None
        fails = candidate.decoding.sampler == "denoising"
        tried.append(trial(number, candidate, **(failure if fails else {})))
    assert 1 <= sum(t.outcome != "correct" for t in tried) <= 4


def test_only_what_may_be_chosen_is_proposed() -> None:
    """Without verification all is faster; whether it is close enough is expected from what was measured of its like."""
    space = decoding_space(batch=1, cores=2)
    guide = Guide(space, oracle)
    for far, allowed in ((0.9, 0.1), (0.05, 0.1)):
        tried = [
            trial(i, c, source="pilot", divergence=far if c.decoding.drafts and not judged(c.decoding) else 0.0)
            for i, c in enumerate(pilots(space, default_candidate(space, 2)))
        ]
        found = guide.next(tried, ACCEPTANCE, allowed)
        assert found is not None and judged(found.decoding) == (far > allowed)
        strict = guide.next(tried, ACCEPTANCE)
        assert strict is not None and strict.decoding.lossless


def test_expectations_meet_what_was_measured() -> None:
    """Near a measured setting its ratio is taken over; far from any the prediction stays, but for what all share."""
    space = decoding_space(batch=1, cores=2)
    guide = Guide(space, oracle)
    grid = space.grid({"mixing_weight": (1.0,), "threads": (1,), "confidence_threshold": ("none",)})
    one = next(c for c in grid if c.decoding == DecodingConfig("two_forward", draft_tokens=8))
    before = guide.expected([], ACCEPTANCE)
    after = guide.expected([trial(0, one, tokens_per_second=speed(one) / 2)], ACCEPTANCE)

    def gain(candidate: Candidate) -> float:
        key = space.key(candidate)
        return after[key][0] / before[key][0]

    near = space.candidate(space.encode(one) | {"draft_tokens": 9})
    far = default_candidate(space, 1)
    exact = speed(one) / 2 / before[space.key(one)][0]
    assert gain(one) == pytest.approx(exact, rel=0.1)
    assert math.log(exact) < math.log(gain(near)) < math.log(gain(far)) < 0
