"""The export targets by name: each is one file with a `TARGET`, and one line here.

What a format cannot represent is refused by name; what was simulated is labelled in every file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from autotune.export import native
from autotune.export.policy import Policy, Target
from autotune.results import StudyResult
from hardware.files import UserError, known

TARGETS: dict[str, Target] = {target.name: target for target in (native.TARGET,)}


def write(target: str, policy: Policy, out: Path) -> list[Path]:
    """Write what was decided in a target's format: the files written. UserError lists the known targets."""
    if target not in TARGETS:
        raise known("export format", target, TARGETS)
    if not policy.studies and not policy.tilings:
        raise UserError("an export needs at least one study or tiling, but the place holds none")
    return TARGETS[target].write(policy, out)


def export(target: str, results: Sequence[StudyResult], out: Path, command: str = "") -> Path:
    """`write` for studies alone: the first file."""
    return write(target, Policy(results, command=command), out)[0]
