"""Kernels that only move data: norms, activations, rotary embeddings, gathers, samplers. Bytes and launches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hardware.profile import HardwareProfile
from perfmodel.kernels.call import Array, Parts, main_bandwidth
from runtime.config import require


@dataclass(frozen=True)
class Elementwise:
    """`launches` kernels that together move `size_bytes`, read and written; `set_bytes` live at a time (None: all)."""

    size_bytes: npt.ArrayLike
    launches: npt.ArrayLike = 1.0
    set_bytes: npt.ArrayLike | None = None


@dataclass(frozen=True)
class ElementwiseKernels:
    """launches * fixed + bytes / rate: the achieved bandwidth of main memory for what the caches cannot hold.

    node_share: fixed seconds of a kernel over the profile's seconds per graph node, which include the gap to the
    kernel before. bandwidth_share: of that bandwidth, for bytes that the caches together hold; more than 1 where what
    the kernel before wrote is still there. No more than 1 of it counts for what is beyond the caches.
    """

    node_share: float
    bandwidth_share: float

    def __post_init__(self) -> None:
        for name in ("node_share", "bandwidth_share"):
            value = getattr(self, name)
            require(value > 0, f"{name} > 0 must hold, but got {value}")

    def time(self, call: Elementwise, hardware: HardwareProfile) -> Parts:
        """Seconds on a device. Arrays broadcast."""
        rate, size = main_bandwidth(hardware), np.asarray(call.size_bytes, dtype=float)
        beyond = _beyond_caches(call, hardware)
        moved = (size - beyond) / (rate * self.bandwidth_share) + beyond / (rate * min(self.bandwidth_share, 1.0))
        fixed = np.asarray(call.launches, dtype=float) * (self.node_share * hardware.graph_node_seconds)
        return Parts(moved, np.zeros(()), fixed)


START = ElementwiseKernels(node_share=3.0, bandwidth_share=1.0)  # a launch, a load and a store; a plain stream
PRIOR = 0.5  # few rows show them


def _beyond_caches(call: Elementwise, hardware: HardwareProfile) -> Array:
    """Bytes that the caches together cannot hold: the same share of all as of those that live at a time."""
    size = np.asarray(call.size_bytes, dtype=float)
    lives = size if call.set_bytes is None else np.asarray(call.set_bytes, dtype=float)
    held = sum(level.capacity_bytes for level in hardware.memory[:-1])
    if lives.size and float(lives.max()) <= held:
        return np.zeros(())  # a common case, and less to calculate over a grid
    return size * (1 - np.minimum(1.0, held / np.maximum(lives, 1.0)))


def bound(call: Elementwise, hardware: HardwareProfile) -> Array:
    """Seconds of the bytes that the caches together cannot hold, at the main memory's datasheet peak."""
    peak = hardware.main_memory.peak_bandwidth_bytes_per_second
    assert peak is not None  # a profile without it is refused when it is read
    return _beyond_caches(call, hardware) / peak
