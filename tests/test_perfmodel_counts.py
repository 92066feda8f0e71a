"""The launches in our engines' YAML are counted, so they are counted again here, on the live runtime."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest

from perfmodel.engine import load_engine
from perfmodel.execution import execute_forward
from perfmodel.experts import ExpertCoverage
from perfmodel.model_spec import spec_from_config
from perfmodel.operators import forward_costs, shape
from runtime.config import KernelConfig, ModelConfig

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=6,
    moe_intermediate_size=32,
    router_hidden_size=32,
    max_position_embeddings=256,
    eos_token_id=1,
)
# Which part of a forward an operator belongs to: the innermost module that called it.
PARTS = {
    "RMSNorm": "norms_residual",
    "ResidualScaling": "norms_residual",
    "Attention": "attention block",
    "Router": "router",
    "RouterMLP": "router",
    "Experts": "experts",
    "Zaya": "embedding and head",
}
BLOCK = ("qkv", "cca", "attention", "output")


def count(batch: int, slots: int, context: int, mode: str, experts: int) -> tuple[Counter[str], Counter[str]]:
    """Launches and views by part of one cached forward with the LM head, its tokens spread over `experts` experts."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from runtime.layout import causal
    from runtime.model.zaya import Zaya

    launches: Counter[str] = Counter()
    views: Counter[str] = Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            frame: Any = sys._getframe(1)
            part = None
            while frame is not None and part is None:
                part = PARTS.get(type(frame.f_locals.get("self")).__name__)
                frame = frame.f_back
            is_view = func.is_view or func.__name__.startswith(("_unsafe_view", "lift_fresh"))
            (views if is_view else launches)[part or "other"] += 1
            return func(*args, **(kwargs or {}))

    torch.manual_seed(0)
    model = Zaya(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    for layer in model.model.layers:  # route token t to expert t mod `experts`
        choose = layer.mlp.gate.forward

        def spread(x: Any, *rest: Any, choose: Any = choose) -> Any:
            chosen, *others = choose(x, *rest)
            return torch.remainder(torch.arange(len(chosen)), experts), *others

        layer.mlp.gate.forward = spread
    model.freeze()
    model.kernels = KernelConfig({1_000_000: mode})  # type: ignore[dict-item]
    tokens = torch.randint(2, CONFIG.vocab_size, (batch, slots))
    with torch.no_grad():
        cache = model.new_cache(batch, context + slots, slots)
        cache.lengths = [context] * batch
        model.forward(tokens, causal(slots), cache)  # tables are made once
        with Counting():
            model.project(model.forward(tokens, causal(slots), cache))
    return launches, views


@pytest.mark.parametrize(
    ("mode", "experts", "batch", "slots"),
    [("loop", 2, 2, 5), ("loop", 6, 2, 5), ("grouped", 6, 2, 5), ("gather", 6, 2, 5), ("dense", 6, 2, 5),
     ("gather", 1, 1, 1)],
)  # fmt: skip
def test_launches_are_those_of_the_runtime(mode: str, experts: int, batch: int, slots: int) -> None:
    launches, views = count(batch, slots, 40, mode, experts)
    spec = spec_from_config(CONFIG, "counted")
    at = shape(batch, slots, 40, slots)
    coverage = ExpertCoverage("measured", measured=((1.0, 1.0), (10.0, float(experts)), (11.0, 6.0)))
    costs = forward_costs(spec, at, "float32", coverage)
    kernels = KernelConfig({1_000_000: mode})  # type: ignore[dict-item]
    for name in ("ridgepoint-cpu", "ridgepoint-eager"):
        engine = load_engine(name)
        ran = {op.cost.name: op for op in execute_forward(spec, costs, at, "float32", coverage, engine, kernels)}
        groups = {
            "norms_residual": ("norms_residual",),
            "attention block": BLOCK,
            "router": ("router",),
            "experts": ("experts",),
        }
        for part, names in groups.items():
            said = sum(float(ran[n].launches) for n in names)
            units = sum(float(ran[n].host_units) for n in names)
            slack = 5 if (batch, slots) == (1, 1) and part == "experts" else 1  # one token takes a shorter path
            assert said == pytest.approx(launches[part], rel=0.15, abs=slack * CONFIG.num_hidden_layers), part
            assert units - said == pytest.approx(
                engine.view_share * views[part], rel=0.25, abs=slack * CONFIG.num_hidden_layers
            ), part
        whole = sum(float(op.launches) for op in ran.values())
        assert whole == pytest.approx(sum(launches.values()), rel=0.15)
