"""Several workers of one study on this machine, one per GPU."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

from hardware.files import UserError

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_COUNT = "import json, torch; print(json.dumps([torch.cuda.device_count(), torch.version.hip is not None]))"


def plan_workers(text: str, url: str, device: str, *, replay: bool) -> list[dict[str, str]]:
    """What each worker's environment adds to this one's, for `--workers` N or auto.

    auto: one per visible GPU, one on a CPU. UserError for more than may run: on SQLite, or two that would time each
    other (a replay of recorded measurements times nothing).
    """
    from autotune.storage import shown, single_worker

    if text != "auto" and not (text.isdecimal() and int(text) >= 1):
        raise UserError(f"--workers takes a whole number >= 1 or auto, but got {text!r}")
    count = None if text == "auto" else int(text)
    places: list[dict[str, str]] = [{}]
    if replay:
        places = [{}] * (count or 1)
    elif device == "cuda" and text != "1":
        places = visible_gpus()
    if count is not None and count > len(places):
        there = "a CPU has one place for a worker" if device == "cpu" else f"{len(places)} GPUs are visible"
        raise UserError(f"workers must not time each other: {there}, but --workers is {count}")
    places = places[:count]
    if len(places) > 1 and single_worker(url):
        asked = f"--workers is {text}" + (f" and {len(places)} GPUs are visible" if text == "auto" else "")
        raise UserError(
            f"SQLite serves one worker, but {asked}: give --storage postgresql://..., which any number share "
            f"(docs/distributed.md), or --workers 1; the storage is {shown(url)}"
        )
    return places


def visible_gpus() -> list[dict[str, str]]:
    """For each GPU that this process may use, the variable that leaves a child only that one. UserError for none."""
    found = subprocess.run([sys.executable, "-c", _COUNT], capture_output=True, text=True)
    if found.returncode:
        raise UserError(f"cannot count the GPUs: {(found.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    count, amd = json.loads(found.stdout)
    if not count:
        raise UserError("device cuda needs a CUDA or ROCm build of torch and a GPU, but torch sees none")
    names = ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES") if amd else ("CUDA_VISIBLE_DEVICES",)
    variable = next((name for name in names if os.environ.get(name)), names[0])
    chosen = os.environ.get(variable)
    devices = [word.strip() for word in chosen.split(",")] if chosen else [str(i) for i in range(count)]
    return [{variable: device} for device in devices[:count]]


def run_workers(commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]]) -> int:
    """Run the commands side by side until all have ended; the worst exit code (128 + signal for a killed one).

    Ctrl-C and a termination are passed on, once each. A worker that fails does not end the others. Their results are
    the study's: what they print on stdout is dropped; stderr is passed on with the worker's number before each line.
    A command line can be read by every user of the machine: a password belongs into the environment.
    """
    workers: list[subprocess.Popen[str]] = []
    readers = []
    with terminated_as_interrupted():
        try:
            for number, (command, environment) in enumerate(zip(commands, environments, strict=True), start=1):
                worker = subprocess.Popen(
                    command,
                    env={**os.environ, **environment},
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                    errors="replace",
                    process_group=0,  # a terminal's Ctrl-C reaches this process alone, which passes it on
                    preexec_fn=_end_with_parent,
                )
                workers.append(worker)
                readers.append(threading.Thread(target=_pass_on, args=(worker.stderr, f"[{number}] "), daemon=True))
                readers[-1].start()
        except KeyboardInterrupt:
            _interrupt(workers)
        for number, worker in enumerate(workers, start=1):
            while worker.returncode is None:
                try:
                    worker.wait()
                except KeyboardInterrupt:
                    _interrupt(workers)
            if worker.returncode:
                _say(f"[{number}] ended with {_code(worker.returncode)}")
    for reader in readers:
        reader.join()
    return max((_code(w.returncode) for w in workers), default=0)


def _end_with_parent() -> None:
    """Be interrupted when the parent is gone, killed for example: else the same command would start others beside.

    By Linux alone; elsewhere workers go on to their end.
    """
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGINT)  # PR_SET_PDEATHSIG


def _interrupt(workers: Sequence[subprocess.Popen[str]]) -> None:
    for worker in workers:
        worker.send_signal(signal.SIGINT)  # does nothing to one that has ended


def _code(returncode: int) -> int:
    return 128 - returncode if returncode < 0 else returncode


def _pass_on(stream: IO[str] | None, prefix: str) -> None:
    assert stream is not None
    for line in stream:
        _say(f"{prefix}{line.rstrip()}")


def _say(line: str) -> None:
    """A line in one piece: `print` writes its end apart, and another thread's line may come between."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM as Ctrl-C, so that a batch system's end of a job ends a tuning run in order.

    A shell's background job ignores SIGINT, and so would its workers, whom this process interrupts: what is handled,
    if by nothing, is not inherited.
    """

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    handlers: dict[signal.Signals, Any] = {signal.SIGTERM: interrupt}
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        handlers[signal.SIGINT] = lambda number, frame: None
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
