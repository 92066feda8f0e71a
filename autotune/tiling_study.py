"""How a search of tilings is kept in a study: its trials, what compilers made, its decision; and read again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from autotune.storage import database_errors, open_storage, storage_url
from autotune.tiling_results import TilingDecision, TilingResult, TilingSubject, TilingTrial
from autotune.tiling_runner import Described, TilingWork
from hardware.files import UserError, build, plain
from runtime.kernels.compiler import Compiled, judge
from runtime.kernels.target import target as target_named
from runtime.statistics import paired_ratio

SUBJECT = "tiling_subject"  # the attribute by which a study is known to be one of tilings


def decision_of(
    default: dict[str, int],
    best: dict[str, int],
    pairs: Sequence[tuple[float, float]],
    default_runs: bool,
    broken: str,
    measured: int,
    command: str,
) -> TilingDecision:
    """What to run: the fastest right tiling if it beats the default in the pairs (seconds of default and of it).

    broken: why there are no pairs where some were wanted: where the default does not run, the fastest that does serves;
    where the comparison broke, the default stays.
    """
    ratio = low = high = None
    kept, reason = default_runs, broken or "no right tiling measured faster than the default"
    if pairs and not broken:
        ratio, low, high = paired_ratio([a for a, _ in pairs], [b for _, b in pairs])
        kept = low <= 1
        reason = "the gain over the default is inside the noise" if kept else "faster than the default in pairs"
    return TilingDecision(
        tiling=default if kept else best,
        default=default,
        ratio=ratio,
        low=low,
        high=high,
        rounds=len(pairs),
        reason=reason,
        kept_default=kept,
        command=command,
        date=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        challenger=best,
        measured=measured,
    )


def subject_of(work: TilingWork, described: Described) -> TilingSubject:
    """What the times of this work belong to on the device that was described."""
    return TilingSubject(
        work.kernel,
        work.model,
        work.config_hash,
        described.device,
        work.dtype,
        work.batch,
        work.slots,
        work.context,
        described.routing,
        described.triton,
        experts=work.config.num_experts,
        expert_width=work.config.moe_intermediate_size,
    )


def compiled_facts(compiled: Compiled) -> dict[str, Any]:
    """What came of compiling, to be stored: an outcome (`correct`: it may run), why, and registers and memory."""
    outcome = "correct"
    if not compiled.usable:
        limits = judge(compiled.programs, target_named(compiled.job.target))
        outcome = "infeasible" if compiled.programs and limits == compiled.outcome else "compile"
    return {
        "outcome": outcome,
        "reason": "" if compiled.usable else compiled.outcome,
        "programs": [plain(program) for program in compiled.programs],
    }


def tiling_key(tiling: Mapping[str, int]) -> str:
    return json.dumps(dict(tiling), sort_keys=True)


def place_of(trial: FrozenTrial) -> int:
    params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    return int(params.get("place", -1))


def dropped(trial: FrozenTrial) -> bool:
    """Whether it says nothing of its tiling: taken by another worker, or sampled by nobody's wish."""
    return "taken_by" in trial.user_attrs


def read_tiling_trial(trial: FrozenTrial, tilings: Sequence[dict[str, int]], study_name: str) -> TilingTrial:
    """A trial as plain data: its findings are stored by stage."""
    names = ("predicted_seconds", "errors", "seconds", "outcome", "stage", "reason", "worker")
    parts = [part for part in trial.user_attrs.values() if isinstance(part, dict)]
    found: dict[str, Any] = {k: v for part in parts for k, v in part.items() if k in names}
    place = place_of(trial)
    tiling = tilings[place] if 0 <= place < len(tilings) else {}
    return build(TilingTrial, {**found, "number": trial.number, "tiling": tiling}, f"{study_name!r} {trial.number}")


def read_tiling_study(study: optuna.Study) -> TilingResult:
    """A study as plain data. UserError for one of something else, and for a damaged record."""
    attributes, name = study.user_attrs, study.study_name
    if SUBJECT not in attributes or "tilings" not in attributes:
        raise UserError(f"study {name!r} is not one of tilings")
    tilings = [dict(tiling) for tiling in attributes["tilings"]]
    trials = study.get_trials(deepcopy=False)
    shown = [
        t
        for t in trials
        if not dropped(t) and place_of(t) >= 0 and ("result" in t.user_attrs or t.state == TrialState.RUNNING)
    ]
    decision = attributes.get("decision")
    return TilingResult(
        name,
        build(TilingSubject, attributes[SUBJECT], f"study {name!r}"),
        tuple(read_tiling_trial(trial, tilings, name) for trial in shown),
        build(TilingDecision, decision, f"study {name!r}") if decision else None,
        len(tilings) - len({place_of(t) for t in shown}),
    )


def read_tilings(source: str | Path) -> list[TilingResult]:
    """Every search of tilings of a storage (URL, folder or file), by model, kernel and tokens; [] where none is."""
    url = storage_url(source)
    with database_errors(url):
        storage = open_storage(url, create=False)
        studies = [optuna.load_study(study_name=n, storage=storage) for n in optuna.get_all_study_names(storage)]
        found = [read_tiling_study(study) for study in studies if SUBJECT in study.user_attrs]
    return sorted(found, key=lambda r: (r.subject.model, r.subject.kernel, r.subject.tokens, r.subject.dtype))
