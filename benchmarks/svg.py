"""Small multiples of lines and points as a standalone SVG, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from xml.sax.saxutils import escape

WIDTH, HEIGHT, GAP, LEFT, TOP = 230, 150, 46, 56, 74
COLOURS = ("#8c8c8c", "#4c78a8", "#54a24b", "#b279a2", "#eeca3b", "#f58518", "#e45756")


class Dot(NamedTuple):
    """A circle, filled or hollow, and what it says when it is pointed at."""

    x: float
    y: float
    what: str
    filled: bool = True


@dataclass(frozen=True)
class Panel:
    """One plot: lines by name as (x, y) points, None where a line is interrupted."""

    title: str
    lines: dict[str, list[tuple[float, float | None]]]
    dots: list[Dot] = field(default_factory=list)


def figure(
    rows: Sequence[Sequence[Panel]], title: str, x_label: str, y_label: str, filled: str, hollow: str = ""
) -> str:
    """Panels in rows, all with the same axes: x logarithmic to base 2, y from 0. filled, hollow: what the dots are."""
    panels = [p for row in rows for p in row]
    xs = [x for p in panels for line in p.lines.values() for x, _ in line]
    ys = [y for p in panels for line in p.lines.values() for _, y in line if y is not None]
    ys += [dot.y for p in panels for dot in p.dots]
    low, high, top = math.log2(min(xs)), math.log2(max(xs)), max(ys) * 1.06
    names = list(dict.fromkeys(name for p in panels for name in p.lines))
    columns = max(map(len, rows))
    width, height = LEFT + columns * (WIDTH + GAP), TOP + len(rows) * (HEIGHT + GAP) + 4
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="11" fill="#222">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="14">{escape(title)}</text>',
        *_legend(names, filled, hollow),
    ]
    for i, row in enumerate(rows):
        for j, panel in enumerate(row):
            x0, y0 = LEFT + j * (WIDTH + GAP), TOP + i * (HEIGHT + GAP)

            def at(x: float, y: float, x0: float = x0, y0: float = y0) -> str:
                return f"{x0 + (math.log2(x) - low) / (high - low) * WIDTH:.1f},{y0 + HEIGHT * (1 - y / top):.1f}"

            out.append(f'<text x="{x0}" y="{y0 - 6}" font-weight="bold">{escape(panel.title)}</text>')
            for y in range(math.floor(top) + 1):
                out.append(f'<polyline points="{at(2**low, y)} {at(2**high, y)}" stroke="#ddd"/>')
                out.append(f'<text x="{x0 - 5}" y="{at(1, y).split(",")[1]}" dy="4" text-anchor="end">{y}</text>')
            for power in range(math.ceil(low), math.floor(high) + 1, 3):
                where = at(2**power, 0).split(",")[0]
                out.append(f'<text x="{where}" y="{y0 + HEIGHT + 14}" text-anchor="middle">{2**power}</text>')
            out.append(f'<polyline points="{at(2**low, 1)} {at(2**high, 1)}" stroke="#222" stroke-dasharray="2 3"/>')
            for name, line in panel.lines.items():
                colour = COLOURS[names.index(name) % len(COLOURS)]
                for part in _unbroken(line):
                    drawn = " ".join(at(x, y) for x, y in part)
                    out.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="2"/>')
            for dot in panel.dots:
                out.append(_circle(*at(dot.x, dot.y).split(","), dot.filled, f"<title>{escape(dot.what)}</title>"))
    out.append(f'<text x="{width / 2}" y="{height - 8}" text-anchor="middle">{escape(x_label)}</text>')
    middle = TOP + (height - TOP) / 2
    out.append(f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def _circle(x: str, y: str, filled: bool, inside: str = "") -> str:
    fill = "#222" if filled else "white"
    return f'<circle cx="{x}" cy="{y}" r="3.5" fill="{fill}" stroke="#222" stroke-width="1.3">{inside}</circle>'


def _legend(names: Sequence[str], filled: str, hollow: str) -> list[str]:
    out, x = [], float(LEFT)
    for i, name in enumerate(names):
        out.append(f'<rect x="{x}" y="33" width="14" height="4" fill="{COLOURS[i % len(COLOURS)]}"/>')
        out.append(f'<text x="{x + 18}" y="39">{escape(name)}</text>')
        x += 34 + 6.2 * len(name)
    for name, full in ((filled, True), (hollow, False)):
        if name:
            out.append(_circle(f"{x + 4:.1f}", "35", full) + f'<text x="{x + 13:.1f}" y="39">{escape(name)}</text>')
            x += 30 + 6.2 * len(name)
    return out


def _unbroken(line: Sequence[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    parts: list[list[tuple[float, float]]] = [[]]
    for x, y in line:
        if y is None:
            parts.append([])
        else:
            parts[-1].append((x, y))
    return [part for part in parts if part]


Band = tuple[Sequence[float], Sequence[float], Sequence[float]]


def bands(
    panels: dict[str, dict[str, Band]],
    title: str,
    x_label: str,
    y_label: str,
    *,
    across: float,
    along: float,
    least: float = 0.5,
) -> str:
    """Panels side by side: by name a line with a band about it (lower, line, upper), over 1, 2, 3 ...

    Axes: x logarithmic to base 2, y from `least` to 1. across, along: where dashed lines cross the axes of x and y.
    """
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    most = max(len(line) for panel in panels.values() for _, line, _ in panel.values())
    wide, high = 1.7 * WIDTH, 1.7 * HEIGHT
    width, height = LEFT + len(panels) * (wide + GAP), TOP + high + GAP + 4
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" font-family="sans-serif" '
        'font-size="11" fill="#222">',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="14">{escape(title)}</text>',
        *_legend(names, "", ""),
    ]
    for i, (heading, panel) in enumerate(panels.items()):
        x0 = LEFT + i * (wide + GAP)

        def at(x: float, y: float, x0: float = x0) -> str:
            share = (max(y, least) - least) / (1 - least)
            return f"{x0 + math.log2(x) / math.log2(most) * wide:.1f},{TOP + high * (1 - share):.1f}"

        out.append(f'<text x="{x0}" y="{TOP - 6}" font-weight="bold">{escape(heading)}</text>')
        for tick in range(round(least * 10), 11):
            out.append(f'<polyline points="{at(1, tick / 10)} {at(most, tick / 10)}" stroke="#ddd"/>')
            y = at(1, tick / 10).split(",")[1]
            out.append(f'<text x="{x0 - 5}" y="{y}" dy="4" text-anchor="end">{tick / 10:g}</text>')
        for power in range(math.floor(math.log2(most)) + 1):
            x = at(2**power, least).split(",")[0]
            out.append(f'<text x="{x}" y="{TOP + high + 14:.1f}" text-anchor="middle">{2**power}</text>')
        for dashed in (f"{at(across, least)} {at(across, 1)}", f"{at(1, along)} {at(most, along)}"):
            out.append(f'<polyline points="{dashed}" stroke="#222" stroke-dasharray="3 3"/>')
        for name, (lower, line, upper) in panel.items():
            colour = COLOURS[names.index(name) % len(COLOURS)]
            edge = [*enumerate(upper, 1), *reversed([*enumerate(lower, 1)])]
            points = " ".join(at(x, y) for x, y in edge)
            out.append(f'<polygon points="{points}" fill="{colour}" fill-opacity="0.18"/>')
            points = " ".join(at(x, y) for x, y in enumerate(line, 1))
            out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
    out.append(f'<text x="{width / 2:.0f}" y="{height - 8:.0f}" text-anchor="middle">{escape(x_label)}</text>')
    middle = TOP + high / 2
    out.append(
        f'<text transform="translate(14 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    return "\n".join([*out, "</svg>"]) + "\n"
