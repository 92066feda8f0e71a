"""One trial: a setting goes through stages, each of which may end it with a named outcome.

Whatever a stage finds is stored at once, so that nothing measured is lost with what comes after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from autotune.space import Candidate
from hardware.files import UserError
from runtime.measurement import Measurement

Outcome = Literal["correct", "infeasible", "runtime", "incorrect", "slower"]
Outputs = Sequence[Sequence[int]]
# Share of a lossless setting's tokens that may differ from the autoregressive ones: a batched forward sums in another
# order, so that near ties fall the other way. More than that is a broken kernel or sampler, however fast.
ROUNDING_DIVERGENCE = 0.01
# Below this share of the best speed so far, one batch is enough to know: a full measurement would cost the most there.
_HOPELESS = 0.2


@dataclass(frozen=True)
class Comparison:
    """A setting against the default in alternating rounds: median of the rounds' ratios with its 95% interval."""

    tokens_per_second: float
    default_tokens_per_second: float
    ratio: float
    low: float
    high: float
    rounds: int


class Runner(Protocol):
    """Where trials run: this machine, or a table of recorded results."""

    def infeasible(self, candidate: Candidate) -> str | None:
        """Why it cannot run, as far as can be known without running it; None when it may."""

    def warm_up(self, candidate: Candidate) -> float:
        """Tokens per second of one batch, whatever comes with a first run included."""

    def measure(self, candidate: Candidate) -> tuple[Measurement, Outputs]:
        """Decode the workload. RuntimeError or UserError when it cannot."""

    def quality(self, outputs: Outputs) -> dict[str, float]:
        """`divergence`: share of tokens that autoregressive decoding would not give; `exact_match` where known."""

    def compare(
        self, default: Candidate, candidate: Candidate, rounds: int, progress: Callable[[float], None]
    ) -> Comparison:
        """Alternate the two. progress: called with the share that is done."""


class StageFailure(Exception):
    """A setting's trial ends here, with an outcome that is not a speed."""

    def __init__(self, outcome: Outcome, reason: str) -> None:
        super().__init__(reason)
        self.outcome, self.reason = outcome, reason


@dataclass
class Progress:
    """What later stages need from earlier ones, within one trial, and the best speed of earlier trials."""

    candidate: Candidate
    best_tokens_per_second: float = 0.0
    outputs: Outputs = ()


Stage = Callable[[Runner, Progress], dict[str, Any]]


def feasibility(runner: Runner, progress: Progress) -> dict[str, Any]:
    """Does it fit, and can the model do it?"""
    reason = runner.infeasible(progress.candidate)
    if reason is not None:
        raise StageFailure("infeasible", reason)
    return {}


def warm_up(runner: Runner, progress: Progress) -> dict[str, Any]:
    """Is it worth measuring?"""
    speed, best = runner.warm_up(progress.candidate), progress.best_tokens_per_second
    if speed < _HOPELESS * best:
        raise StageFailure("slower", f"one batch ran at {speed:.3g} tokens/s, the best setting at {best:.3g}")
    return {}


def decode(runner: Runner, progress: Progress) -> dict[str, Any]:
    """How fast does it decode?"""
    measurement, progress.outputs = runner.measure(progress.candidate)
    return {
        "tokens_per_second": measurement.tokens_per_second,
        "seconds": list(measurement.seconds),
        "tokens": list(measurement.tokens),
        "forwards": measurement.forwards,
        "acceptance_histogram": list(measurement.acceptance_histogram),
        "experts_per_layer": measurement.experts_per_layer,
    }


def quality(runner: Runner, progress: Progress) -> dict[str, Any]:
    """How far is it from autoregressive decoding, and are its answers right?"""
    found = runner.quality(progress.outputs)
    divergence = found["divergence"]
    if progress.candidate.decoding.lossless and divergence > ROUNDING_DIVERGENCE:
        raise StageFailure(
            "incorrect", f"a lossless setting gave {divergence:.1%} tokens that autoregressive decoding does not give"
        )
    return found


STAGES: dict[str, Stage] = {"feasibility": feasibility, "warm_up": warm_up, "decode": decode, "quality": quality}


def evaluate(
    candidate: Candidate,
    runner: Runner,
    store: Callable[[str, dict[str, Any]], None],
    best_tokens_per_second: float = 0.0,
) -> dict[str, Any]:
    """Run the stages in order; all findings. `store(stage, findings)` keeps each as soon as it is known, "result" last.

    best_tokens_per_second: of earlier trials; a setting that is hopeless beside it is not measured in full.
    A UserError or RuntimeError of a stage concerns this setting alone; any other exception is a bug and is raised.
    """
    progress, findings = Progress(candidate, best_tokens_per_second), dict[str, Any]()
    result: dict[str, Any] = {"outcome": "correct", "reason": ""}
    for name, stage in STAGES.items():
        result["stage"] = name
        try:
            found = stage(runner, progress)
        except StageFailure as failure:
            result |= {"outcome": failure.outcome, "reason": failure.reason}
        except UserError as error:
            result |= {"outcome": "infeasible", "reason": str(error)}
        except (RuntimeError, MemoryError) as error:
            result |= {"outcome": "runtime", "reason": f"{type(error).__name__}: {error}"}
        else:
            if found:
                store(name, found)
                findings |= found
            continue
        result["reason"] = " ".join(result["reason"].split())[:500]
        break
    store("result", result)
    return findings | result
