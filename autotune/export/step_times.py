"""A table of step times for schedulers and simulators: measured and predicted, by batch, slots and cached tokens.

`.json` holds the columns' meanings and the rows, any other name is CSV with a header. A row is a setting that ran and
was right; empty cells (JSON: null) were not measured or cannot be predicted.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from autotune.export.evidence import now
from autotune.export.policy import Policy, Target, simulated
from autotune.results import StudyResult, TrialRecord
from hardware.files import UserError, plain, write_atomic
from hardware.fingerprint import fingerprint_key

SCHEMA = "ridgepoint-step-times-1"
COLUMNS = {
    "model": "name of the model",
    "model_hash": "of its weights",
    "device": "name of the device",
    "fingerprint": "of what decides timings: device, processor, software; equal ones may be compared",
    "batch": "sequences at once",
    "context": "the most cached tokens of the tuned bucket; empty: any",
    "cached_tokens": "per sequence, at which the step was timed",
    "slots": "token slots per sequence in the widest forward of a step",
    "forwards_per_step": "the most forwards that a step takes",
    "sampler": "how tokens are produced",
    "draft_tokens": "K, drafted per step; empty for autoregressive decoding",
    "proposal_levels": "acceptance counts that a single forward drafts ahead for",
    "anchor_draft": "whether the first draft comes from the anchor's own logits",
    "denoising_steps": "the most forwards that fill a block",
    "confidence_threshold": "probability from which a token is decided early",
    "verify": "whether a denoised block is verified",
    "mixing_weight": "share of the autoregressive logits in the target; 1 is lossless",
    "engine": "of ridgepoint's runtime",
    "experts": "mode of an eager engine at these tokens",
    "threads": "of a CPU",
    "measured_step_seconds": "seconds of one step of the whole batch, all its forwards; no threshold ends it early",
    "predicted_step_seconds": "the same by the performance model",
    "tokens_per_step": "committed per sequence and step, mean",
    "predicted_tokens_per_step": "the same as predicted",
    "tokens_per_second": "of decoding the workload, all sequences",
    "study": "where it comes from",
    "trial": "its number there",
    "chosen": "whether the study decided for it",
    "simulated": "what was not real; empty where all was",
}


def write(policy: Policy, out: Path) -> list[Path]:
    """Write the table. UserError where no step was timed."""
    found = [_row(study, trial) for study in policy.studies for trial in study.correct]
    timed = [row for row in found if row["measured_step_seconds"] is not None]
    if not timed:
        raise UserError(f"no step was timed in {', '.join(policy.names)}: there is no table to write")
    if out.suffix == ".json":
        document = {
            "schema": SCHEMA,
            "written": now(),
            "command": policy.command,
            "simulated": simulated(policy.studies),
        }
        return [write_atomic(out, json.dumps({**document, "columns": COLUMNS, "rows": timed}, indent=2) + "\n")]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in timed)
    return [write_atomic(out, text.getvalue())]


def _row(study: StudyResult, trial: TrialRecord) -> dict[str, Any]:
    subject, (decoding, kernels) = study.subject, study.candidate(trial)
    batch = subject.workload.batch
    drafts, denoising = decoding.drafts, decoding.sampler == "denoising"
    return {
        "model": subject.model,
        "model_hash": subject.model_hash,
        "device": subject.device.get("device"),
        "fingerprint": fingerprint_key(subject.device),
        "batch": batch,
        "context": subject.context,
        "cached_tokens": subject.workload.prompt_tokens + subject.workload.generated_tokens // 2,
        "slots": decoding.slots,
        "forwards_per_step": decoding.forwards_per_step,
        "sampler": decoding.sampler,
        "draft_tokens": decoding.draft_tokens if drafts else None,
        "proposal_levels": list(decoding.levels) if decoding.sampler == "single_forward" else None,
        "anchor_draft": decoding.anchor_draft if decoding.sampler == "two_forward" else None,
        "denoising_steps": decoding.denoising_steps if denoising else None,
        "confidence_threshold": decoding.confidence_threshold,
        "verify": decoding.verify if denoising else None,
        "mixing_weight": decoding.mixing_weight,
        "engine": kernels.engine,
        "experts": kernels.expert_mode(batch * decoding.slots) if kernels.engine == "eager" else None,
        "threads": kernels.threads,
        "measured_step_seconds": trial.step_seconds,
        "predicted_step_seconds": trial.predicted_step_seconds,
        "tokens_per_step": trial.acceptance_length if drafts else 1.0,
        "predicted_tokens_per_step": trial.predicted_tokens_per_step,
        "tokens_per_second": trial.tokens_per_second,
        "study": study.name,
        "trial": trial.number,
        "chosen": study.decision is not None and study.decision.trial == trial.number,
        "simulated": subject.simulated,
    }


def _cell(value: Any) -> Any:
    """None as nothing, lists with semicolons, truth as JSON writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ";".join(map(str, value)) if isinstance(value, list) else plain(value)


TARGET = Target(
    name="step-times",
    engine="schedulers and simulators",
    file="one CSV file, or JSON by its suffix",
    loads="loads today",
    write=write,
    does="measured and predicted seconds of a step by batch, slots and cached tokens, a row per setting",
    out="step-times.csv",
)
