"""The export targets by name: each is one file with `export(results, out, command) -> path`, and one line here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from autotune.export import native
from autotune.results import StudyResult
from hardware.files import known

TARGETS: dict[str, Callable[[Sequence[StudyResult], Path, str], Path]] = {
    "native": native.export,
}


def export(target: str, results: Sequence[StudyResult], out: Path, command: str = "") -> Path:
    """Write what was decided in a target's format. UserError lists the known targets."""
    if target not in TARGETS:
        raise known("export format", target, TARGETS)
    return TARGETS[target](results, out, command)
