"""Streamlit's server, which imports the pages while the first browser still loads: nobody waits for them then.

`ridgepoint dashboard` runs it as a program, with the arguments of `streamlit run`.
"""

from __future__ import annotations

import importlib
import pkgutil
import threading
import time
from contextlib import suppress

_LATER_SECONDS = 5.0  # until what other pages need is imported: the first one is drawn then


def main() -> None:
    """Serve until it is stopped."""
    # Plotly uses pandas as soon as any thread has begun to import it, and fails on the half that is there (7.0). Tables
    # import it, whenever somebody first opens one: so it is there before anybody can.
    import pandas  # noqa: F401
    from streamlit.web.cli import main as streamlit

    threading.Thread(target=_prepare, daemon=True).start()
    streamlit(prog_name="streamlit")


def _prepare() -> None:
    """Import what a first view needs, once the server is there: before, its caches have no home."""
    from streamlit import runtime

    while not runtime.exists():
        time.sleep(0.02)
    import dashboards.views

    _import("dashboards.views.explore")  # the first page
    _import(*(f"dashboards.views.{module.name}" for module in pkgutil.iter_modules(dashboards.views.__path__)))
    time.sleep(_LATER_SECONDS)
    _import("autotune.storage", "optuna.importance")


def _import(*names: str) -> None:
    for name in names:
        with suppress(Exception):  # whoever needs it is told
            importlib.import_module(name)


if __name__ == "__main__":
    main()
