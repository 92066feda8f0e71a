"""Draw from logits, and accept or reject drafts, in a few passes that keep no probabilities.

A row of logits is cut into splits of BLOCK entries, each read by one block of threads. The first pass leaves a
split's largest logit, its place, and the sum of the exponentials beside it; the last one finds the split that a
uniform number falls into, and reads that split alone. Sums are fp32: a draw differs from the reference's where the
number lies within rounding of the border between two tokens, and no token of probability zero is ever drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.acceptance.splits import find_place, first_best, leave, leave_best, row_mass, row_totals
from runtime.kernels.launch import launch
from runtime.kernels.target import Tiling
from runtime.samplers.acceptance import Accepted, Draft


@triton.jit
def _draw_splits(
    logits,
    temperatures,
    peaks,
    sums,
    bests,
    rows,
    V: tl.constexpr,
    SPLITS: tl.constexpr,
    SAMPLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = split * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * V + column, mask=column < V, other=-float("inf")).to(tl.float32)
    if SAMPLED:
        temperature = tl.load(temperatures + row % rows)
        if temperature > 0:
            leave(x, 1.0 / temperature, peaks, sums, row * SPLITS + split)
        else:
            leave_best(x, column, peaks, bests, row * SPLITS + split, V)
    else:
        leave_best(x, column, peaks, bests, row * SPLITS + split, V)


@triton.jit
def _draw(
    logits,
    temperatures,
    uniform,
    peaks,
    sums,
    bests,
    tokens,
    rows,
    V: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_UP: tl.constexpr,
    SAMPLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS_UP)
    inside = split < SPLITS
    if SAMPLED:
        temperature = tl.load(temperatures + row % rows)
        if temperature > 0:
            inverse = 1.0 / temperature
            peak, mass = row_mass(peaks, sums, row, inverse, split, inside, SPLITS)
            goal = (tl.load(uniform + row) * tl.sum(mass, axis=0)).to(tl.float32)
            chosen = find_place(mass, split, goal)
            column = chosen * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(logits + row * V + column, mask=column < V, other=-float("inf")).to(tl.float32)
            goal -= tl.sum(tl.where(split < chosen, mass, 0.0), axis=0)
            tl.store(tokens + row, find_place(tl.exp((x - peak) * inverse), column, goal).to(tl.int64))
        else:
            tl.store(tokens + row, first_best(peaks, bests, row, split, inside, SPLITS, V).to(tl.int64))
    else:
        tl.store(tokens + row, first_best(peaks, bests, row, split, inside, SPLITS, V).to(tl.int64))


@triton.jit
def _load(
    ar_logits, draft_logits, sequence, slot, column, judged, mixed, warm, weight, rest, draft_batch, draft_row,
    V: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Part of a slot's row: logits of the target, and those of its draft where they are wanted, else -inf."""
    inside = column < V
    x = tl.load(ar_logits + (sequence * (K + 1) + slot) * V + column, mask=inside, other=-float("inf")).to(tl.float32)
    at = draft_logits + sequence * draft_batch + slot * draft_row + column * STEP
    y = tl.load(at, mask=inside & judged & (mixed | warm), other=-float("inf")).to(tl.float32)
    if mixed:
        x = tl.where(inside & judged, weight * x + rest * y, x)
    return x, y


@triton.jit
def _verify_splits(
    ar_logits, draft_logits, draft_temperatures, lengths, peaks, sums, bests, draft_peaks, draft_sums,
    inverse, weight, rest, draft_batch, draft_row,
    V: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr, STEP: tl.constexpr, SAMPLED: tl.constexpr,
    MIXED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    sequence, slot = row // (K + 1), row % (K + 1)
    last = _last(lengths, sequence, K)
    if slot <= last:  # nobody asks for what lies behind the bonus row
        judged = slot < last
        temperature = tl.load(draft_temperatures + slot, mask=judged, other=0.0)
        warm = SAMPLED & (temperature > 0)
        column = split * BLOCK + tl.arange(0, BLOCK)
        x, y = _load(
            ar_logits, draft_logits, sequence, slot, column, judged, MIXED, warm, weight, rest, draft_batch, draft_row,
            V, K, STEP,
        )  # fmt: skip
        if SAMPLED:
            leave(x, inverse, peaks, sums, row * SPLITS + split)
            if warm:
                leave(y, 1.0 / temperature, draft_peaks, draft_sums, (sequence * K + slot) * SPLITS + split)
        else:
            leave_best(x, column, peaks, bests, row * SPLITS + split, V)


@triton.jit
def _last(lengths, sequence, K: tl.constexpr):
    """How many drafts a sequence has, which is the place of its bonus row."""
    last = tl.full([], K, tl.int32)
    if lengths is not None:
        last = tl.load(lengths + sequence).to(tl.int32)
    return last


@triton.jit
def _decide(
    ar_logits, draft_logits, draft_tokens, draft_temperatures, lengths, uniform, peaks, sums, bests,
    draft_peaks, draft_sums, counts, tokens, inverse, weight, rest, draft_batch, draft_row,
    V: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr, SPLITS_UP: tl.constexpr, STEP: tl.constexpr,
    SAMPLED: tl.constexpr, MIXED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The accepted drafts of a sequence: those before the first that is not. At temperature 0 the token too."""
    sequence = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS_UP)
    last = _last(lengths, sequence, K)
    count = last
    for begin in range(0, K, ROWS):
        slot = begin + tl.arange(0, ROWS)
        judged = slot < last
        row = sequence * (K + 1) + slot
        inside = judged[:, None] & (split < SPLITS)[None, :]
        token = tl.load(draft_tokens + sequence * K + slot, mask=judged, other=0)
        if SAMPLED:
            temperature = tl.load(draft_temperatures + slot, mask=judged, other=0.0)
            warm = temperature > 0
            sharp = 1.0 / tl.where(warm, temperature, 1.0)
            x = tl.load(ar_logits + row * V + token, mask=judged, other=0.0).to(tl.float32)
            at = draft_logits + sequence * draft_batch + slot.to(tl.int64) * draft_row + token * STEP
            y = tl.load(at, mask=judged & (MIXED | warm), other=0.0).to(tl.float32)
            if MIXED:
                x = weight * x + rest * y
            peak, total = row_totals(peaks, sums, row, tl.where(judged, inverse, inverse), split, inside, SPLITS)
            draft_peak, draft_total = row_totals(
                draft_peaks, draft_sums, sequence * K + slot, sharp, split, inside & warm[:, None], SPLITS
            )
            p = tl.exp((x - peak) * inverse) / total
            q = tl.where(warm, tl.exp((y - draft_peak) * sharp) / draft_total, 1.0)
            number = tl.load(uniform + row, mask=judged, other=0.0)
            passed = number * q.to(tl.float64) < p.to(tl.float64)
        else:
            at = row[:, None] * SPLITS + split[None, :]
            peak = tl.load(peaks + at, mask=inside, other=-float("inf"))
            best = tl.load(bests + at, mask=inside, other=V - 1)
            highest = tl.max(peak, axis=1)
            passed = tl.min(tl.where(inside & (peak == highest[:, None]), best, V - 1), axis=1) == token
        count = tl.minimum(count, tl.min(tl.where(judged & (passed == 0), slot, K), axis=0))
    tl.store(counts + sequence, count.to(tl.int64))
    if not SAMPLED:
        best = first_best(peaks, bests, sequence * (K + 1) + count, split, split < SPLITS, SPLITS, V)
        tl.store(tokens + sequence, best.to(tl.int64))


@triton.jit
def _weights(
    ar_logits, draft_logits, draft_tokens, draft_temperatures, draft_peaks, draft_sums, sequence, slot, column, judged,
    peak, total, inverse, weight, rest, draft_batch, draft_row, split,
    V: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr, STEP: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Part of the deciding row: p, and max(p - q, 0)."""
    temperature = tl.load(draft_temperatures + slot, mask=judged, other=0.0)
    warm = temperature > 0
    x, y = _load(
        ar_logits, draft_logits, sequence, slot, column, judged, MIXED, warm, weight, rest, draft_batch, draft_row,
        V, K, STEP,
    )  # fmt: skip
    p = tl.exp((x - peak) * inverse) / total
    if warm:
        sharp = 1.0 / temperature
        draft_peak, mass = row_mass(draft_peaks, draft_sums, sequence * K + slot, sharp, split, split < SPLITS, SPLITS)
        q = tl.exp((y - draft_peak) * sharp) / tl.sum(mass, axis=0)
    else:  # all of the mass is on the draft
        token = tl.load(draft_tokens + sequence * K + slot, mask=judged, other=-1)
        q = tl.where(column == token, 1.0, 0.0)
    return p, tl.maximum(p - q, 0.0)


@triton.jit
def _remain_splits(
    ar_logits, draft_logits, draft_tokens, draft_temperatures, lengths, peaks, sums, draft_peaks, draft_sums,
    counts, remaining, inverse, weight, rest, draft_batch, draft_row,
    V: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr, SPLITS_UP: tl.constexpr, STEP: tl.constexpr,
    MIXED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What is left of a split of the deciding row when its draft's share is taken away; 0 of a bonus row."""
    sequence = tl.program_id(1).to(tl.int64)
    slot = tl.load(counts + sequence)
    left = 0.0
    if slot < _last(lengths, sequence, K):
        split = tl.arange(0, SPLITS_UP)
        row = sequence * (K + 1) + slot
        peak, mass = row_mass(peaks, sums, row, inverse, split, split < SPLITS, SPLITS)
        column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        _, rest_of_p = _weights(
            ar_logits, draft_logits, draft_tokens, draft_temperatures, draft_peaks, draft_sums, sequence, slot, column,
            True, peak, tl.sum(mass, axis=0), inverse, weight, rest, draft_batch, draft_row, split,
            V, K, SPLITS, STEP, MIXED,
        )  # fmt: skip
        left = tl.sum(rest_of_p, axis=0)
    tl.store(remaining + sequence * SPLITS + tl.program_id(0), left)


@triton.jit
def _redraw(
    ar_logits, draft_logits, draft_tokens, draft_temperatures, lengths, uniform, peaks, sums, draft_peaks, draft_sums,
    counts, remaining, tokens, inverse, weight, rest, draft_batch, draft_row,
    V: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr, SPLITS_UP: tl.constexpr, STEP: tl.constexpr,
    MIXED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The token behind the accepted drafts, from what remains; from p where nothing does, or nothing was rejected."""
    sequence = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS_UP)
    slot = tl.load(counts + sequence)
    row = sequence * (K + 1) + slot
    peak, mass = row_mass(peaks, sums, row, inverse, split, split < SPLITS, SPLITS)
    total = tl.sum(mass, axis=0)
    left = tl.load(remaining + sequence * SPLITS + split, mask=split < SPLITS, other=0.0)
    rejected = tl.sum(left, axis=0) > 1e-30
    mass = tl.where(rejected, left, mass / total)
    goal = (tl.load(uniform + sequence * (K + 1) + K) * tl.sum(mass, axis=0)).to(tl.float32)
    chosen = find_place(mass, split, goal)
    goal -= tl.sum(tl.where(split < chosen, mass, 0.0), axis=0)
    column = chosen * BLOCK + tl.arange(0, BLOCK)
    p, rest_of_p = _weights(
        ar_logits, draft_logits, draft_tokens, draft_temperatures, draft_peaks, draft_sums, sequence, slot, column,
        slot < _last(lengths, sequence, K), peak, total, inverse, weight, rest, draft_batch, draft_row, split,
        V, K, SPLITS, STEP, MIXED,
    )  # fmt: skip
    # What two kernels round differently may leave nothing of a split that had next to nothing.
    use = rejected & (tl.sum(rest_of_p, axis=0) > 0)
    tl.store(tokens + sequence, find_place(tl.where(use, rest_of_p, p), column, goal).to(tl.int64))


def draw(logits: Tensor, temperatures: Tensor, uniform: Tensor | None, *, tiling: Tiling) -> Tensor:
    """One token int64 [B, K] per row of logits [B, K, V] at its temperature fp32 [K]; 0 is argmax.

    uniform: fp64 [B, K] in [0, 1), or None when every row is an argmax.
    """
    logits, sampled = logits.contiguous(), uniform is not None
    batch, drafts, vocabulary = logits.shape
    rows, splits = batch * drafts, triton.cdiv(vocabulary, tiling["BLOCK"])
    tokens = torch.empty(batch, drafts, dtype=torch.int64, device=logits.device)
    shared = {
        "logits": logits,
        "temperatures": temperatures,
        "peaks": _empty(logits, rows, splits),
        "sums": _empty(logits, rows, splits) if sampled else None,
        "bests": _empty(logits, rows, splits, torch.int32),
        "rows": drafts,
    }
    constants = {"V": vocabulary, "SPLITS": splits, "SAMPLED": sampled}
    blocks = _only(tiling, "BLOCK")
    launch(_draw_splits, (splits, rows), shared, constants, blocks)
    up = triton.next_power_of_2(splits)
    arguments = shared | {"uniform": uniform, "tokens": tokens}
    launch(_draw, (rows,), arguments, constants | {"SPLITS_UP": up}, blocks)
    return tokens


def verify(
    ar_logits: Tensor,
    draft: Draft,
    temperature: float,
    mixing_weight: float,
    uniform: Tensor | None,
    *,
    tiling: Tiling,
) -> Accepted:
    """Decide on K drafts from the verifier's logits [B, K + 1, V], as the reference does.

    uniform: fp64 [B, K + 1] in [0, 1), the last one for the token; None at temperature 0.
    """
    ar_logits, sampled = ar_logits.contiguous(), temperature > 0
    batch, width, vocabulary = ar_logits.shape
    splits = triton.cdiv(vocabulary, tiling["BLOCK"])
    up = triton.next_power_of_2(splits)
    step = draft.logits.stride(2)  # 0 of logits that stand for none
    assert step in (0, 1) and draft.tokens.shape == (batch, width - 1)
    counts, tokens = (torch.empty(batch, dtype=torch.int64, device=ar_logits.device) for _ in range(2))
    peaks = _empty(ar_logits, batch * width, splits)
    drafted: dict[str, Any] = {
        "draft_logits": draft.logits,
        "draft_temperatures": draft.temperatures,
        "lengths": draft.lengths,
        "weight": float(mixing_weight),
        "rest": 1 - float(mixing_weight),
        "draft_batch": draft.logits.stride(0),
        "draft_row": draft.logits.stride(1),
    }
    shared = drafted | {
        "ar_logits": ar_logits,
        "inverse": 1 / temperature if sampled else 1.0,
        "peaks": peaks,
        "sums": torch.empty_like(peaks) if sampled else None,
        "draft_peaks": torch.empty_like(peaks) if sampled else None,
        "draft_sums": torch.empty_like(peaks) if sampled else None,
    }
    best = {"bests": None if sampled else _empty(peaks, batch * width, splits, torch.int32)}
    constants = {"V": vocabulary, "K": width - 1, "SPLITS": splits, "STEP": step, "MIXED": mixing_weight != 1}
    blocks, rows = _only(tiling, "BLOCK"), _only(tiling, "ROWS")
    launch(_verify_splits, (splits, batch * width), shared | best, constants | {"SAMPLED": sampled}, blocks)
    shared |= {"draft_tokens": draft.tokens.contiguous(), "counts": counts}
    constants |= {"SPLITS_UP": up}
    chosen = {"uniform": uniform, "tokens": tokens}
    launch(_decide, (batch,), shared | best | chosen, constants | {"SAMPLED": sampled}, rows)
    if sampled:
        shared |= {"remaining": _empty(peaks, batch, splits)}
        launch(_remain_splits, (splits, batch), shared, constants, blocks)
        launch(_redraw, (batch,), shared | chosen, constants, blocks)
    return Accepted(counts, tokens)


def _empty(like: Tensor, rows: int, splits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(rows, splits, dtype=dtype, device=like.device)


def _only(tiling: Tiling, block: str) -> dict[str, int]:
    """The tiling of a kernel that has this one block size."""
    return {name: value for name, value in tiling.items() if name == block or not name.isupper()}


class Kernels:
    """These kernels as a decode's `sampling`. tiling: of a kernel, by its name, the batch, and the slots judged."""

    def __init__(self, tiling: Callable[[str, int, int], Tiling]) -> None:
        self.tiling = tiling

    def draw(self, logits: Tensor, temperatures: Tensor, uniform: Tensor | None) -> Tensor:
        """As `draw`."""
        return draw(logits, temperatures, uniform, tiling=self.tiling("draw", logits.shape[0], logits.shape[1]))

    def verify(
        self, ar_logits: Tensor, draft: Draft, temperature: float, mixing_weight: float, uniform: Tensor | None
    ) -> Accepted:
        """As `verify`."""
        tiling = self.tiling("verify", ar_logits.shape[0], ar_logits.shape[1])
        return verify(ar_logits, draft, temperature, mixing_weight, uniform, tiling=tiling)
