"""Kernels that only move data: norms, activations, rotary embeddings, gathers, samplers. Bytes and launches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hardware.profile import HardwareProfile
from perfmodel.kernels.call import Parts
from runtime.config import require


@dataclass(frozen=True)
class Elementwise:
    """`launches` kernels that together move `size_bytes`, read and written."""

    size_bytes: npt.ArrayLike
    launches: npt.ArrayLike = 1.0


@dataclass(frozen=True)
class ElementwiseKernels:
    """launches * fixed + bytes / (share * achieved bandwidth of main memory).

    node_share: fixed seconds of a kernel over the profile's seconds per graph node, which include the gap to the
    kernel before. bandwidth_share: more than 1 where what the kernel before wrote is still in a cache.
    """

    node_share: float
    bandwidth_share: float

    def __post_init__(self) -> None:
        for name in ("node_share", "bandwidth_share"):
            value = getattr(self, name)
            require(value > 0, f"{name} > 0 must hold, but got {value}")

    def time(self, call: Elementwise, hardware: HardwareProfile) -> Parts:
        """Seconds on a device. Arrays broadcast."""
        memory = hardware.main_memory
        rate = memory.achieved_bandwidth_bytes_per_second or memory.peak_bandwidth_bytes_per_second
        assert rate is not None  # a profile without a peak is refused when it is read
        moved = np.maximum(
            np.asarray(call.size_bytes, dtype=float) / (rate * self.bandwidth_share), bound(call, hardware)
        )
        fixed = np.asarray(call.launches, dtype=float) * (self.node_share * hardware.graph_node_seconds)
        return Parts(moved, np.zeros(()), fixed)


START = ElementwiseKernels(node_share=3.0, bandwidth_share=1.0)  # a launch, a load and a store; a plain stream
PRIOR = 0.5  # few rows show them


def bound(call: Elementwise, hardware: HardwareProfile) -> npt.NDArray[np.float64]:
    """Seconds of the bytes that the caches together cannot hold, at the main memory's datasheet peak."""
    peak = hardware.main_memory.peak_bandwidth_bytes_per_second
    assert peak is not None  # a profile without it is refused when it is read
    held = sum(level.capacity_bytes for level in hardware.memory[:-1])
    return np.maximum(0.0, np.asarray(call.size_bytes, dtype=float) - held) / peak
