"""What a study holds, as plain data: its subject, its trials, its decision. No search library is needed to read it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from autotune.objective import Comparison, Outcome
from autotune.seeding import Acceptance
from autotune.space import Candidate, Space, Value
from hardware.files import plain
from hardware.fingerprint import fingerprint_key
from perfmodel.acceptance import judged
from runtime.config import Workload, require
from runtime.statistics import paired_ratio

SCHEMA_VERSION = 2
NEAR = 0.7  # share of a speed from which on one measurement of each may be wrong about which of two is faster
_UNTIMED = ("system", "memory_bytes")  # facts of a device that do not change its times


@dataclass(frozen=True)
class Subject:
    """What a study's numbers belong to. Whoever adds trials must match all of it."""

    model: str
    model_hash: str
    device: dict[str, Any]  # hardware.fingerprint.fingerprint()
    workload: Workload
    prompts: str  # hash of the token ids
    space: Space
    simulated: str | None = None
    context: int | None = None  # bucket: the most cached tokens that its rule serves; None: any
    tilings: str | None = None  # hash of the tile table that forwards ran with; None: each kernel's default
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        require(
            self.schema_version == SCHEMA_VERSION,
            f"schema_version must be {SCHEMA_VERSION}, but is {self.schema_version}: tune again, into another place",
        )
        require(self.context is None or self.context >= 1, f"context >= 1 must hold, but got {self.context}")

    @property
    def name(self) -> str:
        """The study's name in its storage."""
        context = "" if self.context is None else f" context={self.context}"
        return f"{self.model} batch={self.workload.batch}{context}"

    def mismatch(self, other: Subject) -> str | None:
        """What differs from another subject, in words; None when trials of both may stand side by side."""
        if fingerprint_key(self.device) != fingerprint_key(other.device):
            names = sorted({*self.device, *other.device} - set(_UNTIMED))
            different = [n for n in names if self.device.get(n) != other.device.get(n)]
            facts = " and ".join(f"{n} {self.device.get(n)}, not {other.device.get(n)}" for n in different)
            # Devices are named though they are alike: whoever tunes with many machines looks for the one to blame.
            return facts if "device" in different else f"{facts} (both are {self.device.get('device')})"
        for name, what in (("model", "model"), ("model_hash", "model weights"), ("workload", "workload")):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{what} {mine}, not {theirs}"
        if self.context != other.context:
            return f"context {self.context}, not {other.context}"
        for name in ("prompts", "tilings"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} {mine or 'by default'}, not {theirs or 'by default'}"
        if self.space != other.space:
            return "another search space (lossless or not, other cores, another histogram, fewer samplers)"
        return None


@dataclass(frozen=True)
class TrialRecord:
    """One trial: what was set, predicted and found. A trial whose setting was already known has `same_as`."""

    number: int
    params: dict[str, Value]
    outcome: Outcome | None = None  # None: not finished
    stage: str = ""  # the last one entered
    reason: str = ""
    source: str = "search"  # default, pilot, seed, guided, search
    same_as: int | None = None
    predicted_tokens_per_second: float | None = None
    predicted_step_seconds: float | None = None
    predicted_tokens_per_step: float | None = None
    logit_error: float | None = None  # worst relative error of its forwards beside the eager reference
    step_seconds: float | None = None  # of one decoding step at the middle context
    tokens_per_second: float | None = None
    seconds: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()
    forwards: int = 0
    acceptance_histogram: tuple[int, ...] = ()
    experts_per_layer: float | None = None
    divergence: float | None = None
    exact_match: float | None = None
    worker: str = ""  # host:pid
    begun: str = ""  # UTC
    spent_seconds: float | None = None  # on this trial, all stages together

    @property
    def lossless(self) -> bool:
        """Whether it gives what autoregressive decoding gives, by construction (the quality stage has checked it)."""
        return float(self.params.get("mixing_weight", 1.0)) == 1 and bool(self.params.get("verify", True))

    @property
    def drafts(self) -> bool:
        """Whether it is not autoregressive decoding."""
        return self.params["sampler"] != "autoregressive"

    def near(self, other: TrialRecord) -> bool:
        """Whether it measured as fast as another one, faster, or so little slower that noise can have done it."""
        return _known(self.tokens_per_second) >= NEAR * _known(other.tokens_per_second)

    @property
    def acceptance_length(self) -> float | None:
        """Mean tokens committed per step; None without drafts."""
        steps = sum(self.acceptance_histogram)
        return 1 + sum(n * c for n, c in enumerate(self.acceptance_histogram)) / steps if steps else None


@dataclass(frozen=True)
class Decision:
    """Which setting to run: the fastest allowed one (the challenger) if it beats the default in alternating rounds."""

    trial: int
    default_trial: int
    challenger: int
    reason: str
    comparison: Comparison | None  # None: nothing measured near the default's speed, so nothing was compared
    max_divergence: float
    measured: int  # distinct settings tried before deciding
    command: str
    date: str

    @property
    def kept_default(self) -> bool:
        """Whether the default stays."""
        return self.trial == self.default_trial


def decision_words(
    result: StudyResult, base: TrialRecord, best: TrialRecord, found: Comparison | None, max_divergence: float
) -> str:
    """Why the fastest allowed trial is chosen, or the default is kept; and whether anything that drafts pays."""
    if found is None:
        words = "no allowed setting measured near the default's speed"
    elif found.low > 1:
        words = "faster than the default in alternating rounds"
    elif found.high < 1:
        words = "slower than the default in alternating rounds"
    else:
        words = f"the {'gain over' if found.ratio > 1 else 'difference from'} the default is inside the noise"
    chosen = best if found is not None and found.low > 1 else base
    if chosen.drafts:
        return words
    if not any(t.drafts for t in result.measured):
        return f"{words}; nothing that drafts was tried"
    beaten = best if found is not None and found.high < 1 else None
    unclear = any(t.drafts and t.near(chosen) and t != beaten for t in result.allowed(max_divergence))
    return f"{words}; autoregressive decoding is {'kept' if unclear else 'best here'}"


def comparison_of(pairs: Sequence[Sequence[float]]) -> Comparison:
    """What alternating rounds say; a pair is the tokens per second of (default, challenger)."""
    default, challenger = zip(*pairs, strict=True)
    medians = statistics.median(challenger), statistics.median(default)
    return Comparison(*medians, *paired_ratio(challenger, default), len(pairs))


@dataclass(frozen=True)
class StudyResult:
    """A study as it stands."""

    name: str
    subject: Subject
    trials: tuple[TrialRecord, ...]
    decision: Decision | None = None

    @property
    def measured(self) -> tuple[TrialRecord, ...]:
        """The finished trials, each setting once, whatever came of it."""
        return tuple(t for t in self.trials if t.outcome is not None and t.same_as is None)

    @property
    def correct(self) -> tuple[TrialRecord, ...]:
        """The settings that ran and were right: those with a speed and a divergence."""
        return tuple(t for t in self.measured if t.outcome == "correct")

    def candidate(self, trial: TrialRecord) -> Candidate:
        """The setting of a trial."""
        return self.subject.space.candidate(trial.params)

    def trial(self, number: int) -> TrialRecord:
        """The trial of that number."""
        return next(t for t in self.trials if t.number == number)

    def find(self, candidate: Candidate) -> TrialRecord | None:
        """What is known of a setting; None when it was not measured yet."""
        space = self.subject.space
        key = space.key(candidate)
        return next((t for t in self.measured if space.key(self.candidate(t)) == key), None)

    def allowed(self, max_divergence: float) -> list[TrialRecord]:
        """Settings that are lossless, or measured no further from autoregressive decoding; the fastest first.

        At 0 only lossless ones: a mixed setting without a difference on a few prompts has proven nothing.
        """
        found = [t for t in self.correct if t.lossless or 0 < max_divergence >= _known(t.divergence)]
        return sorted(found, key=lambda t: -_known(t.tokens_per_second))

    def challengers(self, base: TrialRecord, max_divergence: float) -> list[TrialRecord]:
        """Allowed settings to compare the default with, the fastest first: those that measured near it or faster."""
        return [t for t in self.allowed(max_divergence) if t != base and t.near(base)]

    def best_autoregressive(self) -> TrialRecord | None:
        """The fastest setting without drafts, so that a gain over the default is not taken for one of drafting."""
        found = [t for t in self.allowed(0.0) if t.params["sampler"] == "autoregressive"]
        return found[0] if found else None

    def front(self) -> list[TrialRecord]:
        """The Pareto front: settings that no other beats in both speed and divergence; the fastest first."""
        ranked = sorted(self.correct, key=lambda t: (-_known(t.tokens_per_second), _known(t.divergence)))
        found: list[TrialRecord] = []
        for trial in ranked:
            if not found or _known(trial.divergence) < _known(found[-1].divergence):
                found.append(trial)
        return found

    def acceptance(self) -> Acceptance | None:
        """What the pilots counted; None before one has run."""
        pilots = [(t, self.candidate(t).decoding) for t in self.correct if t.source in ("default", "pilot")]
        drafting = [(t, d) for t, d in pilots if judged(d) and any(t.acceptance_histogram)]
        if not drafting:
            return None
        experts = {}
        for trial, decoding in pilots:
            if decoding.lossless and trial.experts_per_layer:
                experts[float(self.subject.workload.batch * decoding.slots)] = trial.experts_per_layer
        return Acceptance(
            {decoding.mixing_weight: t.acceptance_histogram for t, decoding in drafting},
            tuple(sorted(experts.items())),
        )

    def scored(self) -> list[tuple[float, float]]:
        """(predicted, measured) tokens per second wherever there are both."""
        pairs = ((t.predicted_tokens_per_second, t.tokens_per_second) for t in self.correct)
        return [(p, m) for p, m in pairs if p is not None and m is not None]

    def rank_correlation(self) -> float | None:
        """Spearman's correlation of predicted and measured speeds; None for fewer than three, or all alike."""
        return spearman(self.scored())


def spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's rank correlation, ties sharing their mean rank; None where it is not defined."""
    if len(pairs) < 3 or any(len(set(column)) < 2 for column in zip(*pairs, strict=True)):
        return None
    ranks = [_ranks(column) for column in zip(*pairs, strict=True)]
    return float(np.asarray(np.corrcoef(ranks))[0, 1])


def _ranks(values: Sequence[float]) -> npt.NDArray[np.float64]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]


def _known(value: float | None) -> float:
    assert value is not None  # a correct trial has passed every stage
    return value


def summary(result: StudyResult) -> dict[str, Any]:
    """A study for printing: its trials, front and decision, and how well predictions ranked what was measured."""
    decision = result.decision
    single = result.best_autoregressive()
    errors = [abs(predicted / measured - 1) for predicted, measured in result.scored()]
    return {
        "name": result.name,
        "subject": {k: v for k, v in plain(result.subject).items() if k != "space"},
        "trials": [
            {**plain(t), "acceptance_length": t.acceptance_length, "lossless": t.lossless} for t in result.trials
        ],
        "measured": len(result.measured),
        "outcomes": dict(Counter(t.outcome for t in result.measured)),
        "front": [t.number for t in result.front()],
        "best_autoregressive": single.number if single else None,
        "best_lossless": next((t.number for t in result.allowed(0.0)), None),
        "decision": {**plain(decision), "kept_default": decision.kept_default} if decision else None,
        "predictions": {
            "count": len(errors),
            "rank_correlation": result.rank_correlation(),
            "median_absolute_error": statistics.median(errors) if errors else None,
        },
    }
