"""Tilings of the experts, by architecture and token count. Torch-free.

Few tokens are a matter of bytes in flight: tall, thin tiles of the weights and many stages of them. Without matrix
cores (BLOCK_M 1) a token that shares its expert with another reads the weights again, from L2, so that this suits a
handful only. From some hundred tokens on the tiles must also be square enough for the traffic between L2 and the
cores, and wide enough for the large matrix instructions: 64 rows on NVIDIA, which SWAP gives to the weights' side.
"""

from __future__ import annotations

from runtime.config import ModelConfig
from runtime.kernels.problem import Problem
from runtime.kernels.target import Target, Tiling

Row = tuple[int, ...]  # BLOCK_M, BLOCK_N, BLOCK_K, DOWN_N, DOWN_K, GROUP_M, SWAP, num_warps, num_stages

_NVIDIA: dict[int, tuple[Row, ...]] = {  # by the largest token count
    4: (
        (1, 4, 512, 8, 512, 1, 0, 4, 4),
        (1, 4, 2048, 8, 2048, 1, 0, 4, 1),
        (1, 4, 1024, 8, 1024, 1, 0, 4, 3),
        (1, 2, 1024, 4, 1024, 1, 0, 2, 3),
        (1, 4, 512, 8, 512, 1, 0, 2, 4),
        (1, 8, 512, 16, 512, 1, 0, 4, 3),
        (1, 8, 2048, 16, 2048, 1, 0, 8, 1),
        (16, 16, 256, 32, 256, 1, 0, 4, 4),
        (16, 32, 128, 64, 128, 1, 0, 4, 4),
        (16, 64, 64, 64, 128, 1, 1, 4, 4),
    ),
    64: (
        (16, 32, 128, 64, 128, 1, 0, 4, 4),
        (16, 32, 128, 64, 128, 1, 0, 4, 3),
        (16, 32, 256, 64, 256, 1, 0, 4, 3),
        (16, 16, 256, 32, 256, 1, 0, 4, 4),
        (16, 64, 64, 128, 64, 1, 0, 4, 5),
        (16, 64, 128, 128, 128, 1, 0, 8, 3),
        (16, 64, 64, 64, 128, 1, 1, 4, 4),
        (16, 64, 128, 128, 128, 1, 1, 4, 3),
        (16, 128, 64, 128, 64, 1, 1, 8, 4),
        (32, 32, 128, 64, 128, 1, 0, 4, 4),
        (1, 4, 512, 8, 512, 1, 0, 4, 4),
        (1, 8, 512, 16, 512, 1, 0, 4, 3),
    ),
    128: (
        (16, 64, 64, 128, 64, 1, 0, 4, 4),
        (16, 64, 64, 128, 64, 1, 1, 4, 4),
        (16, 64, 128, 128, 128, 1, 1, 4, 3),
        (16, 32, 128, 64, 128, 1, 0, 4, 4),
        (16, 128, 64, 256, 64, 1, 1, 8, 4),
        (32, 64, 64, 128, 64, 1, 1, 4, 4),
        (32, 64, 64, 128, 64, 4, 0, 4, 4),
    ),
    512: (
        (32, 64, 64, 128, 64, 4, 1, 4, 4),
        (32, 64, 64, 128, 64, 4, 0, 4, 4),
        (32, 64, 128, 128, 128, 4, 1, 4, 3),
        (32, 128, 64, 256, 64, 4, 1, 8, 4),
        (32, 32, 128, 64, 128, 4, 0, 4, 4),
        (16, 64, 64, 128, 64, 4, 1, 4, 4),
        (16, 64, 64, 128, 64, 4, 0, 4, 4),
        (64, 64, 64, 128, 64, 4, 0, 4, 4),
        (64, 128, 64, 128, 64, 4, 0, 8, 3),
    ),
    1536: (
        (64, 128, 64, 256, 64, 4, 0, 8, 4),
        (64, 128, 64, 128, 64, 4, 0, 4, 3),
        (64, 64, 64, 128, 64, 4, 0, 4, 4),
        (64, 128, 64, 256, 64, 4, 1, 8, 4),
        (128, 64, 64, 128, 64, 4, 0, 4, 3),
        (128, 128, 64, 256, 64, 4, 0, 8, 3),
        (32, 128, 64, 256, 64, 4, 1, 8, 4),
        (64, 128, 64, 256, 64, 16, 0, 8, 4),
    ),
    1_000_000: (
        (128, 128, 64, 256, 64, 4, 0, 8, 3),
        (128, 128, 64, 128, 64, 4, 0, 8, 3),
        (128, 64, 64, 128, 64, 4, 0, 4, 4),
        (128, 128, 32, 256, 32, 4, 0, 8, 4),
        (128, 128, 64, 256, 64, 16, 0, 8, 3),
        (64, 128, 64, 256, 64, 4, 0, 8, 4),
        (64, 128, 64, 256, 64, 8, 0, 4, 3),
    ),
}

# With as many waves per SIMD as the compiler may plan for (0: its choice), and the size of the matrix instructions.
_AMD: dict[int, tuple[Row, ...]] = {
    4: (
        (1, 4, 2048, 8, 2048, 1, 0, 4, 1, 0, 16),
        (1, 4, 1024, 8, 1024, 1, 0, 4, 1, 0, 16),
        (1, 4, 512, 8, 512, 1, 0, 2, 2, 0, 16),
        (1, 2, 2048, 4, 2048, 1, 0, 2, 1, 0, 16),
        (1, 8, 1024, 16, 1024, 1, 0, 8, 1, 0, 16),
        (1, 8, 512, 16, 512, 1, 0, 4, 2, 2, 16),
        (16, 16, 256, 32, 256, 1, 0, 2, 2, 0, 16),
        (16, 32, 128, 64, 128, 1, 0, 4, 2, 0, 16),
    ),
    128: (
        (16, 32, 128, 64, 128, 1, 0, 4, 2, 0, 16),
        (16, 32, 128, 64, 128, 1, 0, 4, 2, 2, 16),
        (16, 32, 256, 64, 256, 1, 0, 4, 2, 0, 16),
        (16, 16, 256, 32, 256, 1, 0, 2, 2, 0, 16),
        (16, 16, 256, 32, 256, 1, 1, 2, 2, 0, 16),
        (16, 64, 128, 128, 128, 1, 0, 4, 2, 0, 16),
        (16, 64, 128, 128, 128, 1, 1, 4, 2, 0, 16),
        (16, 64, 64, 128, 64, 1, 0, 4, 2, 0, 16),
        (32, 32, 128, 64, 128, 1, 0, 4, 2, 0, 16),
        (16, 32, 128, 64, 128, 1, 0, 4, 3, 0, 16),
        (1, 4, 2048, 8, 2048, 1, 0, 4, 1, 0, 16),
    ),
    512: (
        (32, 64, 64, 128, 64, 4, 0, 4, 2, 0, 16),
        (32, 64, 128, 128, 128, 4, 0, 4, 2, 0, 16),
        (32, 32, 128, 64, 128, 4, 0, 4, 2, 0, 16),
        (32, 64, 64, 128, 64, 4, 0, 4, 2, 2, 32),
        (32, 64, 64, 128, 64, 4, 1, 4, 2, 0, 16),
        (16, 64, 128, 128, 128, 4, 0, 4, 2, 0, 16),
        (64, 64, 64, 128, 64, 4, 0, 4, 2, 0, 16),
        (32, 64, 64, 128, 64, 4, 0, 4, 3, 0, 16),
    ),
    1_000_000: (
        (64, 64, 64, 128, 64, 4, 0, 4, 2, 0, 16),
        (64, 64, 64, 128, 64, 4, 0, 4, 2, 2, 32),
        (64, 128, 64, 256, 64, 4, 0, 8, 2, 0, 16),
        (128, 64, 64, 128, 64, 4, 0, 8, 2, 0, 16),
        (128, 128, 32, 256, 32, 4, 0, 8, 2, 0, 16),
        (128, 128, 64, 256, 64, 4, 0, 8, 2, 0, 32),
        (128, 128, 64, 256, 64, 8, 0, 8, 2, 2, 16),
        (64, 128, 64, 256, 64, 4, 0, 8, 3, 0, 16),
    ),
}


def tilings(target: Target, problem: Problem) -> tuple[Tiling, ...]:
    """Candidates for this architecture and token count, the default first; each fits the target's shared memory."""
    amd = target.backend == "hip"
    table = _AMD if amd else _NVIDIA
    tokens = problem.tokens
    if tokens > 64:  # the tables are ZAYA1-8B's: what counts now are the tokens of an expert
        tokens = max(65, tokens * ModelConfig().num_experts // problem.config.num_experts)
    rows = next(table[most] for most in table if tokens <= most or most == max(table))
    found: list[Tiling] = []
    for row in rows:
        tiling = _clipped(row, problem.config)
        if amd:
            tiling |= {"waves_per_eu": row[9], "matrix_instr_nonkdim": row[10]}
            if target.name == "gfx942":  # from gfx950 on the compiler packs by itself
                tiling["kpack"] = 2
        if tiling not in found and _shared_bytes(tiling, amd) <= target.shared_bytes:
            found.append(tiling)
    return tuple(found)


def _clipped(row: Row, config: ModelConfig) -> dict[str, int]:
    """A row with names, no block larger than the model, none smaller than a matrix instruction takes."""
    vector = row[0] == 1
    width, size = _power(config.moe_intermediate_size), _power(config.hidden_size)
    columns, inner = (1, 2) if vector else (16, 32)  # fp32 takes half of the inner block
    return {
        "BLOCK_M": row[0],
        "BLOCK_N": min(row[1], max(width, columns)),
        "BLOCK_K": min(row[2], max(size, inner)),
        "DOWN_N": min(row[3], max(size, columns)),
        "DOWN_K": min(row[4], max(width, inner)),
        "GROUP_M": row[5],
        "SWAP": row[6],
        "num_warps": row[7],
        "num_stages": row[8],
    }


def _shared_bytes(tiling: Tiling, amd: bool) -> int:
    """What the staged tiles of the larger launch take, at most. AMD keeps one stage in registers."""
    stages = max(1, tiling["num_stages"] - amd)
    if tiling["num_stages"] == 1 and tiling["BLOCK_M"] == 1:
        return 0
    rows = tiling["BLOCK_M"]
    return (
        2
        * stages
        * max((rows + 2 * tiling["BLOCK_N"]) * tiling["BLOCK_K"], (rows + tiling["DOWN_N"]) * tiling["DOWN_K"])
    )


def _power(value: int) -> int:
    return 1 << (value - 1).bit_length()
