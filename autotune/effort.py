"""How much to measure: presets of effort, each field of which an option may replace, and a budget of time."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hardware.files import UserError, known
from runtime.config import require

_UNIT_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}
LEAST_SHARE_SECONDS = 1.0  # a bucket that comes late gets this much: what was begun can then still be decided


@dataclass(frozen=True)
class Effort:
    """How long to search each bucket of batch and context, and how thoroughly to measure a setting.

    trials: distinct settings per bucket. seconds: of searching and deciding a bucket (None: as long as it takes).
    prompts, new_tokens: the work that a setting decodes; the prompts are rounded up to whole batches. repeats: recorded
    passes over it. rounds: alternating rounds of the best setting against the default. trial_seconds: the time limit
    of one call of the device. tilings: those of a kernel that are measured per bucket, the best by the model.
    """

    trials: int
    seconds: float | None
    prompts: int
    new_tokens: int
    repeats: int
    rounds: int
    trial_seconds: float
    tilings: int

    def __post_init__(self) -> None:
        for name in ("trials", "prompts", "new_tokens", "repeats", "rounds", "tilings"):
            require(getattr(self, name) >= 1, f"{name} >= 1 must hold, but got {getattr(self, name)}")
        for name in ("seconds", "trial_seconds"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, f"{name} > 0 must hold, but got {value}")

    def with_options(self, **options: Any) -> Effort:
        """With those fields replaced whose option was given (is not None)."""
        return dataclasses.replace(self, **{name: value for name, value in options.items() if value is not None})


EFFORTS: dict[str, Effort] = {
    # quick: does drafting pay here at all? standard: a policy to use. thorough: the last few percent, over a night.
    "quick": Effort(24, 60.0, 5, 96, 1, 6, 60.0, 4),
    "standard": Effort(100, 900.0, 10, 144, 2, 8, 120.0, 12),
    "thorough": Effort(400, 7200.0, 20, 256, 3, 12, 300.0, 48),
}


def effort(name: str) -> Effort:
    """The preset of that name. UserError lists the known ones."""
    if name not in EFFORTS:
        raise known("effort", name, EFFORTS)
    return EFFORTS[name]


def duration_seconds(text: str) -> float:
    """Seconds of "90s", "15m", "2h", "1h30m" or a plain number of seconds. UserError for anything else, and for 0."""
    words = re.fullmatch(r"((?:\d+(?:\.\d+)?[smh])+)|(\d+(?:\.\d+)?)", text.strip())
    if words is None:
        raise UserError(f"a duration is written as 90s, 15m, 2h or 1h30m, but got {text!r}")
    parts = re.findall(r"([\d.]+)([smh])", text) or [(text, "s")]
    seconds = sum(float(number) * _UNIT_SECONDS[unit] for number, unit in parts)
    require(seconds > 0, f"a duration must be longer than 0, but got {text!r}")
    return seconds


class Budget:
    """A total of wall-clock time, shared fairly over what is still to do: who ends early leaves the rest to the others.

    seconds: None sets no limit. clock: seconds that only ever grow.
    """

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = None if seconds is None else clock() + seconds

    @property
    def left_seconds(self) -> float | None:
        """What is left, 0 when it is spent; None without a limit."""
        return None if self._end is None else max(0.0, self._end - self._clock())

    def part(self, parts: int) -> Budget:
        """A budget of its own for the next of `parts` equal parts; what it leaves stays with this one."""
        return Budget(self.share(parts), self._clock)

    def share(self, parts: int) -> float | None:
        """Seconds for the next of `parts` equal parts that are still to do; None without a limit."""
        left = self.left_seconds
        return None if left is None else max(LEAST_SHARE_SECONDS, left / parts)


def earlier(*seconds: float | None) -> float | None:
    """The shortest of the limits that are set; None when none is."""
    found = [s for s in seconds if s is not None]
    return min(found) if found else None
