"""How CCA is cut: tokens of a program, and input channels at a time."""

from __future__ import annotations

from runtime.kernels.problem import Problem
from runtime.kernels.target import Target, Tiling


def tilings(target: Target, problem: Problem) -> tuple[Tiling, ...]:
    """BM tokens of a program, 1 or a matrix tile of them; BK input channels of a tap at a time.

    A program reads its head's weights (96 KiB at ZAYA1-8B's size) whole: one token per program is quickest while the
    programs run side by side, tiles read the weights less often.
    """
    amd, tokens = target.backend == "hip", problem.tokens
    single = [(1, 64, warps, 1) for warps in (8, 16)] + [(1, 128, 8, 1), (1, 128, 16, 1), (1, 32, 8, 1)]
    if amd:  # LDS is small: loads wait in registers instead of in a pipeline
        small = [(16, 128, 8, 1), (16, 128, 4, 1), (16, 64, 8, 2), (16, 32, 4, 2), (16, 64, 4, 2), (16, 64, 8, 1)]
        middle = [(32, 64, 4, 1), (32, 32, 4, 2), (32, 128, 4, 1), (32, 32, 4, 1)]
        large = [(64, 64, 8, 1), (64, 128, 8, 1), (64, 32, 8, 2), (64, 32, 8, 1)]
    else:
        small = [(16, 64, 8, 2), (16, 32, 4, 4), (16, 32, 8, 4), (16, 64, 4, 2), (16, 128, 8, 1), (16, 32, 4, 2)]
        middle = [(32, 64, 8, 2), (32, 32, 8, 4), (32, 32, 8, 2), (32, 64, 8, 1)]
        large = [(64, 64, 8, 2), (64, 32, 8, 2), (64, 64, 8, 1), (64, 32, 8, 1)]
    if tokens <= 8:
        shapes = single + small
    elif tokens <= 320:
        shapes = small + middle + (single if tokens <= 32 else [])
    elif tokens <= 640:
        shapes = middle + small + large
    else:
        shapes = large + middle
    found: list[Tiling] = []
    for rows, channels, warps, stages in shapes:
        tiling = {"BM": rows, "BK": min(channels, _power(problem.config.head_dim)), "num_warps": warps}
        found.append(tiling | {"num_stages": stages})
    if amd:
        kpacks = (1, 2) if target.name == "gfx942" else (1,)  # newer matrix cores take no packed operands
        found = [
            {**tiling, "matrix_instr_nonkdim": 16, "kpack": kpack, "waves_per_eu": waves}
            for kpack in kpacks
            for waves in (0, 2)
            for tiling in found
            if kpack == 1 or tiling["BM"] > 1
        ]
    distinct = {tuple(sorted(tiling.items())): tiling for tiling in found}
    return tuple(distinct.values())


def _power(size: int) -> int:
    return max(1 << (size - 1).bit_length(), 16)
