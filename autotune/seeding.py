"""What the performance model says of settings before they are run: where a search begins, and its own score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from autotune.space import LEAST_MIXING_WEIGHT, MAX_DRAFT_TOKENS, Candidate, Space, shortened
from perfmodel.acceptance import judged, tokens_per_step
from runtime.config import DecodingConfig, Engine, ExpertMode, KernelConfig, Workload, replace
from runtime.levels import steady_tokens

if TYPE_CHECKING:
    import numpy.typing as npt

    from hardware.profile import HardwareProfile
    from perfmodel.engine import EngineProfile
    from perfmodel.experts import ExpertCoverage
    from perfmodel.model_spec import ModelSpec

_PILOT_MIXING_WEIGHTS = (1.0, 0.5, LEAST_MIXING_WEIGHT)


@dataclass(frozen=True)
class Acceptance:
    """What the pilots recorded: by mixing weight, how many steps accepted n of MAX_DRAFT_TOKENS drafts.

    experts: (tokens of a forward, distinct experts of a layer) pairs, for the expert coverage of predictions.
    """

    histograms: dict[float, tuple[int, ...]]
    experts: tuple[tuple[float, float], ...] = field(default=())

    def length(self, decoding: DecodingConfig) -> float:
        """Expected tokens per step: 1 + sum over j <= K of the share of steps that accepted at least j drafts.

        A shorter draft is taken to be the beginning of a longer one, and weights between the pilots' are interpolated.
        With `anchor_draft` the first draft is always accepted, and the others as often as where it was; that is too
        high where the drafts of one step are right or wrong together. single_forward drafts before the token that comes
        first is known: its drafts are taken to be those from the second on, accepted as often as these were, and what
        few levels leave stale is accounted for. What more denoising steps improve is not. A block that nothing verifies
        is kept whole.
        """
        if not judged(decoding):
            return tokens_per_step(decoding)
        weights = sorted(self.histograms)
        lengths = [self._length(self.histograms[w], decoding) for w in weights]
        return float(np.interp(decoding.mixing_weight, weights, lengths))

    @staticmethod
    def _length(histogram: Sequence[int], decoding: DecodingConfig) -> float:
        if decoding.sampler == "single_forward":
            behind_first = [sum(histogram[:2]), *histogram[2:]]
            return _steady(tuple(shortened(behind_first, decoding.draft_tokens)), decoding.levels)
        steps = np.asarray(histogram, dtype=float)
        at_least = np.cumsum(steps[::-1])[::-1] / steps.sum()  # entry j: share of steps that accepted >= j
        accepted = at_least[1 : decoding.draft_tokens + 1]
        if decoding.anchor_draft and len(accepted):
            return float(1 + (accepted / accepted[0]).sum()) if accepted[0] > 0 else 2.0
        return float(1 + accepted.sum()) if not decoding.anchor_draft else 2.0


class Prediction(NamedTuple):
    """What the model says of a setting: speed of the whole batch, and per sequence the step it comes from."""

    tokens_per_second: float
    step_seconds: float
    tokens_per_step: float


Predict = Callable[[Candidate, Acceptance | None], Prediction | None]
"""The prediction of a setting, or None where nothing can be said (no acceptance known, threads not probed)."""


class Predictor:
    """Predictions on one device for one workload. Sequences are taken to be kept going: the drain is not in them."""

    def __init__(
        self,
        spec: ModelSpec,
        hardware: HardwareProfile,
        workload: Workload,
        engine: EngineProfile | str | None = None,
    ) -> None:
        """engine: of the forwards it describes; others are predicted by our own engine for them."""
        from perfmodel.engine import engine_for

        self._spec, self._hardware, self._workload = spec, hardware, workload
        found = engine_for(hardware, engine)
        self._engines = {found.kernels.engine: found}
        self._step_seconds = lru_cache(maxsize=None)(self._time_steps)

    def __call__(self, candidate: Candidate, acceptance: Acceptance | None) -> Prediction | None:
        decoding, kernels = candidate
        batch = self._workload.batch
        if judged(decoding) and acceptance is None:
            return None
        tokens = acceptance.length(decoding) if acceptance else tokens_per_step(decoding)
        if decoding.sampler == "single_forward":  # a request's first step has no drafts yet and commits one token
            generated = self._workload.generated_tokens
            tokens = generated / (1 + (generated - 1) / tokens)
        mode = kernels.expert_mode(batch * decoding.slots) if kernels.engine == "eager" else None
        kind = DecodingConfig(  # the rest does not change a step
            decoding.sampler, MAX_DRAFT_TOKENS, denoising_steps=decoding.denoising_steps, verify=decoding.verify
        )
        levels = None if decoding.proposal_levels is None else len(decoding.proposal_levels)
        experts = acceptance.experts if acceptance else ()
        seconds = self._step_seconds(kind, levels, kernels.engine, mode, kernels.threads, experts)
        if seconds is None:
            return None
        step = float(seconds[decoding.draft_tokens - 1 if decoding.drafts else 0])
        return Prediction(batch * tokens / step, step, tokens)

    def _time_steps(
        self,
        kind: DecodingConfig,
        levels: int | None,
        ran: Engine,
        mode: ExpertMode | None,
        threads: int | None,
        experts: tuple[tuple[float, float], ...],
    ) -> npt.NDArray[np.float64] | None:
        """Seconds of a step for K = 1 .. MAX_DRAFT_TOKENS. A confidence threshold is taken to end no block early.

        None for a thread count that was not probed, and for an engine, a mode of its experts or a sampler that no
        engine profile describes. UserError for whatever else is wrong: it would be so for all settings.
        """
        from perfmodel.decoding import setting, time_step
        from perfmodel.engine import OURS, engine_for
        from perfmodel.steps import step_of

        probed = {curves.threads for curves in self._hardware.measured}
        if threads is not None and probed and threads not in probed:
            return None
        if ran not in self._engines and (self._hardware.kind, ran) not in OURS:
            return None
        work = self._workload
        drafts = np.arange(1, MAX_DRAFT_TOKENS + 1)
        step = step_of(kind, draft_tokens=drafts, levels=levels)
        most = work.batch * max(float(np.max(forward.slots)) for forward in step.forwards)
        context = work.prompt_tokens + work.generated_tokens / 2
        kernels = KernelConfig(threads=threads, engine=ran)
        if mode is not None:
            kernels = KernelConfig({1_000_000: mode}, threads)
        if ran not in self._engines:
            self._engines[ran] = engine_for(self._hardware, None, ran)
        engine = self._engines[ran]
        if any(part.entry not in engine.sampler for part in step.work):
            return None
        if mode is not None and mode not in engine.experts:
            return None
        at = setting(
            self._spec,
            self._hardware,
            work.dtype,
            expert_coverage=coverage(experts, self._spec.num_experts, most),
            engine=engine,
            kernels=kernels,
        )
        return np.broadcast_to(time_step(at, step, work.batch, context).seconds, drafts.shape)


@lru_cache(maxsize=4096)
def _steady(histogram: tuple[float, ...], levels: tuple[int, ...]) -> float:
    return steady_tokens(histogram, levels)


def coverage(pairs: tuple[tuple[float, float], ...], experts: int, most_tokens: float) -> ExpertCoverage:
    """Recorded (tokens of a forward, distinct experts) pairs as coverage; uniform where there are none.

    They are carried on to more tokens than any pilot had in a forward, with as many independent choices per token as
    the last pair shows: E (1 - (1 - 1/E)^n), n in proportion to the tokens.
    """
    from perfmodel.experts import CoveragePoint, ExpertCoverage

    if not pairs:
        return ExpertCoverage("uniform")
    (tokens, distinct), further = pairs[-1], list[tuple[float, float]]()
    if tokens < most_tokens and distinct < 0.99 * experts:
        choices = np.log1p(-distinct / experts) / np.log1p(-1 / experts)
        counts = np.geomspace(tokens, most_tokens, 9)[1:]
        found = experts * -np.expm1(choices * counts / tokens * np.log1p(-1 / experts))
        further = list(zip(counts.tolist(), found.tolist(), strict=True))
    return ExpertCoverage("measured", measured=tuple(CoveragePoint("any", t, 1, d) for t, d in (*pairs, *further)))


def pilots(space: Space, default: Candidate) -> list[Candidate]:
    """The settings that are run first: the default, and what the predictions of all others need to know.

    They are ordinary trials. The longest draft at a few mixing weights tells the acceptance; a block that nothing
    verifies tells how far such drafts are from autoregressive decoding; the longest draft with the fewest threads and
    with the most tells what threads give here, which no model says of a busy machine. The others take the fewest: many
    can be slow beyond measure, and what is counted does not depend on them.
    """
    names = {p.name: p for p in space.parameters}
    counts = names["threads"].values() if "threads" in names else (default.kernels.threads,)
    few, many = (None if count is None else int(count) for count in (counts[0], counts[-1]))
    found = [default]
    if "draft_tokens" in names:
        longest = int(max(map(float, names["draft_tokens"].values())))
        engine = KernelConfig({1_000_000: KernelConfig().experts[1_000_000]}, few, default.kernels.engine)
        if "two_forward" in names["sampler"].choices:
            weights = map(float, names["mixing_weight"].values()) if "mixing_weight" in names else (1.0,)
            for weight in sorted(set(_PILOT_MIXING_WEIGHTS).intersection(weights), reverse=True):
                decoding = DecodingConfig("two_forward", draft_tokens=longest, mixing_weight=weight)
                found.append(Candidate(decoding, engine))
                if weight == 1:
                    found.append(Candidate(decoding, replace(engine, threads=many)))
        if "verify" in names and False in names["verify"].choices:
            found.append(Candidate(DecodingConfig("denoising", draft_tokens=longest), engine))
    once = {space.key(candidate): candidate for candidate in found}
    return [space.candidate(space.encode(candidate)) for candidate in once.values()]
