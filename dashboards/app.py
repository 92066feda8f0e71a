"""The Streamlit app: one entry per module of `dashboards.views`, which has TITLE, ORDER and page()."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import plotly.graph_objects as go
import streamlit as st

import dashboards.views

READY = "drawing"  # in the session: its browser has what draws figures


def pages() -> list[ModuleType]:
    """The pages' modules in their order."""
    names = [module.name for module in pkgutil.iter_modules(dashboards.views.__path__)]
    return sorted((importlib.import_module(f"dashboards.views.{name}") for name in names), key=lambda m: m.ORDER)


def main() -> None:
    """Draw the page that the address names."""
    st.set_page_config(page_title="Ridgepoint", layout="wide")
    entries = [st.Page(m.page, title=m.TITLE, url_path=m.TITLE.lower().replace(" ", "-")) for m in pages()]
    entry = st.navigation(entries, position="sidebar" if len(entries) > 1 else "hidden")
    content, below = st.container(), st.empty()
    if READY not in st.session_state:
        # What draws figures takes the browser a second to load. It begins at the first one, which is this: while the
        # page is still being computed.
        below.plotly_chart(go.Figure(layout={"height": 10}), key="blank")
    with content:
        entry.run()
    below.empty()
    st.session_state[READY] = True


main()
