"""The tuning part of benchmarks/gpu.sh without a GPU: which tilings run, what is decided, what a table is worth."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import benchmarks.gpu_tilings as searched
from autotune.objective import StageFailure
from autotune.tiling_results import FOREIGN_KERNEL, TilingResult, tile_table
from autotune.tiling_runner import Described, TilingWork
from benchmarks.gpu_session import FULL, RANDOM, SMALL, Session
from benchmarks.gpu_tilings import KEPT, PAIRS, key, tune_tilings
from benchmarks.gpu_tuning import compare_table, pairs_table, tilings_table
from hardware.profile import load_profile
from runtime.config import replace
from runtime.kernels.compiler import USABLE, Compiled, Compilers, Job, Program
from runtime.kernels.registry import kernel
from runtime.kernels.target import TARGETS

TARGET = TARGETS["sm_90"]


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session("cuda", tmp_path, time.monotonic() + 100, "pytest")


class MadeUp:
    """A process whose tilings' times are made up: the default takes 10 us; what is `asked` of it is kept.

    Of the 17-token bucket the default is the fastest; one bucket's process does not start.
    """

    asked: list[tuple[str, int, str, str]]

    def __init__(self, work: TilingWork, *_: float) -> None:
        self.work = work
        self.tilings = [dict(t) for t in kernel(work.kernel).tilings(TARGET, work.problem)]

    def __enter__(self) -> MadeUp:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def close(self) -> None:
        pass

    def call(self, method: str, *tilings: dict[str, int]) -> Any:
        self.asked.append((self.work.kernel, self.work.slots, method, key(tilings[-1]) if tilings else ""))
        if method == "describe":
            if (self.work.kernel, self.work.slots) == ("router", 17):
                raise StageFailure("runtime", "the process died")
            loads = ((1,) * self.work.problem.tokens + (0,),)
            grids = tuple((8, 512, 8, 512) for _ in self.tilings)
            return Described(
                {"device": "NVIDIA H200"}, "3.7", "sm_90", tuple(self.tilings), grids, 10**7, 10**8, "uniform", loads
            )
        place = self.tilings.index(tilings[-1])
        if method == "check":
            if place == 1:
                raise StageFailure("incorrect", "out differs", {"errors": {"output": 0.5}})
            return {"output": 1e-3}
        seconds = 1e-5 if place == 0 else 2e-5 if self.work.slots == 17 else (5 + 0.1 * place) * 1e-6
        return (1e-5, seconds) if method == "pair" else (seconds, seconds, seconds)


def compiled(_: Compilers, jobs: Iterable[Job]) -> Iterator[tuple[int, Compiled]]:
    """Everything compiles; what has five stages spills."""
    for place, job in enumerate(jobs):
        spills = job.tiling["num_stages"] == 5
        programs = tuple(Program("f", 64, 0, 8 * spills, 1024, {}) for _ in range(4))
        yield place, Compiled(job, programs, "spills 8 B per thread" if spills else USABLE)


@pytest.fixture
def results(session: Session, monkeypatch: pytest.MonkeyPatch) -> list[TilingResult]:
    """The tilings of batch 1, decoded and verified."""
    monkeypatch.setattr(MadeUp, "asked", [], raising=False)
    monkeypatch.setattr(searched, "Child", MadeUp)
    monkeypatch.setattr(searched, "device_profile", lambda session: load_profile("h200"))
    monkeypatch.setattr(Compilers, "compile", compiled)
    plan = replace(FULL, tuning=replace(FULL.tuning, batches=(1,)))
    return tune_tilings(session, plan, session.deadline)


def test_what_compiles_and_is_right_is_timed_and_the_fastest_is_decided_in_pairs(
    session: Session, results: list[TilingResult]
) -> None:
    assert [(r.subject.kernel, r.subject.tokens) for r in results] == [
        (name, tokens)
        for names in (("experts", "grouped_experts", "attention"), ("cca", "router"))
        for tokens in (1, 17)
        for name in names
        if (name, tokens) != ("router", 17)
    ]
    for result in results:
        tilings = [dict(t) for t in kernel(result.subject.kernel).tilings(TARGET, _problem(result))]
        ran = {key(t.tiling) for t in result.correct}
        assert key(tilings[0]) in ran and len(ran) <= KEPT + 1
        wrong = [t for t in result.trials if t.outcome == "incorrect"]
        assert all(t.tiling == tilings[1] and t.errors == {"output": 0.5} and not t.seconds for t in wrong)
        spilling = [t for t in result.trials if t.outcome == "infeasible"]
        assert all(t.stage == "compile" and t.tiling["num_stages"] == 5 for t in spilling)
        where = result.subject.kernel, result.subject.slots
        timed = {tiling for *whose, method, tiling in MadeUp.asked if (tuple(whose), method) == (where, "time")}
        assert timed == ran
        assert result.decision is not None and all(t.predicted_seconds for t in result.correct)
        assert result.decision.kept_default == (result.subject.slots == 17)
        if not result.decision.kept_default:
            assert result.decision.rounds == PAIRS and result.decision.tiling == result.correct[0].tiling
    assert any(t.outcome == "infeasible" for r in results for t in r.trials)
    assert session.lines("skipped")[0]["reason"] == "runtime: the process died"
    lines = {(one["kernel"], one["tokens"], key(one["tiling"])) for one in session.lines("tilings")}
    assert lines == {(r.subject.kernel, r.subject.tokens, key(t.tiling)) for r in results for t in r.trials}
    assert len(list(tilings_table(session))) == 2 + len(results)


def _problem(result: TilingResult) -> Any:
    subject = result.subject
    return TilingWork(subject.kernel, "m", FULL.model, batch=subject.batch, slots=subject.slots).problem


def test_the_table_holds_every_bucket_of_kernels_with_a_gain(results: list[TilingResult]) -> None:
    """Where the default stays it is written out, or a larger bucket's tiling would serve; nothing of other engines."""
    table = tile_table(results)
    assert FOREIGN_KERNEL not in table and set(table["experts"]) == {1, 17}
    [kept] = [r for r in results if (r.subject.kernel, r.subject.tokens) == ("experts", 17)]
    assert kept.decision is not None and table["experts"][17] == kept.decision.default
    assert tile_table([kept]) == {}


def test_without_time_nothing_is_decided(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searched, "Child", lambda *_: pytest.fail("a process was started"))
    monkeypatch.setattr(searched, "device_profile", lambda session: None)
    assert tune_tilings(session, FULL, time.monotonic() - 1) == []
    assert {line["reason"] for line in session.lines("skipped")} == {"out of time"}


def test_a_table_of_tilings_is_compared_in_whole_steps(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of random weights, and it says so; here by the CPU's engine, which has no tilings."""
    monkeypatch.setattr("benchmarks.gpu_tuning.PAIRS", 2)
    session.device = "cpu"
    table = {"experts": {5: {"BLOCK_M": 16}}}
    compare_table(session, SMALL, table, session.deadline)
    found = session.lines("pairs")
    assert [(one["batch"], one["setting"], one["rounds"]) for one in found] == [
        (1, "autoregressive", 2),
        (1, "two_forward", 2),
    ]
    assert all(one["low"] <= one["ratio"] <= one["high"] and one["simulated"] == RANDOM for one in found)
    assert len(list(pairs_table(session))) == 2 + len(found)
    compare_table(session, SMALL, table, time.monotonic() - 1)
    assert len(session.lines("pairs")) == len(found) and session.lines("skipped")[-1]["reason"] == "out of time"
