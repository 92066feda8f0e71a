"""The experts' reference is the model's own experts in every mode, and the skip expert contributes exactly nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from runtime.config import EXPERT_MODES, ExpertMode, ModelConfig
from runtime.kernels.experts.reference import experts
from runtime.model.moe import Experts

CONFIG = ModelConfig(hidden_size=40, moe_intermediate_size=48, num_experts=5)


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
