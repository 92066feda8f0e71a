"""The runtime's own policy file: `runtime.generate` reads it and follows the rule of its batch and context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autotune.export.evidence import evidence_of, now, tiling_evidence
from autotune.export.policy import Chosen, Policy, Target
from autotune.tiling_results import TilingResult, tile_table
from runtime.config import replace
from runtime.deployment import Deployment, Rule, save_deployment


def deployment(policy: Policy) -> Deployment:
    """One rule per tuned batch and context, from the smallest; what is between two follows the larger one's.

    Beyond the largest tuned batch or context, the largest serve (`runtime.deployment.rule_for`). UserError for studies
    without a decision, and for several models or devices: a deployment belongs to one.
    """
    chosen = policy.chosen()
    subject = chosen[0].study.subject
    rules = tuple(_rule(c, policy) for c in chosen)
    return Deployment(subject.model, subject.model_hash, subject.device, rules, now(), policy.command)


def write(policy: Policy, out: Path) -> list[Path]:
    """Write deployment.yaml."""
    return [save_deployment(deployment(policy), out)]


def _rule(chosen: Chosen, policy: Policy) -> Rule:
    kernels, tilings = chosen.kernels, _tilings(chosen, policy)
    evidence: dict[str, Any] = evidence_of(chosen)
    if tilings:
        merged = {name: {**kernels.tilings.get(name, {}), **found} for name, found in tile_table(tilings).items()}
        kernels = replace(kernels, tilings={**kernels.tilings, **merged})
        # The study may have run with others: its speed is not claimed for them together.
        evidence["tilings"] = {
            "tuned": "kernel by kernel, apart from this study's speed",
            "kernels": [tiling_evidence(t) for t in tilings],
        }
    return Rule(chosen.decoding, kernels, max_batch=chosen.batch, max_context=chosen.context, evidence=evidence)


def _tilings(chosen: Chosen, policy: Policy) -> list[TilingResult]:
    """Of the kernels that this rule's engine runs, in its dtype, those with a bucket that beats its default."""
    if chosen.kernels.engine != "graphs":
        return []
    decided = [t for t in policy.tilings if t.decision and t.subject.dtype == chosen.study.subject.workload.dtype]
    better = tile_table(decided)
    return [t for t in decided if t.subject.kernel in better]


TARGET = Target(
    name="native",
    engine="ridgepoint",
    file="one YAML file",
    loads="loads today",
    write=write,
    does="what runtime.generate follows: a rule per batch and context bucket, with its evidence",
    out="deployment.yaml",
)
