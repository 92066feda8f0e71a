"""How many distinct experts a forward reads per layer: an input with a name, since it decides the weight bytes."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hardware.files import UserError, known, read_json
from runtime.config import require

Array = npt.NDArray[np.float64]
Kind = Literal["uniform", "all", "min", "correlated", "measured"]
_KINDS = ("uniform", "all", "min", "correlated", "measured")
_FORM = re.compile(r"(?P<kind>[a-z]+)(?:\((?P<number>[^)]*)\)|:(?P<path>.+))?")


@dataclass(frozen=True)
class ExpertCoverage:
    """Distinct experts of a layer that a forward of batch x slots tokens touches.

    uniform: every token picks an expert independently and evenly. correlated: each further token of a sequence's block
    repeats an earlier choice with probability `rho`, else picks evenly. all, min: the two limits that published tools
    assume (every expert; as few as tokens allow one each, min(E, T)). measured: (tokens, distinct) pairs recorded by
    the runtime, interpolated over the logarithm of the tokens.
    `skip_share` is the share of tokens routed to the skip expert, which reads nothing (measured counts exclude it).
    """

    kind: Kind = "uniform"
    rho: float = 0.0
    skip_share: float = 0.0
    measured: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        require(0 <= self.rho <= 1, f"0 <= rho <= 1 must hold, but got {self.rho}")
        require(0 <= self.skip_share < 1, f"0 <= skip_share < 1 must hold, but got {self.skip_share}")
        if self.kind != "measured":
            return
        require(len(self.measured) >= 1, "measured coverage must have at least one (tokens, distinct experts) pair")
        tokens, distinct = zip(*self.measured, strict=True)
        require(min(tokens) >= 1 and min(distinct) >= 0, "measured coverage must have tokens >= 1 and experts >= 0")
        require(
            all(a < b for a, b in itertools.pairwise(tokens)),
            f"measured coverage must be ordered by tokens, but has {tokens}",
        )

    def distinct(self, batch: npt.ArrayLike, slots: npt.ArrayLike, experts: int) -> Array:
        """Expected distinct experts, broadcast over `batch` and `slots`; at most `experts`.

        uniform: E (1 - (1 - p)^T) with p = (1 - skip_share) / E, T = batch * slots. correlated: the same with
        1 + (slots - 1)(1 - rho) independent choices per sequence. Raises UserError for tokens beyond a measured range.
        """
        batch, slots = np.asarray(batch, dtype=float), np.asarray(slots, dtype=float)
        tokens = batch * slots
        if self.kind == "all":
            return np.full(tokens.shape, float(experts))
        if self.kind == "min":
            return np.minimum(experts, tokens * (1 - self.skip_share))
        if self.kind == "measured":
            return self._interpolate(tokens, experts)
        choices = batch * (1 + (slots - 1) * (1 - self.rho)) if self.kind == "correlated" else tokens
        rate = (1 - self.skip_share) / experts
        return experts * -np.expm1(choices * math.log1p(-rate)) if rate < 1 else np.ones(tokens.shape)

    def _interpolate(self, tokens: Array, experts: int) -> Array:
        known_tokens, distinct = (np.array(column, dtype=float) for column in zip(*self.measured, strict=True))
        if known_tokens[0] > 1:  # one token reads one expert, or none when it skips
            known_tokens = np.insert(known_tokens, 0, 1.0)
            distinct = np.insert(distinct, 0, min(1.0 - self.skip_share, distinct[0]))
        saturated = distinct[-1] >= 0.99 * experts
        require(
            bool(saturated or np.max(tokens) <= known_tokens[-1]),
            f"measured expert coverage reaches {known_tokens[-1]:.0f} tokens per forward, but {np.max(tokens):.0f} "
            "are asked for: record more or name another coverage",
        )
        found = np.interp(np.log(tokens), np.log(known_tokens), np.maximum.accumulate(distinct))
        return np.minimum(found, experts)

    def __str__(self) -> str:
        """The name a prediction carries; `parse_coverage` reads it back, except for measured pairs."""
        if self.kind == "correlated":
            return f"correlated({self.rho:g})"
        return f"uniform({self.skip_share:g})" if self.kind == "uniform" and self.skip_share else self.kind


def parse_coverage(text: str) -> ExpertCoverage:
    """Read `uniform`, `uniform(SKIP_SHARE)`, `correlated(RHO)`, `all`, `min` or `measured:FILE.json`.

    The file holds {"tokens": [...], "distinct_experts": [...], "skip_share": number (optional)}.
    """
    match = _FORM.fullmatch(text)
    kind = match["kind"] if match else ""
    if match is None or kind not in _KINDS:
        raise known("expert coverage", text, (*_KINDS[:3], "uniform(SKIP_SHARE)", "correlated(RHO)", "measured:FILE"))
    if kind == "measured":
        require(match["path"] is not None, "measured expert coverage needs its file: measured:FILE.json")
        return load_measured(Path(match["path"]))
    require(match["path"] is None, f"only measured expert coverage takes a file, but got {text!r}")
    number = _number(match["number"], text)
    if kind == "correlated":
        require(number is not None, "correlated expert coverage needs its correlation: correlated(0.3)")
        return ExpertCoverage("correlated", rho=number or 0.0)
    if kind == "uniform":
        return ExpertCoverage("uniform", skip_share=number or 0.0)
    require(number is None, f"{kind} expert coverage takes no number, but got {text!r}")
    return ExpertCoverage("all" if kind == "all" else "min")


def _number(text: str | None, whole: str) -> float | None:
    if text is None:
        return None
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"expert coverage {whole!r} must have a number in its brackets") from error


def load_measured(path: Path) -> ExpertCoverage:
    """Read coverage that the runtime recorded (see `parse_coverage` for the layout)."""
    data: dict[str, Any] = read_json(path)
    for key in data:
        if key not in ("tokens", "distinct_experts", "skip_share"):
            raise UserError(f"{path}: unknown key {key!r}; known: distinct_experts, skip_share, tokens")
    try:
        pairs = tuple(zip(map(float, data["tokens"]), map(float, data["distinct_experts"]), strict=True))
        skip_share = float(data.get("skip_share", 0.0))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} must hold tokens and distinct_experts, two lists of as many numbers") from error
    return ExpertCoverage("measured", measured=tuple(sorted(pairs)), skip_share=skip_share)
