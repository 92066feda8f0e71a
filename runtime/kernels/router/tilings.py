"""How the router is cut: tokens, rows and columns of the down-projection, and pieces of the MLP."""

from __future__ import annotations

from runtime.kernels.problem import Problem
from runtime.kernels.target import Target, Tiling

_NVIDIA: tuple[tuple[int, Tiling], ...] = (  # BLOCK_N and how it is compiled
    (64, {"num_warps": 8, "num_stages": 3}),
    (32, {"num_warps": 4, "num_stages": 3}),
    (64, {"num_warps": 8, "num_stages": 2}),
    (32, {"num_warps": 8, "num_stages": 4}),
    (128, {"num_warps": 8, "num_stages": 2}),
)
_AMD: tuple[tuple[int, Tiling], ...] = (
    (32, {"num_warps": 4, "num_stages": 2, "matrix_instr_nonkdim": 16, "kpack": 1, "waves_per_eu": 0}),
    (32, {"num_warps": 8, "num_stages": 2, "matrix_instr_nonkdim": 16, "kpack": 1, "waves_per_eu": 2}),
    (32, {"num_warps": 4, "num_stages": 2, "matrix_instr_nonkdim": 16, "kpack": 2, "waves_per_eu": 0}),
    (64, {"num_warps": 8, "num_stages": 1, "matrix_instr_nonkdim": 16, "kpack": 1, "waves_per_eu": 0}),
    (16, {"num_warps": 4, "num_stages": 2, "matrix_instr_nonkdim": 16, "kpack": 1, "waves_per_eu": 1}),
)

# Tokens, and rows and shares of the columns of the down-projection. The place of the one that makes about 128 blocks of
# so many tokens; its neighbours are tried too.
_SHAPES = ((16, 16, 8), (16, 16, 4), (16, 32, 4), (16, 64, 4), (32, 64, 4), (32, 64, 2), (32, 64, 1), (64, 64, 1))
_UP_TO = {1: 32, 2: 64, 3: 128, 4: 256, 5: 512}


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
    best = next((place for place, most in _UP_TO.items() if tokens <= most), 6)
    shapes = sorted(_SHAPES, key=lambda shape: abs(_SHAPES.index(shape) - best))[:6]
    found: list[Tiling] = []
    for rows, width, split in shapes:
        for columns, options in _AMD if amd else _NVIDIA:
            if options.get("kpack") == 2 and target.name != "gfx942":  # later matrix cores do not pack
                continue
            sizes = _fit(config.hidden_size, config.router_hidden_size, width, 128, columns, split)
            found.append({"BLOCK_M": rows, **sizes, "RELEASE": int(amd), **options})
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
