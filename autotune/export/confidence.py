"""`confidence_threshold` means opposite things: SGLang and LMDeploy ask for a probability to reach or exceed, Gemma's
diffusion sampler (transformers, vLLM, SGLang's Gemma4Renoise) for an entropy to stay below. This maps one to the other.

What is mapped is a guarantee. Among distributions whose greatest probability is at most tau the entropy is least for
as many copies of tau as fit and the rest on one more outcome (entropy is concave: its least value on that polytope is
at a corner). Below that entropy the greatest probability must exceed tau, and at no larger bound must it.
"""

from __future__ import annotations

import math

from runtime.config import require


def entropy_bound(probability: float) -> float:
    """The largest h, in nats, such that every distribution of entropy below h has a probability above this one.

    0 < probability <= 1. From 1/2 on it is the binary entropy; at 1 it is 0: nothing exceeds 1. It does not depend on
    the size of the vocabulary V as long as probability >= 1 / V; below that, every distribution has one above it.
    """
    require(0 < probability <= 1, f"0 < probability <= 1 must hold, but got {probability}")
    copies = math.floor(1 / probability)
    rest = max(0.0, 1 - copies * probability)  # rounding may make it a hair less than nothing
    return -copies * probability * math.log(probability) - (rest * math.log(rest) if rest > 0 else 0.0)


def sure_probability(entropy: float) -> float:
    """The inverse: the largest probability that every distribution of entropy below this one exceeds, within 1e-15.

    0 <= entropy <= 500, in nats. At 0 it is 1; it falls towards 0 as the entropy grows.
    """
    require(0 <= entropy <= 500, f"0 <= entropy <= 500 must hold, but got {entropy}")
    low, high = math.exp(-entropy) / 2, 1.0  # entropy_bound(p) >= -log p, so that at `low` it exceeds the entropy
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if entropy_bound(middle) >= entropy else (low, middle)
    return high if entropy_bound(high) >= entropy else low


def mean_entropy_bound(probability: float, positions: int) -> float:
    """For a sampler that looks at the mean entropy of a block: below it, every position exceeds the probability.

    No entropy is negative, so a mean below h / n leaves none of n positions above h. It is a strict reading: a mean
    just above it may still come from positions that all exceed the probability.
    """
    require(positions >= 1, f"positions >= 1 must hold, but got {positions}")
    return entropy_bound(probability) / positions
