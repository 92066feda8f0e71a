"""`ridgepoint demo`: the whole job on this machine, and one report of it.

Probe, predict, measure, calibrate, check on points that nothing was fitted to, tune, export, run the export.
Every artefact is kept in the output folder as soon as it exists.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dashboards.changes import change_info
from dashboards.choice import Answer, Choice, answer, explanation, pays_map
from dashboards.maps import map_of
from dashboards.plan import ARTEFACTS, Plan, commands
from dashboards.report import Results, Speedup, TunedRun, write_report
from hardware.files import UserError, plain, write_atomic
from hardware.fingerprint import git_commit
from hardware.profile import HardwareProfile, load_profile, save_profile
from perfmodel.calibration import calibrate
from perfmodel.decoding import predict
from perfmodel.engine import EngineProfile, engine_for, save_engine
from perfmodel.experts import ExpertCoverage
from perfmodel.model_spec import load_spec, require_context
from perfmodel.validation import ran_by, recorded_coverage, summaries, validate
from runtime.config import DecodingConfig, require
from runtime.deployment import load_deployment
from runtime.measurement import ForwardKind, Measurement, append_jsonl

if TYPE_CHECKING:
    from autotune.local import Tuned
    from autotune.results import StudyResult
    from runtime.bench import Identity

Show = Callable[[str, float, str], None]
"""Called with the stage, the share of it that is done, and a remark."""

DRAFTING: tuple[ForwardKind, ...] = ("draft", "verify")
FULL_SIZE = ("h100-sxm", "mi300x")
FULL_SIZE_ACCEPTANCE = 4.6
FULL_SIZE_SOURCE = (
    "The acceptance length of 4.6 is the publisher's headline for the lossless sampler of ZAYA1-8B-Diffusion-Preview."
)


def run(
    out: Path,
    model: str,
    plan: Plan,
    *,
    hardware: HardwareProfile | None = None,
    threads: int = 1,
    simulated: str | None = None,
    command: str = "ridgepoint demo",
    show: Show = lambda stage, share, remark: None,
) -> Results:
    """Do everything and write `out`/report.html. hardware: this machine's profile (None: probe it).

    threads: of all that is measured before the tuning, which tries every number: a small model gains little from more,
    and several threads stall each other where the machine does other work too. UserError: an unknown or broken model,
    a context too short for the grids, a folder that cannot be written.
    """
    began = time.monotonic()
    for grid in (plan.fitted, plan.held_out):
        require_context(load_spec(model), max(grid.context) + max(grid.slots))
    _clear(out)
    if hardware is None:
        from hardware.probe import probe

        hardware = probe("cpu", quick=plan.quick_probe, progress=lambda label, share: show("probe", share, label))
    save_profile(hardware, out / "hardware.yaml")
    show("probe", 1.0, hardware.name)

    choice, elsewhere = _full_size()
    write_atomic(out / "predictions.json", _json([plain(a.chosen) for _, a in elsewhere]))
    show("predict", 1.0, f"{choice.model} on {' and '.join(FULL_SIZE)}")

    import torch

    from autotune.local import load
    from runtime.bench import identify

    torch.set_num_threads(threads)
    tuned = load(model)
    require(tuned.model.config.mask_token_id is not None, f"{model} has no mask_token_id, so it cannot draft")
    identity = identify(tuned.model, model, command, simulated=simulated)
    fitted, held_out = _forwards(tuned, identity, plan, out, partial(show, "measure"))
    pairs = [
        _generations(tuned, identity, batch, plan, out, partial(_part, partial(show, "generate"), n, len(plan.batches)))
        for n, batch in enumerate(plan.batches)
    ]
    coverage = recorded_coverage(fitted)
    engine = calibrate(
        fitted,
        hardware,
        engine_for(hardware, None, ran_by(fitted)),
        source="calibration.jsonl",
        expert_coverage=coverage,
    )
    save_engine(engine, out / "engine.yaml")
    speedups = tuple(_speedup(pair, hardware, engine, coverage) for pair in pairs)
    generations = [record for pair in pairs for record in pair.records]
    rows = validate([*fitted, *held_out, *generations], hardware, engine=engine, expert_coverage=coverage)
    show("calibrate", 1.0, f"{len(fitted)} forwards fitted to, {len(held_out) + len(generations)} rows held out")

    study = _tune(model, out, plan, hardware, engine, command, simulated, show)
    from autotune.export.policy import Policy
    from autotune.export.targets import write

    write("native", Policy([study], command=command), out / "deployment.yaml")
    ran = _follow(tuned, out / "deployment.yaml", plan)
    write_atomic(out / "generated.json", _json(plain(ran)))
    show("export and run", 1.0, f"{ran.tokens_per_second:.0f} tokens/s")

    results = Results(
        model=model,
        command=command,
        commit=git_commit(Path(__file__)),
        date=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        seconds=time.monotonic() - began,
        simulated=simulated,
        machine=hardware,
        engine=engine,
        elsewhere=elsewhere,
        elsewhere_acceptance=FULL_SIZE_SOURCE,
        maps=tuple(map_of(choice, p.name, pays_map(choice.on(p.name), p)) for p, _ in elsewhere),
        changes=change_info({p.name: explanation(choice.on(p.name), p) for p, _ in elsewhere}),
        rows=tuple(rows),
        speedups=speedups,
        study=study,
        deployment=load_deployment(out / "deployment.yaml"),
        tuned=ran,
        commands=commands(model, plan, choice, ran.prompts[0], threads),
        artefacts=tuple(ARTEFACTS.items()),
    )
    write_report(out / "report.html", results)
    show("report", 1.0, str(out / "report.html"))
    return results


def summary(results: Results, out: Path) -> dict[str, Any]:
    """The findings as plain data, for --json."""
    decision = results.study.decision
    return {
        "report": str(out / "report.html"),
        "artefacts": {name: str(out / name) for name in ARTEFACTS},
        "model": results.model,
        "simulated": results.simulated,
        "seconds": results.seconds,
        "speedups": [
            {
                "batch": s.batch,
                "ratio": s.ratio,
                "low": s.low,
                "high": s.high,
                "predicted": s.predicted.chosen.speedup_over_autoregressive,
                "acceptance_length": s.two_forward.acceptance_length,
            }
            for s in results.speedups
        ],
        "validation": {name: plain(found) for name, found in summaries(results.rows).items()},
        "decision": plain(decision) if decision else None,
        "tuned_tokens_per_second": results.tuned.tokens_per_second,
    }


def _clear(out: Path) -> None:
    """A demo's own files of an earlier run are replaced, so that nothing in the folder is older than its report.

    A folder that holds such files without `predictions.json`, which a demo writes first, is another command's.
    """
    found = [name for name in ARTEFACTS if (out / name).exists()]
    if found and "predictions.json" not in found:
        raise UserError(f"{out} holds {', '.join(found)}, but no earlier demo's predictions.json; choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in (*ARTEFACTS, "study.db.lock"):
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    write_atomic(out / "predictions.json", "")  # an unwritable folder is found before minutes have passed


def _full_size() -> tuple[Choice, tuple[tuple[HardwareProfile, Answer], ...]]:
    choice = Choice(devices=FULL_SIZE, acceptance_length=FULL_SIZE_ACCEPTANCE)
    profiles = [load_profile(name) for name in choice.devices]
    return choice, tuple((profile, answer(choice, profile)) for profile in profiles)


def _forwards(
    tuned: Tuned, identity: Identity, plan: Plan, out: Path, progress: Callable[[float, str], None]
) -> tuple[list[Measurement], list[Measurement]]:
    """Time both grids and keep each record at once: decodes, and a draft and a verify for every wider slot count.

    The grids alternate, batch by batch and context by context: a machine that slows down must not do so for one alone.
    """
    from runtime.bench import measure_forward, prefill

    found: tuple[list[Measurement], list[Measurement]] = ([], [])
    paths = (out / "calibration.jsonl", out / "held-out.jsonl")
    cells = [
        (place / len(grid.cells), which, cell)
        for which, grid in enumerate((plan.fitted, plan.held_out))
        for place, cell in enumerate(grid.cells)
    ]
    for place, (_, which, (batch, context)) in enumerate(sorted(cells)):
        slots = (plan.fitted, plan.held_out)[which].slots
        filled = prefill(tuned.model, batch, context, max(slots))
        points: list[tuple[ForwardKind, int]] = [("decode", 1)] if 1 in slots else []
        points += [(kind, n) for n in slots if n > 1 for kind in DRAFTING]
        for index, (kind, width) in enumerate(points):
            progress((place + index / len(points)) / len(cells), f"{kind}, batch {batch}, {width} slots")
            at: dict[str, Any] = {"kind": kind, "batch": batch, "slots": width, "context": context}
            record = measure_forward(tuned.model, identity, **at, repeats=plan.repeats, prefilled=filled)
            append_jsonl(paths[which], record)
            found[which].append(record)
    progress(1.0, f"{sum(map(len, found))} forwards")
    return found


def _part(progress: Callable[[float, str], None], place: int, count: int, share: float, remark: str) -> None:
    progress((place + share) / count, remark)


@dataclass(frozen=True)
class _Pair:
    """Both samplers in alternating rounds: records, and the ratio of the rounds with its interval."""

    records: tuple[Measurement, Measurement]  # autoregressive, two_forward
    ratio: tuple[float, float, float]


def _generations(
    tuned: Tuned, identity: Identity, batch: int, plan: Plan, out: Path, progress: Callable[[float, str], None]
) -> _Pair:
    from runtime.bench import interleave, paired_ratio
    from runtime.bench_generation import generation_record, sample_generation, task_prompts

    prompts = task_prompts(tuned.model, -(-plan.prompts // batch) * batch)
    runs = {"autoregressive": DecodingConfig(), "two_forward": DecodingConfig("two_forward")}
    same: dict[str, Any] = {"batch": batch, "max_new_tokens": plan.new_tokens}
    samples = interleave(
        {name: partial(sample_generation, tuned.model, prompts, run, **same) for name, run in runs.items()},
        plan.rounds,
        progress=lambda done: progress(done / len(runs) / (plan.rounds + 1), f"batch {batch}"),
    )
    single, drafting = (
        generation_record(tuned.model, identity, prompts, run, samples[name], **same) for name, run in runs.items()
    )
    for record in (single, drafting):
        append_jsonl(out / "generations.jsonl", record)
    speeds = {name: [s.tokens_per_second for s in found] for name, found in samples.items()}
    return _Pair((single, drafting), paired_ratio(speeds["two_forward"], speeds["autoregressive"]))


def _speedup(pair: _Pair, hardware: HardwareProfile, engine: EngineProfile, coverage: ExpertCoverage) -> Speedup:
    """The measured pair beside its predictions, with the acceptance that was counted."""
    single, drafting = (
        predict(
            load_spec(record.model),
            hardware,
            record.workload,
            record.decoding,
            context=record.context,
            acceptance_length=record.acceptance_length,
            expert_coverage=coverage,
            engine=engine,
            kernels=record.kernels,
        )
        for record in pair.records
    )
    return Speedup(single.workload.batch, *pair.ratio, *pair.records, Answer(drafting, single, None))


def _tune(
    model: str,
    out: Path,
    plan: Plan,
    hardware: HardwareProfile,
    engine: EngineProfile,
    command: str,
    simulated: str | None,
    show: Show,
) -> StudyResult:
    from autotune.local import Plan as TuningPlan
    from autotune.local import Work, tune_local
    from autotune.storage import storage_url

    wanted = TuningPlan(trials=plan.tuning_trials, seconds=plan.tuning_seconds, rounds=plan.tuning_rounds)
    work = Work(model, prompts=plan.tuning_prompts, new_tokens=plan.new_tokens, repeats=plan.tuning_repeats)
    end = time.monotonic() + plan.tuning_seconds

    def on_trial(trial: Any, done: int) -> None:
        spent = 1 - max(0.0, end - time.monotonic()) / plan.tuning_seconds
        show("tune", 0.75 * max(spent, done / plan.tuning_trials), f"{done} settings")

    return tune_local(
        work,
        storage_url(out),
        hardware,
        wanted,
        engine=engine,
        command=command,
        simulated=simulated,
        isolated=False,  # this process has measured with the same model for a minute: a crash would be nothing new
        on_trial=on_trial,
        on_compare=lambda share: show("tune", 0.75 + 0.25 * share, "best against default, alternating"),
    )


def _follow(tuned: Tuned, deployment: Path, plan: Plan) -> TunedRun:
    """Solve one held-out problem of each family, one after the other, as the deployment says."""
    from autotune.local import mixed_problems
    from runtime.conversion.tasks import FAMILIES, check
    from runtime.engine import generate

    bos = tuned.model.config.bos_token_id
    first = [] if bos is None else [bos]
    problems = mixed_problems(len(FAMILIES))
    prompts = [[*first, *tuned.tokenizer.encode(p.prompt)] for p in problems]
    results = [generate(tuned.model, [p], deployment, max_new_tokens=plan.answer_tokens) for p in prompts]
    texts = [tuned.tokenizer.decode(r.tokens[0]) for r in results]
    tokens = sum(len(r.tokens[0]) for r in results)
    return TunedRun(
        decoding=results[0].decoding,
        prompts=tuple(p.prompt for p in problems),
        texts=tuple(texts),
        right=tuple(check(p, text) for p, text in zip(problems, texts, strict=True)),
        tokens_per_second=tokens / sum(r.decode_seconds for r in results),
        acceptance_length=tokens / sum(r.steps[0] for r in results),
        forwards=sum(r.forwards for r in results),
    )


def _json(data: Any) -> str:
    return json.dumps(data, indent=2) + "\n"
