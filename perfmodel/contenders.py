"""The settings that a comparison tries, and the tokens that a step of each commits: acceptance in any of its forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from perfmodel.acceptance import histogram_from_rates, judged, tokens_per_step
from perfmodel.known_acceptance import KnownAcceptance
from runtime.config import DecodingConfig, Sampler, replace, require
from runtime.levels import optimal

MOST_LEVELS = 6  # of the level sets that are chosen from a histogram, beside all levels
DRAFT_TOKENS = (4, 8, 16)  # compared where nothing says which
Levels = tuple[int, ...] | None  # None: all


@dataclass(frozen=True)
class Acceptance:
    """What is known of how many drafts are accepted: at most one form, as for `acceptance.tokens_per_step`, or a name.

    A length is that of one setting, so it says nothing of another K or level set. Rates and histograms are those of
    fresh drafts; a histogram stands for a smaller K too: what accepted more drafts accepts all of the fewer ones. A
    known acceptance says for which samplers and K it is known.
    """

    length: float | None = None
    rates: tuple[float, ...] | None = None
    histogram: tuple[float, ...] | None = None
    known: KnownAcceptance | None = None

    def __post_init__(self) -> None:
        given = (self.length, self.rates, self.histogram) != (None, None, None)
        require(self.known is None or not given, "a known acceptance takes no length, rates or histogram beside it")

    def of(self, decoding: DecodingConfig) -> Acceptance:
        """What is known of one setting. UserError for a sampler or a K that a known acceptance says nothing of."""
        k = decoding.draft_tokens
        if self.known is not None:
            return Acceptance(histogram=tuple(self.known.histogram(decoding.sampler, k)))
        rates = self.rates if self.rates is None or len(self.rates) == 1 else self.rates[:k]
        return Acceptance(self.length, rates, self._folded(k))

    def draft_tokens(self, sampler: Sampler) -> tuple[int, ...]:
        """The K to compare where none are given: all that a known acceptance was measured at, of a length one."""
        if self.length is not None:
            return DRAFT_TOKENS[-1:]
        if self.known is not None and sampler in self.known.lengths:
            return tuple(sorted(self.known.lengths[sampler]))
        rates = self.rates if self.known is None else self.known.rates
        most = len(rates) if rates and (self.known or len(rates) > 1) else DRAFT_TOKENS[-1]
        return tuple(k for k in DRAFT_TOKENS if k <= most) or (most,)

    def tokens(self, decoding: DecodingConfig) -> float:
        """Tokens that a step commits. UserError where a sampler needs acceptance and has none, or an impossible one."""
        return self.of(decoding).checked(decoding) if judged(decoding) else tokens_per_step(decoding)

    def checked(self, decoding: DecodingConfig) -> float:
        """The same, and a UserError for a sampler that takes no acceptance where some is given."""
        own = self.of(decoding)
        return tokens_per_step(decoding, length=own.length, rates=own.rates, histogram=own.histogram)

    def shares(self, sampler: Sampler, draft_tokens: int) -> list[float] | None:
        """Steps by fresh drafts accepted, 0 .. K: None where only a length, or nothing, is known."""
        if self.known is not None:
            return self.known.histogram(sampler, draft_tokens)
        if self.rates is not None:
            return histogram_from_rates(self.rates if len(self.rates) == 1 else self.rates[:draft_tokens], draft_tokens)
        folded = self._folded(draft_tokens)
        return None if folded is None else [*folded, *[0.0] * (draft_tokens + 1 - len(folded))]

    def _folded(self, draft_tokens: int) -> tuple[float, ...] | None:
        if self.histogram is None or len(self.histogram) <= draft_tokens + 1:
            return self.histogram
        return (*self.histogram[:draft_tokens], sum(self.histogram[draft_tokens:]))


@dataclass(frozen=True)
class Contender:
    """A setting and the tokens that one of its steps commits per sequence."""

    decoding: DecodingConfig
    acceptance_length: float


def contenders(
    decoding: DecodingConfig,
    acceptance: Acceptance,
    draft_tokens: Sequence[int] | None = None,
    level_sets: Sequence[Levels] | None = None,
) -> list[Contender]:
    """Settings of `decoding`'s sampler for each K, and for single_forward for each level set that fits the K.

    draft_tokens None: those of the acceptance. level_sets None: all levels and, where the shares of accepted drafts
    are known, the best 1 to MOST_LEVELS levels.
    UserError for a length given for several settings, and for a K that no level set fits.
    """
    if draft_tokens is None:
        draft_tokens = acceptance.draft_tokens(decoding.sampler)
    require(len(draft_tokens) > 0 and min(draft_tokens) >= 1, f"draft_tokens >= 1 must hold, but got {draft_tokens}")
    found: list[DecodingConfig] = []
    for k in dict.fromkeys(draft_tokens):
        if decoding.sampler != "single_forward":
            found.append(replace(decoding, draft_tokens=k))
            continue
        sets = [s for s in level_sets if s is None or s[-1] <= k] if level_sets else _sensible(acceptance, k)
        require(len(sets) > 0, f"proposal levels must be at most draft_tokens = {k}, but are {list(level_sets or ())}")
        found += [replace(decoding, draft_tokens=k, proposal_levels=s) for s in dict.fromkeys(sets)]
    require(
        acceptance.length is None or len(found) == 1 or not judged(decoding),
        f"an acceptance length is that of one setting, but {decoding.sampler} has {len(found)} to compare: give "
        "one of --draft-tokens (and of --levels), or rates or a histogram, which say what each of them accepts",
    )
    return [Contender(d, acceptance.tokens(d)) for d in found]


def _sensible(acceptance: Acceptance, draft_tokens: int) -> list[Levels]:
    shares = acceptance.shares("single_forward", draft_tokens)
    if shares is None:
        return [None]
    chosen: list[Levels] = [optimal(shares, count) for count in range(1, min(MOST_LEVELS, draft_tokens) + 1)]
    return [None, *(levels for levels in chosen if levels is not None and len(levels) <= draft_tokens)]
