"""What keeps studies: full disks, damaged files, databases that are away, claims, and who may work side by side."""

from __future__ import annotations

import inspect
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState
from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.exc import OperationalError, PendingRollbackError

import ridgepoint
from autotune.claims import Claims
from autotune.lost import retry_lost, unless_given_up
from autotune.patience import Patience, passing
from autotune.storage import (
    PATIENT,
    SharedStorage,
    database_errors,
    heartbeat_seconds,
    hide_passwords,
    open_storage,
    read_studies,
    read_study,
    shown,
    storage_url,
)
from autotune.workers import plan_workers, run_workers
from hardware.files import UserError
from tests.made_up import MadeUp, blind, run, subject

ROOT = Path(__file__).parents[1]


@contextmanager
def each_connection(statement: str) -> Iterator[None]:
    """Run a pragma on every SQLite connection that is opened."""

    def say(connection: object, _: object) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute(statement)

    event.listen(Engine, "connect", say)
    try:
        yield
    finally:
        event.remove(Engine, "connect", say)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    with each_connection("PRAGMA synchronous = OFF"):
        yield


# --- full disks


@contextmanager
def few_pages(folder: Path) -> Iterator[None]:
    """SQLite's own limit, which it reports as it does a full disk."""
    pages = (folder / "study.db").stat().st_size // 4096
    with each_connection(f"PRAGMA max_page_count = {pages + 2}"):
        yield


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A disk that is full soon, until the block ends. Where nothing may be mounted, SQLite's limit."""
    file, data = folder / "study.db", (folder / "study.db").read_bytes()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={len(data) + 7 * 4096}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        with few_pages(folder):
            yield
        return
    try:
        file.write_bytes(data)
        yield
        data = file.read_bytes()
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    file.write_bytes(data)


@pytest.mark.parametrize("full", [few_pages, small_disk])
def test_a_full_disk_is_one_line_and_the_same_call_goes_on(
    full: Callable[[Path], AbstractContextManager[None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optuna.storages._rdb.storage.random.random", lambda: 0.0)  # its pauses between attempts
    before, after = MadeUp(), MadeUp()
    run(tmp_path, before, trials=2, predict=blind)
    with full(tmp_path):
        with pytest.raises(UserError) as error:
            run(tmp_path, before, trials=100, predict=blind)
        assert "full" in str(error.value) and "free some space" in str(error.value) and "\n" not in str(error.value)
        kept = read_studies(tmp_path)[0]
    count, space = len(kept.measured), kept.subject.space
    assert 2 < count < 100
    result = run(tmp_path, after, trials=count + 3, predict=blind)
    assert result.measured[:count] == kept.measured and len(result.measured) == count + 3 and result.decision
    assert not {space.key(kept.candidate(t)) for t in kept.measured} & {space.key(c) for c in after.measured}


# --- files that are no study


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The SQLite file of a study."""
    folder = tmp_path_factory.mktemp("good")
    run(folder, MadeUp(), trials=3)
    return (folder / "study.db").read_bytes()


def spoil(file: Path, good: bytes, kind: str) -> None:
    """Write what was a study's file into another."""
    file.write_bytes(good)
    middle = len(good) // 2 // 4096 * 4096
    if kind == "another program's":
        file.unlink()
        with closing(sqlite3.connect(file)) as database:
            database.execute("CREATE TABLE recipes (name TEXT)")
    elif kind == "another schema":
        with closing(sqlite3.connect(file)) as database:
            database.execute("UPDATE alembic_version SET version_num = 'v99.0.0.a'")
            database.execute("DROP TABLE trial_heartbeats")  # which a newer version may not have
            database.commit()
    else:
        data = {
            "text": b"not a database" * 1000,
            "cut": good[: len(good) // 2 + 1000],
            "cut at a page": good[:middle],
            "garbage in the middle": good[:middle] + b"\xa5" * 8192 + good[middle + 8192 :],
            "a page of zeros": good[:middle] + bytes(4096) + good[middle + 4096 :],
        }
        file.write_bytes(data[kind])


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("text", "not a database"),
        ("cut", "malformed"),
        ("cut at a page", "malformed"),
        ("garbage in the middle", ""),
        ("a page of zeros", ""),
        ("another program's", "recipes"),
        ("another schema", "upgrade|updating"),
    ],
)
def test_a_file_that_is_no_study_is_one_line_and_left_as_it_is(
    kind: str, words: str, good: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "study.db"
    spoil(file, good, kind)
    data = file.read_bytes()
    runner = MadeUp()
    with pytest.raises(UserError) as refused:
        run(tmp_path, runner)
    assert re.search(words, str(refused.value)) and "study.db" in str(refused.value) and "\n" not in str(refused.value)
    assert ridgepoint.main(["study", "show", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert file.read_bytes() == data and runner.measured == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["study.db", "study.db.lock"]


def test_tables_that_were_made_in_part_are_completed(tmp_path: Path) -> None:
    """What a worker leaves that was killed while it made them."""
    with closing(sqlite3.connect(tmp_path / "study.db")) as database:
        database.execute("CREATE TABLE studies (study_id INTEGER PRIMARY KEY, study_name VARCHAR(512) UNIQUE NOT NULL)")
    assert len(run(tmp_path, MadeUp(), trials=2).measured) == 2


def test_a_folder_with_braces_is_a_folder(tmp_path: Path) -> None:
    """Optuna fills braces in a URL in."""
    folder = tmp_path / "{0} {name}"
    run(folder, MadeUp(), trials=1)
    assert (folder / "study.db").is_file() and read_studies(folder)


# --- URLs


def test_no_password_is_shown() -> None:
    for url in (
        "postgresql://tuner:sec%40ret@host:5432/studies",
        "postgresql+psycopg://tuner:secret@host/studies?sslmode=require",
        "postgresql:///studies?host=/tmp&user=tuner&password=secret&sslpassword=secret",
    ):
        assert "sec" not in shown(url) and "studies" in shown(url)
        assert "sec" not in hide_passwords(f"ridgepoint tune --storage '{url}' --batch 1")
    assert (
        hide_passwords("ridgepoint tune --storage sqlite:///runs/a.db")
        == "ridgepoint tune --storage sqlite:///runs/a.db"
    )
    for url in ("postgresql://u:p@secret@host/db", "postgresql://u:secret@host:port/db", "mysql://u:secret@host/db"):
        with pytest.raises(UserError) as error:
            shown(url)
        assert "secret" not in str(error.value)
        assert "secret" not in hide_passwords(url)
    for url in ("postgresql://u:a/secret@host/db", "postgresql://u:a secret@host/db"):  # which databases accept
        assert hide_passwords(url) == "postgresql://u:***@host/db" == shown(url)


def test_a_missing_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(UserError, match=r"ridgepoint\[postgres\]"):
        open_storage("postgresql://host/db", create=True)


@pytest.mark.parametrize("text", ["0", "-1", "soon", "1.5"])
def test_an_impossible_heartbeat_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIDGEPOINT_HEARTBEAT_SECONDS", text)
    with pytest.raises(UserError, match="whole seconds"):
        heartbeat_seconds()


# --- patience


class Away(Exception):
    """As psycopg's errors are: `sqlstate` is None where no connection was made."""

    def __init__(self, text: str, sqlstate: str | None) -> None:
        super().__init__(text)
        self.sqlstate = sqlstate


def failure(text: str, sqlstate: str | None = None, *, cut: bool = False) -> OperationalError:
    return OperationalError("SELECT 1", {}, Away(text, sqlstate), connection_invalidated=cut)


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (failure("connection refused\nIs the server running?"), True),
        (failure("FATAL: the database system is starting up"), True),
        (failure("the connection is closed"), True),
        (failure("terminating connection due to administrator command", "57P01"), True),
        (failure("too many clients", "53300"), True),
        (failure("deadlock detected", "40P01"), True),
        (failure("broken off", "XX000", cut=True), True),
        (PendingRollbackError("Can't reconnect until invalid transaction is rolled back."), True),
        (failure("FATAL: password authentication failed for user"), False),
        (failure('FATAL: database "x" does not exist'), False),
        (failure("failed to resolve host 'x'"), False),
        (failure("No space left on device", "53100"), False),
        (OperationalError("SELECT 1", {}, sqlite3.OperationalError("database or disk is full")), False),
        (ValueError("a bug"), False),
    ],
    ids=lambda value: "" if isinstance(value, bool) else str(getattr(value, "orig", value)).partition("\n")[0],
)
def test_what_passes_is_waited_for_and_the_rest_is_raised(error: Exception, passes: bool) -> None:
    calls = []

    def action() -> str:
        calls.append(1)
        if len(calls) < 3:
            raise error
        return "done"

    patience = Patience("the database", 10)
    if passes:
        since = patience.reached
        assert patience.run(action) == "done" and patience.reached > since
        assert "\n" not in (passing(error) or "\n")
    else:
        with pytest.raises(type(error)):
            patience.run(action)
        assert len(calls) == 1


def test_patience_ends_and_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    """After that each call is tried once, as nobody waits twice for what tidies up; one that succeeds restores it."""
    calls = []

    def action() -> None:
        calls.append(1)
        raise failure("connection refused")

    patience = Patience("the database", 0.3)
    with pytest.raises(UserError, match=r"cannot reach .* the database: connection refused \(waited 0 s\)"):
        patience.run(action)
    assert len(calls) > 2
    assert capsys.readouterr().err == "the database is away, waiting up to 0.3 s: connection refused\n"
    calls.clear()
    with pytest.raises(UserError):
        patience.run(action)
    assert len(calls) == 1
    patience.run(lambda: None)
    with pytest.raises(UserError):
        patience.run(action)
    assert len(calls) > 3


def test_an_interrupt_ends_the_waiting_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    def action() -> None:
        raise failure("connection refused")

    patience = Patience("the database")
    monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        patience.run(action)
    with pytest.raises(UserError):  # not a second interrupt: nothing sleeps
        patience.run(action)


def test_every_call_of_optuna_is_patient() -> None:
    """Its cache is what calls a storage; a version that calls something new would meet a storage without patience."""
    from optuna.storages._cached_storage import _CachedStorage

    called = set(re.findall(r"_backend\.(\w+)\(", inspect.getsource(_CachedStorage)))
    own = {"record_heartbeat", "_get_stale_trial_ids"}
    memory_only = {"get_heartbeat_interval", "get_heartbeat_stale_trial_callback"}
    assert own <= set(vars(SharedStorage)) and called - own - memory_only == set(PATIENT)


# --- claims


def test_a_setting_is_claimed_by_one(tmp_path: Path) -> None:
    claims = Claims(storage_url(tmp_path))
    assert claims.take("study", "key", 3) == 3
    assert claims.take("study", "key", 4) == 3
    assert claims.take("study", "key", 3) == 3  # as when the first answer was lost
    assert claims.take("another", "key", 4) == 4
    assert claims.take("study", "key " * 1000, 5) == 5 and claims.take("study", "key " * 1001, 6) == 6
    assert Claims(storage_url(tmp_path)).take("study", "key " * 1000, 7) == 5


def test_a_lost_claim_is_taken_over_by_one(tmp_path: Path) -> None:
    claims = Claims(storage_url(tmp_path))
    claims.take("study", "key", 3)
    assert claims.take_over("study", "key", 3, 8)
    assert not claims.take_over("study", "key", 3, 9)
    assert claims.take_over("study", "key", 3, 8)  # again, as when the answer was lost
    assert claims.take("study", "key", 9) == 8
    assert claims.take_over("study", "unclaimed", 3, 10)  # the lost trial was killed before it had claimed


def test_claims_go_with_the_study(tmp_path: Path) -> None:
    """In the same file, which stays a study."""
    Claims(storage_url(tmp_path)).take("study", "key", 1)
    assert len(run(tmp_path, MadeUp(), trials=2).measured) == 2


# --- lost trials


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    storage = open_storage(storage_url(tmp_path), create=True)
    return optuna.create_study(storage=storage, directions=["maximize", "minimize"])


def waiting(study: optuna.Study) -> list[dict[str, object]]:
    return [t.user_attrs["queued"] for t in study.trials if t.state == TrialState.WAITING]


def test_a_lost_trial_is_queued_once_an_interrupted_one_always(study: optuna.Study) -> None:
    study.enqueue_trial({"x": 0.5}, {"queued": {"source": "seed"}})
    how: dict[str, object] = {"source": "seed"}
    for number, interrupted in enumerate([True, False, True, True]):
        trial = study.ask()
        trial.suggest_float("x", 0, 1)
        if interrupted:
            trial.set_user_attr("interrupted", True)
        for _ in range(2):  # the second worker that looks finds it done
            retry_lost(study, running=True)
        how = {"source": "seed", "retry_of": number, "losses": int(number > 0)}
        assert waiting(study) == [how]
    trial = study.ask()
    assert trial.suggest_float("x", 0, 1) == 0.5
    retry_lost(study, running=False)
    assert study.trials[-1].state == TrialState.RUNNING  # of another worker, for all that is known
    retry_lost(study, running=True)  # its second loss
    assert waiting(study) == [] and study.trials[-1].state == TrialState.FAIL


def test_a_setting_that_another_worker_had_is_not_queued_again(study: optuna.Study) -> None:
    study.ask({"x": FloatDistribution(0, 1)}).set_user_attr("taken_by", 7)
    retry_lost(study, running=True)
    assert waiting(study) == []


def test_a_trial_that_is_being_drawn_has_no_parameters_yet(tmp_path: Path) -> None:
    """Another worker's, read between its first parameter and its last."""
    run(tmp_path, MadeUp(), trials=1)
    study = optuna.load_study(study_name="made-up batch=1", storage=storage_url(tmp_path))
    trial = study.ask()
    for parameter in subject().space.parameters:
        if parameter.name == "sampler":
            trial.suggest_categorical("sampler", parameter.choices)
    assert trial.params and not read_study(study).trials[trial.number].params
    subject().space.suggest(trial)
    assert read_study(study).trials[trial.number].params == trial.params


@pytest.mark.parametrize("when", ["before a finding", "before the end"])
def test_a_trial_that_others_gave_up_ends_quietly(when: str, study: optuna.Study) -> None:
    def objective(trial: optuna.Trial) -> tuple[float, float]:
        study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)  # as another worker does
        if when == "before a finding":
            trial.set_user_attr("decode", {})
        return 1.0, 0.0

    with unless_given_up():
        study.optimize(objective, n_trials=1)
    assert [t.state for t in study.trials] == [TrialState.FAIL]
    with pytest.raises(ValueError, match="a bug"), unless_given_up():
        raise ValueError("a bug")
    with pytest.raises(AssertionError, match="a bug"), unless_given_up():
        raise AssertionError("a bug")


@pytest.mark.parametrize("gone", [["set_trial_state_values"], ["set_trial_state_values", "get_trial"]])
def test_why_a_trial_could_not_end_is_said(
    gone: list[str], study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Optuna's loop then fails in ways of its own, over the reason."""

    def away(*args: object, **options: object) -> None:
        raise UserError("the database is away")

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        for name in gone:
            monkeypatch.setattr(study._storage, name, away)
        return 1.0, 0.0

    with pytest.raises(UserError, match="is away"), database_errors("sqlite:///study.db"):
        study.optimize(objective, n_trials=1)


# --- workers


FAKE_TORCH = """
import os
class cuda:
    def device_count():
        chosen = os.environ.get(VARIABLE)
        return FOUND if chosen is None else len(chosen.split(","))
class version:
    hip = HIP
"""


@pytest.mark.parametrize(
    ("vendor", "chosen", "text", "places"),
    [
        ("CUDA", None, "auto", ["0", "1", "2"]),
        ("CUDA", "5,GPU-1234", "auto", ["5", "GPU-1234"]),
        ("CUDA", None, "2", ["0", "1"]),
        ("HIP", None, "auto", ["0", "1", "2"]),
        ("HIP", "1, 3", "auto", ["1", "3"]),
    ],
)
def test_each_visible_gpu_gets_a_worker(
    vendor: str, chosen: str | None, text: str, places: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = f"{vendor}_VISIBLE_DEVICES"
    values = {"VARIABLE": repr(variable), "FOUND": "3", "HIP": repr("7.0" if vendor == "HIP" else None)}
    (tmp_path / "torch.py").write_text(re.sub("|".join(values), lambda m: values[m.group()], FAKE_TORCH))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    if chosen:
        monkeypatch.setenv(variable, chosen)
    url = "postgresql://host/studies"
    assert plan_workers(text, url, "cuda", replay=False) == [{variable: place} for place in places]
    with pytest.raises(UserError, match="must not time each other"):
        plan_workers("4", url, "cuda", replay=False)
    with pytest.raises(UserError, match=r"SQLite serves one worker.*--storage postgresql"):
        plan_workers(text, "sqlite:///study.db", "cuda", replay=False)


def test_a_cpu_has_one_worker_unless_nothing_is_timed() -> None:
    url = "postgresql://tuner:secret@host/studies"
    assert plan_workers("auto", url, "cpu", replay=False) == [{}] == plan_workers("1", url, "cuda", replay=False)
    assert plan_workers("3", url, "cpu", replay=True) == [{}, {}, {}]
    for text, words in (("2", "must not time each other"), ("0", "whole number"), ("all", "or auto")):
        with pytest.raises(UserError, match=words):
            plan_workers(text, url, "cpu", replay=False)
    with pytest.raises(UserError, match="SQLite serves one worker"):
        plan_workers("2", "sqlite:///study.db", "cpu", replay=True)


def test_workers_run_side_by_side_and_the_worst_end_counts(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Each waits for the others to have begun; one is killed, one fails. Their lines stay whole."""
    program = (
        "import os, pathlib, sys, time\n"
        "me = os.environ['ME']; here = pathlib.Path(sys.argv[1]); (here / me).touch()\n"
        "while len(list(here.iterdir())) < 3: time.sleep(0.01)\n"
        "print('a result')\n"
        "for _ in range(300): print('remark', file=sys.stderr, flush=True)\n"
        "os.kill(os.getpid(), 9) if me == 'b' else sys.exit(2 if me == 'c' else 0)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    assert run_workers([command] * 3, [{"ME": me} for me in "abc"]) == 137
    out, err = capfd.readouterr()
    assert out == ""
    assert sorted(err.splitlines()) == sorted(
        [*(f"[{n}] remark" for n in (1, 2, 3) for _ in range(300)), "[2] ended with 137", "[3] ended with 2"]
    )


@pytest.mark.parametrize(
    ("number", "ignored"),
    [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGKILL, False)],
)
def test_an_interrupt_reaches_each_worker_once(number: signal.Signals, ignored: bool, tmp_path: Path) -> None:
    """ignored: SIGINT, as a shell's background job has it."""
    worker = (
        "import pathlib, sys, time\n"
        "file = pathlib.Path(sys.argv[1])\n"
        "try: file.touch(); time.sleep(60)\n"
        "except KeyboardInterrupt: file.write_text('interrupted'); time.sleep(0.1); sys.exit(130)\n"
    )
    files = [tmp_path / name for name in "ab"]
    commands = [[sys.executable, "-c", worker, str(file)] for file in files]
    program = (
        "import signal, sys\n"
        f"signal.signal(signal.SIGINT, signal.{'SIG_IGN' if ignored else 'default_int_handler'})\n"
        "from autotune.workers import run_workers\n"
        f"sys.exit(run_workers({commands!r}, [{{}}, {{}}]))"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, start_new_session=True)
    try:
        while not all(file.exists() for file in files):
            time.sleep(0.02)
        time.sleep(0.1)
        os.killpg(parent.pid, number)  # as a terminal does
        assert parent.wait(30) == (-number if number == signal.SIGKILL else 130)
        end = time.monotonic() + (30 if number == signal.SIGKILL else 0)  # then nobody waits for them
        while not all(file.read_text() for file in files) and time.monotonic() < end:
            time.sleep(0.02)
    finally:
        parent.kill()
    assert [file.read_text() for file in files] == ["interrupted"] * 2
