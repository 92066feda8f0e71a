"""`ridgepoint hardware`: the known devices, and the measuring of this one."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from hardware.files import UserError, plain
from hardware.profile import HardwareProfile, list_profiles, load_profile, save_profile, user_folder

hardware_app = typer.Typer(help="Devices: list, show, validate, and probe this machine.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


def register(app: typer.Typer) -> None:
    """Add the `hardware` commands to the root command."""
    app.add_typer(hardware_app, name="hardware")


@hardware_app.command("list")
def list_command(as_json: Json = False) -> None:
    """List the known devices: the bundled profiles and those in $RIDGEPOINT_HOME/hardware (~/.ridgepoint/hardware)."""
    paths = list_profiles()
    if as_json:
        return _print_json({name: str(path) for name, path in sorted(paths.items())})
    width = max(map(len, paths))
    for name, path in sorted(paths.items()):
        print(f"{name:{width}}  {path}")


@hardware_app.command()
def show(
    name: Annotated[str, typer.Argument(help="A known name, or a path that ends in .yaml.")], as_json: Json = False
) -> None:
    """Show a device's figures, each with its source."""
    profile = load_profile(name)
    if as_json:
        return _print_json(plain(profile))
    _print_profile(profile)


@hardware_app.command()
def validate(
    file: Annotated[str, typer.Argument(help="A profile's YAML file, or a known name.")], as_json: Json = False
) -> None:
    """Check that a profile keeps every rule; the first one broken is named, with exit code 2."""
    profile = load_profile(file)
    if as_json:
        return _print_json({"file": file, "name": profile.name, "valid": True, "figures": len(profile.figures())})
    print(f"{file}: valid ({profile.name}, {len(profile.figures())} figures, each with a source)")


@hardware_app.command()
def probe(
    out: Annotated[
        Path | None, typer.Option(help="File to write (default: local-<device>.yaml among the user's profiles).")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda (ROCm too).")] = "cpu",
    quick: Annotated[
        bool, typer.Option("--quick", help="About 10 s instead of 60 s: fewer shapes and samples.")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="Threads beside 1 to measure with (default: all cores).")] = None,
    as_json: Json = False,
) -> None:
    """Measure this machine (bandwidth by working set, matmuls, dispatch) and write its profile."""
    target = out or user_folder() / f"local-{device}.yaml"
    _check_writable(target)
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from hardware.probe import probe as measure

    columns = (TextColumn("probing"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("importing torch", total=1.0)
        profile = measure(
            device,
            quick=quick,
            threads=threads,
            progress=lambda label, done: progress.update(bar, description=label, completed=done),
        )
    path = save_profile(profile, target)
    if as_json:
        return _print_json({"path": str(path), "profile": plain(profile)})
    _print_profile(profile)
    print(f"written: {path}")


def _check_writable(target: Path) -> None:
    """Fail before the probe has taken its minute, not after."""
    if target.suffix not in (".yaml", ".yml"):
        raise UserError(f"a profile's file name must end in .yaml, but is {target.name!r}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


def _print_profile(profile: HardwareProfile) -> None:
    """Figures with their sources on stdout; measured curves as one line each."""
    print(f"{profile.name}: {profile.vendor} {profile.kind}, compile target {profile.compile_target}")
    for path, value in profile.figures().items():
        if not path.startswith("measured."):
            print(f"  {path:58} {value:<12.5g} {profile.source(path)}")
    for c in profile.measured:
        print(
            f"  {c.threads} threads: {len(c.bandwidth)} bandwidths, {len(c.matmul)} matmuls, "
            f"{c.elementwise_seconds * 1e6:.2f} us an operator, {c.linear_seconds * 1e6:.2f} us a tiny linear layer"
        )
