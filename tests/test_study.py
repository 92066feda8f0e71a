"""Laws of the search on the made-up machine: nothing is measured twice, lost, or called slower without a reason."""

from __future__ import annotations

import pickle
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest

from autotune.claims import Claims
from autotune.objective import DECODING_STAGES, Outputs, StageFailure, run_stages
from autotune.results import StudyResult
from autotune.seeding import Prediction, pilots
from autotune.space import Candidate, Parameter, Space, decoding_space, default_candidate
from autotune.storage import storage_url
from autotune.strategies import SAMPLERS
from hardware.files import UserError
from runtime.measurement import Measurement
from tests.made_up import MadeUp, blind, oracle, run, small_space, speed, subject, unsynced

SPACE = small_space()
STEPS = ("infeasible", "numerics", "micro_benchmark", "measure", "quality", "pair")


@pytest.fixture(autouse=True)
def fast() -> Iterator[None]:
    with unsynced():
        yield


def small(folder: Path, runner: MadeUp, **options: Any) -> StudyResult:
    return run(folder, runner, subject(space=SPACE), **options)


class Watched(MadeUp):
    """Calls `before` with each method's name and the setting it is about, and notes the calls that were answered."""

    def __init__(self, before: Callable[[str, str], None], space: Space = SPACE, **options: Any) -> None:
        super().__init__(noise=0.0, **options)
        self.before, self.answered = before, list[tuple[str, str]]()
        self.space, self.settings = space, space.grid()
        ask = self.infeasible
        self.infeasible = lambda c: self._watched("infeasible", c, lambda: ask(c))

    def _watched(self, name: str, candidate: Candidate, answer: Callable[[], Any]) -> Any:
        key = self.space.key(candidate)
        self.before(name, key)
        found = answer()
        self.answered.append((name, key))
        return found

    def numerics(self, candidate: Candidate) -> dict[str, float]:
        ask = super().numerics
        return self._watched("numerics", candidate, lambda: ask(candidate))  # type: ignore[no-any-return]

    def micro_benchmark(self, candidate: Candidate) -> float:
        ask = super().micro_benchmark
        return self._watched("micro_benchmark", candidate, lambda: ask(candidate))  # type: ignore[no-any-return]

    def measure(self, candidate: Candidate) -> tuple[Measurement, Outputs]:
        ask = super().measure
        record, _ = self._watched("measure", candidate, lambda: ask(candidate))
        return record, [[self.settings.index(candidate)]]  # so that `quality` knows what it judges

    def quality(self, outputs: Outputs) -> dict[str, float]:
        [[index]] = outputs
        answer = {"divergence": 0.0, "exact_match": 0.5}
        return self._watched("quality", self.settings[index], lambda: answer)  # type: ignore[no-any-return]

    def pair(self, default: Candidate, candidate: Candidate) -> tuple[float, float]:
        ask = super().pair
        return self._watched("pair", candidate, lambda: ask(default, candidate))  # type: ignore[no-any-return]


# --- once


def test_equal_settings_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A space of eight settings: the search repeats itself, stops by itself, and asks the machine eight times."""
    monkeypatch.setattr("autotune.study._REPEATS", 12)
    space, asked = decoding_space(batch=1, cores=2, drafts=False), list[Candidate]()
    result = run(tmp_path, MadeUp(fault=asked.append), subject(space=space), trials=1000, predict=blind)
    assert len(asked) == len({space.key(c) for c in asked}) == space.size() == 8
    assert len(result.measured) == 8 < len(result.trials)
    repeated = next(t for t in result.trials if t.same_as is not None)
    original = result.trial(repeated.same_as or 0)
    assert (repeated.params, repeated.tokens_per_second) == (original.params, original.tokens_per_second)
    assert result.decision and "nothing that drafts was tried" in result.decision.reason


def test_it_resumes_without_measuring_again(tmp_path: Path) -> None:
    first, second, third = MadeUp(), MadeUp(), MadeUp()
    before = small(tmp_path, first, trials=6)
    after = small(tmp_path, second, trials=12)
    assert (len(first.measured), len(before.measured), len(after.measured)) == (6, 6, 12)
    assert after.measured[:6] == before.measured
    assert not {SPACE.key(c) for c in first.measured} & {SPACE.key(c) for c in second.measured}
    assert small(tmp_path, third, trials=12) == after
    assert third.measured == third.compared == []


def test_an_interrupt_at_any_call_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C once at every call that the tuner makes of its runner, then the same command: as if there had been none.

    Each question is answered once, in a study that was interrupted at every one of them.
    """
    monkeypatch.setattr("autotune.strategies.SEEDS", 1)
    space = decoding_space(batch=1, cores=2, drafts=False)
    trials = len(pilots(space, default_candidate(space, 2))) + 1
    undisturbed = Watched(lambda *_: None, space)
    expected = run(tmp_path / "undisturbed", undisturbed, subject(space=space), trials=trials, rounds=6)
    due = Counter(undisturbed.answered)
    last: list[tuple[str, str]] = []

    def interrupt(name: str, key: str) -> None:
        if due[name, key] and last != [(name, key)]:
            due[name, key] -= 1
            last[:] = [(name, key)]
            raise KeyboardInterrupt
        last.clear()

    runner, interrupts, result = Watched(interrupt, space), 0, None
    while result is None:
        try:
            result = run(tmp_path / "disturbed", runner, subject(space=space), trials=trials, rounds=6)
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts == len(undisturbed.answered) == trials * 5 + 6 and not +due
    stored = Counter((n, k) for n, k in runner.answered if n != "infeasible")  # that one costs nothing
    assert stored == Counter((n, k) for n, k in undisturbed.answered if n != "infeasible")
    assert {n for n, _ in stored} == set(STEPS) - {"infeasible"}

    def found(study: StudyResult) -> set[tuple[object, ...]]:
        return {
            (t.source, str(t.params), t.outcome, t.tokens_per_second, t.step_seconds, t.divergence, t.logit_error)
            for t in study.measured
        }

    assert found(result) == found(expected) and len(result.measured) == trials
    assert result.decision and expected.decision and result.decision.comparison == expected.decision.comparison


def test_an_interrupt_while_a_setting_is_drawn_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial with some of its parameters is in nobody's way, be it queued or the search's own."""
    draw, due = Parameter.suggest, {"threads": [0, 6], "experts_block": [2, 12]}

    def suggest(self: Parameter, trial: Any) -> Any:
        if trial.number in due.get(self.name, []):
            raise KeyboardInterrupt
        return draw(self, trial)

    monkeypatch.setattr("autotune.strategies.SEEDS", 2)
    monkeypatch.setattr(Parameter, "suggest", suggest)
    interrupts, result = 0, None
    while result is None:
        try:
            result = small(tmp_path, MadeUp(), trials=10)
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts >= 3 and len(result.measured) == 10 and result.decision
    assert sum(not SPACE.complete(t.params) for t in result.trials) == interrupts


def test_an_interrupt_while_a_trials_end_is_stored_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Optuna raises a failure of its own there, which says nothing of Ctrl-C."""
    import optuna.study._optimize as optimize

    tell, calls, due = optimize._tell_with_warning, [0], [2, 5]

    def interrupted(**arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] in due:
            raise KeyboardInterrupt
        return tell(**arguments)

    monkeypatch.setattr("autotune.strategies.SEEDS", 2)
    monkeypatch.setattr(optimize, "_tell_with_warning", interrupted)
    interrupts, result = 0, None
    while result is None:
        try:
            result = small(tmp_path, MadeUp(), trials=8)
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts == len(due) and len(result.measured) == 8 and result.decision


def test_a_killed_process_costs_one_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial left running (SIGKILL) is run again, after the last stage that it had stored."""
    monkeypatch.setattr("autotune.strategies.SEEDS", 0)
    trials = len(pilots(SPACE, default_candidate(SPACE, 2)))
    before = small(tmp_path, MadeUp(), trials=trials)
    study = optuna.load_study(study_name="made-up batch=1", storage=storage_url(tmp_path))
    lost = next(c for c in SPACE.grid() if not before.find(c))
    study.enqueue_trial(SPACE.encode(lost))
    trial = study.ask()
    assert SPACE.suggest(trial) == lost
    asked = list[Candidate]()
    with closing(Claims(storage_url(tmp_path))) as claims:
        claims.take(study.study_name, SPACE.key(lost), trial.number)
    trial.set_user_attr("numerics", {"logit_error": 0.5})  # stored before the end came
    result = small(tmp_path, MadeUp(fault=asked.append), trials=trials + 2)
    again = result.find(lost)
    assert again and again.logit_error == 0.5 and again.number != trial.number and lost not in asked
    assert len(result.measured) == trials + 2
    assert study.trials[trial.number].state == optuna.trial.TrialState.FAIL


def test_what_is_lost_twice_is_given_up(tmp_path: Path) -> None:
    """A bug, or a process that is killed again at the same setting: it is not run a third time."""

    def fault(candidate: Candidate) -> None:
        if candidate == default_candidate(SPACE, 2):
            raise ZeroDivisionError

    runner = MadeUp(fault=fault)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            small(tmp_path, runner, trials=6)
    with pytest.raises(UserError, match="default setting was lost twice"):
        small(tmp_path, runner, trials=6)


# --- many workers


class Baton:
    """Threads of which one runs at a time: at each step the baton goes to one that is drawn."""

    def __init__(self, names: list[str], seed: int) -> None:
        self.alive, self.draw = list(names), random.Random(seed)
        self.turns = {name: threading.Semaphore(0) for name in names}
        self.turns[names[0]].release()

    def step(self) -> None:
        me = threading.current_thread().name
        following = self.draw.choice(self.alive)
        if following != me:
            self.turns[following].release()
            self.turns[me].acquire()

    def run(self, act: Callable[[], None]) -> None:
        me = threading.current_thread().name
        self.turns[me].acquire()
        try:
            act()
        finally:
            self.alive.remove(me)
            if self.alive:
                self.turns[self.draw.choice(self.alive)].release()


def test_workers_in_any_order_measure_each_setting_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three that take turns at every call and every wait. SQLite serves them here, as one is awake at a time."""
    import autotune.study as module

    small(tmp_path, MadeUp(), trials=1)  # makes the tables
    names = ["ann", "bob", "cleo"]
    baton = Baton(names, seed=0)
    monkeypatch.setattr(module, "sole_worker", lambda url: nullcontext())
    monkeypatch.setattr(module, "single_worker", lambda url: False)
    clock = SimpleNamespace(monotonic=module.time.monotonic, sleep=lambda seconds: baton.step())
    monkeypatch.setattr(module, "time", clock)
    runners = {name: Watched(lambda *_: baton.step()) for name in names}
    results: dict[str, StudyResult] = {}

    def work(name: str) -> None:
        results[name] = small(tmp_path, runners[name], trials=10, worker=name)

    threads = [threading.Thread(target=baton.run, args=(lambda n=name: work(n),), name=name) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert set(results) == set(names)
    answered = Counter(call for runner in runners.values() for call in runner.answered if call[0] != "pair")
    assert max(answered.values()) == 1
    last = results["ann"]
    assert len(last.measured) == 10
    assert {t.worker for t in last.measured[1:]} == set(names)
    assert all(t.params for t in last.measured)
    assert all(r.decision == last.decision for r in results.values())
    paired = [sum(name == "pair" for name, _ in runner.answered) for runner in runners.values()]
    assert last.decision and sorted(paired) == [0, 0, 8]


def test_a_trial_that_others_gave_up_is_theirs(tmp_path: Path) -> None:
    """A worker that was not heard of finds its trial failed: it goes on with another."""

    class Unheard(MadeUp):
        def micro_benchmark(self, candidate: Candidate) -> float:
            if len(self.measured) == 2:
                self.measured.append(candidate)
                study = optuna.load_study(study_name="made-up batch=1", storage=storage_url(tmp_path))
                [running] = study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
                study.tell(running.number, state=optuna.trial.TrialState.FAIL)
            return super().micro_benchmark(candidate)

    result = small(tmp_path, Unheard(), trials=6)
    assert len(result.measured) == 6 and result.decision
    assert sum(t.outcome is None for t in result.trials) >= 1


# --- stages


def test_every_stage_can_end_a_trial(tmp_path: Path) -> None:
    """By name, in any stage, and the search goes on; an error of the device is "runtime", a bug is raised."""
    faults: list[Exception] = [
        StageFailure("compile", "no such instruction"),
        StageFailure("timeout", "longer than 60 s"),
        OSError("no space for the kernel"),
        MemoryError(),
        UserError("no engine"),
    ]
    pending = iter(faults)

    def fault(candidate: Candidate) -> None:
        if candidate != default_candidate(SPACE, 2) and (error := next(pending, None)):
            raise error

    result = small(tmp_path, MadeUp(fault=fault), trials=8)
    failed = [t for t in result.measured if t.outcome != "correct"][:5]
    assert [t.outcome for t in failed] == ["compile", "timeout", "runtime", "runtime", "infeasible"]
    assert [t.reason for t in failed] == [
        "no such instruction",
        "longer than 60 s",
        "OSError: no space for the kernel",
        "MemoryError:",
        "no engine",
    ]
    assert all(t.stage == "numerics" and t.tokens_per_second is None for t in failed)
    with pytest.raises(ZeroDivisionError):
        small(tmp_path / "bug", MadeUp(gain=lambda *_: 1 / 0), trials=1)


@pytest.mark.parametrize("at", range(len(DECODING_STAGES)))
def test_stages_are_stored_one_by_one_and_go_on(at: int) -> None:
    """What a stage found before a failure is kept; what is known is not asked again."""
    stored: dict[str, dict[str, Any]] = {}
    asked: list[str] = []

    def stage(name: str, number: int) -> dict[str, Any]:
        asked.append(name)
        if number == at:
            raise StageFailure("incorrect", "too far", {f"{name}_error": 1.0})
        return {name: number}

    stages = {name: lambda name=name, n=n: stage(name, n) for n, name in enumerate(DECODING_STAGES)}
    found = run_stages(stages, stored.__setitem__)
    last = DECODING_STAGES[at]
    assert asked == list(DECODING_STAGES[: at + 1]) == [n for n in stored if n != "result"]
    assert stored["result"] == {"outcome": "incorrect", "stage": last, "reason": "too far"}
    assert list(stored)[-1] == "result" and found[f"{last}_error"] == 1.0
    known = {name: stored[name] for name in DECODING_STAGES[:at]}
    asked.clear()
    assert run_stages(stages, lambda *_: None, known) == found and asked == [last]


def test_an_error_that_is_no_number_is_kept_in_words() -> None:
    """NaN is no JSON: a wrong kernel's would make the whole study's unreadable to strict readers."""
    stored: dict[str, dict[str, Any]] = {}

    def numerics() -> dict[str, Any]:
        raise StageFailure("incorrect", "logits are nan", {"logit_error": float("nan"), "rerouted": 0.5})

    run_stages({"numerics": numerics}, stored.__setitem__)
    assert stored["numerics"] == {"rerouted": 0.5} and stored["result"]["reason"] == "logits are nan"


def test_a_failure_can_be_sent_between_processes() -> None:
    sent = pickle.loads(pickle.dumps(StageFailure("timeout", "longer than 1 s", {"step_seconds": 2.0})))
    assert (sent.outcome, sent.reason, sent.findings) == ("timeout", "longer than 1 s", {"step_seconds": 2.0})


def test_only_what_is_dominated_is_called_slower(tmp_path: Path) -> None:
    """Drawn settings, lossless and not: each that ends as slower is slower than a lossless one that was known."""
    space = small_space(lossless=False)
    runner = MadeUp()
    result = run(tmp_path, runner, subject(space=space), trials=40, sampler="random", predict=blind)
    slower = [t for t in result.measured if t.outcome == "slower"]
    assert len(slower) >= 3 and {t.stage for t in slower} == {"micro_benchmark"}
    for trial in slower:
        assert trial.step_seconds and trial.tokens_per_second is None and "lossless" in trial.reason
        fastest = max(speed(result.candidate(t)) for t in result.correct if t.lossless and t.number < trial.number)
        assert speed(result.candidate(trial)) < fastest
    assert not {space.key(result.candidate(t)) for t in slower} & {space.key(c) for c in runner.measured}
    assert result.decision and result.trial(result.decision.trial).lossless


def test_a_busy_machine_calls_nothing_slower(tmp_path: Path) -> None:
    """From the fourth setting on everything takes ten times as long: what is slow then is the machine."""

    class Busy(MadeUp):
        def sample(self, candidate: Candidate) -> float:
            return super().sample(candidate) / (10 if len(self.measured) > 3 else 1)

    about = subject(space=small_space(lossless=False))
    result = run(tmp_path, Busy(noise=0.0), about, trials=30, sampler="random", predict=blind)
    slower = [t for t in result.measured if t.outcome == "slower"]
    assert slower
    for trial in slower:
        known = [speed(result.candidate(t)) for t in result.correct if t.lossless and t.number < trial.number]
        assert speed(result.candidate(trial)) < max(known)


# --- strategies


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_strategy_tries_the_default_first_and_nothing_twice(
    sampler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autotune.strategies.SEEDS", 2)
    runner = MadeUp()
    result = small(tmp_path, runner, trials=9, sampler=sampler, predict=oracle)
    keys = [SPACE.key(result.candidate(t)) for t in result.measured]
    assert len(keys) == len(set(keys)) == 9
    assert result.trials[0].source == "default"
    sources = {t.source for t in result.measured}
    assert sources == (
        {"default", "pilot", "seed", "guided", "search"} if sampler == "seeded" else {"default", "search"}
    )


def test_an_unknown_strategy_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown search strategy 'luck'; known: grid, random, seeded, tpe"):
        small(tmp_path, MadeUp(), sampler="luck")


# --- the decision in words


@pytest.mark.parametrize(
    ("gain", "words", "kept"),
    [
        (lambda c, b: 100.0 + 50 * c.decoding.drafts, "faster than the default in alternating rounds", False),
        (
            lambda c, b: 100.0 - 50 * c.decoding.drafts,
            "the difference from the default is inside the noise; autoregressive decoding is best here",
            True,
        ),
        (
            lambda c, b: 100.0 - 50 * c.decoding.drafts + 20 * (c.kernels.threads == 1),
            "faster than the default in alternating rounds; autoregressive decoding is best here",
            False,
        ),
    ],
    ids=["drafting", "default", "single"],
)
def test_a_decision_says_what_it_prefers(gain: Any, words: str, kept: bool, tmp_path: Path) -> None:
    def predict(candidate: Candidate, _: object) -> Prediction:
        return Prediction(gain(candidate, 1), 1.0, 1.0)

    result = small(tmp_path, MadeUp(gain=gain, noise=0.0), trials=6, predict=predict)
    assert result.decision and (result.decision.reason, result.decision.kept_default) == (words, kept)


class Moody(MadeUp):
    """Its default measured faster than all others, by luck; beside it, what drafts has `ratios` of its speed."""

    def __init__(self, ratios: list[float]) -> None:
        super().__init__(noise=0.0, gain=lambda c, b: 100.0 - 20 * (c != default_candidate(SPACE, 2)))
        self.ratios = ratios

    def pair(self, default: Candidate, candidate: Candidate) -> tuple[float, float]:
        self.compared.append(candidate)
        return 80.0, 80.0 * self.ratios[len(self.compared) % len(self.ratios)]


@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        ([1.3], "faster than the default in alternating rounds"),
        ([0.8, 1.5, 1.6], "the gain over the default is inside the noise; autoregressive decoding is kept"),
        ([0.9, 0.8, 1.1], "the difference from the default is inside the noise; autoregressive decoding is kept"),
        ([0.9, 0.8], "slower than the default in alternating rounds; autoregressive decoding is kept"),
    ],
)
def test_a_lucky_default_decides_nothing(ratios: list[float], words: str, tmp_path: Path) -> None:
    """What measured a little slower than it is compared all the same, and nothing is called best inside the noise."""
    result = small(
        tmp_path, Moody(ratios), trials=6, predict=lambda c, _: Prediction(1.0 + c.decoding.drafts, 1.0, 1.0)
    )
    assert result.decision and result.decision.reason == words
    assert result.decision.comparison and result.decision.comparison.rounds == 8


class Flaky(MadeUp):
    """It fails beside the default, though every trial ran: always, or only the setting that is the fastest."""

    def __init__(self, broken: Callable[[Candidate], bool]) -> None:
        super().__init__(noise=0.0)
        self.broken = broken

    def pair(self, default: Candidate, candidate: Candidate) -> tuple[float, float]:
        if self.broken(candidate):
            raise (
                RuntimeError("CUDA error: an illegal memory access")
                if candidate.kernels.threads == 1
                else StageFailure("timeout", "pair took longer than 60 s")
            )
        return super().pair(default, candidate)


def test_a_setting_that_fails_beside_the_default_is_left_out(tmp_path: Path) -> None:
    """The next one is taken, and the decision says why; when nothing can be compared, that is said."""
    first = small(tmp_path / "good", MadeUp(noise=0.0), trials=8)
    assert first.decision
    fastest = first.candidate(first.trial(first.decision.challenger))
    result = small(tmp_path / "flaky", Flaky(lambda c: c == fastest), trials=8)
    assert result.decision and result.decision.challenger != first.decision.challenger
    assert not result.decision.kept_default
    assert f"trial {first.decision.challenger} was left out" in result.decision.reason
    again = MadeUp()
    assert small(tmp_path / "flaky", again, trials=8) == result and again.compared == []
    with pytest.raises(UserError, match="no setting could be compared with the default; trial"):
        small(tmp_path / "broken", Flaky(lambda c: True), trials=8)
