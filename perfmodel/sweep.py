"""A whole grid of operating points at once: batch x context x draft tokens, in NumPy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from perfmodel.acceptance import tokens_per_step
from perfmodel.decoding import Setting, memory_bytes, time_step
from perfmodel.model_spec import require_context
from perfmodel.operators import Array
from perfmodel.steps import step_of
from runtime.config import DecodingConfig, replace, require


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

    def rows(self) -> Iterator[dict[str, Any]]:
        """One flat record per operating point."""
        names = (
            "step_seconds",
            "bound_step_seconds",
            "autoregressive_step_seconds",
            "tokens_per_second",
            "speedup_over_autoregressive",
            "experts_per_layer",
        )
        for i, j, k in np.ndindex(self.step_seconds.shape):
            yield {
                "batch": int(self.batch[i]),
                "context": int(self.context[j]),
                "draft_tokens": int(self.draft_tokens[k]),
                "acceptance_length": float(self.acceptance_length[k]),
                **{name: float(getattr(self, name)[i, j, k]) for name in names},
                "fits": bool(self.fits[i, j, k]),
            }


def acceptance_by_draft_tokens(
    decoding: DecodingConfig,
    draft_tokens: Sequence[int],
    *,
    length: float | None = None,
    rate: float | None = None,
) -> Array:
    """Tokens per step for each K: one length for all of them, or what a constant acceptance rate per draft gives."""
    return np.array(
        [
            tokens_per_step(
                replace(decoding, draft_tokens=int(k)), length=length, rates=None if rate is None else (rate,)
            )
            for k in draft_tokens
        ]
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
) -> Sweep:
    """Time every combination. `acceptance_length`: tokens per step, a number or one per entry of `draft_tokens`.

    A fixed set of proposal levels stays the same for every K. fillings: as for `decoding.predict`. UserError for an
    empty axis, for a K that the levels or steps do not fit, and for contexts beyond the model's; points that do not
    fit the memory are marked.
    """
    for name, values in (("batch", batch), ("context", context), ("draft_tokens", draft_tokens)):
        require(len(values) > 0 and min(values) >= 1, f"{name} must have entries, all >= 1, but got {list(values)}")
    for k in draft_tokens:
        replace(decoding, draft_tokens=int(k))  # refuses a K that the levels or steps do not fit
    b, c, drafts = (np.asarray(v, dtype=float) for v in (batch, context, draft_tokens))
    axes = (b[:, None, None], c[None, :, None], drafts[None, None, :])
    whole = (len(b), len(c), len(drafts))
    committed = np.broadcast_to(np.asarray(acceptance_length, dtype=float), drafts.shape)
    parts = step_of(decoding, draft_tokens=axes[2], fillings=fillings)
    require_context(at.spec, max(context) + int(np.max(parts.reach)))
    step = time_step(at, parts, *axes[:2])
    baseline = time_step(at, step_of(decoding.autoregressive), *axes[:2])
    seconds = np.broadcast_to(step.seconds, whole)
    single_seconds = np.broadcast_to(baseline.seconds, whole)
    distinct = np.maximum.reduce(np.broadcast_arrays(*(f.experts_per_layer for f in step.forwards)))
    slots = np.maximum.reduce(np.broadcast_arrays(*(f.slots for f in step.forwards)))
    needed = memory_bytes(at.spec, at.device.dtype, axes[0], axes[1] + slots)
    return Sweep(
        batch=b,
        context=c,
        draft_tokens=drafts,
        acceptance_length=committed,
        step_seconds=seconds,
        bound_step_seconds=np.broadcast_to(step.bound_seconds, whole),
        autoregressive_step_seconds=single_seconds,
        tokens_per_second=axes[0] * committed / seconds,
        speedup_over_autoregressive=committed * single_seconds / seconds,
        experts_per_layer=np.broadcast_to(distinct, whole),
        fits=np.broadcast_to(needed <= at.device.hardware.main_memory.capacity_bytes, whole),
    )
