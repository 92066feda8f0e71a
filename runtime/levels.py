"""Which acceptance counts single_forward should draft ahead for, from a measured histogram of accepted drafts.

A step that accepted n drafts is served by the closest proposal level l <= n. The block of that level is d = n - l
tokens stale: its first d drafts are known by now and dropped, and K - d are left to be judged. They are taken to be as
good as fresh ones, place by place, only fewer: where a fresh step accepts N, a stale one accepts min(N, K - d).

On zaya-nano that is within a tenth of what is measured (`python -m benchmarks.levels`). To condition on the dropped
drafts instead, E[N - d | N >= d], is half too high: a histogram mixes easy and hard text, so that N >= d tells of easy
text, while most stale steps follow a rejection, in hard text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime.config import require


def closest(levels: Sequence[int], accepted: int) -> int:
    """The highest level that is at most `accepted`."""
    return max(level for level in levels if level <= accepted)


def expected_tokens(histogram: Sequence[float], levels: Sequence[int]) -> float:
    """Mean tokens committed by the step behind a fresh one: sum over n of h(n) * (1 + G(n - l(n))).

    histogram: entry n counts the steps that accepted n of K fresh drafts, n = 0 .. K; h is its share. l(n) is the
    closest level <= n, and G(d) = E[min(N, K - d)] what a step accepts of drafts d tokens stale.
    Raises UserError for an empty histogram, and for levels that do not ascend from 0 to at most K.
    """
    share, accepted = _checked(histogram)
    _check_levels(levels, len(share) - 1)
    return float(sum(h * (1 + accepted[n - closest(levels, n)]) for n, h in enumerate(share)))


def steady_tokens(histogram: Sequence[float], levels: Sequence[int]) -> float:
    """Mean tokens committed per step in the long run, when a stale step may be followed by one as stale.

    The staleness d is a Markov chain that starts fresh: a step accepts m = min(N, K - d), and the next is m - l(m)
    stale. The mean is that of 1 + G(d) under its long-run distribution. Arguments and errors as for
    `expected_tokens`. With all levels 0 .. K every step is fresh, and both are the histogram's own mean plus one.
    """
    share, accepted = _checked(histogram)
    states = len(share)
    _check_levels(levels, states - 1)
    chain = np.zeros((states, states))
    for d in range(states):
        for n, h in enumerate(share):
            m = min(n, states - 1 - d)
            chain[d, m - closest(levels, m)] += h
    chain = (chain + np.eye(states)) / 2  # staying put every other time keeps the long run and rules out a period
    for _ in range(50):
        chain = chain @ chain
        chain /= chain.sum(1, keepdims=True)
    return float(chain[0] @ (1 + accepted))


def optimal(histogram: Sequence[float], count: int) -> tuple[int, ...]:
    """The `count` levels, 0 among them, with the most `expected_tokens`; of equals, those with the lower last levels.

    An exact dynamic programme: levels cut 0 .. K into runs that each level serves, and a run's worth does not depend
    on the others. Levels beyond the longest acceptance seen add nothing. Raises UserError for an empty histogram and
    unless 1 <= count <= K + 1.
    """
    share, accepted = _checked(histogram)
    size = len(share)
    require(1 <= count <= size, f"1 <= count <= K + 1 = {size} must hold, but got {count}")
    served = np.zeros((size, size + 1))  # [level, e]: what a level gives that serves n = level .. e - 1
    for level in range(size):
        served[level, level + 1 :] = np.cumsum(share[level:] * accepted[: size - level])
    # best[e]: (tokens, levels) of the best choice for n < e, with as many levels as rounds so far
    best: list[tuple[float, tuple[int, ...]] | None] = [None] + [(served[0][e], (0,)) for e in range(1, size + 1)]
    for _ in range(count - 1):
        longer: list[tuple[float, tuple[int, ...]] | None] = [None] * (size + 1)
        for e in range(1, size + 1):
            for level in range(1, e):
                before, held = best[level], longer[e]
                if before is not None and (held is None or before[0] + served[level][e] > held[0]):
                    longer[e] = before[0] + served[level][e], (*before[1], level)
        best = longer
    found = best[size]
    assert found is not None
    return found[1]


def _checked(histogram: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The shares h(n), and G(d) for every staleness d = 0 .. K."""
    counts = np.asarray(histogram, dtype=np.float64)
    require(
        counts.ndim == 1 and len(counts) >= 2 and bool(np.isfinite(counts).all()) and counts.min() >= 0,
        f"a histogram of accepted drafts must have a count >= 0 for each of 0 .. K with K >= 1, but is {histogram}",
    )
    require(counts.sum() > 0, "a histogram of accepted drafts must have counted a step, but all its entries are 0")
    share = counts / counts.sum()
    beyond = share[::-1].cumsum()[:-1][::-1]  # P(N >= 1) .. P(N >= K), which add up to the means
    return share, np.append(beyond.cumsum()[::-1], 0.0)


def _check_levels(levels: Sequence[int], drafts: int) -> None:
    require(
        tuple(levels[:1]) == (0,) and list(levels) == sorted(set(levels)) and levels[-1] <= drafts,
        f"levels must ascend from 0 to at most K = {drafts}, but are {tuple(levels)}",
    )
