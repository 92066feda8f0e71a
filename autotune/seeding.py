"""What the performance model says of settings before they are run: where a search begins, and its own score."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from autotune.space import LEAST_MIXING_WEIGHT, MAX_DRAFT_TOKENS, Candidate, Space
from hardware.files import UserError
from runtime.config import DecodingConfig, ExpertMode, KernelConfig, Workload, replace

if TYPE_CHECKING:
    import numpy.typing as npt

    from hardware.profile import HardwareProfile
    from perfmodel.engine import EngineProfile
    from perfmodel.model_spec import ModelSpec

_APART = 4  # drafts
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
        high where the drafts of one step are right or wrong together.
        """
        weights = sorted(self.histograms)
        lengths = [self._length(self.histograms[w], decoding) for w in weights]
        return float(np.interp(decoding.mixing_weight, weights, lengths))

    @staticmethod
    def _length(histogram: Sequence[int], decoding: DecodingConfig) -> float:
        steps = np.asarray(histogram, dtype=float)
        at_least = np.cumsum(steps[::-1])[::-1] / steps.sum()  # entry j: share of steps that accepted >= j
        accepted = at_least[1 : decoding.draft_tokens + 1]
        if decoding.anchor_draft and len(accepted):
            return float(1 + (accepted / accepted[0]).sum()) if accepted[0] > 0 else 2.0
        return float(1 + accepted.sum()) if not decoding.anchor_draft else 2.0


Predict = Callable[[Candidate, Acceptance | None], float | None]
"""Tokens per second of a setting, or None where nothing can be said (no acceptance known, threads not probed)."""


class Predictor:
    """Predictions on one device for one workload. Sequences are taken to be kept going: the drain is not in them."""

    def __init__(
        self,
        spec: ModelSpec,
        hardware: HardwareProfile,
        workload: Workload,
        engine: EngineProfile | str | None = None,
    ) -> None:
        from perfmodel.engine import engine_for

        self._spec, self._hardware, self._workload = spec, hardware, workload
        self._engine = engine_for(hardware, engine)
        self._step_seconds = lru_cache(maxsize=None)(self._time_steps)

    def __call__(self, candidate: Candidate, acceptance: Acceptance | None) -> float | None:
        decoding, kernels = candidate
        batch = self._workload.batch
        drafting = decoding.sampler != "autoregressive"
        if drafting and acceptance is None:
            return None
        mode = kernels.expert_mode(batch * decoding.slots)
        kind = DecodingConfig(decoding.sampler, anchor_draft=decoding.anchor_draft)  # the rest does not change a step
        try:
            seconds = self._step_seconds(kind, mode, kernels.threads, acceptance.experts if acceptance else ())
        except UserError:  # a thread count or a mode that the profile or the engine knows nothing of
            return None
        if not drafting or acceptance is None:
            return float(batch / seconds[0])
        return float(batch * acceptance.length(decoding) / seconds[decoding.draft_tokens - 1])

    def _time_steps(
        self, kind: DecodingConfig, mode: ExpertMode, threads: int | None, experts: tuple[tuple[float, float], ...]
    ) -> npt.NDArray[np.float64]:
        """Seconds of a step for K = 1 .. MAX_DRAFT_TOKENS."""
        from perfmodel.decoding import setting, time_step
        from perfmodel.experts import ExpertCoverage

        work = self._workload
        at = setting(
            self._spec,
            self._hardware,
            work.dtype,
            expert_coverage=ExpertCoverage("measured", measured=experts) if experts else "uniform",
            engine=self._engine,
            kernels=KernelConfig({1_000_000: mode}, threads),
        )
        drafts = np.arange(1, MAX_DRAFT_TOKENS + 1)
        context = work.prompt_tokens + work.generated_tokens / 2
        return np.broadcast_to(time_step(at, kind, work.batch, context, drafts).seconds, drafts.shape)


def pilots(space: Space, default: Candidate) -> list[Candidate]:
    """The settings that are run first: the default, and the longest draft at a few mixing weights.

    They are ordinary trials; what they count tells the acceptance that the predictions of all others need. The counts
    do not depend on threads, so the pilots take one: several can be slow beyond measure on a busy machine.
    """
    found = [default]
    names = {p.name: p for p in space.parameters}
    if "two_forward" not in names["sampler"].choices:
        return found
    for weight in _PILOT_MIXING_WEIGHTS if "mixing_weight" in names else (1.0,):
        decoding = DecodingConfig("two_forward", draft_tokens=MAX_DRAFT_TOKENS, mixing_weight=weight)
        kernels = KernelConfig({1_000_000: KernelConfig().experts[1_000_000]}, 1)
        found.append(space.candidate(space.encode(Candidate(decoding, kernels))))
    return found


def seeds(space: Space, predict: Predict, acceptance: Acceptance | None, count: int) -> list[Candidate]:
    """The `count` best predicted settings, taken in turn from each mixing weight and thread count.

    Those that differ in K alone are at least _APART apart: their predictions are right or wrong together. In turn,
    because the model says neither what mixing costs in quality nor what else keeps the machine's cores busy.
    """
    weights = tuple(sorted(acceptance.histograms, reverse=True)) if acceptance else (1.0,)
    threads = next(p for p in space.parameters if p.name == "threads").values()
    coarse = {"mixing_weight": weights, "threads": (threads[0], threads[-1])[: len(threads)]}
    predicted = [(predict(candidate, acceptance), candidate) for candidate in space.grid(coarse)]
    ranked = sorted(((p, c) for p, c in predicted if p is not None), key=lambda found: -found[0])
    queues: dict[tuple[float, int | None], list[Candidate]] = {}
    taken: dict[object, list[int]] = {}
    for _, candidate in ranked:
        decoding, kernels = candidate
        queue = queues.setdefault((decoding.mixing_weight, kernels.threads), [])
        mode = kernels.expert_mode(space.batch * decoding.slots)
        alike = taken.setdefault((replace(decoding, draft_tokens=1), mode, kernels.threads), [])
        if len(queue) < count and all(abs(decoding.draft_tokens - k) >= _APART for k in alike):
            queue.append(candidate)
            alike.append(decoding.draft_tokens)
    return list(_in_turn(list(queues.values())))[:count]


def _in_turn(queues: Sequence[Sequence[Candidate]]) -> Iterable[Candidate]:
    for rank in range(max(map(len, queues), default=0)):
        for queue in queues:
            if rank < len(queue):
                yield queue[rank]
