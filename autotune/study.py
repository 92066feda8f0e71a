"""The search: seeded by predictions, every finding stored as it comes, and a decision that noise cannot make."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import optuna
from optuna.trial import TrialState

from autotune.objective import Runner, decoding_stages, most_tokens_of, run_stages
from autotune.results import Decision, StudyResult, Subject, TrialRecord, comparison_of
from autotune.seeding import Predict, pilots, seeds
from autotune.space import Candidate
from autotune.storage import database_errors, open_storage, read_study, read_trial, shown, single_worker, sole_worker
from hardware.files import UserError, plain
from runtime.config import require
from runtime.measurement import INTERVAL_ROUNDS

SEEDS = 8
SEEDED = "seeded"
_REPEATS = 25  # known settings proposed in a row: the search has nothing new to ask
_COPIED = (
    "predicted_tokens_per_second",
    "tokens_per_second",
    "divergence",
    "exact_match",
    "reason",
    "stage",
    "outcome",
)

OnTrial = Callable[[TrialRecord, int], None]


def tune(
    url: str,
    subject: Subject,
    runner: Runner,
    *,
    default: Candidate,
    predict: Predict,
    trials: int,
    seconds: float | None = None,
    max_divergence: float = 0.0,
    rounds: int = 8,
    seed: int = 0,
    command: str = "",
    on_trial: OnTrial | None = None,
    on_compare: Callable[[float], None] = lambda share: None,
) -> StudyResult:
    """Search until the study holds `trials` distinct settings, or for `seconds`, and the default in any case; decide.

    The same call goes on where an earlier one was stopped. Trials that were lost with it are run again, once.
    on_trial: called with each finished trial and the number of distinct settings so far; on_compare: with the share of
    the final comparison that is done. UserError: a study of another
    device, model or workload; a storage that cannot be used; a second worker on SQLite.
    """
    require(trials >= 1, f"trials >= 1 must hold, but got {trials}")
    least = INTERVAL_ROUNDS
    require(rounds >= least, f"rounds >= {least} must hold, but got {rounds}: fewer pairs have no interval of 95%")
    require(max_divergence >= 0, f"max_divergence >= 0 must hold, but got {max_divergence}")
    end = None if seconds is None else time.monotonic() + seconds
    with sole_worker(url), database_errors(url):
        study = _open(url, subject, seed)
        if single_worker(url):
            _retry_lost(study)
        for candidate in pilots(subject.space, default):
            source = "default" if candidate == default else "pilot"
            study.enqueue_trial(subject.space.encode(candidate), {"queued": {"source": source}}, skip_if_exists=True)
        repeats, known = 0, dict[int, TrialRecord]()
        while repeats < _REPEATS:
            result = read_study(study, known)
            spent = len(result.measured) >= trials or (end is not None and time.monotonic() >= end)
            if spent and result.find(default):  # without the default nothing can be decided
                break
            if SEEDED not in study.user_attrs and not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                _enqueue_seeds(study, result, predict)
            record = _run_one(study, result, runner, predict)
            repeats = 0 if record.same_as is None else repeats + 1
            if on_trial:
                on_trial(record, len(result.measured) + (record.same_as is None))
        return _decide(study, runner, default, max_divergence, rounds, command, on_compare)


def _open(url: str, subject: Subject, seed: int) -> optuna.Study:
    storage = open_storage(url, create=True)
    study = optuna.create_study(
        storage=storage, study_name=subject.name, directions=["maximize", "minimize"], load_if_exists=True
    )
    if "subject" not in study.user_attrs and not study.get_trials(deepcopy=False):
        study.set_user_attr("subject", plain(subject))
    stored = read_study(study)
    reason = stored.subject.mismatch(subject)
    if reason is not None:
        raise UserError(f"study {subject.name!r} in {shown(url)} was made with {reason}: tune into another place")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # `group`: conditions make groups
        # A fresh stream for each continuation: the same one again would propose what is known.
        study.sampler = optuna.samplers.TPESampler(seed=seed + len(stored.trials), multivariate=True, group=True)
    return study


def _retry_lost(study: optuna.Study) -> None:
    """Queue again what was running when an earlier process ended. Not twice: what fails again is not bad luck."""
    trials = study.get_trials(deepcopy=False)
    queued = {t.number: t.user_attrs.get("queued", {}) for t in trials}
    retried = {q.get("retry_of") for q in queued.values()}
    for trial in trials:
        if trial.state == TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
        elif trial.state != TrialState.FAIL:
            continue
        params = trial.params or trial.system_attrs.get("fixed_params")
        how = queued[trial.number]
        if params and trial.number not in retried and "retry_of" not in how:
            study.enqueue_trial(params, {"queued": {**how, "retry_of": trial.number}})


def _enqueue_seeds(study: optuna.Study, result: StudyResult, predict: Predict) -> None:
    space = result.subject.space
    for candidate in seeds(space, predict, result.acceptance(), SEEDS):
        study.enqueue_trial(space.encode(candidate), {"queued": {"source": "seed"}}, skip_if_exists=True)
    study.set_user_attr(SEEDED, True)


def _run_one(study: optuna.Study, result: StudyResult, runner: Runner, predict: Predict) -> TrialRecord:
    """Run the next queued or proposed setting."""
    ran: list[optuna.trial.FrozenTrial] = []
    study.optimize(
        lambda trial: _objective(trial, result, runner, predict),
        n_trials=1,
        callbacks=[lambda _, trial: ran.append(trial)],
    )
    return read_trial(ran[0], study.study_name)


def _objective(trial: optuna.Trial, result: StudyResult, runner: Runner, predict: Predict) -> tuple[float, float]:
    """Run one setting, or repeat what is known of it. What did not end "correct" is pruned and marked infeasible."""
    space = result.subject.space
    candidate = space.suggest(trial)
    twin = result.find(candidate)
    if twin is not None:
        found: dict[str, Any] = {name: getattr(twin, name) for name in _COPIED}
        trial.set_user_attr("twin", {"same_as": twin.number, **found})
    else:
        predicted = predict(candidate, result.acceptance())
        if predicted is not None:
            trial.set_user_attr("prediction", {f"predicted_{k}": v for k, v in predicted._asdict().items()})
        best = max((t.tokens_per_second or 0.0 for t in result.correct if t.lossless), default=0.0)
        if trial.user_attrs.get("queued", {}).get("source") in ("default", "pilot"):
            best = 0.0  # what everything else is compared with, or predicted from
        stages = decoding_stages(candidate, runner, best, space.batch * most_tokens_of(candidate.decoding))
        found = run_stages(stages, trial.set_user_attr)
    trial.set_constraint("runs", 0.0 if found["outcome"] == "correct" else 1.0)  # feasible: <= 0
    if found["outcome"] != "correct":
        raise optuna.TrialPruned
    return found["tokens_per_second"], found["divergence"]


def _decide(
    study: optuna.Study,
    runner: Runner,
    default: Candidate,
    max_divergence: float,
    rounds: int,
    command: str,
    progress: Callable[[float], None],
) -> StudyResult:
    """Compare the fastest allowed setting with the default, unless that was done after the last trial already."""
    result = read_study(study)
    base = result.find(default)
    assert base is not None  # `tune` does not stop before
    if base.outcome != "correct":
        raise UserError(f"the default setting does not run ({base.outcome}: {base.reason}), so nothing can be compared")
    best = result.allowed(max_divergence)[0]
    old, basis = result.decision, (best.number, len(result.measured), max_divergence)
    enough = old is not None and (old.comparison is None or old.comparison.rounds >= rounds)
    if old and enough and (old.challenger, old.measured, old.max_divergence) == basis:
        return result
    comparison = None
    if best != base:
        name = f"pairs:{best.number}:{base.number}"
        pairs = list(study.user_attrs.get(name, []))
        while len(pairs) < rounds:
            pairs.append(runner.pair(default, result.candidate(best)))
            study.set_user_attr(name, pairs)
            progress(len(pairs) / rounds)
        comparison = comparison_of(pairs)
    if comparison is None:
        reason = "no allowed setting measured faster than the default"
    elif comparison.low > 1:
        reason = "faster than the default in alternating rounds"
    else:
        reason = "the gain over the default is inside the noise"
    decision = Decision(
        trial=best.number if comparison and comparison.low > 1 else base.number,
        default_trial=base.number,
        challenger=best.number,
        reason=reason,
        comparison=comparison,
        max_divergence=max_divergence,
        measured=len(result.measured),
        command=command,
        date=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
    )
    study.set_user_attr("decision", plain(decision))
    return read_study(study)
