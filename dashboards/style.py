"""The look that all figures share: colours, axes, safe labels.

Colours are those of Okabe and Ito (2008), which remain apart for colour-blind readers; symbols and dashes repeat what
they say. Backgrounds are transparent and no text colour is set: a figure sits on a light page and on a dark one.
"""

from __future__ import annotations

import html

import plotly.graph_objects as go

from perfmodel.prediction import Bound

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
PALETTE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
BOUND_COLOURS: dict[Bound, str] = {"memory": BLUE, "compute": VERMILLION, "overhead": ORANGE}
GREY = "#8A8A8A"
GRID = "rgba(128,128,128,0.25)"
AXES = {"batch": "batch (sequences)", "context": "context (cached tokens per sequence)"}
PATTERN = {"fillmode": "overlay", "fgcolor": "white", "fgopacity": 0.35, "size": 6, "solidity": 0.2}  # of bars
NUMBERS = 98  # pixels beside an axis of numbers, its title included
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x")


def base_figure(x: str, y: str) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"size": 13},
        margin={"l": NUMBERS, "r": 25, "t": 25, "b": 60},
        height=440,
        legend={"orientation": "h", "yanchor": "top", "y": -0.2, "x": 0},
        hoverlabel={"align": "left"},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": GREY, "activecolor": GREY},
    )
    axis = {
        "gridcolor": GRID,
        "linecolor": GREY,
        "zeroline": False,
        "ticks": "outside",
        "tickcolor": GRID,
        "automargin": True,
    }
    figure.update_xaxes(title_text=x, **axis)
    figure.update_yaxes(title_text=y, **axis)
    return figure


def make_room(figure: go.Figure) -> None:
    """Widen the left margin for the names of bars: where it is too small, a browser draws everything twice."""
    names = [name for trace in figure.data if trace.type == "bar" and trace.orientation == "h" for name in trace.y]
    if names:
        longest = max(len(line) for name in names for line in str(name).split("<br>"))
        figure.update_layout(margin={"l": max(figure.layout.margin.l or 0, 46 + 7 * longest)})


def headed(figure: go.Figure, text: str) -> None:
    """Write a heading between a figure and the controls above it, which would cover a long one beside them."""
    place = {"x": 0, "xref": "paper", "y": 1, "yref": "paper", "yanchor": "bottom", "pad": {"b": 8}}
    figure.update_layout(title={"text": text, "font": {"size": 13}, **place}, margin={"t": 60})


def safe(text: str) -> str:
    """Plotly reads a little HTML in labels: names that come from files must stay text."""
    return html.escape(text, quote=False)
