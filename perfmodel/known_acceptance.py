"""Acceptances that ship, by name: the drafts accepted in published runs of ZAYA, and in measured ones of ours."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from hardware.files import build, known, read_yaml
from perfmodel.acceptance import histogram_from_rates
from runtime.config import Sampler, require

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class KnownAcceptance:
    """The drafts that steps accept on some text; either mean lengths by sampler and K, or rates by position.

    lengths: tokens committed per step, the verifier's own included, with fresh drafts after every step (single_forward:
    of all levels). shape: of the share of steps that accept at least n drafts, r ** n ** shape: 1 is geometric, less is
    more steps that accept none or all. r follows from the length.
    rates: of each position, that a draft is accepted if all before it were, whatever the sampler.
    """

    name: str
    kind: Literal["measured", "published"]
    what: str
    source: str
    lengths: dict[Sampler, dict[int, float]] = field(default_factory=dict)
    shape: float | None = None
    rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        require(bool(self.lengths) != bool(self.rates), "an acceptance must have either lengths or rates")
        require(bool(self.lengths) == (self.shape is not None), "lengths, and they alone, must come with a shape")
        require(self.shape is None or self.shape > 0, f"shape > 0 must hold, but got {self.shape}")
        for by_draft_tokens in self.lengths.values():
            for k, length in by_draft_tokens.items():
                require(1 < length < k + 1, f"1 < length < K + 1 must hold, but is {length} at K = {k}")

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}: {self.what})"

    def length(self, sampler: Sampler, draft_tokens: int) -> float:
        """Mean tokens per step with fresh drafts; between two K whose length is known, on a line between them.

        UserError for a sampler or a K that nothing was measured of: shorter blocks of a model draft worse than the
        first tokens of longer ones, so that none follows from another.
        """
        if self.rates:
            require(
                draft_tokens <= len(self.rates),
                f"{self.name} was measured up to K = {len(self.rates)}, but K is {draft_tokens} (--draft-tokens)",
            )
            return 1 + float(np.cumprod(self.rates[:draft_tokens]).sum())
        if sampler not in self.lengths:
            raise known(f"sampler of acceptance {self.name}", sampler, self.lengths)
        points = sorted(self.lengths[sampler].items())
        least, most = points[0][0], points[-1][0]
        require(
            least <= draft_tokens <= most,
            f"{self.name} was measured of {sampler} with K = {least}{f' to {most}' if most > least else ''}, but K is "
            f"{draft_tokens} (--draft-tokens)",
        )
        return float(np.interp(draft_tokens, [k for k, _ in points], [length for _, length in points]))

    def histogram(self, sampler: Sampler, draft_tokens: int) -> list[float]:
        """The share of steps that accept 0 .. K fresh drafts, with the mean that `length` says."""
        accepted = self.length(sampler, draft_tokens) - 1
        if self.shape is None:
            return histogram_from_rates(self.rates[:draft_tokens], draft_tokens)
        reached = np.append(_reached(accepted, draft_tokens, self.shape), 0.0)
        return [float(share) for share in reached[:-1] - reached[1:]]


def _reached(accepted: float, draft_tokens: int, shape: float) -> Array:
    """The shares r ** n ** shape of steps that accept at least n = 0 .. K drafts, r such that their mean is `accepted`.

    A discrete Weibull distribution (Nakagawa and Osaki 1975), found by bisection on r.
    """
    places = np.arange(draft_tokens + 1, dtype=float) ** shape
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (middle**places)[1:].sum() < accepted else (low, middle)
    return np.asarray(low**places)


def _folder() -> Path:
    return Path(str(importlib.resources.files("perfmodel") / "acceptances"))


def list_acceptances() -> dict[str, Path]:
    """The bundled acceptances by name."""
    return {path.stem: path for path in sorted(_folder().glob("*.yaml"))}


@cache
def load_acceptance(name: str) -> KnownAcceptance:
    """A bundled acceptance; UserError for an unknown name."""
    paths = list_acceptances()
    if name not in paths:
        raise known("acceptance", name, paths)
    return build(KnownAcceptance, read_yaml(paths[name]), str(paths[name]))
