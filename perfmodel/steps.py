"""What one decoding step of each sampler runs: its forwards, and its own work on their logits. One entry a sampler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from perfmodel.operators import Array
from runtime.config import DecodingConfig, Sampler, require


@dataclass(frozen=True)
class Sizes:
    """The numbers that a step's sizes follow from; arrays where a grid varies them."""

    drafts: Array  # K
    levels: Array  # P, of single_forward
    fillings: Array  # mean forwards that fill a block, of denoising


@dataclass(frozen=True)
class ForwardSizes:
    """One kind of forward in a step, per sequence.

    pairs: how often one of its slots sees a slot of it, at least; None: they are causal. head_passes: projections by
    the LM head in turn, `head_rows` rows in all; each reads its weights.
    """

    name: str
    slots: npt.ArrayLike
    head_rows: npt.ArrayLike
    pairs: Array | None = None
    head_passes: int = 1
    times: npt.ArrayLike = 1.0  # how often a step runs it


@dataclass(frozen=True)
class OwnWork:
    """What a sampler does with `rows` rows of logits per sequence, `times` a step; `name` is an engine's entry."""

    name: str
    rows: npt.ArrayLike
    sampled: bool
    times: npt.ArrayLike = 1.0

    @property
    def entry(self) -> str:
        """The name of an engine's figures: drawing takes more work than the argmax."""
        return self.name + ("_sampled" if self.sampled else "")


@dataclass(frozen=True)
class Step:
    """One decoding step. reach: positions beyond the cached ones that its slots take."""

    forwards: tuple[ForwardSizes, ...]
    work: tuple[OwnWork, ...]
    reach: npt.ArrayLike

    @property
    def forwards_per_step(self) -> Array:
        """How many forwards there are, of all kinds."""
        return sum((np.asarray(f.times, dtype=float) for f in self.forwards), np.zeros(()))


def most_fillings(draft_tokens: npt.ArrayLike, steps: npt.ArrayLike) -> Array:
    """The most forwards that fill a block of K: each decides at least ceil(K / S), so S may be more than it takes."""
    drafts = np.asarray(draft_tokens, dtype=float)
    return np.asarray(np.ceil(drafts / np.ceil(drafts / np.asarray(steps, dtype=float))))


def sizes_of(
    decoding: DecodingConfig,
    *,
    draft_tokens: npt.ArrayLike | None = None,
    levels: npt.ArrayLike | None = None,
    fillings: npt.ArrayLike | None = None,
) -> Sizes:
    """The sizes of a setting; what is given replaces its own K, number of levels, and most forwards that fill a block.

    UserError unless 1 <= fillings <= the most.
    """
    drafts = np.asarray(decoding.draft_tokens if draft_tokens is None else draft_tokens, dtype=float)
    if levels is None:
        levels = drafts + 1 if decoding.proposal_levels is None else len(decoding.proposal_levels)
    most = most_fillings(drafts, decoding.denoising_steps)
    found = most if fillings is None else np.asarray(fillings, dtype=float)
    require(
        bool(((found >= 1) & (found <= most)).all()),
        f"1 <= forwards that fill a block <= {most.max():g} must hold, but got {found.max():g}",
    )
    return Sizes(drafts, np.asarray(levels, dtype=float), found)


def _autoregressive(decoding: DecodingConfig, at: Sizes) -> Step:
    """One slot."""
    work = OwnWork("autoregressive", 1, decoding.temperature > 0)
    return Step((ForwardSizes("decode", 1, 1),), (work,), 1)


def _two_forward(decoding: DecodingConfig, at: Sizes) -> Step:
    """A draft of the anchor and K masks, whose LM head runs on K rows (with `anchor_draft` the anchor's is one of
    them), then a verify of K + 1 rows."""
    k = at.drafts
    forwards = (ForwardSizes("draft", k + 1, k, pairs=1 + k * (k + 1)), ForwardSizes("verify", k + 1, k + 1))
    return Step(forwards, (OwnWork("two_forward", 2 * k + 1, decoding.temperature > 0),), k + 1)


def _single_forward(decoding: DecodingConfig, at: Sizes) -> Step:
    """K + 1 rows to verify, and K + 1 masks for each of P levels; of these the LM head runs on the chosen level's K.

    The block of level j sees the verify rows 0 .. j and itself; the i-th level is at least i.
    """
    block, levels = at.drafts + 1, at.levels
    pairs = block * (block + 1) / 2 + block * (levels * (levels + 1) / 2 + levels * block)
    rows = 2 * at.drafts + 1
    forward = ForwardSizes("single", block * (1 + levels), rows, pairs=pairs, head_passes=2)
    return Step((forward,), (OwnWork("single_forward", rows, decoding.temperature > 0),), 2 * block)


def _denoising(decoding: DecodingConfig, at: Sizes) -> Step:
    """Forwards that fill a block of K masks, then a verify of K + 1 rows; each one starts from the anchor.

    Without the verify, the first forward of a block also brings the K tokens of the block before into the cache.
    """
    k, times = at.drafts, at.fillings
    if decoding.verify:
        drawn = decoding.draft_temperature > 0
        filling = ForwardSizes("draft", k + 1, k, pairs=1 + k * (k + 1), times=times)
        work = (
            OwnWork("denoising_step", k, drawn, times),
            OwnWork("denoising_verify", k + 1, decoding.temperature > 0),
        )
        return Step((filling, ForwardSizes("verify", k + 1, k + 1)), work, k + 1)
    drawn = decoding.temperature > 0
    first = ForwardSizes("draft", 2 * k, k, pairs=k * (k + 1) / 2 + 2 * k * k)
    further = ForwardSizes("draft", k, k, pairs=k * k, times=times - 1)
    work = (OwnWork("denoising", 0, drawn), OwnWork("denoising_step", k, drawn, times))
    return Step((first, further), work, 2 * k)


STEPS: dict[Sampler, Callable[[DecodingConfig, Sizes], Step]] = {
    "autoregressive": _autoregressive,
    "two_forward": _two_forward,
    "single_forward": _single_forward,
    "denoising": _denoising,
}
FORWARDS = ("decode", "draft", "verify", "single", "prefill")  # the kinds that steps and prompts consist of
WORK = ("autoregressive", "two_forward", "single_forward", "denoising", "denoising_step", "denoising_verify")
WORK_ENTRIES = tuple(name + end for name in WORK for end in ("", "_sampled"))


def step_of(
    decoding: DecodingConfig,
    *,
    draft_tokens: npt.ArrayLike | None = None,
    levels: npt.ArrayLike | None = None,
    fillings: npt.ArrayLike | None = None,
) -> Step:
    """The step of a setting; see `sizes_of` for what may be given in the setting's place."""
    at = sizes_of(decoding, draft_tokens=draft_tokens, levels=levels, fillings=fillings)
    return STEPS[decoding.sampler](decoding, at)


def title(decoding: DecodingConfig) -> str:
    """A setting's sampler and what sets it apart from others of the same K."""
    if decoding.proposal_levels is not None:
        return f"{decoding.sampler} levels {','.join(map(str, decoding.proposal_levels))}"
    if decoding.sampler != "denoising":
        return decoding.sampler + (" anchored" if decoding.anchor_draft else "")
    early = "" if decoding.confidence_threshold is None else f" from {decoding.confidence_threshold:g}"
    plural = "" if decoding.denoising_steps == 1 else "s"
    return f"denoising {decoding.denoising_steps} step{plural}{early}{', verified' if decoding.verify else ''}"
