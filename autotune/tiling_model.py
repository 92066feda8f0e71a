"""How long a kernel should take with a tiling: to rank tilings before any of them runs.

A few formulas over what is known without running: the sizes of tiles, the routes, what the compiler made of it, and the
device's data file. Nothing in them is fitted, and no GPU of ours has scored them yet (November 2026); each search
stores predicted beside measured seconds and reports their rank correlation. Of vLLM's published tile files
`python -m benchmarks.tile_files` (684 tilings of H100, H200 and MI300X at 0c0fdae) says where the fastest of a search
stands in this ranking, in the median: from 513 tokens on among the first 3%, predicted within 5% of the predicted best;
up to 64 tokens on NVIDIA among the first 6 to 38%, where most tilings are predicted within 2% of the best. (The commit
is of the publisher's fork of vLLM.) The rules of concurrent row blocks and of whole fetches were added in sight of
these files. Not modelled: the rate of each kind of matrix instruction, bank conflicts, clocks that fall under load,
blocks of a grid that find nothing to do.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hardware.profile import HardwareProfile
from perfmodel.kernels.call import main_bandwidth
from runtime.config import DTYPE_BYTES
from runtime.kernels.compiler import Program
from runtime.kernels.problem import Problem


@dataclass(frozen=True)
class Limits:
    """What the warps of one compute unit share. registers: 32-bit ones of a unit, allocated to a thread in `step`s.

    reserved_bytes: of shared memory, taken by every block besides its own. latency_cycles: of a load from main memory
    that finds the device idle; under load it is longer. fetch_bytes: that the cache gives at least for a request.
    most_registers: of a thread; what needs more spills.
    """

    warps: int
    blocks: int
    registers: int
    step: int
    reserved_bytes: int
    latency_cycles: float
    fetch_bytes: int
    most_registers: int


# Hopper and Blackwell: https://docs.nvidia.com/cuda/cuda-c-programming-guide/ (technical specifications by compute
# capability). CDNA3: 4 SIMDs of 8 waves, 512 registers per lane each:
# https://rocm.docs.amd.com/en/latest/reference/gpu-arch-specs.html. Latencies and the second
# cache's fetch granularity of H100 and MI300X: sample results of https://github.com/caps-tum/mt4g (834 cycles at 1.98
# GHz, 32 B; 900 at 2.1 GHz, 128 B).
LIMITS = {
    "NVIDIA": Limits(64, 32, 65_536, 8, 1024, 834.0, 32, 255),
    "AMD": Limits(32, 32, 4 * 512 * 64, 8, 0, 900.0, 128, 512),
}
_OTHER_REGISTERS = 64  # of a thread, besides its accumulators, where no compiler was asked
_CLOCK_HERTZ = 1.9e9  # where the data file names none
_SHARED_BYTES_PER_CYCLE = 128  # that a unit reads of its shared memory, of both vendors (sources as above)
_LOADED_BYTES = 64  # that a thread has on its way where no tile tells: four loads of 16 bytes


@dataclass(frozen=True)
class LaunchShape:
    """One launch, as far as its time depends on the tiling.

    blocks: thread blocks that have work. moved_bytes: from and to main memory, all blocks together; cached_bytes: read
    again, from the cache that all units share. flops: of whole tiles, padding included; operand_bytes: that feed them
    from shared memory, of all blocks. flight_bytes: that one block has on its way at once.
    staged: whether a block loads the next tiles while it computes. matrix: whether the matrix cores do it.
    """

    blocks: float
    warps: int
    moved_bytes: float
    cached_bytes: float
    flops: float
    operand_bytes: float
    flight_bytes: float
    shared_bytes: int
    registers: int
    staged: bool = True
    matrix: bool = True


def resident_blocks(shape: LaunchShape, hardware: HardwareProfile) -> int:
    """Blocks that one unit holds at once, by warps, registers and shared memory; at least 1: what is compiled fits."""
    limits = _limits(hardware)
    registers = -(-max(shape.registers, 1) // limits.step) * limits.step * hardware.warp_size * shape.warps
    fitting = [limits.blocks, limits.warps // shape.warps, limits.registers // registers]
    if hardware.shared_memory_bytes and shape.shared_bytes:
        fitting.append(int(hardware.shared_memory_bytes // (shape.shared_bytes + limits.reserved_bytes)))
    return max(1, min(fitting))


def launch_seconds(shape: LaunchShape, hardware: HardwareProfile, dtype: str) -> float:
    """Seconds of one launch: its waves of blocks, each the longest of moving and computing.

    Memory gives its bandwidth only where enough bytes are on their way (Little's law: bytes in flight over latency).
    A wave computes as long as its busiest unit, which has ceil(blocks / units) of it. The last wave may be short.
    """
    if shape.blocks <= 0:
        return 0.0
    limits, units = _limits(hardware), hardware.compute_units
    clock = hardware.clock_hertz or _CLOCK_HERTZ
    latency = limits.latency_cycles / clock
    each = resident_blocks(shape, hardware)
    resident = units * each
    rate = _flops_per_second(hardware, dtype if shape.matrix else "float32") / units

    def wave(blocks: float) -> float:
        share = blocks / shape.blocks
        loaded = share * (shape.moved_bytes + shape.cached_bytes)
        moving = max(
            share * shape.moved_bytes / main_bandwidth(hardware),
            loaded / _cache_bandwidth(hardware),
            loaded * latency / (blocks * shape.flight_bytes),
        )
        busiest = math.ceil(blocks / units) / shape.blocks
        feeding = shape.operand_bytes / (_SHARED_BYTES_PER_CYCLE * clock)
        computing = busiest * max(shape.flops / rate, feeding)
        # A lone block that does not load ahead waits for each tile, then computes; several hide it for each other.
        return max(moving, computing) if shape.staged or each > 1 else moving + computing

    full, rest = divmod(shape.blocks, resident)
    waves = full + (rest > 0)
    seconds = full * wave(resident) + (wave(rest) if rest else 0.0)
    return latency * (1 + (waves - 1) / each) + seconds  # the next wave's first loads hide behind what still runs


def _limits(hardware: HardwareProfile) -> Limits:
    return LIMITS.get(hardware.vendor, LIMITS["NVIDIA"])


def _cache_bandwidth(hardware: HardwareProfile) -> float:
    """Of the cache that all units share, never less than main memory's."""
    cache, main = hardware.memory[0], main_bandwidth(hardware)
    return max(cache.achieved_bandwidth_bytes_per_second or cache.peak_bandwidth_bytes_per_second or main, main)


def _flops_per_second(hardware: HardwareProfile, dtype: str) -> float:
    for rates in (hardware.achieved_flops_per_second, hardware.peak_flops_per_second):
        for name, rate in rates.items():
            if name == dtype:
                return rate
    return max(hardware.peak_flops_per_second.values())


@dataclass(frozen=True)
class Product:
    """One matrix product over the rows of each expert: tiles of m rows, n columns and k of the inner dimension.

    columns: of the output, before gate and up are joined; inner: what is summed over; written: values of a token's
    result. group: row blocks that pass the same weights together.
    """

    m: int
    n: int
    k: int
    columns: int
    inner: int
    written: int
    group: int


def expert_products(kernel: str, problem: Problem, tiling: Mapping[str, int]) -> tuple[Product, Product]:
    """The two products of a kernel of experts: gate and up, then down."""
    hidden, width = problem.config.hidden_size, problem.config.moe_intermediate_size
    if kernel == "experts":
        rows, group = tiling["BLOCK_M"], tiling["GROUP_M"]
        first = Product(rows, 2 * tiling["BLOCK_N"], tiling["BLOCK_K"], 2 * width, hidden, width, group)
        return first, Product(rows, tiling["DOWN_N"], tiling["DOWN_K"], hidden, width, hidden, group)
    m, n, k, group = (
        tiling[f"{name}_SIZE_{axis}"] for name, axis in zip(("BLOCK",) * 3 + ("GROUP",), "MNKM", strict=True)
    )
    return Product(m, n, k, 2 * width, hidden, 2 * width, group), Product(m, n, k, hidden, width, hidden, group)


def product_shape(
    product: Product,
    loads: Sequence[Sequence[int]],
    dtype: str,
    tiling: Mapping[str, int],
    hardware: HardwareProfile,
    program: Program | None = None,
) -> LaunchShape:
    """The launch of a product, mean over forwards with these loads (tokens of each expert, the skip expert's last).

    A row block reads all weights of its expert. Where the largest cache holds these, the expert's first block reads
    them from memory and the others from the cache; where it does not, so does the first of those that pass a column at
    the same time: a group's, or all that are resident. Every column of blocks reads the rows again. Rows of a tile
    that are narrower than what the cache fetches at once cost a whole fetch.
    """
    size, p, limits = DTYPE_BYTES[dtype], product, _limits(hardware)
    hit = [[-(-n // p.m) for n in row[:-1] if n] for row in loads]  # row blocks of the experts that are hit
    tokens = statistics.fmean(sum(row[:-1]) for row in loads)
    rows = statistics.fmean(map(sum, hit))
    columns = -(-p.columns // p.n)
    vector, stages, warps = p.m == 1, tiling["num_stages"], tiling["num_warps"]
    ahead = max(1, stages - 1)
    tile = ((0 if vector else p.m) + p.n) * p.k * size
    held = 0 if vector and stages == 1 else tile * (ahead if hardware.vendor == "AMD" else stages)
    accumulators = 0 if vector else p.m * p.n // (warps * hardware.warp_size)
    shape = LaunchShape(
        blocks=rows * columns,
        warps=warps,
        moved_bytes=0.0,
        cached_bytes=0.0,
        flops=2 * rows * p.m * columns * p.n * p.inner,
        operand_bytes=0 if vector else rows * columns * (p.m + p.n) * p.inner * size,
        flight_bytes=min(ahead, -(-p.inner // p.k)) * tile,
        shared_bytes=program.shared_bytes if program else held,
        registers=program.registers if program else min(accumulators + _OTHER_REGISTERS, limits.most_registers),
        staged=stages > 1,
        matrix=not vector,
    )
    weights = p.columns * p.inner * size
    together = max(p.group, hardware.compute_units * resident_blocks(shape, hardware) // columns)
    if weights <= max(level.capacity_bytes for level in hardware.memory[:-1] or hardware.memory):
        passes = statistics.fmean(map(len, hit))
    else:
        passes = statistics.fmean(sum(-(-n // together) for n in row) for row in hit)
    fetched = max(1.0, limits.fetch_bytes / (p.k * size))
    again = (rows - passes) * weights + tokens * (columns - 1) * p.inner * size
    moved = passes * weights + tokens * (p.inner + p.written) * size
    return replace(shape, moved_bytes=moved, cached_bytes=again * fetched)


def general_shape(
    grid: int, moved_bytes: float, flops: float, tiling: Mapping[str, int], program: Program | None
) -> LaunchShape:
    """A launch of which only its blocks and its least traffic are known: what its tiles reread is not.

    Staged tiles lie in shared memory, which therefore tells what is on its way; without any, `_LOADED_BYTES` a thread.
    """
    warps, shared = tiling.get("num_warps", 4), program.shared_bytes if program else 0
    return LaunchShape(
        blocks=grid,
        warps=warps,
        moved_bytes=moved_bytes,
        cached_bytes=0.0,
        flops=flops,
        operand_bytes=0.0,
        flight_bytes=max(shared, warps * 32 * _LOADED_BYTES),
        shared_bytes=shared,
        registers=program.registers if program else 64,
        staged=tiling.get("num_stages", 1) > 1,
        matrix=program is None or bool(program.matrix_instructions),
    )


_PRODUCTS = {"experts": (-2, -1), "grouped_experts": (1, 3)}  # places of the two products among a call's launches


def predicted_seconds(
    kernel: str,
    problem: Problem,
    dtype: str,
    tiling: Mapping[str, int],
    hardware: HardwareProfile,
    *,
    grids: Sequence[int],
    moved_bytes: float,
    flops: float,
    loads: Sequence[Sequence[int]] = (),
    programs: Sequence[Program] = (),
) -> float | None:
    """Seconds of a call in a replayed graph; None where its launches are not known.

    grids: thread blocks of each launch. moved_bytes, flops: what any call must do. loads: see `product_shape`.
    programs: what the compiler made of each launch; () where it was not asked.
    """
    if not grids:
        return None
    compiled: list[Program | None] = list(programs) if len(programs) == len(grids) else [None] * len(grids)
    nodes = len(grids) * hardware.graph_node_seconds
    if kernel in _PRODUCTS and any(sum(row[:-1]) for row in loads):
        shapes = [
            product_shape(product, loads, dtype, tiling, hardware, compiled[place])
            for product, place in zip(expert_products(kernel, problem, tiling), _PRODUCTS[kernel], strict=True)
        ]
    else:  # the launch with the most blocks does it; others join or split what it does
        main = max(range(len(grids)), key=lambda place: grids[place])
        shapes = [general_shape(grids[main], moved_bytes, flops, tiling, compiled[main])]
    return nodes + sum(launch_seconds(shape, hardware, dtype) for shape in shapes)
