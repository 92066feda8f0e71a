"""Kernels that only move data: laws on every device, and what their committed numbers are worth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.files import UserError
from hardware.profile import HardwareProfile
from perfmodel.kernels import elementwise
from perfmodel.kernels.call import main_bandwidth
from perfmodel.kernels.elementwise import Elementwise, ElementwiseKernels
from perfmodel.kernels.library import load_library
from tests.kernel_rows import DEVICES, assert_fitted, assert_parts, held_out_errors, rows_below_their_bound

KERNELS = load_library().elementwise


def seconds(size: float, launches: float, device: HardwareProfile) -> float:
    return float(KERNELS.time(Elementwise(size, launches), device).seconds)


@settings(deadline=None)
@given(st.integers(0, 10**11), st.integers(0, 1000), st.sampled_from(DEVICES), st.integers(1, 10**10))
def test_more_bytes_and_launches_take_longer_and_nothing_beats_the_bound(
    size: int, launches: int, device: HardwareProfile, more: int
) -> None:
    parts = KERNELS.time(Elementwise(size, launches), device)
    assert_parts(parts)
    assert float(parts.seconds) >= float(elementwise.bound(Elementwise(size, launches), device))
    assert seconds(size + more, launches, device) > seconds(size, launches, device)
    assert seconds(size, launches + 1, device) > seconds(size, launches, device)


def test_a_tiny_kernel_is_its_launch_and_a_huge_one_its_bytes() -> None:
    for device in DEVICES:
        tiny, huge = KERNELS.time(Elementwise(2.0), device), KERNELS.time(Elementwise(1e11), device)
        assert tiny.overhead > 0.99 * tiny.seconds and huge.memory > 0.99 * huge.seconds
        assert float(tiny.seconds) > device.graph_node_seconds


def test_no_stream_beyond_the_caches_is_faster_than_the_device_achieves() -> None:
    """Whatever share is fitted to small kernels, whose bytes the one before left in a cache."""
    quick = ElementwiseKernels(node_share=1.0, bandwidth_share=3.0)
    for device in DEVICES:
        held = sum(level.capacity_bytes for level in device.memory[:-1])
        few, some, more = (quick.time(Elementwise(size), device).memory for size in (held, held + 1e9, held + 2e9))
        assert more - some == pytest.approx(some - few)
        assert 1e9 / (more - some) <= main_bandwidth(device) * (1 + 1e-9)
        assert few == pytest.approx(held / (3 * main_bandwidth(device)))


def test_arrays_agree_with_numbers() -> None:
    sizes, launches = np.array([[0.0], [1e6], [1e9]]), np.array([1.0, 7.0])
    grid = KERNELS.time(Elementwise(sizes, launches), DEVICES[0]).seconds
    assert grid.shape == (3, 2)
    assert grid[2, 1] == pytest.approx(seconds(1e9, 7, DEVICES[0]))


def test_the_committed_numbers_are_those_of_the_committed_rows() -> None:
    assert_fitted("elementwise")
    assert held_out_errors("elementwise").mean() < 0.2
    assert rows_below_their_bound("elementwise", elementwise.bound) == []


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="node_share > 0"):
        ElementwiseKernels(0.0, 1.0)
