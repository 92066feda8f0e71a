"""Many workers on one study: real processes, a real PostgreSQL, which is restarted meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from autotune.claims import Claims
from autotune.storage import open_storage, read_studies, shown
from autotune.tiling_results import TilingResult
from autotune.tilings import tune_tilings
from hardware.files import UserError
from tests.postgres_server import PASSWORD, Server, postgres_server
from tests.postgres_worker import SPACE
from tests.test_tilings import ROUNDS, WORK, Device

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with postgres_server() as running:
        yield running


class Workers:
    """Worker processes and what they have written."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.environment = {**os.environ, "STUDIES": url, "RIDGEPOINT_HEARTBEAT_SECONDS": "1"}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *, device: str = "abacus", hang: int = 0, together: int = 1) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.postgres_worker", self.folder, name, device, str(hang), str(together)]
        with self.file(name, "out").open("w") as out, self.file(name, "err").open("w") as err:
            self.processes[name] = subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=out, stderr=err)
        return self.processes[name]

    def file(self, name: str, kind: str) -> Path:
        return self.folder / f"{name}.{kind}"

    def text(self, name: str, kind: str) -> str:
        file = self.file(name, kind)
        return file.read_text() if file.exists() else ""

    def diary(self, what: str, *names: str) -> Counter[str]:
        """How often each setting was `what` (checked, began, measured, paired)."""
        lines = "".join(self.text(name, "diary") for name in names or self.processes).splitlines()
        return Counter(line.partition(" ")[2] for line in lines if line.startswith(f"{what} "))

    def wait_until(self, condition: Callable[[], bool], *busy: str) -> None:
        """... while these workers go on."""
        end = time.monotonic() + 60
        while not condition():
            ended = [name for name in busy if self.processes[name].poll() is not None]
            assert not ended and time.monotonic() < end, "".join(self.text(name, "err") for name in self.processes)
            time.sleep(0.02)


def test_a_killed_worker_a_stranger_and_a_restart_cost_nothing(server: Server, tmp_path: Path) -> None:
    workers = Workers(tmp_path, server.create("studies"))
    try:
        victim = workers.start("victim", hang=2, together=3)
        others = [workers.start(name, together=3) for name in ("ann", "bob")]
        workers.wait_until(lambda: len(workers.diary("began", "victim")) == 2, "victim", "ann", "bob")
        victim.kill()
        stranger = workers.start("stranger", device="slide rule")
        assert stranger.wait(60) == 2
        refusal = workers.text("stranger", "err")
        assert "slide rule" in refusal and "abacus" in refusal and refusal.count("\n") == 1
        assert workers.text("stranger", "diary") == ""
        server.stop("immediate")
        told = "is away, waiting"
        workers.wait_until(lambda: told in workers.text("ann", "err") + workers.text("bob", "err"), "ann", "bob")
        server.start()
        assert [worker.wait(60) for worker in others] == [0, 0], workers.text("ann", "err")
    finally:
        for process in workers.processes.values():
            process.kill()

    [result] = read_studies(workers.environment["STUDIES"])
    assert 12 <= len(result.measured) <= 14  # each of three may begin one while another ends the twelfth
    measured = {SPACE.key(result.candidate(t)) for t in result.correct}
    assert workers.diary("measured") == Counter(measured)  # each once, and nothing that was measured is missing
    assert set(workers.diary("measured", "victim")) < measured
    # The lost setting was run again, from where it was lost: its checks were stored.
    lost = set(workers.diary("began", "victim")) - set(workers.diary("measured", "victim"))
    assert len(lost) == 1 and lost < measured
    assert workers.diary("began") == Counter(measured) + Counter(lost)
    assert max(workers.diary("checked").values()) == 1
    assert {t.worker for t in result.measured} == {"victim", "ann", "bob"}
    # One worker has compared and decided, the other has waited for it.
    assert result.decision and result.decision.comparison and result.decision.comparison.rounds == 8
    assert sorted(sum(workers.diary("paired", name).values()) for name in workers.processes) == [0, 0, 0, 8]
    printed = [json.loads(workers.text(name, "out"))["decision"] for name in ("ann", "bob")]
    assert printed[0] == printed[1] and printed[0]["trial"] == result.decision.trial

    written = "".join(file.read_text() for file in tmp_path.iterdir())
    assert PASSWORD not in written and "%40word" not in written and "Traceback" not in written


def test_workers_that_begin_together_make_one_storage(server: Server) -> None:
    """Tables and claims are made once, and one of many gets each claim."""
    url, found, failed = server.create("together"), [], []

    def begin(number: int) -> None:
        try:
            open_storage(url, create=True)
            claims = Claims(url)
            found.append([claims.take("study", f"key {i}", number) for i in range(20)])
            claims.close()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=begin, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == [] and len(found) == 6 and all(holders == found[0] for holders in found)


def test_what_a_study_is_about_is_said_by_the_first_worker(server: Server) -> None:
    """Two that begin at once, on different devices, both find a study without a subject: one must be refused."""
    import optuna

    url = server.create("subjects")
    one = optuna.create_study(storage=open_storage(url, create=True), study_name="study")
    other = optuna.load_study(storage=open_storage(url, create=True), study_name="study")
    for key, value in (("subject", "one"), ("tiling_subject", "one"), ("decision", "other")):
        one.set_user_attr(key, "one")
        other.set_user_attr(key, "other")
        assert one.user_attrs[key] == other.user_attrs[key] == value


def test_a_database_that_holds_no_study_is_refused_as_it_is(server: Server) -> None:
    import psycopg

    url = server.create("others")
    for words in ("holds no study", "another program's tables .recipes"):
        with pytest.raises(UserError, match=words):
            read_studies(url)
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS recipes (name text)")
    with pytest.raises(UserError, match="recipes"):
        Claims(url)
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall() == [
            ("recipes",)
        ]


def test_what_cannot_be_mended_by_waiting_is_one_line(server: Server) -> None:
    """... at once, without the password; and who only reads does not wait at all."""
    url = server.url()
    away = "postgresql://tuner:a%2Fpass%40word@localhost:1/studies"
    for broken, words, create in (
        (server.url("nowhere"), "does not exist", True),
        (url.replace("a%2F", "wrong"), "authentication failed", True),
        (url + "&hots=1", "hots", True),
        (away, "refused", False),
    ):
        with pytest.raises(UserError) as error:
            open_storage(broken, create=create)
        text = str(error.value)
        assert words in text and "\n" not in text and "pass" not in text.replace("password authentication", "")
    assert "word" not in shown(url)


def test_tilings_are_shared_by_workers(server: Server) -> None:
    """Three workers, each with a device of its own: none checks or times what another has, and one decides."""
    url = server.create("tilings")
    devices = [Device([5.0, 4.0, 3.0, 1.0, 2.0]) for _ in range(3)]
    found: dict[int, TilingResult] = {}

    def work(place: int) -> None:
        found[place] = tune_tilings(url, WORK, start=devices[place].start, rounds=ROUNDS, worker=str(place))

    threads = [threading.Thread(target=work, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 3 and found[0] == found[1] == found[2]
    assert [t.tiling["PLACE"] for t in sorted(found[0].trials, key=lambda t: t.tiling["PLACE"])] == [0, 1, 2, 3, 4]
    calls = Counter(call for device in devices for call in device.calls)
    assert calls == {**{(name, p): 1 for name in ("check", "time") for p in range(5)}, ("pair", 3): ROUNDS}
    assert found[0].decision is not None and found[0].decision.tiling == {"PLACE": 3}
