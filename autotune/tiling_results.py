"""What a search of a kernel's tilings holds, as plain data. Neither a search library nor torch is needed to read it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from autotune.objective import Outcome
from autotune.results import spearman
from hardware.files import UserError, build
from hardware.fingerprint import fingerprint_key
from runtime.statistics import paired_ratio

TILING_SCHEMA = 1
FOREIGN_KERNEL = "grouped_experts"  # tiled like other engines' own, for their files: our forward does not run it


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
    def simulated(self) -> str | None:
        """What of the routes was chosen by no model; None where nothing was, or there are none."""
        if self.routing == "uniform":
            return "uniform routing"
        return "routes of random tokens" if "random tokens" in self.routing else None

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
        return statistics.median(self.seconds) if self.seconds else float("inf")


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


def tile_table(results: Iterable[TilingResult]) -> dict[str, dict[int, dict[str, int]]]:
    """What was decided for the kernels of our forward, by tokens, as a `KernelConfig` takes it.

    Of a kernel where the default stays everywhere nothing is said. Elsewhere it is: without, the next larger bucket's
    tiling would serve there.
    """
    table: dict[str, dict[int, dict[str, int]]] = {}
    changed = set[str]()
    for result in results:
        kernel, decision = result.subject.kernel, result.decision
        if decision is not None and kernel != FOREIGN_KERNEL:
            table.setdefault(kernel, {})[result.subject.tokens] = decision.tiling
            changed |= set() if decision.kept_default else {kernel}
    return {kernel: found for kernel, found in table.items() if kernel in changed}


def read_tilings_file(path: str | Path) -> list[TilingResult]:
    """The searches of a `tilings.json` of benchmarks/gpu.sh. UserError for what is none."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise UserError(f"{path} must hold a list of searches of tilings")
    facts = [{k: v for k, v in one.items() if k != "rank_correlation"} for one in found]  # which follows from the rest
    return [build(TilingResult, one, f"{path}, search {place}") for place, one in enumerate(facts, 1)]
