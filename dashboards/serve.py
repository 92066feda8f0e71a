"""Streamlit's server, which imports the pages while the first browser still loads: nobody waits for them then.

`ridgepoint dashboard` runs it as a program, with the arguments of `streamlit run`.
"""

from __future__ import annotations

import importlib
import pkgutil
import threading
import time
from contextlib import suppress


def main() -> None:
    """Serve until it is stopped."""
    from streamlit.web.cli import main as streamlit

    threading.Thread(target=_prepare, daemon=True).start()
    streamlit(prog_name="streamlit")


def _prepare() -> None:
    """Import what a first view needs, once the server is there: before, its caches have no home."""
    from streamlit import runtime

    while not runtime.exists():
        time.sleep(0.02)
    import dashboards.views

    views = [f"dashboards.views.{module.name}" for module in pkgutil.iter_modules(dashboards.views.__path__)]
    # pandas: Streamlit itself imports it late, and slowly. autotune.storage: studies are read with it.
    for name in ("pandas", *views, "autotune.storage"):
        with suppress(Exception):  # whoever needs it is told
            importlib.import_module(name)


if __name__ == "__main__":
    main()
