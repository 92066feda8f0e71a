"""CCA between the projections and attention: the reference leaves what the eager forward leaves, state included."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hardware.files import UserError
from runtime.cache import Cache
from runtime.config import ModelConfig
from runtime.kernels.cca.reference import cca, cca_weights
from runtime.kernels.cca.tilings import tilings
from runtime.kernels.compiler import Compilers, Job
from runtime.kernels.problem import Problem
from runtime.kernels.target import TARGETS
from runtime.layout import Layout, causal, draft, predecessors, single_forward
from runtime.model import attention
from runtime.model.attention import Attention
from runtime.model.frame import build_frame
from runtime.model.rotary import Rotary
from tests.models import VARIANTS, add_noise, config_of

LAYOUTS = {
    "decode": causal(1),
    "verify": causal(5),
    "longer than the ring": causal(11),
    "draft": draft(4),
    "single_forward": single_forward(2, (0, 2)),
}
LENGTHS = {"one": [7], "equal": [13, 13], "ragged, one empty": [0, 9, 30], "two empty": [0, 0]}


class Result(NamedTuple):
    query: Tensor
    keys: Tensor
    values: Tensor
    columns: Tensor


def layer_of(config: ModelConfig) -> Attention:
    layer = Attention(config, 0)
    add_noise(layer)
    layer.requires_grad_(False).freeze()
    return layer


def filled(config: ModelConfig, lengths: list[int], slots: int) -> Cache:
    """A cache of noise, but where the columns before a first token lie: those are zero."""
    generator = torch.Generator().manual_seed(5)
    cache = Cache(config, len(lengths), max(lengths) + slots, 6)
    for tensor in (cache.keys[0], cache.values[0], cache.columns[0]):
        tensor.normal_(generator=generator)
    for row, length in enumerate(lengths):
        for position in range(length - config.conv_history, 0):
            cache.columns[0][row, position % cache.ring] = 0
    cache.lengths = list(lengths)
    return cache


def eager(layer: Attention, x: Tensor, layout: Layout, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> Result:
    """What one eager layer hands to attention, and what it leaves in the cache."""
    queries: list[Tensor] = []

    def taken(query: Tensor, *_: Tensor) -> Tensor:
        queries.append(query)
        return query.flatten(2)

    monkeypatch.setattr(attention, "attend", taken)
    config = layer.config
    frame = build_frame(config, Rotary(config), layout, cache, batch=len(x), counts=None, dtype=torch.float32)
    layer.forward(x, frame)
    return Result(queries[0].flatten(0, 1), cache.keys[0], cache.values[0], cache.columns[0])


def fused(layer: Attention, x: Tensor, layout: Layout, cache: Cache) -> Result:
    """The same by the reference of the kernel."""
    config, w = layer.config, layer.weights()
    previous = torch.arange(layout.slots) - 1 if layout.previous is None else layout.previous
    end = cache.capacity
    cos, sin, swap = Rotary(config).factors(config.layer_types[0], slice(0, end), end, torch.float32, x.device)
    query = cca(
        F.linear(x, w.projection).flatten(0, 1),
        cca_weights(w, config),
        cache.keys[0],
        cache.values[0],
        cache.columns[0],
        torch.tensor(cache.lengths, dtype=torch.int32),
        layout.offsets.to(torch.int32),
        predecessors(previous, config.conv_history).to(torch.int32),
        layout.committed,
        cos.squeeze(1),
        sin.squeeze(1),
        swap,
    )
    return Result(query, cache.keys[0], cache.values[0], cache.columns[0])


def check(config: ModelConfig, layout: Layout, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(config)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(lengths), layout.slots, config.hidden_size, generator=generator)
    expected = eager(layer, x, layout, filled(config, lengths, layout.slots), monkeypatch)
    found = fused(layer, x, layout, filled(config, lengths, layout.slots))
    for name, value in expected._asdict().items():
        other = getattr(found, name)
        if name == "columns":  # the last entry takes what nobody reads
            value, other = value[:, :-1], other[:, :-1]
        torch.testing.assert_close(other, value, rtol=2e-5, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_reference_equals_eager(layout: Layout, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    check(config_of({}), layout, lengths, monkeypatch)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ("shrunk", "biases-untied")])
def test_the_reference_equals_eager_for_every_shape_of_model(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(config_of(VARIANTS[variant]), LAYOUTS["single_forward"], [3, 0, 8], monkeypatch)


def test_a_cache_may_have_more_rows_than_sequences() -> None:
    """The batch is the leading rows; the others stay as they are."""
    config, layout = config_of({}), LAYOUTS["verify"]
    layer, x = layer_of(config), torch.randn(2, 5, config.hidden_size, generator=torch.Generator().manual_seed(2))
    expected = fused(layer, x, layout, filled(config, [4, 9], 5))
    cache = filled(config, [4, 9], 5)
    for store in (cache.keys, cache.values, cache.columns):
        store[0] = torch.cat([store[0], torch.full_like(store[0], 3.0)])
    found = fused(layer, x, layout, cache)
    assert torch.equal(found.query, expected.query)
    for name in ("keys", "values", "columns"):
        assert torch.equal(getattr(found, name)[:2], getattr(expected, name))
        assert bool((getattr(found, name)[2:] == 3).all())


@pytest.mark.parametrize("slots", [1, 17])
def test_the_paths_for_one_token_and_for_many_compile(slots: int) -> None:
    """The interpreter takes names whose shape a branch changes; compilers do not."""
    problem = Problem(config_of({}), 1, slots)
    target = TARGETS["sm_90"]
    job = Job("cca", target.name, problem, "bfloat16", tilings(target, problem)[0])
    with Compilers(workers=1) as compilers:
        [(_, result)] = compilers.compile([job])
    assert result.usable, result.outcome


def test_projections_with_a_bias_are_left_to_eager() -> None:
    config = config_of(VARIANTS["biases-untied"])
    layer = layer_of(config)
    with pytest.raises(UserError, match="attention_bias must be false for the fused forward"):
        cca_weights(layer.weights(), config)
