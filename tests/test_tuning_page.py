"""The page about tuning: studies read while they run, what is shown of them as data, and the page with its controls."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from autotune.results import StudyResult
from autotune.storage import read_studies, storage_url
from autotune.watching import Watch, running
from hardware.files import UserError
from tests.made_up import MadeUp, run, small_space, subject, unsynced

SHIPPED = Path(__file__).parents[1] / "measurements" / "amd-epyc-2-cores" / "study.db"

# --- studies read while they run


def test_a_watched_study_is_what_is_read_anew_however_often_it_was_looked_at(tmp_path: Path) -> None:
    about = subject(space=small_space())
    watch = Watch(storage_url(tmp_path))
    with pytest.raises(UserError, match="`ridgepoint tune` makes one"):
        watch.contents()
    with unsynced():
        for trials in (1, 4, 5):
            run(tmp_path, MadeUp(), about, trials=trials)
            (name,) = watch.contents().studies
            assert [watch.study(name)] == read_studies(tmp_path)
        run(tmp_path, MadeUp(batch=2), subject(batch=2, space=small_space(batch=2)), trials=2)
        assert watch.contents().studies == ("made-up batch=1", "made-up batch=2")
        (tmp_path / "study.db").unlink()  # and another one in its place
        run(tmp_path, MadeUp(), about, trials=2)
    assert [watch.study(name)] == read_studies(tmp_path)
    with pytest.raises(UserError, match="study 'batch=2' is not there"):
        watch.study("batch=2")


def test_what_ships_is_read_and_nothing_is_written(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    shutil.copy(SHIPPED, file)
    tmp_path.chmod(0o555)
    file.chmod(0o444)
    before = file.read_bytes(), file.stat().st_mtime_ns
    try:
        watch = Watch(storage_url(file))
        results = [watch.study(name) for name in watch.contents().studies]
    finally:
        tmp_path.chmod(0o755)
    assert sum(len(r.trials) for r in results) == 1458
    assert len(results) == 4 and all(r.decision for r in results) and not any(map(running, results))
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before
    assert os.listdir(tmp_path) == ["study.db"]


HALF_WRITTEN = """
import os, sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("PRAGMA cache_size = 5")
database.execute("BEGIN")
database.execute("UPDATE trial_user_attributes SET value_json = zeroblob(3000)")
os._exit(0)
"""


def test_what_a_killed_worker_left_half_written_is_taken_back(tmp_path: Path) -> None:
    with unsynced():
        run(tmp_path, MadeUp(), subject(space=small_space()), trials=4)
    whole = read_studies(tmp_path)
    subprocess.run([sys.executable, "-c", HALF_WRITTEN, tmp_path / "study.db"], check=True)
    assert (tmp_path / "study.db-journal").stat().st_size > 0
    assert read_studies(tmp_path) == whole


def test_who_seems_to_run(shipped: StudyResult) -> None:
    last = max(datetime.fromisoformat(t.begun) for t in shipped.trials)
    soon, late = last + timedelta(minutes=1), last + timedelta(minutes=11)
    undecided = StudyResult(shipped.name, shipped.subject, shipped.trials)
    assert not running(shipped, soon)
    assert running(undecided, soon) and not running(undecided, late)
    assert not running(StudyResult(shipped.name, shipped.subject, ()), datetime.now(UTC))


@pytest.fixture(scope="module")
def shipped() -> StudyResult:
    return Watch(storage_url(SHIPPED)).study("zaya-nano batch=1 context=256")
