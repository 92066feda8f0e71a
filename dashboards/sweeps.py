"""One tuning run at a time, started from a page, in a child process of the server. Streamlit-free.

It lives in this module, so that it outlasts the page that started it: whoever opens the page sees it and can stop it.
It never outlasts the server: its times would go on to be spoiled, and to spoil others', with nobody to see it.
"""

from __future__ import annotations

import atexit
import fcntl
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Literal

from autotune.console import PROGRESS_VARIABLE
from autotune.effort import EFFORTS, effort
from hardware.files import UserError, known
from perfmodel.model_spec import load_spec, require_context
from runtime.config import require

State = Literal["running", "finished", "stopped", "failed"]
FOLDER = Path("runs") / "dashboard"  # below the folder that the server was started in
MOST_BATCH = 1024
MOST_MINUTES = {name: found.seconds / 60 for name, found in EFFORTS.items() if found.seconds}  # it then ends by itself
_ROOT = Path(__file__).resolve().parents[1]
_GRACE_SECONDS = 5.0  # from one signal of `stop` to the next, harder one
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
_TAIL_BYTES = 4000
_LOG, _RESULT, _PROGRESS = "tune.log", "tune.json", "progress.json"
# Between the server and the command. It asks to be terminated when the server is gone, killed for example (Linux
# alone knows how), and for Ctrl-C, which a server in the background ignores and would pass on as ignored.
_LAUNCH = """
import ctypes, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the server is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True)
class SweepRequest:
    """What to tune on this machine's CPU. UserError for what cannot be.

    context: the most cached tokens, None for short prompts. minutes: the most that it takes, the decision included.
    max_divergence: the largest share of tokens, 0 to 1, in which the chosen setting may differ from autoregressive.
    replay: the recording that ships is searched instead, which measures nothing; the recording says the model, the
    batch and the context then, and those given here are not used.
    """

    model: str = "zaya-nano"
    batch: int = 1
    context: int | None = None
    minutes: float = 1.0
    lossless: bool = True
    max_divergence: float = 0.0
    effort: str = "standard"
    replay: bool = False

    def __post_init__(self) -> None:
        if self.model not in models():
            raise known("model", self.model, models())
        wanted = effort(self.effort)
        require(1 <= self.batch <= MOST_BATCH, f"1 <= batch <= {MOST_BATCH} must hold, but got {self.batch}")
        most = MOST_MINUTES[self.effort]
        require(
            0 < self.minutes <= most,
            f"0 < minutes <= {most:g} must hold for effort {self.effort}, but got {self.minutes:g}",
        )
        require(0 <= self.max_divergence <= 1, f"0 <= max_divergence <= 1 must hold, but got {self.max_divergence:g}")
        if self.context is not None:
            least = wanted.new_tokens
            require(self.context > least, f"context > {least} must hold: a trial generates that many")
            require_context(load_spec(self.model), self.context)

    def words(self, folder: Path) -> list[str]:
        """The command into this folder."""
        words = ["tune"]
        if self.replay:
            words += ["--replay", os.path.relpath(recording())]
        else:
            words += ["--model", self.model, "--batch", str(self.batch)]
            words += [] if self.context is None else ["--context", str(self.context)]
            words += ["--lossless"] if self.lossless else []
        words += [] if self.max_divergence == 0 else ["--max-divergence", f"{self.max_divergence:g}"]
        words += ["--effort", self.effort, "--budget", f"{60 * self.minutes:g}s"]
        return [*words, "--out", str(folder)]


@dataclass(frozen=True)
class Sweep:
    """A sweep as it stands. done, planned: settings; message: what is being done, or the last words of what failed.

    command: what continues it in a terminal; folder: of its study, below the server's working folder.
    """

    request: SweepRequest
    command: str
    folder: Path
    state: State
    done: int
    planned: int
    elapsed_seconds: float
    limit_seconds: float
    message: str


def models() -> list[str]:
    """The models that ship with weights, which is what can be measured."""
    return sorted(p.parent.name for p in (_ROOT / "runtime" / "checkpoints").glob("*/config.json"))


def recording() -> Path:
    """The recorded measurements that ship. UserError outside a checkout, which has none."""
    found = sorted((_ROOT / "measurements").glob("*/tuning-recording.jsonl"))
    require(bool(found), "no recording ships with this installation: take a checkout, or measure")
    return found[0]


def start(request: SweepRequest) -> Sweep:
    """Start it. UserError while another is running: here, from another server, or from a terminal into runs/."""
    global _running
    with _starting:
        if _running is not None and not _running.ended.is_set():
            raise UserError("a sweep is running: wait for its end or stop it first, two would spoil each other's times")
        _running = _Running(request)
    return _running.sweep()


def current() -> Sweep | None:
    """The last one started by this server; None before the first."""
    return None if _running is None else _running.sweep()


def stop() -> None:
    """Interrupt what is running; everything measured is kept. Returns at once: the state says when it has ended."""
    if _running is not None:
        _running.stop()


class _Running:
    """A child process, and the thread that starts it, waits for it, and ends it when it was asked to.

    The thread also has to start it: the system ends the child with the *thread* that started it, and the thread that
    runs a page ends with the page.
    """

    def __init__(self, request: SweepRequest) -> None:
        self.request = request
        self.ended = threading.Event()
        self._wanted_stop = threading.Event()
        self._began = time.monotonic()
        self._seconds = 0.0
        self._code: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._problem: OSError | None = None
        self._place = FOLDER.absolute()
        lock = self._locked()
        try:
            self.folder = self._new_folder()
            self._keep_profile()
            words = request.words(Path(os.path.relpath(self.folder)))
            self.command = shlex.join(["ridgepoint", *words])
            started = threading.Event()
            threading.Thread(target=self._run, args=(words, lock, started), daemon=True).start()
            started.wait()
        finally:
            lock.close()  # the child holds it too, and to its own end
        if self._problem is not None:
            raise UserError(f"cannot start a sweep: {self._problem.strerror or self._problem}")

    def sweep(self) -> Sweep:
        """What is known of it now."""
        ended, code = self.ended.is_set(), self._code
        state: State = "running"
        if ended:
            state = "finished" if code == 0 else "stopped" if self._wanted_stop.is_set() else "failed"
        found = self._progress()
        doing, trials = str(found.get("label", "starting")), EFFORTS[self.request.effort].trials
        if state == "running":
            remark = str(found.get("remark", ""))
            message = "stopping" if self._wanted_stop.is_set() else f"{doing}: {remark}" if remark else doing
        else:
            message = self._last_words()
        return Sweep(
            self.request,
            self.command,
            Path(os.path.relpath(self.folder)),
            state,
            int(found.get("done", 0)),
            int(found.get("planned", 0)) or trials,
            self._seconds if ended else time.monotonic() - self._began,
            60 * self.request.minutes,
            message,
        )

    def stop(self) -> None:
        """Ask the thread to end it."""
        self._wanted_stop.set()

    def _locked(self) -> IO[str]:
        """The lock of all sweeps in this folder, whichever server starts them. UserError while one runs."""
        try:
            self._place.mkdir(parents=True, exist_ok=True)
            lock = (self._place / "sweep.lock").open("a")
        except OSError as error:
            raise UserError(f"cannot write {FOLDER}: {error.strerror or error}") from error
        busy = None if _free(lock) else FOLDER
        runs = self._place.parent
        for path in (*runs.glob("*/study.db.lock"), *self._place.glob("*/study.db.lock")):
            with suppress(OSError), path.open() as other:
                busy = busy if _free(other) else path.parent
        if busy is not None:
            lock.close()
            raise UserError(f"another process is tuning in {os.path.relpath(busy)}: two would spoil each other's times")
        return lock

    def _new_folder(self) -> Path:
        name = f"{datetime.now():%Y-%m-%d-%H%M%S}"
        for number in itertools.count(1):
            folder = self._place / (name if number == 1 else f"{name}-{number}")
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                continue
            except OSError as error:
                raise UserError(f"cannot write {FOLDER}: {error.strerror or error}") from error
        raise AssertionError

    def _keep_profile(self) -> None:
        """The probe of the last sweep that made one, which costs half a short sweep; tune checks that it is of here."""
        found = sorted(self._place.glob("*/hardware.yaml"))
        if found and not self.request.replay:
            with suppress(OSError):
                shutil.copy(found[-1], self.folder)

    def _run(self, words: list[str], lock: IO[str], started: threading.Event) -> None:
        """The thread: start, wait, and end with ever harder signals."""
        command = [sys.executable, "-c", _LAUNCH, str(os.getpid())]
        command += [sys.executable, str(_ROOT / "ridgepoint.py"), *words, "--json", "--quiet"]
        # The study lies in its folder, also where the environment names a database for others.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RIDGEPOINT_STORAGE")}
        environment[PROGRESS_VARIABLE] = str(self.folder / _PROGRESS)
        try:
            with (self.folder / _RESULT).open("wb") as result, (self.folder / _LOG).open("wb") as log:
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=result,
                    stderr=log,
                    pass_fds=(lock.fileno(),),
                    process_group=0,  # a terminal's Ctrl-C reaches the server alone, which passes it on
                )
        except OSError as error:
            self._problem = error
            self.ended.set()
            return started.set()
        self._process = process
        started.set()
        _wait(process, self._wanted_stop)
        for number in _SIGNALS:
            if process.poll() is None:
                _signal(process, number)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(None if number == signal.SIGKILL else _GRACE_SECONDS)
        self._code = process.wait()
        self._seconds = time.monotonic() - self._began
        self.ended.set()

    def end_now(self) -> None:
        """The server ends: its child ends too, on any system."""
        if self._process is not None and self._process.poll() is None:
            _signal(self._process, signal.SIGTERM)

    def _progress(self) -> dict[str, Any]:
        try:
            found = json.loads((self.folder / _PROGRESS).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not written yet
            return {}
        return found if isinstance(found, dict) else {}

    def _last_words(self) -> str:
        try:
            with (self.folder / _LOG).open("rb") as log:
                log.seek(max(0, os.fstat(log.fileno()).st_size - _TAIL_BYTES))
                text = log.read().decode(errors="replace")
        except OSError:
            return ""
        lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).splitlines() if line.strip()]
        return "".join(c for c in lines[-1] if c.isprintable()) if lines else ""


def _free(stream: IO[str]) -> bool:
    """Take the lock of an open file; False where another process has it."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _wait(process: subprocess.Popen[bytes], wanted_stop: threading.Event) -> None:
    """Until the process has ended, or shall."""
    while process.poll() is None and not wanted_stop.wait(0.1):
        pass


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """To the group that a process leads."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _at_exit() -> None:
    if _running is not None:
        _running.end_now()


_running: _Running | None = None
_starting = threading.Lock()
atexit.register(_at_exit)
