"""The Streamlit app: one entry of its menu per page in `dashboards.views`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

import streamlit as st

from dashboards.views import TITLES


def pages() -> dict[str, Callable[[], None]]:
    """What draws each page, by its title, in the menu's order. A page's module is imported when it is first drawn."""
    return {title: partial(_draw, name) for name, title in TITLES.items()}


def _draw(name: str) -> None:
    importlib.import_module(f"dashboards.views.{name}").page()


def main() -> None:
    """Draw the page that the address names."""
    st.set_page_config(page_title="Ridgepoint", layout="wide")
    entries = [st.Page(draw, title=name, url_path=name.lower().replace(" ", "-")) for name, draw in pages().items()]
    entry = st.navigation(entries, position="sidebar" if len(entries) > 1 else "hidden")
    entry.run()


main()
