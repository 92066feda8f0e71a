"""Bounds are below anything real and have no jumps; a point of a grid is what it is alone; one rule in one place."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ridgepoint
from hardware.files import UserError
from hardware.profile import list_profiles, load_profile
from perfmodel.contenders import Acceptance
from perfmodel.decoding import Setting, predict, setting, time_forward, time_step
from perfmodel.engine import HostCosts, load_engine
from perfmodel.explain import explain
from perfmodel.kernels import collective
from perfmodel.kernels.attention import kv_bytes
from perfmodel.kernels.call import Attention, Collective
from perfmodel.memory import memory_bytes, usable_bytes
from perfmodel.model_spec import load_spec
from perfmodel.parallel import Parallel, sent_copies
from perfmodel.precision import attention_dtypes, quantised
from perfmodel.roofline import Timing
from perfmodel.serving import Load, serve
from perfmodel.steps import step_of
from perfmodel.sweep import sweep
from runtime.config import DecodingConfig, KernelConfig, Workload
from tests.perfmodel_cpu import made_up_cpu

DEVICES = sorted(name for name in list_profiles() if load_profile(name).kind == "gpu")
H100 = load_profile("h100-sxm")
MOE = load_spec("qwen3-30b-a3b")


def place(model: str, device: str = "h100-sxm", **others: Any) -> Setting:
    return setting(load_spec(model), load_profile(device), "bfloat16", **({"engine": "ideal-graph"} | others))


def named(at: Setting, name: str, batch: float, slots: float, context: float) -> Timing:
    return next(op for op in time_forward(at, batch, slots, context).operators if op.name == name)


@pytest.mark.parametrize(("experts", "k", "tensor", "expert"), [(8, 2, 1, 4), (8, 3, 2, 4), (6, 1, 1, 3), (4, 4, 1, 2)])
def test_a_token_is_sent_to_the_other_devices_that_hold_its_experts(
    experts: int, k: int, tensor: int, expert: int
) -> None:
    """Counted over every choice of k experts: devices beyond the token's own replica, which is the first."""
    each = experts // expert
    choices = list(itertools.combinations(range(experts), k))
    seen = np.mean([len({e // each for e in chosen} - set(range(tensor))) for chosen in choices])
    assert sent_copies(experts, k, Parallel(tensor, expert)) == pytest.approx(seen)


def test_an_exchange_sends_what_it_must() -> None:
    """Two devices, 512 tokens each: half of the expert choices, deduplicated, in the experts' own element type."""
    tokens, parallel = 512.0, Parallel(1, 2)
    link = H100.interconnect
    assert link is not None
    copies = sent_copies(MOE.num_experts, MOE.experts_per_token, parallel)
    assert 0.99 < copies < 1  # of 8 experts on two devices, one is elsewhere nearly always
    for precision, narrow in ((quantised("bfloat16"), 2), (quantised("fp8"), 1)):
        at = setting(MOE, H100, precision, engine="ideal-graph", parallel=parallel)
        bound = float(named(at, "collective", 2 * tokens, 1, 100).bound_seconds)
        size = MOE.layers * tokens * MOE.hidden_size * copies * (narrow + 2)
        assert bound == pytest.approx(size / link.peak_bandwidth_bytes_per_second)
    shared = setting(MOE, H100, "bfloat16", engine="ideal-graph", parallel=Parallel(2, 4))
    exchanges = [c for _, c in named(shared, "collective", 2 * tokens, 1, 100).executed.calls if c.kind != "all_reduce"]  # type: ignore[union-attr]
    for call in exchanges:
        assert isinstance(call, Collective)
        sent = float(np.asarray(call.size_bytes)) * 3 / 4
        whole = tokens * MOE.hidden_size * 2 * sent_copies(MOE.num_experts, MOE.experts_per_token, Parallel(2, 4))
        assert sent == pytest.approx(whole / 2) and collective.bound(call, H100) > 0


def test_what_a_token_costs_is_paid_by_its_own_device() -> None:
    bare = load_engine("ideal-graph")
    sources = bare.sources | {"hosts": "made up"}
    engine = dataclasses.replace(bare, hosts={"default": HostCosts(token_seconds=1e-3)}, sources=sources)
    at = place("qwen3-30b-a3b", engine=engine, parallel=Parallel(1, 8))
    for batch, own in ((1, 1), (8, 1), (9, 2), (64, 8)):
        assert float(named(at, "engine", batch, 3, 100).seconds) == pytest.approx(3e-3 * own)
        free = setting(MOE, H100, "bfloat16", engine="ideal-graph", parallel=Parallel(1, 8))
        sampler = time_step(free, step_of(DecodingConfig()), batch, 100).sampler[0].executed.cost
        assert float(sampler.bytes) == pytest.approx(own * MOE.vocab_size * 4)


def test_experts_on_several_devices_are_grouped() -> None:
    """Our engine loops over experts where they are on one device; other modes would count the experts of all."""
    alone, apart = (place("qwen3-30b-a3b", engine="ridgepoint-eager", parallel=Parallel(1, n)) for n in (1, 8))
    assert set(alone.kernels.experts.values()) != {"grouped"} and set(apart.kernels.experts.values()) == {"grouped"}
    for mode in ("loop", "gather", "dense"):
        kernels = KernelConfig({1_000_000: mode})  # type: ignore[dict-item]
        with pytest.raises(UserError, match=f"8 devices must run in the mode grouped, but got {mode}"):
            place("qwen3-30b-a3b", engine="ridgepoint-eager", parallel=Parallel(1, 8), kernels=kernels)


@pytest.mark.parametrize("device", DEVICES)
def test_a_point_of_a_mixed_grid_is_what_it_is_alone(device: str) -> None:
    """zaya-nano fits the caches at short contexts, and does not at long ones."""
    at = place("zaya-nano", device)
    batches, contexts = np.array([1.0, 8, 64])[:, None], np.array([1.0, 500, 4000])
    grid = time_forward(at, batches, 5, contexts)
    for i, j in itertools.product(range(3), range(3)):
        one = time_forward(at, batches[i, 0], 5, contexts[j])
        for name in ("seconds", "bound_seconds"):
            whole = np.broadcast_to(getattr(grid, name), (3, 3))
            assert whole[i, j] == pytest.approx(float(getattr(one, name)), rel=1e-12), (name, i, j)


def test_a_probed_device_gives_the_same_in_a_grid() -> None:
    at = setting(load_spec("zaya-nano"), made_up_cpu(), "float32", engine="ridgepoint-cpu")
    contexts = np.array([1.0, 300, 1000, 4000])
    grid = np.broadcast_to(time_forward(at, 16, 3, contexts).seconds, 4)
    assert grid.tolist() == pytest.approx([float(time_forward(at, 16, 3, c).seconds) for c in contexts], rel=1e-12)


@pytest.mark.parametrize("device", [*DEVICES, "cpu"])
def test_a_bound_has_no_jump(device: str) -> None:
    """Where the weights, the cache and then the activations of zaya-nano outgrow the caches, step by step."""
    if device == "cpu":
        at = setting(load_spec("zaya-nano"), made_up_cpu(), "float32", engine="ridgepoint-cpu")
    else:
        at = place("zaya-nano", device)
    for batch, slots, context in (
        (np.arange(1.0, 3000), 1, 4000),
        (8, np.arange(1.0, 3000), 10),
        (64, 1, np.arange(1.0, 4000)),
    ):
        for op in time_forward(at, batch, slots, context).operators:
            bound = np.atleast_1d(op.bound_seconds)
            assert (np.diff(bound) >= -1e-12 * bound[:-1]).all(), op.name
            if bound.size > 100:  # from there on, one more is less than 1% more
                assert np.diff(bound[100:]).max() <= 0.01 * bound[-1], op.name


def test_an_fp8_cache_is_widened_where_fp8_is_not_multiplied() -> None:
    """It was refused although the kernels take it."""
    a100, stored = load_profile("a100-80gb-sxm"), quantised("bfloat16", cache="fp8")
    spec = load_spec("llama-3.1-8b")
    wide, narrow = (setting(spec, a100, p, engine="ideal-graph") for p in (quantised("bfloat16"), stored))
    long, short = (float(named(at, "attention", 16, 1, 20_000).seconds) for at in (wide, narrow))
    assert short < 0.8 * long
    assert attention_dtypes(a100, "fp8") == ("fp8", "bfloat16") and attention_dtypes(H100, "fp8") == ("fp8", "fp8")
    found = explain(wide, DecodingConfig(), Acceptance(), batch=16, context=20_000)
    assert "cache fp8" in {c.name for c in found.changes} and "weights fp8" in found.refused


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3000), st.integers(0, 5000), st.sampled_from(["llama-3.1-8b", "gpt-oss-20b"]))
def test_keys_of_a_forward_are_read_once_and_met_as_far_as_seen(slots: int, context: int, model: str) -> None:
    at = place(model)
    cost = next(op for op in time_forward(at, 3, slots, context).operators if op.name == "attention").executed.cost
    calls = [(count, call) for count, call in cost.calls if isinstance(call, Attention)]
    read = sum(count * float(kv_bytes(call)) for count, call in calls)
    assert read == pytest.approx(float(cost.kv_bytes))
    pairs = sum(count * 3 * slots * float(np.asarray(call.met)) for count, call in calls)
    width = 4 * at.spec.query_size
    assert float(cost.least_flops) <= pairs * width * (1 + 1e-12) <= float(cost.flops) * (1 + 1e-12)


def test_a_long_prompt_skips_half_of_its_scores() -> None:
    (call,) = [
        c for op in time_forward(place("llama-3.1-8b"), 1, 4096, 0).operators for _, c in op.executed.calls
        if isinstance(c, Attention)
    ]  # fmt: skip
    assert float(np.asarray(call.context)) == 4096 and 2048 < float(np.asarray(call.met)) < 2200


def test_a_gpu_does_not_wait_after_every_operator() -> None:
    with pytest.raises(UserError, match=r"eager or graph on a gpu.*synchronous"):
        dataclasses.replace(load_engine("ideal-graph"), host="synchronous")


def test_a_link_without_a_latency_is_refused_with_the_devices() -> None:
    assert H100.interconnect is not None
    link = dataclasses.replace(H100.interconnect, latency_seconds=None)
    sources = {k: v for k, v in H100.sources.items() if k != "interconnect.latency_seconds"}
    bare = dataclasses.replace(H100, name="bare", interconnect=link, sources=sources)
    with pytest.raises(UserError, match=r"profile bare: interconnect\.latency_seconds must be given"):
        setting(load_spec("llama-3.1-8b"), bare, "bfloat16", engine="ideal-graph", parallel=Parallel(2))
    setting(load_spec("llama-3.1-8b"), bare, "bfloat16", engine="ideal-graph")


def test_rates_that_would_beat_the_bound_are_cut_and_seen() -> None:
    bare = load_engine("ideal-graph")
    sources = bare.sources | {"hosts": "made up"}
    costs = {"default": HostCosts(families={"gemm": 0.01})}
    fast = place("llama-3.1-8b", engine=dataclasses.replace(bare, hosts=costs, sources=sources))
    usual = place("llama-3.1-8b")
    batch = np.array([1.0, 16])
    for at, cut in ((usual, False), (fast, True)):
        forward = time_forward(at, batch, 1, 1000)
        assert np.broadcast_to(forward.clamped, 2).tolist() == [cut] * 2
        assert np.broadcast_to(time_step(at, step_of(DecodingConfig()), batch, 1000).clamped, 2).tolist() == [cut] * 2
        for op in forward.operators:
            assert op.clamped.any() == (cut and op.family == "gemm")
            if cut and op.family == "gemm":
                assert op.seconds == pytest.approx(op.bound_seconds)


def test_predictions_sweeps_and_servers_leave_the_same_memory_free() -> None:
    at = place("llama-3.1-8b")
    assert usable_bytes(H100) == pytest.approx(0.9 * H100.usable_memory_bytes)
    cpu = made_up_cpu()
    assert usable_bytes(cpu) == cpu.usable_memory_bytes
    most = int(np.searchsorted(memory_bytes(at, np.arange(1, 500), 4001), usable_bytes(H100), side="right"))
    fits = sweep(
        at, DecodingConfig(), batch=[most, most + 1], context=[4000], draft_tokens=[1], acceptance_length=1
    ).fits
    assert fits.ravel().tolist() == [True, False]
    predict(at.spec, H100, Workload(batch=most, dtype="bfloat16"), DecodingConfig(), context=4000, engine="ideal-graph")
    with pytest.raises(UserError, match=rf"batch {most} fits there"):
        predict(at.spec, H100, Workload(batch=most + 1, dtype="bfloat16"), DecodingConfig(), context=4000)
    assert int(serve(at, Load(10_000, 4000, 1)).active) == most


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("sweep --draft-tokens 1000000000000000000000000000000 --sampler two_forward --acceptance-rate 0.5", "draft-"),
        ("sweep --batch 99999999999999999999999 --sampler autoregressive", "batch <= 1,000,000,000 must hold"),
        ("sweep --context 99999999999999999999999 --sampler autoregressive", "context <= 1,000,000,000"),
        ("predict --batch 99999999999999999999999", "batch <= 1,000,000,000"),
        ("predict --context 99999999999999999999999", "context <= 1,000,000,000"),
        ("predict --draft-tokens 100000000000000000 --sampler two_forward --acceptance-rate 0.5", "draft-tokens <="),
        ("explain --batch 99999999999999999999999", "batch <= 1,000,000,000"),
        ("breakeven --batch 99999999999999999999999 --acceptance-rate 0.5", "batch <= 1,000,000,000"),
        ("breakeven --draft-tokens 99999999999999999999999 --acceptance-rate 0.5", "draft-tokens <="),
        ("serving --sequences 99999999999999999999999", "<= 1e+09 must hold"),
        ("predict --expert-weights fp8", "--expert-weights fp8 is for models with experts, but llama-3.1-8b has none"),
    ],
)  # fmt: skip
def test_what_is_beyond_reason_is_one_line(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, *others = arguments.split()
    assert ridgepoint.main([command, "--model", "llama-3.1-8b", "--hardware", "h100-sxm", *others]) == 2
    printed = capsys.readouterr()
    assert not printed.out and message in printed.err and printed.err.count("\n") == 1


def test_a_model_published_in_few_bits_is_served_so(capsys: pytest.CaptureFixture[str]) -> None:
    base = ["predict", "--model", "gpt-oss-120b", "--hardware", "h100-sxm", "--engine", "ideal-graph"]
    assert ridgepoint.main(base) == 0
    assert "mxfp4 experts" in capsys.readouterr().out
    assert ridgepoint.main([*base, "--dtype", "bfloat16"]) == 2
    assert "must fit" in capsys.readouterr().err
