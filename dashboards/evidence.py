"""Figures of what was measured, shared by the report and the dashboard: `*_info(data)`, then `*_plot(info)`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from dashboards.style import BLUE, GREEN, GREY, PALETTE, PURPLE, SYMBOLS, VERMILLION, base_figure, headed, safe
from dashboards.words import percent, quantity
from perfmodel.validation import Row, summarise
from runtime.config import require
from runtime.measurement import Kind

_KINDS: dict[Kind, str] = {"forward": "one forward", "generation": "mean step of a generation"}


@dataclass(frozen=True)
class ScatterInfo:
    """Rows by kind, those fitted to apart, and the median absolute error of the others (None: there are none)."""

    groups: dict[str, tuple[Row, ...]]
    held_out_median_absolute_error: float | None
    held_out_count: int


def scatter_info(rows: Sequence[Row]) -> ScatterInfo:
    """Group rows by kind; the error is over those that no engine was calibrated on."""
    groups: dict[str, list[Row]] = {}
    states = {False: "held out", True: "fitted to", None: "not calibrated"}
    for row in sorted(rows, key=lambda r: (list(states).index(r.fitted), r.kind)):
        groups.setdefault(f"{_KINDS[row.kind]}, {states[row.fitted]}", []).append(row)
    held_out = [row for row in rows if row.fitted is False]
    error = summarise(held_out).median_absolute_error if held_out else None
    return ScatterInfo({name: tuple(group) for name, group in groups.items()}, error, len(held_out))


def equality_figure(seconds: Sequence[float]) -> go.Figure:
    """Logarithmic axes of measured and predicted times that hold all of `seconds`, with the line of equal ones."""
    figure = base_figure("measured time", "predicted time")
    ends = list(seconds) or [1e-3, 1.0]
    line = [min(ends) / 1.5, max(ends) * 1.5]
    figure.add_scatter(
        x=line, y=line, mode="lines", name="equal", line={"color": GREY, "dash": "dash"}, hoverinfo="skip"
    )
    powers = range(math.floor(math.log10(line[0])), math.ceil(math.log10(line[1])) + 1)
    digits = (1,) if len(powers) > 5 else (1, 3) if len(powers) > 3 else (1, 2, 5)
    ticks = [digit * 10.0**n for n in powers for digit in digits]
    axis = {
        "type": "log",
        "tickvals": ticks,
        "ticktext": [quantity(tick, "s") for tick in ticks],
        "range": [math.log10(end) for end in line],
    }
    figure.update_xaxes(axis)
    figure.update_yaxes(axis)
    return figure


def scatter_plot(info: ScatterInfo) -> go.Figure:
    """Predicted over measured seconds with the identity line; rows that were fitted to are hollow."""
    rows = [row for group in info.groups.values() for row in group]
    figure = equality_figure([v for row in rows for v in (row.measured_seconds, row.predicted_seconds)])
    for i, (name, group) in enumerate(info.groups.items()):
        symbol = SYMBOLS[i % len(SYMBOLS)]
        figure.add_scatter(
            x=[row.measured_seconds for row in group],
            y=[row.predicted_seconds for row in group],
            mode="markers",
            name=safe(name),
            marker={
                "color": PALETTE[i % len(PALETTE)],
                "symbol": f"{symbol}-open" if "fitted" in name else symbol,
                "size": 9,
            },
            text=[safe(f"{row.name}: {row.error:+.0%}") for row in group],
            customdata=[[quantity(row.measured_seconds, "s"), quantity(row.predicted_seconds, "s")] for row in group],
            hovertemplate="%{text}<br>measured %{customdata[0]}, predicted %{customdata[1]}<extra></extra>",
        )
    if info.held_out_median_absolute_error is None:
        title = "no row was held out"
    else:
        error = percent(info.held_out_median_absolute_error)
        title = f"median absolute error {error} over {info.held_out_count} held-out points"
    headed(figure, title)
    return figure


@dataclass(frozen=True)
class FrontPoint:
    """A setting that was tried. divergence: share of tokens that autoregressive decoding would not give.

    Both numbers are None where it could not run.
    """

    label: str
    tokens_per_second: float | None
    divergence: float | None
    feasible: bool = True
    default: bool = False
    chosen: bool = False


@dataclass(frozen=True)
class FrontInfo:
    """The non-dominated settings by rising divergence, the others, and those without a result."""

    front: tuple[FrontPoint, ...]
    dominated: tuple[FrontPoint, ...]
    infeasible: tuple[FrontPoint, ...]


def front_info(points: Sequence[FrontPoint]) -> FrontInfo:
    """Split by dominance: one dominates another if it is no slower, diverges no more, and is better in either."""
    usable = [
        (p.tokens_per_second, p.divergence, p)
        for p in points
        if p.feasible and p.tokens_per_second is not None and p.divergence is not None
    ]
    front: list[FrontPoint] = []
    dominated: list[FrontPoint] = []
    for speed, divergence, p in sorted(usable, key=lambda u: (u[1], u[0])):
        better = any(s >= speed and d <= divergence and (s > speed or d < divergence) for s, d, _ in usable)
        (dominated if better else front).append(p)
    shown = {id(p) for _, _, p in usable}
    return FrontInfo(tuple(front), tuple(dominated), tuple(p for p in points if id(p) not in shown))


def front_plot(info: FrontInfo) -> go.Figure:
    """Tokens per second over divergence from autoregressive decoding; up and left is better."""
    figure = base_figure("tokens that differ from autoregressive decoding (share)", "tokens/s")
    _front_trace(figure, info.front, "front", BLUE, "circle", 10, lines=True)
    _front_trace(figure, info.dominated, "dominated", GREY, "circle", 8)
    every = [*info.front, *info.dominated]
    _front_trace(figure, [p for p in every if p.default], "default", VERMILLION, "square-open", 17)
    _front_trace(figure, [p for p in every if p.chosen], "chosen", GREEN, "star", 17)
    if info.infeasible:
        figure.add_scatter(
            x=[p.divergence or 0.0 for p in info.infeasible],
            y=[p.tokens_per_second or 0.0 for p in info.infeasible],
            mode="markers",
            name="no result: infeasible, incorrect or stopped as slower",
            marker={"color": PURPLE, "symbol": "x", "size": 9},
            text=[safe(p.label) for p in info.infeasible],
            hovertemplate="%{text}<extra></extra>",
        )
    widest = max([p.divergence or 0.0 for p in every], default=0.0)
    figure.update_xaxes(tickformat=".1~%", range=[-0.04 * (widest or 0.1), 1.08 * (widest or 0.1)])
    figure.update_yaxes(rangemode="tozero")
    return figure


def _front_trace(
    figure: go.Figure, points: Sequence[FrontPoint], name: str, colour: str, symbol: str, size: int, lines: bool = False
) -> None:
    if not points:
        return
    figure.add_scatter(
        x=[p.divergence for p in points],
        y=[p.tokens_per_second for p in points],
        mode="lines+markers" if lines else "markers",
        name=name,
        line={"color": colour, "shape": "hv", "width": 1.5},
        marker={"color": colour, "symbol": symbol, "size": size, "line": {"width": 2, "color": colour}},
        text=[safe(p.label) for p in points],
        hovertemplate="%{text}<br>%{y:,.1f} tokens/s, %{x:.2%} of the tokens differ<extra></extra>",
    )


@dataclass(frozen=True)
class LossLine:
    """One loss of one training stage, in nats per token, by optimiser step over all stages."""

    label: str
    step: tuple[float, ...]
    loss: tuple[float, ...]


@dataclass(frozen=True)
class LossInfo:
    """Lines by stage and loss; `stage_starts` maps a stage to the step at which it begins."""

    lines: tuple[LossLine, ...]
    stage_starts: dict[str, float]


def loss_info(entries: Sequence[Mapping[str, Any]]) -> LossInfo:
    """Entries as training logs them: stage, step within the stage, next_token, and mask once drafting is trained."""
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    starts: dict[str, float] = {}
    end = 0.0
    for entry in entries:
        require("stage" in entry and "step" in entry, f"a loss entry must have stage and step, but is {dict(entry)}")
        stage = str(entry["stage"])
        step = starts.setdefault(stage, end) + float(entry["step"])
        end = max(end, step)
        for name in ("next_token", "mask"):
            if name in entry:
                lines.setdefault((stage, name), []).append((step, float(entry[name])))
    found = []
    for (stage, name), values in lines.items():
        steps, losses = zip(*values, strict=True)
        found.append(LossLine(f"{name.replace('_', ' ')} ({stage})", steps, losses))
    return LossInfo(tuple(found), starts)


def loss_plot(info: LossInfo) -> go.Figure:
    """Loss over optimiser steps, one line per loss and stage."""
    figure = base_figure("optimiser step", "loss (nats per token)")
    for i, line in enumerate(info.lines):
        dash = "dot" if line.label.startswith("mask") else "solid"
        figure.add_scatter(
            x=list(line.step),
            y=list(line.loss),
            mode="lines",
            name=safe(line.label),
            line={"color": PALETTE[i % len(PALETTE)], "width": 2, "dash": dash},
        )
    for name, start in info.stage_starts.items():
        figure.add_vline(x=start, line={"color": GREY, "width": 1, "dash": "dash"}, annotation_text=safe(name))
    if all(v > 0 for line in info.lines for v in line.loss):
        figure.update_yaxes(type="log")
    return figure
