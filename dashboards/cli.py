"""Commands that show results: `ridgepoint dashboard` serves them, `ridgepoint demo` makes them."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from hardware.files import UserError


def register(app: typer.Typer) -> None:
    """Add this package's commands to the root command."""
    app.command()(dashboard)


def dashboard(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8501,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 127.0.0.1 is reachable from here only.")
    ] = "127.0.0.1",
    headless: Annotated[bool, typer.Option("--headless", help="Open no browser.")] = False,
) -> None:
    """Serve the dashboard in the browser until it is stopped. It needs neither torch nor a GPU."""
    _check_free(host, port)
    root = Path(__file__).resolve().parent
    print(f"dashboard: http://{host}:{port} (stop with Ctrl+C)", file=sys.stderr, flush=True)
    # Streamlit runs the page as a script: it finds this package wherever the command was started.
    paths = [str(root.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    options = {
        "server.address": host,
        "server.port": port,
        "server.headless": headless,
        "server.showEmailPrompt": False,
        "server.fileWatcherType": "none",
        "browser.serverAddress": host,  # without it, Streamlit asks the internet for this machine's address
        "browser.gatherUsageStats": False,
        "client.toolbarMode": "minimal",
    }
    command = [sys.executable, "-m", "streamlit", "run", str(root / "app.py")]
    command += [f"--{name}={str(value).lower()}" for name, value in options.items()]
    os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": os.pathsep.join(paths)})


def _check_free(host: str, port: int) -> None:
    """UserError when the address cannot be listened on; Streamlit itself says so in several lines."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port") from error
