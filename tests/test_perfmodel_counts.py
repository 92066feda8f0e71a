"""The launches in our engines' YAML are counted, so they are counted again here, on the live runtime."""

from __future__ import annotations

import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hardware.files import UserError
from perfmodel.costs import shape
from perfmodel.engine import load_engine
from perfmodel.execution import execute_forward
from perfmodel.experts import CoveragePoint, ExpertCoverage
from perfmodel.model_spec import spec_from_config
from perfmodel.operators import forward_costs
from perfmodel.precision import uniform
from perfmodel.steps import step_of
from runtime.config import SAMPLER_NAMES, DecodingConfig, KernelConfig, ModelConfig, Sampler, replace

if TYPE_CHECKING:
    from runtime.layout import Layout

CONFIG = ModelConfig(
    vocab_size=96,
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
    mask_token_id=95,
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
    tokens = torch.randint(2, CONFIG.vocab_size - 1, (batch, slots))
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
    coverage = ExpertCoverage("measured", measured=(CoveragePoint("verify", batch, slots, experts),))
    costs = forward_costs(spec, at, uniform("float32"), coverage)
    kernels = KernelConfig({1_000_000: mode})  # type: ignore[dict-item]
    for name in ("ridgepoint-cpu", "ridgepoint-eager"):
        engine = load_engine(name)
        ran = {op.cost.name: op for op in execute_forward(spec, costs, at, engine, kernels)}
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


def own_work(decoding: DecodingConfig, batch: int = 2) -> tuple[int, int, float]:
    """Launches, views and bytes of logits moved by one step of a sampler itself, after steps that made its layouts."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from runtime.model.zaya import Zaya
    from runtime.samplers import advance
    from runtime.samplers.acceptance import Randomness
    from runtime.samplers.state import Decode

    found = [0.0, 0.0, 0.0]  # launches, views, bytes

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            frame: Any = sys._getframe(1)
            while frame is not None and type(frame.f_locals.get("self")).__name__ not in PARTS:
                frame = frame.f_back
            out = func(*args, **(kwargs or {}))
            if frame is None:
                is_view = func.is_view or func.__name__.startswith(("_unsafe_view", "lift_fresh"))
                found[1 if is_view else 0] += 1
                tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor) and t.dim() > 1]
                logits = [t for t in tensors if t.shape[-1] == CONFIG.vocab_size]
                if not is_view and "gather" not in func.__name__:  # a gather reads one entry of a row
                    found[2] += sum(t.numel() * t.element_size() for t in logits)
            return out

    torch.manual_seed(0)
    model = Zaya(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.freeze()
    with torch.no_grad():
        cache = model.new_cache(batch, 120 + decoding.slots, decoding.slots)
        decode = Decode(model, cache, decoding, torch.full((batch, 1), 5), Randomness(0, batch), list(range(batch)))
        advance(decode)
        advance(decode)
        with Counting():
            advance(decode)
    return int(found[0]), int(found[1]), found[2] / batch


@pytest.mark.parametrize("k", [1, 2, 5, 16])
def test_the_pairs_of_a_forward_are_those_of_its_layout(k: int) -> None:
    """Exactly, but for sparse levels, of which at least so many are seen: a bound must not count more."""
    from runtime.layout import block, draft, single_forward

    def pairs(decoding: DecodingConfig) -> float:
        found = step_of(replace(decoding, draft_tokens=k)).forwards[0].pairs
        assert found is not None
        return float(found)

    def seen(layout: Layout) -> int:
        assert layout.visible is not None
        return int(layout.visible.sum())

    assert pairs(DecodingConfig("two_forward")) == seen(draft(k))
    assert pairs(DecodingConfig("denoising")) == seen(block(k, (k,)))
    assert pairs(DecodingConfig("single_forward")) == seen(single_forward(k, tuple(range(k + 1))))
    for levels in ((0,), (0, k)):
        sparse = DecodingConfig("single_forward", draft_tokens=k, proposal_levels=levels)
        assert pairs(sparse) <= seen(single_forward(k, levels))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    "decoding",
    [
        DecodingConfig(),
        DecodingConfig("two_forward"),
        DecodingConfig("single_forward"),
        DecodingConfig("single_forward", draft_tokens=6, proposal_levels=(0, 2, 5)),
        DecodingConfig("denoising", denoising_steps=2),
        DecodingConfig("denoising", denoising_steps=5),
        DecodingConfig("denoising", denoising_steps=4, verify=True),
        DecodingConfig("denoising", draft_tokens=6, denoising_steps=6, verify=True),
    ],
    ids=lambda d: f"{d.sampler}-{d.draft_tokens}-{d.denoising_steps}-{d.verify}",
)
def test_a_samplers_own_work_is_that_of_the_runtime(decoding: DecodingConfig, temperature: float) -> None:
    decoding = replace(decoding, temperature=temperature)
    launches, views, moved = own_work(decoding)
    for name in ("ridgepoint-cpu", "ridgepoint-eager"):
        engine, work = load_engine(name), step_of(decoding).work
        parts = [(engine.work(w.entry), np.asarray(w.times), np.asarray(w.rows) * np.asarray(w.times)) for w in work]
        assert sum(times * host.launches for host, times, _ in parts) == pytest.approx(launches, rel=0.08, abs=1)
        assert sum(times * host.views for host, times, _ in parts) == pytest.approx(views, rel=0.2, abs=1)
        said = sum(rows * host.passes for host, _, rows in parts) * CONFIG.vocab_size * 4
        assert said == pytest.approx(moved, rel=0.3)


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_a_samplers_forwards_are_those_of_the_runtime(sampler: Sampler) -> None:
    """Their kinds, how many there are, and how many slots they have, one sequence at a time."""
    from runtime.engine import generate
    from tests.models import noisy_model

    model = noisy_model(CONFIG)
    for changes in ({}, {"denoising_steps": 3}, {"denoising_steps": 4, "verify": True}, {"proposal_levels": (0, 2)}):
        try:
            decoding = replace(DecodingConfig(sampler, draft_tokens=6), **changes)
        except UserError:  # another sampler's setting
            continue
        result = generate(model, [[5, 6, 7]], decoding, max_new_tokens=24, stop_tokens=())
        said, steps = step_of(decoding), result.steps[0]
        kinds = {f.name for f in said.forwards}
        assert set(result.counters) == kinds
        for kind in kinds:
            of_kind = [(np.asarray(f.times), np.asarray(f.slots)) for f in said.forwards if f.name == kind]
            counted = result.counters[kind]
            assert counted.forwards == steps * sum(times for times, _ in of_kind)
            first = 0 if decoding.lossless else decoding.draft_tokens - 1  # the first block has one token before it
            assert counted.slots == steps * sum(times * slots for times, slots in of_kind) - first


@pytest.mark.parametrize(("batch", "slots"), [(1, 1), (1, 17), (2, 5)])
def test_the_kernels_of_graphs_are_those_that_start(batch: int, slots: int) -> None:
    """Of a forward small enough that experts need no sorting, on an NVIDIA GPU."""
    import torch

    from runtime.kernels.launch import recording
    from runtime.kernels.problem import Problem
    from runtime.kernels.registry import KERNELS
    from runtime.kernels.target import target

    engine, problem = load_engine("ridgepoint-graphs"), Problem(ModelConfig(), batch, slots)
    started: Counter[str] = Counter()
    for name in ("embed", "residual_norm", "cca", "attention", "router", "experts"):
        kernel = KERNELS[name]
        with recording() as found:
            given = kernel.inputs(problem, torch.bfloat16, "meta")
            kernel.triton()(**given, tiling=kernel.tilings(target("sm_90"), problem)[0])
        started[kernel.operator] += len(found)
    assert engine.operators["embedding"].launches == started["embedding"] + started["norms_residual"]  # and first norm
    assert engine.operators["norms_residual"].launches == 2 * started["norms_residual"]  # of a layer
    for name in ("cca", "attention", "router"):
        assert engine.operators[name].launches == started[name], name
    assert engine.experts["grouped"].launches == started["experts"]


def test_forwards_of_one_engine_are_not_predicted_by_another() -> None:
    from perfmodel.decoding import setting
    from tests.perfmodel_cpu import made_up_cpu

    spec, cpu = spec_from_config(CONFIG, "counted"), made_up_cpu()
    for ran, described in (("eager", "ridgepoint-cpu"), ("lean", "ridgepoint-lean")):
        kernels = KernelConfig(engine=ran)  # type: ignore[arg-type]
        assert setting(spec, cpu, "float32", kernels=kernels).engine.name == described
    assert setting(spec, cpu, "float32").engine.name == "ridgepoint-lean"
    with pytest.raises(UserError, match="describes lean forwards, but these are eager"):
        setting(spec, cpu, "float32", engine="ridgepoint-lean", kernels=KernelConfig())
    with pytest.raises(UserError, match=r"described engine.*compiled.*eager"):
        setting(spec, cpu, "float32", kernels=KernelConfig(engine="compiled"))
