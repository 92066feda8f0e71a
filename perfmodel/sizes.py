"""How large a size may be that a user names: far beyond what is sensible, and within what is calculated exactly."""

from __future__ import annotations

from collections.abc import Iterable

from runtime.config import require

LARGEST = 1_000_000_000  # sequences, and tokens of one
LARGEST_BLOCK = 1024  # of drafts: acceptance is counted draft by draft
_BLOCKS = ("draft-tokens", "steps", "levels")


def require_sizes(**sizes: float | Iterable[float]) -> None:
    """UserError for a size, or one of several, beyond its limit; it is named with dashes, as an option is."""
    for name, given in sizes.items():
        option = name.replace("_", "-")
        most = LARGEST_BLOCK if option in _BLOCKS else LARGEST
        for size in given if isinstance(given, Iterable) else (given,):
            require(size <= most, f"{option} <= {most:,} must hold, but got {size}")
