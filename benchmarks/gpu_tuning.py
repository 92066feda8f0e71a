"""Tuning of `benchmarks.gpu`: tilings, what their table is worth in whole steps, decoding. It needs no search library.

What `ridgepoint tune` runs, with its stages, runners and predictions, but a short list in place of a search: the
default, the pilots, and the settings that the performance model puts first. Every trial is written when it ends.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any

from autotune.guide import Guide
from autotune.isolation import Child, Isolated
from autotune.local import Work
from autotune.objective import StageFailure, decoding_stages, most_tokens_of, run_stages
from autotune.results import StudyResult, Subject, TrialRecord
from autotune.runner import Described
from autotune.seeding import Predict, Prediction, Predictor, pilots
from autotune.space import Candidate, decoding_space, default_candidate
from autotune.tiling_results import read_tilings_file, tile_table
from benchmarks.gpu_parts import device_profile
from benchmarks.gpu_session import RANDOM, Plan, Session
from benchmarks.gpu_tilings import PAIRS, tune_tilings
from hardware.files import UserError, plain
from perfmodel.model_spec import spec_from_config
from perfmodel.steps import title
from runtime.bench import token_rows
from runtime.bench_generation import sample_generation
from runtime.checkpoint import random_model
from runtime.config import DecodingConfig, KernelConfig
from runtime.engines import engine_of
from runtime.measurement import interval_name
from runtime.statistics import paired_ratio

TILINGS_SHARE, TABLE_SHARE = 0.5, 0.15  # of the part's time; the rest is decoding's
TRIALS_SHARE = 0.75  # of a batch's time; the rest is for its pairs
CALL_SECONDS, START_SECONDS = 150.0, 120.0  # the first trial of a batch compiles its kernels
MODEL = "zaya-nano"


def tune(session: Session, plan: Plan) -> None:
    """Tilings at full size, their table against the defaults in pairs, then decoding with trained weights."""
    begun = time.monotonic()
    left = session.deadline - begun
    results = tune_tilings(session, plan, begun + TILINGS_SHARE * left)
    table = tile_table(results)
    if table:
        session.attempt(
            "tile table", lambda: compare_table(session, plan, table, begun + (TILINGS_SHARE + TABLE_SHARE) * left)
        )
        session.release()
    else:
        session.skip("tile table", "no tiling beat its default" if results else "no tilings were searched")
    for index, batch in enumerate(plan.tuning.batches):
        share = (session.deadline - time.monotonic()) / (len(plan.tuning.batches) - index)
        deadline = time.monotonic() + share
        session.attempt(f"decoding at batch {batch}", partial(search, session, plan, batch, deadline))


def compare_table(session: Session, plan: Plan, table: dict[str, dict[int, dict[str, int]]], deadline: float) -> None:
    """Whole steps at full size with the tuned tile table against the default tilings, in alternating pairs."""
    model = random_model(plan.model, device=session.device, dtype=plan.dtype).freeze()
    default = KernelConfig(engine=engine_of(model))
    tuned = replace(default, tilings=table)
    ways = (DecodingConfig(), DecodingConfig("two_forward", plan.drafts))
    points = list(itertools.product(plan.tuning.batches, ways))
    for index, (batch, way) in enumerate(points):
        prompts = token_rows(model, batch, plan.context)

        def forwards_per_second(
            kernels: KernelConfig, way: DecodingConfig = way, prompts: list[list[int]] = prompts
        ) -> float:
            """Graphs are captured anew when the tilings change: in a short run that is not counted."""
            sample_generation(model, prompts, way, kernels=kernels, max_new_tokens=2)
            found = sample_generation(model, prompts, way, kernels=kernels, max_new_tokens=plan.new_tokens[1])
            return found.forwards / found.seconds  # with random weights the number of accepted drafts is not real

        until = time.monotonic() + (deadline - time.monotonic()) / (len(points) - index)
        pairs = alternate(partial(forwards_per_second, default), partial(forwards_per_second, tuned), until)
        write_pairs(session, "tile table", f"tile table, {title(way)}, batch {batch}", batch, title(way), pairs, RANDOM)


def alternate(default: Callable[[], float], tuned: Callable[[], float], deadline: float) -> list[tuple[float, float]]:
    """Up to PAIRS rounds, every second one backwards; none is begun after the deadline."""
    pairs: list[tuple[float, float]] = []
    while len(pairs) < PAIRS and time.monotonic() < deadline:
        if len(pairs) % 2:
            second = tuned()
            pairs.append((default(), second))
        else:
            pairs.append((default(), tuned()))
    return pairs


def write_pairs(
    session: Session,
    what: str,
    point: str,
    batch: int,
    setting: str,
    pairs: list[tuple[float, float]],
    simulated: str | None,
) -> None:
    """Keep pairs of speeds (of the default and of the tuned setting), with the interval of their ratio."""
    if not pairs:
        return session.skip(point, "out of time")
    ratio, low, high = paired_ratio([b for _, b in pairs], [a for a, _ in pairs])
    facts = {"what": what, "batch": batch, "setting": setting, "ratio": ratio, "low": low, "high": high}
    session.write("pairs", **facts, rounds=len(pairs), speeds=pairs, simulated=simulated, command=session.command)
    session.say(f"  {ratio:10.3f} times [{low:.3f}, {high:.3f}] ({interval_name(len(pairs))})  {point}")


def search(session: Session, plan: Plan, batch: int, deadline: float) -> None:
    """At one batch: the default, the pilots, the model's seeds, what it then expects to be the fastest; and pairs."""
    size = plan.tuning
    work = Work(MODEL, batch, device=session.device, prompts=size.prompts, new_tokens=size.new_tokens, repeats=1)
    with Child(work, CALL_SECONDS, START_SECONDS) as child:
        described: Described = child.call("describe")
        result, predict = begin(session, described)
        space, runner = result.subject.space, Isolated(child)
        default, guide = default_candidate(space, described.threads), Guide(space, predict)
        until = time.monotonic() + TRIALS_SHARE * (deadline - time.monotonic())

        def run(candidate: Candidate, source: str) -> None:
            nonlocal result
            if time.monotonic() < until or source == "default":
                predicted = predict(candidate, result.acceptance())
                trial = run_one(session, result, candidate, source, predicted, runner)
                result = replace(result, trials=(*result.trials, trial))

        for candidate in pilots(space, default):
            run(candidate, "default" if candidate == default else "pilot")
        for candidate in guide.seeds(result.trials, result.acceptance(), size.seeds):
            run(candidate, "seed")
        for _ in range(size.guided):
            late = time.monotonic() > until
            candidate = None if late else guide.next(result.trials, result.acceptance())
            if candidate is None:
                break
            run(candidate, "guided")
        decide(session, result, default, runner, deadline)


def begin(session: Session, described: Described) -> tuple[StudyResult, Predict]:
    """An empty study of what the runner works on, of lossless settings only; and the model's predictions for it."""
    identity, workload = described.identity, described.workload
    space = decoding_space(
        batch=workload.batch,
        cores=described.threads if session.device == "cpu" else None,
        drafts=described.config.mask_token_id is not None,
        lossless=True,
        engine=described.engine,
    )
    subject = Subject(MODEL, identity.model_hash, identity.device, workload, described.prompts, space)
    profile = device_profile(session)
    if profile is None:
        session.skip(f"predictions of batch {workload.batch}", "the device has no profile to predict with")
        return StudyResult(subject.name, subject, ()), lambda candidate, acceptance: None
    return StudyResult(subject.name, subject, ()), Predictor(
        spec_from_config(described.config, MODEL), profile, workload
    )


def run_one(
    session: Session,
    result: StudyResult,
    candidate: Candidate,
    source: str,
    predicted: Prediction | None,
    runner: Isolated,
) -> TrialRecord:
    """One trial through the tuner's stages, written when it ends."""
    begun, batch = time.monotonic(), result.subject.workload.batch
    fastest = [t.tokens_per_second or 0.0 for t in result.allowed(0.0)]
    # The default and the pilots are measured in any case: the predictions need what they count.
    best = fastest[0] if fastest and source not in ("default", "pilot") else 0.0
    stages = decoding_stages(candidate, runner, best, batch * most_tokens_of(candidate.decoding))
    found = run_stages(stages, lambda stage, findings: None)
    if predicted is not None:
        found |= {f"predicted_{name}": value for name, value in predicted._asdict().items()}
    names = {field.name for field in fields(TrialRecord)}
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items() if k in names}
    worker, spent = f"{socket.gethostname()}:{os.getpid()}", time.monotonic() - begun
    params = result.subject.space.encode(candidate)
    trial = TrialRecord(len(result.trials), params, source=source, worker=worker, spent_seconds=spent, **values)
    session.write("decoding", model=MODEL, batch=batch, setting=words(params), **plain(trial))
    speed = "-" if trial.tokens_per_second is None else f"{trial.tokens_per_second:.1f}"
    session.say(f"  {speed:>10} tokens/s  batch {batch}, {words(params)}: {trial.outcome} {trial.reason}")
    return trial


def decide(session: Session, result: StudyResult, default: Candidate, runner: Isolated, deadline: float) -> None:
    """The fastest lossless setting against the default in alternating pairs."""
    batch = result.subject.workload.batch
    point, ranked = f"pairs of batch {batch}", result.allowed(0.0)
    if not ranked or ranked[0].source == "default":
        return session.skip(point, "no setting measured faster than the default")
    challenger = result.candidate(ranked[0])
    pairs: list[tuple[float, float]] = []
    try:
        while len(pairs) < PAIRS and time.monotonic() < deadline:
            pairs.append(runner.pair(default, challenger))
    except (StageFailure, UserError) as error:
        session.skip(point, str(error))
    write_pairs(session, "decoding", point, batch, words(ranked[0].params), pairs, None)


def words(params: Mapping[str, object]) -> str:
    """A setting in a line."""
    return " ".join(f"{name}={value}" for name, value in params.items())


def tilings_table(session: Session) -> Iterator[str]:
    """Every search of tilings that was decided, as Markdown."""
    yield "| kernel | tokens | timed | default | fastest | times the default in pairs | decided | rank correlation |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: |"
    path = session.out / "tilings.json"
    for result in read_tilings_file(path) if path.is_file() else ():
        decision, timed = result.decision, [t for t in result.trials if t.seconds]
        if decision is None:
            continue
        medians = [t.median_seconds for t in timed if t.tiling == decision.default] + [t.median_seconds for t in timed]
        rank, ratio = result.rank_correlation(), decision.ratio
        cells = [result.subject.kernel, result.subject.tokens, len(timed)]
        cells += [f"{seconds * 1e6:.2f} us" for seconds in (medians[0], min(medians))]
        cells += ["-" if ratio is None else f"{ratio:.3f} [{decision.low:.3f}, {decision.high:.3f}]"]
        cells += [
            "default" if decision.kept_default else words(decision.tiling),
            "-" if rank is None else f"{rank:.2f}",
        ]
        yield "| " + " | ".join(map(str, cells)) + " |"


def decoding_table(session: Session) -> Iterator[str]:
    """Every decoding trial, as Markdown."""
    yield "| batch | setting | from | outcome | predicted step | step | predicted tokens/s | tokens/s |"
    yield "| ---: | --- | --- | --- | ---: | ---: | ---: | ---: |"
    for one in session.lines("decoding"):
        cells = [one["batch"], one["setting"], one["source"], one["outcome"]]
        cells += [_shown(one[name], 1e3, " ms") for name in ("predicted_step_seconds", "step_seconds")]
        cells += [_shown(one[name], 1, "") for name in ("predicted_tokens_per_second", "tokens_per_second")]
        yield "| " + " | ".join(map(str, cells)) + " |"


def _shown(value: float | None, factor: float, unit: str) -> str:
    return "-" if value is None else f"{value * factor:.4g}{unit}"


def pairs_table(session: Session) -> Iterator[str]:
    """What was compared in pairs, as Markdown."""
    yield "| what | batch | setting | times the default | pairs | in brackets | |"
    yield "| --- | ---: | --- | ---: | ---: | --- | --- |"
    for one in session.lines("pairs"):
        interval = f"{one['ratio']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"
        cells = [one["what"], one["batch"], one["setting"], interval, one["rounds"], interval_name(one["rounds"])]
        cells.append(one["simulated"] or "")
        yield "| " + " | ".join(map(str, cells)) + " |"
