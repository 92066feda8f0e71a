"""Linear layers on a GPU: padded tiles in waves over the compute units, split-K, weights streamed from memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hardware.profile import HardwareProfile
from perfmodel.kernels.call import (
    Array,
    Gemm,
    Parts,
    floats,
    main_bandwidth,
    matmul_rate,
    overlapped,
    require_positive,
    together,
)
from perfmodel.precision import arithmetic_dtype, stored_bytes

_OUTPUT_BYTES = 2.0
_MANY = 2000  # numbers of rows from which each distinct one is timed once, so many at a time: more leave the caches
# Rows and columns of a tile, and in how many parts of k it is summed: what a library's heuristic picks from.
_CHOICES = np.array(
    [(64, 64, 1), (64, 64, 2), (64, 64, 4), (64, 128, 1), (64, 128, 2), (64, 128, 4), (64, 128, 8), (128, 128, 1),
     (128, 128, 2), (128, 128, 4), (128, 192, 1), (128, 256, 1), (256, 128, 1)], dtype=float
)  # fmt: skip
_ROWS, _COLUMNS, _PARTS = _CHOICES.T
# The m up to which NVIDIA's kernels of 8 bits (CUTLASS, DeepGEMM) take a tile; they do not split k. Those of 4 bits
# take the largest tiles whatever m is: a published layer of 8192 x 8192 takes as long for 1 row as for 256.
_TILE = _ROWS * _COLUMNS
_8_BIT_M = np.select([_PARTS > 1, _TILE <= 64 * 64, _TILE <= 64 * 128], [0.0, 64.0, 128.0], np.inf)
_4_BIT_M = np.where(_TILE < 256 * 128, 0.0, np.inf)


@dataclass(frozen=True)
class GemmKernels:
    """Fitted numbers of linear layers, relative to what a profile says its device achieves.

    A layer takes a launch, and the longer of moving its bytes and multiplying padded tiles, in whole waves over the
    compute units: the least over a short menu of tiles and split-K, as a library's heuristic picks them. Every choice
    is monotone in m, n and k, hence the least is. Few columns of tiles keep too few bytes in flight to reach the
    device's bandwidth.

    compute_share, memory_share: of the achieved FLOP/s and bandwidth. tile_edge: elements; a tile of a x b costs
    a b + tile_edge (a + b), since its operands are loaded. wave_seconds: filling and draining a wave's pipelines.
    busy_units_share: of the compute units that must stream weights to saturate main memory. partial_sums_share: the
    rate of split-K's sums over main memory's. sharpness: how well bytes and arithmetic overlap (see `overlapped`).
    launch_nodes: launch, first bytes and tail, in the profile's seconds per graph node; quantise_nodes: the same of the
    kernel before that narrows activations. narrow_share, widened_share: what of compute_share remains with activations
    below 16 bits, and with weights that are widened in registers. amd_compute_share, amd_memory_share: factors on
    compute_share and memory_share on AMD devices.
    """

    compute_share: float
    memory_share: float
    tile_edge: float
    wave_seconds: float
    busy_units_share: float
    partial_sums_share: float
    sharpness: float
    launch_nodes: float
    quantise_nodes: float
    narrow_share: float
    widened_share: float
    amd_compute_share: float
    amd_memory_share: float

    def __post_init__(self) -> None:
        require_positive(self)

    def time(self, call: Gemm, hardware: HardwareProfile) -> Parts:
        """Seconds of the layer inside a graph. Arrays broadcast; UserError where the device lacks the dtypes."""
        rows = np.asarray(call.m, dtype=float)
        if rows.size > _MANY and np.ndim(call.n) == np.ndim(call.k) == 0:
            distinct, where = _distinct(rows)
            pieces = np.array_split(distinct, math.ceil(distinct.size / _MANY))
            parts = zip(*(self.time(replace(call, m=piece), hardware) for piece in pieces), strict=True)
            return Parts(*(np.concatenate(seconds)[where].reshape(rows.shape) for seconds in parts))
        m, n, k = floats(rows, call.n, call.k)
        memory, compute, extra = self._best(call, hardware, m, n, k)
        overhead = extra + self.launch_nodes * hardware.graph_node_seconds
        width = stored_bytes(call.activations)
        if width < _OUTPUT_BYTES and call.quantise:
            overhead = overhead + self.quantise_nodes * hardware.graph_node_seconds
            memory = memory + m * k * (_OUTPUT_BYTES + width) / self._bandwidth(hardware)
        return Parts(memory, compute, overhead)

    def _best(self, call: Gemm, hardware: HardwareProfile, *sizes: Array) -> tuple[Array, Array, Array]:
        """Memory, compute and added seconds of the quickest choice; choices stand on a first axis."""
        m, n, k = sizes
        rows, columns, splits, tile = (x.reshape(-1, *[1] * m.ndim) for x in (_ROWS, _COLUMNS, _PARTS, _TILE))
        width, units, main = stored_bytes(call.activations), hardware.compute_units, self._bandwidth(hardware)
        weights = n * k * stored_bytes(call.weights)
        others = m * k * width + m * n * _OUTPUT_BYTES
        rate = main if call.cold else self._cached(hardware, weights + others)
        # Continuous in n, so that a column more never brings a whole tile's bandwidth with it.
        streaming = np.maximum(1.0, n / columns) * splits / (units * self.busy_units_share)
        moving = (weights / np.minimum(1.0, streaming) + others) / rate
        waves = np.ceil(np.ceil(m / rows) * np.ceil(n / columns) * splits / units)
        cost = tile + self.tile_edge * (rows + columns)
        cost = cost * (tile / cost)[-1]  # so that the last and largest reaches the device's rate
        multiplying = waves * (2 * cost * k / splits / (self._flops_per_second(call, hardware) / units))
        sums = m * (np.where(splits > 1, splits, 0.0) * n * 8 / (main * self.partial_sums_share))
        added = waves * self.wave_seconds + sums
        total = together(moving, multiplying, self.sharpness) + added
        if width < _OUTPUT_BYTES and hardware.vendor == "NVIDIA":
            most = (_8_BIT_M if width >= 1 else _4_BIT_M).reshape(tile.shape)
            total = np.where(m <= most, total, np.inf)
        best = np.argmin(total, 0)
        of_all = np.empty((len(tile), 3, *best.shape))
        of_all[:, 0], of_all[:, 1], of_all[:, 2] = moving, multiplying, added
        chosen = of_all.reshape(len(tile), 3, -1)[best.ravel(), :, np.arange(best.size)]
        moving, multiplying, added = chosen.T.reshape(3, *best.shape)
        return *overlapped(moving, multiplying, self.sharpness), added

    def _bandwidth(self, hardware: HardwareProfile) -> float:
        share = self.memory_share * (self.amd_memory_share if hardware.vendor == "AMD" else 1.0)
        return main_bandwidth(hardware, share)

    def _cached(self, hardware: HardwareProfile, size_bytes: Array) -> Array:
        """The rate of bytes that are used again and again: that of the first level to hold them all."""
        found = np.full(size_bytes.shape, self._bandwidth(hardware))
        for level in reversed(hardware.memory[:-1]):
            if level.achieved_bandwidth_bytes_per_second is not None:
                rate = level.achieved_bandwidth_bytes_per_second * self.memory_share
                rate = min(rate, level.peak_bandwidth_bytes_per_second or np.inf)
                found = np.where(size_bytes <= level.capacity_bytes, np.maximum(found, rate), found)
        return found

    def _flops_per_second(self, call: Gemm, hardware: HardwareProfile) -> float:
        dtype = arithmetic_dtype(hardware, call.weights, call.activations)
        share = self.compute_share
        if stored_bytes(call.activations) < _OUTPUT_BYTES:
            share *= self.narrow_share
        elif stored_bytes(call.weights) < stored_bytes(call.activations):
            share *= self.widened_share
        if hardware.vendor == "AMD":
            share *= self.amd_compute_share
        peaks = {str(name): rate for name, rate in hardware.peak_flops_per_second.items()}
        return min(matmul_rate(hardware, dtype) * share, peaks[dtype])


def _distinct(rows: Array) -> tuple[Array, npt.NDArray[np.intp]]:
    """`np.unique` with its inverse, for whole numbers without sorting."""
    whole = rows.astype(np.intp)
    if not (whole == rows).all() or whole.max() > 100 * rows.size or whole.min() < 0:
        return np.unique(rows, return_inverse=True)
    seen = np.zeros(whole.max() + 1, bool)
    seen[whole] = True
    return np.flatnonzero(seen).astype(float), (np.cumsum(seen) - 1)[whole]


def bound(call: Gemm, hardware: HardwareProfile) -> Array:
    """Seconds below which the layer cannot be at datasheet peaks: its FLOPs, or its weights from where they lie.

    Cold weights come from main memory; weights used again and again as far as the caches together cannot hold them.
    Activations and outputs may stay in caches, and a kernel that quantises may be fused away: both are left out.
    """
    m, n, k = floats(call.m, call.n, call.k)
    dtype = arithmetic_dtype(hardware, call.weights, call.activations)
    peaks = {str(name): rate for name, rate in hardware.peak_flops_per_second.items()}
    found: Array = 2 * m * n * k / peaks[dtype]
    weights = n * k * stored_bytes(call.weights)
    inside = 0.0  # bytes that faster levels hold
    for level in hardware.memory:
        if level.peak_bandwidth_bytes_per_second is not None:
            outside = weights if call.cold else np.maximum(weights - inside, 0.0)
            found = np.maximum(found, outside / level.peak_bandwidth_bytes_per_second)
        inside += level.capacity_bytes
    return found


START = GemmKernels(
    compute_share=1.05,
    memory_share=0.9,
    tile_edge=20.0,
    wave_seconds=1e-6,
    busy_units_share=0.3,
    partial_sums_share=1.0,
    sharpness=4.0,
    launch_nodes=2.5,
    quantise_nodes=2.0,
    narrow_share=1.0,
    widened_share=0.9,
    amd_compute_share=1.0,
    amd_memory_share=1.0,
)
# How far (on a logarithmic scale) each may reasonably be from there: shares of measured rates least.
PRIOR = {
    "compute_share": 0.2,
    "memory_share": 0.2,
    "tile_edge": 0.7,
    "wave_seconds": 0.7,
    "busy_units_share": 0.5,
    "partial_sums_share": 0.7,
    "sharpness": 0.7,
    "launch_nodes": 0.7,
    "quantise_nodes": 0.7,
    "narrow_share": 0.2,
    "widened_share": 0.2,
    "amd_compute_share": 0.2,
    "amd_memory_share": 0.2,
}
