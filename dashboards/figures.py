"""Figures of predictions, shared by report and dashboard: `*_info(data)` gives plain data, `*_plot(info)` draws it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import plotly.graph_objects as go

from dashboards.columns import columns_of
from dashboards.style import AXES, BOUND_COLOURS, GREY, PALETTE, PATTERN, SYMBOLS, base_figure, safe
from dashboards.words import quantity, rate
from hardware.files import known
from hardware.profile import HardwareProfile
from perfmodel.breakeven import Axis
from perfmodel.prediction import Bound, Prediction
from perfmodel.steps import title
from perfmodel.sweep import Sweep


@dataclass(frozen=True)
class Roof:
    """A device's datasheet ceilings for one dtype; `levels` are (memory level, bandwidth), main memory last."""

    hardware: str
    dtype: str
    peak_flops_per_second: float
    levels: tuple[tuple[str, float], ...]

    @property
    def ridge_point(self) -> float:
        """FLOPs per byte at which main memory and compute bind alike."""
        return self.peak_flops_per_second / self.levels[-1][1]

    def at(self, intensity: float, level: int = -1) -> float:
        """FLOP/s attainable at an arithmetic intensity in FLOPs per byte."""
        return min(self.peak_flops_per_second, intensity * self.levels[level][1])


@dataclass(frozen=True)
class RooflinePoint:
    """A step, or one of its operators: estimated and bound FLOP/s at its arithmetic intensity in FLOPs per byte."""

    label: str
    hardware: str
    sampler: str
    intensity: float
    flops_per_second: float
    bound_flops_per_second: float
    bound: Bound


@dataclass(frozen=True)
class RooflineInfo:
    """Roofs, whole decoding steps (`points`) and the operators in them."""

    roofs: tuple[Roof, ...]
    points: tuple[RooflinePoint, ...]
    operators: tuple[RooflinePoint, ...]

    def columns(self) -> dict[str, list[Any]]:
        """One row a point, steps before operators."""
        names = [f.name for f in fields(RooflinePoint)]
        return columns_of(names, [astuple(point) for point in (*self.points, *self.operators)])


def roof(hardware: HardwareProfile, dtype: str) -> Roof:
    """The datasheet ceilings of a device. UserError for a dtype without a peak."""
    peaks = {str(name): value for name, value in hardware.peak_flops_per_second.items()}
    if dtype not in peaks:
        raise known(f"dtype of {hardware.name}", dtype, peaks)
    rates = [(level.name, level.peak_bandwidth_bytes_per_second) for level in hardware.memory]
    return Roof(hardware.name, dtype, peaks[dtype], tuple((name, r) for name, r in rates if r is not None))


def roofline_info(profiles: Sequence[HardwareProfile], predictions: Sequence[Prediction]) -> RooflineInfo:
    """Where the steps of `predictions`, and their operators that compute, lie under the roofs of their devices.

    Operators without FLOPs (norms, the sampler) count in their step and have no point of their own on logarithmic axes.
    The FLOPs are a plain kernel's, masked scores included, which a bound leaves out: it is cut at the device's peak.
    """
    by_name = {profile.name: profile for profile in profiles}
    points, operators, roofs = [], [], {}
    for p in predictions:
        if p.hardware not in by_name:
            raise known("hardware of a prediction", p.hardware, by_name)
        above = roofs[p.hardware, p.fastest_dtype] = roof(by_name[p.hardware], p.fastest_dtype)
        peak = above.peak_flops_per_second
        flops, moved = sum(op.flops for op in p.operators), sum(op.bytes for op in p.operators)
        label = f"{p.model}, {_step_name(p)}"
        points.append(
            RooflinePoint(
                label,
                p.hardware,
                p.decoding.sampler,
                flops / moved,
                flops / p.step_seconds,
                min(flops / p.bound_step_seconds, peak),
                p.bound,
            )
        )
        operators += [
            RooflinePoint(
                f"{op.name} ({label})", p.hardware, p.decoding.sampler, op.arithmetic_intensity, op.flops / op.seconds,
                min(op.flops / op.bound_seconds, peak), op.bound,
            )
            for op in p.operators
            if op.flops > 0 and op.bytes > 0 and op.bound_seconds > 0
        ]  # fmt: skip
    return RooflineInfo(tuple(roofs.values()), tuple(points), tuple(operators))


def roofline_plot(info: RooflineInfo) -> go.Figure:
    """Logarithmic axes: solid lines are main memory's roofs, dotted ones those of caches; large symbols are steps."""
    figure = base_figure("arithmetic intensity (FLOP/byte)", "performance (FLOP/s)")
    devices = list(dict.fromkeys(r.hardware for r in info.roofs))
    colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(devices)}
    everything = [*info.points, *info.operators]
    low = min([p.intensity for p in everything] + [r.ridge_point for r in info.roofs], default=1.0) / 3
    high = max([p.intensity for p in everything] + [r.ridge_point for r in info.roofs], default=1.0) * 5
    for r in info.roofs:
        peak = quantity(r.peak_flops_per_second, "FLOP/s")
        for level, (name, bandwidth) in enumerate(r.levels):
            ridge = r.peak_flops_per_second / bandwidth
            x = [low, max(ridge, low), high] if low < ridge else [low, high]
            main = level == len(r.levels) - 1
            label = f"{r.hardware}: {peak} {r.dtype}, {quantity(bandwidth, 'B/s')}, ridge {ridge:.3g} FLOP/B"
            figure.add_scatter(
                x=x,
                y=[r.at(v, level) for v in x],
                mode="lines",
                line={"color": colours[r.hardware], "width": 2.5 if main else 1, "dash": "solid" if main else "dot"},
                name=safe(label),
                showlegend=main,
                hovertemplate=safe(f"{r.hardware}, {name}: {quantity(bandwidth, 'B/s')}") + "<extra></extra>",
            )
    smaller = {name: 3 * i for i, name in enumerate(devices[:4])}  # where steps coincide, each still shows
    for group, size, opacity in ((info.operators, 7, 0.45), (info.points, 18, 1.0)):
        for hardware, sampler in dict.fromkeys((p.hardware, p.sampler) for p in group):
            chosen = [p for p in group if (p.hardware, p.sampler) == (hardware, sampler)]
            figure.add_scatter(
                x=[p.intensity for p in chosen],
                y=[p.flops_per_second for p in chosen],
                mode="markers",
                marker={
                    "color": colours.get(hardware, GREY),
                    "symbol": "circle" if sampler == "autoregressive" else "diamond",
                    "size": size - (smaller.get(hardware, 9) if size > 10 else 0),
                    "opacity": opacity,
                    "line": {"color": "white", "width": 1},
                },
                name=safe(f"{hardware}: {sampler} step"),
                showlegend=size > 10,
                text=[_point_text(p) for p in chosen],
                hovertemplate="%{text}<extra></extra>",
            )
    lowest = min([p.flops_per_second for p in everything] + [r.at(low) for r in info.roofs], default=1.0)
    highest = max((r.peak_flops_per_second for r in info.roofs), default=1.0)
    powers = [10.0**n for n in range(math.floor(math.log10(lowest)), math.ceil(math.log10(highest)) + 1)]
    figure.update_xaxes(type="log", exponentformat="power", dtick=1)
    figure.update_yaxes(type="log", tickvals=powers, ticktext=[quantity(v, "") for v in powers])
    figure.update_layout(height=500)
    return figure


def _point_text(p: RooflinePoint) -> str:
    lines = (
        f"{p.hardware}: {p.label}",
        f"{p.intensity:.3g} FLOP/B, estimated {quantity(p.flops_per_second, 'FLOP/s')}",
        f"bound {quantity(p.bound_flops_per_second, 'FLOP/s')}; {p.bound} takes most of the time",
    )
    return "<br>".join(map(safe, lines))


@dataclass(frozen=True)
class SpeedupLine:
    """Speedup over autoregressive decoding at each batch, or context, that fits the device's memory."""

    label: str
    at: tuple[int, ...]
    speedup: tuple[float, ...]
    tokens_per_second: tuple[float, ...]
    acceptance_length: float


@dataclass(frozen=True)
class SpeedupInfo:
    """One line per sweep over the batch or the context; `left_out` names those for which nothing fits."""

    over: Axis
    lines: tuple[SpeedupLine, ...]
    left_out: tuple[str, ...]

    def columns(self) -> dict[str, list[Any]]:
        """One row a point."""
        names = ("hardware", self.over, "speedup_over_autoregressive", "tokens_per_second")
        rows = [
            (line.label, *values)
            for line in self.lines
            for values in zip(line.at, line.speedup, line.tokens_per_second, strict=True)
        ]
        return columns_of(names, rows)

    def where_it_pays(self, label: str) -> str:
        """The batches (or contexts) of a line with a speedup above 1, in words; nothing for one that was left out."""
        line = next((line for line in self.lines if line.label == label), None)
        if line is None:
            return ""
        paying = [n for n, s in zip(line.at, line.speedup, strict=True) if s > 1]
        tried = f"{line.at[0]:,} to {line.at[-1]:,}"
        if len(paying) == len(line.at):
            return f"it pays at every {self.over} tried, {tried}"
        if not paying:
            return f"it pays at no {self.over} tried, {tried}"
        several = {"batch": "batches", "context": "contexts"}[self.over]
        return f"of the {several} tried, {tried}, it pays at {', '.join(f'{n:,}' for n in paying)}"


def speedup_info(sweeps: Mapping[str, Sweep], over: Axis = "batch") -> SpeedupInfo:
    """The lines of sweeps over one axis, at the first entry of the others; what does not fit the memory is dropped."""
    lines = []
    along = (slice(None), 0, 0) if over == "batch" else (0, slice(None), 0)
    for label, s in sweeps.items():
        fits = s.fits[along]
        if fits.any():
            lines.append(
                SpeedupLine(
                    label,
                    tuple(map(int, getattr(s, over)[fits])),
                    tuple(map(float, s.speedup_over_autoregressive[along][fits])),
                    tuple(map(float, s.tokens_per_second[along][fits])),
                    float(s.acceptance_length[0]),
                )
            )
    names = {line.label for line in lines}
    return SpeedupInfo(over, tuple(lines), tuple(label for label in sweeps if label not in names))


def speedup_plot(info: SpeedupInfo) -> go.Figure:
    """Break-even as a solid line; dashed, the speedup if a step cost no more than an autoregressive one."""
    figure = base_figure(AXES[info.over], "speedup over autoregressive (x)")
    for i, line in enumerate(info.lines):
        figure.add_scatter(
            x=list(line.at),
            y=list(line.speedup),
            mode="lines+markers",
            name=safe(line.label),
            line={"color": PALETTE[i % len(PALETTE)], "width": 2.5},
            marker={"symbol": SYMBOLS[i % len(SYMBOLS)], "size": 8},
            text=[rate(t) for t in line.tokens_per_second],
            hovertemplate=info.over + " %{x:,}: %{y:.2f}x, %{text}<extra>" + safe(line.label) + "</extra>",
        )
    figure.add_hline(
        y=1, line={"color": GREY, "width": 1.5}, annotation_text="break-even", annotation_position="bottom left"
    )
    tried = sorted({n for line in info.lines for n in line.at})
    for length in sorted({line.acceptance_length for line in info.lines}):  # named below: curves and grid leave no room
        figure.add_scatter(
            x=[tried[0], tried[-1]],
            y=[length, length],
            mode="lines",
            name=f"{length:.3g} tokens a step, if a step cost one autoregressive step",
            line={"color": GREY, "width": 1.5, "dash": "dash"},
            hoverinfo="skip",
        )
    powers = [n for n in tried if n & (n - 1) == 0] or tried
    figure.update_xaxes(type="log", tickvals=powers, ticktext=[f"{n:,}" for n in powers])
    figure.update_yaxes(rangemode="tozero")
    return figure


@dataclass(frozen=True)
class Segment:
    """One operator's seconds in a step, and what they are made of for the most part."""

    operator: str
    seconds: float
    bound: Bound


@dataclass(frozen=True)
class StepBar:
    """One decoding step; the segments add up to its seconds."""

    label: str
    seconds: float
    seconds_per_token: float  # of one sequence
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class StepTimeInfo:
    """Bars in the order in which they are drawn, from the top."""

    bars: tuple[StepBar, ...]

    def columns(self) -> dict[str, list[Any]]:
        """One row an operator of a step."""
        rows = [(bar.label, s.operator, s.seconds, s.bound) for bar in self.bars for s in bar.segments]
        return columns_of(("step", "operator", "seconds", "bound"), rows)


def step_time_info(predictions: Sequence[Prediction]) -> StepTimeInfo:
    """One bar per prediction, its operators in the order of the forward."""
    bars = []
    for p in predictions:
        segments = tuple(Segment(op.name, op.seconds, op.bound) for op in p.operators)
        per_token = p.step_seconds / p.acceptance_length
        bars.append(StepBar(f"{p.hardware}: {_step_name(p)}", p.step_seconds, per_token, segments))
    return StepTimeInfo(tuple(bars))


def step_time_plot(info: StepTimeInfo) -> go.Figure:
    """Horizontal bars, one segment per operator in the colour (and pattern) of what binds it."""
    longest = max((bar.seconds for bar in info.bars), default=1.0)
    factor, unit = (1e3, "ms") if longest >= 1e-3 else (1e6, "µs")
    figure = base_figure(f"time of one decoding step ({unit})", "")
    labels = [
        safe(bar.label) + f"<br>{quantity(bar.seconds, 's')}, {quantity(bar.seconds_per_token, 's')} a token"
        for bar in info.bars
    ]
    patterns: dict[Bound, str] = {"memory": "", "compute": "/", "overhead": "."}
    for name in dict.fromkeys(s.operator for bar in info.bars for s in bar.segments):
        found = [next((s for s in bar.segments if s.operator == name), None) for bar in info.bars]
        present = [(label, s) for label, s in zip(labels, found, strict=True) if s is not None]
        figure.add_bar(
            y=[label for label, _ in present],
            x=[s.seconds * factor for _, s in present],
            orientation="h",
            marker={
                "color": [BOUND_COLOURS[s.bound] for _, s in present],
                "pattern": {**PATTERN, "shape": [patterns[s.bound] for _, s in present]},
                "line": {"color": "white", "width": 1},
            },
            text=[safe(name) if s.seconds > 0.08 * longest else "" for _, s in present],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            showlegend=False,
            customdata=[[quantity(s.seconds, "s"), s.bound] for _, s in present],
            hovertemplate=safe(name) + ": %{customdata[0]}, mostly %{customdata[1]}<extra>%{y}</extra>",
        )
    for bound, colour in BOUND_COLOURS.items():  # the legend says what the colours mean
        figure.add_bar(
            y=labels[:1],
            x=[0],
            orientation="h",
            name=f"{bound}-bound",
            marker={"color": colour, "pattern": {**PATTERN, "shape": patterns[bound]}},
        )
    plot = 105 + 62 * len(info.bars)  # pixels; the legend, told in shares of them, is below the name of the axis
    figure.update_layout(barmode="stack", height=plot + 85, legend={"y": -80 / plot})
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def _step_name(p: Prediction) -> str:
    drafts = f" K={p.decoding.draft_tokens}" if p.decoding.drafts else ""
    return f"{title(p.decoding)}{drafts}, batch {p.workload.batch}"
