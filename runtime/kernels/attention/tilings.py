"""Tilings of block attention."""

from __future__ import annotations

from runtime.kernels.problem import Problem
from runtime.kernels.target import Target, Tiling


def tilings(target: Target, problem: Problem) -> tuple[Tiling, ...]:
    """Candidates, the default first: few large row tiles read the keys less often, small ones waste less."""
    amd = target.backend == "hip"
    rows = problem.slots * (problem.config.num_attention_heads // problem.config.num_key_value_heads)
    whole = max(16, 1 << (rows - 1).bit_length())  # one tile for all of them
    default = min(64, whole)
    masked = problem.kind != "causal"
    first = _base(amd, default, masked)
    found = [first, *(first | change for change in _changes(amd, default))]
    for block_m in (16, 32, 64, 128):
        if block_m <= whole and block_m != default:
            base = _base(amd, block_m, masked)
            found += [base, base | {"BLOCK_N": base["BLOCK_N"] // 2}, base | {"SPLIT_BLOCKS": 1}]
    return tuple(tiling for place, tiling in enumerate(found) if tiling not in found[:place])


def _base(amd: bool, block_m: int, masked: bool) -> dict[str, int]:
    """Two programs per multiprocessor. On NVIDIA the addresses of a mask that is loaded take many registers."""
    tiling = {
        "BLOCK_M": block_m,
        "BLOCK_N": 64,
        "PROGRAMS": 608 if amd else 264,
        "SPLIT_BLOCKS": 2,
        "LAUNCHES": 2 if amd else 1,
        "XCDS": 8 if amd else 1,
        "num_warps": 8 if block_m > 64 or (masked and block_m > 32 and not amd) else 4,
        "num_stages": 2 if amd or block_m > 64 else 3,
    }
    return tiling | ({"matrix_instr_nonkdim": 16, "kpack": 1, "waves_per_eu": 0} if amd else {})


def _changes(amd: bool, block_m: int) -> list[dict[str, int]]:
    """What is tried on the default, one thing at a time."""
    common = [{"SPLIT_BLOCKS": 1}, {"SPLIT_BLOCKS": 4}]
    common += [{"num_warps": warps} for warps in ((2, 4, 8) if block_m < 64 else (4, 8))]  # two warps of 64 rows spill
    if amd:
        return [
            *common,
            {"BLOCK_N": 32},
            {"BLOCK_N": 32, "num_stages": 1},
            {"num_stages": 1},
            {"PROGRAMS": 304},
            {"XCDS": 1},
            {"kpack": 2},
            {"waves_per_eu": 2},
        ]
    return [
        *common,
        {"LAUNCHES": 2},
        {"BLOCK_N": 32, "num_stages": 4},
        {"BLOCK_N": 128, "num_stages": 2},
        {"num_stages": 2},
        {"num_stages": 4},
        {"PROGRAMS": 132},
        {"PROGRAMS": 528},
    ]
