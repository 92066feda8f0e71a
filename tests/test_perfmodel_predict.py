"""The laws of a prediction: parts add up, nothing beats the roofline, more work never takes less time."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.files import UserError
from hardware.profile import HardwareProfile, list_profiles, load_profile
from perfmodel.acceptance import judged, tokens_from_histogram, tokens_from_rates, tokens_per_step
from perfmodel.costs import Matmul
from perfmodel.decoding import Setting, predict, setting, time_forward, time_step
from perfmodel.engine import PARAMETERS, Fit, list_engines, load_engine, save_engine
from perfmodel.model_spec import load_spec, spec_from_config
from perfmodel.roofline import Device
from perfmodel.steps import STEPS, most_fillings, step_of, title
from perfmodel.sweep import sweep
from runtime.config import SAMPLER_NAMES, DecodingConfig, KernelConfig, ModelConfig, Workload, replace
from tests.perfmodel_cpu import made_up_cpu, matmul_seconds

BIG = load_spec("zaya1-8b")
NANO = spec_from_config(
    ModelConfig(
        vocab_size=264,
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        moe_intermediate_size=192,
        router_hidden_size=64,
        max_position_embeddings=2048,
        eos_token_id=1,
    ),
    "nano",
)
H100 = load_profile("h100-sxm")
CPU = made_up_cpu()
PROBED = dataclasses.replace(H100, measured=CPU.measured, sources={**H100.sources, "measured": "made up"})
SETTINGS: dict[str, Setting] = {
    "h100-eager": setting(BIG, H100, "bfloat16"),
    "h100-graph": setting(BIG, H100, "bfloat16", engine="ideal-graph"),
    "mi300x-eager": setting(BIG, load_profile("mi300x"), "bfloat16"),
    "h100-nano": setting(NANO, H100, "float32"),
    "h100-probed": setting(NANO, PROBED, "float32"),  # by its curves, without the kernel library
    **{
        f"cpu-{mode}": setting(NANO, CPU, "float32", kernels=KernelConfig({1: mode}))
        for mode in ("loop", "grouped", "gather", "dense")
    },
    "cpu-8b-bfloat16": setting(BIG, CPU, "bfloat16"),  # a dtype without probed matmuls
}
TWO = DecodingConfig("two_forward", draft_tokens=16)
EVERY = (
    DecodingConfig(),
    TWO,
    DecodingConfig("two_forward", draft_tokens=5, temperature=0.8),
    DecodingConfig("single_forward", draft_tokens=8),
    DecodingConfig("single_forward", proposal_levels=(0, 4, 7, 11), temperature=0.8),
    DecodingConfig("denoising", denoising_steps=5),
    DecodingConfig("denoising", draft_tokens=8, denoising_steps=4, verify=True),
    DecodingConfig("denoising", denoising_steps=8, confidence_threshold=0.9, temperature=0.8),
)
AT = st.sampled_from(sorted(SETTINGS))
BATCH = st.integers(1, 300)
SLOTS = st.integers(1, 40)
CONTEXT = st.integers(1, 1900)
laws = settings(deadline=None, max_examples=60)


@laws
@given(AT, BATCH, SLOTS, CONTEXT)
def test_a_forward_is_the_sum_of_its_operators_and_never_beats_the_roofline(
    name: str, batch: int, slots: int, context: int
) -> None:
    timing = time_forward(SETTINGS[name], batch, slots, context)
    assert timing.seconds == pytest.approx(sum(float(op.seconds) for op in timing.operators))
    for op in timing.operators:
        assert float(op.seconds) >= float(op.bound_seconds) * (1 - 1e-12)
        assert float(op.seconds) == pytest.approx(sum(float(part) for part in op.parts))
        assert min(float(part) for part in op.parts) >= 0
    assert timing.bound_seconds > 0


@laws
@given(AT, BATCH, SLOTS, CONTEXT, st.integers(1, 50), st.integers(1, 5), st.integers(1, 100))
def test_more_work_never_takes_less_time(
    name: str, batch: int, slots: int, context: int, more_batch: int, more_slots: int, more_context: int
) -> None:
    at = SETTINGS[name]
    if name == "cpu-gather" or len(set(at.kernels.experts.values())) > 1:
        batch += 1  # a single token is run differently (no copies): the law holds within one way of running
    base = time_forward(at, batch, slots, context)
    for other in (
        time_forward(at, batch + more_batch, slots, context),
        time_forward(at, batch, slots + more_slots, context),
        time_forward(at, batch, slots, context + more_context),
    ):
        assert other.seconds >= base.seconds * (1 - 1e-9)
        assert other.bound_seconds >= base.bound_seconds * (1 - 1e-9)


def slower(hardware: HardwareProfile, factor: float) -> HardwareProfile:
    """The same device with every bandwidth divided by `factor`."""

    def cut(value: float | None) -> float | None:
        return None if value is None else value / factor

    levels = tuple(
        dataclasses.replace(
            level,
            peak_bandwidth_bytes_per_second=cut(level.peak_bandwidth_bytes_per_second),
            achieved_bandwidth_bytes_per_second=cut(level.achieved_bandwidth_bytes_per_second),
        )
        for level in hardware.memory
    )
    curves = tuple(
        dataclasses.replace(
            c,
            bandwidth=tuple(dataclasses.replace(p, bytes_per_second=p.bytes_per_second / factor) for p in c.bandwidth),
        )
        for c in hardware.measured
    )
    return dataclasses.replace(hardware, memory=levels, measured=curves)


@laws
@given(AT, BATCH, SLOTS, CONTEXT, st.floats(1.01, 10))
def test_less_bandwidth_never_takes_less_time(name: str, batch: int, slots: int, context: int, factor: float) -> None:
    at = SETTINGS[name]
    hampered = dataclasses.replace(at, device=Device(slower(at.device.hardware, factor), at.device.dtype))
    fast, slow = (time_forward(which, batch, slots, context) for which in (at, hampered))
    assert slow.seconds >= fast.seconds * (1 - 1e-9)
    assert slow.bound_seconds >= fast.bound_seconds * (1 - 1e-9)


@laws
@given(AT, BATCH, CONTEXT)
def test_autoregression_is_one_forward_of_one_slot_and_the_sampler(name: str, batch: int, context: int) -> None:
    at = SETTINGS[name]
    step = time_step(at, step_of(DecodingConfig()), batch, context)
    assert step.seconds == pytest.approx(float(time_forward(at, batch, 1, context, 1).seconds + step.sampler_seconds))


def test_two_forward_is_a_draft_and_a_verify_of_k_plus_one_slots() -> None:
    at = SETTINGS["h100-eager"]
    step = time_step(at, step_of(TWO), 16, 2048)
    draft, verify = step.forwards
    assert (draft.name, verify.name) == ("draft", "verify")
    assert draft.slots == verify.slots == 17
    head = {f.name: next(op for op in f.operators if op.name == "lm_head") for f in step.forwards}
    per_row = 2.0 * BIG.hidden_size * BIG.vocab_size
    assert head["draft"].executed.cost.flops == 16 * 16 * per_row
    assert head["verify"].executed.cost.flops == 16 * 17 * per_row


def test_every_sampler_is_described() -> None:
    assert set(STEPS) == set(SAMPLER_NAMES) == {d.sampler for d in EVERY}
    for name in list_engines():
        for decoding in EVERY:
            for part in step_of(decoding).work:
                assert load_engine(name).work(part.entry).launches >= 0


@laws
@given(AT, st.sampled_from(EVERY), st.integers(1, 64), CONTEXT, st.integers(1, 64), st.integers(1, 100))
def test_a_step_is_its_parts_and_never_shrinks_with_more_to_do(
    name: str, decoding: DecodingConfig, batch: int, context: int, more_batch: int, more_context: int
) -> None:
    at, step = SETTINGS[name], step_of(decoding)
    if name == "cpu-gather" or len(set(at.kernels.experts.values())) > 1:
        batch += 1  # one token alone is run in another way
    timing = time_step(at, step, batch, context)
    parts = [float(times * op.seconds) for op, times in timing.operators]
    assert float(timing.seconds) == pytest.approx(sum(parts))
    assert float(timing.seconds) >= float(timing.bound_seconds) > 0
    for more in (time_step(at, step, batch + more_batch, context), time_step(at, step, batch, context + more_context)):
        assert more.seconds >= timing.seconds * (1 - 1e-9)
        assert more.bound_seconds >= timing.bound_seconds * (1 - 1e-9)


@laws
@given(AT, st.integers(1, 24), st.integers(1, 8), CONTEXT)
def test_samplers_that_run_the_same_forwards_take_the_same_time(name: str, k: int, batch: int, context: int) -> None:
    """One filling and a verify are two_forward; one filling alone is a forward of the block before and the masks."""
    at = SETTINGS[name]

    def forwards(**settings: object) -> list[float]:
        timing = time_step(at, step_of(DecodingConfig(draft_tokens=k, **settings)), batch, context)  # type: ignore[arg-type]
        return [float(f.seconds * f.times) for f in timing.forwards]

    assert forwards(sampler="denoising", verify=True) == pytest.approx(forwards(sampler="two_forward"))
    alone, none = forwards(sampler="denoising")
    assert alone == pytest.approx(float(time_forward(at, batch, 2 * k, context, k).seconds)) and none == 0
    # One level ahead is a verify that carries a second block, and reads the LM head a second time.
    (single,) = forwards(sampler="single_forward", proposal_levels=(0,))
    assert single >= float(time_forward(at, batch, 2 * (k + 1), context, 2 * k + 1).seconds) * (1 - 1e-9)


@laws
@given(AT, st.integers(2, 24), st.integers(1, 8), CONTEXT, st.data())
def test_more_levels_and_more_fillings_never_take_less_time(
    name: str, k: int, batch: int, context: int, data: st.DataObject
) -> None:
    at, axes = SETTINGS[name], (batch, context)
    counts = sorted(data.draw(st.lists(st.integers(1, k + 1), min_size=2, max_size=4)))
    single = DecodingConfig("single_forward", draft_tokens=k)
    grid = time_step(at, step_of(single, levels=np.array(counts)), *axes)  # levels as an axis
    assert (np.diff(grid.seconds) >= -1e-12).all() and (np.diff(grid.bound_seconds) >= -1e-12).all()
    chosen = replace(single, proposal_levels=tuple(range(counts[0])))
    assert grid.seconds[0] == pytest.approx(float(time_step(at, step_of(chosen), *axes).seconds))
    block = DecodingConfig("denoising", draft_tokens=k, denoising_steps=k, confidence_threshold=0.5)
    means = np.sort(data.draw(st.lists(st.floats(1, k), min_size=2, max_size=3)))
    grid = time_step(at, step_of(block, fillings=means), *axes)
    assert (np.diff(grid.seconds) >= -1e-12).all()
    most = time_step(at, step_of(block), *axes)
    assert (grid.seconds <= most.seconds * (1 + 1e-9)).all()


@given(st.integers(1, 64), st.data())
def test_the_most_forwards_of_a_block_are_those_of_its_shares(k: int, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, k))
    left, took = k, 0
    while left > 0:
        left, took = left - -(-k // steps), took + 1
    assert most_fillings(k, steps) == took <= steps


def test_the_cached_prefix_is_read_once_for_all_levels() -> None:
    """At a long context a single forward of 306 slots reads little more than the cache, which is what makes it pay."""
    at = SETTINGS["h100-graph"]
    attention = {}
    for decoding in (DecodingConfig(), DecodingConfig("single_forward")):
        costs = [op.executed.cost for op, _ in time_step(at, step_of(decoding), 1, 100_000).operators]
        attention[decoding.sampler] = sum(float(cost.kv_bytes) for cost in costs if cost.name == "attention")
    assert attention["single_forward"] == pytest.approx(attention["autoregressive"] * 100_306 / 100_001)


def test_a_single_forward_reads_the_lm_head_twice() -> None:
    """The level is known when the verified rows have been projected; then its own rows are."""
    operators = time_step(SETTINGS["h100-graph"], step_of(DecodingConfig("single_forward")), 4, 1000).operators
    (head,) = [op.executed.cost for op, _ in operators if op.name == "lm_head"]
    assert float(head.weight_bytes) == 2 * 2 * BIG.hidden_size * BIG.vocab_size
    assert float(head.flops) == 2.0 * 4 * 33 * BIG.hidden_size * BIG.vocab_size


@pytest.mark.parametrize("decoding", EVERY, ids=title)
def test_every_sampler_predicts_and_sweeps(decoding: DecodingConfig) -> None:
    """A sweep's point is the prediction's; the speedup is over the same autoregressive step."""
    acceptance = {"acceptance_length": 3.5} if judged(decoding) else {}
    p = predict(BIG, H100, Workload(batch=4, dtype="bfloat16"), decoding, context=2048, **acceptance)  # type: ignore[arg-type]
    single = predict(
        BIG, H100, Workload(batch=4, dtype="bfloat16"), DecodingConfig(temperature=decoding.temperature), context=2048
    )
    assert sum(op.seconds for op in p.operators) == pytest.approx(p.step_seconds)
    assert sum(f.times * f.seconds for f in p.forwards) + p.sampler_seconds == pytest.approx(p.step_seconds)
    assert p.autoregressive_step_seconds == pytest.approx(single.step_seconds)
    assert p.speedup_over_autoregressive == pytest.approx(p.tokens_per_second / single.tokens_per_second)
    assert p.tokens_per_forward * sum(f.times for f in p.forwards) == pytest.approx(p.acceptance_length)
    k = decoding.draft_tokens
    assert p.acceptance_length == (3.5 if judged(decoding) else k if decoding.drafts else 1)
    drafts = [k, k + 8]
    rates = (0.8,) if judged(decoding) else None
    lengths = [tokens_per_step(replace(decoding, draft_tokens=n), rates=rates) for n in drafts]
    at = SETTINGS["h100-eager"]
    for row in sweep(
        at, decoding, batch=[1, 4], context=[2048, 9000], draft_tokens=drafts, acceptance_length=lengths
    ).rows():
        workload = Workload(batch=row["batch"], dtype="bfloat16")
        chosen = replace(decoding, draft_tokens=row["draft_tokens"])
        one = predict(BIG, H100, workload, chosen, context=row["context"], acceptance_rates=rates)
        for name in ("acceptance_length", "step_seconds", "bound_step_seconds", "tokens_per_second"):
            assert row[name] == pytest.approx(getattr(one, name)), name
        assert row["experts_per_layer"] == pytest.approx(one.experts_per_layer)


def test_a_sweep_refuses_what_its_smallest_draft_cannot_hold() -> None:
    at, axes = SETTINGS["h100-eager"], {"batch": [1], "context": [100], "draft_tokens": [4, 16]}
    for decoding, word in (
        (DecodingConfig("single_forward", proposal_levels=(0, 4, 7)), "proposal_levels"),
        (DecodingConfig("denoising", denoising_steps=8), "denoising_steps"),
    ):
        with pytest.raises(UserError, match=word):
            sweep(at, decoding, **axes, acceptance_length=3.0)  # type: ignore[arg-type]


def test_the_prediction_adds_up() -> None:
    p = predict(BIG, H100, Workload(batch=16, dtype="bfloat16"), TWO, context=2048, acceptance_length=6.8)
    assert sum(op.seconds for op in p.operators) == pytest.approx(p.step_seconds)
    assert sum(f.seconds for f in p.forwards) + p.sampler_seconds == pytest.approx(p.step_seconds)
    assert sum(op.bound_seconds for op in p.operators) == pytest.approx(p.bound_step_seconds)
    assert p.step_seconds >= p.bound_step_seconds
    assert p.tokens_per_second == pytest.approx(16 * 6.8 / p.step_seconds)
    single = predict(BIG, H100, Workload(batch=16, dtype="bfloat16"), DecodingConfig(), context=2048)
    assert single.speedup_over_autoregressive == pytest.approx(1)
    assert p.autoregressive_step_seconds == pytest.approx(single.step_seconds)
    assert p.speedup_over_autoregressive == pytest.approx(p.tokens_per_second / single.tokens_per_second)
    assert p.ridge_point_flops_per_byte == pytest.approx(989e12 / 3.35e12)


def test_what_decides_whether_drafting_pays() -> None:
    """Without overhead: at batch 1 a verify reads ten experts for one, at long context the cache is shared."""

    def speedup(batch: int, context: int) -> float:
        workload = Workload(batch=batch, dtype="bfloat16")
        return predict(
            BIG, H100, workload, TWO, context=context, acceptance_length=6.8, engine="ideal-graph"
        ).speedup_over_autoregressive

    assert speedup(1, 1024) < 0.3 * 6.8
    assert speedup(8, 100_000) > speedup(8, 1024)
    assert speedup(8, 100_000) < 6.8 / 2  # two forwards, each at least as long as one autoregressive step


def test_overhead_binds_small_steps_and_fewer_experts_help() -> None:
    workload = Workload(batch=1, dtype="bfloat16")
    eager = predict(BIG, H100, workload, DecodingConfig(), context=1024)
    assert eager.bound == "overhead"
    ideal = {
        name: predict(
            BIG, H100, workload, TWO, context=1024, acceptance_length=5, expert_coverage=name, engine="ideal-graph"
        )
        for name in ("all", "min", "uniform", "correlated(0.5)")
    }
    assert ideal["correlated(0.5)"].experts_per_layer < ideal["uniform"].experts_per_layer
    assert ideal["correlated(0.5)"].step_seconds < ideal["uniform"].step_seconds < ideal["all"].step_seconds
    assert ideal["min"].bound == ideal["all"].bound == "memory"


@pytest.mark.parametrize("name", sorted(list_profiles()))
def test_every_bundled_profile_predicts(name: str) -> None:
    hardware = load_profile(name)
    for dtype in hardware.peak_flops_per_second:
        if dtype in ("float32", "bfloat16", "float16"):
            p = predict(NANO, hardware, Workload(batch=4, dtype=dtype), TWO, context=512, acceptance_length=4)
            assert p.step_seconds > p.bound_step_seconds > 0


@pytest.mark.parametrize("name", sorted(list_engines()))
def test_every_bundled_engine_is_written_back_equal(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    engine = load_engine(name)
    assert engine.name == name
    path = tmp_path_factory.mktemp("engines") / "copy.yaml"
    assert load_engine(str(save_engine(engine, path))) == engine


def test_a_profile_with_its_own_curves_uses_them() -> None:
    at = setting(NANO, CPU, "float32", kernels=KernelConfig({1: "grouped"}))
    for rows, k, n in ((1, 128, 384), (40, 128, 128), (1000, 1024, 1024)):
        product = Matmul(np.array(3.0), np.array(float(rows)), k, n)
        found = float(at.device.matmul_seconds(product, 4 * k * n, np.array(1e6)))
        assert found == pytest.approx(3 * matmul_seconds(rows, k, n), rel=0.1)
    with pytest.raises(UserError, match=r"thread count.*1"):
        setting(NANO, CPU, "float32", kernels=KernelConfig(threads=7))


def test_rates_beyond_the_datasheet_are_cut_at_the_roofline() -> None:
    """A fit to noise may scale a rate beyond the peak; the estimate stays at the bound."""
    for name in ("h100-graph", "cpu-loop"):
        at = SETTINGS[name]
        wild = dataclasses.replace(at.engine, scale=dict.fromkeys(PARAMETERS[1:], 1e6) | {"dispatch": 1e-6})
        timing = time_forward(dataclasses.replace(at, engine=wild), 64, 17, 1500)
        assert timing.seconds == pytest.approx(float(timing.bound_seconds), rel=0.05)
        assert timing.seconds >= timing.bound_seconds


def test_views_cost_the_host_and_small_streams_are_not_slower_than_large_ones() -> None:
    at = SETTINGS["cpu-loop"]
    costly = dataclasses.replace(at, engine=dataclasses.replace(at.engine, view_share=1.0))
    free = dataclasses.replace(at, engine=dataclasses.replace(at.engine, view_share=0.0))
    assert time_forward(costly, 1, 1, 64).seconds > 1.1 * time_forward(free, 1, 1, 64).seconds
    rates = at.device.bandwidth(np.array([1.0, 65536.0, 1e6, 16e6, 1e9]))
    assert rates.tolist() == pytest.approx([80e9, 80e9, 80e9, 40e9, 20e9])


def test_a_sweep_is_many_predictions() -> None:
    at = SETTINGS["h100-graph"]
    lengths = [tokens_per_step(replace(TWO, draft_tokens=k), rates=(0.8,)) for k in (4, 16)]
    grid = sweep(at, TWO, batch=[1, 16], context=[1024, 8192, 65536], draft_tokens=[4, 16], acceptance_length=lengths)
    assert grid.step_seconds.shape == (2, 3, 2)
    rows = list(grid.rows())
    assert len(rows) == 12
    for row in rows:
        one = predict(
            BIG,
            H100,
            Workload(batch=row["batch"], dtype="bfloat16"),
            DecodingConfig("two_forward", draft_tokens=row["draft_tokens"]),
            context=row["context"],
            acceptance_rates=[0.8],
            engine="ideal-graph",
        )
        for name in ("step_seconds", "bound_step_seconds", "tokens_per_second", "speedup_over_autoregressive"):
            assert row[name] == pytest.approx(getattr(one, name))
        assert row["experts_per_layer"] == pytest.approx(one.experts_per_layer)
        assert row["fits"]


def test_a_sweep_marks_what_does_not_fit() -> None:
    grid = sweep(
        SETTINGS["h100-graph"], TWO, batch=[1, 512], context=[131_000], draft_tokens=[16], acceptance_length=5.0
    )
    assert grid.fits.ravel().tolist() == [True, False]


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9), st.data())
@settings(deadline=None)
def test_levels_can_only_lose_tokens(rates: list[float], data: st.DataObject) -> None:
    """With all levels a single forward commits what fresh drafts do; a rate for all drafts, and any levels, no more."""
    k, (rate, *_) = len(rates), rates
    fresh = tokens_per_step(DecodingConfig("two_forward", draft_tokens=k), rates=rates)
    dense = DecodingConfig("single_forward", draft_tokens=k)
    assert tokens_per_step(dense, rates=rates) == pytest.approx(fresh)
    others = data.draw(st.sets(st.integers(1, k)))
    found = tokens_per_step(replace(dense, proposal_levels=(0, *sorted(others))), rates=[rate])
    assert 1 <= found <= tokens_per_step(dense, rates=[rate]) + 1e-9


def test_without_a_verify_a_block_is_kept_and_no_acceptance_is_taken() -> None:
    assert tokens_per_step(DecodingConfig("denoising", draft_tokens=7)) == 7
    with pytest.raises(UserError, match=r"without verify keeps what it drafts.*length"):
        tokens_per_step(DecodingConfig("denoising"), length=3.0)
    with pytest.raises(UserError, match="exactly one of"):
        tokens_per_step(DecodingConfig("denoising", verify=True))


def test_acceptance_in_three_forms() -> None:
    assert tokens_from_histogram([1, 0, 1], 2) == 2
    assert tokens_from_rates([0.5], 3) == pytest.approx(1 + 0.5 + 0.25 + 0.125)
    assert tokens_from_rates([1.0, 0.5, 0.0], 3) == pytest.approx(2.5)
    assert tokens_per_step(DecodingConfig()) == 1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
@settings(deadline=None)
def test_rates_and_the_histogram_they_cause_agree(rates: list[float]) -> None:
    reach = np.concatenate([[1.0], np.cumprod(rates)])
    histogram = reach - np.append(reach[1:], 0.0)  # accepted exactly n: got so far, and no further
    if histogram.sum() > 0:
        assert tokens_from_rates(rates, len(rates)) == pytest.approx(tokens_from_histogram(histogram, len(rates)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": None}, "length, histogram or rates"),
        ({"length": 5.0, "histogram": [1, 1]}, "length and histogram"),
        ({"length": 0.5}, "0.5"),
        ({"length": 17.5}, r"17.*17\.5"),
        ({"histogram": [1] * 18}, "17"),
        ({"histogram": [0, 0]}, "not all 0"),
        ({"rates": [0.5, 0.5]}, "16"),
        ({"rates": [1.5]}, r"1\.5"),
    ],
)
def test_impossible_acceptance_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tokens_per_step(TWO, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 131_060}, "131072"),
        ({"context": 0}, "context >= 1"),
        ({"hardware": CPU, "workload": Workload(dtype="float16")}, "float16.*bfloat16, float32"),
        ({"workload": Workload(batch=2000, dtype="bfloat16"), "context": 100_000}, "fit"),
        ({"engine": "ridgepoint-cpu"}, "ridgepoint-cpu runs on a cpu.*ideal-graph"),
        ({"engine": "warp"}, "warp.*ridgepoint-eager"),
        ({"kernels": KernelConfig({1: "dense"}), "engine": "ideal-graph"}, "dense.*grouped"),
        ({"acceptance_length": None}, "acceptance"),
    ],
)
def test_impossible_points_are_refused(changes: dict[str, object], message: str) -> None:
    arguments = {
        "spec": BIG,
        "hardware": H100,
        "workload": Workload(dtype="bfloat16"),
        "decoding": TWO,
        "context": 1024,
        "acceptance_length": 5.0,
    } | changes
    with pytest.raises(UserError, match=message):
        predict(**arguments)  # type: ignore[arg-type]


def test_an_engine_of_an_earlier_fit_serves_the_samplers_it_describes() -> None:
    engine = load_engine("ridgepoint-cpu")
    known = {name: host for name, host in engine.sampler.items() if name.startswith(("auto", "two"))}
    at = setting(NANO, CPU, "float32", engine=dataclasses.replace(engine, sampler=known))
    assert time_step(at, step_of(TWO), 1, 100).seconds > 0
    with pytest.raises(UserError, match="does not describe single_forward: its sampler has autoregressive"):
        time_step(at, step_of(DecodingConfig("single_forward")), 1, 100)
    for wrong, message in ((known | {"magic": known["two_forward"]}, "magic"), ({}, "autoregressive")):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(engine, sampler=wrong)


def test_an_engine_fitted_elsewhere_is_refused() -> None:
    fit = Fit("other-cpu", "rows.jsonl", "2026-01-01", 0.1, ("point",))
    engine = dataclasses.replace(load_engine("ridgepoint-cpu"), fit=fit)
    with pytest.raises(UserError, match=r"other-cpu.*made-up-cpu"):
        setting(NANO, CPU, "float32", engine=engine)
