"""Laws of the model that ranks tilings, whatever its figures: nothing here says that it is right about a device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autotune.tiling_model import (
    LaunchShape,
    expert_products,
    general_shape,
    launch_seconds,
    predicted_seconds,
    product_shape,
    resident_blocks,
)
from benchmarks import tile_files
from hardware.files import UserError
from hardware.profile import HardwareProfile, MemoryLevel, load_profile
from runtime.config import ModelConfig, replace
from runtime.kernels.compiler import Program
from runtime.kernels.problem import Problem
from runtime.kernels.registry import KERNELS
from runtime.kernels.target import TARGETS

CONFIG = ModelConfig()
DEVICES = ("h200", "mi300x")
SHAPE = LaunchShape(
    blocks=1000,
    warps=4,
    moved_bytes=1e8,
    cached_bytes=1e7,
    flops=1e10,
    operand_bytes=1e7,
    flight_bytes=16_384,
    shared_bytes=32_768,
    registers=64,
)


def faster_memory(hardware: HardwareProfile, factor: float) -> HardwareProfile:
    def scaled(level: MemoryLevel) -> MemoryLevel:
        names = ("peak_bandwidth_bytes_per_second", "achieved_bandwidth_bytes_per_second")
        values = {name: getattr(level, name) for name in names}
        return replace(level, **{name: v and v * factor for name, v in values.items()})  # type: ignore[no-any-return]

    return replace(hardware, memory=tuple(scaled(level) for level in hardware.memory))  # type: ignore[no-any-return]


def even(tokens: int, distinct: int) -> list[list[int]]:
    """A forward's tokens of each of 16 experts, `distinct` of which are hit as evenly as can be, none skipped."""
    share, rest = divmod(tokens, distinct)
    return [[share + (e < rest) if e < distinct else 0 for e in range(CONFIG.num_experts)] + [0]]


def call(kernel: str, problem: Problem, tiling: Any, hardware: HardwareProfile, **changes: Any) -> float:
    launches = {"experts": 3, "grouped_experts": 4}.get(kernel, 1)
    facts: dict[str, Any] = {"grids": (64,) * launches, "moved_bytes": 1e7, "flops": 1e9}
    found = predicted_seconds(kernel, problem, "bfloat16", tiling, hardware, **{**facts, **changes})
    assert found is not None
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", ["experts", "grouped_experts"])
@pytest.mark.parametrize("tokens", [1, 17, 272, 2176])
def test_more_of_anything_that_costs_is_never_faster(device: str, kernel: str, tokens: int) -> None:
    hardware, problem = load_profile(device), Problem(CONFIG, tokens, 1)
    quick = faster_memory(hardware, 2)
    for tiling in KERNELS[kernel].tilings(TARGETS[hardware.compile_target], problem):
        hit = [call(kernel, problem, tiling, hardware, loads=even(tokens, n)) for n in (1, 2, 8, 16) if n <= tokens]
        if tokens <= 16:  # with more tokens than that the fewer experts have, each of them, the more tiles
            assert hit == sorted(hit)
        assert call(kernel, problem, tiling, quick, loads=even(tokens, 1)) <= hit[0]
        more = call(kernel, problem, tiling, hardware, loads=even(2 * tokens, 1))
        assert more >= hit[0]


@pytest.mark.parametrize("device", DEVICES)
def test_memory_is_never_beaten(device: str) -> None:
    """No tiling passes its bytes faster than the device's memory gives them."""
    hardware = load_profile(device)
    for tokens in (1, 17, 272):
        problem, loads = Problem(CONFIG, tokens, 1), even(tokens, min(tokens, 16))
        least = min(tokens, 16) * 3 * CONFIG.hidden_size * CONFIG.moe_intermediate_size * 2
        bandwidth = hardware.main_memory.achieved_bandwidth_bytes_per_second
        assert bandwidth
        for tiling in KERNELS["experts"].tilings(TARGETS[hardware.compile_target], problem):
            assert call("experts", problem, tiling, hardware, loads=loads) > least / bandwidth


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "changes",
    [
        {"moved_bytes": 2e8},
        {"cached_bytes": 1e10},
        {"flops": 1e13},
        {"operand_bytes": 1e12},
        {"flight_bytes": 64},
        {"registers": 255, "flight_bytes": 64},
        {"staged": False, "shared_bytes": 200_000},
        {"matrix": False, "flops": 1e12},
        {"blocks": 1},
    ],
)
def test_a_launch_gets_no_faster_by_a_worse_shape(changes: dict[str, Any], device: str) -> None:
    hardware = load_profile(device)
    base: LaunchShape = replace(SHAPE, flops=1e12) if changes.get("matrix") is False else SHAPE
    worse: LaunchShape = replace(base, **changes)
    assert launch_seconds(worse, hardware, "bfloat16") > launch_seconds(base, hardware, "bfloat16")


def test_what_is_shared_by_blocks_bounds_how_many_are_resident() -> None:
    hopper = load_profile("h200")
    few: dict[str, Any] = {"registers": 32, "shared_bytes": 0}
    assert resident_blocks(replace(SHAPE, **few), hopper) == 16  # 64 warps
    assert resident_blocks(replace(SHAPE, **few, warps=1), hopper) == 32  # blocks
    assert resident_blocks(replace(SHAPE, registers=128, shared_bytes=0), hopper) == 4  # 65,536 registers
    assert resident_blocks(replace(SHAPE, registers=32, shared_bytes=227 * 1024), hopper) == 1
    assert resident_blocks(replace(SHAPE, registers=32, shared_bytes=75 * 1024), hopper) == 3
    assert resident_blocks(replace(SHAPE, registers=255, warps=32), hopper) == 1  # what runs at all is resident


def test_a_block_that_does_not_fill_the_last_wave_costs_a_wave() -> None:
    """One unit more than a whole wave of compute-bound blocks: the next block waits for a free unit."""
    hopper = load_profile("h200")
    bound = replace(SHAPE, moved_bytes=1.0, cached_bytes=0.0, shared_bytes=227 * 1024, operand_bytes=0.0)

    def seconds(blocks: int) -> float:
        return launch_seconds(replace(bound, blocks=blocks, flops=1e9 * blocks), hopper, "bfloat16")

    units = hopper.compute_units
    assert seconds(units) == pytest.approx(seconds(1))
    assert seconds(units + 1) == pytest.approx(2 * seconds(units), rel=1e-6)


def test_weights_are_read_once_from_memory_and_again_from_the_cache() -> None:
    hopper, problem = load_profile("h200"), Problem(CONFIG, 128, 1)
    tiling = next(t for t in KERNELS["experts"].tilings(TARGETS["sm_90"], problem) if t["BLOCK_M"] == 16)
    first, _ = expert_products("experts", problem, tiling)
    one, two = (product_shape(first, even(tokens, 1), "bfloat16", tiling, hopper) for tokens in (16, 32))
    weights = 2 * CONFIG.moe_intermediate_size * CONFIG.hidden_size * 2
    assert two.blocks == 2 * one.blocks and two.flops == 2 * one.flops
    assert weights < one.moved_bytes < two.moved_bytes < 1.1 * weights
    assert two.cached_bytes - 2 * one.cached_bytes == pytest.approx(weights)
    cache = replace(hopper.memory[0], capacity_bytes=weights / 2)
    small = replace(hopper, compute_units=1, memory=(cache, *hopper.memory[1:]))  # that holds few blocks at once
    alone = product_shape(replace(first, group=1), even(32, 1), "bfloat16", tiling, small)
    together = product_shape(replace(first, group=4), even(32, 1), "bfloat16", tiling, small)
    assert alone.moved_bytes - together.moved_bytes == pytest.approx(weights)
    resident = product_shape(
        replace(first, group=1), even(32, 1), "bfloat16", tiling, replace(small, compute_units=132)
    )
    assert resident.moved_bytes == together.moved_bytes


def test_narrow_rows_of_a_tile_cost_whole_fetches() -> None:
    """On AMD the cache gives 128 bytes at a time, so that rows of 16 two-byte values are a quarter of what is read."""
    device, problem = load_profile("mi300x"), Problem(CONFIG, 128, 1)
    tiling = KERNELS["experts"].tilings(TARGETS["gfx942"], problem)[0]
    first, _ = expert_products("experts", problem, tiling)
    wide, narrow = (
        product_shape(replace(first, k=k), even(128, 16), "bfloat16", tiling, device).cached_bytes for k in (64, 16)
    )
    assert narrow == 4 * wide > 0


def test_skipped_tokens_cost_nothing() -> None:
    hopper, problem = load_profile("h200"), Problem(CONFIG, 16, 1)
    tiling = KERNELS["experts"].tilings(TARGETS["sm_90"], problem)[0]
    loads = even(16, 4)
    skipping = [[*loads[0][:-1], 100]]
    assert call("experts", problem, tiling, hopper, loads=loads) == call(
        "experts", problem, tiling, hopper, loads=skipping
    )


def test_what_the_compiler_made_is_used() -> None:
    hopper, problem = load_profile("h200"), Problem(CONFIG, 272, 1)
    tiling = KERNELS["experts"].tilings(TARGETS["sm_90"], problem)[0]
    program = Program("f", 64, 0, 0, 32_768, {"wgmma": 1})
    lean, fat = (
        call("experts", problem, tiling, hopper, loads=even(272, 16), programs=(replace(program, registers=r),) * 3)
        for r in (64, 255)
    )
    assert fat > lean
    shape = general_shape(64, 1e6, 1e9, {"num_warps": 4}, replace(program, matrix_instructions={}))
    assert not shape.matrix and shape.shared_bytes == 32_768


def test_nothing_is_predicted_of_unknown_launches() -> None:
    problem = Problem(CONFIG, 1, 1)
    assert (
        predicted_seconds("every", problem, "bfloat16", {}, load_profile("h200"), grids=(), moved_bytes=1, flops=1)
        is None
    )
    assert call("attention", problem, {"num_warps": 4}, load_profile("h200")) > 0


def test_published_tilings_are_ranked_in_their_space(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"BLOCK_SIZE_M": 128, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 1, "num_warps": 8}
    tile, poor = {**good, "num_stages": 4}, {**good, "BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 32, "num_stages": 2}
    file = tmp_path / "E=8,N=14336,device_name=NVIDIA_H200.json"
    file.write_text(json.dumps({"triton_version": "3.6.0", "4096": tile, "4095": poor}))
    (tmp_path / "E=8,N=14336,device_name=NVIDIA_H200,dtype=fp8_w8a8.json").write_text("{}")
    assert tile_files.main(["--files", str(tmp_path), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["device"], first["model"], first["tokens"], first["tiling"]) == ("h200", "Mixtral-8x7B", 4096, tile)
    assert first["faster"] < second["faster"] and 0 <= first["excess"] < second["excess"]
    with pytest.raises(UserError, match="must hold tile files"):
        tile_files.main(["--files", str(tmp_path / "none")])
