"""Fused MoE layers: laws of the kernel family on every device, and what its committed numbers are worth."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hardware.files import UserError
from hardware.profile import HardwareProfile, load_profile
from perfmodel.kernels import moe
from perfmodel.kernels.call import Array, FusedMoe
from perfmodel.kernels.library import load_library
from perfmodel.kernels.moe import loads_of, weight_bytes
from tests.kernel_rows import DEVICES, assert_fitted, assert_parts, can, held_out_errors, points, rows_below_their_bound

KERNELS = load_library().moe
H100 = load_profile("h100-sxm")
DTYPES = [("bfloat16", "bfloat16"), ("fp8", "fp8"), ("mxfp4", "bfloat16"), ("nvfp4", "nvfp4"), ("int4", "bfloat16")]


def seconds(call: FusedMoe, device: HardwareProfile = H100) -> float:
    return float(KERNELS.time(call, device).seconds)


def qwen(tokens: int, routing: str = "uniform", weights: str = "bfloat16", activations: str = "bfloat16") -> FusedMoe:
    """One layer of Qwen3-30B-A3B."""
    distinct, imbalance = loads_of(routing, tokens, 128, 8)
    return FusedMoe(tokens, 2048, 768, 128, 8, distinct, weights, activations, imbalance=imbalance)


def calls() -> st.SearchStrategy[tuple[FusedMoe, HardwareProfile]]:
    kinds = [
        (device, dtypes)
        for device in DEVICES
        for dtypes in DTYPES
        if can(moe.bound, FusedMoe(1, 1, 1, 1, 1, 1, *dtypes), device)
    ]
    return st.builds(
        lambda tokens, hidden, width, experts, share, kind, imbalance: (
            FusedMoe(
                tokens, hidden, width, experts, max(1, round(share * experts)),
                loads_of("uniform", tokens, experts, max(1, round(share * experts)))[0],
                kind[1][0], kind[1][1], imbalance=imbalance,
            ),
            kind[0],
        ),
        st.integers(1, 5_000), st.integers(1, 8_191), st.integers(1, 15_000), st.integers(1, 513), st.floats(0, 1),
        st.sampled_from(kinds), st.floats(1, 9),
    )  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(case=calls(), more=st.integers(1, 999))
def test_never_below_the_bound_and_monotone_in_every_size(case: tuple[FusedMoe, HardwareProfile], more: int) -> None:
    call, device = case
    parts = KERNELS.time(call, device)
    assert_parts(parts)
    assert float(parts.overhead) >= KERNELS.fixed_seconds
    assert float(parts.seconds) >= float(moe.bound(call, device))
    for name in ("tokens", "hidden", "expert_size", "imbalance"):
        larger: FusedMoe = dataclasses.replace(call, **{name: getattr(call, name) + more})
        assert seconds(larger, device) >= float(parts.seconds) * (1 - 1e-12), name
    few, many = (dataclasses.replace(call, distinct=distinct, imbalance=1.0) for distinct in (more, more + 1))
    assert seconds(many, device) > seconds(few, device)


@settings(max_examples=40, deadline=None)
@given(case=calls(), tokens=st.lists(st.integers(1, 3000), min_size=1, max_size=3))
def test_arrays_broadcast_and_agree_with_scalars(case: tuple[FusedMoe, HardwareProfile], tokens: list[int]) -> None:
    call, device = case
    widths = np.array([1, 193, 7168])
    grid = dataclasses.replace(call, tokens=np.array(tokens)[:, None], expert_size=widths)
    parts, least = KERNELS.time(grid, device), moe.bound(grid, device)
    assert parts.seconds.shape == least.shape == (len(tokens), 3)
    for row, count in enumerate(tokens):
        for column, width in enumerate(widths):
            one = dataclasses.replace(call, tokens=count, expert_size=int(width))
            assert parts.seconds[row, column] == pytest.approx(seconds(one, device), rel=1e-12)
            assert least[row, column] == pytest.approx(float(moe.bound(one, device)), rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(experts=st.integers(1, 300), share=st.floats(0, 1), tokens=st.integers(1, 2000))
@example(experts=4, share=0.5, tokens=1)  # rounds to more pairs of a token and an expert than there are
def test_a_routing_hits_no_more_experts_than_there_are_or_are_picked(experts: int, share: float, tokens: int) -> None:
    top_k = max(1, round(share * experts))
    for routing in ("uniform", "balanced", "power_law_1.2", "power_law_1.01"):
        distinct, imbalance = loads_of(routing, tokens, experts, top_k)
        assert top_k * (1 - 1e-9) <= distinct <= min(experts, tokens * top_k) * (1 + 1e-9), routing
        assert imbalance >= 1 - 1e-9, routing
        more, _ = loads_of(routing, tokens + 1, experts, top_k)
        assert more >= distinct * (1 - 1e-9) or routing.startswith("power_law")
    assert loads_of("balanced", tokens, experts, top_k)[0] >= loads_of("uniform", tokens, experts, top_k)[0] * (
        1 - 1e-9
    )


def drawn(tokens: int, experts: int, top_k: int) -> list[Array]:
    """Tokens of every expert hit, as aiconfigurator draws them: one token at a time, by an independent program."""
    random = np.random.default_rng(7)
    total = tokens * top_k
    low, high = (1.0, 0.8 * tokens) if total > experts else (0.01, 2.0)
    found = []
    for _ in range(100):
        loads = ((high**-0.2 - low**-0.2) * random.random(experts) + low**-0.2) ** -5.0
        counts = np.minimum(np.round(loads * total / loads.sum()), tokens)
        while counts.sum() < total:
            counts[counts.argmin()] += 1
        while counts.sum() > total:
            counts[counts.argmax()] -= 1
        found.append(counts[counts > 0])
    return found


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [(4, 128, 8), (16, 128, 8), (64, 128, 4), (64, 8, 2), (256, 8, 2), (256, 128, 8), (1024, 128, 8), (1024, 128, 4)],
)
def test_a_power_law_hits_what_its_program_draws(tokens: int, experts: int, top_k: int) -> None:
    loads = drawn(tokens, experts, top_k)
    distinct, imbalance = loads_of("power_law_1.2", tokens, experts, top_k)
    assert distinct == pytest.approx(np.mean([len(hit) for hit in loads]), rel=0.03)
    assert imbalance == pytest.approx(np.mean([(hit**2).mean() / hit.mean() ** 2 for hit in loads]), rel=0.08)
    tile = np.clip(2 ** np.round(np.log2(tokens * top_k / distinct)), 16, 128)
    counted = np.mean([np.ceil(hit / tile).mean() - 1 for hit in loads])
    call = FusedMoe(tokens, 2048, 768, experts, top_k, distinct, imbalance=imbalance)
    assert float(moe.repeats(call)) == pytest.approx(counted, abs=0.1)


@pytest.mark.parametrize(
    ("routing", "says"),
    [
        ("zipf", "power_law_ALPHA"),
        ("power_law_much", "number"),
        ("power_law_0.5", "ALPHA > 1"),
        ("power_law_1", "ALPHA"),
    ],
)
def test_an_unknown_routing_is_refused(routing: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        loads_of(routing, 4, 8, 2)


def test_impossible_routings_are_refused() -> None:
    with pytest.raises(UserError, match="top_k <= experts"):
        loads_of("uniform", 4, 8, 9)
    with pytest.raises(UserError, match="tokens >= 1"):
        loads_of("uniform", 0, 8, 2)


def test_coverage_decides_the_time_of_a_small_batch() -> None:
    """17 tokens that hit 85 experts take what 85 experts weigh, not what 8 do, and not what all 128 do."""
    one, spread = qwen(1), qwen(17)
    together, everywhere = (dataclasses.replace(spread, distinct=d) for d in (8, 128))
    assert seconds(together) < 1.1 * seconds(one)
    assert seconds(spread) > 4 * seconds(one)
    assert seconds(everywhere) > 1.3 * seconds(spread)
    assert weight_bytes(one) == 8 * 3 * 2048 * 768 * 2


def test_narrow_weights_are_read_faster_and_long_prompts_bind_on_arithmetic() -> None:
    assert seconds(qwen(64, weights="fp8", activations="fp8")) < 0.65 * seconds(qwen(64))
    assert seconds(qwen(64, weights="mxfp4")) < seconds(qwen(64))
    prompt = KERNELS.time(qwen(32_768), H100)
    assert prompt.compute > prompt.memory
    step = KERNELS.time(qwen(64), H100)
    assert step.memory > 10 * step.compute


def test_busy_experts_cost_more_only_once_they_outgrow_their_tile() -> None:
    few, many = qwen(8), qwen(256)
    for call, least in ((few, 1.0), (many, 1.05)):
        uneven = dataclasses.replace(call, imbalance=3.0)
        assert least * seconds(dataclasses.replace(call, imbalance=1.0)) < seconds(uneven)
    assert seconds(dataclasses.replace(few, imbalance=3.0)) < 1.03 * seconds(few)


def test_no_published_row_is_below_the_bound() -> None:
    assert rows_below_their_bound("moe", moe.bound) == []


def test_the_committed_numbers_are_what_the_committed_rows_give() -> None:
    assert_fitted("moe")


def test_rows_of_unseen_series_are_predicted_as_well_as_the_file_says() -> None:
    errors, evidence = held_out_errors("moe"), load_library().evidence["moe"]
    assert errors.mean() < 0.15
    assert errors.mean() == pytest.approx(evidence.fit.held_out_mean_error, abs=0.02)
    assert (np.log1p(errors) <= evidence.spread).mean() > 0.7
    every = [dataclasses.replace(p.call, distinct=p.call.experts) for p in points("moe")]
    measured = [p.measured_seconds for p in points("moe")]
    assumed = [seconds(c, p.hardware) / m - 1 for c, p, m in zip(every, points("moe"), measured, strict=True)]
    assert np.mean(np.abs(assumed)) > 3 * errors.mean()  # with all experts read, as some tools assume
