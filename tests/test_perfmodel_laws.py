"""The laws of a forward hold for every family of models, engine, device, element type and division over devices."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.files import UserError
from hardware.profile import list_profiles, load_profile
from perfmodel.acceptance import judged
from perfmodel.decoding import Setting, interval, predict, setting, time_forward, time_prefill, time_step
from perfmodel.engine import EngineProfile, HostCosts, list_engines, load_engine, save_engine
from perfmodel.kernels.library import load_library
from perfmodel.memory import memory_bytes, usable_bytes
from perfmodel.model_spec import known_models, load_spec
from perfmodel.operators import ENGINE, FORWARD_OPERATORS
from perfmodel.parallel import Parallel, divided, most_loaded
from perfmodel.precision import Precision, quantised, uniform
from perfmodel.roofline import Device
from perfmodel.steps import step_of
from perfmodel.sweep import sweep
from runtime.config import DecodingConfig, Workload
from tests.test_perfmodel_predict import EVERY, slower

DEVICES = sorted(name for name in list_profiles() if load_profile(name).kind == "gpu")
ENGINES = sorted(name for name in list_engines() if load_engine(name).hardware_kind == "gpu")
MODELS = ("zaya1-8b", "llama-3.1-8b", "qwen3-30b-a3b", "gpt-oss-20b", "llada2.0-mini", "gemma-3-12b", "dream-7b")
PRECISIONS = {
    "bf16": uniform("bfloat16"),
    "fp8": quantised("fp8", cache="fp8"),
    "w8a16": quantised("fp8", activations="bfloat16"),
    "mxfp4 experts": quantised("bfloat16", experts="mxfp4"),
}
H100 = load_profile("h100-sxm")
profile_of, engine_of, spec_of = cache(load_profile), cache(load_engine), cache(load_spec)  # each file is read once
laws = settings(deadline=None, max_examples=40)


@cache
def place(model: str, device: str, engine: str, precision: str) -> Setting:
    return setting(spec_of(model), profile_of(device), PRECISIONS[precision], engine=engine_of(engine))


def supported(device: str, precision: str) -> bool:
    return precision != "fp8" or "fp8" in profile_of(device).peak_flops_per_second


@st.composite
def places(draw: st.DrawFn) -> Setting:
    device = draw(st.sampled_from(DEVICES))
    precision = draw(st.sampled_from([p for p in PRECISIONS if supported(device, p)]))
    return place(draw(st.sampled_from(MODELS)), device, draw(st.sampled_from(ENGINES)), precision)


BATCH, SLOTS, CONTEXT = st.integers(1, 300), st.integers(1, 40), st.integers(1, 30_000)


@laws
@given(places(), BATCH, SLOTS, CONTEXT)
def test_operators_add_up_and_none_beats_the_roofline(at: Setting, batch: int, slots: int, context: int) -> None:
    timing = time_forward(at, batch, slots, context)
    assert timing.seconds == pytest.approx(sum(float(op.seconds) for op in timing.operators))
    assert {op.name for op in timing.operators} <= {*FORWARD_OPERATORS, ENGINE}
    for op in timing.operators:
        parts = [float(part) for part in op.parts]
        assert min(parts) >= 0 and float(op.seconds) == pytest.approx(sum(parts))
        assert float(op.seconds) >= float(op.bound_seconds) * (1 - 1e-12)


@laws
@given(places(), BATCH, SLOTS, CONTEXT, st.integers(1, 50), st.integers(1, 5), st.integers(1, 5000), st.floats(1.01, 5))
def test_more_work_or_less_bandwidth_never_takes_less_time(
    at: Setting,
    batch: int,
    slots: int,
    context: int,
    more_batch: int,
    more_slots: int,
    more_context: int,
    factor: float,
) -> None:
    if len(set(at.kernels.experts.values())) > 1:
        batch += 1  # one token alone is run in another way
    base = time_forward(at, batch, slots, context)
    hampered = dataclasses.replace(at, device=Device(slower(at.device.hardware, factor), at.device.dtype))
    for other in (
        time_forward(at, batch + more_batch, slots, context),
        time_forward(at, batch, slots + more_slots, context),
        time_forward(at, batch, slots, context + more_context),
        time_forward(hampered, batch, slots, context),
    ):
        assert other.seconds >= base.seconds * (1 - 1e-9)
        assert other.bound_seconds >= base.bound_seconds * (1 - 1e-9)


@laws
@given(places(), BATCH, SLOTS, CONTEXT)
def test_an_interval_holds_its_estimate_and_nothing_below_the_bound(
    at: Setting, batch: int, slots: int, context: int
) -> None:
    timing = time_forward(at, batch, slots, context)
    between = interval(at, timing)
    assert between is not None
    low, high = map(float, between)
    assert float(timing.bound_seconds) <= low <= float(timing.seconds) * (1 + 1e-12) and low < high
    spreads = [e.spread for e in load_library().evidence.values()]
    if at.engine.spread is None:
        assert high <= float(timing.seconds) * np.exp(max(*spreads, 0.4)) * (1 + 1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("device", DEVICES)
def test_every_engine_runs_every_model_with_every_sampler_everywhere(engine: str, device: str) -> None:
    """On as many devices as hold it."""
    for model in known_models() if engine == "ideal-graph" else MODELS:
        spec = spec_of(model)
        tensor = next(n for n in (1, 2, 4, 8, 16, 32) if spec.parameters * 2 / n < 40e9)
        at = setting(spec, profile_of(device), "bfloat16", engine=engine_of(engine))
        if tensor > 1:
            link = at.device.hardware.interconnect
            if link is None or tensor > link.devices:
                continue
            at = dataclasses.replace(at, parallel=Parallel(tensor))
            if spec.heads[0] % tensor:
                continue
        for decoding in EVERY if model in ("zaya1-8b", "llada2.0-mini") else EVERY[:1]:
            step = time_step(at, step_of(decoding), np.array([1.0, 8.0]), 500)
            assert np.isfinite(step.seconds).all() and (step.seconds >= step.bound_seconds).all(), (model, decoding)


@laws
@given(st.sampled_from(MODELS), st.sampled_from(DEVICES), BATCH, st.integers(2, 40), CONTEXT)
def test_slots_of_a_sequence_share_one_read_of_its_cache(
    model: str, device: str, batch: int, slots: int, context: int
) -> None:
    at = place(model, device, "ideal-graph", "bf16")
    one, many = (
        next(op for op in time_forward(at, batch, n, context).operators if op.name == "attention") for n in (1, slots)
    )
    own = batch * (slots - 1) * at.spec.stored_kv_bytes_per_token("bfloat16")
    assert float(many.executed.cost.kv_bytes - one.executed.cost.kv_bytes) == pytest.approx(own)


def test_wide_blocks_over_a_long_cache_cost_little_more_attention_than_one_token() -> None:
    """A tool that charges the cache once per slot would say 17 times as much."""
    at = place("zaya1-8b", "h100-sxm", "ideal-graph", "bf16")
    one, many = (
        float(next(op.seconds for op in time_forward(at, 8, n, 60_000).operators if op.name == "attention"))
        for n in (1, 17)
    )
    assert one <= many < 1.5 * one


@laws
@given(st.sampled_from(MODELS), BATCH, SLOTS, CONTEXT)
def test_one_device_is_no_division(model: str, batch: int, slots: int, context: int) -> None:
    at = place(model, "h100-sxm", "ideal-graph", "bf16")
    same = dataclasses.replace(at, parallel=Parallel(1, 1))
    assert time_forward(at, batch, slots, context).seconds == time_forward(same, batch, slots, context).seconds
    assert divided(at.spec, Parallel()) is at.spec


@pytest.mark.parametrize("model", ["llama-3.1-70b", "qwen3-30b-a3b", "zaya1-8b"])
def test_more_devices_hold_less_and_exchange_more(model: str) -> None:
    spec = load_spec(model)
    whole = setting(spec, H100, "bfloat16", engine="ideal-graph")
    before, exchanged = whole, 0.0
    for tensor in (2, 4, 8):
        if spec.heads[0] % tensor:
            continue
        at = setting(spec, H100, "bfloat16", engine="ideal-graph", parallel=Parallel(tensor))
        assert memory_bytes(at, 8, 4000) < memory_bytes(before, 8, 4000)
        assert tensor * memory_bytes(at, 8, 4000) >= memory_bytes(whole, 8, 4000)
        forward = time_forward(at, 64, 1, 4000)
        (collective,) = [op for op in forward.operators if op.name == "collective"]
        assert float(collective.bound_seconds) > 0 and float(collective.seconds) >= exchanged
        assert float(forward.bound_seconds) < float(time_forward(before, 64, 1, 4000).bound_seconds)
        before, exchanged = at, float(collective.seconds)


def test_experts_are_dealt_out_and_tokens_sent_to_them() -> None:
    """Eight replicas of qwen3-30b-a3b, or eight devices that share all matrices, with an eighth of the experts each."""
    spec = load_spec("qwen3-30b-a3b")
    one = time_forward(setting(spec, H100, "bfloat16", engine="ideal-graph"), 64, 1, 2000)
    for parallel in (Parallel(1, 8), Parallel(4, 4), Parallel(4, 8)):
        at = setting(spec, H100, "bfloat16", engine="ideal-graph", parallel=parallel)
        found = {op.name: op for op in time_forward(at, 64, 1, 2000).operators}
        before = {op.name: op for op in one.operators}
        share = float(found["experts"].executed.cost.weight_bytes / before["experts"].executed.cost.weight_bytes)
        assert 1 / parallel.expert < share < 1.5 / parallel.expert  # the most loaded device has more than the mean
        kinds = {call.kind for _, call in found["collective"].executed.cost.calls}  # type: ignore[union-attr]
        assert ("all_to_all" in kinds) == (parallel.expert > parallel.tensor)
        assert ("all_reduce" in kinds) == (parallel.tensor > 1)


@given(st.integers(1, 8), st.integers(1, 32), st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_the_most_loaded_device_has_at_least_its_share(devices: int, each: int, hits: list[float]) -> None:
    experts = devices * each
    distinct = np.sort(np.array(hits)) * experts
    found = most_loaded(distinct, experts, devices)
    assert (found >= distinct / devices - 1e-9).all() and (found <= np.minimum(each, distinct) + 1e-9).all()
    assert (np.diff(found) >= -1e-9).all()


def test_the_most_loaded_device_is_that_of_random_hits() -> None:
    rng = np.random.default_rng(0)
    hit = rng.random((4000, 128)).argsort(1) < 40
    seen = hit.reshape(4000, 8, 16).sum(2).max(1).mean()
    assert most_loaded(np.array(40.0), 128, 8) == pytest.approx(seen, rel=0.15)


@pytest.mark.parametrize(
    ("parallel", "model", "message"),
    [
        (Parallel(3), "llama-3.1-8b", "query heads must divide over 3"),
        (Parallel(16), "llama-3.1-8b", "devices <= 8"),
        (Parallel(1, 2), "llama-3.1-8b", "needs experts"),
        (Parallel(1, 3), "qwen3-30b-a3b", "experts must divide over 3"),
    ],
)
def test_what_does_not_divide_is_refused(parallel: Parallel, model: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        setting(load_spec(model), H100, "bfloat16", engine="ideal-graph", parallel=parallel)


def test_a_division_that_makes_no_sense_is_refused() -> None:
    for tensor, expert in ((0, 1), (2, 3)):
        with pytest.raises(UserError):
            Parallel(tensor, expert)


def test_narrow_elements_save_what_they_store() -> None:
    """fp8 weights and cache read half of the bytes; experts alone in 4 bits leave the rest."""
    wide, fp8 = (place("qwen3-30b-a3b", "h100-sxm", "ideal-graph", p) for p in ("bf16", "fp8"))
    costs = [{op.name: op.executed.cost for op in time_forward(at, 8, 1, 4000).operators} for at in (wide, fp8)]
    for name in ("qkv", "output", "experts"):
        assert float(costs[1][name].weight_bytes) == pytest.approx(float(costs[0][name].weight_bytes) / 2)
    assert float(costs[1]["attention"].kv_bytes) == pytest.approx(float(costs[0]["attention"].kv_bytes) / 2)
    assert float(costs[1]["lm_head"].weight_bytes) == float(costs[0]["lm_head"].weight_bytes)
    assert time_forward(fp8, 8, 1, 4000).seconds < time_forward(wide, 8, 1, 4000).seconds
    experts = place("qwen3-30b-a3b", "h100-sxm", "ideal-graph", "mxfp4 experts")
    saved = memory_bytes(wide, 1, 100) - memory_bytes(experts, 1, 100)
    assert saved == pytest.approx(load_spec("qwen3-30b-a3b").parameters_by_component()["experts"] * (2 - 4.25 / 8))


def test_what_a_device_cannot_multiply_or_a_probe_did_not_measure_is_refused() -> None:
    with pytest.raises(UserError, match=r"a100.*'fp8'"):
        setting(load_spec("llama-3.1-8b"), load_profile("a100-80gb-sxm"), quantised("fp8"))
    from tests.perfmodel_cpu import made_up_cpu

    with pytest.raises(UserError, match="one dtype at a time"):
        setting(load_spec("zaya-nano"), made_up_cpu(), Precision(head="float32"))


def test_memory_that_is_too_small_says_what_fits() -> None:
    spec, workload = load_spec("llama-3.1-8b"), Workload(batch=500, dtype="bfloat16")
    with pytest.raises(UserError, match=r"batch (\d+) fits there, and context (\d+) at that batch") as refused:
        predict(spec, H100, workload, DecodingConfig(), context=4000)
    words = str(refused.value).split()
    batch, context = int(words[words.index("fits") - 1]), int(words[-4])
    at = setting(spec, H100, "bfloat16")
    capacity = usable_bytes(H100)
    assert memory_bytes(at, batch, 4001) <= capacity < memory_bytes(at, batch + 1, 4001)
    assert memory_bytes(at, 500, context + 1) <= capacity < memory_bytes(at, 500, context + 2)
    with pytest.raises(UserError, match="weights alone take 141"):
        predict(load_spec("llama-3.1-70b"), H100, Workload(dtype="bfloat16"), DecodingConfig(), context=100)
    p = predict(
        load_spec("llama-3.1-70b"),
        H100,
        Workload(dtype="bfloat16"),
        DecodingConfig(),
        context=100,
        parallel=Parallel(4),
    )
    assert p.parallel == Parallel(4) and p.joules_per_million_tokens == pytest.approx(
        4 * 700 * 1e6 / p.tokens_per_second
    )


@pytest.mark.parametrize("model", MODELS)
def test_a_prompt_costs_at_least_its_arithmetic_and_projects_one_row(model: str) -> None:
    at = place(model, "h100-sxm", "ideal-graph", "bf16")
    short, long = time_prefill(at, 2, 500), time_prefill(at, 2, 4000)
    (head,) = [op.executed.cost for op in long.operators if op.name == "lm_head"]
    assert float(head.flops) == 2.0 * 2 * at.spec.hidden_size * at.spec.vocab_size
    flops = sum(float(op.executed.cost.least_flops) for op in long.operators)
    assert float(long.bound_seconds) >= flops / 989.5e12
    assert 2 * float(short.seconds) < float(long.seconds) < 10 * float(short.seconds)


@pytest.mark.parametrize("decoding", EVERY[:4], ids=str)
def test_a_grid_gives_what_points_give(decoding: DecodingConfig) -> None:
    """Of a windowed model with experts on several devices, whose arrays differ most in shape."""
    at = setting(
        load_spec("gpt-oss-20b"), H100, PRECISIONS["mxfp4 experts"], engine="ideal-graph", parallel=Parallel(2)
    )
    length = 3.0 if judged(decoding) else float(decoding.draft_tokens if decoding.drafts else 1)
    grid = sweep(
        at, decoding, batch=[1, 7], context=[90, 5000], draft_tokens=[decoding.draft_tokens], acceptance_length=length
    )
    for row in grid.rows():
        alone = time_step(at, step_of(decoding), row["batch"], row["context"])
        assert row["step_seconds"] == pytest.approx(float(alone.seconds))
        assert row["bound_step_seconds"] == pytest.approx(float(alone.bound_seconds))


def with_hosts(**hosts: HostCosts) -> EngineProfile:
    engine = load_engine("ideal-graph")
    named = {name.replace("_", "-"): costs for name, costs in hosts.items()}
    return dataclasses.replace(engine, hosts=named, sources={**engine.sources, "hosts": "made up"})


def test_host_costs_are_added_to_the_forward_and_the_step() -> None:
    spec, bare = load_spec("llama-3.1-8b"), place("llama-3.1-8b", "h100-sxm", "ideal-graph", "bf16")
    costs = HostCosts(
        forward_seconds=1e-3,
        layer_seconds=2e-5,
        step_seconds=3e-3,
        sequence_seconds=1e-5,
        token_seconds=1e-7,
        families={"gemm": 1.25},
    )
    at = setting(spec, H100, "bfloat16", engine=with_hosts(default=costs))
    step, plain = (time_step(where, step_of(DecodingConfig("two_forward")), 8, 1000) for where in (at, bare))
    for forward, before in zip(step.forwards, plain.forwards, strict=True):
        gemms = sum(float(op.seconds) for op in before.operators if op.family == "gemm")
        added = 1e-3 + 32 * 2e-5 + 8 * 17 * 1e-7 + 0.25 * gemms
        assert float(forward.seconds) == pytest.approx(float(before.seconds) + added)
    assert float(step.sampler_seconds - plain.sampler_seconds) == pytest.approx(3e-3 + 8e-5)
    assert float(step.bound_seconds) == float(plain.bound_seconds)
    by_name = {op.name for op, _ in step.operators}
    assert ENGINE in by_name and step.seconds == pytest.approx(sum(float(n * op.seconds) for op, n in step.operators))


def test_the_most_specific_host_costs_count_alone() -> None:
    own, vendor, other = (HostCosts(forward_seconds=s) for s in (1.0, 2.0, 3.0))
    engine = with_hosts(h100_sxm=own, NVIDIA=vendor, default=other)
    assert engine.host_costs(H100) == own
    assert engine.host_costs(load_profile("h200")) == vendor
    assert engine.host_costs(load_profile("mi300x")) == other
    assert load_engine("ideal-graph").host_costs(H100) == HostCosts()


def test_an_engine_may_be_like_another(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nlike: ideal-graph\noperators:\n  qkv: {launches: 3}\n"
        'hosts:\n  AMD: {step_seconds: 1e-3}\nsources:\n  hosts: "made up"\nspread: 0.2\n'
    )
    base, mine = load_engine("ideal-graph"), load_engine(path)
    assert mine.operators["qkv"].launches == 3 and mine.operators["output"] == base.operators["output"]
    assert (mine.sampler, mine.kernels, mine.spread) == (base.sampler, base.kernels, 0.2)
    assert mine.sources == {**base.sources, "hosts": "made up"}
    assert load_engine(save_engine(mine, tmp_path / "written.yaml")) == mine
    for text, message in (
        ("name: x\nlike: nothing\n", "nothing.*ideal-graph"),
        ("name: x\nlike: ideal-graph\nhosts: {default: {forward: 1.0}}\n", "unknown key 'forward'"),
        ("name: x\nlike: ideal-graph\nhosts: {default: {}}\n", "sources must be for exactly.*hosts"),
        ("name: x\nlike: ideal-graph\noperators: {magic: {launches: 1}}\n", "magic.*lm_head"),
        ("name: x\nlike: ideal-graph\nhosts: {default: {families: {gemm: 0.0}}}\n", "families.gemm > 0"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_engine(path)


def test_an_engine_serves_the_operators_that_it_describes() -> None:
    engine = load_engine("ideal-graph")
    few = {name: host for name, host in engine.operators.items() if name != "mlp"}
    at = dataclasses.replace(
        place("zaya1-8b", "h100-sxm", "ideal-graph", "bf16"), engine=dataclasses.replace(engine, operators=few)
    )
    assert time_forward(at, 1, 1, 100).seconds > 0
    with pytest.raises(UserError, match="does not describe mlp"):
        time_forward(dataclasses.replace(at, spec=load_spec("llama-3.1-8b")), 1, 1, 100)


@pytest.mark.parametrize(("vendor", "other"), [("h100-sxm", "h200"), ("mi300x", "mi325x")])
def test_a_device_with_more_bandwidth_alone_is_faster_where_memory_binds(vendor: str, other: str) -> None:
    for model in ("llama-3.1-8b", "zaya1-8b"):
        slow, fast = (place(model, name, "ideal-graph", "bf16") for name in (vendor, other))
        assert time_forward(fast, 32, 1, 8000).seconds < time_forward(slow, 32, 1, 8000).seconds
