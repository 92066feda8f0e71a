"""The command: joins the packages' `cli.py` and turns expected failures into one line and an exit code.

Exit codes: 0 success; 1 the reader of the output went away (`| head`), quietly; 2 a failure that the user can mend (bad
option, unreadable file, impossible value, full disk); 130 interrupted. A bug keeps its traceback.
"""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

import autotune.cli
import dashboards.cli
import hardware.cli
import perfmodel.cli
import runtime.cli
import runtime.conversion.cli
import runtime.kernels.cli
from hardware.files import UserError

app = typer.Typer(
    help="Does block-diffusion decoding pay on this device, with this model, batch and context, and how is it set?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def version() -> str:
    """The installed version, or that of the checkout this file lies in."""
    try:
        return metadata.version("ridgepoint")
    except metadata.PackageNotFoundError:
        with (Path(__file__).parent / "pyproject.toml").open("rb") as stream:
            return str(tomllib.load(stream)["project"]["version"])


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"ridgepoint {version()}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


for package in (
    hardware.cli,
    perfmodel.cli,
    runtime.cli,
    runtime.conversion.cli,
    runtime.kernels.cli,
    autotune.cli,
    dashboards.cli,
):
    package.register(app)


@cache
def command() -> Any:
    """The command line with all its commands, made once: reading their signatures takes a twentieth of a second."""
    return typer.main.get_command(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (`sys.argv` by default) and return the exit code. Prints; raises only for bugs."""
    if sys.stdout is None:  # closed from the start: nobody reads it
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # for as long as the process lives
    try:
        code = command().main(arguments, prog_name="ridgepoint", standalone_mode=False)
        sys.stdout.flush()  # here, so that what cannot be written is noticed before the interpreter shuts down
    except UserError as error:
        return _fail(str(error))
    except typer.TyperException as error:  # bad usage
        return _fail(error.format_message(), hint=_usage_hint(error))
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except OSError as error:
        if error.filename is not None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's own last flush complains
        return 1 if isinstance(error, BrokenPipeError) else _fail(f"cannot write the output: {error.strerror or error}")
    if code == 130:  # typer itself turns an interrupt into this code
        return _fail("interrupted", code=130)
    return code if isinstance(code, int) else 0


def _fail(message: str, *, hint: str = "", code: int = 2) -> int:
    if message.strip():  # empty: `ridgepoint` or a group without a command has just printed its help
        print(f"ridgepoint: {' '.join(message.split())}{hint}", file=sys.stderr)
    return code


def _usage_hint(error: typer.TyperException) -> str:
    """What typer's own message leaves out: the value it refused, and where the options are explained."""
    cause: Any = error.__cause__  # pydantic's ValidationError, which knows the value
    refused = cause.errors() if hasattr(cause, "errors") else []
    value = f", but got {refused[0]['input']!r}" if refused else ""
    context = getattr(error, "ctx", None)
    return value + (f" (see `{context.command_path} --help`)" if context else "")


if __name__ == "__main__":
    sys.exit(main())
