"""The search of tilings: every fault has its outcome, nothing measured is lost, and noise decides nothing."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from autotune.objective import StageFailure
from autotune.storage import open_storage, read_studies
from autotune.tiling_results import TilingResult, decision_of
from autotune.tiling_runner import (
    Bucket,
    Described,
    TilingRunner,
    TilingWork,
    buckets,
    compiled_facts,
    odd_problems,
    works_of,
)
from autotune.tiling_study import read_tilings
from autotune.tilings import tune_tilings
from hardware.files import UserError
from hardware.profile import load_profile
from runtime.config import DecodingConfig
from runtime.kernels.compiler import USABLE, Compiled, Compilers, Job, Program
from runtime.kernels.problem import ODD, Problem
from tests import faulty_kernels as made_up
from tests.made_up import unsynced

ROUNDS = 6
WORK = TilingWork(
    "every", "tiny", ODD, "float32", "cpu", 2, 4, 16, rounds=3, registry="tests.faulty_kernels:KERNELS"
)  # fmt: skip


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage without a study: making its tables takes longer than most tests."""
    path = tmp_path_factory.mktemp("storage") / "study.db"
    open_storage(f"sqlite:///{path}", create=True).remove_session()
    return path


@pytest.fixture
def url(empty: Path, tmp_path: Path) -> Iterator[str]:
    shutil.copy(empty, tmp_path)
    with unsynced():
        yield f"sqlite:///{tmp_path / 'study.db'}"


def test_every_fault_ends_one_trial_with_its_name(url: str) -> None:
    """Through the real child process, which a crash and a hang end; and the sweep finds the tiling that is faster."""
    result = tune_tilings(url, WORK, rounds=ROUNDS, call_seconds=4)
    found = {trial.tiling["FAULT"]: trial for trial in result.trials}
    assert {fault: trial.outcome for fault, trial in found.items()} == {
        made_up.SLOW: "correct",
        made_up.FAST: "correct",
        made_up.WRONG: "incorrect",
        made_up.ODD: "incorrect",
        made_up.COMPILE: "compile",
        made_up.UNFIT: "infeasible",
        made_up.CRASH: "runtime",
        made_up.HANG: "timeout",
    }
    assert "causal 1 x 1" in found[made_up.ODD].reason  # right at the bucket's own size
    assert found[made_up.WRONG].errors["y"] == pytest.approx(0.05)
    assert "SIGABRT" in found[made_up.CRASH].reason
    assert len(found[made_up.SLOW].seconds) == WORK.rounds
    assert result.best is not None and result.best.tiling == {"FAULT": made_up.FAST}
    decision = result.decision
    assert decision is not None and not decision.kept_default and decision.rounds == ROUNDS
    assert decision.tiling == {"FAULT": made_up.FAST} and decision.low is not None and decision.low > 1


class Device:
    """A device whose times are written down, in place of a child process; it may be interrupted at a call."""

    def __init__(self, seconds: list[float], noise: tuple[float, ...] = (1.0,), **described: Any) -> None:
        self.seconds, self.noise, self.calls = seconds, noise, list[tuple[str, int]]()
        self.failing: dict[tuple[str, int], Exception] = {}
        self.interrupt: tuple[str, int] | None = None
        tilings = tuple({"PLACE": place} for place in range(len(seconds)))
        facts: dict[str, Any] = {
            "device": {"device": "made up"},
            "triton": None,
            "target": None,
            "tilings": tilings,
            "grids": (),
            "moved_bytes": 1000,
            "flops": 1000,
            "routing": "",
        }
        self.described = Described(**{**facts, **described})

    def start(self, work: TilingWork, seconds: float) -> Device:
        return self

    def call(self, method: str, *args: Any, seconds: float | None = None) -> Any:
        if method == "describe":
            return self.described
        place = args[-1]["PLACE"]
        if self.interrupt == (method, place):
            self.interrupt = None
            raise KeyboardInterrupt
        self.calls.append((method, place))
        if (method, place) in self.failing:
            raise self.failing[method, place]
        if method == "check":
            return {"y": 1e-7}
        if method == "time":
            return (self.seconds[place],) * 3
        turn = sum(name == "pair" for name, _ in self.calls)
        return self.seconds[0] * self.noise[turn % len(self.noise)], self.seconds[place]

    def close(self) -> None:
        pass


def tune(url: str, device: Device, **settings: Any) -> TilingResult:
    return tune_tilings(url, WORK, start=device.start, **{"rounds": ROUNDS, **settings})


@pytest.mark.parametrize("at", [("check", 1), ("time", 0), ("pair", 2)])
def test_an_interrupted_search_goes_on_where_it_was(at: tuple[str, int], url: str) -> None:
    device = Device([3.0, 2.0, 1.0])
    device.interrupt = at
    with pytest.raises(KeyboardInterrupt):
        tune(url, device)
    before = read_tilings(url)[0]
    result = tune(url, device)
    counts = Counter(device.calls)
    assert all(counts[method, place] == 1 for method in ("check", "time") for place in range(3))
    assert counts["pair", 2] == ROUNDS
    assert [t for t in result.trials if t.number in {b.number for b in before.finished}] == list(before.finished)
    assert len(result.finished) == 3 and result.decision is not None and result.decision.tiling == {"PLACE": 2}


def test_pairs_that_were_measured_are_not_measured_again(url: str) -> None:
    device = Device([3.0, 1.0])
    device.failing["pair", 1] = KeyboardInterrupt()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        tune(url, device)
    device.failing.clear()
    device.calls.clear()
    tune(url, device, rounds=6)
    assert Counter(device.calls) == {("pair", 1): 6}
    tune(url, device, rounds=8)
    assert Counter(device.calls) == {("pair", 1): 8}
    assert tune(url, device, rounds=6) == read_tilings(url)[0] and len(device.calls) == 8


def test_more_tilings_are_measured_by_a_later_call(url: str) -> None:
    device = Device([3.0, 2.0, 1.0, 4.0])
    first = tune(url, device, keep=1)
    assert [t.tiling["PLACE"] for t in first.trials] == [0, 1] and first.untried == 2
    second = tune(url, device, keep=3)
    assert [t.tiling["PLACE"] for t in second.trials] == [0, 1, 2, 3] and second.untried == 0
    assert second.decision is not None and second.decision.tiling == {"PLACE": 2}
    assert max(Counter(call for call in device.calls if call[0] != "pair").values()) == 1


def test_without_time_the_default_is_measured_all_the_same(url: str) -> None:
    result = tune(url, Device([3.0, 2.0]), seconds=0.0)
    assert [t.tiling["PLACE"] for t in result.trials] == [0]
    assert result.decision is not None and result.decision.kept_default and result.decision.ratio is None


def test_a_default_that_does_not_run_is_replaced(url: str) -> None:
    device = Device([1.0, 2.0, 3.0])
    device.failing["check", 0] = StageFailure("infeasible", "does not fit")
    decision = tune(url, device).decision
    assert decision is not None and decision.tiling == {"PLACE": 1} and decision.ratio is None
    assert not decision.kept_default and "does not run here (infeasible: does not fit)" in decision.reason


def test_nothing_is_decided_where_nothing_is_right(url: str) -> None:
    device = Device([1.0, 2.0])
    device.failing |= {("check", place): StageFailure("incorrect", "wrong", {"errors": {"y": 1.0}}) for place in (0, 1)}
    result = tune(url, device)
    assert result.decision is None and result.best is None and [t.errors for t in result.trials] == [{"y": 1.0}] * 2


def test_a_comparison_that_breaks_keeps_the_default(url: str) -> None:
    device = Device([2.0, 1.0])
    device.failing["pair", 1] = StageFailure("runtime", "the process died")
    decision = tune(url, device).decision
    assert decision is not None and decision.kept_default and "the process died" in decision.reason


def test_a_gain_inside_the_noise_keeps_the_default(url: str) -> None:
    decision = tune(url, Device([1.01, 1.0], noise=(1.0, 0.9))).decision
    assert decision is not None and decision.kept_default and decision.tiling == {"PLACE": 0}
    assert decision.low is not None and decision.high is not None and decision.low < 1 < decision.high
    assert decision.reason == "the gain over the default is inside the noise"


def test_the_interval_decides_and_not_the_median() -> None:
    default, best = {"PLACE": 0}, {"PLACE": 1}
    pairs = [(1.2, 1.0)] * 5 + [(0.9, 1.0)]
    unsure = decision_of(default, best, pairs, True, "", 2, "")
    sure = decision_of(default, best, [(1.2, 1.0)] * 5 + [(1.1, 1.0)], True, "", 2, "")
    assert unsure.ratio == sure.ratio == pytest.approx(1.2)
    assert unsure.tiling == default and sure.tiling == best


def test_a_study_of_something_else_is_refused(url: str) -> None:
    tune(url, Device([2.0, 1.0]))
    for changes, message in (
        ({"device": {"device": "another"}}, "made with device made up, not another"),
        ({"routing": "uniform"}, "made with routing '', not 'uniform'"),
        ({"triton": "3.6.0"}, "made with triton None, not '3.6.0'"),
    ):
        with pytest.raises(UserError, match=message):
            tune(url, Device([2.0, 1.0], **changes))
    with pytest.raises(UserError, match="made with other tilings of every"):
        tune(url, Device([2.0, 1.0, 3.0]))
    with pytest.raises(UserError, match="rounds >= 6 must hold, but got 5"):
        tune(url, Device([2.0, 1.0]), rounds=5)


def test_studies_of_decoding_and_of_tilings_stand_side_by_side(url: str) -> None:
    tune(url, Device([2.0, 1.0]))
    assert [result.name for result in read_tilings(url)] == ["tiny every tokens=8 float32"]
    with pytest.raises(UserError, match="holds no study"):
        read_studies(url)


def test_what_cannot_be_tried_at_all_is_one_line(url: str) -> None:
    class Broken(Device):
        def call(self, method: str, *args: Any, seconds: float | None = None) -> Any:
            raise StageFailure("runtime", "the process died")

    with pytest.raises(UserError, match="every cannot be tried here: the process died"):
        tune(url, Broken([1.0]))


PROGRAM = {
    "function": "f",
    "registers": 64,
    "accumulators": 0,
    "spilled_bytes": 0,
    "shared_bytes": 1024,
    "matrix_instructions": {},
}


def test_the_model_ranks_and_what_does_not_compile_is_recorded(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled facts as `compile` stores them; the last of three usable tilings needs the fewest waves of blocks."""
    device = Device([3.0, 2.0, 1.0, 1.5], grids=((4000,), (2000,), (1000,), (10,)), moved_bytes=int(1e8))
    facts = {
        place: {"outcome": "correct", "reason": "", "programs": [{**PROGRAM, "registers": 255 - 100 * place}]}
        for place in range(3)
    }
    facts[3] = {"outcome": "compile", "reason": "spilled", "programs": []}
    monkeypatch.setattr("autotune.tilings._Tuner._compiled", lambda self: facts)
    result = tune(url, device, hardware=load_profile("h200"), keep=1)
    assert [(t.tiling["PLACE"], t.outcome) for t in result.trials] == [(0, "correct"), (2, "correct"), (3, "compile")]
    guesses = [t.predicted_seconds for t in result.trials]
    assert guesses[0] and guesses[1] and guesses[0] > guesses[1]
    assert result.trials[2].reason == "spilled" and ("check", 3) not in device.calls


def test_tilings_are_compiled_for_the_device_before_any_runs(url: str) -> None:
    """One real compilation, for sm_90."""
    tilings = ({"BLOCK": 128, "num_warps": 1, "num_stages": 1},)
    device = Device([1.0], target="sm_90", triton="any", tilings=tilings, grids=((8,),))
    work = TilingWork("embed", "tiny", ODD, "float32", "cuda", context=16)
    device.call = lambda method, *args, seconds=None: {  # type: ignore[method-assign]
        "describe": device.described, "check": {"y": 0.0}, "time": (1.0,)
    }[method]  # fmt: skip
    shares: list[float] = []
    settings: dict[str, Any] = {"hardware": load_profile("h200"), "start": device.start, "on_compile": shares.append}
    with Compilers(workers=1) as compilers:
        result = tune_tilings(url, work, rounds=ROUNDS, compilers=compilers, **settings)
    assert shares == [1.0] and [t.outcome for t in result.trials] == ["correct"]
    assert result.trials[0].predicted_seconds is not None
    tune_tilings(url, work, rounds=ROUNDS, **settings)
    assert shares == [1.0]  # what was compiled is known


@pytest.mark.parametrize(
    ("programs", "outcome", "found"),
    [
        ((PROGRAM,), USABLE, "correct"),
        (({**PROGRAM, "spilled_bytes": 8},), "spills 8 B per thread", "infeasible"),
        (({**PROGRAM, "shared_bytes": 300_000},), "needs 300000 B of shared memory, sm_90 has 232448", "infeasible"),
        ((PROGRAM,), "the compiler took more than 120 s", "compile"),
        ((), "CompilationError: at 1:2", "compile"),
    ],
)
def test_what_compiles_but_does_not_fit_is_infeasible(
    programs: tuple[dict[str, Any], ...], outcome: str, found: str
) -> None:
    job = Job("embed", "sm_90", Problem(ODD), "bfloat16", {})
    facts = compiled_facts(Compiled(job, tuple(Program(**program) for program in programs), outcome))
    assert facts["outcome"] == found and facts["reason"] == ("" if found == "correct" else outcome)
    assert [Program(**program) for program in facts["programs"]] == [Program(**program) for program in programs]


def test_buckets_are_what_samplers_send() -> None:
    single = DecodingConfig("single_forward", 4, proposal_levels=(0, 2))
    sent = buckets((1, 16), [DecodingConfig(), DecodingConfig("two_forward", 16), single])
    assert sent == [(1, 1), (1, 15), (16, 1), (1, 17), (16, 15), (16, 17)]
    assert buckets((17, 1), [DecodingConfig(), DecodingConfig("two_forward", 16)])[1] == Bucket(1, 17)
    works = works_of(["experts"], "tiny", ODD, sent, [single], routing="uniform")
    assert [w.decoding for w in works] == [single if w.slots == 15 else None for w in works]


@pytest.mark.parametrize("shape", [(1, 1), (1, 17), (2, 1), (16, 17), (128, 1)])
def test_odd_problems_are_of_the_same_model_and_other_sizes(shape: tuple[int, int]) -> None:
    problem = Problem(ODD, *shape, 64)
    others = odd_problems(problem)
    assert problem not in others and all(p.config == ODD for p in others)
    assert any(p.tokens % 2 for p in others) and any(p.tokens > problem.tokens for p in others)
    assert shape == (1, 1) or any(p.tokens < problem.tokens for p in others)
    assert all(p.tokens <= problem.tokens + 1 and p.context <= problem.context for p in others)


def runner(kernel: str, **changes: Any) -> TilingRunner:
    settings = {"batch": 2, "slots": 4, "rounds": 3, "registry": "tests.faulty_kernels:KERNELS", **changes}
    return TilingRunner(TilingWork(kernel, "tiny", ODD, "float32", "cpu", **settings))


def test_routes_are_never_uniform_unless_that_is_said() -> None:
    with pytest.raises(UserError, match="routing must be said for routed"):
        runner("routed").describe()
    described = runner("routed", routing="uniform").describe()
    assert described.routing == "uniform" and all(sum(row) == 8 for row in described.loads)
    assert runner("pair", routing="uniform").describe().routing == ""


def test_pairs_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second round runs the default last, and each result still stands at its own place."""
    order: list[int] = []

    def ran(x: Any, *, tiling: Any) -> Any:
        order.append(tiling["FAULT"])
        return x * 2

    slow, fast = {"FAULT": made_up.SLOW}, {"FAULT": made_up.FAST}
    found = runner("pair")
    wrapped: Callable[..., Any] = ran
    monkeypatch.setattr(made_up.MadeUp, "triton", lambda self: wrapped)
    found.pair(slow, fast)
    order.clear()
    found.pair(slow, fast)
    found.pair(slow, fast)
    assert order == [made_up.FAST, made_up.SLOW, made_up.SLOW, made_up.FAST]


def test_an_error_of_the_device_reaches_the_process_that_judges_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an exception with its text, by which `isolation` knows that the process is spoilt; no outcome hides it."""

    def broken(x: Any, *, tiling: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(made_up.MadeUp, "triton", lambda self: broken)
    with pytest.raises(RuntimeError, match="CUDA error: an illegal memory access"):
        runner("pair").check({"FAULT": made_up.FAST})


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(UserError, match="unknown kernel 'scale'; known: every, pair, routed"):
        runner("scale")
    with pytest.raises(UserError, match="rounds >= 1 must hold, but got 0"):
        runner("pair", rounds=0)
