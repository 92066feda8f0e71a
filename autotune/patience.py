"""Waiting for a database that is away for a moment: a restart, a failover, a pulled cable."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from sqlalchemy.exc import DBAPIError, OperationalError, PendingRollbackError

from hardware.files import UserError

T = TypeVar("T")
PATIENCE_SECONDS = 120.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 5.0
# Classes of SQLSTATE that pass: connection, operator (restart), too many connections, rollback (deadlock).
_PASSING = ("08", "57P", "53300", "40")
# A server or a resolver that answers these will answer them again.
_LASTING = ("authentication", "does not exist", "pg_hba.conf", "permission denied", "resolve", "translate")


class Patience:
    """Runs calls of a database again while it cannot be reached, for up to `seconds` in a row.

    place: the database as it may be printed. `reached`: when it was last reached anew, by time.monotonic().
    """

    def __init__(self, place: str, seconds: float = PATIENCE_SECONDS) -> None:
        self.place, self.seconds = place, seconds
        self.reached = time.monotonic()
        self._given_up = False

    def run(self, action: Callable[[], T]) -> T:
        """The result of `action`, which must bear being run twice: a lost answer may be one to a call that succeeded.

        UserError when the database stays away; then each further call is tried once, until one succeeds.
        """
        began: float | None = None
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                result = action()
            except Exception as error:
                reason = passing(error)
                if reason is None:
                    raise
                now = time.monotonic()
                if self._given_up or now - (began or now) >= self.seconds:
                    self._given_up = True
                    waited = f" (waited {now - began:.0f} s)" if began is not None else ""
                    raise UserError(f"cannot reach the study storage {self.place}: {reason}{waited}") from error
                if began is None:
                    began = now
                    print(f"{self.place} is away, waiting up to {self.seconds:g} s: {reason}", file=sys.stderr)
                self._sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                continue
            if began is not None or self._given_up:
                self.reached, self._given_up = time.monotonic(), False
            return result

    def _sleep(self, seconds: float) -> None:
        try:
            time.sleep(seconds)
        except KeyboardInterrupt:
            self._given_up = True  # what is tidied up on the way out must not wait again
            raise


def passing(error: BaseException) -> str | None:
    """Why a database cannot be reached for now, in one line; None for an error that waiting does not mend."""
    for cause in causes(error):
        if isinstance(cause, PendingRollbackError):  # Optuna has caught that a connection broke, and went on with it
            return "the connection was lost"
        if not isinstance(cause, DBAPIError):
            continue
        state = getattr(cause.orig, "sqlstate", "")  # None: there was no connection that could have told one
        text = str(cause.orig).partition("\n")[0]
        if state is None:
            lasts = not isinstance(cause, OperationalError) or any(word in text for word in _LASTING)
        else:
            lasts = not cause.connection_invalidated and not state.startswith(_PASSING)
        return None if lasts else text
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__
