"""Figures of a study: `studies` gives the data, these draw it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Literal

import plotly.graph_objects as go

from autotune.report import Importance
from dashboards.evidence import FrontInfo, front_plot
from dashboards.studies import NOT_SET, Axis, HistoryInfo, ParallelInfo, RankInfo, StagesInfo, word
from dashboards.style import (
    BLUE,
    GREEN,
    GREY,
    GRID,
    ORANGE,
    PALETTE,
    PATTERN,
    PURPLE,
    SKY,
    SYMBOLS,
    VERMILLION,
    base_figure,
    safe,
)
from dashboards.words import percent

Progress = Literal["settings", "seconds"]
# Colour, symbol and pattern of every outcome: each tells it apart by itself.
OUTCOMES = {
    "correct": (BLUE, "circle", ""),
    "slower": (GREY, "triangle-down", "."),
    "infeasible": (PURPLE, "x", "x"),
    "incorrect": (VERMILLION, "diamond", "/"),
    "timeout": (ORANGE, "hourglass", "-"),
    "runtime": (GREEN, "star", "\\"),
    "compile": (SKY, "square-x-open", "+"),
}
_SPEEDS = (SKY, GREY, VERMILLION)  # of the slow, the middle and the fast third: seen on white, on black, by everyone


def pareto_plot(info: FrontInfo) -> go.Figure:
    """The front, as everywhere."""
    return front_plot(info)


def history_plot(info: HistoryInfo, by: Progress) -> go.Figure:
    """Every setting over the search's progress, and the best so far. Without a speed, they lie on the line of zero."""
    figure = base_figure("settings tried" if by == "settings" else "time spent measuring (s)", "tokens/s")
    points = [p for p in info.points if by == "settings" or p.seconds is not None]
    for outcome, (colour, symbol, _) in OUTCOMES.items():
        found = [p for p in points if p.outcome == outcome]
        if found:
            figure.add_scatter(
                x=[p.evaluation if by == "settings" else p.seconds for p in found],
                y=[p.tokens_per_second or 0.0 for p in found],
                mode="markers",
                name=f"{outcome} ({len(found)})",
                marker={"color": colour, "symbol": symbol, "size": 6},
                text=[_wrapped(p.label) for p in found],
                cliponaxis=False,
                hovertemplate="%{text}<br>%{y:,.0f} tokens/s<extra></extra>"
                if outcome == "correct"
                else "%{text}<extra></extra>",
            )
    best = [b for b in info.best if by == "settings" or b.seconds is not None]
    if best:
        last = points[-1]
        end = last.evaluation if by == "settings" else last.seconds
        figure.add_scatter(
            x=[*(b.evaluation if by == "settings" else b.seconds for b in best), end],
            y=[*(b.tokens_per_second for b in best), best[-1].tokens_per_second],
            mode="lines",
            name="best so far "
            + ("(lossless)" if not info.max_divergence else f"(up to {percent(info.max_divergence)} differ)"),
            line={"color": VERMILLION, "shape": "hv", "width": 2},
            hovertemplate="best so far: %{y:,.0f} tokens/s<extra></extra>",
        )
    figure.update_yaxes(rangemode="tozero")
    return figure


def stages_plot(info: StagesInfo) -> go.Figure:
    """A bar for each stage: what ended there by outcome, and what went on."""
    figure = base_figure("settings that entered the stage", "")
    names = [stage.stage.replace("_", " ") for stage in info.stages]
    last = len(info.stages) - 1
    for outcome, (colour, _, pattern) in OUTCOMES.items():
        counts = [stage.ended.get(outcome, 0) for stage in info.stages]
        if any(counts):
            figure.add_bar(
                y=names,
                x=counts,
                orientation="h",
                name="correct, to the end" if outcome == "correct" else outcome,
                marker={"color": colour, "pattern": {**PATTERN, "shape": pattern}},
                text=[str(count) if count else "" for count in counts],
                hovertemplate=f"%{{y}}: %{{x}} {safe(outcome)}<extra></extra>",
            )
    on = [stage.entered - sum(stage.ended.values()) for stage in info.stages]
    figure.add_bar(
        y=names[:last],
        x=on[:last],
        orientation="h",
        name="went on",
        marker={"color": GRID, "line": {"color": GREY, "width": 1}},
        text=[str(count) if count else "" for count in on[:last]],
        hovertemplate="%{y}: %{x} went on<extra></extra>",
    )
    figure.update_layout(barmode="stack", height=360, legend={"y": -0.35})
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def importance_plot(importances: Sequence[Importance]) -> go.Figure:
    """Shares by which parameters tell the fastest settings from all that ran."""
    figure = base_figure("share of what tells the fastest settings from the others", "")
    figure.add_bar(
        y=[safe(i.parameter) for i in importances],
        x=[i.share for i in importances],
        orientation="h",
        marker={"color": BLUE},
        text=[percent(i.share) for i in importances],
        customdata=[i.settings for i in importances],
        hovertemplate="%{y}: %{text}, set in %{customdata} settings<extra></extra>",
        showlegend=False,
    )
    figure.update_layout(height=130 + 30 * len(importances))
    figure.update_xaxes(tickformat=".0%", rangemode="tozero")
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def parallel_plot(info: ParallelInfo) -> go.Figure:
    """A line for each setting that ran right, in the colour of its speed; the legend shows and hides groups of them.

    Lines of their own, not plotly's parallel coordinates: those need WebGL, which takes seconds without a GPU.
    """
    figure = base_figure("", "")
    last = max(1, len(info.axes) - 1)
    scaled = [_scaled(axis) for axis in info.axes]
    groups, count = min(len(_SPEEDS), len(info.trials)), len(info.trials)
    for group, colour in enumerate(_SPEEDS[-groups:] if groups else ()):  # the fastest is drawn last
        members = range(count * group // groups, count * (group + 1) // groups)
        speeds = [info.tokens_per_second[i] for i in members]
        x: list[float | None] = []
        y: list[float | None] = []
        words: list[str] = []
        for i in members:
            for place, axis in enumerate(info.axes):
                value = axis.values[i]
                x.append(place)
                y.append(scaled[place](axis.positions[i]))
                words.append(safe(f"trial {info.trials[i]}, {axis.name}: {NOT_SET if value is None else word(value)}"))
            x.append(None)  # a gap before the next
            y.append(None)
            words.append("")
        figure.add_scatter(
            x=x,
            y=y,
            mode="lines",
            line={"color": colour, "width": 1},
            opacity=0.5,  # so that the words on the axes are read through them
            name=f"{speeds[0]:,.0f} to {speeds[-1]:,.0f} tokens/s",
            text=words,
            hovertemplate="%{text}<extra></extra>",
        )
    upright = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "line": {"color": GREY, "width": 1}}
    beside = {"showarrow": False, "xanchor": "right", "xshift": -3}
    figure.update_layout(  # all at once: plotly copies those that are there whenever one is added
        shapes=[{**upright, "x0": place, "x1": place} for place in range(len(info.axes))],
        annotations=[
            {**beside, "x": place, "y": scaled[place](tick), "text": f"<b>{safe(said)}</b>"}
            for place, axis in enumerate(info.axes)
            for tick, said in zip(axis.ticks, axis.words, strict=True)
        ],
    )
    names = [safe(axis.name.replace("_", " ")) for axis in info.axes]
    figure.update_xaxes(
        tickvals=list(range(len(names))),
        ticktext=names,
        tickangle=-20,
        showgrid=False,
        range=[-0.06 * last, last + 0.1],
    )
    figure.update_yaxes(visible=False, range=[-0.05, 1.05])
    figure.update_layout(height=480, hovermode="closest")
    return figure


def _scaled(axis: Axis) -> Callable[[float], float]:
    """From a place on an axis to the share of its height."""
    low, high = min(axis.positions), max(axis.positions)
    return lambda position: (position - low) / ((high - low) or 1.0)


def rank_plot(info: RankInfo) -> go.Figure:
    """Predicted over measured speed, by who proposed a setting; those that acceptance was counted on are hollow."""
    figure = base_figure("measured tokens/s", "predicted tokens/s")
    most = max([v for p in info.points for v in (p.predicted, p.measured)], default=1.0) * 1.05
    figure.add_scatter(
        x=[0, most], y=[0, most], mode="lines", name="equal", line={"color": GREY, "dash": "dash"}, hoverinfo="skip"
    )
    sources = sorted({p.source for p in info.points})
    for i, source in enumerate(sources):
        found = [p for p in info.points if p.source == source]
        symbol = SYMBOLS[i % len(SYMBOLS)]
        hollow = found[0].counted_on
        figure.add_scatter(
            x=[p.measured for p in found],
            y=[p.predicted for p in found],
            mode="markers",
            name=f"{safe(source)} ({len(found)}" + (", the model uses them)" if hollow else ")"),
            marker={"color": PALETTE[i % len(PALETTE)], "symbol": f"{symbol}-open" if hollow else symbol, "size": 8},
            text=[_wrapped(p.label) for p in found],
            hovertemplate="%{text}<br>measured %{x:,.0f}, predicted %{y:,.0f} tokens/s<extra></extra>",
        )
    figure.update_xaxes(range=[0, most])
    figure.update_yaxes(range=[0, most])
    return figure


def _wrapped(label: str) -> str:
    """A label on several lines, so that it stays inside the figure."""
    return "<br>".join(safe(line) for line in textwrap.wrap(label, 90))
