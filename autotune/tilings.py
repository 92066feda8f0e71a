"""The search of a kernel's tilings at one token count: compile, rank by the model, check, time, decide.

Each finding is stored as soon as it exists, in the storage of the decoding studies, and by the same rules: the same
call goes on where an earlier one stopped, any number of workers may make it off SQLite, and none measures what another
has claimed. What runs on the device runs in a child process, so that a broken kernel costs one trial.
"""

from __future__ import annotations

import functools
import os
import socket
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from typing import Any, Protocol

import optuna
from optuna.trial import FrozenTrial, TrialState

from autotune.claims import Claims
from autotune.isolation import Child
from autotune.lost import fail_stale, retry_lost, unless_given_up
from autotune.objective import Stage, StageFailure, Unavailable, run_stages
from autotune.sole_worker import sole_worker
from autotune.storage import database_errors, open_storage, shown, single_worker
from autotune.tiling_results import TilingDecision, TilingResult, TilingSubject, TilingTrial, decision_of
from autotune.tiling_runner import (
    REGISTRY,
    Described,
    TilingWork,
    compiled_facts,
    odd_problems,
    prediction_of,
    subject_of,
)
from autotune.tiling_study import SUBJECT, dropped, place_of, read_tiling_study, read_tiling_trial, tiling_key
from hardware.files import UserError, plain
from hardware.profile import HardwareProfile
from runtime.config import require
from runtime.kernels.compiler import Compilers, Job, Program
from runtime.measurement import INTERVAL_ROUNDS

KEEP = 12
PAIRS = 20
CALL_SECONDS = 120.0  # of one check, with its compiling, or one timing
DESCRIBE_SECONDS = 600.0  # a model may be loaded, to record its routes
GRACE_SECONDS = 180.0  # to start a process that imports torch and triton
POLL_SECONDS = 0.5
_STAGES = ("compile", "numerics", "micro_benchmark")


class Caller(Protocol):
    """What `isolation.Child` is, or a stand-in."""

    def call(self, method: str, *args: Any, seconds: float | None = None) -> Any: ...

    def close(self) -> None: ...


Start = Callable[[TilingWork, float], Caller]


def isolated(work: TilingWork, seconds: float) -> Caller:
    """The runner in a child process."""
    return Child(work, seconds, GRACE_SECONDS)


def tune_tilings(
    url: str,
    work: TilingWork,
    subject: TilingSubject | None = None,
    *,
    hardware: HardwareProfile | None = None,
    keep: int = KEEP,
    seconds: float | None = None,
    rounds: int = PAIRS,
    call_seconds: float = CALL_SECONDS,
    command: str = "",
    worker: str = "",
    on_trial: Callable[[TilingTrial, int], None] | None = None,
    on_compile: Callable[[float], None] = lambda share: None,
    compilers: Compilers | None = None,
    start: Start = isolated,
) -> TilingResult:
    """Measure the default tiling and the `keep` that the model ranks first of those that compile, and decide.

    subject: what the times belong to, refused where the device's process says otherwise; None: what it says.
    hardware: to rank by; None: the kernel's own order. seconds: start no further tiling after so long (the default is
    measured in any case). rounds: pairs of the decision. compilers: shared by several searches; None: own ones.
    on_trial: called with each finished tiling and how many there are. UserError: a study of other kernels, sizes,
    routes, versions or device; what cannot run here at all.
    """
    require(keep >= 1, f"keep >= 1 must hold, but got {keep}")
    require(
        rounds >= INTERVAL_ROUNDS,
        f"rounds >= {INTERVAL_ROUNDS} must hold, but got {rounds}: fewer pairs have no interval of 95%",
    )
    end = float("inf") if seconds is None else time.monotonic() + seconds
    worker = worker or f"{socket.gethostname()}:{os.getpid()}"
    with (
        closing(start(work, call_seconds)) as child,
        sole_worker(url),
        database_errors(url),
        closing(Claims(url)) as claims,
    ):
        tuner = _Tuner(url, work, child, claims, subject, hardware, worker)
        with nullcontext(compilers) if compilers else Compilers() as used:
            tuner.compile(used, end, on_compile)
            tuner.compile_odd(used, keep, end)
        tuner.search(keep, end, on_trial)
        return tuner.decide(rounds, command)


class _Dropped(Exception):
    """The trial ends here: another worker has what it is about."""


class _Tuner:
    """One process that tunes the tilings of one bucket."""

    def __init__(
        self,
        url: str,
        work: TilingWork,
        child: Caller,
        claims: Claims,
        subject: TilingSubject | None,
        hardware: HardwareProfile | None,
        worker: str,
    ) -> None:
        self.work, self.child, self.claims, self.hardware, self.worker = work, child, claims, hardware, worker
        try:
            self.described: Described = child.call("describe", seconds=DESCRIBE_SECONDS)
        except StageFailure as failure:
            raise UserError(f"{work.kernel} cannot be tried here: {failure.reason}") from failure
        self.tilings = self.described.tilings
        found = subject_of(work, self.described)
        differs = subject.mismatch(found) if subject else None
        if differs:
            raise UserError(f"the tilings were to be tuned for {differs}")
        self.alone, self.storage = single_worker(url), open_storage(url, create=True)
        self.study = self._open(found.name)
        if SUBJECT not in self.study.user_attrs and not self.study.get_trials(deepcopy=False):
            self.study.set_user_attr("tilings", list(self.tilings))
            self.study.set_user_attr(SUBJECT, plain(found))
        place = f"study {found.name!r} in {shown(url)}"
        reason = read_tiling_study(self.study).subject.mismatch(found)
        if reason is not None:
            raise UserError(f"{place} was made with {reason}: tune into another place")
        if self.study.user_attrs["tilings"] != list(self.tilings):
            raise UserError(f"{place} was made with other tilings of {work.kernel}: tune into another place")

    def _open(self, name: str) -> optuna.Study:
        study = optuna.create_study(
            storage=self.storage,
            study_name=name,
            direction="minimize",
            load_if_exists=True,
            sampler=optuna.samplers.RandomSampler(seed=0),
        )
        retry_lost(study, running=self.alone)
        return study

    def result(self) -> TilingResult:
        """The search as it stands now."""
        return read_tiling_study(self.study)

    # --- compile and rank

    def compile(self, compilers: Compilers, end: float, progress: Callable[[float], None]) -> None:
        """Compile all tilings for the device, side by side, into the cache where Triton's JIT looks.

        Nothing is asked where the device is none of our targets, or the kernel none of ours: its first call compiles.
        """
        target, work = self._target(), self.work
        if target is None:
            return
        known = self._compiled()
        places = [place for place in range(len(self.tilings)) if place not in known]
        jobs = [Job(work.kernel, target, work.problem, work.dtype, self.tilings[place]) for place in places]
        for done, (index, compiled) in enumerate(compilers.compile(jobs), 1):
            self.study.set_user_attr(f"compiled:{places[index]}", compiled_facts(compiled))
            progress(done / len(jobs))
            if time.monotonic() >= end:
                break

    def _target(self) -> str | None:
        """What is compiled for; None where nothing can be."""
        return self.described.target if self.work.registry == REGISTRY else None

    def compile_odd(self, compilers: Compilers, keep: int, end: float) -> None:
        """Compile what the checks on odd problems will start: in the child, they would wait for one after the other."""
        target, work = self._target(), self.work
        if target is None:
            return
        compiled, tried = self._compiled(), [trial.tiling for trial in self.result().finished]
        tilings = [self.tilings[p] for p in self.order(keep) if compiled.get(p, {}).get("outcome") == "correct"]
        jobs = [
            Job(work.kernel, target, problem, work.dtype, tiling)
            for tiling in tilings
            if tiling not in tried
            for problem in odd_problems(work.problem)
        ]
        for _ in compilers.compile(jobs):  # the check itself tells what came of it
            if time.monotonic() >= end:
                break

    def _compiled(self) -> dict[int, dict[str, Any]]:
        """What came of compiling, by the tiling's place."""
        parts = (name.partition(":") + (value,) for name, value in self.study.user_attrs.items())
        return {int(place): found for kind, _, place, found in parts if kind == "compiled"}

    def prediction(self, place: int, compiled: Mapping[int, Mapping[str, Any]]) -> float | None:
        """Predicted seconds of a tiling."""
        programs = [Program(**program) for program in compiled.get(place, {}).get("programs", ())]
        return prediction_of(self.work, self.described, place, self.hardware, programs)

    def order(self, keep: int) -> list[int]:
        """Places of the tilings to try: the default, the first `keep` that compile, and those that do not, last."""
        compiled = self._compiled()
        usable = [p for p in range(len(self.tilings)) if compiled.get(p, {}).get("outcome", "correct") == "correct"]
        guess = {place: self.prediction(place, compiled) for place in usable}
        ranked = sorted(usable, key=lambda p: (guess[p] is None, guess[p] or 0.0, p))
        kept = [p for p in ranked if p != 0][:keep]
        return [0, *kept, *(p for p in range(1, len(self.tilings)) if p not in usable)]

    # --- the search

    def search(self, keep: int, end: float, on_trial: Callable[[TilingTrial, int], None] | None) -> None:
        """Until every tiling to try was tried or the time is over, and no other worker measures."""
        wanted = self.order(keep)
        while True:
            retry_lost(self.study, running=False)
            trials = self.study.get_trials(deepcopy=False)
            running = [t for t in trials if t.state == TrialState.RUNNING]
            tried = {place_of(t) for t in trials if t.state == TrialState.RUNNING or not dropped(t)}
            left = [place for place in wanted if place not in tried]
            waiting = any(t.state == TrialState.WAITING for t in trials)
            if (waiting or left) and (time.monotonic() < end or 0 not in tried):
                if not waiting:
                    how = {"tiling": self.tilings[left[0]]}
                    self.study.enqueue_trial({"place": left[0]}, {"queued": how})
                record = self._run_one()
                if on_trial and record is not None:
                    on_trial(record, len(self.result().finished))
            elif running:
                self._wait(self.study)
            else:
                return

    def _wait(self, study: optuna.Study) -> None:
        """For other workers. What those that are gone have left behind fails, and is queued again."""
        time.sleep(POLL_SECONDS)
        fail_stale(study)

    def _run_one(self) -> TilingTrial | None:
        """Run a queued tiling. None when it is another worker's."""
        ran: list[FrozenTrial] = []
        with unless_given_up():
            self.study.optimize(
                self._objective, n_trials=1, catch=(_Dropped,), callbacks=[lambda _, trial: ran.append(trial)]
            )
        if not ran:
            return None
        record = read_tiling_trial(ran[0], self.tilings, self.study.study_name)
        return record if record.outcome else None

    def _objective(self, trial: optuna.Trial) -> float:
        if "queued" not in trial.user_attrs:  # another worker was faster: what is sampled now is asked by nobody
            trial.set_user_attr("taken_by", -1)
            raise _Dropped
        place = trial.suggest_int("place", 0, len(self.tilings) - 1)
        trial.set_user_attr("begun", {"worker": self.worker})
        try:
            found = run_stages(self._stages(place), trial.set_user_attr, self._claim(trial, place))
        except (KeyboardInterrupt, Unavailable):
            trial.set_user_attr("interrupted", True)  # no bad luck: it is queued again however often
            raise
        if found["outcome"] != "correct":
            raise optuna.TrialPruned
        return statistics.median(found["seconds"])

    def _stages(self, place: int) -> dict[str, Stage]:
        tiling, compiled = self.tilings[place], self._compiled()

        def compiling() -> dict[str, Any]:
            found = {"predicted_seconds": self.prediction(place, compiled)}
            facts = compiled.get(place, {"outcome": "correct"})
            if facts["outcome"] != "correct":
                raise StageFailure(facts["outcome"], facts["reason"], found)
            return found

        return {
            "compile": compiling,
            "numerics": lambda: {"errors": self.child.call("check", tiling)},
            "micro_benchmark": lambda: {"seconds": list(self.child.call("time", tiling))},
        }

    def _claim(self, trial: optuna.Trial, place: int) -> dict[str, dict[str, Any]]:
        """Claim a tiling; the stages that a lost trial of it had stored."""
        name, key = self.study.study_name, tiling_key(self.tilings[place])
        holder = self.claims.take(name, key, trial.number)
        if holder == trial.number:
            return {}
        other = self.study.get_trials(deepcopy=False)[holder]
        if other.state == TrialState.FAIL and "result" not in other.user_attrs:
            known = {stage: other.user_attrs[stage] for stage in _STAGES if stage in other.user_attrs}
            for stage, findings in known.items():  # before the claim: nothing is lost if this worker is lost too
                trial.set_user_attr(stage, findings)
            if self.claims.take_over(name, key, holder, trial.number):
                return known
        trial.set_user_attr("taken_by", holder)
        raise _Dropped

    # --- the decision

    def decide(self, rounds: int, command: str) -> TilingResult:
        """Compare the fastest right tiling with the default in pairs, once for all workers.

        The turns are trials of a study beside this one, as in study.py: their heartbeat tells who is lost.
        """
        turns: optuna.Study | None = None
        while True:
            result = self.result()
            best = result.best
            if best is None or _is_decided(result, rounds):
                return result
            turns = turns or self._open(f"{self.study.study_name} turns")
            if not turns.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                key = f"{tiling_key(best.tiling)} {len(result.finished)} {rounds}"
                turn = functools.partial(self._turn, turns, key, result, rounds, command)
                with unless_given_up():
                    turns.optimize(turn, n_trials=1, catch=(_Dropped,))
            else:
                self._wait(turns)

    def _turn(
        self, turns: optuna.Study, key: str, result: TilingResult, rounds: int, command: str, trial: optuna.Trial
    ) -> float:
        holder = self.claims.take(turns.study_name, key, trial.number)
        if holder != trial.number:
            gone = turns.get_trials(deepcopy=False)[holder].state != TrialState.RUNNING
            if not gone or not self.claims.take_over(turns.study_name, key, holder, trial.number):
                raise _Dropped
        if not _is_decided(self.result(), rounds):  # by the one whose turn has just ended
            self.study.set_user_attr("decision", plain(self._decided(result, rounds, command)))
        return 0.0

    def _decided(self, result: TilingResult, rounds: int, command: str) -> TilingDecision:
        best, default = result.best, self.tilings[0]
        assert best is not None  # `decide` returns before
        base, pairs, broken = result.find(default), list[tuple[float, float]](), ""
        runs = base is not None and base.outcome == "correct"
        if best.tiling != default and runs:
            try:
                pairs = self._pairs(default, best.tiling, rounds)
            except StageFailure as failure:
                broken = f"the comparison with the default ended: {failure.reason}"
        elif not runs:
            why = f"{base.outcome}: {base.reason}" if base else "it was lost twice with its process"
            broken = f"the default tiling does not run here ({why})"
        return decision_of(default, best.tiling, pairs, runs, broken, len(result.finished), command)

    def _pairs(self, default: dict[str, int], tiling: dict[str, int], rounds: int) -> list[tuple[float, float]]:
        """Alternating rounds, each stored when it is done; those of an earlier comparison of the two count."""
        name = f"pairs:{tiling_key(tiling)}"
        pairs = [(a, b) for a, b in self.study.user_attrs.get(name, [])]
        while len(pairs) < rounds:
            pairs.append(self.child.call("pair", default, tiling))
            self.study.set_user_attr(name, pairs)
        return pairs


def _is_decided(result: TilingResult, rounds: int) -> bool:
    """Whether there is a decision on all that was tried, in that many rounds."""
    best, old = result.best, result.decision
    if best is None or old is None or (old.ratio is not None and old.rounds < rounds):
        return False
    return (old.challenger, old.measured) == (best.tiling, len(result.finished))
