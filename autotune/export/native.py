"""The runtime's own policy file: `runtime.generate` reads it and follows the rule of its batch and context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autotune.export.evidence import evidence_of, now, tiling_evidence
from autotune.export.policy import Chosen, Policy, Target
from autotune.tiling_results import TilingResult
from runtime.config import KernelConfig, replace
from runtime.deployment import Deployment, Rule, save_deployment
from runtime.kernels.registry import KERNELS

OTHER_ENGINES = "grouped_experts"  # laid out for other engines' tile files; the runtime does not run it


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
    kernels, tilings = chosen.kernels, _tilings(chosen.kernels, policy)
    evidence: dict[str, Any] = evidence_of(chosen)
    if tilings:
        merged = {name: {**kernels.tilings.get(name, {}), **buckets} for name, buckets in _tables(tilings).items()}
        kernels = replace(kernels, tilings={**kernels.tilings, **merged})
        # The study may have run with others: its speed is not claimed for them together.
        evidence["tilings"] = {
            "tuned": "kernel by kernel, apart from this study's speed",
            "kernels": [tiling_evidence(t) for t in tilings],
        }
    return Rule(chosen.decoding, kernels, max_batch=chosen.batch, max_context=chosen.context, evidence=evidence)


def _tilings(kernels: KernelConfig, policy: Policy) -> list[TilingResult]:
    """Of the kernels that this rule's engine runs, those with a bucket that beats its default.

    All their buckets: the runtime takes the next larger one, so that a kept default must be said where a larger bucket
    has another tiling.
    """
    if kernels.engine != "graphs":
        return []
    decided = [t for t in policy.tilings if t.decision and t.subject.kernel in KERNELS]
    better = {t.subject.kernel for t in decided if t.decision and not t.decision.kept_default} - {OTHER_ENGINES}
    return [t for t in decided if t.subject.kernel in better]


def _tables(tilings: list[TilingResult]) -> dict[str, dict[int, dict[str, int]]]:
    """Kernel -> tokens -> tiling."""
    found: dict[str, dict[int, dict[str, int]]] = {}
    for tiling in tilings:
        assert tiling.decision is not None  # `_tilings` keeps decided ones
        found.setdefault(tiling.subject.kernel, {})[tiling.subject.tokens] = tiling.decision.tiling
    return found


TARGET = Target(
    name="native",
    engine="ridgepoint",
    file="one YAML file",
    loads="loads today",
    write=write,
    does="what runtime.generate follows: a rule per batch and context bucket, with its evidence",
    out="deployment.yaml",
)
