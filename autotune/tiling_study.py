"""How a search of tilings is kept in a study: its trials, what compilers made, its decision; and read again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from autotune.storage import database_errors, open_storage, storage_url
from autotune.tiling_results import TilingDecision, TilingResult, TilingSubject, TilingTrial
from hardware.files import UserError, build

SUBJECT = "tiling_subject"  # the attribute by which a study is known to be one of tilings


def tiling_key(tiling: Mapping[str, int]) -> str:
    """A name that equal tilings share."""
    return json.dumps(dict(tiling), sort_keys=True)


def place_of(trial: FrozenTrial) -> int:
    """Of its tiling among the study's; -1 before it is known."""
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
