"""Decode attention: laws of the kernel family on every device, and what its committed numbers are worth."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.profile import HardwareProfile, load_profile
from perfmodel.kernels import attention
from perfmodel.kernels.attention import kv_bytes
from perfmodel.kernels.call import Attention
from perfmodel.kernels.library import load_library
from tests.kernel_rows import DEVICES, assert_fitted, assert_parts, can, held_out_errors, points, rows_below_their_bound

KERNELS = load_library().attention
H100 = load_profile("h100-sxm")
LLAMA = Attention(1, 1, 4096, 32, 8, 128)


def seconds(call: Attention, device: HardwareProfile = H100) -> float:
    return float(KERNELS.time(call, device).seconds)


def calls() -> st.SearchStrategy[tuple[Attention, HardwareProfile]]:
    kinds = [
        (d, c) for d in DEVICES for c in ("bfloat16", "fp8") if can(attention.bound, Attention(1, 1, 1, 1, 1, 1, c), d)
    ]
    return st.builds(
        lambda batch, slots, context, group, heads, width, kind, cold: (
            Attention(batch, slots, context, group * heads, heads, width, kind[1], cold),
            kind[0],
        ),
        st.integers(1, 513), st.integers(1, 130), st.integers(1, 140_000), st.integers(1, 16), st.integers(1, 33),
        st.sampled_from([64, 80, 128, 256]), st.sampled_from(kinds), st.booleans(),
    )  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(case=calls(), more=st.integers(1, 999))
def test_never_below_the_bound_and_monotone_in_every_size(case: tuple[Attention, HardwareProfile], more: int) -> None:
    call, device = case
    parts = KERNELS.time(call, device)
    assert_parts(parts)
    assert float(parts.overhead) == KERNELS.fixed_seconds
    assert float(parts.seconds) >= float(attention.bound(call, device))
    for name in ("batch", "slots", "context"):
        larger = dataclasses.replace(call, **{name: getattr(call, name) + more})
        assert seconds(larger, device) >= float(parts.seconds) * (1 - 1e-12), name
        assert attention.bound(larger, device) >= attention.bound(call, device) * (1 - 1e-12), name
    heads = dataclasses.replace(
        call, query_heads=np.multiply(call.query_heads, 2), kv_heads=np.multiply(call.kv_heads, 2)
    )
    assert seconds(heads, device) > float(parts.seconds)


@settings(max_examples=40, deadline=None)
@given(case=calls(), batch=st.lists(st.integers(1, 300), min_size=1, max_size=3))
def test_arrays_broadcast_and_agree_with_scalars(case: tuple[Attention, HardwareProfile], batch: list[int]) -> None:
    call, device = case
    contexts = np.array([1, 777, 65_537])
    grid = dataclasses.replace(call, batch=np.array(batch)[:, None], context=contexts)
    parts, least = KERNELS.time(grid, device), attention.bound(grid, device)
    assert parts.seconds.shape == least.shape == (len(batch), 3)
    for row, size in enumerate(batch):
        for column, context in enumerate(contexts):
            one = dataclasses.replace(call, batch=size, context=int(context))
            assert parts.seconds[row, column] == pytest.approx(seconds(one, device), rel=1e-12)
            assert least[row, column] == pytest.approx(float(attention.bound(one, device)), rel=1e-12)


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
def test_a_verify_reads_the_kv_once_for_all_its_slots(device: HardwareProfile) -> None:
    """Charged once per slot, as a published tool does, 17 slots would cost 17 decode calls: they cost a few."""
    for context in (1024, 32_768, 131_072):
        single = dataclasses.replace(LLAMA, batch=8, context=context)
        verify = dataclasses.replace(single, slots=17)
        assert kv_bytes(verify) == kv_bytes(single)
        assert seconds(single, device) < seconds(verify, device) < 17 / 4 * seconds(single, device)
    few = dataclasses.replace(LLAMA, context=131_072, slots=4)  # 16 rows of a KV head fill no tile
    assert seconds(few, device) < 1.02 * seconds(dataclasses.replace(few, slots=1), device)


def test_long_contexts_run_at_the_memorys_rate_and_short_ones_at_the_latency_of_a_launch() -> None:
    long = dataclasses.replace(LLAMA, batch=64, context=16_384)
    assert 0.85 < float(attention.bound(long, H100)) / seconds(long) < 1
    assert seconds(dataclasses.replace(LLAMA, context=128)) < 1.1 * KERNELS.fixed_seconds


def test_an_fp8_cache_nearly_halves_a_long_read_and_what_a_cache_holds_is_read_faster() -> None:
    long = dataclasses.replace(LLAMA, batch=64, context=16_384)
    assert 0.5 < seconds(dataclasses.replace(long, cache="fp8")) / seconds(long) < 0.65
    b200 = load_profile("b200")
    small = dataclasses.replace(LLAMA, batch=4, context=4096)  # 67 MB: fits half of a B200's L2, not an H100's
    warm = dataclasses.replace(small, cold=False)
    assert seconds(warm, b200) < 0.8 * seconds(small, b200)
    assert seconds(warm, H100) == seconds(small, H100)
    assert float(attention.bound(warm, b200)) < float(attention.bound(small, b200))


def test_a_device_without_fp8_multiplies_an_fp8_cache_in_16_bits() -> None:
    a100 = load_profile("a100-80gb-sxm")
    prompt = dataclasses.replace(LLAMA, slots=4096)  # waits for arithmetic
    assert seconds(dataclasses.replace(prompt, cache="fp8"), a100) == pytest.approx(seconds(prompt, a100), rel=0.05)
    assert seconds(dataclasses.replace(prompt, cache="fp8")) < 0.7 * seconds(prompt)


def test_no_published_row_is_below_the_bound() -> None:
    assert rows_below_their_bound("attention", attention.bound) == []


def test_the_committed_numbers_are_what_the_committed_rows_give() -> None:
    assert_fitted("attention")


def test_rows_of_unseen_series_are_predicted_as_well_as_the_file_says() -> None:
    errors, evidence = held_out_errors("attention"), load_library().evidence["attention"]
    assert errors.mean() < 0.13
    assert errors.mean() == pytest.approx(evidence.fit.held_out_mean_error, abs=0.02)
    assert (np.log1p(errors) <= evidence.spread).mean() > 0.7
    roofline = [abs(float(attention.bound(p.call, p.hardware)) / p.measured_seconds - 1) for p in points("attention")]
    assert np.mean(roofline) > 3 * errors.mean()
