"""Linear layers on a GPU: padded tiles in waves over the compute units, split-K, weights streamed from memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hardware.profile import HardwareProfile
from perfmodel.kernels.call import Array, Gemm, Parts
from perfmodel.precision import arithmetic_dtype, stored_bytes

_ROWS_COLUMNS = ((64, 64), (64, 128), (128, 128), (128, 192), (128, 256), (256, 128))  # tiles a library picks from
_SPLITS = (1, 2, 4, 8)  # parts of k whose sums are added afterwards
_OUTPUT_BYTES = 2.0
_CACHE_OVER_MAIN = 2.5  # L2 against main memory where a profile has no achieved figure; 2.2 (H200) to 3.9 (MI300X)
_TYPICAL_ACHIEVED = 0.9  # of the peak bandwidth, where a profile has no achieved figure; 0.87 to 0.95 (BabelStream dot)


@dataclass(frozen=True)
class GemmKernels:
    """Fitted numbers of the linear layers, relative to what a profile says its device achieves.

    The time is launches + max(weights and activations over bandwidth, waves of padded tiles over FLOP/s), the maximum
    rounded by `serial_share`, for the best tile and split-K of a short menu, as a library's heuristic picks them. Each
    choice is monotone in m, n and k, hence their minimum is.
    """

    compute_share: float = 1.12  # of the achieved FLOP/s, by the largest tile in whole waves
    memory_share: float = 0.877  # of the achieved bandwidth
    tile_edge: float = 15.7  # elements: a tile of a x b costs a * b + tile_edge * (a + b), for its operands are loaded
    wave_seconds: float = 1.3e-6  # filling and draining the pipeline of each wave
    busy_units_share: float = 0.37  # of the compute units that must stream weights to saturate main memory
    partial_sums_share: float = 1.8  # rate at which split-K's sums are written and read, over the achieved bandwidth
    serial_share: float = 0.02  # of memory and arithmetic that do not overlap: 0 is the maximum, 1 the sum
    launch_nodes: float = 2.7  # launch, first bytes and tail of a kernel, in graph nodes of the device
    quantise_nodes: float = 2.5  # of the kernel that quantises activations, beyond its bytes
    narrow_share: float = 0.92  # of compute_share, for activations below 16 bits
    widened_share: float = 0.83  # of compute_share, for weights widened in registers
    amd_compute_share: float = 0.9  # of compute_share
    amd_memory_share: float = 1.1  # of memory_share

    def time(self, call: Gemm, hardware: HardwareProfile) -> Parts:
        """Seconds of the call inside a graph; UserError where the device cannot multiply these dtypes."""
        m, n, k = (np.asarray(size, dtype=float) for size in (call.m, call.n, call.k))
        narrow = stored_bytes(call.activations) < stored_bytes("bfloat16")
        weights = n * k * stored_bytes(call.weights)
        others = m * k * stored_bytes(call.activations) + m * n * _OUTPUT_BYTES
        main = self._bandwidth(hardware)
        rate = main if call.cold else self._cached(hardware, weights + others)
        per_unit = self._flops_per_second(call, hardware) / hardware.compute_units
        shape = np.broadcast(m, n, k).shape
        best, memory, compute = np.full(shape, np.inf), np.zeros(shape), np.zeros(shape)
        extra = np.zeros(shape)
        largest = 256 * 128
        edge_of_largest = 1 + self.tile_edge * (256 + 128) / largest
        for rows, columns in _ROWS_COLUMNS:
            cost = (rows * columns + self.tile_edge * (rows + columns)) / edge_of_largest
            tiles = np.ceil(m / rows) * np.ceil(n / columns)
            for split in (1,) if narrow and hardware.vendor == "NVIDIA" else _SPLITS:
                waves = np.ceil(tiles * split / hardware.compute_units)
                streaming = np.maximum(1.0, n / columns) * split / (hardware.compute_units * self.busy_units_share)
                bytes_seconds = (weights / np.minimum(1.0, streaming) + others) / rate
                flops_seconds = waves * (2 * cost * k / split / per_unit)
                sums = 0.0 if split == 1 else split * m * n * 8 / (main * self.partial_sums_share)
                added = waves * self.wave_seconds + sums
                total = _rounded_maximum(bytes_seconds, flops_seconds, self.serial_share) + added
                better = total < best
                best = np.where(better, total, best)
                memory = np.where(better, bytes_seconds, memory)
                compute = np.where(better, flops_seconds, compute)
                extra = np.where(better, added, extra)
        waited = best - extra
        of_memory = memory**2 / (memory**2 + compute**2)
        overhead = extra + self.launch_nodes * hardware.graph_node_seconds
        quantise = np.zeros(shape)
        if narrow and call.quantise:
            overhead = overhead + self.quantise_nodes * hardware.graph_node_seconds
            quantise = m * k * (_OUTPUT_BYTES + stored_bytes(call.activations)) / main + quantise
        return Parts(waited * of_memory + quantise, waited * (1 - of_memory), overhead)

    def _bandwidth(self, hardware: HardwareProfile) -> float:
        level = hardware.main_memory
        peak = level.peak_bandwidth_bytes_per_second
        assert peak is not None  # a profile without it is refused when it is read
        achieved = level.achieved_bandwidth_bytes_per_second or _TYPICAL_ACHIEVED * peak
        return min(peak, achieved * self.memory_share * (self.amd_memory_share if hardware.vendor == "AMD" else 1.0))

    def _cached(self, hardware: HardwareProfile, size_bytes: Array) -> Array:
        """The rate of the first level that holds the call's bytes, which are used again and again."""
        main = self._bandwidth(hardware)
        found = np.full(size_bytes.shape, main)
        for level in reversed(hardware.memory[:-1]):
            achieved = level.achieved_bandwidth_bytes_per_second
            rate = _CACHE_OVER_MAIN * main if achieved is None else achieved * self.memory_share
            peak = level.peak_bandwidth_bytes_per_second or np.inf
            found = np.where(size_bytes <= level.capacity_bytes, np.maximum(found, min(rate, peak)), found)
        return found

    def _flops_per_second(self, call: Gemm, hardware: HardwareProfile) -> float:
        dtype = arithmetic_dtype(hardware, call.weights, call.activations)
        peaks = {str(name): rate for name, rate in hardware.peak_flops_per_second.items()}
        achieved = {str(name): rate for name, rate in hardware.achieved_flops_per_second.items()}
        if dtype not in achieved:  # the device's usual distance from its peaks
            usual = float(np.mean([rate / peaks[name] for name, rate in achieved.items()])) if achieved else 0.75
            achieved[dtype] = peaks[dtype] * usual
        share = self.compute_share
        if stored_bytes(call.activations) < stored_bytes("bfloat16"):
            share *= self.narrow_share
        elif stored_bytes(call.weights) < stored_bytes(call.activations):
            share *= self.widened_share
        if hardware.vendor == "AMD":
            share *= self.amd_compute_share
        return min(peaks[dtype], achieved[dtype] * share)


def _rounded_maximum(a: Array, b: Array, together: float) -> Array:
    """Between the maximum (together = 0) and the sum (1) of two times; monotone in both."""
    found: Array = 0.5 * (a + b + np.sqrt((a - b) ** 2 + 4 * together * a * b))
    return found


def bound(call: Gemm, hardware: HardwareProfile) -> Array:
    """Seconds below which the call cannot be at datasheet peaks: its FLOPs, or its weights from where they lie.

    Cold weights come from main memory. Weights in use again and again come from there as far as the caches together
    cannot hold them. Activations and outputs may stay in caches, and are left out.
    """
    m, n, k = (np.asarray(size, dtype=float) for size in (call.m, call.n, call.k))
    peak = hardware.peak_flops_per_second
    dtype = arithmetic_dtype(hardware, call.weights, call.activations)
    found: Array = 2 * m * n * k / {str(name): rate for name, rate in peak.items()}[dtype]
    weights = n * k * stored_bytes(call.weights)
    held = 0.0
    for level in hardware.memory:
        rate: npt.ArrayLike | None = level.peak_bandwidth_bytes_per_second
        if rate is not None:
            outside = 0.0 if call.cold else held
            found = np.maximum(found, np.maximum(0.0, weights - outside) / np.asarray(rate))
        held += level.capacity_bytes
    return found
