"""Tokens committed per step, from whichever form the acceptance of drafts is known in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime.config import DecodingConfig, require


def tokens_from_histogram(histogram: Sequence[float], draft_tokens: int) -> float:
    """1 + mean accepted drafts; entry n of the histogram counts the steps (or their share) that accepted n drafts."""
    counts = np.asarray(histogram, dtype=float)
    require(
        1 <= len(counts) <= draft_tokens + 1,
        f"an acceptance histogram has at most draft_tokens + 1 = {draft_tokens + 1} entries, but got {len(counts)}",
    )
    require(bool((counts >= 0).all()) and counts.sum() > 0, "an acceptance histogram has counts >= 0, not all 0")
    return float(1 + counts @ np.arange(len(counts)) / counts.sum())


def tokens_from_rates(rates: Sequence[float], draft_tokens: int) -> float:
    """1 + sum of products: rate i is the probability that draft i is accepted, given that all before it were.

    A single rate holds for every position (Leviathan et al. 2023, eq. 1); otherwise one per draft.
    """
    values = np.asarray(rates, dtype=float)
    require(
        len(values) in (1, draft_tokens),
        f"acceptance rates must be one number or draft_tokens = {draft_tokens} of them, but got {len(values)}",
    )
    require(bool(((values >= 0) & (values <= 1)).all()), f"0 <= rate <= 1 must hold, but got {list(rates)}")
    return float(1 + np.cumprod(np.broadcast_to(values, draft_tokens)).sum())


def tokens_per_step(
    decoding: DecodingConfig,
    *,
    length: float | None = None,
    histogram: Sequence[float] | None = None,
    rates: Sequence[float] | None = None,
) -> float:
    """Expected tokens that one step commits per sequence, the verifier's own token included.

    Autoregressive decoding commits one. A drafting sampler needs exactly one of the three forms: acceptance is never
    invented. Raises UserError for none, several, or an impossible one.
    """
    forms = {"length": length, "histogram": histogram, "rates": rates}
    given = [name for name, value in forms.items() if value is not None]
    if decoding.sampler == "autoregressive":
        require(not given, f"autoregressive decoding drafts nothing, so it takes no acceptance {' or '.join(given)}")
        return 1.0
    require(
        len(given) == 1,
        f"{decoding.sampler} needs exactly one of an acceptance length, histogram or rates, "
        f"but got {' and '.join(given) or 'none'}",
    )
    if histogram is not None:
        return tokens_from_histogram(histogram, decoding.draft_tokens)
    if rates is not None:
        return tokens_from_rates(rates, decoding.draft_tokens)
    assert length is not None
    require(
        1 <= length <= decoding.draft_tokens + 1,
        f"1 <= acceptance_length <= draft_tokens + 1 = {decoding.draft_tokens + 1} must hold, but got {length:g}",
    )
    return float(length)
