"""Start a Triton kernel; or, while recording, note what would be started, so that exactly that can be compiled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from runtime.kernels.target import AMD_OPTIONS, Tiling


@dataclass(frozen=True)
class Launch:
    """One start of one kernel: `arguments` are tensors, numbers or None; `constants` its other constexpr values."""

    function: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    tiling: Tiling


_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded", default=None)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within it, nothing is started: `launch` notes its arguments. Wrappers are then called with meta tensors."""
    found: list[Launch] = []
    token = _recorded.set(found)
    try:
        yield found
    finally:
        _recorded.reset(token)


def launch(
    function: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], constants: Mapping[str, Any], tiling: Tiling
) -> None:
    """Run `function` on `grid`. All values of the tiling are passed, but the options that this backend lacks."""
    recorded = _recorded.get()
    if recorded is not None:
        recorded.append(Launch(function, grid, dict(arguments), dict(constants), dict(tiling)))
        return
    given = {name: value for name, value in tiling.items() if torch.version.hip or name not in AMD_OPTIONS}
    function[grid](**arguments, **constants, **given)
