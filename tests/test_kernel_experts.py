"""The experts' reference is the model's own experts in every mode, and the skip expert contributes exactly nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from runtime.config import EXPERT_MODES, ExpertMode, ModelConfig
from runtime.kernels.check import check
from runtime.kernels.experts.reference import experts
from runtime.kernels.experts.tilings import tilings
from runtime.kernels.problem import ODD, Problem, problem_of
from runtime.kernels.registry import kernel
from runtime.kernels.target import TARGETS
from runtime.model.moe import Experts
from tests.interpreter import interpreted

CONFIG = ModelConfig(hidden_size=40, moe_intermediate_size=48, num_experts=5)
# The registry's check has no more tokens than a program can sort by itself, and its tilings do not swap operands.


def call(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Experts, Tensor, Tensor, Tensor]:
    """Experts with noise in every weight, and tokens, their experts (the skip expert among them), probabilities."""
    generator = torch.Generator().manual_seed(tokens)
    model = Experts(CONFIG).to(dtype).requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    x = torch.randn(tokens, CONFIG.hidden_size, generator=generator).to(dtype)
    chosen = torch.randint(0, CONFIG.num_experts + 1, (tokens,), generator=generator)
    chosen[-1] = CONFIG.num_experts if tokens > 1 else 2
    return model, x, chosen, torch.rand(tokens, generator=generator).to(dtype)


@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 17, 64])
@pytest.mark.parametrize("mode", EXPERT_MODES)
def test_the_reference_is_the_model_in_every_mode(mode: ExpertMode, tokens: int) -> None:
    model, x, chosen, probability = call(tokens)
    with torch.inference_mode():
        expected = model.forward(x, chosen, probability, mode)
        found = experts(x, chosen.int(), probability, model.gate_up_proj, model.down_proj)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [3, 17])
def test_skipped_tokens_are_zero_whatever_they_hold(tokens: int) -> None:
    model, x, chosen, probability = call(tokens)
    skipped = chosen == CONFIG.num_experts
    x[skipped] = torch.nan
    found = experts(x, chosen.int(), probability, model.gate_up_proj, model.down_proj)
    assert skipped.any() and not skipped.all()
    assert (found[skipped] == 0).all() and found[~skipped].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [2, 17])
def test_half_precision_stays_near_fp32(tokens: int, dtype: torch.dtype) -> None:
    model, x, chosen, probability = call(tokens, dtype)
    expected = experts(
        x.float(), chosen.int(), probability.float(), model.gate_up_proj.float(), model.down_proj.float()
    )
    found = experts(x, chosen.int(), probability, model.gate_up_proj, model.down_proj)
    assert found.dtype == dtype
    assert (found - expected).norm() <= 1e-2 * expected.norm()


def test_meta_tensors_give_the_shape() -> None:
    model, x, chosen, probability = call(3)
    gate_up, down = model.to("meta").weights()
    assert experts(x.to("meta"), chosen.to("meta"), probability.to("meta"), gate_up, down).shape == x.shape


def many_tokens() -> None:
    sizes = {"BLOCK_N": 32, "BLOCK_K": 64, "DOWN_N": 64, "DOWN_K": 32, "GROUP_M": 3, "num_warps": 4, "num_stages": 2}
    for tokens, rows, swap, dtype in ((17, 16, 1, "float32"), (300, 32, 0, "float16"), (777, 64, 1, "float32")):
        tiling = sizes | {"BLOCK_M": rows, "SWAP": swap}
        result = check(kernel("experts"), Problem(ODD, tokens, 1), dtype, "cpu", tiling)
        assert result.passed, str(result)
    tile = {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 3, "num_warps": 4}
    result = check(kernel("grouped_experts"), Problem(ODD, 600, 1), "float32", "cpu", tile | {"num_stages": 2})
    assert result.passed, str(result)


def test_many_tokens_and_swapped_operands_agree_in_the_interpreter() -> None:
    interpreted(__name__, "many_tokens")


@pytest.mark.parametrize("tokens", [1, 3, 16, 64, 272, 1088, 2176])
@pytest.mark.parametrize("target", TARGETS)
def test_tilings_vary_and_suit_their_vendor(target: str, tokens: int) -> None:
    found = tilings(TARGETS[target], problem_of(tokens, ModelConfig()))
    assert len(found) >= 5
    assert len({tuple(sorted(tiling.items())) for tiling in found}) == len(found)
    assert len({tuple(tiling) for tiling in found}) == 1
    assert all(tiling["num_warps"] <= TARGETS[target].max_warps for tiling in found)
    assert all(("matrix_instr_nonkdim" in tiling) == (TARGETS[target].backend == "hip") for tiling in found)


@pytest.mark.parametrize("tokens", [1, 272, 2176])
def test_blocks_shrink_with_the_model(tokens: int) -> None:
    for target in TARGETS.values():
        for tiling in tilings(target, problem_of(tokens, CONFIG)):
            assert tiling["BLOCK_N"] <= 64 and tiling["DOWN_N"] <= 64
            assert 16 <= tiling["BLOCK_K"] <= 64 and 16 <= tiling["DOWN_K"] <= 64
