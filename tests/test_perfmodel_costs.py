"""What a forward costs: parameters, cache bytes, FLOPs and distinct experts, against the live modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.files import UserError
from perfmodel.costs import shape
from perfmodel.experts import CoveragePoint, ExpertCoverage, fit_rho, parse_coverage
from perfmodel.model_spec import ModelSpec, load_spec, spec_from_config
from perfmodel.operators import FORWARD_OPERATORS, forward_costs
from perfmodel.precision import uniform
from runtime.config import ModelConfig, RopeParameters

SMALL = ModelConfig(
    vocab_size=300,
    hidden_size=192,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=5,
    moe_intermediate_size=160,
    router_hidden_size=48,
    max_position_embeddings=512,
    eos_token_id=1,
)
SLIDING = ModelConfig(
    **{
        **{f: getattr(SMALL, f) for f in SMALL.__dataclass_fields__},
        "layer_types": ("hybrid", "hybrid_sliding", "hybrid"),
        "sliding_window": 24,
        "rope_parameters": {"hybrid": RopeParameters(5e6), "hybrid_sliding": RopeParameters(1e4)},
    }
)


def reference(config: ModelConfig) -> Any:
    """The published implementation with these sizes, its experts and attention in plain operators."""
    from transformers import ZayaConfig, ZayaForCausalLM

    keys = set(config.__dataclass_fields__) - {"rope_parameters", "layer_types", "mask_token_id"}
    rope = {kind: vars(value) for kind, value in config.rope_parameters.items()}
    published = ZayaConfig(
        **{k: getattr(config, k) for k in keys}, rope_parameters=rope, layer_types=list(config.layer_types)
    )
    published._experts_implementation = "eager"
    published._attn_implementation = "eager"
    return ZayaForCausalLM(published)


def counted_flops(run: Any) -> int:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def predicted_flops(config: ModelConfig, batch: int, tokens: int) -> float:
    costs = forward_costs(
        spec_from_config(config, "small"), shape(batch, tokens, 0, tokens), uniform("float32"), ExpertCoverage()
    )
    return float(sum(c.flops for c in costs))


def test_parameters_of_the_published_model_are_exact() -> None:
    spec = load_spec("zaya1-8b")
    assert spec.parameters == 8_840_488_784
    assert sum(spec.parameters_by_component().values()) == spec.parameters
    assert spec.stored_kv_bytes_per_token("bfloat16") == 40_960
    assert spec.state_bytes_per_sequence("bfloat16") == 215_040


@pytest.mark.parametrize("config", [ModelConfig(), SMALL, SLIDING], ids=["8b", "small", "sliding"])
def test_parameters_equal_the_reference_modules(config: ModelConfig) -> None:
    import torch

    with torch.device("meta"):
        module = reference(config)
    assert spec_from_config(config, "x").parameters == sum(p.numel() for p in module.parameters())


def test_parameters_equal_our_modules_with_biases_and_untied() -> None:
    import torch

    from runtime.model.zaya import Zaya

    odd = ModelConfig(
        **{
            **{f: getattr(SMALL, f) for f in SMALL.__dataclass_fields__},
            "attention_bias": True,
            "lm_head_bias": True,
            "tie_word_embeddings": False,
        }
    )
    with torch.device("meta"):
        assert spec_from_config(odd, "x").parameters == sum(p.numel() for p in Zaya(odd).parameters())


@pytest.mark.parametrize("config", [SMALL, SLIDING], ids=["small", "sliding"])
def test_flops_agree_with_the_flop_counter_on_the_reference(config: ModelConfig) -> None:
    import torch

    module = reference(config).eval()
    for batch, tokens in ((1, 40), (3, 17)):
        ids = torch.randint(2, config.vocab_size, (batch, tokens))
        counted = counted_flops(lambda ids=ids: module(ids, use_cache=False))
        assert predicted_flops(config, batch, tokens) == pytest.approx(counted, rel=0.02)


def test_flops_agree_with_the_flop_counter_on_our_runtime() -> None:
    """Our runtime folds the two convolutions into a wider one, a little more arithmetic than the published form."""
    import torch

    from runtime.model.zaya import Zaya

    torch.manual_seed(0)
    module = Zaya(SMALL)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    ids = torch.randint(2, SMALL.vocab_size, (2, 33))
    counted = counted_flops(lambda: module.logits(ids))
    assert predicted_flops(SMALL, 2, 33) == pytest.approx(counted, rel=0.02)


def test_a_cached_forward_is_the_difference_of_two_prefills() -> None:
    """The last 5 of 45 tokens cost what the prefill of 45 costs beyond that of 40, but for masked scores."""
    spec = spec_from_config(SMALL, "small")
    cached = forward_costs(spec, shape(2, 5, 40, 5), uniform("float32"), ExpertCoverage())
    long = forward_costs(spec, shape(2, 45, 0, 45), uniform("float32"), ExpertCoverage())
    short = forward_costs(spec, shape(2, 40, 0, 40), uniform("float32"), ExpertCoverage())
    for c, a, b in zip(cached, long, short, strict=True):
        assert float(c.least_flops) == pytest.approx(float(a.least_flops - b.least_flops))


def test_verify_attention_reads_the_cache_once_for_all_slots() -> None:
    spec = load_spec("zaya1-8b")
    one, many = (
        {c.name: c for c in forward_costs(spec, shape(4, s, 8192, s), uniform("bfloat16"), ExpertCoverage())}[
            "attention"
        ]
        for s in (1, 17)
    )
    cache = 4 * 8192 * spec.stored_kv_bytes_per_token("bfloat16")
    assert cache <= one.kv_bytes <= many.kv_bytes < 1.01 * cache
    assert many.flops > 16 * one.flops


def test_sliding_layers_read_at_most_their_window() -> None:
    spec = spec_from_config(SLIDING, "sliding")
    near, far = (
        {c.name: c for c in forward_costs(spec, shape(1, 1, context, 1), uniform("float32"), ExpertCoverage())}[
            "attention"
        ]
        for context in (23, 400)
    )
    per_token = 2 * spec.kv_size * 4
    assert float(far.kv_bytes - near.kv_bytes) == 2 * (400 - 23) * per_token  # the two full layers only


def test_arrays_give_what_numbers_give() -> None:
    spec = load_spec("zaya1-8b")
    batch, slots = np.array([1, 8, 64])[:, None], np.array([1, 17])[None]
    grid = forward_costs(spec, shape(batch, slots, 2048, slots), uniform("bfloat16"), ExpertCoverage())
    absent = {"mlp", "collective"}  # on one device, without a dense layer
    assert [c.name for c in grid] == [name for name in FORWARD_OPERATORS if name not in absent]
    for i, b in enumerate((1, 8, 64)):
        for j, s in enumerate((1, 17)):
            for whole, single in zip(
                grid, forward_costs(spec, shape(b, s, 2048, s), uniform("bfloat16"), ExpertCoverage()), strict=True
            ):
                for name in ("bytes", "flops", "least_flops"):
                    found = np.broadcast_to(getattr(whole, name), (3, 2))[i, j]
                    assert found == pytest.approx(float(getattr(single, name)))


def test_a_spec_is_read_from_a_folder_and_unknown_names_list_the_known(tmp_path: Path) -> None:
    data = {"model_type": "zaya", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 264, "eos_token_id": 1}
    (tmp_path / "config.json").write_text(json.dumps(data))
    spec = load_spec(tmp_path)
    assert (spec.name, spec.hidden_size, spec.layers) == (tmp_path.name, 64, 2)
    assert load_spec(tmp_path / "config.json") == spec
    with pytest.raises(UserError, match=r"gpt-17.*zaya1-8b"):
        load_spec("gpt-17")
    with pytest.raises(UserError, match=r"config\.json"):
        load_spec(tmp_path.parent)


EXPERTS = st.integers(1, 64)
TOKENS = st.integers(1, 4096)


@settings(deadline=None)
@given(EXPERTS, st.integers(1, 128), st.integers(1, 32), st.floats(0, 1), st.floats(0, 0.9))
def test_coverage_laws(experts: int, batch: int, slots: int, rho: float, skip: float) -> None:
    """Fewer for more correlation; never more than there are experts or tokens; grows with tokens; all is the limit."""
    uniform = ExpertCoverage("uniform", skip_share=skip).distinct(batch, slots, experts)
    assert 0 <= uniform <= min(experts, batch * slots) + 1e-9
    assert uniform <= ExpertCoverage("uniform", skip_share=skip).distinct(batch + 1, slots, experts) + 1e-12
    assert uniform <= ExpertCoverage("min", skip_share=skip).distinct(batch, slots, experts) + 1e-9
    free = ExpertCoverage("correlated", rho=0.0).distinct(batch, slots, experts)
    tied = ExpertCoverage("correlated", rho=rho).distinct(batch, slots, experts)
    same = ExpertCoverage("correlated", rho=1.0).distinct(batch, slots, experts)
    assert same - 1e-9 <= tied <= free + 1e-9
    assert free == pytest.approx(float(ExpertCoverage().distinct(batch, slots, experts)))
    assert same == pytest.approx(float(ExpertCoverage().distinct(batch, 1, experts)))
    assert ExpertCoverage("all").distinct(batch, slots, experts) == experts


def test_one_token_reads_one_expert_and_a_verify_of_17_most() -> None:
    assert ExpertCoverage().distinct(1, 1, 16) == pytest.approx(1)
    assert ExpertCoverage().distinct(1, 17, 16) == pytest.approx(10.7, abs=0.05)


def test_uniform_coverage_is_what_independent_routing_gives() -> None:
    rng = np.random.default_rng(0)
    routed = rng.integers(0, 8, size=(4000, 3, 5))
    seen = np.mean([len(set(forward.ravel())) for forward in routed])
    assert ExpertCoverage().distinct(3, 5, 8) == pytest.approx(seen, rel=0.01)


def recorded(*points: tuple[str, float, float, float]) -> ExpertCoverage:
    return ExpertCoverage("measured", measured=tuple(CoveragePoint(*p) for p in points))


def test_measured_coverage_interpolates_and_does_not_extrapolate() -> None:
    measured = recorded(("verify", 1, 4, 2.0), ("verify", 4, 4, 5.0))
    assert measured.distinct(2, 4, 16) == pytest.approx(3.5)
    assert measured.distinct([1, 4], 4, 16).tolist() == [2.0, 5.0]
    assert measured.distinct(1, 1, 16) == pytest.approx(1.0)
    assert measured.distinct(1, 16, 16) == pytest.approx(5.0)  # a longer block than any: as many tokens of shorter ones
    with pytest.raises(UserError, match=r"16 tokens.*1 x 17"):
        measured.distinct(1, 17, 16)
    assert recorded(("verify", 1, 4, 2.0), ("verify", 4, 4, 5.0)).distinct(100, 17, 5) == 5


def test_measured_coverage_is_of_a_kind_of_forward() -> None:
    """Blocks lie between single tokens and longer blocks of their own kind; another kind is not mixed in."""
    measured = recorded(
        ("decode", 1, 1, 1.0), ("decode", 8, 1, 4.0), ("draft", 1, 16, 3.0), ("draft", 8, 16, 6.0),
        ("verify", 1, 16, 5.0), ("verify", 8, 16, 7.0),
    )  # fmt: skip
    assert measured.of("draft").distinct(8, 16, 8) == 6 and measured.of("verify").distinct(8, 16, 8) == 7
    assert measured.of("draft").distinct(1, 4, 8) == pytest.approx(2.0)  # half way in log slots from decode's 1 to 3
    assert measured.of("decode").distinct(8, 1, 8) == measured.of("draft").distinct(8, 1, 8) == 4
    assert measured.of("forward").distinct(8, 16, 8) == pytest.approx(6.5)  # of no kind: all that was seen
    with pytest.raises(UserError, match="8 tokens"):
        measured.of("decode").distinct(9, 1, 8)


def test_a_point_that_is_missing_is_read_from_its_neighbours() -> None:
    """A grid with a hole, as a split of the points leaves it: 9 slots were recorded up to batch 4."""
    measured = recorded(
        ("verify", 1, 1, 1.0), ("verify", 16, 1, 5.0), ("verify", 1, 9, 4.0), ("verify", 4, 9, 6.0),
        ("verify", 1, 81, 6.0), ("verify", 16, 81, 8.0),
    )  # fmt: skip
    assert measured.distinct(4, 9, 16) == 6
    assert measured.distinct(16, 9, 16) == pytest.approx(6.5)  # half way from 1 slot's 5 to 81 slots' 8


@settings(deadline=None, max_examples=12)
@given(st.integers(1, 64), st.integers(1, 33), st.floats(0, 0.95))
def test_a_recorded_grid_is_close_to_the_law_it_was_drawn_from(batch: int, slots: int, rho: float) -> None:
    law = ExpertCoverage("correlated", rho=rho)
    grid = [(b, s) for b in (1, 2, 4, 8, 16, 32, 64) for s in (1, 2, 3, 5, 9, 17, 33)]
    measured = recorded(*(("verify", b, s, float(law.distinct(b, s, 16))) for b, s in grid))
    assert measured.distinct(batch, slots, 16) == pytest.approx(float(law.distinct(batch, slots, 16)), abs=0.5)
    assert fit_rho(measured, 16) == pytest.approx(rho, abs=1e-3)


@pytest.mark.parametrize("text", ["uniform", "uniform(0.06)", "correlated(0.3)", "all", "min"])
def test_coverage_names_round_trip(text: str) -> None:
    assert str(parse_coverage(text)) == text


@pytest.mark.parametrize("text", ["some", "correlated", "correlated(x)", "correlated(1.5)", "all(2)", "measured", ""])
def test_impossible_coverage_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        parse_coverage(text)


def test_every_spec_field_is_used() -> None:
    """A size that no cost depends on would be dead weight (or a forgotten term)."""
    changes: dict[str, Any] = {
        "hidden_size": 96, "vocab_size": 301, "query_size": 192, "kv_size": 48, "head_dim": 8, "num_experts": 6,
        "experts_per_token": 2, "expert_size": 161, "router_size": 49, "conv_widths": (2, 3),
        "window_by_layer": (8, None, None), "attention_bias": True, "lm_head_bias": True,
    }  # fmt: skip
    base = spec_from_config(SMALL, "small")

    def total(spec: ModelSpec) -> list[tuple[float, float]]:
        costs = forward_costs(spec, shape(2, 3, 40, 3), uniform("float32"), ExpertCoverage())
        return [(float(c.flops), float(c.bytes)) for c in costs]

    for name, value in changes.items():
        assert total(ModelSpec(**{**vars(base), name: value})) != total(base), name
