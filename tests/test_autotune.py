"""The tuner on a made-up machine: what it measures, keeps, refuses and decides. No torch is needed for a search."""

from __future__ import annotations

import fcntl
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autotune.objective import Outputs
from autotune.results import spearman, summary
from autotune.seeding import Prediction
from autotune.sole_worker import has_sole_worker, sole_worker
from autotune.space import Candidate, decoding_space, default_candidate
from autotune.storage import read_studies, storage_url
from autotune.study import tune
from hardware.files import UserError
from runtime.config import Workload
from runtime.measurement import Measurement
from tests.made_up import DEVICE, MadeUp, blind, oracle, run, small_space, speed, subject, unsynced


@pytest.fixture(autouse=True)
def fast() -> Iterator[None]:
    with unsynced():
        yield


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
    assert len(result.measured) == 12 and {t.outcome for t in result.measured} <= {"correct", "slower"}
    sources = [t.source for t in result.trials]
    order = {"default": 0, "pilot": 1, "seed": 2, "guided": 3, "search": 3}
    assert sources.count("default") == 1 and sources == sorted(sources, key=lambda source: order[source])
    assert result.trials[0].params == space.encode(default_candidate(space, 2))
    for trial in result.correct:
        assert trial.tokens_per_second and trial.divergence == 0 and trial.exact_match == 0.5 and trial.seconds
        assert trial.source == "pilot" or (trial.predicted_tokens_per_second and trial.predicted_step_seconds)
        assert trial.step_seconds and trial.logit_error == 1e-6 and trial.worker and trial.begun and trial.spent_seconds
    single = result.best_autoregressive()
    assert single and single.params["sampler"] == "autoregressive"
    rank = result.rank_correlation()
    assert rank is not None and rank > 0.8
    assert read_studies(tmp_path) == [result]
    assert summary(result)["predictions"]["count"] == sum(t.predicted_step_seconds is not None for t in result.correct)


def test_predictions_find_it_sooner(tmp_path: Path) -> None:
    """The first setting after the pilots is near the best already; without predictions it takes longer."""
    space = decoding_space(batch=1, cores=2, lossless=True)
    best = max(map(speed, space.grid()))
    seeded = run(tmp_path / "seeded", MadeUp(), subject(space=space), trials=4)
    unseeded = run(tmp_path / "blind", MadeUp(), subject(space=space), trials=4, predict=blind)
    reached = [max(speed(r.candidate(t)) for t in r.correct) / best for r in (seeded, unseeded)]
    assert reached[0] > 0.95 > reached[1]


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
    about = subject(space=decoding_space(batch=1, cores=2, lossless=True))
    result = run(tmp_path, runner, about, trials=12, predict=lambda c, a: Prediction(speed(c), 1.0, 1.0))
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

    runner = MadeUp(fault=fault)
    with pytest.raises(UserError, match="default setting does not run"):
        run(tmp_path, runner, trials=4)
    assert runner.measured == []  # at once, not after a search that decides nothing


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
        result = run(tmp_path, runner, subject(space=small_space(lossless=False)), trials=14, max_divergence=allowed)
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
        ({"tilings": "3f"}, ["tilings by default", "3f"]),
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


def test_who_only_looks_whether_a_worker_is_there_keeps_none_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "study.db.lock").open("w") as looked:
        fcntl.flock(looked, fcntl.LOCK_SH)
        monkeypatch.setattr("autotune.sole_worker.time.sleep", lambda _: looked.close())
        with sole_worker(storage_url(tmp_path)):
            assert looked.closed and has_sole_worker(storage_url(tmp_path))
    assert has_sole_worker(storage_url(tmp_path)) is False


@pytest.mark.parametrize("change", [{"trials": 0}, {"rounds": 1}, {"max_divergence": -0.1}])
def test_impossible_budgets_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must hold"):
        run(tmp_path, MadeUp(), **change)


def test_a_time_budget_ends_the_search(tmp_path: Path) -> None:
    """What time allowed is kept; the default is run in any case, so that there is a decision."""
    result = run(tmp_path, MadeUp(), trials=1000, seconds=0.0)
    assert [t.source for t in result.measured] == ["default"] and result.decision
    result = run(tmp_path, MadeUp(), trials=1000, seconds=0.5)
    assert 1 <= len(result.measured) < 1000 and result.decision


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    run(tmp_path, MadeUp(), trials=2)
    with sqlite3.connect(tmp_path / "study.db") as database:
        found = """'{"tokens_per_second": "fast"}'"""
        database.execute(f"UPDATE trial_user_attributes SET value_json = {found} WHERE key = 'decode'")
    with pytest.raises(UserError, match=r"trial 0: tokens_per_second"):
        read_studies(tmp_path)
