"""The runtime's own policy file: `runtime.generate` reads it and follows the rule of its batch."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from autotune.export.policy import Policy, Target
from autotune.results import StudyResult
from hardware.files import UserError
from hardware.fingerprint import fingerprint_key
from runtime.deployment import Deployment, Rule, save_deployment


def deployment(results: Sequence[StudyResult], command: str = "") -> Deployment:
    """One rule per tuned batch, from the smallest; a batch between two follows the larger one's.

    Beyond the largest tuned batch the last rule serves, as any rule must. UserError for studies without a decision,
    and for studies of several models or devices: a deployment belongs to one.
    """
    first = results[0].subject
    for result in results[1:]:
        subject = result.subject
        same_device = fingerprint_key(subject.device) == fingerprint_key(first.device)
        if subject.model_hash != first.model_hash or not same_device:
            raise UserError(
                f"a deployment belongs to one model on one device, but {result.name!r} and {results[0].name!r} differ"
            )
    rules = [_rule(result) for result in sorted(results, key=lambda r: r.subject.workload.batch)]
    date = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    return Deployment(first.model, first.model_hash, first.device, tuple(rules), date, command)


def write(policy: Policy, out: Path) -> list[Path]:
    """Write deployment.yaml."""
    return [save_deployment(deployment(policy.studies, policy.command), out)]


def _rule(result: StudyResult) -> Rule:
    decision = result.decision
    if decision is None:
        raise UserError(f"study {result.name!r} has no decision yet: run its `ridgepoint tune` again, which continues")
    chosen = result.trial(decision.trial)
    compared, single = decision.comparison, result.best_autoregressive()
    evidence = {
        "study": result.name,
        "trial": chosen.number,
        "default_trial": decision.default_trial,
        "decision": decision.reason,
        "tokens_per_second": chosen.tokens_per_second,
        "default_tokens_per_second": result.trial(decision.default_trial).tokens_per_second,
        "best_autoregressive_tokens_per_second": single.tokens_per_second if single else None,
        "predicted_tokens_per_second": chosen.predicted_tokens_per_second,
        "divergence": chosen.divergence,
        "exact_match": chosen.exact_match,
        "settings_measured": decision.measured,
        "simulated": result.subject.simulated,
        "command": decision.command,
        "date": decision.date,
    }
    if compared is not None:  # of the challenger, also where it lost
        evidence["comparison"] = {
            "challenger_trial": decision.challenger,
            "tokens_per_second": compared.tokens_per_second,
            "default_tokens_per_second": compared.default_tokens_per_second,
            "ratio": compared.ratio,
            "ratio_low": compared.low,
            "ratio_high": compared.high,
            "rounds": compared.rounds,
        }
    decoding, kernels = result.candidate(chosen)
    return Rule(decoding, kernels, max_batch=result.subject.workload.batch, evidence=evidence)


TARGET = Target(
    name="native",
    engine="ridgepoint",
    file="one YAML file",
    loads="loads today",
    does="what runtime.generate follows: a rule per batch and context bucket, with its evidence",
    write=write,
)
