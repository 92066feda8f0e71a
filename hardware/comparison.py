"""Devices side by side: what a list shows of each, and every figure of several under the same name."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from hardware.files import UserError
from hardware.profile import DType, HardwareProfile, list_profiles, load_profile, user_folder

# Figures in the order of the bundled files.
_GROUPS = (
    *("compute_units", "warp_size", "shared_memory_bytes", "clock_hertz", "peak_flops_per_second"),
    *("achieved_flops_per_second", "memory", "launch_seconds", "graph_node_seconds", "interconnect", "tdp_watts"),
    "price_dollars_per_hour",
)
_OF_LEVELS_AND_LINKS = (
    *("devices", "capacity_bytes", "reported_bytes", "peak_bandwidth_bytes_per_second"),
    *("pair_bandwidth_bytes_per_second", "achieved_bandwidth_bytes_per_second", "latency_seconds"),
)


@dataclass(frozen=True)
class Summary:
    """One line of `hardware list`. `ridge` is FLOPs per byte of main memory above which bfloat16 is compute bound."""

    path: str
    origin: str  # "bundled" or "user"
    vendor: str
    kind: str
    memory_bytes: float
    bandwidth_bytes_per_second: float
    bfloat16_flops_per_second: float | None
    ridge_flops_per_byte: float | None


def known_profiles() -> tuple[dict[str, HardwareProfile], list[str]]:
    """The known profiles by name, and what is wrong with each file that breaks a rule: the others still work."""
    found, broken = {}, []
    for name in sorted(list_profiles()):
        try:
            found[name] = load_profile(name)
        except UserError as error:
            broken.append(str(error))
    return found, broken


def summary(profile: HardwareProfile, path: Path) -> Summary:
    """What a list shows, at datasheet peaks; a probed profile's peaks are the fastest samples it saw."""
    memory = profile.main_memory
    bandwidth = memory.peak_bandwidth_bytes_per_second
    assert bandwidth is not None  # a profile without it is refused when it is read
    bfloat16 = profile.peak_flops_per_second.get("bfloat16")
    return Summary(
        path=str(path),
        origin="user" if path.parent == user_folder() else "bundled",
        vendor=profile.vendor,
        kind=profile.kind,
        memory_bytes=memory.capacity_bytes,
        bandwidth_bytes_per_second=bandwidth,
        bfloat16_flops_per_second=bfloat16,
        ridge_flops_per_byte=bfloat16 / bandwidth if bfloat16 else None,
    )


def compared(profiles: dict[str, HardwareProfile]) -> dict[str, dict[str, float | None]]:
    """Each figure of any of the profiles: its value on each of them, None where one has no such figure.

    Main memory goes by "main" whatever a profile calls it, so that HBM stands beside GDDR. Probed curves are left out.
    """
    columns = {}
    for label, profile in profiles.items():
        main = f"memory.{profile.main_memory.name}."
        figures = {k: v for k, v in profile.figures().items() if not k.startswith("measured.")}
        columns[label] = {k.replace(main, "memory.main.", 1): v for k, v in figures.items()}
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    order = _order(profiles.values())
    names.sort(key=lambda name: [order[part] for part in name.split(".")])
    return {name: {label: column.get(name) for label, column in columns.items()} for name in names}


def own_figure(profile: HardwareProfile, name: str) -> str:
    """A figure's dotted path in its profile, from its name in `compared`."""
    return name.replace("memory.main.", f"memory.{profile.main_memory.name}.", 1)


def nearest(profile: HardwareProfile, others: Iterable[HardwareProfile]) -> HardwareProfile | None:
    """The device most like a profile by peak rates, memory bandwidth and capacity, each by its factor; None: no other.

    Peaks are compared where both have the dtype; one of another kind is taken only where there is none of its own.
    """

    def distance(other: HardwareProfile) -> tuple[bool, bool, float]:
        shared = set(profile.peak_flops_per_second) & set(other.peak_flops_per_second)
        peaks = [_far(profile.peak_flops_per_second[d], other.peak_flops_per_second[d]) for d in sorted(shared)]
        ours, theirs = profile.main_memory, other.main_memory
        capacity = _far(ours.capacity_bytes, theirs.capacity_bytes)
        bandwidth = _far(ours.peak_bandwidth_bytes_per_second, theirs.peak_bandwidth_bytes_per_second)
        return profile.kind != other.kind, not shared, capacity + bandwidth + sum(peaks) / max(1, len(peaks))

    return min((other for other in others if other.name != profile.name), key=distance, default=None)


def _far(one: float | None, other: float | None) -> float:
    assert one is not None and other is not None  # a profile without is refused when it is read
    return math.log(one / other) ** 2


def _order(profiles: Iterable[HardwareProfile]) -> dict[str, int]:
    """The place of each part of a figure's name, as in the bundled files; main memory stands after all caches."""
    caches = [level.name for profile in profiles for level in profile.memory[:-1]]
    words = (*_GROUPS, *get_args(DType), *caches, "main", *_OF_LEVELS_AND_LINKS)
    return {word: place for place, word in enumerate(dict.fromkeys(words))}
