"""Trials of the real runner, and of faulty ones, in child processes, through the real search."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from autotune.isolation import Child, Isolated
from autotune.local import Work, _opened
from autotune.space import Candidate, Parameter, Space, Value, default_candidate
from autotune.storage import storage_url
from autotune.study import tune
from runtime.config import DecodingConfig
from tests.faulty import FaultyRunner, Machine, WrongExperts
from tests.made_up import blind, subject, unsynced


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    with unsynced():
        yield


def space_of(batch: int = 1, *, modes: tuple[Value, ...] = ("gather",), drafts: int = 0) -> Space:
    """Autoregression in some modes, and two_forward with up to so many drafts."""
    samplers = ("autoregressive", "two_forward") if drafts else ("autoregressive",)
    parameters = [
        Parameter("sampler", "choice", "", samplers),
        Parameter("experts_single", "choice", "", modes, when=("sampler", "autoregressive")),
        Parameter("threads", "integer", "", low=1, high=1),
    ]
    if drafts:
        two = ("sampler", "two_forward")
        parameters += [
            Parameter("draft_tokens", "integer", "", low=1, high=drafts, when=two),
            Parameter("experts_block", "choice", "", modes[:1], when=two),
        ]
    return Space(batch, tuple(parameters))


def test_a_sweep_survives_every_fault(tmp_path: Path) -> None:
    """Each costs its own setting alone, with the right outcome; nothing is measured twice, and a decision is made."""
    space, log = space_of(drafts=9), tmp_path / "log"
    default = default_candidate(space, 1)
    child = Child(Machine(str(log)), seconds=5)
    runner = Isolated(child)
    common = {"default": default, "predict": blind, "rounds": 6, "sampler": "grid"}
    result = tune(storage_url(tmp_path), subject(space=space), runner, trials=10, **common)  # type: ignore[arg-type]
    runner.close()
    found = {
        t.params.get("draft_tokens", 0): (t.outcome, t.stage, t.reason) for t in result.measured if t.same_as is None
    }
    assert len(result.trials) == len(found) == 10
    at = FaultyRunner
    expected = dict.fromkeys((0, 1, 8, 9), ("correct", "quality")) | {
        at.CRASHES: ("runtime", "numerics"),
        at.HANGS: ("timeout", "micro_benchmark"),
        at.FILLS_MEMORY: ("runtime", "decode"),
        at.BREAKS_DEVICE: ("runtime", "decode"),
        at.CHANGES_TOKENS: ("incorrect", "quality"),
        at.DOES_NOT_COMPILE: ("compile", "numerics"),
    }
    assert {drafts: outcome[:2] for drafts, outcome in found.items()} == expected
    reasons = {drafts: outcome[2] for drafts, outcome in found.items()}
    assert "SIGSEGV" in reasons[at.CRASHES] and "longer than 5 s" in reasons[at.HANGS]
    assert "MemoryError" in reasons[at.FILLS_MEMORY] and "illegal memory access" in reasons[at.BREAKS_DEVICE]
    assert child.starts == 5  # after the crash, the hang, the full memory and the broken device
    calls = Counter(log.read_text().split("\n"))
    assert calls.pop(f"measure {at.BREAKS_DEVICE}") == 2  # of one call
    assert all(count == 1 for call, count in calls.items() if call.startswith("measure"))
    assert result.decision and result.trial(result.decision.trial).params["draft_tokens"] == 9
    again = Child(Machine(str(log)), seconds=5)  # the same call once more needs no device at all
    assert tune(storage_url(tmp_path), subject(space=space), Isolated(again), trials=10, **common) == result  # type: ignore[arg-type]
    assert again.starts == 0


def test_a_crash_in_the_comparison_is_not_the_end(tmp_path: Path) -> None:
    """A setting that fails twice beside the default is not chosen, however fast it was."""
    space = space_of(drafts=1)
    with Child(Machine(str(tmp_path / "log"), pair_crashes=2), seconds=30) as child:
        result = tune(
            storage_url(tmp_path),
            subject(space=space),
            Isolated(child),
            default=default_candidate(space, 1),
            predict=blind,
            trials=2,
            rounds=6,
            sampler="grid",
        )
    assert result.decision and result.decision.kept_default and "SIGKILL" in result.decision.reason
    assert len(result.allowed(0.0)) == 2 and result.allowed(0.0)[0].params["draft_tokens"] == 1


def test_what_is_wrong_at_odd_sizes_alone_is_found_out(tmp_path: Path) -> None:
    """The real runner on zaya-nano in a child: a mode that is always wrong, one that is wrong where no batch of the
    workload comes to, and the engine that tells its right numbers apart from those."""
    space = space_of(2, modes=("loop", "grouped", "dense", "gather"))
    work = Work("zaya-nano", 2, prompts=2, new_tokens=12, repeats=1, threads=1)
    runner, described = _opened(WrongExperts(work), 120.0, isolated=True)  # type: ignore[arg-type]
    try:
        assert described.workload.batch == 2 and described.identity.model == "zaya-nano"
        about = subject(batch=2, space=space, workload=described.workload, prompts=described.prompts)
        default = default_candidate(space, 1)
        result = tune(
            storage_url(tmp_path),
            about,
            runner,
            default=default,
            predict=blind,
            trials=4,
            rounds=6,
            sampler="grid",
        )
        assert isinstance(runner, Isolated) and runner._child.starts == 1
        candidate = Candidate(DecodingConfig(), replace(default.kernels, engine="graphs"))
        assert "on a GPU" in (runner.infeasible(candidate) or "")
    finally:
        runner.close()
    found = {t.params["experts_single"]: t for t in result.measured}
    assert {mode: t.outcome for mode, t in found.items() if t.stage == "numerics"} == {
        "grouped": "incorrect",
        "dense": "incorrect",
    }
    right = [found["loop"], found["gather"]]  # of which the second may be too slow to be measured in full
    assert {t.outcome for t in right} <= {"correct", "slower"} and found["loop"].outcome == "correct"
    assert all((t.logit_error or 0) < 1e-4 and t.step_seconds for t in right)
    assert (found["dense"].logit_error or 0) > 1e-3 < (found["grouped"].logit_error or 0)
    assert all(t.divergence == 0 and t.exact_match is not None for t in result.correct)
