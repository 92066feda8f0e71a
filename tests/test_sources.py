"""Which places studies are read from, and that no password is told."""

from __future__ import annotations

import logging
import socket
import threading
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streamlit.testing.v1 import AppTest

from dashboards import asking, sources
from dashboards.asking import UnansweredError, ask, ask_again
from dashboards.sources import ENVIRONMENT, known_sources, read_source, source_of, stamp
from hardware.files import UserError
from tests.made_up import MadeUp, run, subject


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own folder to start from, and an own user's folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("RIDGEPOINT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(ENVIRONMENT[1:], raising=False)
    return tmp_path / "here"


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def ours() -> dict[str, sources.Source]:
    """Without what ships."""
    return {name: source for name, source in known_sources().items() if source.kind != "shipped"}


def test_studies_of_this_folder_and_of_the_user_are_known_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ours() == {}
    for name in ("runs/tune", "runs/a b/c", "demo-out/tune", "runs"):
        put(folder / name / "study.db")
    put(folder.parent / "home" / "studies" / "mine" / "study.db")
    put(folder / "outside" / "study.db")
    put(folder / "runs" / "1" / "2" / "3" / "4" / "5" / "study.db")
    (folder / "runs" / "out").symlink_to(folder / "outside")
    put(folder / "runs" / "link" / "other").with_name("study.db").symlink_to(folder / "outside" / "study.db")
    assert list(ours()) == ["runs/a b/c", "runs", "runs/tune", "demo-out/tune", "studies/mine"]
    for name, source in ours().items():
        assert source.name == name == source.label and source.kind == "local"
        assert source_of(name) == source
        assert source.shown == f"{name}/study.db" and str(folder) not in repr(source)
    assert source_of("./runs/tune/study.db") == source_of("sqlite:///runs/tune") == ours()["runs/tune"]
    monkeypatch.setenv(ENVIRONMENT[1:], str(folder / "outside"))
    source = known_sources()[ENVIRONMENT]
    assert source.kind == "environment" and source.shown == str(folder / "outside" / "study.db")


def test_a_walk_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(8):
        put(folder / "runs" / str(n) / "study.db")
    monkeypatch.setattr(sources, "_MOST_FOLDERS", 4)
    assert list(ours()) == ["runs/0", "runs/1", "runs/2"]


@pytest.mark.parametrize(
    "text",
    ["outside", "outside/study.db", "/etc/passwd", "runs/../outside/study.db", "runs/out", "sqlite:////etc/x.db",
     "~nobody-here/x", "a\0b", "sqlite://", "file:runs/tune/study.db", ""],
)  # fmt: skip
def test_files_beyond_are_refused_and_not_repeated(folder: Path, text: str) -> None:
    put(folder / "outside" / "study.db")
    (folder / "runs").mkdir()
    (folder / "runs" / "out").symlink_to(folder / "outside")
    with pytest.raises(UserError) as refused:
        source_of(text)
    assert "study" in str(refused.value) and (not text or text not in str(refused.value))
    if "outside" in text:
        assert all(str(place) in str(refused.value) for place in sources.folders().values())


def test_a_source_is_read_and_its_stamp_follows_what_is_written(folder: Path) -> None:
    about = subject()
    run(folder / "runs" / "tune", MadeUp(), about, trials=2)
    source = known_sources()["runs/tune"]
    studies, tilings = read_source(source)
    assert [len(s.measured) for s in studies] == [2] and tilings == []
    before = stamp(source)
    assert before and stamp(source) == before
    run(folder / "runs" / "tune", MadeUp(), about, trials=3)
    assert stamp(source) != before
    with pytest.raises(UserError, match=r"there is no study at .*none"):
        read_source(source_of("runs/none"))
    put(folder / "runs" / "bad" / "study.db").write_bytes(b"no database" * 100)
    with pytest.raises(UserError, match="cannot use the study storage"):
        read_source(source_of("runs/bad"))


SHAPES = [
    "postgresql://tuner:{}@127.0.0.1:1/db",
    "postgresql://tuner:{}@nohost.invalid/db?sslmode=disable",
    "postgresql+psycopg://tuner:{}@[::1]:1/db",
    "postgresql://tuner@127.0.0.1:1/db?password={}",
    "postgresql://tuner@127.0.0.1:1/db?sslpassword={}",
    "postgresql://tuner@127.0.0.1:1/db?{}",
    "postgresql+nodriver://tuner:{}@127.0.0.1/db",
    "mysql://tuner:{}@127.0.0.1/db",
    "postgresql://tuner:{}@127.0.0.1:port/db",
    "postgresql://tuner/x:{}@127.0.0.1/db",
    "postgresql:/tuner:{}@127.0.0.1/db",
    "sqlite://tuner:{}@127.0.0.1/db",
    "postgres://:{}@/db?host=/nowhere",
    "://tuner:{}@127.0.0.1/db",
]


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.sampled_from(SHAPES),
    middle=st.text(st.sampled_from("abé 1@:/?#%&=[]{}'\"\\\n+") | st.characters(codec="utf-8"), max_size=8),
    written=st.sampled_from([str, lambda word: quote(word, safe="")]),
    place=st.sampled_from(["typed", "apart", "environment"]),
)
def test_no_password_is_told(
    shape: str, middle: str, written: object, place: str, capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Not by a source, an error, or the log; also where it was mistyped, and the database cannot be reached."""
    secret = f"Zq{middle}qZ"
    caplog.set_level(logging.DEBUG)
    caplog.clear()
    told = []
    try:
        if place == "environment":
            text = shape.format(written(secret)).replace("\0", "")  # type: ignore[operator]
            monkeypatch.setenv(ENVIRONMENT[1:], text)
            source = known_sources()[ENVIRONMENT]
        elif place == "apart":
            source = source_of("postgresql://tuner@127.0.0.1:1/db", secret)
        else:
            source = source_of(shape.format(written(secret)))  # type: ignore[operator]
        told += [str(source), repr(source), source.name, source.label, source.shown, stamp(source)]
        read_source(source)
        raise AssertionError("nothing listens there")
    except UserError as error:
        told.append(str(error))
        assert error.__cause__ is None  # a traceback would tell more
    told += [*capfd.readouterr(), *(r.getMessage() for r in caplog.records)]
    assert not any("Zq" in words or "qZ" in words for words in told), told


def test_the_password_reaches_the_database_and_the_typed_one_wins() -> None:
    from sqlalchemy.engine import make_url

    for text, password, expected in (
        ("postgresql://tuner:one%2F%40@host/db", "", "one/@"),
        ("postgresql://tuner@host/db?password=one", "", "one"),
        ("postgresql://tuner:one@host/db", "two @/:", "two @/:"),
        ("postgres://tuner@host:5/db", "two", "two"),
    ):
        source = source_of(text, password)
        assert make_url(source.url).password == expected and "password" not in make_url(source.url).query
        assert source.kind == source.name == "typed" and source.shown == source.label
        assert source.shown in ("postgresql://tuner@host/db", "postgres://tuner@host:5/db")
    socket = "postgresql://tuner@/studies?host=%2Ftmp%2Fpg"
    assert source_of(f"{socket}&password=one").shown == source_of(socket, "one").shown == socket
    with pytest.raises(UserError, match="a password needs a user"):
        source_of("postgresql://host/db", "two")


def test_an_answer_that_repeats_the_password_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str, **_: object) -> None:
        raise UserError(f"no such thing: {url}")

    monkeypatch.setattr("autotune.watching.open_storage", refuse)
    with pytest.raises(UserError, match="cannot use the study storage postgresql://tuner@host/db: its answer is not"):
        read_source(source_of("postgresql://tuner:a%2Fpass%40word@host/db"))


# --- a database that is away


DATABASE = "postgresql://tuner@127.0.0.1:1/db"


def test_a_slow_database_is_waited_for_once_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "WAIT_SECONDS", 0.0)
    source, answers, asked = source_of(DATABASE), threading.Event(), []

    def slow() -> str:
        asked.append("slow")
        assert answers.wait(60)
        return "there"

    waiting = []
    for _ in range(3):
        with pytest.raises(UnansweredError, match="1:1/db has not answered yet") as error:
            ask(source, "slow", slow)
        waiting.append(error.value)
    assert not any(e.due() or e.again for e in waiting) and asked == ["slow"]
    answers.set()
    monkeypatch.setattr(asking, "WAIT_SECONDS", 60)
    assert ask(source, "slow", slow) == "there" and all(e.due() for e in waiting)
    assert ask(source, "slow", slow) == "there" and asked == ["slow", "slow"]  # what was told once may be old


def test_an_answer_is_told_however_long_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept for a reader is kept from when it came, not from when it was asked for."""
    monkeypatch.setattr(asking, "WAIT_SECONDS", 0.0)
    source, answers, asked = source_of(DATABASE), threading.Event(), []

    def slow() -> str:
        asked.append("slow")
        assert answers.wait(60)
        return "there"

    with pytest.raises(UnansweredError) as error:
        ask(source, "very slow", slow)
    answers.set()
    assert error.value._call.ended.wait(60)
    error.value._call.began -= 1000
    assert ask(source, "very slow", slow) == "there" and asked == ["slow"]


def test_a_database_that_failed_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "WAIT_SECONDS", 60)
    monkeypatch.setattr(asking, "AGAIN_SECONDS", 3600.0)  # a busy machine may take long from one run to the next
    source, asked = source_of(DATABASE, "Zq"), []

    def away() -> str:
        asked.append("away")
        raise UserError(f"nobody is at {source.url}")

    for repeated in (False, False, True):
        if repeated:
            ask_again(source)
        for _ in range(3):
            with pytest.raises(UnansweredError, match="cannot use the study storage") as error:
                ask(source, "away", away)
            assert error.value.again and not error.value.due() and "Zq" not in str(error.value)
        assert len(asked) == 1 + repeated
    assert ask(source, "another question", lambda: 1) == 1
    monkeypatch.setattr(asking, "AGAIN_SECONDS", 0.0)
    ask_again(source)
    for count in (3, 4):
        with pytest.raises(UnansweredError):
            ask(source, "away", away)
        assert len(asked) == count


@pytest.mark.parametrize("page", ["tuning", "export"])
def test_no_control_waits_for_a_database_that_never_answers(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the connection and says nothing; then it hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv(ENVIRONMENT[1:], f"postgresql://tuner:Zq@127.0.0.1:{silent.getsockname()[1]}/db")
        opened = count_openings(monkeypatch)
        monkeypatch.setattr(asking, "WAIT_SECONDS", 0.0)
        at = AppTest.from_string(f"from dashboards.views import {page}\n{page}.page()", default_timeout=60)
        address = {"source": ENVIRONMENT, "study": "one", **({"section": "failures"} if page == "tuning" else {})}
        at.query_params.update(address)
        for _ in range(3):
            at.run()
            assert not at.error and not at.exception
            assert "has not answered yet" in " ".join(i.value for i in at.info)
        assert address.items() <= dict(at.query_params).items()
        silent.accept()[0].recv(1)
        assert len(opened) == 1
    monkeypatch.setattr(asking, "WAIT_SECONDS", 60)
    monkeypatch.setattr(asking, "AGAIN_SECONDS", 3600.0)
    for count in (1, 1, 2):
        if count == 2:
            at.button(f"{page}-again").click()
        at.run()
        (error,) = at.error
        assert "cannot reach the study storage" in error.value and "Zq" not in error.value and not at.exception
        assert any("It is asked again at" in c.value for c in at.caption) and len(opened) == count


def count_openings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How often a storage is opened from now on."""
    from autotune import watching

    opened: list[str] = []
    real = watching.open_storage
    monkeypatch.setattr(watching, "open_storage", lambda url, **more: opened.append(url) or real(url, **more))
    return opened
