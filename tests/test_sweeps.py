"""Sweeps started by the dashboard: watched, stopped, refused, and gone with their server."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autotune.storage import read_studies
from dashboards import sweeps
from dashboards.sweeps import Sweep, SweepRequest, current, start, stop
from hardware.files import UserError

ROOT = Path(__file__).parents[1]
SECONDS = 60  # a shared machine may be slow; nothing takes that long when all is well
REPLAY = SweepRequest(replay=True, effort="quick")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A server's working folder; what a test leaves running is ended."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweeps, "_running", None)
    yield tmp_path
    stop()
    wait(lambda s: s.state != "running")


def wait(condition: Any) -> Sweep | None:
    deadline = time.monotonic() + SECONDS
    while (found := current()) is not None and not condition(found):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


def test_a_sweep_is_watched_refuses_a_second_and_keeps_what_it_measured_when_stopped(folder: Path) -> None:
    assert current() is None
    first = start(REPLAY)
    assert (first.state, first.done, first.planned, first.limit_seconds) == ("running", 0, 24, 60.0)
    with pytest.raises(UserError, match="a sweep is running"):
        start(REPLAY)
    running = wait(lambda s: s.done >= 2)
    assert running is not None and running.state == "running" and "settings; last: " in running.message
    stop()
    ended = wait(lambda s: s.state != "running")
    assert ended is not None and ended.state == "stopped" and ended.elapsed_seconds >= running.elapsed_seconds
    # No page shows the last words of what was stopped. Stopped in the middle of a commit, they are of the file's lock.
    assert ended.message in ("", "ridgepoint: interrupted") or "database is locked" in ended.message
    assert ended.folder.parent == Path("runs/dashboard") and str(ended.folder) in ended.command
    (study,) = read_studies(ended.folder)
    assert len(study.trials) >= 2
    assert "replayed from" in study.subject.simulated


def test_a_sweep_ends_by_itself_and_another_may_follow(folder: Path) -> None:
    """Also one that fails: its last words are the message."""
    start(SweepRequest(replay=True, minutes=1 / 60, effort="quick", lossless=False, max_divergence=0.01))
    ended = wait(lambda s: s.state != "running")
    assert ended is not None and ended.state == "finished" and ended.done >= 1
    decision = read_studies(ended.folder)[0].decision
    assert decision is not None and decision.max_divergence == 0.01
    (folder / "zaya-nano").mkdir()  # a folder of the model's name is taken for a checkpoint, and is none
    failed = start(SweepRequest())
    assert failed.folder != ended.folder
    last = wait(lambda s: s.state != "running")
    assert last is not None and last.state == "failed"
    assert last.message == "ridgepoint: zaya-nano holds no config.json, so it is no checkpoint"


SERVER = """
import sys, time
from dashboards.sweeps import SweepRequest, current, start
start(SweepRequest(replay=True, effort="quick"))
while not current().done: time.sleep(0.05)
print("tuning", flush=True)
time.sleep(600)
"""


def test_a_sweep_ends_with_its_server_and_no_other_server_starts_one_beside(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen([sys.executable, "-c", SERVER], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None and server.stdout.readline() == "tuning\n"
        with pytest.raises(UserError, match="another process is tuning in runs/dashboard"):
            start(REPLAY)
    finally:
        server.kill()
        server.communicate()
    with (folder / sweeps.FOLDER / "sweep.lock").open() as lock:
        deadline = time.monotonic() + SECONDS
        while not sweeps._free(lock):  # it is the child's too, and free when the child is gone
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.parametrize("where", ["runs/tune", "runs/dashboard/2026-11-21-120000"])  # or one that goes on there
def test_nothing_starts_beside_a_tuning_run_in_a_terminal(where: str, folder: Path) -> None:
    place = folder / where
    place.mkdir(parents=True)
    with (place / "study.db.lock").open("a") as held:
        sweeps.fcntl.flock(held, sweeps.fcntl.LOCK_EX)
        with pytest.raises(UserError, match=f"another process is tuning in {where}"):
            start(REPLAY)
    assert current() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "zaya1-8b"}, "unknown model 'zaya1-8b'; known: "),  # no weights ship
        ({"model": "../zaya-nano"}, "unknown model"),
        ({"batch": 0}, "1 <= batch <= 1024"),
        ({"batch": 4096}, "1 <= batch <= 1024"),
        ({"minutes": 0.0}, "0 < minutes <= 15"),
        ({"minutes": float("nan")}, "0 < minutes <= 15"),
        ({"minutes": 16.0}, "0 < minutes <= 15 must hold for effort standard"),  # which ends by itself then
        ({"context": 144}, "context > 144"),
        ({"context": 10**7}, "max_position_embeddings"),
        ({"max_divergence": -0.1}, "0 <= max_divergence <= 1"),
        ({"effort": "all"}, "unknown effort"),
    ],
)
def test_impossible_requests_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        SweepRequest(**options)


def test_a_request_is_the_command_that_it_shows() -> None:
    words = SweepRequest(batch=4, context=512, minutes=1.5, max_divergence=0.01).words(Path("runs/x"))
    assert " ".join(words) == (
        "tune --model zaya-nano --batch 4 --context 512 --lossless --max-divergence 0.01 --effort standard "
        "--budget 90s --out runs/x"
    )
