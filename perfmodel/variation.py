"""One operating point's setting with one quantity scaled: what sensitivities are differences of."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from hardware.profile import Curves, HardwareProfile, MemoryLevel
from perfmodel.decoding import Setting
from perfmodel.engine import HostCosts
from perfmodel.experts import ExpertCoverage
from perfmodel.kernels.call import Array
from perfmodel.kernels.library import CLASSES, Library
from perfmodel.roofline import Device

T = TypeVar("T")


def on_hardware(at: Setting, hardware: HardwareProfile, library: Library | None = None) -> Setting:
    """The same setting on another device, with the same kernels (or those of `library`)."""
    device = Device(hardware, at.precision.head, at.kernels.threads)
    device.library = library or at.device.library
    return replace(at, device=device)


def scale_memory(hardware: HardwareProfile, factor: float, *, caches: bool = False) -> HardwareProfile:
    """Main memory (or the caches) with `factor` times the bandwidth, datasheet's and achieved; a probed curve whole."""

    def faster(level: MemoryLevel) -> MemoryLevel:
        peak, achieved = level.peak_bandwidth_bytes_per_second, level.achieved_bandwidth_bytes_per_second
        return replace(
            level,
            peak_bandwidth_bytes_per_second=peak and peak * factor,
            achieved_bandwidth_bytes_per_second=achieved and achieved * factor,
        )

    def curves(c: Curves) -> Curves:
        return replace(
            c, bandwidth=tuple(replace(p, bytes_per_second=p.bytes_per_second * factor) for p in c.bandwidth)
        )

    main = len(hardware.memory) - 1
    return replace(
        hardware,
        memory=tuple(faster(m) if (i < main) == caches else m for i, m in enumerate(hardware.memory)),
        measured=tuple(map(curves, hardware.measured)),
    )


def scale_arithmetic(hardware: HardwareProfile, factor: float) -> HardwareProfile:
    """All FLOPs per second times `factor`; the seconds of probed matmuls divided by it."""
    return replace(
        hardware,
        peak_flops_per_second={d: rate * factor for d, rate in hardware.peak_flops_per_second.items()},
        achieved_flops_per_second={d: rate * factor for d, rate in hardware.achieved_flops_per_second.items()},
        measured=tuple(
            replace(c, matmul=tuple(replace(p, seconds=p.seconds / factor) for p in c.matmul))
            for c in hardware.measured
        ),
    )


def scale_interconnect(hardware: HardwareProfile, factor: float) -> HardwareProfile:
    """`factor` times the bandwidth between devices; the latency stays."""
    link = hardware.interconnect
    if link is None:
        return hardware
    achieved, pair = link.achieved_bandwidth_bytes_per_second, link.pair_bandwidth_bytes_per_second
    changed = replace(
        link,
        peak_bandwidth_bytes_per_second=link.peak_bandwidth_bytes_per_second * factor,
        achieved_bandwidth_bytes_per_second=achieved and achieved * factor,
        pair_bandwidth_bytes_per_second=pair and pair * factor,
    )
    return replace(hardware, interconnect=changed)


def scale_overhead(at: Setting, factor: float) -> Setting:
    """Launches, gaps between graph nodes, kernels' fixed seconds, links' latency and host seconds times `factor`."""
    hardware = at.device.hardware
    link = hardware.interconnect
    changed = replace(
        hardware,
        launch_seconds=hardware.launch_seconds * factor,
        graph_node_seconds=hardware.graph_node_seconds * factor,
        interconnect=link and replace(link, latency_seconds=link.latency_seconds and link.latency_seconds * factor),
        measured=tuple(replace(c, elementwise_seconds=c.elementwise_seconds * factor) for c in hardware.measured),
    )
    hosts = {name: _longer_host(costs, factor) for name, costs in at.engine.hosts.items()}
    library = at.device.library and _longer_kernels(at.device.library, factor)
    return replace(on_hardware(at, changed, library), engine=replace(at.engine, hosts=hosts))


def _longer_host(costs: HostCosts, factor: float) -> HostCosts:
    kinds = {kind: seconds * factor for kind, seconds in costs.forwards.items()}
    return replace(_longer(costs, factor), forwards=kinds)


def _longer_kernels(library: Library, factor: float) -> Library:
    return replace(library, **{family: _longer(getattr(library, family), factor) for family in CLASSES})


def _longer(numbers: T, factor: float) -> T:
    """A dataclass with every number of seconds times `factor`."""
    seconds = {f.name: getattr(numbers, f.name) * factor for f in fields(numbers) if f.name.endswith("_seconds")}  # type: ignore[arg-type]
    return replace(numbers, **seconds)  # type: ignore[type-var]


@dataclass(frozen=True)
class _ScaledCoverage(ExpertCoverage):
    factor: float = 1.0

    def distinct(self, batch: npt.ArrayLike, slots: npt.ArrayLike, experts: int, per_token: int = 1) -> Array:
        return np.minimum(self.factor * super().distinct(batch, slots, experts, per_token), experts)


def scale_coverage(coverage: ExpertCoverage, factor: float) -> ExpertCoverage:
    """Coverage that reads `factor` times the experts, up to all of them."""
    own = {field.name: getattr(coverage, field.name) for field in fields(ExpertCoverage)}
    return _ScaledCoverage(**own, factor=factor)
