"""A fixed set of requests run to the end: the fast ones finish first, and the slow ones go on in a thinning batch.

Requests of one length differ in the steps they take, because their drafts are accepted unevenly; where a sequence may
end early they differ in length too. Kept full, a batch has no such tail: that is the steady state, the other answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime.config import require

Array = npt.NDArray[np.float64]
POINTS = 17  # of the course, closer together towards its end


@dataclass(frozen=True)
class Drain:
    """How a closed batch empties, in phases along the last axis: how many are active, and for how long.

    steps: of each phase, over those of the mean request. sum(active * steps) = batch: nothing is lost or added.
    """

    active: Array
    steps: Array

    def mean_seconds(self, step_seconds: Array) -> Array:
        """Seconds that all requests take together, over the mean request's steps, from those of a step per phase."""
        return (step_seconds * self.steps).sum(-1)


def drain(batch: npt.ArrayLike, cv: npt.ArrayLike) -> Drain:
    """The phases of `batch` requests whose steps have the coefficient of variation `cv`; arrays broadcast.

    Steps are lognormal; the i-th request to finish takes the quantile (i - 3/8) / (batch + 1/4) of them, close to its
    mean over draws (Blom 1958): within 1% of drawn batches at a cv of 0.35, 6% at 0.9. One request, or cv 0, never
    drains.
    UserError unless batch >= 1 and cv >= 0.
    """
    from scipy.special import ndtri

    size, spread = np.broadcast_arrays(
        np.asarray(batch, dtype=float)[..., None], np.asarray(cv, dtype=float)[..., None]
    )
    require(bool((size >= 1).all()), f"batch >= 1 must hold, but got {size.min():g}")
    require(bool((spread >= 0).all()), f"cv >= 0 must hold, but got {spread.min():g}")
    left = 0.5 + (size - 1) * np.linspace(1, 0, POINTS) ** 2  # from batch - 1/2, when the first finishes, to 1/2
    width = np.sqrt(np.log1p(spread**2))
    steps = np.diff(np.exp(width * ndtri(1 - (left + 1 / 8) / (size + 1 / 4))), prepend=0.0)
    active = np.concatenate([size, np.maximum(np.rint((left[..., 1:] + left[..., :-1]) / 2), 1)], -1)
    return Drain(active, steps * size / (active * steps).sum(-1, keepdims=True))


def closed_batch_throughput(
    step_seconds: Callable[[Array], Array], batch: npt.ArrayLike, tokens_per_step: npt.ArrayLike, cv: npt.ArrayLike
) -> Array:
    """Tokens per second of `batch` requests that start together and are not replaced.

    step_seconds: of a step with so many active (phases along the last axis). tokens_per_step: all tokens over all
    steps of all requests. The tokens of a request cancel out: twice as many take twice as long.
    """
    course = drain(batch, cv)
    return np.asarray(batch) * np.asarray(tokens_per_step) / course.mean_seconds(step_seconds(course.active))
