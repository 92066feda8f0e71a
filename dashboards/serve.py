"""Streamlit's server, which prepares the pages while the first browser still loads: nobody waits for that then.

`ridgepoint dashboard` runs it as a program, with the arguments of `streamlit run`.
"""

from __future__ import annotations

import importlib
import threading
import time
from contextlib import suppress
from types import ModuleType

_LATER_SECONDS = 5.0  # until the other pages are prepared: the first one is drawn then


def main() -> None:
    """Serve until it is stopped."""
    # Plotly uses pandas as soon as any thread has begun to import it, and fails on the half that is there (7.0). Tables
    # import it, whenever somebody first opens one: so it is there before anybody can.
    import pandas  # noqa: F401
    from streamlit.web.cli import main as streamlit

    threading.Thread(target=_prepare, daemon=True).start()
    streamlit(prog_name="streamlit")


def _prepare() -> None:
    """Import the pages and work out their first views, once the server is there: before, its caches have no home."""
    from streamlit import runtime

    while not runtime.exists():
        time.sleep(0.02)
    from dashboards.views import TITLES

    first, *others = TITLES
    _ready(first)
    time.sleep(_LATER_SECONDS)
    for name in others:
        _ready(name)
    _import("autotune.storage")
    _import("optuna.importance")


def _ready(page: str) -> None:
    prepare = getattr(_import(f"dashboards.views.{page}"), "prepare", None)
    if prepare is not None:
        with suppress(Exception):  # whoever opens the page is told
            prepare()


def _import(name: str) -> ModuleType | None:
    with suppress(Exception):  # whoever needs it is told
        return importlib.import_module(name)
    return None


if __name__ == "__main__":
    main()
