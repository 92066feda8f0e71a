"""Linear layers: laws of the kernel family on every device, and what its committed numbers are worth."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dashboards.pairs import published
from hardware.files import UserError
from hardware.profile import HardwareProfile, list_profiles, load_profile
from perfmodel import fitting
from perfmodel.kernels import gemm
from perfmodel.kernels.call import Array, Gemm
from perfmodel.kernels.fitting import seconds_of
from perfmodel.kernels.library import load_library
from perfmodel.published import fits
from perfmodel.published.interpret import interpret
from perfmodel.published.names import Catalog
from perfmodel.published.points import KernelPoint
from perfmodel.published.rows import read_rows

ROWS = Path(__file__).parents[1] / "measurements" / "published" / "gpu_measured.csv"
DEVICES = [profile for profile in map(load_profile, sorted(list_profiles())) if profile.kind == "gpu"]
LINEAR = load_library().gemm
DTYPES = [("bfloat16", "bfloat16"), ("fp8", "bfloat16"), ("int4", "bfloat16"), ("fp8", "fp8"), ("nvfp4", "nvfp4")]
H100 = load_profile("h100-sxm")
size = st.integers(1, 40_000)


def calls() -> st.SearchStrategy[tuple[Gemm, HardwareProfile]]:
    """Any layer in any element types, on a device that can multiply them."""
    kinds = st.sampled_from([(d, device) for device in DEVICES for d in DTYPES if _can(device, *d)])
    return st.builds(
        lambda m, n, k, kind, cold, quantise: (Gemm(m, n, k, kind[0][0], kind[0][1], cold, quantise), kind[1]),
        size, size, size, kinds, st.booleans(), st.booleans(),
    )  # fmt: skip


def _can(device: HardwareProfile, weights: str, activations: str) -> bool:
    try:
        gemm.bound(Gemm(1, 1, 1, weights, activations), device)
    except UserError:
        return False
    return True


def seconds(call: Gemm, device: HardwareProfile) -> float:
    return float(LINEAR.time(call, device).seconds)


@cache
def points() -> tuple[KernelPoint, ...]:
    catalog = Catalog()
    found = (interpret(row, catalog) for row in read_rows(ROWS))
    return tuple(p for p in found if isinstance(p, KernelPoint) and p.family == "gemm")


@cache
def problem() -> fitting.Problem:
    return fits.kernel_problem(points())


def errors(predicted: Array) -> Array:
    return np.abs(predicted / np.asarray(problem().measured) - 1)


def test_every_device_multiplies_16_bits_and_one_without_fp8_refuses_it() -> None:
    assert all(_can(device, "bfloat16", "bfloat16") for device in DEVICES)
    with pytest.raises(UserError, match="fp8"):
        LINEAR.time(Gemm(1, 64, 64, "fp8", "fp8"), load_profile("a100-80gb-sxm"))


@settings(max_examples=150, deadline=None)
@given(case=calls(), more=st.integers(1, 3_000))
def test_never_below_the_bound_and_monotone_in_every_size(case: tuple[Gemm, HardwareProfile], more: int) -> None:
    call, device = case
    took = seconds(call, device)
    assert took >= float(gemm.bound(call, device))
    for name in ("m", "n", "k"):
        larger = dataclasses.replace(call, **{name: getattr(call, name) + more})
        assert seconds(larger, device) >= took * (1 - 1e-12), name


@settings(max_examples=60, deadline=None)
@given(case=calls())
def test_parts_are_positive_add_up_and_cold_weights_or_quantising_never_help(
    case: tuple[Gemm, HardwareProfile],
) -> None:
    call, device = case
    parts = LINEAR.time(call, device)
    assert min(map(float, parts)) >= 0
    assert float(parts.overhead) >= LINEAR.launch_nodes * device.graph_node_seconds
    assert float(parts.seconds) == pytest.approx(sum(map(float, parts)), rel=1e-12)
    cold, warm = (dataclasses.replace(call, cold=value) for value in (True, False))
    assert seconds(cold, device) >= seconds(warm, device) * (1 - 1e-12)
    assert float(gemm.bound(cold, device)) >= float(gemm.bound(warm, device))
    bare, whole = (dataclasses.replace(call, quantise=value) for value in (False, True))
    assert (seconds(whole, device) > seconds(bare, device)) == (call.activations in ("fp8", "nvfp4"))


@settings(max_examples=30, deadline=None)
@given(case=calls(), m=st.lists(size, min_size=1, max_size=4), n=st.lists(size, min_size=1, max_size=4))
def test_arrays_broadcast_and_agree_with_scalars(
    case: tuple[Gemm, HardwareProfile], m: list[int], n: list[int]
) -> None:
    call, device = case
    grid = dataclasses.replace(call, m=np.array(m)[:, None], n=np.array(n))
    parts, least = LINEAR.time(grid, device), gemm.bound(grid, device)
    assert parts.seconds.shape == least.shape == (len(m), len(n))
    for row, rows in enumerate(m):
        for column, columns in enumerate(n):
            one = dataclasses.replace(call, m=rows, n=columns)
            assert parts.seconds[row, column] == pytest.approx(seconds(one, device), rel=1e-12)
            assert least[row, column] == pytest.approx(float(gemm.bound(one, device)), rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(device=st.sampled_from(DEVICES), m=size, n=size, k=size)
def test_fewer_bytes_are_never_slower_where_widening_costs_nothing(
    device: HardwareProfile, m: int, n: int, k: int
) -> None:
    free = dataclasses.replace(LINEAR, widened_share=1.0)
    took = [float(free.time(Gemm(m, n, k, w), device).seconds) for w in ("int4", "mxfp4", "int8", "bfloat16")]
    assert took == sorted(took)


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
def test_a_decode_step_streams_narrow_weights_faster(device: HardwareProfile) -> None:
    took = [seconds(Gemm(8, 8192, 8192, weights), device) for weights in ("int4", "int8", "bfloat16")]
    assert took[0] < took[1] < took[2]
    assert took[2] < 2 * took[1]  # the launch does not shrink with the bytes


def test_one_tile_more_than_a_wave_takes_another_wave() -> None:
    """132 tiles of 128 x 256 fill the H100's units once; 8% more work then takes well over 8% more time."""
    full, over, twice = (seconds(Gemm(11 * 128, columns * 256, 8192), H100) for columns in (12, 13, 24))
    assert over > 1.25 * full
    assert over < twice
    fewer_units = dataclasses.replace(H100, compute_units=131)
    assert seconds(Gemm(11 * 128, 12 * 256, 8192), fewer_units) > 1.2 * full


def test_bandwidth_grows_with_the_matrix() -> None:
    """A 4-16 MB matrix reaches 0.3 to 0.5 of an H100's bandwidth, one of 256 MB most of it."""
    assert H100.main_memory.peak_bandwidth_bytes_per_second is not None
    share = [
        2 * edge**2 / seconds(Gemm(1, edge, edge), H100) / H100.main_memory.peak_bandwidth_bytes_per_second
        for edge in (1024, 2048, 4096, 11_586)
    ]
    assert share == sorted(share)
    assert share[0] < 0.2
    assert 0.25 < share[1] < 0.5
    assert 0.75 < share[3] < 0.95


def test_faster_memory_makes_cold_layers_faster_and_a_cache_makes_warm_ones_faster() -> None:
    assert seconds(Gemm(1, 8192, 8192), load_profile("h200")) < 0.85 * seconds(Gemm(1, 8192, 8192), H100)
    mi300x = load_profile("mi300x")
    held = Gemm(1, 8192, 8192, cold=False)  # 134 MB: in the Infinity Cache of an MI300X, not in an H100's L2
    assert seconds(held, mi300x) < 0.75 * seconds(dataclasses.replace(held, cold=True), mi300x)
    assert seconds(held, H100) == seconds(dataclasses.replace(held, cold=True), H100)
    assert float(gemm.bound(held, H100)) > float(gemm.bound(held, mi300x)) > 0


def test_no_published_row_is_below_the_bound() -> None:
    timed = [(p.call, p.hardware) for p in points()]
    below = np.asarray(problem().measured) < seconds_of(timed, gemm.bound)
    assert [p.id for p, is_below in zip(points(), below, strict=True) if is_below] == []


def test_the_committed_numbers_are_what_the_committed_rows_give() -> None:
    values = fitting.solve(problem())
    assert values == pytest.approx({name: getattr(LINEAR, name) for name in values}, rel=0.02)
    evidence = load_library().evidence["gemm"]
    assert set(evidence.intervals) == set(values)
    assert evidence.fit.rows == len(points())
    assert evidence.fit.series == len(set(problem().series))


def test_rows_of_unseen_series_are_predicted_as_well_as_the_file_says() -> None:
    """And better than by the roofline alone. That a refit gives these predictions, `test_published_evidence` holds."""
    held = {pair.id: pair.predicted_seconds for pair in published().pairs if pair.fit == "held out"}
    found = errors(np.array([held[point.id] for point in points()]))
    bfloat16 = np.array([p.call.weights == p.call.activations == "bfloat16" for p in points()])
    evidence = load_library().evidence["gemm"]
    assert found.mean() == pytest.approx(evidence.fit.held_out_mean_error, abs=0.02)
    assert found[bfloat16].mean() < 0.09
    assert (np.log1p(found) <= evidence.spread).mean() > 0.7
    roofline = errors(seconds_of([(p.call, p.hardware) for p in points()], gemm.bound))
    assert roofline[bfloat16].mean() > 3 * found[bfloat16].mean()


@pytest.mark.parametrize("scale", [1.0, 0.5, 1e5])
def test_a_grid_of_rows_is_timed_like_each_of_them(scale: float) -> None:
    """Repeated numbers of rows are timed once, whole or not, small or large."""
    rows = scale * np.random.default_rng(0).integers(1, 300, (60, 1, 40))
    whole = LINEAR.time(Gemm(rows, 2048, 4096), H100)
    for place in ((0, 0, 0), (59, 0, 39), (31, 0, 7)):
        alone = LINEAR.time(Gemm(rows[place], 2048, 4096), H100)
        for found, expected in zip(whole, alone, strict=True):
            assert found.shape == rows.shape and found[place] == pytest.approx(float(expected))
