"""Small models with nothing left at a value that hides a bug: every scale, bias and temperature is noisy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from runtime.checkpoint import empty_model
from runtime.config import ModelConfig, RopeParameters, replace
from runtime.conversion.recipe import Recipe, Stage
from runtime.model.zaya import Zaya

# ZAYA1-8B shrunk: the same ratios of heads, the same number of experts.
SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 16,
    "moe_intermediate_size": 48,
    "router_hidden_size": 32,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING: dict[str, Any] = {
    "layer_types": ("hybrid_sliding", "hybrid", "hybrid_sliding"),
    "sliding_window": 7,
    "rope_parameters": {
        "hybrid": {"rope_theta": 5000.0, "partial_rotary_factor": 0.5, "rope_type": "default"},
        "hybrid_sliding": {"rope_theta": 100.0, "partial_rotary_factor": 0.25, "rope_type": "default"},
    },
}
VARIANTS: dict[str, dict[str, Any]] = {
    "shrunk": {},
    "six-three-heads": {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 12, "hidden_size": 36},
    "five-one-heads": {"num_attention_heads": 5, "num_key_value_heads": 1, "num_experts": 7, "router_hidden_size": 20},
    "sliding": SLIDING,
    "long-convolutions": {"cca_time0": 3, "cca_time1": 2},
    "short-convolution": {"cca_time0": 1, "cca_time1": 2},
    "biases-untied": {"attention_bias": True, "lm_head_bias": True, "tie_word_embeddings": False},
}
# As small as a test of laws allows, with a mask token: what samplers and conversion are tested on.
TINY = ModelConfig(
    vocab_size=29,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=4,
    moe_intermediate_size=16,
    router_hidden_size=12,
    max_position_embeddings=128,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
    mask_token_id=28,
)

# Two short stages in the byte vocabulary.
RECIPE = Recipe(
    "tiny",
    3,
    (
        Stage("first", "next_token", 2, 24, 0.01, 0.005, 7, warmup_steps=2, task_share=0.5),
        Stage("second", "conversion", 2, 20, 0.01, 0.001, 6, warmup_steps=1, max_block=4, partial_share=0.5),
    ),
    replace(TINY, vocab_size=264, pad_token_id=256, bos_token_id=257, eos_token_id=258, mask_token_id=259),
)


def config_of(variant: dict[str, Any]) -> ModelConfig:
    """SMALL with some keys of a config.json changed."""
    keys = SMALL | variant
    if "rope_parameters" in keys:
        keys["rope_parameters"] = {k: RopeParameters(**v) for k, v in keys["rope_parameters"].items()}
    return ModelConfig(**keys)


@torch.no_grad()
def add_noise(model: nn.Module, seed: int = 0) -> None:
    """Fill every parameter and balancing bias of a ZAYA model, ours or the reference, from one seed, by name.

    A fresh reference has key temperature 0, so that no error in its keys, convolutions or rotation could show.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        if "inv_freq" in name:
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("balancing_biases"):
            value = noise * 0.1
        elif tensor.dim() == 1:
            centre = 0.0 if name.endswith("bias") else 1.0
            value = centre + noise * 0.2
        elif "embed_tokens" in name or "lm_head" in name:
            value = noise * 0.4
        else:
            fan_in = tensor[0].numel() if "conv" in name or tensor.dim() == 2 else tensor.shape[-1]
            value = noise * 1.5 / fan_in**0.5
        tensor.copy_(value)


def noisy_model(config: ModelConfig = TINY, seed: int = 0) -> Zaya:
    """A model of ours for inference, filled with noise."""
    model = empty_model(config)
    add_noise(model, seed)
    return model.freeze()


def random_ids(rows: int, length: int, vocabulary: int, seed: int = 0) -> Tensor:
    """int64 [rows, length]."""
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def relative_error(found: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    """Largest absolute difference over the largest magnitude of `scale` (default: of what is expected)."""
    return float((found - expected).abs().max() / (expected if scale is None else scale).abs().max())
