"""Faulty things that tests send into child processes. No torch here: a child of these starts fast."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autotune.objective import Outputs, StageFailure
from autotune.space import Candidate
from hardware.files import UserError
from runtime.config import Workload
from runtime.measurement import Measurement

if TYPE_CHECKING:
    from autotune.local import Work
    from autotune.runner import LocalRunner


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


@dataclass(frozen=True)
class Lost:
    """What a child makes once, while there is no log."""

    log: str

    def __call__(self) -> Answers:
        if Path(self.log).exists():
            raise RuntimeError("no device")
        return Service(self.log)()


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


@dataclass(frozen=True)
class Machine:
    """A made-up machine on which some numbers of drafts are faulty. log: gets a line for every call.

    pair_crashes: how many calls that compare two settings end the process.
    """

    log: str
    pair_crashes: int = 0

    def __call__(self) -> FaultyRunner:
        return FaultyRunner(self.log, self.pair_crashes)


class FaultyRunner:
    """Each number of drafts has its fault; the others are fine, and the faster the more they draft."""

    CRASHES, HANGS, FILLS_MEMORY, BREAKS_DEVICE, CHANGES_TOKENS, DOES_NOT_COMPILE = 2, 3, 4, 5, 6, 7

    def __init__(self, log: str, pair_crashes: int) -> None:
        self._log, self._pair_crashes = log, pair_crashes
        self._broken = False

    def _enter(self, call: str, candidate: Candidate) -> int:
        """Note the call. A device that broke stays broken for this process."""
        drafts = candidate.decoding.draft_tokens if candidate.decoding.drafts else 0
        with open(self._log, "a") as stream:
            stream.write(f"{call} {drafts}\n")
        if self._broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return drafts

    def infeasible(self, candidate: Candidate) -> str | None:
        return None

    def numerics(self, candidate: Candidate) -> dict[str, float]:
        drafts = self._enter("numerics", candidate)
        if drafts == self.DOES_NOT_COMPILE:
            raise StageFailure("compile", "ptxas: too much shared memory")
        if drafts == self.CRASHES:
            os.kill(os.getpid(), signal.SIGSEGV)
        return {"logit_error": 1e-6}

    def micro_benchmark(self, candidate: Candidate) -> float:
        if self._enter("micro_benchmark", candidate) == self.HANGS:
            time.sleep(600)
        return 0.01

    def measure(self, candidate: Candidate) -> tuple[Measurement, Outputs]:
        drafts = self._enter("measure", candidate)
        if drafts == self.FILLS_MEMORY:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, resource.RLIM_INFINITY))
            held = [bytearray(2**26) for _ in range(64)]
            return held  # type: ignore[return-value]
        if drafts == self.BREAKS_DEVICE:
            self._broken = True
            self._enter("measure", candidate)
        record = Measurement(
            "generation", "made-up", "0", {}, "", "", "", Workload(), *candidate, 1, 1, (1.0,), (100 + drafts,)
        )
        return record, [[drafts]]

    def quality(self, outputs: Outputs) -> dict[str, float]:
        return {"divergence": 0.3 if outputs[0][0] == self.CHANGES_TOKENS else 0.0}

    def pair(self, default: Candidate, candidate: Candidate) -> tuple[float, float]:
        drafts = self._enter("pair", candidate)
        if Path(self._log).read_text().count("pair") <= self._pair_crashes:
            os.kill(os.getpid(), signal.SIGKILL)
        return 100.0, 100.0 + drafts

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class WrongExperts:
    """The real runner, in whose process two ways of running the experts are wrong: one always, one at odd sizes."""

    work: Work

    def __call__(self) -> LocalRunner:
        from runtime.model.moe import Experts

        right = Experts._loop

        def always(self: Experts, *given: Any) -> Any:
            return right(self, *given) * 1.01

        def at_odd_sizes(self: Experts, *given: Any) -> Any:
            found = right(self, *given)
            if len(found) % 2:
                found[-1] = 0
            return found

        Experts._grouped, Experts._dense = always, at_odd_sizes  # type: ignore[method-assign]
        return self.work()
