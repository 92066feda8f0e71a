"""Questions to databases that may be away: nobody waits for one for long, nor again and again. Streamlit-free.

A SQLite file is read where it is asked for. A database is asked in a thread of its own, because one that is away takes
seconds to say so, and each control of a page would take them. A reader waits for half a second of that; the answer is
there when the page is drawn again. A question that failed is not asked again for some seconds, whoever asks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, TypeVar

from dashboards.sources import Source, file_of, without_password
from hardware.files import UserError

T = TypeVar("T")
WAIT_SECONDS = 0.5  # that a page waits for a database
AGAIN_SECONDS = 10.0  # for which a question that failed is not asked again
_KEPT_SECONDS = 60.0  # that an answer waits for a reader: one of a closed page never comes


class UnansweredError(UserError):
    """A database has not answered yet, or has failed. again: when it is asked again; None while it is waited for."""

    def __init__(self, message: str, call: _Call, again: datetime | None = None) -> None:
        super().__init__(message)
        self._call = call
        self.again = again

    def due(self) -> bool:
        """Whether there is something new to see: an answer, or the time to ask again."""
        return self._call.due() if self.again else self._call.ended.is_set()


@dataclass
class _Call:
    """One question, while it is asked and afterwards. began, closed: when, by time.monotonic()."""

    began: float = field(default_factory=time.monotonic)
    ended: threading.Event = field(default_factory=threading.Event)
    closed: float = 0.0  # once it has ended
    answer: Any = None
    problem: Exception | None = None

    def ask(self, source: Source, action: Callable[[], Any]) -> None:
        try:
            with without_password(source):
                self.answer = action()
        except Exception as error:
            self.problem = error
        self.closed = time.monotonic()
        self.ended.set()

    def left(self) -> float:
        """Seconds until a question that failed is asked again."""
        return self.closed + AGAIN_SECONDS - time.monotonic()

    def due(self) -> bool:
        return self.ended.is_set() and self.problem is not None and self.left() <= 0

    def old(self) -> bool:
        return self.ended.is_set() and time.monotonic() - self.closed > _KEPT_SECONDS


_calls: dict[tuple[str, Hashable], _Call] = {}  # by the source's URL and the question
_lock = threading.Lock()


def ask(source: Source, question: Hashable, action: Callable[[], T]) -> T:
    """What `action` gives, which reads the source. `question` tells it from others of the same source.

    UnansweredError where a database does not answer at once, or has failed lately; UserError for what is wrong with a
    file. Neither holds the source's password.
    """
    if file_of(source) is not None:
        with without_password(source):
            return action()
    name = (source.url, question)
    with _lock:
        for other in [other for other, found in _calls.items() if found.old()]:
            del _calls[other]
        call = _calls.get(name)
        if call is None or call.due():
            call = _calls[name] = _Call()
            threading.Thread(target=call.ask, args=(source, action), daemon=True).start()
    call.ended.wait(max(0.0, call.began + WAIT_SECONDS - time.monotonic()))
    if not call.ended.is_set():
        raise UnansweredError(
            f"{source.shown} has not answered yet. What it says is shown as soon as it is there.", call
        )
    if isinstance(call.problem, UserError):
        again = datetime.now() + timedelta(seconds=call.left())  # for people: a clock may be set, and waits may not
        raise UnansweredError(str(call.problem), call, again)
    with _lock:
        if _calls.get(name) is call:
            del _calls[name]  # the next reader wants to know what is there then
    if call.problem is not None:
        raise call.problem
    answer: T = call.answer
    return answer


def ask_again(source: Source) -> None:
    """Forget how a source has failed: somebody wants to know now."""
    with _lock:
        for name in [name for name, call in _calls.items() if name[0] == source.url and call.problem is not None]:
            del _calls[name]
