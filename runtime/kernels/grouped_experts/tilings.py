"""Tilings of the grouped experts, by architecture and token count, in the engines' parameters. Torch-free.

The first is what vLLM takes for bf16 where it has no tile file: it goes by the tokens M of the forward, as its files do
(SGLang's default is another, by whether M exceeds the experts). The others are that part of the spaces in which their
tuning scripts search (NVIDIA: M 16-256, N 32-256, K 64-256, 2 to 5 stages, 4 or 8 warps; ROCm: 1 to 8 warps, 2 stages,
waves and the size of matrix instructions) that suits the tokens of an expert: blocks near as many rows as it gets, and
enough bytes of weights on their way.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from runtime.kernels.problem import Problem
from runtime.kernels.target import Target, Tiling

_STAGES = {64: (3, 4, 5), 128: (3, 4), 256: (2, 3)}  # by BLOCK_SIZE_K: so many bytes are on their way
_WIDE_ROWS = 64  # from so many rows on, wide tiles are square enough for the matrix cores to be what limits


def tilings(target: Target, problem: Problem) -> tuple[Tiling, ...]:
    """Candidates for this architecture and token count, the default first; each fits the target's shared memory."""
    config, amd = problem.config, target.backend == "hip"
    widest = _power(max(2 * config.moe_intermediate_size, config.hidden_size))
    deepest = max(32, _power(max(config.moe_intermediate_size, config.hidden_size)))  # fp32 takes half of it
    found: list[Tiling] = []
    for tiling in (_default(problem.tokens, config.num_experts, amd), *_candidates(problem, amd)):
        clipped = tiling | {
            "BLOCK_SIZE_N": min(tiling["BLOCK_SIZE_N"], max(16, widest)),
            "BLOCK_SIZE_K": min(tiling["BLOCK_SIZE_K"], deepest),
        }
        if target.name != "gfx942":  # from gfx950 on the compiler packs by itself
            clipped.pop("kpack", None)
        if clipped not in found and _shared_bytes(clipped, amd) <= target.shared_bytes:
            found.append(clipped)
    return tuple(found)


def _default(tokens: int, experts: int, amd: bool) -> dict[str, int]:
    """vLLM's, for bf16 and fp16."""
    rows = next((rows for most, rows in ((32, 16), (96, 32), (512, 64)) if tokens <= most), 128)
    columns, inner = (64, 128) if tokens <= 64 else (128, 64)
    group = 16 if tokens // experts > 128 else 1
    stages = 2 if amd else 4 if tokens <= 32 else 3
    options = (0, 0, 1) if amd else ()  # what the compiler takes when nothing is said
    return _named((rows, columns, inner, group, 4 if tokens <= 128 else 8, stages, *options))


def _candidates(problem: Problem, amd: bool) -> Iterator[dict[str, int]]:
    share = problem.tokens / problem.config.num_experts  # tokens of an expert
    near = min(128, max(16, _power(round(share))))
    most = max(16, min(128, _power(problem.tokens)))
    wide = near >= _WIDE_ROWS
    for rows in sorted({min(size, most) for size in ((near // 2, near) if wide else (near, 2 * near))}):
        groups = (1, 16) if share > rows else (1,)
        columns = (64, 128, 256) if wide else (32, 64, 128)
        for size, inner, group in product(columns, (64,) if wide else (64, 128, 256), groups):
            yield from _compiled(rows, size, inner, group, amd)


def _compiled(rows: int, columns: int, inner: int, group: int, amd: bool) -> Iterator[dict[str, int]]:
    """A tile's warps, and what else its compiler may be told."""
    area = rows * columns
    warps = (8,) if area >= 128 * 128 else (4, 8) if area >= 64 * 64 else (4,)
    if not amd:
        yield from (_named((rows, columns, inner, group, *o)) for o in product(warps, _STAGES[inner]))
        return
    waves = (0, 2) if area < 64 * 64 else (0,)
    instructions = (16, 32) if rows >= _WIDE_ROWS else (16,)
    for count, waves_per_eu, size in product(warps, waves, instructions):
        yield _named((rows, columns, inner, group, count, 2, waves_per_eu, size, 2))


def _named(values: tuple[int, ...]) -> dict[str, int]:
    names = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
    return dict(zip(names + ("waves_per_eu", "matrix_instr_nonkdim", "kpack"), values, strict=False))


def _shared_bytes(tiling: Tiling, amd: bool) -> int:
    """What the staged tiles take, at most. AMD keeps one stage in registers."""
    stages = max(1, tiling["num_stages"] - amd)
    return 2 * stages * (tiling["BLOCK_SIZE_M"] + tiling["BLOCK_SIZE_N"]) * tiling["BLOCK_SIZE_K"]


def _power(value: int) -> int:
    return 1 << (max(1, value) - 1).bit_length()
