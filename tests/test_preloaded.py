"""The Python of tests/preloaded.py begins with torch, and is otherwise what Python is to those who start it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.preloaded import forking, preloaded

SEEN = """
import json, os, sys
print(json.dumps([
    "torch" in sys.modules, "runtime" in sys.modules, sys.argv, os.getcwd(), sys.stdin.read(),
    os.environ.get("ONE"), os.environ.get("HOME"),
    os.read(int(sys.argv[1]), 9).decode(), sys.executable,
]))
"""


def test_it_gives_what_the_caller_gave(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"through")
    program = preloaded()
    done = subprocess.run(
        [program, "-W", "ignore", "-u", "-c", SEEN, str(reader)],
        cwd=tmp_path,
        env={"ONE": "1"},
        input="said",
        capture_output=True,
        text=True,
        pass_fds=(reader,),
    )
    os.close(reader)
    os.close(writer)
    loaded, *seen = json.loads(done.stdout)
    assert loaded and seen == [False, ["-c", str(reader)], str(tmp_path), "said", "1", None, "through", program]


@pytest.mark.parametrize(
    ("code", "expected", "said"),
    [
        ("pass", 0, ""),
        ("import sys; sys.exit(7)", 7, ""),
        ("raise SystemExit('no')", 1, "no"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("import os; os._exit(3)", 3, ""),
        ("import os; os.abort()", -signal.SIGABRT, ""),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
    ],
)
def test_it_ends_as_what_it_ran(code: str, expected: int, said: str) -> None:
    done = subprocess.run([preloaded(), "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (expected, "") and said in done.stderr


def test_a_module_runs_as_the_program() -> None:
    done = subprocess.run([preloaded(), "-m", "json.tool"], input="[1]", capture_output=True, text=True)
    assert (done.returncode, json.loads(done.stdout)) == (0, [1])


def test_who_kills_it_kills_what_it_runs() -> None:
    with subprocess.Popen(
        [preloaded(), "-c", "import time; print('begun', flush=True); time.sleep(600)"], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"begun\n"
        process.kill()
        assert process.stdout.read() == b""  # which ends with the last process that holds the other end
    assert process.returncode == -signal.SIGKILL


def _leave() -> None:
    sys.exit(5 if "torch" in sys.modules else 6)


def test_processes_are_spawned_from_it() -> None:
    before = sys.executable
    with forking():
        process = multiprocessing.get_context("spawn").Process(target=_leave)
        process.start()
    process.join()
    assert (process.exitcode, sys.executable) == (5, before)
