"""What the benchmark programs share: their command line in a record, and errors in one line."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from hardware.files import UserError
from runtime.bench import identify
from runtime.model.zaya import Zaya


def command(program: str, arguments: list[str] | None) -> str:
    """The command as it would be typed."""
    return shlex.join(["python", "-m", program, *(sys.argv[1:] if arguments is None else arguments)])


def origin(program: str, arguments: list[str] | None, name: str, model: Zaya) -> dict[str, Any]:
    """What every committed document begins with: the model, the command, the commit, the day and the device."""
    found = identify(model, name, command(program, arguments))
    return {
        "model": name,
        "model_hash": found.model_hash,
        "command": found.command,
        "commit": found.commit,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "device": found.device,
    }


def counting(total: int) -> Callable[[int], None]:
    """A progress call that rewrites one line of stderr."""
    return lambda done: print(f"\r{done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def fail_in_one_line(main: Callable[[], int]) -> int:
    """Run `main`; an expected failure is one line on stderr and exit code 2."""
    try:
        return main()
    except UserError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
