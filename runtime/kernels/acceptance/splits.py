"""What a pass leaves of each split of a row of logits, and what the next one makes of it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _peak(x, axis: tl.constexpr):
    """The largest of x, or 0 where all are -inf: what exponents can be taken from."""
    peak = tl.max(x, axis=axis)
    return tl.where(peak == -float("inf"), 0.0, peak)


@triton.jit
def leave(x, inverse, peaks, sums, place):
    """Store a split's peak, and the sum of exp((x - peak) * inverse)."""
    peak = _peak(x, 0)
    tl.store(peaks + place, peak)
    tl.store(sums + place, tl.sum(tl.exp((x - peak) * inverse), axis=0))


@triton.jit
def leave_best(x, column, peaks, bests, place, V: tl.constexpr):
    """Store a split's largest entry, and the first column that has it."""
    peak = tl.max(x, axis=0)
    tl.store(peaks + place, peak)
    tl.store(bests + place, tl.minimum(tl.min(tl.where(x == peak, column, V), axis=0), V - 1))


@triton.jit
def first_best(peaks, bests, row, split, inside, SPLITS: tl.constexpr, V: tl.constexpr):
    """The first column of a row's largest entry, from its splits."""
    peak = tl.load(peaks + row * SPLITS + split, mask=inside, other=-float("inf"))
    best = tl.load(bests + row * SPLITS + split, mask=inside, other=V - 1)
    return tl.min(tl.where(inside & (peak == tl.max(peak, axis=0)), best, V - 1), axis=0)


@triton.jit
def row_mass(peaks, sums, row, inverse, split, inside, SPLITS: tl.constexpr):
    """A row's peak, and its splits' sums beside that peak."""
    peak = tl.load(peaks + row * SPLITS + split, mask=inside, other=-float("inf"))
    mass = tl.load(sums + row * SPLITS + split, mask=inside, other=0.0)
    highest = _peak(tl.where(mass > 0, peak, -float("inf")), 0)
    return highest, tl.where(mass > 0, mass * tl.exp((peak - highest) * inverse), 0.0)


@triton.jit
def find_place(weight, place, goal):
    """The place at which the sum of the weights exceeds the goal; where rounding leaves none, of the last weight."""
    some = weight > tl.sum(weight, axis=0) * 1e-30  # less is nothing: so that what is chosen has entries above zero
    beyond = some & (tl.cumsum(weight, axis=0) > goal)
    none = 2147483647
    first = tl.min(tl.where(beyond, place, none), axis=0)
    return tl.where(first == none, tl.max(tl.where(some, place, 0), axis=0), first)


@triton.jit
def row_totals(peaks, sums, row, inverse, split, inside, SPLITS: tl.constexpr):
    """`row_mass` of several rows at once: their peaks, and the sums of all splits. inverse: per row."""
    at = row[:, None] * SPLITS + split[None, :]
    peak = tl.load(peaks + at, mask=inside, other=-float("inf"))
    mass = tl.load(sums + at, mask=inside, other=0.0)
    highest = _peak(tl.where(mass > 0, peak, -float("inf")), 1)
    beside = tl.where(mass > 0, mass * tl.exp((peak - highest[:, None]) * inverse[:, None]), 0.0)
    return highest, tl.sum(beside, axis=1)
