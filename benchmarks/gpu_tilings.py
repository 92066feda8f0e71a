"""Tilings of `benchmarks.gpu`: ranked by the model, compiled, checked, timed, and compared with the default in pairs.

What `ridgepoint tune --what tilings` does, with the same runners in processes of their own, but without a search
library: a device machine has none. Compiling and checking go on side by side, timing one by one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from autotune.isolation import Child
from autotune.objective import StageFailure, run_stages
from autotune.tiling_results import TilingDecision, TilingResult, TilingTrial, decision_of
from autotune.tiling_runner import (
    Described,
    TilingWork,
    buckets,
    compiled_facts,
    odd_problems,
    prediction_of,
    subject_of,
    works_of,
)
from autotune.tuning import STEP_KERNELS
from benchmarks.gpu_parts import device_profile
from benchmarks.gpu_session import Plan, Session
from hardware.files import UserError, plain, write_atomic
from hardware.profile import HardwareProfile
from runtime.config import DecodingConfig
from runtime.kernels.compiler import Compilers, Job, Program

ROUTING = "uniform"  # nothing has recorded routes of the full size
TOGETHER = 9  # searches whose processes hold memory of the device at once
KEPT = 8  # tilings of a search that are run, the default besides
PAIRS = 8
CALL_SECONDS, START_SECONDS = 60.0, 120.0


@dataclass
class Search:
    """One kernel at one bucket: its process, what is known of it, the tilings that will run (the default first)."""

    work: TilingWork
    child: Child
    described: Described
    kept: list[dict[str, int]]
    predicted: dict[str, float | None] = field(default_factory=dict)  # by `key`
    trials: list[TilingTrial] = field(default_factory=list)

    @property
    def default(self) -> dict[str, int]:
        """What runs untuned."""
        return self.described.tilings[0]

    @property
    def finished(self) -> tuple[TilingTrial, ...]:
        """Trials that went through all stages or ended in one; not those that the deadline stopped between two."""
        return tuple(t for t in self.trials if t.seconds or t.outcome != "correct")


def key(tiling: dict[str, int]) -> str:
    """A name that equal tilings share."""
    return json.dumps(tiling, sort_keys=True)


def wanted(session: Session, plan: Plan) -> list[TilingWork]:
    """The forwards of autoregressive and two_forward decoding at each batch; the dearest kernels of all come first."""
    decodings = [DecodingConfig(), DecodingConfig("two_forward", plan.drafts)]
    found = works_of(
        STEP_KERNELS,
        plan.name,
        plan.model,
        buckets(plan.tuning.batches, decodings),
        dtype=plan.dtype,
        device=session.device,
        context=plan.context,
        routing=ROUTING,
    )
    return sorted(found, key=lambda work: STEP_KERNELS.index(work.kernel) > STEP_KERNELS.index("attention"))


def tune_tilings(session: Session, plan: Plan, deadline: float) -> list[TilingResult]:
    """Search the tilings of every kernel at every bucket until the deadline; every trial and decision is kept."""
    if not session.device.startswith("cuda"):
        session.skip("tilings", f"kernels are timed on a GPU, not on {session.device}")
        return []
    works, hardware, found = wanted(session, plan), device_profile(session), list[TilingResult]()
    with Compilers() as compilers:
        for begin in range(0, len(works), TOGETHER):
            wave = works[begin : begin + TOGETHER]
            if time.monotonic() > deadline:
                for work in works[begin:]:
                    session.skip(point(work), "out of time")
                break
            for result in search_together(session, wave, compilers, hardware, deadline):
                found.append(result)
                text = [plain(r) | {"rank_correlation": r.rank_correlation()} for r in found]
                write_atomic(session.out / "tilings.json", json.dumps(text, indent=1) + "\n")
    return found


def point(work: TilingWork) -> str:
    """A search in words."""
    return f"tilings of {work.kernel}, {work.batch} x {work.slots} tokens"


def search_together(
    session: Session,
    works: Sequence[TilingWork],
    compilers: Compilers,
    hardware: HardwareProfile | None,
    deadline: float,
) -> Iterable[TilingResult]:
    """The results of some searches, as they end."""
    with ExitStack() as stack, ThreadPoolExecutor(len(works)) as pool:
        children = [stack.enter_context(Child(work, CALL_SECONDS, START_SECONDS)) for work in works]
        described = list(pool.map(describe, children))
        searches = []
        for work, child, found in zip(works, children, described, strict=True):
            if isinstance(found, str):
                session.skip(point(work), found)
            else:
                searches.append(Search(work, child, found, list(found.tilings)))
        select(session, searches, compilers, hardware, deadline)
        compile_odd(searches, compilers, deadline)
        list(pool.map(lambda search: check(session, search, deadline), searches))
        for search in searches:
            measure(session, search, deadline)
            yield decided(session, search, deadline)
            search.child.close()


def describe(child: Child) -> Described | str:
    """What the child knows of its work, or why it knows nothing."""
    try:
        found: Described = child.call("describe")
        return found
    except (StageFailure, UserError) as error:
        return str(error)


def rank(search: Search, hardware: HardwareProfile | None, programs: dict[str, tuple[Program, ...]]) -> None:
    """Put what the model takes to be the fastest behind the default. Without a profile the kernel's own order stays."""
    if hardware is None:
        return
    for place, tiling in enumerate(search.described.tilings):
        found = prediction_of(search.work, search.described, place, hardware, programs.get(key(tiling), ()))
        search.predicted[key(tiling)] = found

    def order(tiling: dict[str, int]) -> tuple[bool, float]:
        predicted = search.predicted.get(key(tiling))
        return tiling != search.default, predicted if predicted is not None else float("inf")

    search.kept.sort(key=order)


def select(
    session: Session,
    searches: Sequence[Search],
    compilers: Compilers,
    hardware: HardwareProfile | None,
    deadline: float,
) -> None:
    """Keep the default and the best predicted tilings that compile, fit and do not spill, as far as there was time."""
    jobs: list[tuple[Search, dict[str, int], Job]] = []
    for search in searches:
        rank(search, hardware, {})
        search.kept = search.kept[: 1 + 2 * KEPT]
        if search.described.target is not None:
            work, name = search.work, search.described.target
            jobs += [(search, t, Job(work.kernel, name, work.problem, work.dtype, t)) for t in search.kept]
    programs: dict[int, dict[str, tuple[Program, ...]]] = {}
    for index, result in compilers.compile([job for _, _, job in jobs]):
        search, tiling, _ = jobs[index]
        programs.setdefault(id(search), {})[key(tiling)] = result.programs
        if not result.usable:
            search.kept.remove(tiling)
            facts = compiled_facts(result)
            keep(session, search, tiling, {"stage": "compile", **{n: facts[n] for n in ("outcome", "reason")}})
        if time.monotonic() > deadline:
            break
    for search in searches:
        rank(search, hardware, programs.get(id(search), {}))
        search.kept = search.kept[: 1 + KEPT]


def compile_odd(searches: Sequence[Search], compilers: Compilers, deadline: float) -> None:
    """Compile what the checks of odd problems will start, side by side, into the cache where the JIT looks."""
    jobs = [
        Job(search.work.kernel, search.described.target, problem, search.work.dtype, tiling)
        for search in searches
        if search.described.target is not None
        for problem in odd_problems(search.work.problem)
        for tiling in search.kept
    ]
    for _ in compilers.compile(jobs):  # the check itself tells what came of it
        if time.monotonic() > deadline:
            break


def check(session: Session, search: Search, deadline: float) -> None:
    """Compare every tiling with the reference, on the bucket's problem and odd ones; only those that equal it stay."""
    right = []
    for tiling in search.kept:
        if time.monotonic() > deadline:
            break
        stages = {"numerics": staged(search, "check", "errors", tiling)}
        found = run_stages(stages, lambda name, findings: None)
        if found["outcome"] == "correct":
            right.append(tiling)
        keep(session, search, tiling, found)
    search.kept = right


def measure(session: Session, search: Search, deadline: float) -> None:
    """Time the tilings that are right, one after the other."""
    for tiling in search.kept:
        if time.monotonic() > deadline:
            return
        stages = {"micro_benchmark": staged(search, "time", "seconds", tiling)}
        keep(session, search, tiling, run_stages(stages, lambda name, findings: None))


def staged(search: Search, method: str, name: str, tiling: dict[str, int]) -> Callable[[], dict[str, Any]]:
    """A stage that asks the child."""
    return lambda: {name: search.child.call(method, tiling)}


def keep(session: Session, search: Search, tiling: dict[str, int], found: dict[str, Any]) -> None:
    """Write what a stage found of a tiling, and put it to what is known of it."""
    work = search.work
    place = next((i for i, t in enumerate(search.trials) if t.tiling == tiling), len(search.trials))
    trial = search.trials[place] if place < len(search.trials) else TilingTrial(place, tiling)
    trial = replace(trial, predicted_seconds=search.predicted.get(key(tiling)), **found)
    search.trials[place:] = [replace(trial, seconds=tuple(trial.seconds)), *search.trials[place + 1 :]]
    where = {"kernel": work.kernel, "tokens": work.problem.tokens, "batch": work.batch, "slots": work.slots}
    session.write("tilings", **where, **plain(search.trials[place]))


def decided(session: Session, search: Search, deadline: float) -> TilingResult:
    """The search as it ends: the fastest right tiling against the default in alternating pairs, if there was time."""
    work, finished = search.work, search.finished
    subject, untried = subject_of(work, search.described), len(search.described.tilings) - len(finished)
    result = TilingResult(subject.name, subject, finished, untried=untried)
    if not any(t.tiling == search.default for t in result.correct):
        session.skip(point(work), "the default tiling was not timed, so that there is nothing to compare with")
        return result
    best = result.correct[0]
    try:
        decision = judge(search, best, session.command, deadline)
    except StageFailure as failure:
        session.skip(f"pairs of {point(work)}", str(failure))
        return result
    gain = "" if decision.ratio is None else f" {decision.ratio:.3f} times [{decision.low:.3f}, {decision.high:.3f}],"
    session.say(f"  {best.median_seconds * 1e6:10.2f} us  {point(work)}:{gain} {decision.reason}")
    return replace(result, decision=decision)


def judge(search: Search, best: TilingTrial, command: str, deadline: float) -> TilingDecision:
    """By the tuner's rule; pairs that the deadline cut short keep the default."""
    pairs: list[tuple[float, float]] = []
    if best.tiling != search.default:
        while len(pairs) < PAIRS and time.monotonic() < deadline:
            pairs.append(search.child.call("pair", search.default, best.tiling))
    late = best.tiling != search.default and len(pairs) < PAIRS
    broken = f"out of time after {len(pairs)} pairs" if late else ""
    return decision_of(search.default, best.tiling, pairs, True, broken, len(search.finished), command)
