"""Which tiling a kernel runs with here: the one set in the kernel settings, else the device's default."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache

import torch

from runtime.config import KernelConfig
from runtime.kernels.problem import Problem
from runtime.kernels.registry import kernel as kernel_named
from runtime.kernels.target import TARGETS, Target, Tiling


def default_tiling(
    kernel: str, device: torch.device | str, problem: Problem, kernels: KernelConfig | None = None
) -> Tiling:
    """The tiling that `kernels` sets for so many tokens, else the first one of the device's target.

    It costs some microseconds: `Selection` keeps what it found. UserError for an unknown kernel.
    """
    chosen = kernels.tiling(kernel, problem.tokens) if kernels is not None else None
    return chosen or kernel_named(kernel).tilings(device_target(device), problem)[0]


class Selection:
    """The tilings of one model on one device, each looked up once."""

    def __init__(self, device: torch.device | str, kernels: KernelConfig) -> None:
        self.device, self.kernels = device, kernels
        self._found: dict[tuple[object, ...], Tiling] = {}

    def __call__(self, kernel: str, problem: Problem) -> Tiling:
        """`default_tiling`; the problem's config must be the same in every call."""
        key = (kernel, problem.batch, problem.slots, problem.context, problem.kind, problem.levels)
        if key not in self._found:
            self._found[key] = default_tiling(kernel, self.device, problem, self.kernels)
        return self._found[key]


def device_target(device: torch.device | str) -> Target:
    """The target whose tilings suit a device: its own, else the nearest of its vendor with the device's own shared
    memory. What is no GPU (the interpreter, meta tensors) has the first target."""
    found = torch.device(device)
    if found.type != "cuda" or not torch.cuda.is_available():
        return next(iter(TARGETS.values()))
    return _target(found.index if found.index is not None else torch.cuda.current_device())


@lru_cache
def _target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        name = properties.gcnArchName.partition(":")[0]
    else:
        name = f"sm_{properties.major}{properties.minor}"
    target = nearest_target(name)
    if name == target.name:
        return target
    shared = getattr(properties, "shared_memory_per_block_optin", target.shared_bytes)
    return replace(target, shared_bytes=min(target.shared_bytes, shared))


def nearest_target(architecture: str) -> Target:
    """The target of this name, else the newest one of the vendor that is not newer, else the vendor's oldest."""
    if architecture in TARGETS:
        return TARGETS[architecture]
    backend = "hip" if architecture.startswith("gfx") else "cuda"
    targets = sorted((t for t in TARGETS.values() if t.backend == backend), key=lambda t: _generation(t.name))
    older = [t for t in targets if _generation(t.name) <= _generation(architecture)]
    return older[-1] if older else targets[0]


def _generation(architecture: str) -> int:
    """sm_90 -> 90; gfx942 -> 0x942: the digits of AMD's names are hexadecimal."""
    digits = re.sub(r"^(sm_|gfx)", "", architecture)
    return int(digits, 16 if architecture.startswith("gfx") else 10)
