"""An object that lives in a child process with a time limit: a crash, a hang or a broken device costs one call."""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, Pipe
from typing import IO, Any, NoReturn, cast

from autotune.objective import Outcome, Outputs, StageFailure, Unavailable
from autotune.space import Candidate
from hardware.files import UserError
from runtime.measurement import Measurement

# After these a process cannot be trusted with another call: its memory, or its context on the device, is spoilt.
_STICKY = (
    "out of memory",
    "OutOfMemory",
    "MemoryError",
    "CUDA error",
    "HIP error",
    "device-side assert",
    "illegal memory access",
    "Triton Error",
)
# The parent's module search path is the child's; its own program is never run again, as it would be by a fork or spawn.
_PROGRAM = "import sys; sys.path[:] = {path!r}; from autotune.isolation import serve; serve({number})"
_START_AGAIN_SECONDS = 2.0  # later: a device may hold the memory of a killed process for a moment
_TAIL_BYTES = 20_000  # of what the child printed: more than a crash's report


class Child:
    """`make()` in a process of its own, started by the first call, and again by the next one after it was lost.

    make: picklable, by a name that can be imported. seconds: of each call; grace_seconds: of starting. The child has a
    process group of its own, which is killed as a whole: Ctrl-C reaches the parent alone, and when the parent is gone,
    however it ended, the child ends itself. For one thread at a time.
    """

    def __init__(self, make: Callable[[], Any], seconds: float, grace_seconds: float = 60.0) -> None:
        self._make, self._seconds, self._grace = pickle.dumps(make), seconds, grace_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[Any, Any] | None = None
        self._printed: IO[bytes] | None = None
        self._read_from = 0  # where in `_printed` the present call began
        self.starts = 0

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, method: str, *args: Any, seconds: float | None = None) -> Any:
        """The object's method on these arguments. seconds: another limit for this call.

        StageFailure: raised inside; or "timeout" over the limit, "runtime" for a process that died and for any other
        exception inside. UserError: raised inside. Unavailable: no process starts.
        """
        limit = self._seconds if seconds is None else seconds
        if self._process is not None and self._process.poll() is not None:
            self.close()  # it ended between two calls: no fault of this one
        if self._process is None:
            self._start_or_refuse()
        return self._ask((method, args), limit, f"{method} took longer than {limit:g} s")

    def close(self) -> None:
        """End the process and all that it started."""
        process, connection, printed = self._process, self._connection, self._printed
        self._process = self._connection = self._printed = None
        if process is not None:
            _kill_group(process)
        if connection is not None:
            connection.close()
        if printed is not None:
            printed.close()

    def _start_or_refuse(self) -> None:
        try:
            try:
                self._start()
            except StageFailure as failure:
                if failure.outcome == "timeout":
                    raise
                time.sleep(_START_AGAIN_SECONDS)
                self._start()
        except (StageFailure, UserError) as error:
            reason = error.reason if isinstance(error, StageFailure) else str(error)
            raise Unavailable(reason) from error

    def _start(self) -> None:
        ours, theirs = Pipe()
        # Not a pipe: nobody reads while the child works, and a full one would stop it.
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        program = _PROGRAM.format(path=sys.path, number=theirs.fileno())
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.DEVNULL,
            stdout=self._printed,
            stderr=self._printed,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
        theirs.close()
        self._connection = ours
        self.starts += 1
        self._ask(self._make, self._grace, f"starting took longer than {self._grace:g} s")

    def _ask(self, message: Any, seconds: float, late: str) -> Any:
        """Send, wait, and return or raise what comes back."""
        assert self._connection is not None and self._printed is not None
        self._read_from = os.fstat(self._printed.fileno()).st_size
        try:
            try:
                self._connection.send(message)
                if not self._connection.poll(seconds):
                    raise StageFailure("timeout", late)
                kind, *found = self._connection.recv()
            except (EOFError, ConnectionError):
                raise StageFailure("runtime", f"the process died: {self._death()}") from None
        except BaseException:  # Ctrl-C too: an answer that nobody waits for must not be the next call's
            self.close()
            raise
        if kind == "returned":
            return found[0]
        if kind == "broken" or message is self._make:
            self.close()
        if kind == "user":
            raise UserError(found[0])
        raise StageFailure(cast(Outcome, found[0]), *found[1:])

    def _death(self) -> str:
        """How the process ended, and its last words."""
        assert self._process is not None and self._printed is not None
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return "it closed its connection"
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += ", as the system sends it when memory runs out"
        end = os.fstat(self._printed.fileno()).st_size
        begin = max(self._read_from, end - _TAIL_BYTES)
        said = last_words(os.pread(self._printed.fileno(), end - begin, begin).decode(errors="replace"))
        return f"{how}; {said}" if said else how


def last_words(printed: str) -> str:
    """Of what a process printed before it died: the last line, and where in Python it was if a signal ended it."""
    before, fatal, after = printed.partition("Fatal Python error: ")
    lines = [line.strip() for line in before.splitlines() if line.strip()]
    frames = [line.strip() for line in after.splitlines() if line.startswith("  File ")]
    return "; ".join([*lines[-1:], *([f"at {frames[0]}"] if fatal and frames else [])])


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that leads a group, and the group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def serve(number: int) -> NoReturn:
    """The child: make the object, then answer calls over the connection of that number, until the parent is gone."""
    import faulthandler

    faulthandler.enable(all_threads=False)  # the faulty one's place is the first it prints
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection: Connection[Any, Any] = Connection(number)
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, messages), daemon=True).start()
    made = _answer(connection, lambda: pickle.loads(pickle.loads(messages.get()))(), keep=True)
    while True:
        method, args = pickle.loads(messages.get())
        _answer(connection, partial(getattr(made, method), *args))


def _receive(connection: Connection[Any, Any], messages: queue.SimpleQueue[bytes]) -> None:
    """Read in a thread of its own, because the end of the parent must be noticed in the middle of a call too."""
    try:
        while True:
            messages.put(connection.recv_bytes())
    except (EOFError, OSError):
        os.killpg(os.getpgrp(), signal.SIGKILL)


def _answer(connection: Connection[Any, Any], run: Callable[[], Any], *, keep: bool = False) -> Any:
    """Run and send what came of it; `keep` returns the result instead of sending it."""
    try:
        found = run()
        connection.send(("returned", None if keep else found))
        return found
    except StageFailure as failure:
        answer = "failed", str(failure.outcome), failure.reason, failure.findings
    except UserError as error:
        answer = "user", str(error), "", {}
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        answer = "broken" if any(sign in said for sign in _STICKY) else "failed", "runtime", said, {}
    connection.send(answer)
    return None


class Isolated:
    """A `Runner` in a child process: its methods are calls."""

    def __init__(self, child: Child) -> None:
        self._child = child

    def infeasible(self, candidate: Candidate) -> str | None:
        """As the runner's."""
        return cast("str | None", self._child.call("infeasible", candidate))

    def numerics(self, candidate: Candidate) -> dict[str, float]:
        """As the runner's."""
        return cast(dict[str, float], self._child.call("numerics", candidate))

    def micro_benchmark(self, candidate: Candidate) -> float:
        """As the runner's."""
        return cast(float, self._child.call("micro_benchmark", candidate))

    def measure(self, candidate: Candidate) -> tuple[Measurement, Outputs]:
        """As the runner's."""
        return cast("tuple[Measurement, Outputs]", self._child.call("measure", candidate))

    def quality(self, outputs: Outputs) -> dict[str, float]:
        """As the runner's."""
        return cast(dict[str, float], self._child.call("quality", outputs))

    def pair(self, default: Candidate, candidate: Candidate) -> tuple[float, float]:
        """As the runner's."""
        return cast("tuple[float, float]", self._child.call("pair", default, candidate))

    def close(self) -> None:
        """End the child."""
        self._child.close()
