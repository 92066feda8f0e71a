"""The norm, residual scaling and the embedding as functions, against the modules that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from runtime.config import ModelConfig
from runtime.kernels.problem import Problem
from runtime.kernels.residual_norm.reference import embed, residual_norm
from runtime.kernels.residual_norm.tilings import tilings, tilings_embed
from runtime.kernels.target import TARGETS, Target
from runtime.model.layers import ResidualScaling, RMSNorm
from runtime.model.zaya import Decoder
from tests.models import SMALL

HIDDEN = 72
DTYPES = (torch.float32, torch.bfloat16)


def noisy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Every parameter is noise: none hides behind a one or a zero."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_a_branch_it_is_residual_scaling_and_then_the_norm(dtype: torch.dtype) -> None:
    norm, scaling = noisy(RMSNorm(HIDDEN, 1e-5), dtype), noisy(ResidualScaling(HIDDEN), dtype)
    assert isinstance(norm, RMSNorm) and isinstance(scaling, ResidualScaling)
    branch, residual = torch.randn(7, HIDDEN).to(dtype), torch.randn(7, HIDDEN)
    expected = scaling.forward(branch, residual)
    found, normed = residual_norm(branch, residual, scaling.derive(), norm.weight, norm.eps)
    assert torch.equal(found, expected)
    same(normed, norm.forward(expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_branch_it_is_the_norm(dtype: torch.dtype) -> None:
    norm, residual = noisy(RMSNorm(HIDDEN, 1e-5), dtype), torch.randn(7, HIDDEN)
    assert isinstance(norm, RMSNorm)
    found, normed = residual_norm(None, residual, None, norm.weight, norm.eps)
    assert torch.equal(found, residual)
    same(normed, norm.forward(residual))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_embedding_is_the_decoder_s(dtype: torch.dtype) -> None:
    decoder = noisy(Decoder(ModelConfig(**SMALL)), dtype)
    assert isinstance(decoder, Decoder)
    tokens = torch.tensor([5, 0, SMALL["vocab_size"] - 1, 5])
    found = embed(
        tokens, decoder.embed_tokens.weight, decoder.input_hidden_states_bias, decoder.input_hidden_states_scale
    )
    assert found.dtype == torch.float32
    assert torch.equal(found, decoder.embed(tokens))


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("tokens", [1, 17, 272, 2048])
@pytest.mark.parametrize("hidden", [16, 80, 2048, 8192])
def test_tilings_differ_and_can_be_launched(target: Target, tokens: int, hidden: int) -> None:
    problem = Problem(ModelConfig(hidden_size=hidden), batch=tokens)
    for found in (tilings(target, problem), tilings_embed(target, problem)):
        assert len({tuple(sorted(tiling.items())) for tiling in found}) == len(found) <= 30
        assert all(1 <= tiling["num_warps"] <= target.max_warps for tiling in found)
        assert all(tiling["num_warps"].bit_count() == 1 for tiling in found)
        assert hidden < 2048 or len(found) >= 2


def same(found: Tensor, expected: Tensor) -> None:
    """To one rounding: the sums may be taken in another order."""
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-6 if found.dtype == torch.float32 else 1e-2, atol=1e-6)
