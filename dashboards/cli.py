"""Commands that show results: `ridgepoint dashboard` serves them, `ridgepoint demo` makes them."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from hardware.files import UserError

DEMO_FOLDER = Path("demo-out")
LOOPBACK = ("127.0.0.1", "localhost")
THEMES = {"light": "#ffffff", "dark": "#171614"}  # a page's background, which a figure's picture gets too


def register(app: typer.Typer) -> None:
    """Add this package's commands to the root command."""
    app.command()(dashboard)
    app.command()(demo)


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
    if host not in LOOPBACK:
        print(
            f"ridgepoint: whoever reaches {host}:{port} can use this dashboard without a password, and tune on this "
            "machine with it",
            file=sys.stderr,
        )
    print(f"dashboard: http://{host}:{port} (stop with Ctrl+C)", file=sys.stderr, flush=True)
    # This package is found wherever the command was started, and none of its name that lies there (-P).
    paths = [str(root.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-P", "-m", "dashboards.serve", "run", str(root / "asgi.py")]
    command += server_options(host, port, headless=headless)
    os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": os.pathsep.join(paths)})


def server_options(host: str, port: int, *, headless: bool) -> list[str]:
    """Streamlit's options. Each is said here, also where it is the default: a user's own configuration has no say."""
    options: dict[str, object] = {
        "server.address": host,
        "server.port": port,
        "server.headless": headless,
        "server.showEmailPrompt": False,
        "server.fileWatcherType": "none",
        "server.baseUrlPath": "",
        "server.maxUploadSize": 1,  # MB; studies, deployments and profiles are far smaller
        "server.enableXsrfProtection": True,  # of uploads
        "server.enableCORS": True,  # that is: other sites' pages are refused
        "server.enableStaticServing": False,
        "server.enableAgentApi": False,
        "browser.serverAddress": host,  # without it, Streamlit asks the internet for this machine's address
        "browser.gatherUsageStats": False,
        "client.showErrorDetails": "none",  # a traceback is for the server's log: it names paths and values
        "client.showErrorLinks": False,
        "client.allowedOrigins": f"http://{host}:{port}",  # whose frames may steer a page; else Streamlit's own sites'
        "client.toolbarMode": "minimal",
        "runner.magicEnabled": False,
        **{f"theme.{name}.backgroundColor": colour for name, colour in THEMES.items()},
        "theme.light.primaryColor": "#0072B2",  # the figures' blue; red would say: wrong
        "theme.dark.primaryColor": "#1483CC",  # lighter: read on black, and white on it
    }
    found = [f"--{name}={str(value).lower()}" for name, value in options.items()]
    # A page of another site whose name is made to lead here (DNS rebinding) must not drive this one. From elsewhere a
    # server is reached by names that it does not know.
    return found + [f"--server.allowedHosts={name}" for name in LOOPBACK if host in LOOPBACK]


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the report; an earlier demo in it is replaced.")] = DEMO_FOLDER,
    model: Annotated[str, typer.Option(help="A checkpoint that ships, or a checkpoint's folder.")] = "zaya-nano",
    quick: Annotated[bool, typer.Option("--quick", help="About a minute instead of four: fewer points.")] = False,
    seconds: Annotated[float | None, typer.Option(help="How long to tune (default: 75, quick 10).")] = None,
    hardware: Annotated[str | None, typer.Option(help="This machine's profile (default: probe it).")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; tuning tries every number.")] = 1,
    simulated: Annotated[
        str | None, typer.Option(help="What about the model is not real, for example: random weights.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Probe, predict, measure, tune, export and run on this machine, and write one report of it."""
    from dataclasses import replace

    from dashboards.demo import run, summary
    from dashboards.plan import QUICK, Plan
    from dashboards.report import speedup_sentence
    from dashboards.trials import decision_sentence
    from hardware.profile import load_profile
    from runtime.config import require

    plan = QUICK if quick else Plan()
    if seconds is not None:
        plan = replace(plan, tuning_seconds=seconds)
    profile = load_profile(hardware) if hardware else None
    require(profile is None or profile.kind == "cpu", "the demo runs on the CPU: --hardware must be a probed CPU's")
    command = shlex.join(["ridgepoint", *sys.argv[1:]])
    with _progress() as show:
        results = run(
            out, model, plan, hardware=profile, threads=threads, simulated=simulated, command=command, show=show
        )
    if as_json:
        print(json.dumps(summary(results, out), indent=2))
        return
    for found in results.speedups:
        print(speedup_sentence(found))
    print(decision_sentence(results.study))
    print(f"report: open {(out / 'report.html').resolve()}")


@contextmanager
def _progress() -> Iterator[Callable[[str, float, str], None]]:
    """One bar per stage on stderr: call it with the stage, the share done and a remark. Without a terminal, lines."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    tasks: dict[str, TaskID] = {}
    columns = (
        TextColumn("{task.description:14}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[remark]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def show(stage: str, share: float, text: str) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=1.0, remark="")
                if not console.is_terminal:
                    console.print(f"{stage} ...", highlight=False)
            progress.update(tasks[stage], completed=min(share, 1.0), remark=text)

        yield show


def _check_free(host: str, port: int) -> None:
    """UserError when the address cannot be listened on; Streamlit itself says so in several lines."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port") from error
