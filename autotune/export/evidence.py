"""What an exported setting rests on: in the native file, and beside the files of engines that allow no further keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from autotune.export.policy import BY_HAND, Chosen, Policy, not_carried, simulated
from autotune.results import Decision
from autotune.tiling_results import TilingResult
from hardware.files import UserError, plain, write_atomic

SCHEMA = "ridgepoint-provenance-1"


def now() -> str:
    """The time of an export."""
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def evidence_of(chosen: Chosen) -> dict[str, Any]:
    """What was measured of a decided setting, of the default, and of the best without drafts."""
    study, trial = chosen.study, chosen.trial
    decision = picked(chosen) if chosen.by_hand else study.decision
    assert decision is not None  # it was chosen by it
    single = study.best_autoregressive()
    found = {
        "study": study.name,
        "trial": trial.number,
        "default_trial": decision.default_trial,
        "prefers": _prefers(chosen),
        "decision": decision.reason,
        "tokens_per_second": trial.tokens_per_second,
        "default_tokens_per_second": study.trial(decision.default_trial).tokens_per_second,
        "best_autoregressive_tokens_per_second": single.tokens_per_second if single else None,
        "predicted_tokens_per_second": trial.predicted_tokens_per_second,
        "step_seconds": trial.step_seconds,
        "divergence": trial.divergence,
        "exact_match": trial.exact_match,
        "settings_measured": decision.measured,
        "workload": plain(study.subject.workload),
        "simulated": study.subject.simulated,
        "command": decision.command,
        "date": decision.date,
    }
    compared = decision.comparison
    if compared is not None:  # of the challenger, also where it lost
        found["comparison"] = {
            "challenger_trial": decision.challenger,
            "tokens_per_second": compared.tokens_per_second,
            "default_tokens_per_second": compared.default_tokens_per_second,
            "ratio": compared.ratio,
            "ratio_low": compared.low,
            "ratio_high": compared.high,
            "rounds": compared.rounds,
        }
    return found


def picked(chosen: Chosen) -> Decision:
    """What stands for a decision where a person picked a setting: it says so, and compares nothing.

    UserError for a study whose default was not measured: its speed is part of the evidence.
    """
    study, trial = chosen.study, chosen.trial
    made = study.decision
    default = made.default_trial if made else next((t.number for t in study.correct if t.source == "default"), None)
    if default is None:
        raise UserError(f"the default of study {study.name!r} must be measured before a setting of it is exported")
    measured = len(study.measured)
    return Decision(
        trial.number, default, trial.number, BY_HAND, None, trial.divergence or 0.0, measured, BY_HAND, now()
    )


def _prefers(chosen: Chosen) -> str:
    if chosen.decoding.drafts:
        return chosen.decoding.sampler
    return "autoregressive decoding" if chosen.by_hand else "autoregressive decoding: drafts do not pay"


def tiling_evidence(result: TilingResult) -> dict[str, Any]:
    """What was measured of a decided tiling."""
    decision = result.decision
    assert decision is not None  # undecided ones are refused before
    best = result.find(decision.tiling)
    return {
        "name": result.name,
        "kernel": result.subject.kernel,
        "tokens": result.subject.tokens,
        "tiling": decision.tiling,
        "seconds": list(best.seconds) if best else [],
        **{k: v for k, v in plain(decision).items() if k != "tiling"},
        "routing": result.subject.routing,
        "simulated": result.subject.simulated,
        "triton": result.subject.triton,
    }


def provenance(
    target: str,
    policy: Policy,
    *,
    says: Sequence[str],
    settings: Sequence[Chosen] = (),
    tilings: Sequence[TilingResult] = (),
    left_out: Sequence[str] = (),
) -> str:
    """A YAML document for beside the files: how to load them, what they rest on, what they cannot say.

    says: in words, how the engine is started with them. left_out: parts of the policy that are not the files' subject.
    """
    subject = (settings[0].study if settings else tilings[0]).subject
    document = {
        "schema": SCHEMA,
        "target": target,
        "written": now(),
        "command": policy.command,
        "model": subject.model,
        "fingerprint": subject.device,
        "simulated": simulated([*(c.study for c in settings), *tilings]),
        "says": list(says),
        "settings": [
            {
                "batch": c.batch,
                "context": c.context,
                "decoding": plain(c.decoding),
                "not_carried": not_carried(c),
                "evidence": evidence_of(c),
            }
            for c in settings
        ],
        "tilings": [tiling_evidence(t) for t in tilings],
        "left_out": list(left_out),
    }
    return yaml.safe_dump(plain(document), sort_keys=False, width=100)


def write_files(out: Path, files: Mapping[str, str], absent: Sequence[str] = ()) -> list[Path]:
    """Write each under the folder, atomically; other files there stay.

    absent: files whose being there would say something else, as those of an earlier export: UserError names one.
    """
    for name in absent:
        if name not in files and (out / name).exists():
            raise UserError(f"{out / name} would go on setting what is not to be set any more: remove it first")
    return [write_atomic(out / name, text) for name, text in files.items()]
