"""Many operating points at once, in NumPy: batch x context x settings of one sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from perfmodel.decoding import Setting, time_step
from perfmodel.economics import economics
from perfmodel.kernels.call import Array
from perfmodel.memory import memory_bytes, usable_bytes
from perfmodel.model_spec import require_context
from perfmodel.sizes import require_sizes
from perfmodel.steps import most_fillings, step_of
from runtime.config import DecodingConfig, replace, require

CHUNK_POINTS = 32_768  # of one evaluation: its arrays then stay in a core's caches


@dataclass(frozen=True)
class Points:
    """Steps of a sampler and of autoregressive decoding, as arrays that broadcast against each other."""

    step_seconds: Array
    bound_step_seconds: Array
    autoregressive_step_seconds: Array
    experts_per_layer: Array  # in the step's widest forward
    fits: npt.NDArray[np.bool_]  # weights and caches fit main memory

    @property
    def step_cost(self) -> Array:
        """Steps of autoregressive decoding that take as long: also the tokens a step must commit to break even."""
        return self.step_seconds / self.autoregressive_step_seconds


@dataclass(frozen=True)
class Sweep:
    """Arrays of shape [batch, context, draft tokens] over three axes. `fits`: weights and caches fit main memory."""

    batch: Array
    context: Array
    draft_tokens: Array
    acceptance_length: Array  # per draft tokens
    step_seconds: Array
    bound_step_seconds: Array
    autoregressive_step_seconds: Array
    tokens_per_second: Array
    speedup_over_autoregressive: Array
    experts_per_layer: Array
    fits: npt.NDArray[np.bool_]
    joules_per_million_tokens: Array | None = None  # estimates, see `perfmodel.economics`; None without a TDP
    dollars_per_million_tokens: Array | None = None  # None without a price

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """One flat array per quantity, axes included, with an entry per operating point; economics only where known."""
        whole = self.step_seconds.shape
        axes = {
            "batch": self.batch[:, None, None].astype(int),
            "context": self.context[None, :, None].astype(int),
            "draft_tokens": self.draft_tokens.astype(int),
            "acceptance_length": self.acceptance_length,
        }
        others = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in axes}
        last = {"fits": others.pop("fits")}
        arrays = axes | {name: value for name, value in others.items() if value is not None} | last
        return {name: np.broadcast_to(value, whole).ravel() for name, value in arrays.items()}

    def rows(self) -> Iterator[dict[str, Any]]:
        """One flat record per operating point."""
        columns = self.columns()
        for values in zip(*(column.tolist() for column in columns.values()), strict=True):
            yield dict(zip(columns, values, strict=True))


def time_points(
    at: Setting,
    decodings: Sequence[DecodingConfig],
    batch: npt.ArrayLike,
    context: npt.ArrayLike,
    *,
    fillings: float | None = None,
) -> Points:
    """Steps of `decodings` at batches and contexts: arrays that broadcast with one of the settings in the last axis.

    The settings are of one sampler and differ in K, proposal levels and denoising steps alone. fillings: as for
    `decoding.predict`. UserError for contexts beyond the model's.
    """
    first = decodings[0]
    require(
        len({replace(d, draft_tokens=1, proposal_levels=None, denoising_steps=1) for d in decodings}) == 1,
        "settings that are timed together must differ in K, proposal levels and denoising steps alone",
    )
    drafts = np.array([d.draft_tokens for d in decodings], dtype=float)
    most = most_fillings(drafts, [d.denoising_steps for d in decodings])
    step = step_of(
        replace(first, draft_tokens=int(drafts.max()), proposal_levels=None),
        draft_tokens=drafts,
        levels=np.array([len(d.levels) for d in decodings], dtype=float),
        fillings=most if fillings is None else fillings,
    )
    sequences, cached = np.asarray(batch, dtype=float), np.asarray(context, dtype=float)
    require_context(at.spec, int(np.max(cached + step.reach)))
    timed = time_step(at, step, sequences, cached)
    baseline = time_step(at, step_of(first.autoregressive), sequences, cached) if first.drafts else timed
    slots = np.maximum.reduce(np.broadcast_arrays(*(f.slots for f in timed.forwards)))
    needed = memory_bytes(at, sequences, cached + slots)
    return Points(
        step_seconds=timed.seconds,
        bound_step_seconds=timed.bound_seconds,
        autoregressive_step_seconds=baseline.seconds,
        experts_per_layer=np.maximum.reduce(np.broadcast_arrays(*(f.experts_per_layer for f in timed.forwards))),
        fits=np.asarray(needed <= usable_bytes(at.device.hardware)),
    )


def sweep(
    at: Setting,
    decoding: DecodingConfig,
    *,
    batch: Sequence[int],
    context: Sequence[int],
    draft_tokens: Sequence[int],
    acceptance_length: npt.ArrayLike,
    fillings: float | None = None,
    progress: Callable[[int], None] = lambda points: None,
) -> Sweep:
    """Time every combination. `acceptance_length`: tokens per step, a number or one per entry of `draft_tokens`.

    A fixed set of proposal levels stays the same for every K. fillings: as for `decoding.predict`. progress: called
    with the number of points that were just timed. UserError for an empty axis, for a K that the levels or steps do
    not fit, and for contexts beyond the model's; points that do not fit the memory are marked.
    """
    for name, values in (("batch", batch), ("context", context), ("draft_tokens", draft_tokens)):
        require(len(values) > 0 and min(values) >= 1, f"{name} must have entries, all >= 1, but got {list(values)}")
    require_sizes(batch=batch, context=context, draft_tokens=draft_tokens)
    decodings = [replace(decoding, draft_tokens=int(k)) for k in draft_tokens]  # refuses a K that does not fit
    b, c, drafts = (np.asarray(v, dtype=float) for v in (batch, context, draft_tokens))
    whole = (len(b), len(c), len(drafts))
    found = {name: np.empty(whole, bool if name == "fits" else float) for name in Points.__dataclass_fields__}
    for rows, columns in _chunks(*whole):
        part = time_points(at, decodings, b[rows, None, None], c[None, columns, None], fillings=fillings)
        for name, target in found.items():
            target[rows, columns] = getattr(part, name)
        progress(found["fits"][rows, columns].size)
    committed = np.broadcast_to(np.asarray(acceptance_length, dtype=float), drafts.shape)
    rate = b[:, None, None] * committed / found["step_seconds"]
    costs = economics(at.device.hardware, rate, at.parallel.devices)
    return Sweep(
        batch=b,
        context=c,
        draft_tokens=drafts,
        acceptance_length=committed,
        tokens_per_second=rate,
        speedup_over_autoregressive=committed * found["autoregressive_step_seconds"] / found["step_seconds"],
        joules_per_million_tokens=costs.joules_per_million_tokens,
        dollars_per_million_tokens=costs.dollars_per_million_tokens,
        **found,
    )


def _chunks(batches: int, contexts: int, settings: int) -> Iterator[tuple[slice, slice]]:
    """Rectangles of batch and context that cover the grid, each with about CHUNK_POINTS points."""
    columns = max(1, min(contexts, CHUNK_POINTS // settings))
    rows = max(1, CHUNK_POINTS // (columns * settings))
    for row in range(0, batches, rows):
        for column in range(0, contexts, columns):
            yield slice(row, row + rows), slice(column, column + columns)
