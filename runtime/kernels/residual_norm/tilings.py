"""Block shapes of the embedding and of the norm. Both only move bytes: what differs is how many rows are in flight."""

from __future__ import annotations

from runtime.kernels.problem import Problem
from runtime.kernels.target import Target, Tiling


def _power(size: int) -> int:
    """The smallest power of two that holds `size`."""
    return 1 << (size - 1).bit_length()


def tilings_embed(target: Target, problem: Problem) -> tuple[Tiling, ...]:
    """BLOCK: columns that one block copies."""
    whole = _power(problem.config.hidden_size)
    blocks = (
        [whole] if problem.tokens >= 256 else [max(whole // 8, 16), whole]
    )  # few tokens are spread over more blocks
    blocks += [block for block in (512, 1024, 2048) if block < whole]
    found: list[Tiling] = []
    for block in dict.fromkeys(blocks):
        for elements in (8, 4, 16):  # of one thread: 8 are 16 bytes of a 16-bit type
            warps = block // (elements * target.warp_size)
            found.append({"BLOCK": block, "num_warps": min(max(warps, 1), target.max_warps), "num_stages": 1})
    return _distinct(found)


def tilings(target: Target, problem: Problem) -> tuple[Tiling, ...]:
    """ROWS: that one block norms one after the other; the scales stay in registers meanwhile."""
    whole, few = _power(problem.config.hidden_size), problem.tokens <= 64
    warps = [max(whole // (elements * target.warp_size), 1) for elements in ((8, 4, 16) if few else (16, 8, 32))]
    rows = (1,) if few else (1, 2, 4, 8)
    found: list[Tiling] = [
        {"ROWS": count, "num_warps": min(warp, target.max_warps), "num_stages": stages}
        for count in rows
        for warp in warps
        for stages in ((1, 2) if count > 1 and target.backend == "cuda" else (1,))
    ]
    if target.backend == "hip":
        found = [{**tiling, "waves_per_eu": waves} for waves in (0, 2) for tiling in found]
    return _distinct(found)


def _distinct(found: list[Tiling]) -> tuple[Tiling, ...]:
    return tuple({tuple(sorted(tiling.items())): tiling for tiling in found}.values())
