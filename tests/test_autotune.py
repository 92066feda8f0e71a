"""The tuner on a made-up machine: what it measures, keeps, refuses and decides. No torch is needed for a search."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autotune.objective import Outputs
from autotune.results import spearman, summary
from autotune.seeding import Acceptance, Prediction, Predictor, coverage, pilots, seeds
from autotune.space import MAX_DRAFT_TOKENS, Candidate, decoding_space, default_candidate
from autotune.storage import read_studies, shown, sole_worker, storage_url
from autotune.study import tune
from hardware.files import UserError
from perfmodel.acceptance import histogram_from_rates, judged
from perfmodel.decoding import setting, time_step
from perfmodel.model_spec import spec_from_config
from perfmodel.steps import step_of
from runtime.config import SAMPLER_NAMES, DecodingConfig, KernelConfig, Sampler, Workload
from runtime.measurement import Measurement
from tests.made_up import DEVICE, MadeUp, blind, oracle, run, speed, subject
from tests.models import TINY
from tests.perfmodel_cpu import made_up_cpu


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """SQLite waits for the disk at every commit, which is most of a made-up trial's time."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def hurry(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", hurry)
    yield
    event.remove(Engine, "connect", hurry)


# --- predictions


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


def test_seeds_are_the_best_predicted_and_differ() -> None:
    space = decoding_space(batch=1, cores=2)
    acceptance = Acceptance({1.0: (1, 1), 0.5: (1, 2)})
    found = seeds(space, lambda c, _: Prediction(speed(c), 1.0, 1.0), acceptance, 8)
    assert len({space.key(c) for c in found}) == 8
    kinds = {(c.decoding.mixing_weight, c.kernels.threads) for c in found}
    assert kinds == {(1.0, 1), (1.0, 2), (0.5, 1), (0.5, 2)}
    kept = [not c.decoding.lossless and c.decoding.mixing_weight == 1 for c in found]
    assert 0 < sum(kept) < len(kept)  # the fastest keep their drafts unseen, which says nothing of the others
    params = [space.encode(c) for c in seeds(space, lambda c, _: Prediction(speed(c), 1.0, 1.0), acceptance, 40)]
    pairs = [
        (p, q) for p in params for q in params if p is not q and p | {"draft_tokens": 0} == q | {"draft_tokens": 0}
    ]
    assert pairs and all(abs(int(p["draft_tokens"]) - int(q["draft_tokens"])) > 1 for p, q in pairs)
    grid = space.grid({"mixing_weight": (1.0, 0.5)})
    assert speed(found[0]) >= 0.98 * max(map(speed, grid))
    for weight in (1.0, 0.5):
        best = max(speed(c) for c in grid if judged(c.decoding) and c.decoding.mixing_weight == weight)
        assert max(speed(c) for c in found if judged(c.decoding) and c.decoding.mixing_weight == weight) >= 0.98 * best
    assert seeds(space, blind, acceptance, 8) == []


def test_the_pilots_begin_with_the_default() -> None:
    for space in (decoding_space(batch=1, cores=2), decoding_space(batch=1, cores=2, drafts=False)):
        default = default_candidate(space, 1)
        found = pilots(space, default)
        assert found[0] == default
        assert all(space.encode(c) for c in found)
    assert found == [default]


# --- the search


def test_it_finds_the_best_and_keeps_every_finding(tmp_path: Path) -> None:
    runner = MadeUp()
    space = decoding_space(batch=1, cores=2, lossless=True)
    result = run(tmp_path, runner, subject(space=space))
    best = max(space.grid(), key=speed)
    assert result.decision and not result.decision.kept_default
    chosen = result.candidate(result.trial(result.decision.trial))
    assert speed(chosen) > 0.95 * speed(best)
    assert chosen == runner.compared[-1]
    comparison = result.decision.comparison
    assert comparison and comparison.low > 1
    assert comparison.low <= comparison.ratio <= comparison.high
    assert len(result.measured) == 12 and {t.outcome for t in result.measured} == {"correct", "slower"}
    assert [t.source for t in result.trials[:2]] == ["default", "pilot"]
    assert result.trials[0].params == space.encode(default_candidate(space, 2))
    for trial in result.correct:
        assert trial.tokens_per_second and trial.divergence == 0 and trial.exact_match == 0.5 and trial.seconds
        assert (trial.predicted_tokens_per_second is None) == (trial.number == 1)  # the pilot tells the acceptance
    single = result.best_autoregressive()
    assert single and single.params["sampler"] == "autoregressive"
    rank = result.rank_correlation()
    assert rank is not None and rank > 0.8
    assert read_studies(tmp_path) == [result]
    assert summary(result)["predictions"]["count"] == len(result.correct) - 1


def test_predictions_find_it_sooner(tmp_path: Path) -> None:
    """The first setting after the pilots is near the best already; without predictions it takes longer."""
    space = decoding_space(batch=1, cores=2, lossless=True)
    best = max(map(speed, space.grid()))
    seeded = run(tmp_path / "seeded", MadeUp(), subject(space=space), trials=3)
    unseeded = run(tmp_path / "blind", MadeUp(), subject(space=space), trials=3, predict=blind)
    reached = [max(speed(r.candidate(t)) for t in r.correct) / best for r in (seeded, unseeded)]
    assert reached[0] > 0.95 > reached[1]


def test_equal_settings_are_measured_once(tmp_path: Path) -> None:
    """A space of eight settings: the search repeats itself, stops by itself, and asks the machine eight times."""
    space = decoding_space(batch=1, cores=2, drafts=False)
    runner = MadeUp()
    result = run(tmp_path, runner, subject(space=space), trials=1000, predict=blind)
    assert len(runner.measured) == len({space.key(c) for c in runner.measured}) == len(space.grid()) == 8
    assert len(result.measured) == 8 < len(result.trials)
    repeated = next(t for t in result.trials if t.same_as is not None)
    original = result.trial(repeated.same_as or 0)
    assert (repeated.params, repeated.tokens_per_second) == (original.params, original.tokens_per_second)


def test_it_resumes_without_measuring_again(tmp_path: Path) -> None:
    first, second = MadeUp(), MadeUp()
    before = run(tmp_path, first, trials=6)
    after = run(tmp_path, second, trials=12)
    assert (len(first.measured), len(second.measured)) == (6, 6)
    assert after.measured[:6] == before.measured
    third = MadeUp()
    assert run(tmp_path, third, trials=12) == after
    assert third.measured == third.compared == []


@pytest.mark.parametrize("at", [0, 1, 3])
def test_an_interrupt_loses_nothing_that_was_measured(at: int, tmp_path: Path) -> None:
    """... and the same call goes on: with the interrupted setting too, to the same number of settings.

    Setting 0 is the default, setting 1 a pilot, and without predictions setting 3 is the search's own.
    """
    calls = []
    space = decoding_space(batch=1, cores=2, drafts=at == 1, lossless=True)
    options: dict[str, Any] = {"trials": 5, "predict": blind}

    def interrupt(candidate: Candidate) -> None:
        calls.append(candidate)
        if len(calls) == at + 1:
            raise KeyboardInterrupt

    runner = MadeUp(fault=interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, runner, subject(space=space), **options)
    kept = read_studies(tmp_path)[0]
    assert [t.number for t in kept.measured] == list(range(at))
    result = run(tmp_path, runner, subject(space=space), **options)
    assert result.measured[:at] == kept.measured
    assert len(result.measured) == len(runner.measured) == 5
    assert calls[at] in runner.measured
    assert result.trials[0].source == "default" and result.decision


def test_a_killed_process_costs_one_trial(tmp_path: Path) -> None:
    """A trial left running (SIGKILL) is run again."""
    import optuna

    run(tmp_path, MadeUp(), trials=1)
    study = optuna.load_study(study_name="made-up batch=1", storage=storage_url(tmp_path))
    trial = study.ask()
    candidate = subject().space.suggest(trial)
    runner = MadeUp()
    result = run(tmp_path, runner, trials=5)
    assert runner.measured.count(candidate) == 1
    assert len(result.measured) == 5
    assert study.trials[trial.number].state == optuna.trial.TrialState.FAIL


def test_what_cannot_run_ends_one_trial(tmp_path: Path) -> None:
    """Each failure is recorded by name and reason, is never chosen, and does not stop the search."""

    def fault(candidate: Candidate) -> None:
        mode = candidate.kernels.expert_mode(candidate.decoding.slots)
        if mode == "grouped":
            raise RuntimeError("kernel died\nbadly")
        if mode == "gather" and candidate.decoding.sampler == "two_forward":
            raise UserError("gather must not draft")

    def infeasible(candidate: Candidate) -> str | None:
        return "too many drafts" if candidate.decoding.draft_tokens > 20 and candidate.decoding.slots > 1 else None

    runner = MadeUp(fault=fault, infeasible=infeasible)
    result = run(tmp_path, runner, trials=14, predict=lambda c, a: Prediction(speed(c), 1.0, 1.0))
    by_outcome = {t.outcome: t for t in result.measured}
    assert set(by_outcome) == {"correct", "infeasible", "runtime"}
    assert by_outcome["runtime"].reason == "RuntimeError: kernel died badly"
    assert {t.reason for t in result.measured if t.outcome == "infeasible"} <= {
        "too many drafts",
        "gather must not draft",
    }
    assert all(t.tokens_per_second is None for t in result.measured if t.outcome != "correct")
    assert result.decision and result.trial(result.decision.challenger).outcome == "correct"
    assert {t.number for t in result.front()} <= {t.number for t in result.correct}


def test_a_fast_setting_that_is_wrong_is_not_chosen(tmp_path: Path) -> None:
    """A verifier that accepts too much is fast; its tokens are not those of autoregressive decoding."""

    class Wrong(MadeUp):
        def measure(self, candidate: Candidate) -> tuple[Measurement, Outputs]:
            record, outputs = super().measure(candidate)
            broken = candidate.kernels.expert_mode(candidate.decoding.slots) == "grouped"
            return record, [[200_000]] if broken else outputs

    result = run(tmp_path, Wrong(), subject(space=decoding_space(batch=1, cores=2, lossless=True)), trials=10)
    wrong = [t for t in result.measured if "grouped" in t.params.values()]
    assert wrong and all(t.outcome == "incorrect" and "20.0%" in t.reason for t in wrong)
    assert all(t.tokens_per_second and t.divergence is None for t in wrong)  # what was measured is kept
    assert result.decision and result.decision.challenger not in {t.number for t in wrong}


def test_a_default_that_does_not_run_is_said(tmp_path: Path) -> None:
    def fault(candidate: Candidate) -> None:
        if candidate.decoding.sampler == "autoregressive":
            raise RuntimeError("no")

    with pytest.raises(UserError, match="default setting does not run"):
        run(tmp_path, MadeUp(fault=fault), trials=4)


def test_a_hopeless_setting_costs_one_batch(tmp_path: Path) -> None:
    """Twice the threads, a hundredth of the speed, as on a busy machine: known from the warm-up, and never chosen."""

    def gain(candidate: Candidate, batch: int) -> float:
        return speed(candidate) / (100 if candidate.kernels.threads == 2 else 1)

    about = subject()
    runner = MadeUp(gain=gain)
    result = run(tmp_path, runner, about, default=default_candidate(about.space, 1), trials=8)
    slower = [t for t in result.measured if t.params["threads"] == 2]
    assert slower and all(t.outcome == "slower" and t.stage == "micro_benchmark" for t in slower), slower
    assert all(c.kernels.threads == 1 for c in runner.measured) and len(runner.measured) == 8 - len(slower)


# --- the decision


def test_a_gain_inside_the_noise_keeps_the_default(tmp_path: Path) -> None:
    """All settings alike: the fastest measured one is so by luck, and alternating rounds say so."""
    runner = MadeUp(noise=0.1, gain=lambda candidate, batch: 100.0)
    space = decoding_space(batch=1, cores=2, lossless=True)
    result = run(tmp_path, runner, subject(space=space), trials=8)
    assert result.decision and result.decision.kept_default
    assert result.decision.challenger != result.decision.default_trial and runner.compared
    comparison = result.decision.comparison
    assert comparison and comparison.low <= 1
    assert "noise" in result.decision.reason


def test_a_default_that_is_fastest_needs_no_comparison(tmp_path: Path) -> None:
    def gain(candidate: Candidate, batch: int) -> float:
        return 200.0 if candidate == default_candidate(decoding_space(batch=1, cores=2), 2) else 100.0

    runner = MadeUp(gain=gain)
    result = run(tmp_path, runner, trials=5)
    assert result.decision and result.decision.kept_default and result.decision.comparison is None
    assert runner.compared == []


def test_the_allowed_divergence_bounds_the_choice(tmp_path: Path) -> None:
    """One study, decided again for each bound without measuring again."""
    for allowed in (1.0, 0.03, 0.0):
        runner = MadeUp()
        result = run(tmp_path, runner, trials=14, max_divergence=allowed)
        assert len(result.measured) == 14  # of which the hopeless ones are not measured in full
        assert len(runner.measured) == (len(result.correct) if allowed == 1.0 else 0)
        assert result.decision
        chosen = result.trial(result.decision.trial)
        assert chosen.divergence is not None and chosen.divergence <= allowed
        faster = [t for t in result.correct if (t.tokens_per_second or 0) > (chosen.tokens_per_second or 0)]
        assert all((t.divergence or 0) > allowed for t in faster)
    front = result.front()
    assert len(front) > 1
    for trial in result.correct:  # nothing beats a point of the front, something beats each other one
        beaten = any(
            (o.tokens_per_second or 0) >= (trial.tokens_per_second or 0)
            and (o.divergence or 0) <= (trial.divergence or 0)
            and (o.tokens_per_second, o.divergence) != (trial.tokens_per_second, trial.divergence)
            for o in result.correct
        )
        assert beaten == (trial not in front)


def test_each_batch_has_its_study(tmp_path: Path) -> None:
    for batch in (8, 1):
        run(tmp_path, MadeUp(batch=batch), subject(batch=batch), trials=3)
    found = read_studies(tmp_path)
    assert [r.subject.workload.batch for r in found] == [1, 8]
    assert all(r.decision for r in found)


def test_rank_correlation() -> None:
    assert spearman([(1, 10), (2, 20), (3, 25), (4, 90)]) == pytest.approx(1)
    assert spearman([(1, 9), (2, 5), (3, 1)]) == pytest.approx(-1)
    assert spearman([(1, 9), (2, 5)]) is None
    assert spearman([(1, 9), (1, 5), (1, 7)]) is None


# --- what is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": DEVICE | {"device": "slide rule"}}, ["abacus", "slide rule"]),
        ({"device": DEVICE | {"torch": "2.14"}}, ["torch 2.13", "2.14"]),
        ({"model_hash": "1"}, ["model weights 0", "1"]),
        ({"workload": Workload(1, prompt_tokens=7)}, ["workload", "prompt_tokens=7"]),
        ({"prompts": "others"}, ["prompts", "others"]),
        ({"space": decoding_space(batch=1, cores=2, lossless=True)}, ["another search space"]),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_trials_of_something_else_are_refused(change: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    kept = run(tmp_path, MadeUp(), trials=1)
    runner = MadeUp()
    with pytest.raises(UserError) as error:
        run(tmp_path, runner, subject(**change), trials=6)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    assert runner.measured == [] and read_studies(tmp_path) == [kept]


def test_facts_that_change_no_times_are_not_asked_for(tmp_path: Path) -> None:
    run(tmp_path, MadeUp(), trials=1)
    run(tmp_path, MadeUp(), subject(device=DEVICE | {"system": "Linux 7"}), trials=2)


def test_a_corrupt_study_file_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    run(tmp_path, MadeUp(), trials=1)
    good = file.read_bytes()
    broken = {
        "text": b"not a database",
        "cut": good[: len(good) // 2],
        "overwritten": good[:4096] + b"\xa5" * (len(good) - 4096),
    }
    for data in broken.values():
        file.write_bytes(data)
        for use in (lambda: run(tmp_path, MadeUp()), lambda: read_studies(tmp_path)):
            with pytest.raises(UserError) as error:
                use()
            assert "study.db" in str(error.value) and "\n" not in str(error.value)
        assert file.read_bytes() == data  # nothing is repaired by overwriting it


def test_a_study_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    import optuna

    with pytest.raises(UserError, match="no study"):
        read_studies(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    optuna.create_study(storage=storage_url(tmp_path), study_name="other")
    with pytest.raises(UserError, match="holds no study"):
        read_studies(tmp_path)
    study = optuna.load_study(study_name="other", storage=storage_url(tmp_path))
    run(tmp_path, MadeUp(), trials=2)
    study.set_user_attr("subject", {"model": 3})
    with pytest.raises(UserError, match="other"):
        read_studies(tmp_path)


def test_a_storage_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    about = subject()
    options: dict[str, Any] = {"default": default_candidate(about.space, 2), "predict": oracle, "trials": 1}
    for url in ("nonsense", "no_such_database://somewhere", f"sqlite:///{tmp_path}/file/study.db"):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError) as error:
            tune(url, about, MadeUp(), **options)
        assert "\n" not in str(error.value)


def test_a_second_worker_on_sqlite_is_refused(tmp_path: Path) -> None:
    with (
        sole_worker(storage_url(tmp_path)),
        pytest.raises(UserError, match="another process"),
        sole_worker(storage_url(tmp_path)),
    ):
        pass
    run(tmp_path, MadeUp(), trials=1)


def test_passwords_are_not_shown() -> None:
    assert "secret" not in shown("postgresql://tuner:secret@host/studies")
    assert "host" in shown("postgresql://tuner:secret@host/studies")


@pytest.mark.parametrize("change", [{"trials": 0}, {"rounds": 1}, {"max_divergence": -0.1}])
def test_impossible_budgets_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must hold"):
        run(tmp_path, MadeUp(), **change)


def test_a_time_budget_ends_the_search(tmp_path: Path) -> None:
    """What time allowed is kept; the default is run in any case, so that there is a decision."""
    result = run(tmp_path, MadeUp(), trials=1000, seconds=0.0)
    assert [t.source for t in result.measured] == ["default"] and result.decision
    result = run(tmp_path, MadeUp(), trials=1000, seconds=1.5)
    assert 1 <= len(result.measured) < 1000 and result.decision


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    run(tmp_path, MadeUp(), trials=2)
    with sqlite3.connect(tmp_path / "study.db") as database:
        found = """'{"tokens_per_second": "fast"}'"""
        database.execute(f"UPDATE trial_user_attributes SET value_json = {found} WHERE key = 'decode'")
    with pytest.raises(UserError, match=r"trial 0: tokens_per_second"):
        read_studies(tmp_path)
