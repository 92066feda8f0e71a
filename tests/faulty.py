"""Faulty things that tests send into child processes. No torch here: a child of these starts fast."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from autotune.objective import StageFailure
from hardware.files import UserError


@dataclass(frozen=True)
class Service:
    """What a child makes. log: a file that gets a line for each object made."""

    log: str = ""
    refuse: str = ""

    def __call__(self) -> Answers:
        if self.log:
            with open(self.log, "a") as stream:
                stream.write("made\n")
        if self.refuse:
            raise UserError(self.refuse)
        return Answers()


class Answers:
    """Methods that answer, and methods that fail in every way."""

    def __init__(self) -> None:
        self.calls = 0

    def count(self) -> int:
        self.calls += 1
        return self.calls

    def process(self) -> int:
        return os.getpid()

    def echo(self, value: Any) -> Any:
        return value

    def closure(self) -> Callable[[], int]:
        return lambda: 1  # which cannot be sent

    def stage(self) -> None:
        raise StageFailure("incorrect", "the sum is wrong")

    def user(self) -> None:
        raise UserError("rule, then value")

    def fails(self, kind: str, text: str) -> None:
        raise {"MemoryError": MemoryError, "RuntimeError": RuntimeError, "KeyError": KeyError}[kind](text)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def segfault(self, said: str) -> None:
        print(said, file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)

    def leave(self, code: int) -> None:
        os._exit(code)

    def helper(self) -> int:
        """Start a process that outlives nothing: its id."""
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid


slow_start = partial(time.sleep, 60)
