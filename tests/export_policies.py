"""Policies for the tests of exports: studies and tilings as tuning leaves them, with any settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st

from autotune.export.policy import Policy
from autotune.objective import Comparison
from autotune.results import Decision, StudyResult, Subject, TrialRecord
from autotune.space import Candidate, decoding_space
from autotune.tiling_results import TilingDecision, TilingResult, TilingSubject, TilingTrial
from runtime.config import DecodingConfig, KernelConfig, Workload

GPU = {
    "device": "NVIDIA H100 80GB HBM3",
    "cpu": "a host",
    "cores": 8,
    "python": "3.11",
    "torch": "2.9",
    "triton": "3.6.0",
}
GRAPHS = KernelConfig(engine="graphs")
TILE = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1, "num_warps": 4, "num_stages": 4}
WIDE = TILE | {"BLOCK_SIZE_M": 64, "num_warps": 8}


@dataclass(frozen=True)
class Decided(StudyResult):
    """A study whose trials have these settings: the space that is searched today need not hold them."""

    settings: tuple[Candidate, ...] = ()

    def candidate(self, trial: TrialRecord) -> Candidate:
        return self.settings[trial.number]


def study(
    decoding: DecodingConfig,
    kernels: KernelConfig = GRAPHS,
    *,
    batch: int = 1,
    context: int | None = None,
    simulated: str | None = None,
    **changes: Any,
) -> Decided:
    """A decided study of two trials: the autoregressive default, and what was chosen (the default, if that it is)."""
    subject = Subject(
        "zaya1-8b",
        "0123456789abcdef",
        GPU,
        Workload(batch, 100, 50, "bfloat16"),
        "prompts",
        decoding_space(batch=batch, cores=1),
        simulated=simulated,
        context=context,
    )
    default = Candidate(decoding.autoregressive, kernels)
    chosen = int(decoding != default.decoding)
    trials = tuple(
        TrialRecord(
            number,
            {"sampler": "autoregressive" if number == 0 else decoding.sampler},
            outcome="correct",
            predicted_tokens_per_second=90.0 + number,
            predicted_step_seconds=0.011,
            tokens_per_second=100.0 * (1 + number),
            step_seconds=0.01 * (1 + number),
            acceptance_histogram=(1, 2, 3) if number else (),
            divergence=0.0,
        )
        for number in range(2 if chosen else 1)
    )
    decision = Decision(
        trial=chosen,
        default_trial=0,
        challenger=chosen,
        reason="faster than the default in alternating rounds",
        comparison=Comparison(200.0, 100.0, 2.0, 1.9, 2.1, 8) if chosen else None,
        max_divergence=0.0,
        measured=len(trials),
        command="ridgepoint tune --model zaya1-8b",
        date="2026-11-21T10:00:00Z",
    )
    settings = (default, Candidate(decoding, kernels))
    return replace(Decided(subject.name, subject, trials, decision, settings), **changes)


def tiling(tokens: int = 16, tile: dict[str, int] = TILE, *, default: bool = False, **changes: Any) -> TilingResult:
    """A decided tiling of the fused-MoE kernel."""
    about: dict[str, Any] = {
        "kernel": "grouped_experts",
        "model": "zaya1-8b",
        "config_hash": "e6be17235664",
        "device": GPU,
        "dtype": "bfloat16",
        "batch": 1,
        "slots": tokens,
        "context": 1024,
        "routing": "recorded",
        "triton": "3.6.0",
        "experts": 16,
        "expert_width": 2048,
    }
    subject = TilingSubject(**about | changes)
    trials = (
        TilingTrial(0, dict(WIDE), outcome="correct", seconds=(2e-5, 2.1e-5)),
        TilingTrial(1, dict(tile), outcome="correct", seconds=(1e-5, 1.1e-5)),
    )
    decision = TilingDecision(
        tiling=dict(WIDE if default else tile),
        default=dict(WIDE),
        ratio=2.0,
        low=1.9,
        high=2.1,
        rounds=10,
        reason="faster than the default in alternating rounds",
        kept_default=default,
        command="ridgepoint tune --what tilings",
        date="2026-11-21T10:00:00Z",
    )
    return TilingResult(subject.name, subject, trials, decision)


@st.composite
def decodings(draw: st.DrawFn, sampler: str | None = None) -> DecodingConfig:
    """Any settings, of one sampler or of all."""
    kind = sampler or draw(
        st.sampled_from(["autoregressive", "two_forward", "single_forward", "denoising", "denoising"])
    )
    temperature = draw(st.sampled_from([0.0, 0.0, 0.7, 1.0]))
    if kind == "autoregressive":
        return DecodingConfig(temperature=temperature)
    k = draw(st.integers(1, 24))
    verified: dict[str, Any] = {
        "mixing_weight": draw(st.sampled_from([1.0, 1.0, 0.6])),
        "draft_temperature": draw(st.sampled_from([0.0, 0.5])),
    }
    if kind == "two_forward":
        own: dict[str, Any] = {"anchor_draft": draw(st.booleans()), **verified}
    elif kind == "single_forward":
        levels = draw(st.none() | st.sets(st.integers(1, k)).map(lambda found: (0, *sorted(found))))
        own = {"proposal_levels": levels, **verified}
    else:
        steps = draw(st.sampled_from([1, k, k, draw(st.integers(1, k))]))
        own = {
            "denoising_steps": steps,
            "confidence_threshold": draw(st.sampled_from([None, 0.0, 0.3, 0.7, 0.9, 1.0])),
            "verify": draw(st.sampled_from([False, False, False, True])),
        }
        if own["verify"]:
            own |= {**verified, "draft_temperature": 0.0}
    return DecodingConfig(kind, draft_tokens=k, temperature=temperature, **own)


def policy(*results: StudyResult | TilingResult) -> Policy:
    """As the command makes it."""
    studies = [r for r in results if isinstance(r, StudyResult)]
    tilings = [r for r in results if isinstance(r, TilingResult)]
    return Policy(studies, tilings, "ridgepoint export")
