"""Estimates with intervals, and comparisons of samplers, from counts alone. Torch-free."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist, median

import numpy as np

from hardware.files import UserError
from runtime.config import require

DRAWS = 1000  # of a bootstrap


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` problems with a 95% interval."""

    value: float
    low: float
    high: float
    count: int

    def holds(self, value: float) -> bool:
        """Whether a value lies in the interval."""
        return self.low <= value <= self.high


def paired_ratio(a: Sequence[float], b: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float, float]:
    """Median of the rounds' ratios a / b, and the interval of that median by order statistics.

    The median lies between the k-th smallest and k-th largest of n ratios with probability
    1 - 2 * sum(C(n, i), i < k) / 2^n whatever their distribution; k is the largest that keeps the confidence. With
    fewer than `measurement.INTERVAL_ROUNDS` even the whole range covers less than 95%: low and high are that range.
    """
    if len(a) != len(b) or not a:
        raise UserError(f"pairs must be complete and at least one, but got {len(a)} and {len(b)}")
    ratios = sorted(x / y for x, y in zip(a, b, strict=True))
    n, k = len(ratios), 1
    while 1 - 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n >= confidence:
        k += 1
    return median(ratios), ratios[k - 1], ratios[n - k]


def wilson(successes: int, trials: int, confidence: float = 0.95) -> Estimate:
    """A proportion with Wilson's score interval (Wilson 1927, doi 10.1080/01621459.1927.10502953)."""
    require(trials >= 1, f"a proportion needs at least one trial, but got {trials}")
    require(0 <= successes <= trials, f"0 <= successes <= trials must hold, but got {successes} of {trials}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, scale = successes / trials, 1 + z * z / trials
    middle = (share + z * z / (2 * trials)) / scale
    half = z / scale * (share * (1 - share) / trials + z * z / (4 * trials * trials)) ** 0.5
    # At 0 and 1 the interval ends there, which rounding would miss.
    low = 0.0 if successes == 0 else middle - half
    high = 1.0 if successes == trials else middle + half
    return Estimate(share, low, high, trials)


def bootstrap(
    statistic: Callable[[list[int]], float], count: int, *, confidence: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> Estimate:
    """A statistic of `count` problems with a seeded percentile bootstrap interval; it is given indices of problems."""
    require(count >= 1, f"a statistic needs at least one problem, but got {count}")
    rng = random.Random(seed)
    values = [statistic(rng.choices(range(count), k=count)) for _ in range(draws)]
    return Estimate(statistic(list(range(count))), *_percentiles(values, confidence), count)


def ratio(
    numerators: Sequence[float], denominators: Sequence[float], *, confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """sum(numerators) / sum(denominators), an entry per problem, with a percentile bootstrap interval over problems.

    Problems without a denominator (an output without tokens) add nothing; UserError when none has one.
    """
    require(
        len(numerators) == len(denominators) >= 1,
        f"a ratio needs a pair per problem, but got {len(numerators)} and {len(denominators)}",
    )
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    require(bool((below >= 0).all()) and below.sum() > 0, "a ratio's denominators must be >= 0 and not all 0")
    index = np.random.default_rng(seed).integers(len(above), size=(DRAWS, len(above)))
    below_sums = below[index].sum(1)
    drawn = above[index].sum(1)[below_sums > 0] / below_sums[below_sums > 0]
    return Estimate(float(above.sum() / below.sum()), *_percentiles(drawn.tolist(), confidence), len(above))


def mean(values: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> Estimate:
    """The mean of a value per problem, with a percentile bootstrap interval over problems."""
    return ratio(values, [1.0] * len(values), confidence=confidence, seed=seed)


def _percentiles(values: Sequence[float], confidence: float) -> tuple[float, float]:
    ordered, tail = sorted(values), (1 - confidence) / 2
    return ordered[int(tail * (len(ordered) - 1))], ordered[round((1 - tail) * (len(ordered) - 1))]


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, from `right` of n samples that were.

    1 - C(n - right, k) / C(n, k): the share of all k-subsets of the samples with a right one (Chen et al. 2021,
    arXiv 2107.03374, equation 1). Plugging right / n into 1 - (1 - p)^k instead is biased.
    """
    require(k >= 1, f"k >= 1 must hold, but got {k}")
    require(samples >= k, f"pass@{k} needs at least {k} samples, but got {samples}")
    require(0 <= right <= samples, f"0 <= right <= samples must hold, but got {right} of {samples}")
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def pass_rate(rights: Sequence[int], samples: int, k: int) -> Estimate:
    """Mean pass@k of problems of which `rights` of `samples` samples were right; the interval is over the problems.

    By bootstrap; where every problem's value is 0 or 1 (as for k = samples) by Wilson's score, because problems that
    all passed leave a bootstrap no width.
    """
    require(len(rights) >= 1, "pass@k needs at least one problem")
    values = [pass_at_k(samples, right, k) for right in rights]
    if set(values) <= {0.0, 1.0}:
        return wilson(round(sum(values)), len(values))
    return mean(values)


@dataclass(frozen=True)
class Paired:
    """Two samplers on the same prompts and seeds: in how many pairs only one of them was right, and how odd that is."""

    pairs: int
    only_first: int
    only_second: int
    p_value: float  # two-sided; of one comparison, not adjusted for several


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """The exact McNemar test: are discordant pairs split evenly? (McNemar 1947, doi 10.1007/BF02295996)

    Two-sided binomial on the discordant pairs: twice the smaller tail of Binomial(discordant, 1/2), at most 1.
    With several samples per problem it tests whether each problem is solved equally often by both; the pairs of one
    problem are then independent, and each discordant one falls either way with the same chance.
    """
    require(len(first) == len(second), f"pairs must be complete, but got {len(first)} and {len(second)}")
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    discordant = only_first + only_second
    tail = sum(math.comb(discordant, i) for i in range(min(only_first, only_second) + 1))
    return Paired(len(first), only_first, only_second, min(1.0, 2 * tail / 2**discordant))


def accuracy_under_parallelism(
    points: Sequence[tuple[float, float]], best: float | None = None, *, penalty: float = 3.0, slack: float = 5.0
) -> float:
    """AUP: the area under accuracy over parallelism, lower accuracies weighted down (d3LLM, arXiv 2601.07568).

    points: (parallelism, accuracy in percent), as tokens per forward or per second; sorted here. Those more than
    `slack` points of accuracy below the slowest one are left out. best: the highest accuracy of any method on the task
    (default: of the points). With r ascending and W(y) = min(exp(-penalty * (1 - y / best)), 1):
    r_1 y_1 + sum of (r_i - r_{i-1}) * (y_i W(y_i) + y_{i-1} W(y_{i-1})) / 2, so that y everywhere at `best` gives the
    fastest r times y. As defined in the authors' blog (hao-ai-lab, text-diffusion), penalty 3 and slack 5 included.
    """
    require(len(points) >= 1, "AUP needs at least one point")
    require(all(r > 0 for r, _ in points), f"parallelism > 0 must hold, but got {min(r for r, _ in points)}")
    require(all(0 <= y <= 100 for _, y in points), "accuracy must be in percent, from 0 to 100")
    ordered = sorted(points, key=lambda point: point[0])
    kept = [(r, y) for r, y in ordered if y >= ordered[0][1] - slack]
    top = max(y for _, y in points) if best is None else best
    require(top >= max(y for _, y in kept), f"best must be the highest accuracy, but {top} is below another")

    def weighted(y: float) -> float:
        return y * min(math.exp(-penalty * (1 - y / top)), 1.0) if top > 0 else 0.0

    area = kept[0][0] * kept[0][1]
    for (r, y), (r_next, y_next) in pairwise(kept):
        area += (r_next - r) * (weighted(y) + weighted(y_next)) / 2
    return area


def repetition(tokens: Sequence[int], length: int = 8) -> tuple[int, int]:
    """How many n-grams of this length have occurred before in the same output, and how many there are.

    Their ratio is near 1 in a loop. Text that copies its state line by line repeats itself too: compare to references.
    """
    require(length >= 1, f"length >= 1 must hold, but got {length}")
    grams = [tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)]
    return len(grams) - len(set(grams)), len(grams)
