"""What all pages are made of: their state in the address, problems in a line, figures and tables to download."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import plotly.graph_objects as go
import streamlit as st

from dashboards.address import from_query, to_query
from dashboards.columns import csv_text
from dashboards.style import make_room
from hardware.files import UserError

V = TypeVar("V")
MOST_LETTERS = 1000  # of a problem: an address can hold far more, and would fill the page with them


def escape(text: object) -> str:
    """Names come from files and addresses: no Markdown in them is obeyed."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#+-!|$~:" else c for c in str(text))


def problem(error: UserError | str) -> None:
    """A failure that the reader can mend, in one line; of a very long one the beginning and the end."""
    line = " ".join(str(error).split())
    if len(line) > MOST_LETTERS:
        line = f"{line[: MOST_LETTERS // 2]} ... {line[-MOST_LETTERS // 2 :]}"
    st.error(escape(line))


# --- a page's state


def key(page: str, field: str) -> str:
    """The key of the widget that holds a field of a page's view."""
    return f"{page}-{field}"


def restore(cls: type[V], page: str) -> None:
    """Fill a page's widgets from the address where that is not what the page itself wrote, before they are drawn.

    A reader who comes back from another page finds what was left. A widget that was not drawn for a while, whose value
    Streamlit has forgotten, gets it back. An address that cannot be shown is named, and the default view is shown.
    """
    asked = {name: st.query_params.get_all(name) for name in st.query_params}
    written = st.session_state.get(_written(page))
    missing_only = asked == written
    if not asked and written is not None:
        asked = written
    try:
        view = from_query(cls, asked)
    except UserError as error:
        problem(f"The address cannot be shown: {error}")
        view = cls()
    for name in (f.name for f in dataclasses.fields(cls)):  # type: ignore[arg-type]
        widget = key(page, name)
        if not missing_only or widget not in st.session_state:
            value = getattr(view, name)
            st.session_state[widget] = list(value) if isinstance(value, tuple) else value


def remember(view: Any, page: str) -> None:
    """Write a page's view into the address."""
    st.session_state[_written(page)] = query = to_query(view)
    st.query_params.from_dict(query)


def not_drawn(cls: type[Any], page: str, *, but: Sequence[str] = ()) -> None:
    """Take back what `restore` gave to widgets that this run does not draw: the next run gives it again.

    Streamlit tells the browser a value only in the run that sets it: drawn later, a widget would show another one.
    """
    for name in (f.name for f in dataclasses.fields(cls)):
        if name not in but:
            st.session_state.pop(key(page, name), None)


def _written(page: str) -> str:
    return f"address:{page}"


# --- what a page shows


def figure(
    plot: go.Figure, name: str, columns: Mapping[str, Sequence[Any]], *, select: bool = False
) -> list[dict[str, Any]]:
    """Draw a figure with its data to download; the camera above it saves the picture. Returns the points selected."""
    theme = st.context.theme.type
    if theme:  # a picture that is saved can then be read by itself
        plot.update_layout(paper_bgcolor=st.get_option(f"theme.{theme}.backgroundColor"))
    make_room(plot)
    options = {"displaylogo": False, "toImageButtonOptions": {"format": "svg", "filename": name}}
    event = st.plotly_chart(plot, key=name, config=options, on_select="rerun" if select else "ignore")
    _download(name, columns)
    return list(event["selection"]["points"]) if select else []


def table(
    columns: Mapping[str, Sequence[Any]],
    name: str,
    *,
    data: Mapping[str, Sequence[Any]] | None = None,
    links: Sequence[str] = (),
) -> None:
    """A table with its data to download: what is shown, or `data`. The columns in `links` hold addresses to follow."""
    config = {column: st.column_config.LinkColumn(display_text="open", width="small") for column in links}
    st.dataframe(dict(columns), key=name, hide_index=True, column_config=config)
    _download(name, columns if data is None else data)


def short_table(columns: Mapping[str, Sequence[Any]], name: str) -> None:
    """A table of a few rows with its data to download, drawn as text: a browser loads nothing for it."""
    st.markdown(markdown_table(columns))
    _download(name, columns)


def markdown_table(columns: Mapping[str, Sequence[Any]]) -> str:
    """Columns in Markdown, numbers to the right and to four digits."""
    numbers = [all(v is None or isinstance(v, int | float) for v in values) for values in columns.values()]
    rows = [[_cell(name) for name in columns], ["---:" if number else "---" for number in numbers]]
    rows += [[_cell(value) for value in row] for row in zip(*columns.values(), strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(value: object) -> str:
    if value is None:
        return ""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    text = f"{value:,}" if number and isinstance(value, int) else f"{value:,.4g}" if number else str(value)
    return escape(" ".join(text.split()))


@contextmanager
def unfolded(label: str, name: str, *, at_first: bool = False) -> Iterator[bool]:
    """A part that can be folded away: whether it is open. What is in it is drawn only then, and nobody waits for it."""
    if name not in st.session_state:  # Streamlit takes one whose `expanded` changes for another, and folds it
        st.session_state[name] = at_first
    part = st.expander(label, key=name, on_change="rerun")
    with part:
        yield bool(part.open)


def _download(name: str, columns: Mapping[str, Sequence[Any]]) -> None:
    st.download_button(
        "data (CSV)",
        csv_text(columns),
        file_name=f"{name}.csv",
        mime="text/csv",
        key=f"{name}-data",
        on_click="ignore",  # the page has nothing new to show
        type="tertiary",
    )
