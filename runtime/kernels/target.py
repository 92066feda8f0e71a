"""What a tiling must fit: the limits of a GPU architecture, from its programming guide. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from hardware.files import known

Tiling: TypeAlias = Mapping[str, int]  # block sizes by the kernel's own names, and the compiler options below
OPTIONS = ("num_warps", "num_stages")
AMD_OPTIONS = ("waves_per_eu", "matrix_instr_nonkdim", "kpack")


@dataclass(frozen=True)
class Target:
    """One architecture that kernels are compiled for.

    shared_bytes: shared memory (LDS) that one block can use. registers: 32-bit vector registers that one thread can
    use; on AMD the accumulation registers of the matrix cores are counted apart.
    """

    name: str
    backend: Literal["cuda", "hip"]
    warp_size: int
    shared_bytes: int
    registers: int
    max_warps: int  # of one block

    def options(self, tiling: Tiling) -> dict[str, int]:
        """The compiler options of a tiling that this target's compiler knows."""
        names = OPTIONS + (AMD_OPTIONS if self.backend == "hip" else ())
        return {name: tiling[name] for name in names if name in tiling}


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("sm_90", "cuda", 32, 232_448, 255, 32),
        Target("sm_100", "cuda", 32, 232_448, 255, 32),
        Target("gfx942", "hip", 64, 65_536, 512, 16),
        Target("gfx950", "hip", 64, 163_840, 512, 16),
    )
}


def target(name: str) -> Target:
    """The target of this name; UserError names the known ones."""
    if name not in TARGETS:
        raise known("target", name, TARGETS)
    return TARGETS[name]


def constants(tiling: Tiling) -> dict[str, int]:
    """The block sizes of a tiling: what is no compiler option."""
    return {name: value for name, value in tiling.items() if name not in OPTIONS + AMD_OPTIONS}
