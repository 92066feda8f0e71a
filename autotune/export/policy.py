"""What is exported: decided studies and tilings; and what an export target is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hardware.files import UserError

if TYPE_CHECKING:
    from autotune.results import StudyResult

Loads = Literal["loads today", "needs a fork"]


@dataclass(frozen=True)
class Policy:
    """The decided studies of one model on one device, the tilings of its kernels, and the command that exports them."""

    studies: Sequence[StudyResult] = ()
    tilings: Sequence[Any] = ()  # autotune.tilings.TilingResult
    command: str = ""

    def select(self, batch: int | None = None, context: int | None = None) -> Policy:
        """Only the buckets of this batch or context, for engines that take one setting. UserError names those there."""

        def asked(found: int, cached: int | None) -> bool:
            return (batch is None or found == batch) and (context is None or cached == context)

        chosen = replace(
            self,
            studies=[s for s in self.studies if asked(s.subject.workload.batch, s.subject.context)],
            tilings=[t for t in self.tilings if asked(t.subject.batch, t.subject.context)],
        )
        if not chosen.studies and not chosen.tilings:
            wanted = " ".join(f"{n}={v}" for n, v in (("batch", batch), ("context", context)) if v is not None)
            raise UserError(f"nothing was tuned for {wanted}; known: {', '.join(self.names)}")
        return chosen

    @property
    def names(self) -> list[str]:
        """Of everything in it."""
        return [result.name for result in (*self.studies, *self.tilings)]


@dataclass(frozen=True)
class Target:
    """One export format, for `export --list` and the registry.

    engine: what reads the files. file: what is written, in words. does: what it says, in a line. loads: whether a
    release of the engine reads it, or a fork is needed. write: returns the files written; UserError names what the
    format cannot represent.
    """

    name: str
    engine: str
    file: str
    loads: Loads
    does: str
    write: Callable[[Policy, Path], list[Path]]
