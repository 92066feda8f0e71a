"""Tokens committed per step, from whichever form the acceptance of drafts is known in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from runtime.config import DecodingConfig, require
from runtime.levels import steady_tokens


def tokens_from_histogram(histogram: Sequence[float], draft_tokens: int) -> float:
    """1 + mean accepted drafts; entry n of the histogram counts the steps (or their share) that accepted n drafts."""
    counts = _histogram(histogram, draft_tokens)
    return float(1 + counts @ np.arange(len(counts)) / counts.sum())


def tokens_from_rates(rates: Sequence[float], draft_tokens: int) -> float:
    """1 + sum of products: rate i is the probability that draft i is accepted, given that all before it were.

    A single rate holds for every position (Leviathan et al. 2023, eq. 1); otherwise one per draft.
    """
    return float(1 + _reached(rates, draft_tokens)[1:].sum())


def histogram_from_rates(rates: Sequence[float], draft_tokens: int) -> list[float]:
    """The share of steps that accept exactly n = 0 .. K drafts: reached so far, and no further."""
    reached = _reached(rates, draft_tokens)
    return [float(share) for share in reached - np.append(reached[1:], 0.0)]


def judged(decoding: DecodingConfig) -> bool:
    """Whether drafts are accepted or rejected, so that tokens per step depend on the model."""
    return decoding.drafts and (decoding.sampler != "denoising" or decoding.verify)


def tokens_per_step(
    decoding: DecodingConfig,
    *,
    length: float | None = None,
    histogram: Sequence[float] | None = None,
    rates: Sequence[float] | None = None,
) -> float:
    """Expected tokens that one step commits per sequence, the verifier's own token included.

    Autoregressive decoding commits one, denoising without a verify the whole block. A sampler whose drafts are judged
    needs exactly one of the three forms: acceptance is never invented. Histogram and rates are those of the sampler's
    own fresh drafts, for single_forward those of all levels: fewer levels leave some stale, which is accounted for
    (`runtime.levels.steady_tokens`). A length is that of the very setting. Raises UserError for none, several, or an
    impossible one.
    """
    forms = {"length": length, "histogram": histogram, "rates": rates}
    given = [name for name, value in forms.items() if value is not None]
    if not judged(decoding):
        what = "drafts nothing" if not decoding.drafts else "without verify keeps what it drafts"
        require(not given, f"{decoding.sampler} {what}, so it takes no acceptance {' or '.join(given)}")
        return float(decoding.draft_tokens if decoding.drafts else 1)
    require(
        len(given) == 1,
        f"{decoding.sampler} needs exactly one of an acceptance length, histogram or rates, "
        f"but got {' and '.join(given) or 'none'}",
    )
    if length is not None:
        require(
            1 <= length <= decoding.draft_tokens + 1,
            f"1 <= acceptance_length <= draft_tokens + 1 = {decoding.draft_tokens + 1} must hold, but got {length:g}",
        )
        return float(length)
    k = decoding.draft_tokens
    if decoding.sampler == "single_forward":
        counts = _histogram(histogram, k).tolist() if histogram is not None else histogram_from_rates(rates or (), k)
        return steady_tokens(counts + [0.0] * (k + 1 - len(counts)), decoding.levels)
    return tokens_from_histogram(histogram, k) if histogram is not None else tokens_from_rates(rates or (), k)


def _histogram(histogram: Sequence[float], draft_tokens: int) -> npt.NDArray[np.float64]:
    counts = np.asarray(histogram, dtype=float)
    require(
        1 <= len(counts) <= draft_tokens + 1,
        f"an acceptance histogram has at most draft_tokens + 1 = {draft_tokens + 1} entries, but got {len(counts)}",
    )
    require(
        bool((counts >= 0).all()) and 0 < counts.sum() < np.inf,
        f"an acceptance histogram has counts >= 0, not all 0, but got {list(histogram)}",
    )
    return counts


def _reached(rates: Sequence[float], draft_tokens: int) -> npt.NDArray[np.float64]:
    """The probability that at least n = 0 .. K drafts are accepted."""
    values = np.asarray(rates, dtype=float)
    require(
        len(values) in (1, draft_tokens),
        f"acceptance rates must be one number or draft_tokens = {draft_tokens} of them, but got {len(values)}",
    )
    require(bool(((values >= 0) & (values <= 1)).all()), f"0 <= rate <= 1 must hold, but got {list(rates)}")
    return np.cumprod(np.concatenate([[1.0], np.broadcast_to(values, draft_tokens)]))
