"""The tuned policy: written by autotune, followed by the runtime. Torch-free.

Schema version 1 holds an ordered list of rules; the first whose bounds hold the batch and the context serves.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hardware.files import build, plain, read_yaml, write_atomic
from runtime.config import DecodingConfig, KernelConfig, require

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Rule:
    """Serves up to `max_batch` active sequences, the longest of up to `max_context` tokens at present (None: any)."""

    decoding: DecodingConfig
    kernels: KernelConfig
    max_batch: int | None = None
    max_context: int | None = None
    evidence: dict[str, Any] = field(default_factory=dict)  # measured tokens/s, default's, interval, study, trial

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_context"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} >= 1 must hold, but got {value}")


@dataclass(frozen=True)
class Deployment:
    """A model's tuned settings on one device, with the fingerprint they were measured under."""

    model: str
    model_hash: str
    fingerprint: dict[str, Any]
    rules: tuple[Rule, ...]
    created: str
    command: str
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        require(
            self.schema_version == SCHEMA_VERSION,
            f"schema_version must be {SCHEMA_VERSION}, but is {self.schema_version}",
        )
        require(len(self.rules) >= 1, "rules must have at least one entry")

    def rule_for(self, batch: int, context: int) -> Rule:
        """The first rule that holds this batch and context; beyond the largest, the largest."""
        return rule_for(self.rules, batch, context)


def rule_for(rules: Sequence[Rule], batch: int, context: int) -> Rule:
    """The first rule that holds this batch and context.

    A batch beyond all rules counts as the largest that one holds; then the same for the context, of those that hold the
    batch. So the largest tuned bucket serves what is larger.
    """
    batch = _within(batch, [rule.max_batch for rule in rules])
    fitting = [rule for rule in rules if rule.max_batch is None or batch <= rule.max_batch]
    context = _within(context, [rule.max_context for rule in fitting])
    return next(rule for rule in fitting if rule.max_context is None or context <= rule.max_context)


def _within(value: int, bounds: Sequence[int | None]) -> int:
    """The value, or the largest bound where all are smaller (None: none is)."""
    known = [bound for bound in bounds if bound is not None]
    return min(value, max(known)) if len(known) == len(bounds) else value


def save_deployment(deployment: Deployment, path: str | os.PathLike[str]) -> Path:
    """Write the deployment as YAML under a temporary name, then rename."""
    return write_atomic(path, yaml.safe_dump(plain(deployment), sort_keys=False))


def load_deployment(path: str | os.PathLike[str]) -> Deployment:
    """Read a deployment strictly. Raises UserError for unknown keys, other schema versions and impossible settings."""
    return build(Deployment, read_yaml(path), str(path))
