"""The lock of a SQLite study: one process tunes into it, and others see that one does."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autotune.storage import shown, sqlite_file
from hardware.files import UserError

_TRIES, _PAUSE_SECONDS = 5, 0.02  # who only looks holds the lock for a moment


@contextmanager
def sole_worker(url: str) -> Iterator[None]:
    """Refuse a second process that tunes into the same SQLite file: it would also spoil the times of the first."""
    file = sqlite_file(url)
    if file is None:
        yield
        return
    lock = _lock(file)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        stream = lock.open("a")
    except OSError as error:
        raise UserError(f"cannot write {lock}: {error.strerror or error}") from error
    with stream:
        for left in reversed(range(_TRIES)):
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if not left:
                    raise UserError(f"another process is tuning into {shown(url)}: SQLite serves one worker") from error
                time.sleep(_PAUSE_SECONDS)
        yield


def has_sole_worker(url: str) -> bool | None:
    """Whether a process tunes into a SQLite file now; None for a database, which does not tell."""
    file = sqlite_file(url)
    if file is None:
        return None
    try:
        with _lock(file).open() as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:  # no file: nobody has tuned here
        return False


def _lock(file: Path) -> Path:
    return file.with_name(f"{file.name}.lock")
