"""Made-up kernels that run on a CPU, to test the search of tilings: each tiling of `every` fails in its own way."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runtime.kernels.problem import Problem
from runtime.kernels.registry import Kernel
from runtime.kernels.target import Target, Tiling

SLOW, FAST, WRONG, ODD, COMPILE, UNFIT, CRASH, HANG = range(8)
SLOW_SECONDS = 0.003


class CompilationError(Exception):
    """As Triton's is called."""


class OutOfResources(Exception):
    """As Triton's is called."""


def scale(x: Tensor) -> Tensor:
    """The reference."""
    return x * 2


def faulty(x: Tensor, *, tiling: Tiling) -> Tensor:
    """`scale`, with the fault of this tiling."""
    fault = tiling["FAULT"]
    if fault == SLOW:
        time.sleep(SLOW_SECONDS)
    elif fault == WRONG:
        return x * 2.1
    elif fault == ODD and len(x) % 2:  # the last row is forgotten
        return torch.cat([x[:-1] * 2, torch.zeros_like(x[-1:])])
    elif fault == COMPILE:
        raise CompilationError("at 12:34: unexpected type")
    elif fault == UNFIT:
        raise OutOfResources("out of resource: shared memory, Required: 300000, Hardware limit: 232448")
    elif fault == CRASH:
        os.abort()
    elif fault == HANG:
        time.sleep(600)
    return x * 2


def routed(x: Tensor, chosen: Tensor, *, tiling: Tiling) -> Tensor:
    """A kernel with routes: rows of the skip expert are zero."""
    return x * (chosen < 5)[:, None]


@dataclass(frozen=True)
class MadeUp(Kernel):
    """A kernel whose parts are given here instead of in a folder."""

    run: Callable[..., Any] = faulty
    faults: tuple[int, ...] = (SLOW, FAST)

    def reference(self) -> Callable[..., Any]:
        """A plain function of the same arguments."""
        return scale if self.run is faulty else lambda **arguments: routed(**arguments, tiling={})

    def triton(self) -> Callable[..., Any]:
        """Not Triton's."""
        return self.run

    def tilings(self, target: Target, problem: Problem) -> tuple[Tiling, ...]:
        """One per fault, the default first."""
        return tuple({"FAULT": fault} for fault in self.faults)

    def inputs(self, problem: Problem, dtype: Any, device: Any, seed: int = 0) -> dict[str, Any]:
        """A row per token."""
        given = {"x": torch.ones(problem.tokens, 4, dtype=dtype, device=device)}
        if self.run is routed:
            given["chosen"] = torch.zeros(problem.tokens, dtype=torch.int32, device=device)
        return given

    def output_names(self) -> tuple[str, ...]:
        """One."""
        return ("y",)

    def errors(self, arguments: dict[str, Any], expected: Any, found: Any) -> dict[str, float]:
        """The usual ones."""
        return {}


KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        MadeUp("every", "made up", faults=tuple(range(8))),
        MadeUp("pair", "made up"),
        MadeUp("routed", "made up", run=routed),
    )
}
