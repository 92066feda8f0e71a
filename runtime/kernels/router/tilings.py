"""How the router is cut: tokens, rows and columns of the down-projection, and pieces of the MLP."""

from __future__ import annotations

from runtime.kernels.problem import Problem
from runtime.kernels.target import Target, Tiling


def tilings(target: Target, problem: Problem) -> tuple[Tiling, ...]:
    """BLOCK_M tokens, BLOCK_R rows and BLOCK_K columns of the down-projection, SPLIT its columns' shares, BLOCK_N
    columns of the MLP's first layer at once.

    RELEASE: whether every wave releases its own stores. AMD needs it: there a barrier does not wait for the stores of
    the other waves, so that the one which reports a block's arrival could not vouch for them (LLVM pull request
    160501 is about such a failure). NVIDIA orders stores across a barrier.

    Few tokens: the more blocks share the weights, the sooner they are read. Many: the tiles of tokens are enough.
    """
    config, tokens = problem.config, problem.tokens
    amd = target.backend == "hip"
    if tokens <= 32:
        shapes = [(16, 16, 4), (16, 16, 8), (16, 32, 8), (16, 16, 2), (16, 32, 4), (16, 64, 8)]
    elif tokens <= 256:
        shapes = [(16, 32, 4), (16, 64, 4), (32, 32, 4), (16, 64, 2), (32, 64, 2), (32, 64, 4)]
    else:
        shapes = [(32, 64, 1), (32, 64, 2), (64, 64, 1), (32, 128, 1), (16, 64, 1), (64, 128, 1)]
    found: list[Tiling] = []
    for rows, width, split in shapes:
        for columns in (32, 64, 16) if amd else (64, 32, 128):
            for warps, stages in ((4, 2), (8, 2)) if amd else ((8, 3), (4, 3), (4, 2)):
                sizes = _fit(config.hidden_size, config.router_hidden_size, width, 128, columns, split)
                options = {"RELEASE": int(amd), "num_warps": warps, "num_stages": stages}
                found.append({"BLOCK_M": rows, **sizes, **options})
    if amd:
        kpacks = (1, 2) if target.name == "gfx942" else (1,)  # newer matrix cores take no packed operands
        found = [
            {**tiling, "matrix_instr_nonkdim": 16, "kpack": kpack, "waves_per_eu": waves}
            for kpack in kpacks
            for waves in (0, 2)
            for tiling in found
        ]
    distinct = {tuple(sorted(tiling.items())): tiling for tiling in found}
    return tuple(distinct.values())


def _fit(hidden: int, width: int, block_r: int, block_k: int, block_n: int, split: int) -> dict[str, int]:
    """Block sizes that a small router fills: powers of two, which the matrix cores want to be 16 at least."""
    block_k = min(block_k, _power(-(-hidden // split)))
    return {
        "BLOCK_R": min(block_r, _power(width)),
        "BLOCK_K": block_k,
        "BLOCK_N": min(block_n, _power(width)),
        "SPLIT": min(split, -(-hidden // block_k)),
    }


def _power(size: int) -> int:
    return max(1 << (size - 1).bit_length(), 16)
