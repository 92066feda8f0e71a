"""The kernel library: every family's fitted numbers, from one file each in `fits/`, with how well they are known."""

from __future__ import annotations

import importlib
import importlib.resources
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hardware.files import build, read_yaml
from runtime.config import require

if TYPE_CHECKING:
    from perfmodel.kernels.attention import AttentionKernels
    from perfmodel.kernels.collective import CollectiveKernels
    from perfmodel.kernels.elementwise import ElementwiseKernels
    from perfmodel.kernels.gemm import GemmKernels
    from perfmodel.kernels.moe import MoeKernels

Family = Literal["gemm", "moe", "attention", "collective", "elementwise"]
CLASSES: dict[Family, str] = {
    "gemm": "GemmKernels",
    "moe": "MoeKernels",
    "attention": "AttentionKernels",
    "collective": "CollectiveKernels",
    "elementwise": "ElementwiseKernels",
}


@dataclass(frozen=True)
class KernelFit:
    """What the numbers of a family were fitted to, and their errors on rows whose series the fit had not seen."""

    rows: int
    series: int
    source: str
    date: str
    held_out_mean_error: float
    held_out_median_error: float


@dataclass(frozen=True)
class Evidence:
    """How well a family is known: 90% intervals of its numbers, and the spread of its estimates.

    spread: 80% of rows of series that the fit had not seen lie within the estimate times or over exp(spread). spreads:
    the same by `kernels.call.kind_of` a call, where there are rows enough to tell.
    """

    intervals: dict[str, tuple[float, float]]
    spread: float
    fit: KernelFit
    spreads: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for value in (self.spread, *self.spreads.values()):
            require(value >= 0, f"spread >= 0 must hold, but got {value}")
        for name, (low, high) in self.intervals.items():
            require(low <= high, f"intervals.{name} must be [low, high], but is [{low}, {high}]")

    def spread_of(self, kind: str) -> float:
        """The spread of a kind of calls, where it has one of its own, else that of all."""
        return self.spreads.get(kind, self.spread)


@dataclass(frozen=True)
class Library:
    """One set of fitted kernels for every family; `evidence` by the family's name."""

    gemm: GemmKernels
    moe: MoeKernels
    attention: AttentionKernels
    collective: CollectiveKernels
    elementwise: ElementwiseKernels
    evidence: dict[Family, Evidence]


def fit_file(family: Family) -> Path:
    """Where a family's numbers stand."""
    return Path(str(importlib.resources.files("perfmodel") / "kernels" / "fits" / f"{family}.yaml"))


@cache
def load_library() -> Library:
    """The bundled numbers, read strictly: UserError names the file, the key and the rule."""
    kernels, evidence = {}, {}
    for family, name in CLASSES.items():
        path = fit_file(family)
        data = read_yaml(path)
        numbers = data.pop("numbers", None)
        require(isinstance(numbers, dict), f"{path} must have numbers, the values of {name}")
        module = importlib.import_module(f"perfmodel.kernels.{family}")
        kernels[family] = build(getattr(module, name), numbers, f"{path}: numbers")
        evidence[family] = build(Evidence, data, str(path))
    return Library(**kernels, evidence=evidence)
