"""Families of kernels as problems to fit: rows are joined without being mixed up, and known numbers are found again."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from hardware.files import UserError
from hardware.profile import load_profile
from perfmodel import fitting
from perfmodel.engine import load_engine
from perfmodel.kernels import attention
from perfmodel.kernels.attention import AttentionKernels
from perfmodel.kernels.call import Attention, Collective, Gemm, kind_of
from perfmodel.kernels.fitting import family_problem, seconds_of, values_of
from perfmodel.kernels.library import CLASSES, load_library
from perfmodel.published.served import numbers_of

DEVICES = [load_profile(name) for name in ("h100-sxm", "mi300x", "l40s")]
TRUE = AttentionKernels(fixed_seconds=5e-6, bandwidth_share=0.8, cache_share=2.0, split_bytes=1e5, compute_share=0.3)
CALLS = [
    (Attention(batch, slots, context, 32, 8, 128, cache, cold), device)
    for context in (1000, 20_000, 130_000)
    for batch in (1, 32)
    for slots in (1, 40)
    for cache in ("bfloat16", "fp8")
    for cold in (True, False)
    for device in DEVICES
]


def test_calls_of_several_devices_and_types_keep_their_order() -> None:
    one_by_one = [float(attention.bound(call, device)) for call, device in CALLS]
    assert seconds_of(CALLS, attention.bound) == pytest.approx(one_by_one, rel=1e-12)


def test_known_numbers_are_found_again_and_a_far_start_is_left() -> None:
    measured = seconds_of(CALLS, lambda call, device: TRUE.time(call, device).seconds)
    series = [device.name for _, device in CALLS]
    start = dataclasses.replace(TRUE, fixed_seconds=2e-5, bandwidth_share=1.0, compute_share=0.6)
    problem = family_problem(start, CALLS, measured, series)
    assert problem.predict(values_of(TRUE)) == pytest.approx(measured, rel=1e-12)
    found = fitting.solve(problem)
    assert found == pytest.approx(values_of(TRUE), rel=0.1)
    assert np.abs(problem.predict(found) / measured - 1).max() < 0.03
    held = family_problem(start, CALLS, measured, series, prior={"compute_share": 1e-4})
    assert fitting.solve(held)["compute_share"] == pytest.approx(start.compute_share, rel=0.02)


def test_an_interval_holds_its_value_and_narrows_with_what_is_known() -> None:
    """Also where a draw of few series leaves a number nearer to its start than all of them do."""
    random, lengths = np.random.default_rng(0), np.linspace(1, 9, 40)

    def problem(noise: float) -> fitting.Problem:
        measured = (2e-3 + 5e-3 * lengths) * np.exp(noise * random.standard_normal(40))
        series = [str(i % 4) for i in range(40)]
        start = {"fixed": 5e-3, "each": 5e-3}
        return fitting.Problem(
            lambda n: n["fixed"] + n["each"] * lengths, measured, series, start, 0.3, kinds=["few"] * 9 + ["many"] * 31
        )

    widths = []
    for noise in (0.02, 0.2):
        found = fitting.fit(problem(noise), draws=20)
        for name, value in found.values.items():
            low, high = found.intervals[name]
            assert low <= value <= high, name
        widths.append(found.intervals["each"][1] / found.intervals["each"][0])
        assert set(found.spreads) == {"many"}
        assert found.spreads["many"] == pytest.approx(1.28 * noise, rel=0.5)
    assert widths[0] < widths[1]


def test_every_bundled_interval_holds_its_value() -> None:
    library = load_library()
    for family in CLASSES:
        for name, value in values_of(getattr(library, family)).items():
            low, high = library.evidence[family].intervals[name]
            assert low <= value <= high, (family, name)
    for engine in ("vllm", "tensorrt-llm", "gpt-fast", "zyphra-vllm"):
        profile = load_engine(engine)
        numbers = numbers_of(profile)
        named = set(numbers) & set(profile.intervals)
        assert len(named) >= 6
        for name in named:
            low, high = profile.intervals[name]
            assert low <= numbers[name] <= high, (engine, name)


def test_operands_of_16_bits_and_narrower_ones_have_spreads_apart() -> None:
    for family in ("gemm", "attention", "moe"):
        evidence = load_library().evidence[family]
        assert evidence.spreads["16-bit"] < evidence.spread_of("") < evidence.spreads["narrow"]
    assert {kind_of(Gemm(1, 1, 1)), kind_of(Attention(1, 1, 1, 1, 1, 1))} == {"16-bit"}
    assert {kind_of(Gemm(1, 1, 1, "int4")), kind_of(Attention(1, 1, 1, 1, 1, 1, "fp8"))} == {"narrow"}
    assert kind_of(Collective(1, 2)) == ""


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(UserError, match="measured seconds"):
        family_problem(TRUE, CALLS, [1.0], ["one"])
    with pytest.raises(UserError, match="compute_share > 0"):
        dataclasses.replace(TRUE, compute_share=0.0)
