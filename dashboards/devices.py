"""Devices side by side: every figure with its unit and source, and peak compute over bandwidth. Streamlit-free."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import plotly.graph_objects as go

from dashboards.columns import columns_of
from dashboards.style import GREY, PALETTE, SYMBOLS, base_figure, safe
from dashboards.words import quantity
from hardware.comparison import compared, own_figure
from hardware.files import known
from hardware.profile import DType, HardwareProfile, list_profiles

Basis = Literal["datasheet", "achieved", "market"]
DTYPES: tuple[str, ...] = get_args(DType)
_UNITS = {
    "bytes_per_second": "B/s",
    "flops_per_second": "FLOP/s",
    "bytes": "B",
    "seconds": "s",
    "hertz": "Hz",
    "watts": "W",
    "dollars_per_hour": "$/h",
}
_ACHIEVED = re.compile(r"achieved_|reported_bytes|launch_seconds|graph_node_seconds|latency_seconds")
_WORDS = {
    "peak_flops_per_second": "peak rate",
    "achieved_flops_per_second": "achieved rate",
    "peak_bandwidth_bytes_per_second": "peak bandwidth",
    "achieved_bandwidth_bytes_per_second": "achieved bandwidth",
    "pair_bandwidth_bytes_per_second": "bandwidth to one peer",
    "capacity_bytes": "capacity",
    "reported_bytes": "reported by the driver",
    "latency_seconds": "latency of a small all-reduce",
    "shared_memory_bytes": "shared memory of a unit",
    "clock_hertz": "highest clock",
    "compute_units": "compute units",
    "warp_size": "warp size",
    "launch_seconds": "launch of an operator, on the host",
    "graph_node_seconds": "kernel of a replayed graph",
    "tdp_watts": "thermal design power",
    "price_dollars_per_hour": "price",
    "main": "main memory",
    "interconnect": "link",
    "devices": "devices of a node",
}
TABS = {"compare": "Compare", "file": "Add from a file", "form": "Add with a form", "own": "Your devices"}
_RIDGES = [digit * 10.0**n for n in range(-1, 5) for digit in (1, 1.5, 2, 2.5, 3, 4, 5, 7)]  # FLOP/B, of dotted lines
THE_FIGURE, STATED_AS, SPREAD = "the figure", "stated as", "largest / smallest"  # no device's name has a blank


@dataclass(frozen=True)
class DevicesView:
    """What the page shows: devices by known names, one of TABS, the peaks' dtype, whether equal rows are left out."""

    devices: tuple[str, ...] = ("h100-sxm", "b200", "mi300x", "mi355x")
    tab: str = "compare"
    dtype: str = "bfloat16"
    differing: bool = False

    def __post_init__(self) -> None:
        profiles = list_profiles()
        for kind, names, allowed in (
            ("hardware", self.devices, profiles), ("tab", (self.tab,), TABS), ("dtype", (self.dtype,), DTYPES),
        ):  # fmt: skip
            for name in names:
                if name not in allowed:
                    raise known(kind, name, allowed)


@dataclass(frozen=True)
class FigureRow:
    """One figure of all devices: SI base units, None where a device has no such figure."""

    figure: str  # as `hardware compare` names it
    basis: Basis
    values: tuple[float | None, ...]
    sources: tuple[str | None, ...]

    @property
    def differs(self) -> bool:
        """Whether the devices do not all have the same value."""
        return len(set(self.values)) > 1

    @property
    def spread(self) -> str:
        """The largest value over the smallest, in words; empty for one device."""
        found = [value for value in self.values if value is not None]
        if len(self.values) < 2:
            return ""
        if len(found) < 2 or min(found) == max(found):
            return "same" if len(found) == len(self.values) else "not on all"
        return f"{max(found) / min(found):.3g}x"


@dataclass(frozen=True)
class ComparisonInfo:
    """The figures of several devices."""

    devices: tuple[str, ...]
    rows: tuple[FigureRow, ...]

    def shown(self, *, differing: bool = False) -> dict[str, list[str]]:
        """The table in words; only those rows in which devices differ, if asked for."""
        rows = [row for row in self.rows if row.differs or not differing or len(self.devices) == 1]
        columns: dict[str, list[str]] = {
            THE_FIGURE: [figure_words(r.figure) for r in rows],
            STATED_AS: [r.basis for r in rows],
        }
        for place, device in enumerate(self.devices):
            columns[device] = [figure_text(r.figure, r.values[place]) for r in rows]
        return columns | {SPREAD: [r.spread for r in rows]} if len(self.devices) > 1 else columns

    def columns(self) -> dict[str, list[Any]]:
        """One row a figure and device, in SI base units, with the source and its address."""
        cells = [
            (device, row.figure, row.basis, row.values[place], row.sources[place] or "", link(row.sources[place]))
            for row in self.rows
            for place, device in enumerate(self.devices)
            if row.values[place] is not None
        ]
        names = ("device", "figure", "stated_as", "value", "source", "link")
        return columns_of(names, cells)

    def sourced(self) -> dict[str, list[Any]]:
        """The table of sources: one row a source of a device, with the figures that come from it."""
        found: dict[tuple[str, str], list[str]] = {}
        for place, device in enumerate(self.devices):
            for row in self.rows:
                source = row.sources[place]
                if source is not None:
                    found.setdefault((device, source), []).append(figure_words(row.figure))
        return {
            "device": [device for device, _ in found],
            "link": [link(source) for _, source in found],
            "figures": [", ".join(figures) for figures in found.values()],
            "source": [source for _, source in found],
        }


def comparison_info(profiles: Mapping[str, HardwareProfile]) -> ComparisonInfo:
    """All figures of the devices but for probed curves, in the order of the bundled files."""
    rows = []
    for figure, values in compared(dict(profiles)).items():
        sources = tuple(
            None if values[label] is None else p.source(own_figure(p, figure)) for label, p in profiles.items()
        )
        rows.append(FigureRow(figure, basis(figure), tuple(values[label] for label in profiles), sources))
    return ComparisonInfo(tuple(profiles), tuple(rows))


def basis(figure: str) -> Basis:
    """Whether a figure is a datasheet's, or one that was reached on a device, or what is asked for it."""
    if figure.startswith("price"):
        return "market"
    return "achieved" if _ACHIEVED.search(figure) else "datasheet"


def figure_text(figure: str, value: float | None) -> str:
    """A figure's value with its unit, three digits: "3.35 TB/s"; an empty text for none."""
    if value is None:
        return ""
    group = figure.split(".")[0]
    name = group if group.endswith("flops_per_second") else figure
    unit = next((unit for end, unit in _UNITS.items() if name.endswith(end)), "")
    if unit in ("", "$/h"):  # no milli-dollars, no kilo-units
        return f"{value:,.2f} {unit}" if unit else f"{value:,.0f}"
    return quantity(value, unit)


def figure_words(figure: str) -> str:
    """A figure's dotted name in words: "main memory: peak bandwidth"."""
    parts = [part for part in figure.split(".") if part != "memory"]
    return ": ".join(_WORDS.get(part, part) for part in parts)


def link(source: str | None) -> str | None:
    """The first web address in a source, and nothing that is not http or https."""
    found = re.search(r"https?://[^\s<>\"'`\\]+", source or "")
    return found.group().rstrip(".,;:)") if found else None


@dataclass(frozen=True)
class Peaks:
    """A device's peak rate of one dtype over its main memory's bandwidth, and what was reached of both."""

    device: str
    peak_bandwidth_bytes_per_second: float
    peak_flops_per_second: float
    achieved_bandwidth_bytes_per_second: float | None
    achieved_flops_per_second: float | None

    @property
    def ridge_flops_per_byte(self) -> float:
        """FLOPs per byte of main memory at which bandwidth and compute bind alike."""
        return self.peak_flops_per_second / self.peak_bandwidth_bytes_per_second


@dataclass(frozen=True)
class PeaksInfo:
    """One point a device; `left_out` are those without a peak of the dtype."""

    dtype: str
    points: tuple[Peaks, ...]
    left_out: tuple[str, ...]

    def columns(self) -> dict[str, list[Any]]:
        """One row a device, in SI base units."""
        names = (
            "device", "peak_bandwidth_bytes_per_second", "peak_flops_per_second", "ridge_flops_per_byte",
            "achieved_bandwidth_bytes_per_second", "achieved_flops_per_second",
        )  # fmt: skip
        return {"dtype": [self.dtype] * len(self.points)} | {
            name: [getattr(point, name) for point in self.points] for name in names
        }


def peaks_info(profiles: Mapping[str, HardwareProfile], dtype: str) -> PeaksInfo:
    """The devices' peaks of a dtype, and what was achieved where both figures are known."""
    points, left_out = [], []
    for label, profile in profiles.items():
        peaks = {str(name): rate for name, rate in profile.peak_flops_per_second.items()}
        achieved = {str(name): rate for name, rate in profile.achieved_flops_per_second.items()}
        memory = profile.main_memory
        if dtype not in peaks or memory.peak_bandwidth_bytes_per_second is None:
            left_out.append(label)
            continue
        points.append(
            Peaks(
                label,
                memory.peak_bandwidth_bytes_per_second,
                peaks[dtype],
                memory.achieved_bandwidth_bytes_per_second,
                achieved.get(dtype),
            )
        )
    return PeaksInfo(dtype, tuple(points), tuple(left_out))


def peaks_plot(info: PeaksInfo) -> go.Figure:
    """Logarithmic axes: filled symbols are datasheet peaks, hollow ones what was achieved, joined by a line.

    Dotted lines join devices of one ridge point: what needs fewer FLOPs per byte is bound by memory.
    """
    figure = base_figure("bandwidth of main memory (B/s)", f"{info.dtype} rate (FLOP/s)")
    xs = [p.peak_bandwidth_bytes_per_second for p in info.points]
    ends = [min(xs, default=1e12) / 2, max(xs, default=1e12) * 2]
    ridges = [p.ridge_flops_per_byte for p in info.points]
    near = [n for n in _RIDGES if ridges and min(ridges) / 1.3 < n < max(ridges) * 1.3]
    for ridge in near[:: math.ceil(len(near) / 5) or 1]:
        figure.add_scatter(
            x=ends,
            y=[ridge * x for x in ends],
            mode="lines+text",
            line={"color": GREY, "width": 1, "dash": "dot"},
            text=["", f"{ridge:g} FLOP/B"],
            textposition="middle right",
            textfont={"color": GREY, "size": 11},
            hoverinfo="skip",
            showlegend=False,
        )
    for i, p in enumerate(info.points):
        has_achieved = p.achieved_bandwidth_bytes_per_second is not None and p.achieved_flops_per_second is not None
        symbol = SYMBOLS[i % len(SYMBOLS)]
        kinds = ["datasheet", "achieved"] if has_achieved else ["datasheet"]
        bandwidths = [p.peak_bandwidth_bytes_per_second, p.achieved_bandwidth_bytes_per_second][: len(kinds)]
        rates = [p.peak_flops_per_second, p.achieved_flops_per_second][: len(kinds)]
        figure.add_scatter(
            x=bandwidths,
            y=rates,
            mode="lines+markers",
            line={"color": PALETTE[i % len(PALETTE)], "width": 1},
            marker={
                "symbol": [symbol, f"{symbol}-open"][: len(kinds)],
                "size": [14, 9][: len(kinds)],
                "line": {"width": 2},
            },
            name=safe(f"{p.device}: ridge {p.ridge_flops_per_byte:.3g} FLOP/B"),
            text=[
                safe(f"{p.device}, {kind}: {quantity(rate or 0, 'FLOP/s')} {info.dtype}, {quantity(width or 0, 'B/s')}")
                for kind, rate, width in zip(kinds, rates, bandwidths, strict=True)
            ],
            hovertemplate="%{text}<extra></extra>",
        )
    for update in (figure.update_xaxes, figure.update_yaxes):
        ticks = [digit * 10.0**n for n in range(7, 18) for digit in (1, 2, 5)]
        update(type="log", tickvals=ticks, ticktext=[quantity(v, "") for v in ticks])
    if xs:  # room for the labels of the dotted lines
        figure.update_xaxes(range=[math.log10(ends[0]), math.log10(ends[1] * 1.25)])
    figure.update_layout(height=480)
    return figure
