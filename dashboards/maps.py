"""The break-even map: who wins at which batch and context, by how much, and where a headline holds. Streamlit-free."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from dashboards.choice import Choice
from dashboards.columns import columns_of
from dashboards.style import AXES, BLUE, GREY, VERMILLION, base_figure, headed, safe
from perfmodel.breakeven import HOLDS, Headline, Paying, SamplerMap
from perfmodel.steps import title

Cells = tuple[tuple[float | None, ...], ...]  # [batch][context]; None where the setting does not fit the memory
Point = tuple[float, float]  # batch and context
MIDDLE = "#F2F2F2"  # of the scale: as fast as autoregressive decoding
LEAST_SCALE = 2.0  # the colours reach at least this many times either way: small differences stay pale
OUTLINES = (("dotted", "dot"), ("dashed", "dash"))  # of the regions where headlines hold


@dataclass(frozen=True)
class HeadlineInfo:
    """A speedup that was announced: in which cells it holds, and where most of it remains."""

    tokens_per_step: float
    holds: tuple[tuple[int, int], ...]  # cells, as places in batch and context
    most: tuple[float, int, int] | None  # what remains of it, at a batch and a context; None: K is too small for it

    @property
    def words(self) -> str:
        """Where it holds and what remains of it, in a sentence."""
        name = f"The headline {self.tokens_per_step:g}x"
        if self.most is None:
            return f"{name} cannot hold: no step of this setting commits {self.tokens_per_step:g} tokens."
        remaining, batch, context = self.most
        rest = f"at most {remaining:.2f}x of it remains, at batch {batch:,} and context {context:,}"
        if self.holds:
            cells = "one cell" if len(self.holds) == 1 else f"{len(self.holds)} cells"
            return f"{name} holds ({HOLDS:.0%} of it or more is left) in {cells}, outlined; {rest}."
        return f"{name} holds nowhere in this map: {rest}."


@dataclass(frozen=True)
class MapInfo:
    """One setting on one device against autoregressive decoding."""

    device: str
    setting: str
    tokens_per_step: float
    batch: tuple[int, ...]
    context: tuple[int, ...]
    speedup: Cells
    step_cost: Cells  # autoregressive steps that a step takes: the tokens it needs to break even
    contour: tuple[tuple[Point, Point], ...]  # pieces of the line where the speedup is 1
    headlines: tuple[HeadlineInfo, ...]
    chosen: tuple[int, int]  # the batch and context to mark
    pays: str  # at which batches of the chosen context, and contexts of the chosen batch: exact ends, in words

    def columns(self) -> dict[str, list[Any]]:
        """One row a cell; empty where it does not fit."""
        rows = [
            (self.device, self.setting, b, c, self.speedup[i][j], self.step_cost[i][j], self.speedup[i][j] is not None)
            for i, b in enumerate(self.batch)
            for j, c in enumerate(self.context)
        ]
        names = ("hardware", "setting", "batch", "context", "speedup_over_autoregressive", "break_even_tokens_per_step",
                 "fits")  # fmt: skip
        return columns_of(names, rows)

    @property
    def words(self) -> str:
        """How many cells pay, and the best and the worst of them."""
        found = [(s, b, c) for b, row in zip(self.batch, self.speedup, strict=True)
                 for c, s in zip(self.context, row, strict=True) if s is not None]  # fmt: skip
        if not found:
            return f"Nothing fits the memory of {self.device} in this map."
        paying = sum(s > 1 for s, _, _ in found)
        best, worst = max(found), min(found)
        missing = len(self.batch) * len(self.context) - len(found)
        apart = f" {missing} cells (hatched) do not fit the memory." if missing else ""
        return (
            f"On {self.device}, {self.setting} pays in {paying} of the {len(found)} cells that fit: from "
            f"{worst[0]:.2f}x at batch {worst[1]:,} and context {worst[2]:,} to {best[0]:.2f}x at batch {best[1]:,} "
            f"and context {best[2]:,}.{apart} {self.pays}"
        )


def map_info(found: SamplerMap, device: str, setting: str, chosen: tuple[int, int]) -> MapInfo:
    """A break-even map of one setting as plain data. chosen: a batch and a context of its axes."""
    (contender,) = found.contenders
    at_batch = _stretches(found.by_batch[found.context.index(chosen[1])])
    at_context = _stretches(found.by_context[found.batch.index(chosen[0])])
    return MapInfo(
        device=device,
        setting=setting,
        tokens_per_step=contender.acceptance_length,
        batch=found.batch,
        context=found.context,
        speedup=_cells(found.speedup),
        step_cost=_cells(found.step_cost),
        contour=tuple(contour(found.batch, found.context, np.log(found.speedup))),
        headlines=tuple(_headline(h, found) for h in found.headlines),
        chosen=chosen,
        pays=f"At context {chosen[1]:,} it pays at {f'batch {at_batch}' if at_batch else 'no batch'}; at batch "
        f"{chosen[0]:,} at {f'context {at_context}' if at_context else 'no context'}.",
    )


def map_of(choice: Choice, device: str, found: SamplerMap) -> MapInfo:
    """The map of a choice on one of its devices (`choice.pays_map`), with its setting by name."""
    setting = f"{title(choice.decoding)} with K = {choice.draft_tokens}"
    return map_info(found, device, setting, (choice.batch, choice.context))


def contour(x: Sequence[float], y: Sequence[float], level: npt.ArrayLike) -> Iterator[tuple[Point, Point]]:
    """Pieces of the line between what is above 0 and what is not: `level` is of [x, y], NaN where nothing is known.

    Marching squares. Between two neighbours the crossing is where `level` is 0 on a line over the logarithms of the
    axes; where four neighbours alternate, their mean says which two belong together.
    """
    values = np.asarray(level, dtype=float)
    for i in range(len(x) - 1):
        for j in range(len(y) - 1):
            square = ((i, j), (i + 1, j), (i + 1, j + 1), (i, j + 1))
            corners = [place for place in square if not math.isnan(values[place])]
            if len(corners) < 3:  # with three, the triangle between them
                continue
            around = [float(values[place]) for place in corners]
            crossed = []
            for n in range(len(corners)):
                a, b = around[n - 1], around[n]
                if (a > 0) != (b > 0):
                    (i0, j0), (i1, j1) = corners[n - 1], corners[n]
                    part = a / (a - b)
                    crossed.append((_between(x[i0], x[i1], part), _between(y[j0], y[j1], part)))
            if len(crossed) == 4 and (sum(around) > 0) == (around[0] > 0):
                crossed = [*crossed[1:], crossed[0]]  # the first and the third corner belong together
            yield from zip(crossed[::2], crossed[1::2], strict=True)


def map_plot(info: MapInfo) -> go.Figure:
    """Blue where it pays, orange-red where it does not, the line between; hatched where it does not fit the memory.

    Cells are of one size, whatever the numbers of the axes.
    """
    figure = base_figure(AXES["batch"], AXES["context"])
    z = np.array([[math.nan if s is None else math.log2(s) for s in row] for row in info.speedup]).T
    reach = max(math.log2(LEAST_SCALE), float(np.nanmax(np.abs(z))) if np.isfinite(z).any() else 0.0)
    ticks = [n / 2 if reach < 2 else n for n in range(-10, 11) if abs(n / 2 if reach < 2 else n) <= reach]
    figure.add_heatmap(
        x=list(range(len(info.batch))),
        y=list(range(len(info.context))),
        z=z,
        zmin=-reach,
        zmax=reach,
        colorscale=[[0, VERMILLION], [0.5, MIDDLE], [1, BLUE]],
        text=[["" if row[j] is None else f"{row[j]:.2f}" for row in info.speedup] for j in range(len(info.context))],
        texttemplate="%{text}",
        customdata=[[_cell_text(info, i, j) for i in range(len(info.batch))] for j in range(len(info.context))],
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,
        xgap=1,
        ygap=1,
        colorbar={"title": {"text": "speedup (x)"}, "tickvals": ticks, "ticktext": [f"{2.0**t:.3g}" for t in ticks]},
    )
    missing = [(i, j) for i, row in enumerate(info.speedup) for j, s in enumerate(row) if s is None]
    if missing:
        corners = [_square(i, j) for i, j in missing]
        figure.add_scatter(
            x=[x for xs, _ in corners for x in (*xs, None)],
            y=[y for _, ys in corners for y in (*ys, None)],
            mode="lines",
            line={"width": 0},
            fill="toself",
            fillcolor="rgba(128,128,128,0.15)",
            fillpattern={"shape": "/", "fgcolor": GREY, "fillmode": "overlay", "size": 8},
            hoverinfo="skip",
        )
    if info.contour:
        ends = [end for piece in info.contour for end in (*piece, None)]
        figure.add_scatter(
            x=[None if end is None else _place(info.batch, end[0]) for end in ends],
            y=[None if end is None else _place(info.context, end[1]) for end in ends],
            mode="lines",
            line={"color": "black", "width": 3},
            hoverinfo="skip",
        )
    outlined = []
    for headline, (word, dash) in zip(info.headlines, OUTLINES, strict=False):
        if headline.holds:
            edges = outline(headline.holds)
            figure.add_scatter(
                x=[x for (x0, _), (x1, _) in edges for x in (x0, x1, None)],
                y=[y for (_, y0), (_, y1) in edges for y in (y0, y1, None)],
                mode="lines",
                line={"color": "black", "width": 3, "dash": dash},
                hoverinfo="skip",
            )
            outlined.append(f"{word} outline: the headline {headline.tokens_per_step:g}x holds")
    figure.add_scatter(
        x=[_place(info.batch, info.chosen[0])],
        y=[_place(info.context, info.chosen[1])],
        mode="markers",
        marker={"symbol": "square-open", "size": 32, "color": "black", "line": {"width": 3}},
        hoverinfo="skip",
    )
    for update, values in ((figure.update_xaxes, info.batch), (figure.update_yaxes, info.context)):
        names = [f"{v:,}" for v in values]
        update(tickvals=list(range(len(values))), ticktext=names, range=[-0.5, len(values) - 0.5], showgrid=False)
    drawn = ["black line: break-even"] * bool(info.contour) + ["square: the point chosen"]
    drawn += ["hatched: does not fit the memory"] * bool(missing) + outlined
    headed(figure, "; ".join(drawn))
    figure.update_layout(height=165 + 38 * len(info.context), showlegend=False)
    return figure


def outline(cells: Sequence[tuple[int, int]]) -> list[tuple[Point, Point]]:
    """The edges between these cells and all others; a cell's middle is at its place, its sides half of one beyond."""
    inside = set(cells)
    found = []
    for i, j in cells:
        (left, right, *_), (low, _, high, *_) = _square(i, j)
        for neighbour, edge in (
            ((i - 1, j), ((left, low), (left, high))),
            ((i + 1, j), ((right, low), (right, high))),
            ((i, j - 1), ((left, low), (right, low))),
            ((i, j + 1), ((left, high), (right, high))),
        ):
            if neighbour not in inside:
                found.append(edge)
    return found


def _square(i: int, j: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    left, right, low, high = i - 0.5, i + 0.5, j - 0.5, j + 0.5
    return (left, right, right, left, left), (low, low, high, high, low)


def _stretches(found: Sequence[Paying]) -> str:
    """ "1 to 23, and 120 to 512 (what fits)": the ends are exact, but for those of the axis."""
    ends = {"break-even": "", "memory": " (what fits)", "axis": " (the end of the map)"}
    return " and ".join(
        (f"{p.first:,}" if p.first == p.last else f"{p.first:,} to {p.last:,}") + ends[p.ends_by] for p in found
    )


def _cells(values: npt.NDArray[np.float64]) -> Cells:
    return tuple(tuple(None if v != v else v for v in row) for row in values.tolist())


def _headline(headline: Headline, found: SamplerMap) -> HeadlineInfo:
    holds = tuple((int(i), int(j)) for i, j in np.argwhere(headline.holds))
    most = None
    if not np.isnan(headline.remaining).all():
        i, j = np.unravel_index(int(np.nanargmax(headline.remaining)), headline.remaining.shape)
        most = (float(headline.remaining[i, j]), found.batch[int(i)], found.context[int(j)])
    return HeadlineInfo(headline.tokens_per_step, holds, most)


def _between(start: float, end: float, part: float) -> float:
    return float(start * (end / start) ** part)


def _place(axis: Sequence[int], value: float) -> float:
    """Where a value lies between the cells of an axis."""
    return float(np.interp(math.log(value), np.log(axis), range(len(axis))))


def _cell_text(info: MapInfo, i: int, j: int) -> str:
    speedup, cost = info.speedup[i][j], info.step_cost[i][j]
    if speedup is None or cost is None:
        return ""
    lines = (
        f"{info.device}, batch {info.batch[i]:,}, context {info.context[j]:,}: {speedup:.2f}x",
        f"a step costs {cost:.2f} autoregressive steps and commits {info.tokens_per_step:.2f} tokens",
    )
    return "<br>".join(map(safe, lines))
