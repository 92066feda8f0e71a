"""What a search of a kernel's tilings holds, as plain data. Neither a search library nor torch is needed to read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from autotune.objective import Outcome
from autotune.results import spearman
from hardware.fingerprint import fingerprint_key
from runtime.statistics import paired_ratio

TILING_SCHEMA = 1


@dataclass(frozen=True)
class TilingSubject:
    """What the times of tilings belong to: a kernel at one token count (a bucket) of one model on one device.

    config_hash: of the model's config, which decides all sizes. batch, slots: the forward of `tokens` tokens that is
    timed. routing: where the experts' routes came from, in words ("" for a kernel that has none). triton: its version;
    None where the kernel is not one of Triton's.
    """

    kernel: str
    model: str
    config_hash: str
    device: dict[str, Any]  # hardware.fingerprint.fingerprint()
    dtype: str
    batch: int
    slots: int
    context: int
    routing: str
    triton: str | None
    schema_version: int = TILING_SCHEMA
    experts: int = 0  # of the model, by which other engines name their tile files; 0: not said
    expert_width: int = 0  # behind the gate

    @property
    def tokens(self) -> int:
        """Of the forward, all sequences together: the bucket."""
        return self.batch * self.slots

    @property
    def name(self) -> str:
        """The study's name in its storage."""
        return f"{self.model} {self.kernel} tokens={self.tokens} {self.dtype}"

    def mismatch(self, other: TilingSubject) -> str | None:
        """What differs from another subject, in words; None when trials of both may stand side by side."""
        for name in ("schema_version", "config_hash", "batch", "slots", "context", "routing", "triton"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name.replace('_', ' ')} {mine!r}, not {theirs!r}"
        if fingerprint_key(self.device) != fingerprint_key(other.device):
            names = sorted({*self.device, *other.device} - {"system", "memory_bytes"})
            different = [n for n in names if self.device.get(n) != other.device.get(n)]
            return " and ".join(f"{n} {self.device.get(n)}, not {other.device.get(n)}" for n in different)
        return None


@dataclass(frozen=True)
class TilingTrial:
    """One tiling: what was predicted and found. seconds: of one call, a sample per round. errors: the worst relative
    error of each output over the bucket's problem and odd ones."""

    number: int
    tiling: dict[str, int]
    outcome: Outcome | None = None  # None: not finished
    stage: str = ""  # the last one entered
    reason: str = ""
    predicted_seconds: float | None = None
    seconds: tuple[float, ...] = ()
    errors: dict[str, float] = field(default_factory=dict)
    worker: str = ""  # host:pid

    @property
    def median_seconds(self) -> float:
        """Median of the samples; infinite without any."""
        ordered = sorted(self.seconds)
        middle = len(ordered) // 2
        if not ordered:
            return float("inf")
        return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


@dataclass(frozen=True)
class TilingDecision:
    """Which tiling a bucket runs with: the fastest right one if it beats the default in alternating rounds.

    ratio: median of default's over this tiling's seconds, above 1 where it is faster, with its 95% interval; None where
    there was nothing to compare.
    """

    tiling: dict[str, int]
    default: dict[str, int]
    ratio: float | None
    low: float | None
    high: float | None
    rounds: int
    reason: str
    kept_default: bool
    command: str
    date: str
    challenger: dict[str, int] = field(default_factory=dict)  # the fastest right one
    measured: int = 0  # finished tilings before deciding


@dataclass(frozen=True)
class TilingResult:
    """A search as it stands. untried: tilings that the model ranked below those that were kept, not run."""

    name: str
    subject: TilingSubject
    trials: tuple[TilingTrial, ...]
    decision: TilingDecision | None = None
    untried: int = 0

    @property
    def finished(self) -> tuple[TilingTrial, ...]:
        """Trials with an outcome, each tiling once."""
        return tuple(t for t in self.trials if t.outcome is not None)

    @property
    def correct(self) -> tuple[TilingTrial, ...]:
        """Those that ran and were right, the fastest first."""
        return tuple(sorted((t for t in self.trials if t.outcome == "correct"), key=lambda t: t.median_seconds))

    @property
    def best(self) -> TilingTrial | None:
        """The fastest right one; None before there is one. What to run is the decision's."""
        return self.correct[0] if self.correct else None

    def find(self, tiling: dict[str, int]) -> TilingTrial | None:
        """What is known of a tiling."""
        return next((t for t in self.finished if t.tiling == tiling), None)

    def rank_correlation(self) -> float | None:
        """Spearman's, of predicted and measured seconds; None for fewer than three, or all alike."""
        return spearman([(t.predicted_seconds, t.median_seconds) for t in self.correct if t.predicted_seconds])


def decision_of(
    default: dict[str, int],
    best: dict[str, int],
    pairs: Sequence[tuple[float, float]],
    default_runs: bool,
    broken: str,
    measured: int,
    command: str,
) -> TilingDecision:
    """What to run: the fastest right tiling if it beats the default in the pairs (seconds of default and of it).

    broken: why there are no pairs where some were wanted: where the default does not run, the fastest that does serves;
    where the comparison broke, the default stays.
    """
    ratio = low = high = None
    kept, reason = default_runs, broken or "no right tiling measured faster than the default"
    if pairs and not broken:
        ratio, low, high = paired_ratio([a for a, _ in pairs], [b for _, b in pairs])
        kept = low <= 1
        reason = "the gain over the default is inside the noise" if kept else "faster than the default in pairs"
    return TilingDecision(
        tiling=default if kept else best,
        default=default,
        ratio=ratio,
        low=low,
        high=high,
        rounds=len(pairs),
        reason=reason,
        kept_default=kept,
        command=command,
        date=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        challenger=best,
        measured=measured,
    )
