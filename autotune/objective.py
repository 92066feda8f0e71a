"""One trial: a setting goes through stages, each of which may end it with a named outcome.

Whatever a stage finds is stored at once, so that nothing measured is lost with what comes after it. This module and
what it imports load no search library: device machines need none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from autotune.space import Candidate
from hardware.files import UserError
from runtime.config import DecodingConfig
from runtime.measurement import Measurement

Outcome = Literal["correct", "infeasible", "compile", "timeout", "runtime", "incorrect", "slower"]
Outputs = Sequence[Sequence[int]]
DEVICE_ERRORS = (RuntimeError, MemoryError, OSError)  # what a device or its driver raises
DECODING_STAGES = ("feasibility", "numerics", "micro_benchmark", "decode", "quality")
# Share of a lossless setting's tokens that may differ from the autoregressive ones: a batched forward sums in another
# order, so that near ties fall the other way. More than that is a broken kernel or sampler, however fast.
ROUNDING_DIVERGENCE = 0.01
# How much less a step may take in decoding than in the micro-benchmark: contexts begin shorter than the middle one, and
# a timer has its noise.
STEP_MARGIN = 1.25


@dataclass(frozen=True)
class Comparison:
    """A setting against the default in alternating rounds: median of the rounds' ratios with its 95% interval."""

    tokens_per_second: float
    default_tokens_per_second: float
    ratio: float
    low: float
    high: float
    rounds: int


class StageFailure(Exception):
    """A setting's trial ends here, with an outcome that is not a speed. It can be sent between processes.

    findings: what the stage found nevertheless, kept with the trial.
    """

    def __init__(self, outcome: Outcome, reason: str, findings: Mapping[str, Any] | None = None) -> None:
        super().__init__(outcome, reason, dict(findings or {}))  # `args` is what a pickle keeps
        self.outcome, self.reason, self.findings = outcome, reason, dict(findings or {})

    def __str__(self) -> str:
        return f"{self.outcome}: {self.reason}"


class Unavailable(UserError):
    """There is nothing to run settings on: the process that has the model does not start. No setting's fault."""


class Runner(Protocol):
    """Where trials run: this machine, a process of its own on it, or a table of recorded results.

    Every method may raise StageFailure, or UserError for a setting that cannot be had.
    """

    def infeasible(self, candidate: Candidate) -> str | None:
        """Why it cannot run, as far as can be known without running it; None when it may."""

    def numerics(self, candidate: Candidate) -> dict[str, float]:
        """`logit_error`: worst relative error of its forwards beside the eager reference, odd shapes included.

        StageFailure "incorrect" beyond the tolerance, "compile" where it cannot be built.
        """

    def micro_benchmark(self, candidate: Candidate) -> float:
        """Seconds of one decoding step, all its forwards, at the workload's middle context; warms up too."""

    def measure(self, candidate: Candidate) -> tuple[Measurement, Outputs]:
        """Decode the workload. RuntimeError when it cannot."""

    def quality(self, outputs: Outputs) -> dict[str, float]:
        """`divergence`: share of tokens that autoregressive decoding would not give; `exact_match` where known."""

    def pair(self, default: Candidate, candidate: Candidate) -> tuple[float, float]:
        """Tokens per second of (default, candidate), one after the other: one alternating round, both warm."""

    def close(self) -> None:
        """Give back what it holds. It is not used again."""


Stage = Callable[[], dict[str, Any]]
Store = Callable[[str, dict[str, Any]], None]


def run_stages(
    stages: Mapping[str, Stage], store: Store, known: Mapping[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Run the stages in order; all their findings and the result. `store(stage, findings)` keeps each at once.

    known: findings of stages that an earlier, lost run of the same trial had stored; these are not run again.
    The result, stored last under that name, is the outcome, the last stage entered, and the reason. A StageFailure
    names its outcome; a UserError is "infeasible"; RuntimeError, MemoryError and OSError are the device's: "runtime".
    Unavailable ends the search, not the setting, and is raised, as any other exception is: a bug.
    """
    known = known or {}
    findings = dict[str, Any]()
    result: dict[str, Any] = {"outcome": "correct", "stage": "", "reason": ""}
    for name, stage in stages.items():
        result["stage"] = name
        try:
            found = known[name] if name in known else stage()
        except StageFailure as failure:
            result |= {"outcome": failure.outcome, "reason": failure.reason}
            told = {k: v for k, v in failure.findings.items() if v == v}  # an error that is NaN is no number to keep
            if told:
                store(name, told)
                findings |= told
        except Unavailable:
            raise
        except UserError as error:
            result |= {"outcome": "infeasible", "reason": str(error)}
        except DEVICE_ERRORS as error:
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


def most_tokens_of(decoding: DecodingConfig) -> float:
    """The most tokens that a sequence can commit in the time of a full step.

    A confidence threshold can end a block after its first forward, though the micro-benchmark may have timed them all.
    """
    early = decoding.forwards_per_step / (1 + decoding.verify) if decoding.confidence_threshold is not None else 1.0
    return decoding.kept_slots * early


def slowdown(runner: Runner, candidate: Candidate, step_seconds: float | None) -> float:
    """How many times longer its step takes now than when it was measured: something else may keep the machine busy.

    Infinite where that cannot be told; 1 where it takes less.
    """
    try:
        return max(1.0, runner.micro_benchmark(candidate) / step_seconds) if step_seconds else math.inf
    except Unavailable:
        raise
    except (StageFailure, UserError, *DEVICE_ERRORS):
        return math.inf


def decoding_stages(
    candidate: Candidate,
    runner: Runner,
    best: float,
    most_tokens: float,
    outputs: Outputs | None = None,
    slowed: Callable[[], float] = lambda: 1.0,
) -> dict[str, Stage]:
    """The stages of a decoding trial, by the names of DECODING_STAGES.

    best: tokens/s of the fastest known lossless setting (0: none is known, or this one is measured in any case).
    most_tokens: of all sequences in one step. A setting that would be slower than `best` even if each step committed
    so many is dominated, and ends as "slower" before it is measured in full.
    slowed: asked before that, how many times slower the machine is now than when `best` was measured.
    outputs: those that a known decode stage had stored.
    """
    decoded: list[Outputs] = [] if outputs is None else [outputs]

    def feasibility() -> dict[str, Any]:
        reason = runner.infeasible(candidate)
        if reason is not None:
            raise StageFailure("infeasible", reason)
        return {}

    def numerics() -> dict[str, Any]:
        return dict(runner.numerics(candidate))

    def micro_benchmark() -> dict[str, Any]:
        found = {"step_seconds": runner.micro_benchmark(candidate)}
        most = most_tokens / found["step_seconds"]
        if most * STEP_MARGIN < best and most * slowed() * STEP_MARGIN < best:
            reason = f"if every draft were accepted, {most:.3g} tokens/s; the fastest lossless setting has {best:.3g}"
            raise StageFailure("slower", reason, found)
        return found

    def decode() -> dict[str, Any]:
        measurement, found = runner.measure(candidate)
        decoded.append(found)
        return {
            "tokens_per_second": measurement.tokens_per_second,
            "seconds": list(measurement.seconds),
            "tokens": list(measurement.tokens),
            "forwards": measurement.forwards,
            "acceptance_histogram": list(measurement.acceptance_histogram),
            "experts_per_layer": measurement.experts_per_layer,
            "outputs": [list(o) for o in found],
        }

    def quality() -> dict[str, Any]:
        found = runner.quality(decoded[-1])
        if candidate.decoding.lossless and found["divergence"] > ROUNDING_DIVERGENCE:
            raise StageFailure(
                "incorrect",
                f"a lossless setting gave {found['divergence']:.1%} tokens that autoregressive decoding does not give",
            )
        return dict(found)

    stages = (feasibility, numerics, micro_benchmark, decode, quality)
    return dict(zip(DECODING_STAGES, stages, strict=True))
