"""What every figure and name of a profile must hold, as faults that say the rule and the place. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hardware.files import UserError

# The most that a figure of each unit can plausibly be, by the end of its name: what lies beyond is a slip of the unit.
_MOST = {
    "bytes_per_second": 1e15,
    "flops_per_second": 1e18,
    "bytes": 1e14,
    "_seconds": 1.0,
    "seconds": 1e4,  # of one matmul that a probe timed
    "watts": 1e5,
    "dollars_per_hour": 1e4,
    "hertz": 1e11,
    "compute_units": 1e5,
    "warp_size": 1024.0,
    "devices": 1e5,
    "": 1e9,
}


def figure_faults(name: str, value: float | None, unit: str, *place: str) -> Iterator[UserError]:
    """A figure is above zero and not above what is plausible of its unit, which `unit` ends with; None is no figure."""
    most = next(most for end, most in _MOST.items() if unit.endswith(end))
    if value is None:
        return
    if not value > 0:
        yield UserError(f"{name} > 0 must hold, but got {value}", place=place)
    elif value > most:
        yield UserError(f"{name} <= {most:g} must hold, but got {value}", place=place)


def positive_faults(owner: Any, *names: str) -> Iterator[UserError]:
    """The same of an owner's figures, each of the unit that its name ends with."""
    for name in names:
        yield from figure_faults(name, getattr(owner, name), name, name)


def word_faults(owner: Any, *names: str) -> Iterator[UserError]:
    """Texts of an owner that must not be blank."""
    for name in names:
        if not getattr(owner, name).strip():
            yield UserError(f"{name} must be words, but is {getattr(owner, name)!r}", place=(name,))


def name_faults(name: str) -> Iterator[UserError]:
    """The name of a profile, or of a level in it, is one word."""
    if not name or any(c.isspace() or c in "/\\" for c in name):
        yield UserError(f"name must be one word without slashes, but is {name!r}", place=("name",))
