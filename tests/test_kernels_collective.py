"""Collectives: laws of the kernel family on every device, and what its committed numbers are worth."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.files import UserError
from hardware.profile import HardwareProfile, load_profile
from perfmodel.kernels import collective
from perfmodel.kernels.call import Collective
from perfmodel.kernels.library import load_library
from tests.kernel_rows import DEVICES, assert_fitted, assert_parts, held_out_errors, rows_below_their_bound

KERNELS = load_library().collective
JOINED = [device for device in DEVICES if device.interconnect is not None]
H100 = load_profile("h100-sxm")


def seconds(call: Collective, device: HardwareProfile = H100) -> float:
    return float(KERNELS.time(call, device).seconds)


def calls() -> st.SearchStrategy[tuple[Collective, HardwareProfile]]:
    return st.builds(
        lambda size, devices, kind, custom, device: (Collective(size, devices, kind, custom), device),
        st.integers(1, 10**10), st.integers(1, 8), st.sampled_from(collective.KINDS), st.booleans(),
        st.sampled_from(JOINED),
    )  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(case=calls(), more=st.integers(1, 10**8))
def test_never_below_the_bound_and_monotone_in_size(case: tuple[Collective, HardwareProfile], more: int) -> None:
    call, device = case
    parts = KERNELS.time(call, device)
    assert_parts(parts)
    assert float(parts.compute) == 0
    assert float(parts.seconds) >= float(collective.bound(call, device))
    assert (float(parts.seconds) == 0) == (call.devices == 1)
    larger = dataclasses.replace(call, size_bytes=np.add(call.size_bytes, more))
    assert seconds(larger, device) >= float(parts.seconds)
    assert seconds(dataclasses.replace(call, custom=True), device) <= seconds(
        dataclasses.replace(call, custom=False), device
    )


@settings(max_examples=40, deadline=None)
@given(case=calls(), sizes=st.lists(st.integers(1, 10**9), min_size=1, max_size=3))
def test_arrays_broadcast_and_agree_with_scalars(case: tuple[Collective, HardwareProfile], sizes: list[int]) -> None:
    call, device = case
    counts = np.array([1, 2, 3, 8])
    grid = dataclasses.replace(call, size_bytes=np.array(sizes)[:, None], devices=counts)
    parts, least = KERNELS.time(grid, device), collective.bound(grid, device)
    assert parts.seconds.shape == least.shape == (len(sizes), 4)
    for row, size in enumerate(sizes):
        for column, devices in enumerate(counts):
            one = dataclasses.replace(call, size_bytes=size, devices=int(devices))
            assert parts.seconds[row, column] == pytest.approx(seconds(one, device), rel=1e-12)
            assert least[row, column] == pytest.approx(float(collective.bound(one, device)), rel=1e-12)


@pytest.mark.parametrize("device", JOINED, ids=lambda d: d.name)
def test_small_sums_wait_for_latency_and_large_ones_for_the_links(device: HardwareProfile) -> None:
    link = device.interconnect
    assert link is not None
    assert link.latency_seconds is not None
    assert seconds(Collective(1024, 8, custom=False), device) < 4 * link.latency_seconds
    assert seconds(Collective(1024, 2, custom=False), device) < seconds(Collective(1024, 8, custom=False), device)
    large = seconds(Collective(8e9, 8, custom=False), device)
    assert 2 * 7 / 8 * 8e9 / large == pytest.approx(link.achieved_bandwidth_bytes_per_second, rel=0.15)


def test_an_engines_own_kernel_pays_for_small_sums_only() -> None:
    own, library = (lambda size, custom=custom: seconds(Collective(size, 8, custom=custom)) for custom in (True, False))
    assert own(16_384) < 0.5 * library(16_384)
    assert own(1e9) > 0.9 * library(1e9)


def test_an_exchange_moves_half_of_a_sum_and_a_mesh_joins_two_devices_by_one_link() -> None:
    exchange = Collective(1e9, 8, "all_to_all", custom=False)
    assert 0.4 < seconds(exchange) / seconds(dataclasses.replace(exchange, kind="all_reduce")) < 0.7
    mi300x = load_profile("mi300x")
    two, eight = (float(collective.bound(Collective(1e9, devices), mi300x)) for devices in (2, 8))
    assert two == pytest.approx(7 * eight, rel=0.01)


def test_what_cannot_be_joined_is_refused() -> None:
    alone = dataclasses.replace(
        H100, interconnect=None, sources={k: v for k, v in H100.sources.items() if not k.startswith("interconnect")}
    )
    with pytest.raises(UserError, match="no interconnect"):
        KERNELS.time(Collective(1, 2), alone)
    with pytest.raises(UserError, match="devices <= 8"):
        KERNELS.time(Collective(1, 16), H100)
    with pytest.raises(UserError, match="all_reduce"):
        collective.bound(Collective(1, 2, "gather"), H100)
    assert H100.interconnect is not None
    untimed = dataclasses.replace(H100.interconnect, latency_seconds=None)
    sources = {k: v for k, v in H100.sources.items() if k != "interconnect.latency_seconds"}
    with pytest.raises(UserError, match="latency_seconds"):
        KERNELS.time(Collective(1, 2), dataclasses.replace(H100, interconnect=untimed, sources=sources))


def test_no_published_row_is_below_the_bound() -> None:
    assert rows_below_their_bound("collective", collective.bound) == []


def test_the_committed_numbers_are_what_the_committed_rows_give() -> None:
    assert_fitted("collective")


def test_rows_of_unseen_series_are_predicted_as_well_as_the_file_says() -> None:
    errors, evidence = held_out_errors("collective"), load_library().evidence["collective"]
    assert errors.mean() < 0.2
    assert errors.mean() == pytest.approx(evidence.fit.held_out_mean_error, abs=0.02)
    assert (np.log1p(errors) <= evidence.spread).mean() > 0.6
