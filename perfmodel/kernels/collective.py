"""Collectives over the devices of one node: a latency and a bandwidth, and what their pipeline adds to both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hardware.files import UserError, known
from hardware.profile import HardwareProfile, Interconnect
from perfmodel.kernels.call import Array, Collective, Parts, floats, require_positive
from runtime.config import require

KINDS = ("all_reduce", "all_to_all")


def _link(call: Collective, hardware: HardwareProfile) -> Interconnect:
    link = hardware.interconnect
    if link is None:
        raise UserError(f"profile {hardware.name} names no interconnect, so nothing can be computed across devices")
    if call.kind not in KINDS:
        raise known("collective", call.kind, KINDS)
    most = float(np.max(call.devices))
    require(most <= link.devices, f"devices <= {link.devices} of a node's {link.name} must hold, but got {most:g}")
    return link


def _share_of_links(link: Interconnect, devices: Array) -> Array:
    """What of a device's links leads to so many peers: all of them behind a switch, a pair's each in a mesh."""
    if link.pair_bandwidth_bytes_per_second is None:
        return np.ones_like(devices)
    pairs = np.maximum(devices - 1, 1) * link.pair_bandwidth_bytes_per_second
    return np.minimum(pairs / link.peak_bandwidth_bytes_per_second, 1.0)


def bound(call: Collective, hardware: HardwareProfile) -> Array:
    """Seconds in which every device sends what it must, at its links' peak in one direction.

    all_reduce: its own data once, even where the switch sums. all_to_all: all but what it keeps.
    """
    link = _link(call, hardware)
    devices, size = floats(call.devices, call.size_bytes)
    sent = size * np.where(devices > 1, 1.0, 0.0)
    if call.kind == "all_to_all":
        sent = sent * (devices - 1) / devices
    return np.asarray(sent / (link.peak_bandwidth_bytes_per_second * _share_of_links(link, devices)), dtype=float)


@dataclass(frozen=True)
class CollectiveKernels:
    """latency + transfer + pipeline * sqrt(latency * transfer): a message cut into pieces fills and drains its path.

    latency = latency_share * the profile's, which is of two devices, and hop_seconds for every doubling of them.
    transfer = bus bytes / (bandwidth_share * the profile's achieved figure); a sum has 2 (n - 1) / n of the size.
    custom_*: the same of an engine's own kernel, in which every device reads its peers' memory in one or two passes;
    it is used where it is faster.
    """

    latency_share: float
    hop_seconds: float
    pipeline: float
    bandwidth_share: float
    custom_latency_share: float
    custom_hop_seconds: float
    custom_pipeline: float
    custom_bandwidth_share: float

    def __post_init__(self) -> None:
        require_positive(self)

    def time(self, call: Collective, hardware: HardwareProfile) -> Parts:
        """Seconds of the call; nothing on one device. Arrays broadcast."""
        link = _link(call, hardware)
        devices, size = np.broadcast_arrays(*floats(call.devices, call.size_bytes))
        several = np.maximum(devices, 2.0)
        passes = 2 if call.kind == "all_reduce" else 1
        peak = link.peak_bandwidth_bytes_per_second
        transfer = passes * (several - 1) / several * size / (link.achieved_bandwidth_bytes_per_second or peak)
        transfer = transfer / _share_of_links(link, several)
        first = link.latency_seconds
        if first is None:
            raise UserError(f"profile {hardware.name}: interconnect.latency_seconds must be given to time a collective")
        doublings = np.log2(several / 2)
        sums = _pipelined(
            first * self.latency_share + self.hop_seconds * doublings, transfer / self.bandwidth_share, self.pipeline
        )
        if call.custom:
            own = _pipelined(
                first * self.custom_latency_share + self.custom_hop_seconds * doublings,
                transfer / self.custom_bandwidth_share,
                self.custom_pipeline,
            )
            faster = own[0] + own[1] < sums[0] + sums[1]
            sums = np.where(faster, own[0], sums[0]), np.where(faster, own[1], sums[1])
        alone = devices <= 1
        moved = np.maximum(np.where(alone, 0.0, sums[1]), bound(call, hardware))
        return Parts(moved, np.zeros_like(moved), np.where(alone, 0.0, sums[0]))


def _pipelined(latency: Array, transfer: Array, pipeline: float) -> tuple[Array, Array]:
    return latency, transfer + pipeline * np.sqrt(latency * transfer)


START = CollectiveKernels(
    latency_share=1.0,
    hop_seconds=5e-6,
    pipeline=1.0,
    bandwidth_share=1.0,
    custom_latency_share=0.6,
    custom_hop_seconds=1e-6,
    custom_pipeline=1.0,
    custom_bandwidth_share=0.9,
)
