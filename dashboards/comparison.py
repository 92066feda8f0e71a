"""Figures of predictions beside measurements: `*_info(data)` gives plain data, `*_plot(info)` draws it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import plotly.graph_objects as go

from dashboards.evidence import equality_figure
from dashboards.pairs import FITS, KINDS, Fit, Kind, Pair
from dashboards.style import BLUE, GREEN, GREY, ORANGE, VERMILLION, base_figure, headed, safe
from dashboards.words import percent, quantity
from hardware.files import known

By = Literal["operator", "family", "device", "engine", "source"]
BYS: tuple[By, ...] = get_args(By)
SECTIONS = {"points": "Every measurement", "errors": "Errors", "models": "Published diffusion models"}
KIND_WORDS: dict[Kind, str] = {
    "published": "published",
    "ours": "ours, committed",
    "local": "local",
    "upload": "uploaded",
}
_KIND_LOOKS: dict[Kind, tuple[str, str]] = {  # colour and symbol
    "published": (BLUE, "circle"),
    "ours": (VERMILLION, "diamond"),
    "local": (GREEN, "square"),
    "upload": (ORANGE, "triangle-up"),
}
_FIT_SYMBOLS: dict[Fit, str] = {"held out": "", "fitted": "-open", "not fitted": "-open-dot"}
_FIT_PATTERNS: dict[Fit, tuple[str, str]] = {
    "held out": (BLUE, ""),
    "fitted": (ORANGE, "/"),
    "not fitted": (GREEN, "."),
}
MOST_BARS = 30
FILTERS = ("kinds", "families", "devices", "engines", "sources", "fits")


@dataclass(frozen=True)
class ComparisonView:
    """What the page shows, as its address holds it. An empty filter lets everything through. point: the id of one."""

    kinds: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    engines: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    fits: tuple[str, ...] = ()
    by: By = "operator"
    intervals: bool = True
    point: str = ""
    section: str = next(iter(SECTIONS))

    def __post_init__(self) -> None:
        for name, values, allowed in (
            ("kind", self.kinds, KINDS),
            ("fit", self.fits, FITS),
            ("by", (self.by,), BYS),
            ("section", (self.section,), SECTIONS),
        ):
            for value in values:
                if value not in allowed:
                    raise known(name, value, allowed)


def options(pairs: Sequence[Pair]) -> dict[str, tuple[str, ...]]:
    """What each filter can be set to."""
    found = {name: tuple(sorted({_value(pair, name) for pair in pairs})) for name in FILTERS}
    found["kinds"] = tuple(kind for kind in KINDS if kind in found["kinds"])
    found["fits"] = tuple(fit for fit in FITS if fit in found["fits"])
    return found


def known_view(view: ComparisonView, pairs: Sequence[Pair]) -> tuple[ComparisonView, list[str]]:
    """The view without names that no pair has, and a line about each such name."""
    unknown: list[str] = []
    kept: dict[str, Any] = {}
    for name, allowed in options(pairs).items():
        asked = getattr(view, name)
        kept[name] = tuple(value for value in asked if value in allowed)
        unknown += [str(known(f"name in {name}", value, allowed)) for value in asked if value not in allowed]
    if view.point and all(pair.id != view.point for pair in pairs):
        kept["point"] = ""
        unknown.append(f"no measurement here has the id {view.point!r}")
    return replace(view, **kept), unknown


def chosen(pairs: Sequence[Pair], view: ComparisonView) -> tuple[Pair, ...]:
    """The pairs that pass every filter."""
    wanted = {name: frozenset(values) for name in FILTERS if (values := getattr(view, name))}
    return tuple(pair for pair in pairs if all(_value(pair, name) in values for name, values in wanted.items()))


def _value(pair: Pair, name: str) -> str:
    return str(getattr(pair, "family" if name == "families" else name.removesuffix("s")))


# --- every point


@dataclass(frozen=True)
class ComparisonInfo:
    """Pairs by kind and fit, and of those held out the median absolute error, for kinds that have any."""

    groups: dict[tuple[Kind, Fit], tuple[Pair, ...]]
    held_out_median_absolute_error: dict[Kind, float]
    simulated_count: int


def comparison_info(pairs: Sequence[Pair]) -> ComparisonInfo:
    """Group pairs; the error is over rows that no number behind their prediction was fitted to."""
    groups: dict[tuple[Kind, Fit], list[Pair]] = {}
    for pair in sorted(pairs, key=lambda p: (KINDS.index(p.kind), FITS.index(p.fit))):
        groups.setdefault((pair.kind, pair.fit), []).append(pair)
    return ComparisonInfo(
        {name: tuple(members) for name, members in groups.items()},
        {
            kind: statistics.median(abs(pair.error) for pair in members)
            for (kind, fit), members in groups.items()
            if fit == "held out"
        },
        sum(pair.simulated is not None for pair in pairs),
    )


def comparison_plot(info: ComparisonInfo, *, intervals: bool = True, point: str = "") -> go.Figure:
    """Predicted over measured seconds with the identity line; hollow: fitted to. A point's first datum is its id."""
    every = [pair for members in info.groups.values() for pair in members]
    figure = equality_figure([v for pair in every for v in (pair.measured_seconds, pair.predicted_seconds)])
    for (kind, fit), members in info.groups.items():
        colour, symbol = _KIND_LOOKS[kind]
        group = f"{KIND_WORDS[kind]}, {fit}"
        if intervals:
            _add_intervals(figure, members, colour, group)
        figure.add_scatter(
            x=[pair.measured_seconds for pair in members],
            y=[pair.predicted_seconds for pair in members],
            mode="markers",
            name=group,
            legendgroup=group,
            marker={"color": colour, "symbol": symbol + _FIT_SYMBOLS[fit], "size": 7, "opacity": 0.75},
            customdata=[[pair.id, _hover(pair)] for pair in members],
            hovertemplate="%{customdata[1]}<extra></extra>",
        )
    _marked(figure, [pair for pair in every if pair.id == point])
    figure.update_layout(height=560, hovermode="closest", clickmode="event+select")
    headed(figure, _title(info))
    return figure


def _title(info: ComparisonInfo) -> str:
    errors = [
        f"{KIND_WORDS[kind]} {percent(error)} over {_rows(len(info.groups[kind, 'held out']))}"
        for kind, error in info.held_out_median_absolute_error.items()
    ]
    return f"median absolute error, held out: {'; '.join(errors)}" if errors else "no row was held out"


def _add_intervals(figure: go.Figure, pairs: Sequence[Pair], colour: str, group: str) -> None:
    """80% intervals, where they are known: one broken line, which a browser draws far faster than 700 error bars."""
    known = [(p.measured_seconds, p.low_seconds, p.high_seconds) for p in pairs if p.low_seconds and p.high_seconds]
    if known:
        figure.add_scatter(
            x=[x for at, _, _ in known for x in (at, at, None)],
            y=[y for _, low, high in known for y in (low, high, None)],
            mode="lines",
            line={"color": colour, "width": 0.5},
            hoverinfo="skip",
            showlegend=False,
            legendgroup=group,  # its points' entry hides both
        )


def _hover(pair: Pair) -> str:
    lines = [
        f"{pair.id}: {pair.error:+.0%}",
        f"{pair.operator} on {pair.device} by {pair.engine}",
        f"measured {pair.measured:.4g} {pair.unit}, predicted {pair.predicted:.4g} {pair.unit}",
        f"{pair.fit_detail}; {pair.of}",
    ]
    return "<br>".join(map(safe, lines + ([f"simulated: {pair.simulated}"] if pair.simulated else [])))


def _marked(figure: go.Figure, pairs: Sequence[Pair]) -> None:
    """A ring around the point that is shown in full."""
    for pair in pairs:
        figure.add_scatter(
            x=[pair.measured_seconds],
            y=[pair.predicted_seconds],
            mode="markers",
            name="shown below",
            marker={"color": GREY, "symbol": "circle-open", "size": 18, "line": {"width": 3}},
            customdata=[[pair.id, ""]],
            hoverinfo="skip",
        )


def points_columns(pairs: Sequence[Pair]) -> dict[str, list[Any]]:
    """Every point as the columns of a table; seconds are those of what `of` names."""
    names = (
        "id kind fit family operator device engine source of unit measured predicted bound low high measured_seconds "
        "predicted_seconds bound_seconds low_seconds high_seconds error simulated exception"
    ).split()
    return {name: [getattr(pair, name) for pair in pairs] for name in names}


# --- errors by group


@dataclass(frozen=True)
class ErrorGroup:
    """Errors of some pairs as shares of what was measured. bias: the median signed error.

    in_interval: share of the rows with an interval that lie in it; None where none has one. below_bound: ids of rows
    that claim to be faster than datasheet peaks allow.
    """

    name: str
    fit: Fit
    count: int
    median_absolute_error: float
    mean_absolute_error: float
    bias: float
    in_interval: float | None
    below_bound: tuple[str, ...]


@dataclass(frozen=True)
class ErrorsInfo:
    """Groups by one dimension: the names with the most rows first, held out before fitted."""

    by: By
    groups: tuple[ErrorGroup, ...]


def errors_info(pairs: Sequence[Pair], by: By) -> ErrorsInfo:
    """The errors of pairs by what they say under `by`, fitted ones apart from others."""
    members: dict[tuple[str, Fit], list[Pair]] = {}
    totals: dict[str, int] = {}
    for pair in pairs:
        name = getattr(pair, by)
        members.setdefault((name, pair.fit), []).append(pair)
        totals[name] = totals.get(name, 0) + 1
    ordered = sorted(members, key=lambda key: (-totals[key[0]], key[0], FITS.index(key[1])))
    return ErrorsInfo(by, tuple(_error_group(name, fit, members[name, fit]) for name, fit in ordered))


def _error_group(name: str, fit: Fit, pairs: Sequence[Pair]) -> ErrorGroup:
    errors = [pair.error for pair in pairs]
    inside = [found for pair in pairs if (found := pair.inside) is not None]
    return ErrorGroup(
        name=name,
        fit=fit,
        count=len(pairs),
        median_absolute_error=statistics.median(map(abs, errors)),
        mean_absolute_error=statistics.fmean(map(abs, errors)),
        bias=statistics.median(errors),
        in_interval=sum(inside) / len(inside) if inside else None,
        below_bound=tuple(pair.id for pair in pairs if pair.below_bound),
    )


def errors_plot(info: ErrorsInfo) -> go.Figure:
    """Bars of median absolute errors with how many rows are behind each; of many those of the names with most rows."""
    shown = info.groups[:MOST_BARS]
    figure = base_figure("median absolute error (%)", "")
    for fit in FITS:
        groups = [group for group in shown if group.fit == fit]
        colour, shape = _FIT_PATTERNS[fit]
        figure.add_bar(
            y=[_label(group) for group in groups],
            x=[100 * group.median_absolute_error for group in groups],
            orientation="h",
            name=fit,
            marker={
                "color": colour,
                "pattern": {"shape": shape, "fillmode": "overlay", "fgcolor": "white", "size": 6, "solidity": 0.3},
            },
            text=[f"{percent(group.median_absolute_error)}, {_rows(group.count)}" for group in groups],
            textposition="outside",
            cliponaxis=False,
            customdata=[[f"{group.bias:+.0%}", percent(group.mean_absolute_error)] for group in groups],
            hovertemplate="%{y}: %{text}<br>mean %{customdata[1]}, bias %{customdata[0]}<extra></extra>",
        )
    height = 170 + 24 * max(len(shown), 2)
    figure.update_layout(barmode="overlay", bargap=0.25, height=height, showlegend=True)
    figure.update_layout(legend={"y": -60 / (height - 110)})
    widest = max((100 * group.median_absolute_error for group in shown), default=1.0)
    figure.update_xaxes(range=[0, 1.25 * widest])
    labels = [_label(group) for group in shown]
    figure.update_yaxes(categoryorder="array", categoryarray=labels, autorange="reversed", showgrid=False)
    if len(info.groups) > len(shown):
        text = f"{len(shown)} of {len(info.groups)} groups, those with the most rows first; the table has all"
        headed(figure, text)
    return figure


def _label(group: ErrorGroup) -> str:
    """Its name, and its fit where that is not held out: a colour alone says nothing in print."""
    return safe(group.name if group.fit == "held out" else f"{group.name}, {group.fit}")


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def errors_columns(info: ErrorsInfo) -> dict[str, list[Any]]:
    """The groups as the columns of a table; errors are shares."""
    return {
        info.by: [g.name for g in info.groups],
        "fit": [g.fit for g in info.groups],
        "rows": [g.count for g in info.groups],
        "median error": [round(g.median_absolute_error, 4) for g in info.groups],
        "mean error": [round(g.mean_absolute_error, 4) for g in info.groups],
        "bias": [round(g.bias, 4) for g in info.groups],
        "in 80% interval": [None if g.in_interval is None else round(g.in_interval, 3) for g in info.groups],
        "below the bound": [", ".join(g.below_bound) for g in info.groups],
    }


def described(pair: Pair) -> Mapping[str, str]:
    """One measurement and its prediction in words, by name."""
    unit = f" {pair.unit}"
    found = {
        "measured": f"{pair.measured:.6g}{unit}",
        "predicted": f"{pair.predicted:.6g}{unit} ({pair.error:+.1%})",
        "80% interval": "" if pair.low is None or pair.high is None else f"{pair.low:.4g} to {pair.high:.4g}{unit}",
        "bound": "" if pair.bound is None else f"{pair.bound:.4g}{unit} at datasheet peaks",
        "fit": pair.fit_detail,
        "simulated": pair.simulated or "",
        "exception": pair.exception or "",
        "time": f"measured {quantity(pair.measured_seconds, 's')}, predicted {quantity(pair.predicted_seconds, 's')}: "
        f"{pair.of}",
        "operator": pair.operator,
        "device": pair.device,
        "engine": pair.engine,
        "source": pair.source,
    }
    return {name: text for name, text in found.items() if text}
