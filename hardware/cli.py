"""`ridgepoint hardware`: the known devices, and the measuring of this one."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hardware.comparison import compared, known_profiles, summary
from hardware.files import UserError, plain
from hardware.profile import HardwareProfile, check_name, list_profiles, load_profile, save_profile, user_folder

hardware_app = typer.Typer(help="Devices: list, show, compare, validate, and probe this machine.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


def register(app: typer.Typer) -> None:
    """Add the `hardware` commands to the root command."""
    app.add_typer(hardware_app, name="hardware")


@hardware_app.command("list")
def list_command(as_json: Json = False) -> None:
    """List the known devices: the bundled profiles and those in $RIDGEPOINT_HOME/hardware (~/.ridgepoint/hardware)."""
    paths = list_profiles()
    found = {name: summary(profile, paths[name]) for name, profile in _known().items()}
    if as_json:
        return _print_json(plain(found))
    head = ("device", "vendor", "memory GB", "TB/s", "bf16 TFLOP/s", "ridge FLOP/B", "profile")
    rows = [
        (
            name,
            s.vendor,
            _figure(s.memory_bytes / 1e9),
            _figure(s.bandwidth_bytes_per_second / 1e12),
            _figure(s.bfloat16_flops_per_second and s.bfloat16_flops_per_second / 1e12),
            _figure(s.ridge_flops_per_byte),
            s.origin if s.origin == "bundled" else s.path,
        )
        for name, s in found.items()
    ]
    _print_table(head, rows, left=(0, 1, 6))


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
def compare(
    names: Annotated[
        list[str] | None, typer.Argument(help="Known names, or paths that end in .yaml (default: all known ones).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the figures of several devices side by side, in SI base units."""
    profiles = _named(names) if names else _known()
    figures = compared(profiles)
    if as_json:
        return _print_json({"devices": list(profiles), "figures": figures})
    labels = list(profiles)
    first = max(map(len, figures))
    # As many devices in a block as fit the terminal; what is not a terminal gets 160 columns.
    wide = max(11, *(len(label) + 2 for label in labels))
    count = max(1, (shutil.get_terminal_size((160, 24)).columns - first) // wide)
    for start in range(0, len(labels), count):
        block = labels[start : start + count]
        rows = [(name, *(_figure(values[label]) for label in block)) for name, values in figures.items()]
        _print_table(("", *block), [row for row in rows if any(cell != "-" for cell in row[1:])])
        print()


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
        Path | None, typer.Option(help="File to write (default: NAME.yaml among the user's profiles).")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda (ROCm too).")] = "cpu",
    name: Annotated[
        str | None, typer.Option(help="The profile's name (default: local-<processor>-<cores>, local-<GPU>).")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="About 10 s instead of 60 s: fewer shapes and samples.")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="Threads beside 1 to measure with (default: all cores).")] = None,
    as_json: Json = False,
) -> None:
    """Measure this machine (bandwidth by working set, matmuls, dispatch) and write its profile."""
    from hardware.probe import local_name
    from hardware.probe import probe as measure

    name = name or local_name(device)
    check_name(name)
    target = out or user_folder() / f"{name}.yaml"
    if target.parent == user_folder() and target.stem != name:
        raise UserError(f"among the user's profiles the file must be called {name}.yaml, but is {target.name}")
    _check_writable(target)
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("probing"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("importing torch", total=1.0)
        profile = measure(
            device,
            quick=quick,
            threads=threads,
            name=name,
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


def _known() -> dict[str, HardwareProfile]:
    """All known profiles that can be read; the files that cannot are named on stderr."""
    found, broken = known_profiles()
    for line in broken:
        print(f"left out: {line}", file=sys.stderr)
    return found


def _named(names: list[str]) -> dict[str, HardwareProfile]:
    """Profiles by known names or paths. One from a path goes by its own name, or by the path where that is taken."""
    found: dict[str, HardwareProfile] = {}
    for given in names:
        profile = load_profile(given)
        label = profile.name if given.endswith((".yaml", ".yml")) else given
        found[given if label in found else label] = profile
    return found


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def _print_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], left: tuple[int, ...] = (0,)) -> None:
    """Columns as wide as their widest cell; those in `left` start at the left, the others end at the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = (f"{c:<{w}}" if i in left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        print("  ".join(cells).rstrip())


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


def _print_profile(profile: HardwareProfile) -> None:
    """Figures with their sources on stdout; measured curves as one line each."""
    joined = f", joined by {profile.interconnect.name}" if profile.interconnect else ""
    print(f"{profile.name}: {profile.vendor} {profile.kind}, compile target {profile.compile_target}{joined}")
    for path, value in profile.figures().items():
        if not path.startswith("measured."):
            print(f"  {path:58} {value:<12.5g} {profile.source(path)}")
    for c in profile.measured:
        print(
            f"  {c.threads} threads: {len(c.bandwidth)} bandwidths, {len(c.matmul)} matmuls, "
            f"{c.elementwise_seconds * 1e6:.2f} us an operator, {c.linear_seconds * 1e6:.2f} us a tiny linear layer"
        )
