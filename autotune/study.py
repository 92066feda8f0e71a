"""The search: every finding stored as it comes, shared by any number of workers, and a decision noise cannot make."""

from __future__ import annotations

import os
import socket
import statistics
import time
import warnings
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

import optuna
from optuna.trial import FrozenTrial, TrialState

from autotune.claims import Claims
from autotune.lost import fail_stale, retry_lost, unless_given_up
from autotune.objective import (
    DECODING_STAGES,
    DEVICE_ERRORS,
    Comparison,
    Runner,
    StageFailure,
    Unavailable,
    decoding_stages,
    most_tokens_of,
    run_stages,
    slowdown,
)
from autotune.results import NEAR, Decision, StudyResult, Subject, TrialRecord, comparison_of, decision_words
from autotune.seeding import Predict
from autotune.sole_worker import sole_worker
from autotune.space import Candidate
from autotune.storage import database_errors, open_storage, read_study, read_trial, shown, single_worker
from autotune.strategies import Sampler, strategy
from hardware.files import UserError, plain
from runtime.config import require
from runtime.measurement import INTERVAL_ROUNDS

POLL_SECONDS = 1.0  # between looks at what other workers do
_FAILURES = 3  # comparisons that end the decision: it is the default, or the device, that fails
_REPEATS = 25  # settings in a row that are known or taken: the search has nothing new to ask
_COPIED = (
    "predicted_tokens_per_second predicted_step_seconds predicted_tokens_per_step logit_error step_seconds"
    " tokens_per_second divergence exact_match reason stage outcome"
).split()

T = TypeVar("T")
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
    worker: str = "",
    on_trial: OnTrial | None = None,
    on_compare: Callable[[float], None] = lambda share: None,
    sampler: Sampler = "seeded",
) -> StudyResult:
    """Search until the study holds `trials` distinct settings, or for `seconds`, and the default in any case; decide.

    Of the seconds as many are kept back as the decision will take.

    The same call goes on where an earlier one was stopped; trials that were lost with it go on after the last stage
    that they had stored. Off SQLite any number of workers may make the same call: a setting is measured by one of them,
    each waits for what the others still measure, and one decides.
    worker: this one's name in the records (default: host and process).
    on_trial: called with each finished trial and the number of distinct settings so far; on_compare: with the share of
    the final comparison that is done. UserError: a study of another
    device, model or workload; a storage that cannot be used; a second worker on SQLite.
    """
    require(trials >= 1, f"trials >= 1 must hold, but got {trials}")
    least = INTERVAL_ROUNDS
    require(rounds >= least, f"rounds >= {least} must hold, but got {rounds}: fewer pairs have no interval of 95%")
    require(max_divergence >= 0, f"max_divergence >= 0 must hold, but got {max_divergence}")
    end = None if seconds is None else time.monotonic() + seconds
    worker = worker or f"{socket.gethostname()}:{os.getpid()}"
    with sole_worker(url), database_errors(url), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of TPE's groups
        claims = Claims(url)
        try:
            found = _Worker(url, subject, runner, claims, default=default, predict=predict, seed=seed, name=worker)
            found.on_compare = on_compare
            found.search(sampler, seed, trials, end, rounds, max_divergence, on_trial)
            return found.decide(max_divergence, rounds, command)
        finally:
            claims.close()


class _Dropped(Exception):
    """The trial ends here: another worker has taken what it is about."""


class _Worker:
    """One process that tunes: its runner, and the study that it may share."""

    def __init__(
        self,
        url: str,
        subject: Subject,
        runner: Runner,
        claims: Claims,
        *,
        default: Candidate,
        predict: Predict,
        seed: int,
        name: str,
    ) -> None:
        self.runner, self.claims, self.default, self.predict, self.name = runner, claims, default, predict, name
        self.on_compare: Callable[[float], None] = lambda share: None
        self.space, self.alone = subject.space, single_worker(url)
        self.storage = open_storage(url, create=True)
        self.study = self._open(subject.name)
        if "subject" not in self.study.user_attrs and not self.study.get_trials(deepcopy=False):
            self.study.set_user_attr("subject", plain(subject))
        self.known: dict[int, TrialRecord] = {}
        stored = self.result()
        reason = stored.subject.mismatch(subject)
        if reason is not None:
            raise UserError(f"study {subject.name!r} in {shown(url)} was made with {reason}: tune into another place")
        # A fresh stream for each continuation, and for each of many workers: the same one again would propose the same.
        stream = seed + len(stored.trials) + (0 if self.alone else zlib.crc32(name.encode()) % 2**31)
        self.study.sampler = optuna.samplers.TPESampler(  # `group`: conditions make groups
            seed=stream % 2**32, multivariate=True, group=True, constant_liar=not self.alone
        )

    def _open(self, name: str) -> optuna.Study:
        study = optuna.create_study(
            storage=self.storage, study_name=name, directions=["maximize", "minimize"], load_if_exists=True
        )
        retry_lost(study, running=self.alone)
        return study

    def result(self) -> StudyResult:
        """The study as it stands now."""
        return read_study(self.study, self.known)

    # --- the search

    def search(
        self,
        sampler: Sampler,
        seed: int,
        trials: int,
        end: float | None,
        rounds: int,
        max_divergence: float,
        on_trial: OnTrial | None,
    ) -> None:
        """Until there are enough settings, the time is over or nothing new is left, and no other worker measures."""
        plan = strategy(sampler, self.space, self.default, self.predict, max_divergence, seed)
        for candidate, source in plan.first():
            self._queue(candidate, source)
        repeats = 0
        while True:
            if not self.alone:
                retry_lost(self.study, running=False)
            now = self.study.get_trials(deepcopy=False)  # before the result: what ends in between is not taken for lost
            result = self.result()
            running = sum(t.state == TrialState.RUNNING for t in now)
            waiting = [t for t in now if t.state == TrialState.WAITING]
            time_left = end is None or time.monotonic() + self._deciding_seconds(result, rounds, max_divergence) < end
            # A lost worker's setting has its place among the trials, though others may have ended the last meanwhile.
            lost = not self.alone and any("retry_of" in t.user_attrs.get("queued", {}) for t in waiting)
            wanted = (lost or len(result.measured) + running < trials) and time_left
            base = result.find(self.default)
            if base and base.outcome != "correct":
                words = f"{base.outcome}: {base.reason}"
                words += "), so nothing can be compared; once that is mended, tune into another place"
                raise UserError(f"the default setting does not run ({words}")
            missing = not running and not base  # without the default nothing can be decided
            if missing and not waiting:
                raise UserError("the default setting was lost twice with its process, so nothing can be compared")
            if wanted and not waiting and repeats < _REPEATS:
                for candidate, source in plan.next(result):
                    self._queue(candidate, source)
            if missing or (wanted and (waiting or repeats < _REPEATS)):
                record = self._run_one(result)
                repeats = 0 if record is not None and record.same_as is None else repeats + 1
                if on_trial and record is not None:
                    on_trial(record, len(result.measured) + (record.same_as is None))
            elif running:
                self._wait(self.study)
            else:
                return

    def _deciding_seconds(self, result: StudyResult, rounds: int, max_divergence: float) -> float:
        """What the final comparison takes: rounds of the default and of the best, or of the slowest that may be it."""
        base = result.find(self.default)
        if base is None or base.outcome != "correct":
            return 0.0
        own, others = _pass_seconds(base), result.challengers(base, max_divergence)
        # One more round's time is for the trial that comes before.
        return (rounds + 1) * (own + (_pass_seconds(others[0]) if others else own / NEAR))

    def _queue(self, candidate: Candidate, source: str) -> None:
        self.study.enqueue_trial(self.space.encode(candidate), {"queued": {"source": source}}, skip_if_exists=True)

    def _wait(self, study: optuna.Study) -> None:
        """For other workers. What those that are gone have left behind fails, and is queued again."""
        time.sleep(POLL_SECONDS)
        fail_stale(study)

    def _run_one(self, result: StudyResult) -> TrialRecord | None:
        """Run the next queued or proposed setting. None when it is another worker's."""
        ran: list[FrozenTrial] = []
        with unless_given_up():
            self.study.optimize(
                lambda trial: self._objective(trial, result),
                n_trials=1,
                catch=(_Dropped,),
                callbacks=[lambda _, trial: ran.append(trial)],
            )
        if not ran:
            return None
        record = read_trial(ran[0], self.study.study_name)
        return record if record.outcome else None

    def _objective(self, trial: optuna.Trial, result: StudyResult) -> tuple[float, float]:
        """Run one setting, or repeat what is known of it. What does not end "correct" is pruned, marked infeasible."""
        try:
            found = self._evaluate(trial, result)
        except (KeyboardInterrupt, Unavailable):
            trial.set_user_attr("interrupted", True)  # no bad luck: it is queued again however often
            raise
        trial.set_constraint("runs", 0.0 if found["outcome"] == "correct" else 1.0)  # feasible: <= 0
        if found["outcome"] != "correct":
            raise optuna.TrialPruned
        return found["tokens_per_second"], found["divergence"]

    def _evaluate(self, trial: optuna.Trial, result: StudyResult) -> dict[str, Any]:
        began = time.monotonic()
        candidate = self.space.suggest(trial)
        key = self.space.key(candidate)
        trial.set_user_attr("begun", {"worker": self.name, "begun": _now()})
        twin, known = self._claim(trial, key)
        if twin is not None:
            found: dict[str, Any] = {name: getattr(twin, name) for name in _COPIED}
            trial.set_user_attr("twin", {"same_as": twin.number, **found})
            return found
        predicted = self.predict(candidate, result.acceptance())
        if predicted is not None:
            trial.set_user_attr("prediction", {f"predicted_{k}": v for k, v in predicted._asdict().items()})
        fastest = next((t for t in result.allowed(0.0)), None)
        if key == self.space.key(self.default) or trial.user_attrs.get("queued", {}).get("source") == "pilot":
            fastest = None  # others are compared with it, or predicted from it
        best = fastest.tokens_per_second or 0.0 if fastest else 0.0
        most = self.space.batch * most_tokens_of(candidate.decoding)
        outputs = known.get("decode", {}).get("outputs")

        def store(name: str, findings: dict[str, Any]) -> None:
            spent = {"spent_seconds": time.monotonic() - began} if name == "result" else {}
            trial.set_user_attr(name, findings | spent)

        def slowed() -> float:
            return slowdown(self.runner, result.candidate(fastest), fastest.step_seconds) if fastest else 1.0

        return run_stages(decoding_stages(candidate, self.runner, best, most, outputs, slowed), store, known)

    def _claim(self, trial: optuna.Trial, key: str) -> tuple[TrialRecord | None, dict[str, dict[str, Any]]]:
        """Claim a setting. The trial that has measured it, if one has; the stages that a lost one had stored."""
        study = self.study.study_name
        holder = self.claims.take(study, key, trial.number)
        if holder == trial.number:
            return None, {}
        other = self.study.get_trials(deepcopy=False)[holder]
        if "result" in other.user_attrs:
            return read_trial(other, study), {}
        if other.state == TrialState.FAIL:
            known = {name: other.user_attrs[name] for name in DECODING_STAGES if name in other.user_attrs}
            for name, findings in known.items():  # before the claim: nothing is lost if this worker is lost too
                trial.set_user_attr(name, findings)
            if self.claims.take_over(study, key, holder, trial.number):
                return None, known
        trial.set_user_attr("taken_by", holder)
        raise _Dropped

    # --- the decision

    def decide(self, max_divergence: float, rounds: int, command: str) -> StudyResult:
        """Compare the fastest allowed setting with the default, unless that was done for these trials already."""
        result = self.result()
        base = result.find(self.default)
        assert base is not None  # `search` does not end before
        measured = len(result.measured)

        def decided() -> StudyResult | None:
            found = self.result()
            old = found.decision
            if old is None or (old.default_trial, old.max_divergence) != (base.number, max_divergence):
                return None
            enough = old.comparison is None or old.comparison.rounds >= rounds
            return found if enough and old.measured >= measured else None

        def act() -> None:
            best, comparison, remarks = self._challenge(result, base, max_divergence, rounds)
            decision = Decision(
                trial=best.number if comparison and comparison.low > 1 else base.number,
                default_trial=base.number,
                challenger=best.number,
                reason="; ".join([decision_words(result, base, best, comparison, max_divergence), *remarks]),
                comparison=comparison,
                max_divergence=max_divergence,
                measured=measured,
                command=command,
                date=_now(),
            )
            if decided() is None:  # nor on more settings, by one that had waited for their last
                self.study.set_user_attr("decision", plain(decision))

        return self._take_turns(f"decision {measured} {base.number} {max_divergence} {rounds}", decided, act)

    def _challenge(
        self, result: StudyResult, base: TrialRecord, max_divergence: float, rounds: int
    ) -> tuple[TrialRecord, Comparison | None, list[str]]:
        """The fastest allowed setting beside the default. One that fails now, though it ran before, is left out."""
        remarks: list[str] = []
        for best in result.challengers(base, max_divergence):
            try:
                return best, self._compare(result, base, best, rounds), remarks
            except StageFailure as failure:
                remarks.append(f"trial {best.number} was left out, it failed beside the default ({failure})")
            if len(remarks) == _FAILURES:
                raise UserError(f"no setting could be compared with the default; {remarks[-1]}")
        return base, None, remarks

    def _compare(self, result: StudyResult, base: TrialRecord, best: TrialRecord, rounds: int) -> Comparison:
        """Alternating rounds, each stored when it is done; those of an earlier comparison of the two count."""
        name = f"pairs:{best.number}:{base.number}"
        pairs = list(self.study.user_attrs.get(name, []))
        challenger = result.candidate(best)
        while len(pairs) < rounds:
            self.on_compare(len(pairs) / rounds)
            pairs.append(self._pair(challenger))
            self.study.set_user_attr(name, pairs)
        self.on_compare(1.0)
        return comparison_of(pairs)

    def _pair(self, challenger: Candidate, *, again: bool = True) -> tuple[float, float]:
        """One round. Once can be bad luck; StageFailure when it fails again: no setting to run."""
        try:
            return self.runner.pair(self.default, challenger)
        except (StageFailure, *DEVICE_ERRORS) as error:
            if again:
                return self._pair(challenger, again=False)
            if isinstance(error, StageFailure):
                raise
            raise StageFailure("runtime", f"{type(error).__name__}: {error}") from error

    def _take_turns(self, key: str, done: Callable[[], T | None], act: Callable[[], None]) -> T:
        """What is done once for all workers: one acts, the others wait for it, or take over if that one is lost.

        The turns are trials of a study beside this one, so that the storage knows by their heartbeat who is lost.
        """
        name = f"{self.study.study_name} turns"
        found = done()
        turns = None if found is not None else self._open(name)
        while found is None:
            assert turns is not None

            def turn(trial: optuna.Trial) -> tuple[float, float]:
                holder = self.claims.take(name, key, trial.number)
                if holder != trial.number:
                    gone = turns.get_trials(deepcopy=False)[holder].state != TrialState.RUNNING
                    if not gone or not self.claims.take_over(name, key, holder, trial.number):
                        raise _Dropped
                if done() is None:
                    act()
                return 0.0, 0.0

            with unless_given_up():
                turns.optimize(turn, n_trials=1, catch=(_Dropped,))
            found = done()
            while found is None and turns.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                self._wait(turns)
                found = done()
        return found


def _pass_seconds(trial: TrialRecord) -> float:
    """Of one pass over the prompts. A replay's take less than was recorded: never longer than the whole trial did."""
    recorded = statistics.median(trial.seconds)
    return recorded if trial.spent_seconds is None else min(recorded, trial.spent_seconds)


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
