"""The engine `graphs` on a CPU, its kernels interpreted: see tests/interpreter.py.

Asserts that forwards of every layout leave the eager state behind, and that whole steps commit eager's tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.cache import Cache
from runtime.config import DecodingConfig, KernelConfig, ModelConfig, replace
from runtime.engine import generate
from runtime.layout import Layout, causal, draft, single_forward
from runtime.model.zaya import Zaya
from tests.models import noisy_model, random_ids

# No size is a power of two but head_dim; rows of unequal length, one of them empty; the second layer has a window.
CONFIG = ModelConfig(
    vocab_size=41, hidden_size=40, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, head_dim=16,
    num_experts=5, moe_intermediate_size=24, router_hidden_size=20, max_position_embeddings=64, pad_token_id=None,
    bos_token_id=None, eos_token_id=None, mask_token_id=40, layer_types=("hybrid", "hybrid_sliding"), sliding_window=5,
)  # fmt: skip
COUNTS, CAPACITY, KEPT = [11, 0, 4], 48, 4
LAYOUTS: dict[str, Layout] = {
    "decode": causal(1),
    "verify": causal(KEPT),
    "draft": draft(3),
    "single_forward": single_forward(3, (0, 2)),
}
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2}
SETTINGS = (
    DecodingConfig(),
    DecodingConfig("two_forward", 2, 1.0, 0.9, 0.9),
    DecodingConfig("single_forward", 2, proposal_levels=(0,)),
)


def prefilled(model: Zaya) -> Cache:
    """A cache of ragged sequences, filled by the eager forward."""
    cache = model.new_cache(len(COUNTS), CAPACITY, KEPT)
    model.forward(random_ids(len(COUNTS), max(COUNTS), CONFIG.vocab_size), causal(max(COUNTS)), cache, counts=COUNTS)
    cache.advance(COUNTS)
    return cache


def with_engine(model: Zaya, engine: str) -> Zaya:
    """The model with an engine, which need not be one that can run here."""
    model.kernels = replace(KernelConfig(), engine=engine)
    return model


def error(found: Tensor, expected: Tensor) -> float:
    """Relative norm."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@torch.no_grad()
def forwards() -> None:
    """Every layout: hidden states, routes, and what the forward writes to the cache."""
    for dtype, tolerance in TOLERANCES.items():
        model = noisy_model(CONFIG, seed=1).to(dtype).freeze()
        for name, layout in LAYOUTS.items():
            if dtype != torch.float32 and name != "verify":  # the interpreter is slow
                continue
            found: list[Tensor] = []
            expected: list[Tensor] = []
            for engine, results in (("graphs", found), ("eager", expected)):
                cache = prefilled(with_engine(model, "eager"))
                tokens = random_ids(len(COUNTS), layout.slots, CONFIG.vocab_size, seed=3)
                tokens = torch.cat([tokens, torch.zeros_like(tokens)], dim=1)[:, : layout.slots]  # not contiguous
                hidden, routes = with_engine(model, engine).run(tokens, layout, cache)
                results += [hidden, routes.int()]
                for layer in range(CONFIG.num_hidden_layers):
                    for row, length in enumerate(COUNTS):
                        new = list(range(length, length + layout.slots))
                        results += [cache.keys[layer][row, new], cache.values[layer][row, new]]
                        kept = [position % cache.ring for position in new[: layout.committed]]
                        results += [cache.columns[layer][row, kept]] if kept else []
            assert torch.equal(found[1], expected[1]), f"{dtype} {name}: routes"
            errors = [error(a, b) for a, b in zip(found, expected, strict=True)]
            assert max(errors) <= tolerance, f"{dtype} {name}: {errors}"
            print(f"{dtype} {name}: {max(errors):.1e}")


def tokens() -> None:
    """Whole steps of unequal prompts: forwards, sampling, acceptance and lengths."""
    model = noisy_model(CONFIG, seed=2)
    prompts = [row[: 2 + 3 * i] for i, row in enumerate(random_ids(2, 5, CONFIG.vocab_size - 1, seed=3).tolist())]
    for decoding in SETTINGS:
        found, expected = (
            generate(with_engine(model, engine), prompts, decoding, max_new_tokens=3, stop_tokens=()).tokens
            for engine in ("graphs", "eager")
        )
        assert found == expected, f"{decoding.sampler}: {found} and not {expected}"
        print(f"{decoding.sampler}: the same tokens")
