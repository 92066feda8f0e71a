"""One self-contained HTML file: text, tables, code and figures, readable without a network, in light and in dark."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from hardware.files import write_atomic

# Nothing may be loaded: what is not in the file is refused by the browser itself.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --soft: #59636e; --page: #ffffff; --line: #d1d9e0; --shade: #f3f5f7;
  --warn: #D55E00; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --soft: #a0a8b1; --page: #14171b; --line: #3a4149;
  --shade: #1e2329; --warn: #E69F00; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 1080px;
  margin: 0 auto; padding: 2rem 1.5rem 4rem; }
h1 { margin-bottom: .3rem; } h2 { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1.2rem; }
nav a { color: inherit; margin-right: 1rem; white-space: nowrap; } .soft, figcaption { color: var(--soft); }
pre, code { font-family: ui-monospace, monospace; font-size: .87em; }
pre { background: var(--shade); padding: .8rem 1rem; overflow-x: auto; border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .92em; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number, td.short { white-space: nowrap; } td.long { white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: 1rem 0; } summary { cursor: pointer; }
.note { border-left: 4px solid var(--warn); padding: .4rem .9rem; background: var(--shade); }
figure { margin: 1.2rem 0; }
.cartesianlayer text:not(.bartext-inside, .heatmap-label text), .infolayer text, .legendtext {
  fill: var(--text) !important; }
"""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Note:
    """A paragraph that must not be overlooked, for example that something was simulated."""

    text: str


@dataclass(frozen=True)
class Code:
    """Lines to copy or to read as they are."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of cells; columns whose cells all look like numbers are aligned as such."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Fold:
    """A table that is shown on demand."""

    summary: str
    table: Table


@dataclass(frozen=True)
class Plot:
    """A figure and what it shows."""

    figure: go.Figure
    caption: str


Block = Text | Note | Code | Table | Fold | Plot


@dataclass(frozen=True)
class Section:
    """A heading and what follows it."""

    title: str
    blocks: tuple[Block, ...]


def write_document(path: str | os.PathLike[str], title: str, lead: str, sections: Sequence[Section]) -> Path:
    """Write the file under a temporary name, then rename. All text is escaped; UserError where it cannot be written."""
    names = [f"section-{i}" for i in range(1, len(sections) + 1)]
    links = "".join(f'<a href="#{n}">{_text(s.title)}</a> ' for n, s in zip(names, sections, strict=True))
    bodies = [
        f'<section id="{name}"><h2>{_text(section.title)}</h2>\n'
        + "\n".join(_block(block, f"{name}-{i}") for i, block in enumerate(section.blocks, 1))
        + "</section>"
        for name, section in zip(names, sections, strict=True)
    ]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style>\n'
        f"<script>{get_plotlyjs()}</script></head>\n"
        f'<body><h1>{_text(title)}</h1>\n<p class="soft">{_text(lead)}</p>\n<nav>{links}</nav>\n'
        + "\n".join(bodies)
        + "\n</body></html>\n"
    )
    return write_atomic(path, page)


def _block(block: Block, name: str) -> str:
    if isinstance(block, Text):
        return f"<p>{_text(block.text)}</p>"
    if isinstance(block, Note):
        return f'<p class="note">{_text(block.text)}</p>'
    if isinstance(block, Code):
        return f"<pre>{_text(block.text)}</pre>"
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Fold):
        return f"<details><summary>{_text(block.summary)}</summary>{_table(block.table)}</details>"
    drawn = block.figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=name,  # the same file from the same data
        config={"displaylogo": False, "responsive": True},
    )
    return f"<figure>{drawn}<figcaption>{_text(block.caption)}</figcaption></figure>"


def _table(table: Table) -> str:
    columns = [[row[i] for row in table.rows] for i in range(len(table.columns))]
    kinds = [f' class="{_kind(column)}"' for column in columns]
    head = "".join(f"<th{kind}>{_text(c)}</th>" for c, kind in zip(table.columns, kinds, strict=True))
    rows = [
        "<tr>" + "".join(f"<td{kind}>{_text(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in table.rows
    ]
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _kind(cells: Sequence[str]) -> str:
    if all(cell[:1].isdigit() or cell[:1] in ("+", "-", "") for cell in cells):
        return "number"
    return "short" if max(map(len, cells)) <= 24 else "long"


def _text(text: str) -> str:
    return html.escape(text)
