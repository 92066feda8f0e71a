"""Where a sampler pays: speedup by batch and context, the best setting of each cell, and where it passes 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from perfmodel.contenders import Contender
from perfmodel.decoding import Setting
from perfmodel.kernels.call import Array
from perfmodel.sizes import require_sizes
from perfmodel.sweep import time_points
from runtime.config import Sampler, require

HEADLINES = (4.6, 7.7)  # tokens per step that the publisher states as speedups: lossless, and with logit mixing
HOLDS = 0.95  # the share of a headline that must remain for it to hold
SCAN_POINTS = 48  # along an axis, between its ends: crossings closer together than these may be missed

Axis = Literal["batch", "context"]
End = Literal["break-even", "memory", "axis"]


@dataclass(frozen=True)
class Paying:
    """An unbroken stretch of batches (or contexts) at which a sampler pays, both ends included, and what ends it."""

    first: int
    last: int
    ends_by: End  # break-even: last + 1 does not pay; memory: it does not fit; axis: it was not asked for


@dataclass(frozen=True)
class Headline:
    """What remains of a headline over batch x context: its tokens per step over the cost of the cheapest step."""

    tokens_per_step: float
    remaining: Array  # [batch, context] speedup; NaN where it does not fit
    holds: npt.NDArray[np.bool_]  # at least HOLDS of it remains
    reached: npt.NDArray[np.bool_]  # the speedup at the acceptance that was given is as high


@dataclass(frozen=True)
class SamplerMap:
    """One sampler on one device by its best setting in each cell: [batch, context] arrays, NaN where none fits."""

    sampler: Sampler
    batch: tuple[int, ...]
    context: tuple[int, ...]
    contenders: tuple[Contender, ...]
    best: npt.NDArray[np.int64]  # index into contenders
    speedup: Array
    step_cost: Array  # autoregressive steps that a step of the best setting takes: tokens it needs to break even
    fits: npt.NDArray[np.bool_]
    by_batch: tuple[tuple[Paying, ...], ...]  # per context: the batches at which it pays
    by_context: tuple[tuple[Paying, ...], ...]  # per batch: the contexts at which it pays
    headlines: tuple[Headline, ...]

    @property
    def pays(self) -> npt.NDArray[np.bool_]:
        """Cells in which the sampler is faster than autoregressive decoding."""
        return np.asarray(self.speedup > 1)


def break_even(
    at: Setting,
    contenders: Sequence[Contender],
    batch: Sequence[int],
    context: Sequence[int],
    *,
    fillings: float | None = None,
    headlines: Sequence[float] = HEADLINES,
) -> SamplerMap:
    """Compare the settings of one sampler with autoregressive decoding, over all batches and contexts.

    Between the smallest and the largest batch (and context) the ends of every paying stretch are found to the exact
    integer, by bisection between scanned points. UserError for empty axes and contexts beyond the model's.
    """
    for name, values in (("batch", batch), ("context", context)):
        require(len(values) > 0 and min(values) >= 1, f"{name} must have entries, all >= 1, but got {list(values)}")
    require_sizes(batch=batch, context=context, draft_tokens=[c.decoding.draft_tokens for c in contenders])
    require(len(contenders) > 0, "a break-even map needs at least one setting to compare")
    decodings = [c.decoding for c in contenders]
    lengths = np.array([c.acceptance_length for c in contenders])
    able = np.array([d.draft_tokens + 1 for d in decodings], dtype=float)

    def speedups(batches: npt.ArrayLike, contexts: npt.ArrayLike) -> tuple[Array, Array]:
        """Speedups and step costs, settings last; NaN where one does not fit."""
        sequences, cached = (np.asarray(a, dtype=float)[..., None] for a in (batches, contexts))
        points = time_points(at, decodings, sequences, cached, fillings=fillings)
        cost = np.where(points.fits, points.step_cost, np.nan)
        return lengths / cost, cost

    batches, contexts = (tuple(sorted(set(map(int, values)))) for values in (batch, context))
    every, costs = speedups(np.array(batches)[:, None], np.array(contexts)[None, :])
    fits = np.asarray(~np.isnan(every).all(-1))
    best = np.where(fits, np.argmax(np.nan_to_num(every, nan=-1.0), -1), 0)
    speedup = np.take_along_axis(every, best[..., None], -1)[..., 0]

    def state(batch_: Array, context_: Array) -> Array:
        """1 where the best setting pays, 0 where none does, -1 where none fits."""
        found = speedups(batch_, context_)[0]
        return np.where(np.isnan(found).all(-1), -1, (np.nan_to_num(found, nan=-1.0).max(-1) > 1).astype(int))

    return SamplerMap(
        sampler=decodings[0].sampler,
        batch=batches,
        context=contexts,
        contenders=tuple(contenders),
        best=best,
        speedup=speedup,
        step_cost=np.take_along_axis(costs, best[..., None], -1)[..., 0],
        fits=fits,
        by_batch=_stretches(batches, contexts, state),
        by_context=_stretches(contexts, batches, lambda c, b: state(b, c)),
        headlines=tuple(_headline(h, costs, able, speedup) for h in headlines),
    )


def _headline(tokens: float, costs: Array, able: Array, speedup: Array) -> Headline:
    """The cheapest step among the settings that can commit so many tokens; NaN where there is none."""
    usable = np.where(able >= tokens, costs, np.nan)
    cheapest = np.where(np.isnan(usable).all(-1), np.nan, np.nan_to_num(usable, nan=np.inf).min(-1))
    remaining = tokens / cheapest
    return Headline(tokens, remaining, np.asarray(remaining >= HOLDS * tokens), np.asarray(speedup >= tokens))


def _stretches(
    along: Sequence[int], others: Sequence[int], state: Callable[[Array, Array], Array]
) -> tuple[tuple[Paying, ...], ...]:
    """Per entry of `others`, the stretches of integers between the ends of `along` whose `state` is 1."""
    scanned = np.unique(np.concatenate([np.geomspace(along[0], along[-1], SCAN_POINTS).round(), along]))
    states = state(scanned[:, None], np.asarray(others, dtype=float)[None, :])
    where, row = np.nonzero(np.diff(states, axis=0))  # state changes between scanned[where] and the next, in a row
    low, high = scanned[where].copy(), scanned[where + 1].copy()
    before, other = states[where, row], np.asarray(others, dtype=float)[row]
    while (high - low > 1).any():
        middle = np.floor((low + high) / 2)
        same = state(middle, other) == before
        low, high = np.where(same & (high - low > 1), middle, low), np.where(~same & (high - low > 1), middle, high)
    ends = state(high, other) if len(high) else high
    found: list[tuple[Paying, ...]] = []
    for i in range(len(others)):
        first = int(scanned[0]) if states[0, i] == 1 else None
        stretches = []
        for j in np.flatnonzero(row == i):
            if before[j] == 1 and first is not None:
                stretches.append(Paying(first, int(low[j]), "memory" if ends[j] == -1 else "break-even"))
                first = None
            if ends[j] == 1:
                first = int(high[j])
        if first is not None:
            stretches.append(Paying(first, int(scanned[-1]), "axis"))
        found.append(tuple(stretches))
    return tuple(found)
