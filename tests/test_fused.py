"""The fused forward is the eager one in another form: hidden states, routes and cache agree after any history."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hardware.files import UserError
from runtime.cache import Cache
from runtime.fused import OPERATORS, FusedForward, reference_ops, shared, wrap
from runtime.layout import Layout, block, causal, draft, single_forward
from runtime.model.zaya import Zaya
from tests.models import TINY, VARIANTS, config_of, noisy_model, random_ids, relative_error

torch.set_num_threads(1)
ROWS, CAPACITY, KEPT = 3, 90, 6
MODELS: dict[str, Zaya] = {
    name: noisy_model(config_of(keys), seed=1) for name, keys in VARIANTS.items() if not keys.get("attention_bias")
}
LAYOUTS: dict[str, Layout] = {
    "decode": causal(1),
    "verify": causal(KEPT),
    "draft": draft(5),
    "single_forward": single_forward(4, (0, 1, 3)),
    "block": block(4, (2,)),
}


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def prefilled(model: Zaya, counts: list[int]) -> Cache:
    """A cache of ragged sequences, filled by the eager forward."""
    cache = model.new_cache(len(counts), CAPACITY, KEPT)
    width = max(counts)
    if width:
        model.forward(random_ids(len(counts), width, model.config.vocab_size), causal(width), cache, counts=counts)
        cache.advance(counts)
    return cache


def lengths_of(cache: Cache) -> Tensor:
    return torch.tensor(cache.lengths, dtype=torch.int32)


def assert_same(found: Tensor, expected: Tensor, what: str) -> None:
    assert found.shape == expected.shape
    assert not expected.numel() or relative_error(found, expected) < 2e-5, what


@pytest.mark.parametrize("counts", [[9, 9, 9], [0, 0, 0], [14, 0, 23]], ids=["equal", "empty", "ragged"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_forward_of_any_layout_is_the_eager_one(model: Zaya, layout: Layout, counts: list[int]) -> None:
    tokens = random_ids(ROWS, layout.slots, model.config.vocab_size, seed=3)
    eager, fused = prefilled(model, counts), prefilled(model, counts)
    routes: list[Tensor] = []
    expected = model.forward(tokens, layout, eager, routes=routes)
    forward = FusedForward(model, reference_ops(), fused)
    hidden, chosen = forward.forward(tokens, layout, lengths_of(fused))
    assert_same(hidden, expected, "hidden")
    assert torch.equal(chosen.long(), torch.stack(routes))
    assert_same(forward.project(hidden), model.project(expected), "logits")
    slots = slice(None) if layout.visible is None else slice(layout.committed)
    for layer in range(model.config.num_hidden_layers):
        for row, length in enumerate(counts):
            new = range(length, length + layout.slots)
            for mine, theirs in ((fused.keys, eager.keys), (fused.values, eager.values)):
                assert_same(mine[layer][row, list(new)], theirs[layer][row, list(new)], f"layer {layer} row {row}")
            ring = [position % eager.ring for position in new][slots]
            assert_same(fused.columns[layer][row, ring], eager.columns[layer][row, ring], f"columns {layer} {row}")


@pytest.mark.parametrize("counts", [[31, 31, 31], [5, 31, 0], [2, 1, 7]], ids=["full", "empty row", "short"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_prefill_leaves_the_eager_state_behind(model: Zaya, counts: list[int]) -> None:
    tokens, layout = random_ids(ROWS, 31, model.config.vocab_size, seed=4), causal(31)
    eager, fused = prefilled(model, [3, 0, 8]), prefilled(model, [3, 0, 8])
    expected = model.forward(tokens, layout, eager, counts=counts)
    hidden, _ = FusedForward(model, reference_ops(), fused).forward(tokens, layout, lengths_of(fused), counts=counts)
    eager.advance(counts)
    fused.wrote(counts)
    fused.advance(counts)
    for row, count in enumerate(counts):
        assert_same(hidden[row, :count], expected[row, :count], f"hidden of row {row}")
        assert (hidden[row, count:] == 0).all()
        found, wanted = fused.state(row), eager.state(row)
        for name in wanted:
            assert_same(found[name], wanted[name], f"{name} of row {row}")


def test_padded_sequences_read_no_expert_and_change_nobody() -> None:
    model = MODELS["shrunk"]
    layout, tokens = causal(3), random_ids(ROWS, 3, model.config.vocab_size, seed=5)
    cache = prefilled(model, [7, 2, 0])
    forward = FusedForward(model, reference_ops(), cache)
    expected, routes = forward.forward(tokens[:2], layout, lengths_of(cache))
    active = torch.tensor([6], dtype=torch.int32)
    hidden, padded = forward.forward(tokens, layout, lengths_of(cache), active=active)
    assert_same(hidden[:2], expected, "active rows")
    assert torch.equal(padded[:, :6], routes)
    assert (padded[:, 6:] == model.config.num_experts).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_where_eager_rounds(dtype: torch.dtype) -> None:
    model = noisy_model(config_of({})).to(dtype).freeze()
    eager, fused = prefilled(model, [5, 9, 0]), prefilled(model, [5, 9, 0])
    tokens = random_ids(ROWS, 4, model.config.vocab_size, seed=6)
    expected = model.forward(tokens, causal(4), eager).float()
    hidden, _ = FusedForward(model, reference_ops(), fused).forward(tokens, causal(4), lengths_of(fused))
    assert hidden.dtype == dtype
    assert float((hidden.float() - expected).norm() / expected.norm()) < 1e-2


def test_every_operator_can_be_wrapped_by_its_name() -> None:
    model = MODELS["shrunk"]
    cache, calls = prefilled(model, [4, 4, 4]), dict.fromkeys(OPERATORS.values(), 0)

    def counted(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return function(*arguments)

        return call

    forward = FusedForward(model, wrap(reference_ops(), counted), cache)
    hidden, _ = forward.forward(random_ids(ROWS, 1, model.config.vocab_size), causal(1), lengths_of(cache))
    forward.project(hidden)
    layers = model.config.num_hidden_layers
    each = dict.fromkeys(("qkv", "cca", "attention", "output", "router", "experts"), layers)
    assert calls == each | {"embedding": 1, "norms_residual": 2 * layers + 1, "lm_head": 1}


def test_repacked_weights_follow_the_parameters() -> None:
    model = noisy_model(TINY, seed=2)
    tokens = random_ids(1, 4, TINY.vocab_size)
    for scale in (1.0, 1.5):
        model.train()
        model.model.layers[0].self_attn.o_proj.weight.mul_(scale)  # type: ignore[union-attr, operator]
        model.freeze()
        cache = model.new_cache(1, 8, 4)
        expected = model.forward(tokens, causal(4), model.new_cache(1, 8, 4))
        hidden, _ = FusedForward(model, reference_ops(), cache).forward(tokens, causal(4), lengths_of(cache))
        assert_same(hidden, expected, f"scale {scale}")


def test_an_attention_bias_is_refused() -> None:
    model = noisy_model(config_of(VARIANTS["biases-untied"]))
    with pytest.raises(UserError, match="attention_bias must be false"):
        FusedForward(model, reference_ops(), model.new_cache(1, 8, 4))


def test_layouts_of_their_own_per_sequence_are_told_apart() -> None:
    assert all(shared(layout) for layout in LAYOUTS.values())
    assert not shared(block(4, (2, 1)))
