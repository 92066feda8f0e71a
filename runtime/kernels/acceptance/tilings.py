"""Tilings of drawing and judging: how many logits a block of threads reads at once. Torch-free.

All of them are limited by reading the logits, of which a thread should hold 16 bytes several times over. Small
blocks fill the device when there is one sequence; large ones leave fewer sums to combine when there are many.
"""

from __future__ import annotations

from runtime.kernels.problem import Problem
from runtime.kernels.target import Target, Tiling

_FEW = 64  # rows: up to here a row is cut into more, smaller splits

_SPLIT = {  # (BLOCK, num_warps), the default first
    "cuda": ((4096, 8), (4096, 4), (2048, 4), (8192, 8), (8192, 16), (2048, 8)),
    "hip": ((4096, 4), (4096, 8), (2048, 4), (8192, 8), (8192, 16), (2048, 2)),
}
_MANY = {
    "cuda": ((8192, 8), (8192, 16), (4096, 8), (4096, 4), (16384, 16)),
    "hip": ((8192, 8), (8192, 16), (4096, 4), (4096, 8), (16384, 16)),
}


def tilings_draw(target: Target, problem: Problem) -> tuple[Tiling, ...]:
    """Candidates, the default first."""
    quarter = 1 << max(4, problem.config.vocab_size.bit_length() - 2)  # a small vocabulary is cut too
    found = (_SPLIT if problem.tokens <= _FEW else _MANY)[target.backend]
    blocks = dict.fromkeys((min(block, quarter), warps) for block, warps in found)
    options: tuple[dict[str, int], ...] = ({"num_stages": 1},)
    if target.backend == "hip":
        options = tuple({"num_stages": 1, "waves_per_eu": waves} for waves in (0, 2))
    return tuple({"BLOCK": block, "num_warps": warps} | more for more in options for block, warps in blocks)


def tilings_verify(target: Target, problem: Problem) -> tuple[Tiling, ...]:
    """The same, and how many drafts of a sequence are judged at once."""
    return tuple({"ROWS": rows} | dict(tiling) for rows in (16, 4) for tiling in tilings_draw(target, problem))
