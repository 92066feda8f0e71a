"""A device as frozen data, read strictly from one YAML. Torch-free."""

from __future__ import annotations

import dataclasses
import importlib.resources
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from hardware.files import UserError, build_file, known, plain, refuse, write_atomic
from hardware.rules import figure_faults, name_faults, positive_faults, word_faults

DType = Literal["float32", "bfloat16", "float16", "fp8", "fp4", "int8"]


def check_name(name: str) -> None:
    """UserError unless a profile can be called so: it is the stem of its file."""
    refuse(name_faults(name))


@dataclass(frozen=True)
class MemoryLevel:
    """One level that all compute units share, or (on a CPU) the private caches of all cores together.

    `peak` is the datasheet's figure (None where the vendor states none and none can be derived), `achieved` what a
    read-dominated stream reached. They are never multiplied into each other.
    """

    name: str  # "l2", "infinity_cache", "hbm"; on a CPU "l2", "l3", "memory"
    capacity_bytes: float
    peak_bandwidth_bytes_per_second: float | None = None
    achieved_bandwidth_bytes_per_second: float | None = None
    reported_bytes: float | None = None  # what the driver says there is: vendors' "80 GB" may be less 80 GiB

    def __post_init__(self) -> None:
        refuse(self._faults())

    def _faults(self) -> Iterator[UserError]:
        yield from name_faults(self.name)
        bandwidths = ("peak_bandwidth_bytes_per_second", "achieved_bandwidth_bytes_per_second")
        yield from positive_faults(self, "capacity_bytes", *bandwidths, "reported_bytes")
        peak, achieved = self.peak_bandwidth_bytes_per_second, self.achieved_bandwidth_bytes_per_second
        if peak is not None and achieved is not None and achieved > peak:
            yield UserError(
                f"memory.{self.name}: achieved <= peak must hold, but got {achieved} and {peak}", place=bandwidths[1:]
            )


@dataclass(frozen=True)
class BandwidthPoint:
    """The rate of reading `working_set_bytes` again and again (bytes read, none written) in one long call.

    `spread` is half the interquartile range of the samples over their median.
    """

    working_set_bytes: float
    bytes_per_second: float
    spread: float = 0.0

    def __post_init__(self) -> None:
        refuse(positive_faults(self, "working_set_bytes", "bytes_per_second"))


@dataclass(frozen=True)
class MatmulPoint:
    """`batch` products [m, k] x [k, n] in one call: a linear layer, or for batch > 1 a batched matmul.

    `seconds` includes the call's dispatch on a CPU, and the gap between graph nodes on a GPU. The calls walk through
    copies of the weights that fill `working_set_bytes`, as the layers of a model do, so that a small matrix is not
    timed out of the first cache. `spread` is half the interquartile range of the samples over their median.
    """

    dtype: DType
    batch: int
    m: int
    k: int
    n: int
    seconds: float
    working_set_bytes: float
    spread: float = 0.0

    def __post_init__(self) -> None:
        refuse(positive_faults(self, "batch", "m", "k", "n", "seconds", "working_set_bytes"))

    @property
    def flops_per_second(self) -> float:
        """2 batch m k n over the seconds."""
        return 2 * self.batch * self.m * self.k * self.n / self.seconds


@dataclass(frozen=True)
class Curves:
    """What a probe measured with `threads` threads: the curves that a performance model interpolates.

    elementwise_seconds: one tiny elementwise operator of a chain, eager. linear_seconds: one tiny linear layer, eager.
    python_seconds: one call of a module that does nothing, the host's own cost.
    """

    threads: int
    elementwise_seconds: float
    linear_seconds: float
    python_seconds: float
    bandwidth: tuple[BandwidthPoint, ...]
    matmul: tuple[MatmulPoint, ...]

    def __post_init__(self) -> None:
        refuse(positive_faults(self, "threads", "elementwise_seconds", "linear_seconds", "python_seconds"))
        for name in ("bandwidth", "matmul"):
            if not getattr(self, name):
                raise UserError(f"{name} must have at least one point")


@dataclass(frozen=True)
class Interconnect:
    """What joins the devices of one node. Bandwidths are of one device in ONE direction (half of a bidirectional one).

    `peak` is all links of a device together, `pair` those to one peer where that is less (a mesh without a switch).
    `achieved` is the bus bandwidth of a large all-reduce over all devices as nccl-tests define it (2 (n - 1) / n times
    the size over the time); a switch that sums lets it pass the peak, but a device still sends and receives the size
    once, so it stays below twice the peak. `latency` is the time of a small all-reduce (16 kB) on two devices.
    """

    name: str  # "nvlink4", "xgmi", "pcie4"
    devices: int  # that one node joins
    peak_bandwidth_bytes_per_second: float
    achieved_bandwidth_bytes_per_second: float | None = None
    latency_seconds: float | None = None
    pair_bandwidth_bytes_per_second: float | None = None  # None: all links may lead to one peer

    def __post_init__(self) -> None:
        refuse(self._faults())

    def _faults(self) -> Iterator[UserError]:
        peak, pair, achieved = (
            "peak_bandwidth_bytes_per_second", "pair_bandwidth_bytes_per_second", "achieved_bandwidth_bytes_per_second",
        )  # fmt: skip
        yield from word_faults(self, "name")
        yield from positive_faults(self, peak, achieved, pair, "latency_seconds", "devices")
        if self.devices == 1:
            yield UserError(f"devices >= 2 must hold, but got {self.devices}", place=("devices",))
        most = self.peak_bandwidth_bytes_per_second
        if (self.pair_bandwidth_bytes_per_second or 0) > most:
            yield UserError(
                f"pair <= peak bandwidth must hold, but got {self.pair_bandwidth_bytes_per_second} and {most}",
                place=(pair,),
            )
        if (self.achieved_bandwidth_bytes_per_second or 0) > 2 * most:
            yield UserError(
                f"achieved <= 2 * peak bandwidth must hold, but got {self.achieved_bandwidth_bytes_per_second} "
                f"and {most}",
                place=(achieved,),
            )


@dataclass(frozen=True)
class HardwareProfile:
    """One device. Datasheet peaks and achieved figures are apart, and every figure has a source.

    `sources` maps the dotted path of a figure (`memory.hbm.capacity_bytes`), or of a group of them (`memory.hbm`,
    `measured`), to a URL, "derived: formula" or "measured: command, date". A figure without one is an error, and so is
    a source of no figure.
    """

    name: str
    vendor: str
    kind: Literal["gpu", "cpu"]
    compile_target: str  # "sm_90", "gfx942", "cpu"
    compute_units: int  # SMs, CUs or cores
    warp_size: int  # 1 on a CPU
    shared_memory_bytes: int | None  # scratch of one unit: shared memory or LDS; a CPU's first data cache, if known
    peak_flops_per_second: dict[DType, float]  # dense only
    achieved_flops_per_second: dict[DType, float]  # the best rate that a large matmul reached
    memory: tuple[MemoryLevel, ...]  # from the fastest cache to main memory, which is last
    launch_seconds: float  # host seconds per operator launched eagerly
    graph_node_seconds: float  # device seconds per kernel of a replayed graph, over its own work; CPU: as eager
    sources: dict[str, str]
    tdp_watts: float | None = None
    price_dollars_per_hour: float | None = None
    clock_hertz: float | None = None  # the highest that the vendor names
    interconnect: Interconnect | None = None
    measured: tuple[Curves, ...] = ()  # one per thread count; empty unless a probe wrote the profile
    fingerprint: dict[str, Any] = field(default_factory=dict)  # of the machine that a probe measured

    def __post_init__(self) -> None:
        refuse(self._faults())

    def _faults(self) -> Iterator[UserError]:
        figures = ("compute_units", "warp_size", "shared_memory_bytes", "launch_seconds", "graph_node_seconds")
        yield from positive_faults(self, *figures, "tdp_watts", "price_dollars_per_hour", "clock_hertz")
        yield from name_faults(self.name)
        yield from word_faults(self, "vendor", "compile_target")
        for group in ("peak_flops_per_second", "achieved_flops_per_second"):
            for dtype, rate in getattr(self, group).items():
                yield from figure_faults(f"{group}.{dtype}", rate, group, group, dtype)
        if not self.peak_flops_per_second:
            yield UserError("peak_flops_per_second must have at least one dtype", place=("peak_flops_per_second",))
        for dtype, rate in self.achieved_flops_per_second.items():
            if rate > self.peak_flops_per_second.get(dtype, 0):
                yield UserError(
                    f"achieved_flops_per_second.{dtype} <= its peak must hold, "
                    f"but got {rate} and {self.peak_flops_per_second.get(dtype)}",
                    place=("achieved_flops_per_second", dtype),
                )
        yield from self._memory_faults()
        threads = [c.threads for c in self.measured]
        if len(set(threads)) < len(threads):
            yield UserError(f"measured must have one entry per thread count, but has {threads}", place=("measured",))
        yield from self._source_faults()

    def _memory_faults(self) -> Iterator[UserError]:
        names = [level.name for level in self.memory]
        if not names or len(set(names)) < len(names):
            yield UserError(
                f"memory must have at least one level and no name twice, but has {names}", place=("memory",)
            )
            return
        for index, (faster, slower) in enumerate(zip(self.memory, self.memory[1:], strict=False)):
            if faster.capacity_bytes > slower.capacity_bytes:
                yield UserError(
                    f"memory must be ordered from the smallest to main memory, but has {names}",
                    place=("memory", index, "capacity_bytes"),
                )
        if self.memory[-1].peak_bandwidth_bytes_per_second is None:
            yield UserError(
                f"memory.{names[-1]} must have peak_bandwidth_bytes_per_second",
                place=("memory", len(names) - 1, "peak_bandwidth_bytes_per_second"),
            )

    def _source_faults(self) -> Iterator[UserError]:
        used = set()
        for path in self.figures():
            place = self._source_place(path)
            if place is None:
                yield UserError(
                    f"sources must name the source of every figure, but {path} has none", place=("sources", path)
                )
            used.add(place)
        for place, text in self.sources.items():
            if place not in used:
                yield UserError(f"sources.{place} is the source of no figure", place=("sources", place))
            elif not text.strip():
                yield UserError(f"sources.{place} is empty", place=("sources", place))

    def figures(self) -> dict[str, float]:
        """Every number of the profile by its dotted path (levels by name, curves as `measured.<threads>`)."""
        skipped = {"sources", "fingerprint"}
        found: dict[str, float] = {}
        for f in dataclasses.fields(self):
            if f.name not in skipped:
                found.update(_numbers(f.name, getattr(self, f.name)))
        return found

    def _source_place(self, path: str) -> str | None:
        parts = path.split(".")
        places = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        return next((place for place in places if place in self.sources), None)

    def source(self, path: str) -> str:
        """Where the figure at the dotted `path` came from: its own source, or its group's."""
        figures = self.figures()
        if path not in figures:
            raise known("figure", path, figures)
        place = self._source_place(path)
        assert place is not None  # held by _source_faults
        return self.sources[place]

    def level(self, name: str) -> MemoryLevel:
        """The memory level of that name."""
        for level in self.memory:
            if level.name == name:
                return level
        raise known("memory level", name, (level.name for level in self.memory))

    @property
    def main_memory(self) -> MemoryLevel:
        """The last and largest level."""
        return self.memory[-1]

    @property
    def usable_memory_bytes(self) -> float:
        """Main memory that the driver offers, where that is known; else its datasheet capacity."""
        memory = self.main_memory
        return memory.capacity_bytes if memory.reported_bytes is None else memory.reported_bytes

    def curves(self, threads: int | None = None) -> Curves:
        """The measured curves for a thread count; None: the most threads that were measured."""
        if not self.measured:
            raise UserError(f"profile {self.name} has no measured curves; `ridgepoint hardware probe` measures them")
        if threads is None:
            return max(self.measured, key=lambda c: c.threads)
        for curves in self.measured:
            if curves.threads == threads:
                return curves
        raise known("thread count", str(threads), (str(c.threads) for c in self.measured))


def _numbers(path: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return
    if isinstance(value, (int, float)):
        yield path, float(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(f"{path}.{key}", item)
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _numbers(f"{path}.{getattr(item, 'name', getattr(item, 'threads', index))}", item)
    else:
        for f in dataclasses.fields(value):
            yield from _numbers(f"{path}.{f.name}", getattr(value, f.name))


def user_folder() -> Path:
    """Where the user's own profiles lie: `$RIDGEPOINT_HOME/hardware`, or `~/.ridgepoint/hardware`."""
    home = os.environ.get("RIDGEPOINT_HOME")
    return (Path(home) if home else Path.home() / ".ridgepoint") / "hardware"


def _is_plain(name: str) -> bool:
    return name.isprintable() and not name.endswith((".yaml", ".yml"))


def list_profiles() -> dict[str, Path]:
    """The known profiles by name: the bundled ones, and the user's, which win over bundled ones of the same name.

    Files whose names cannot be shown (bytes that are no text), or would be taken for paths, are left out.
    """
    bundled = Path(str(importlib.resources.files("hardware") / "profiles"))
    found: dict[str, Path] = {}
    for folder in (bundled, user_folder()):
        found.update({path.stem: path for path in sorted(folder.glob("*.yaml")) if _is_plain(path.stem)})
    return found


def load_profile(name_or_path: str | os.PathLike[str]) -> HardwareProfile:
    """Read a profile by name, or from a path that ends in .yaml or .yml.

    UserError: an unknown name (lists the known), a file that breaks a rule (names the file, the key, the rule and the
    line), or one that is known by another name than it gives itself: what is known of a device goes by that name.
    """
    text = os.fspath(name_or_path)
    if text.endswith((".yaml", ".yml")):
        path = Path(text)
    else:
        profiles = list_profiles()
        if text not in profiles:
            raise known("hardware", text, profiles)
        path = profiles[text]
    profile = build_file(HardwareProfile, path)
    if path.stem != profile.name and not text.endswith((".yaml", ".yml")):
        raise UserError(f"{path}: name must be the file's, {path.stem!r}, but is {profile.name!r}")
    return profile


def save_profile(profile: HardwareProfile, path: str | os.PathLike[str]) -> Path:
    """Write a profile as YAML that `load_profile` reads back equal; a curve's point takes one line."""
    return write_atomic(path, profile_text(profile))


def profile_text(profile: HardwareProfile) -> str:
    """The YAML of a profile."""
    data = plain(profile)
    sources = data.pop("sources")
    text = yaml.safe_dump(data, sort_keys=False, width=200, default_flow_style=None)
    return str(text + yaml.safe_dump({"sources": sources}, sort_keys=False, width=118))
