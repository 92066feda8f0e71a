"""The experts tiled as vLLM and SGLang do: their parameters, their default, one tile for both products."""

from __future__ import annotations

import pytest

from runtime.config import ModelConfig, replace
from runtime.kernels.compiler import launches, specialise
from runtime.kernels.grouped_experts.tilings import tilings
from runtime.kernels.problem import ODD, Problem, problem_of
from runtime.kernels.registry import KERNELS
from runtime.kernels.target import TARGETS, Target, constants

ZAYA = ModelConfig()
TILE = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M")
# What vLLM takes without a tile file, from its source: by M, on NVIDIA; rows, columns, inner, group, warps, stages.
VLLM = {
    1: (16, 64, 128, 1, 4, 4),
    32: (16, 64, 128, 1, 4, 4),
    33: (32, 64, 128, 1, 4, 3),
    96: (32, 128, 64, 1, 4, 3),
    128: (64, 128, 64, 1, 4, 3),
    512: (64, 128, 64, 1, 8, 3),
    2048: (128, 128, 64, 1, 8, 3),  # 128 tokens of each of 16 experts are not more than 128
    2064: (128, 128, 64, 16, 8, 3),
}
# Where the engines' tuning scripts search.
SEARCHED = {
    "BLOCK_SIZE_M": {16, 32, 64, 128, 256},
    "BLOCK_SIZE_N": {16, 32, 64, 128, 256},
    "BLOCK_SIZE_K": {16, 32, 64, 128, 256},
    "GROUP_SIZE_M": {1, 4, 8, 16, 32, 64},
    "num_warps": {1, 2, 4, 8},
    "num_stages": {2, 3, 4, 5},
    "waves_per_eu": {0, 1, 2, 4},
    "matrix_instr_nonkdim": {16, 32},
    "kpack": {1, 2},
}


@pytest.mark.parametrize("tokens", VLLM)
def test_the_first_tiling_is_vllms_default(tokens: int) -> None:
    problem = Problem(ZAYA, tokens)
    assert tuple(tilings(TARGETS["sm_90"], problem)[0].values()) == VLLM[tokens]
    on_amd = tilings(TARGETS["gfx942"], problem)[0]
    assert tuple(on_amd[name] for name in TILE) == VLLM[tokens][:4] and on_amd["num_stages"] == 2


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_the_others_are_of_the_engines_search_spaces(target: Target) -> None:
    for tokens in (1, 16, 64, 128, 272, 1088, 2176):
        default, *others = tilings(target, problem_of(tokens, ZAYA))
        assert 15 <= len(others) <= 60
        assert all(tiling.keys() == default.keys() for tiling in others)
        assert all(value in SEARCHED[name] for tiling in others for name, value in tiling.items())
        assert ("kpack" in default) == (target.name == "gfx942")


def test_blocks_suit_the_tokens_of_an_expert() -> None:
    """More tokens, larger blocks; of a model with more experts, smaller ones. One token takes none."""
    target = TARGETS["sm_90"]
    many = replace(ZAYA, num_experts=128)

    def rows(config: ModelConfig, tokens: int) -> int:
        return max(t["BLOCK_SIZE_M"] for t in tilings(target, Problem(config, tokens))[1:])

    found = [rows(ZAYA, tokens) for tokens in (1, 16, 64, 272, 2176)]
    assert found == sorted(found) and (found[0], found[-1]) == (16, 128)
    assert rows(many, 272) < rows(ZAYA, 272)
    for tiling in tilings(target, Problem(ODD, 51)):
        assert tiling["BLOCK_SIZE_N"] <= 128 and tiling["BLOCK_SIZE_K"] <= 128


def test_both_products_have_the_tile_and_one_program_serves_all_token_counts() -> None:
    """So that a line of an engine's file is what is timed, and a bucket does not compile again what another had."""
    kernel, target = KERNELS["grouped_experts"], TARGETS["sm_90"]
    tiling = tilings(target, problem_of(272, ZAYA))[3]
    sources = []
    for tokens in (1, 16, 272):
        _, first, _, second = launches(kernel, problem_of(tokens, ZAYA), "bfloat16", tiling)
        assert first.function is second.function
        assert constants(first.tiling) == constants(second.tiling) == constants(tiling)
        assert target.options(first.tiling) == target.options(second.tiling) == target.options(tiling)
        assert (first.constants["WEIGHTED"], second.constants["WEIGHTED"]) == (False, True)
        sources.append([specialise(launch, target)[0].hash() for launch in (first, second)])
    assert sources[0] == sources[1] == sources[2]
