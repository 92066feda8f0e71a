"""Where studies may come from: names that an address may hold, and places that a person types.

A link must not make the server open anything that its operator did not offer. So an address holds names only; typed
SQLite files must lie in the folders below, and typed databases are opened after a press of a button. A password lives
in `Source.url` alone, which nothing prints.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote, quote_plus, unquote

from hardware.files import UserError
from hardware.profile import user_folder

if TYPE_CHECKING:
    from autotune.results import StudyResult
    from autotune.tiling_results import TilingResult

ENVIRONMENT = "$RIDGEPOINT_STORAGE"
TYPED = "typed"  # the name of what a person typed: it says nothing, so an address cannot bring it back
_STUDY_FILE = "study.db"
_DEEPEST, _MOST_FOLDERS, _MOST_SOURCES = 4, 2000, 200  # of the walk through a folder of runs
_CONNECT_SECONDS = "5"
_OPTIONS = ("application_name", "connect_timeout", "host", "port", "sslmode")  # none names a file to be read
_OPERATORS = (  # what the environment's URL may also hold
    *_OPTIONS,
    *("channel_binding", "client_encoding", "gssencmode", "keepalives", "keepalives_count", "keepalives_idle"),
    *("keepalives_interval", "options", "passfile", "service", "sslcert", "sslcrl", "sslkey", "sslrootcert"),
    "target_session_attrs",
)
_FORM = "postgresql://USER@HOST:PORT/DATABASE"
_DATABASE = f"a database must be given as {_FORM}, letters beyond A to Z and marks such as @ / : in %-form"


@dataclass(frozen=True)
class Source:
    """A storage of studies. name: what an address holds. label: what a menu shows. shown: where it is, no password."""

    name: str
    label: str
    url: str = field(repr=False)  # for autotune.storage; it may hold a password
    shown: str
    kind: Literal["shipped", "local", "environment", "typed"]


def folders() -> dict[str, Path]:
    """Where SQLite studies may lie, by the first part of their names; those that are not there included."""
    return {
        "measurements": Path(__file__).resolve().parents[1] / "measurements",
        "runs": Path.cwd() / "runs",
        "demo-out": Path.cwd() / "demo-out",
        "studies": user_folder().parent / "studies",
    }


def known_sources() -> dict[str, Source]:
    """By name: the studies that ship, then those of this folder and of the user, then the environment's storage."""
    found: dict[str, Source] = {}
    for first, folder in folders().items():
        for path in _study_files(folder):
            source = _file_source(first, folder.resolve(), path)
            found[source.name] = source
    if os.environ.get(ENVIRONMENT[1:]):
        found[ENVIRONMENT] = _environment()
    return found


def source_of(text: str, password: str = "") -> Source:
    """A known name, or what a person typed: a folder, a SQLite file, or the URL of a database.

    password: of the database, used instead of one in the URL. UserError never repeats the text: a password may be in
    it, wherever it was mistyped.
    """
    text = text.strip()
    known = known_sources()
    if text in known:
        return known[text]
    if not text:
        raise UserError(f"type a study's folder, its SQLite file, or {_FORM}")
    if "://" in text and not text.startswith("sqlite:"):
        url, shown = _database(text, password)
        return Source(TYPED, shown, url, shown, "typed")
    return _typed_file(text, known)


def read_source(source: Source) -> tuple[list[StudyResult], list[TilingResult]]:
    """All studies and tilings of a source. UserError, which holds no password, where there are none or none to reach.

    It takes as long as the database does: a page calls it through a cache (`stamp`).
    """
    from autotune.watching import Watch

    with without_password(source):
        watch = Watch(source.url)
        contents = watch.contents()
        return [watch.study(name) for name in contents.studies], watch.tilings() if contents.tilings else []


@contextmanager
def without_password(source: Source) -> Iterator[None]:
    """Turn what goes wrong with a source into a UserError without its password, raised from nothing that holds it."""
    try:
        yield
    except UserError as error:
        raise UserError(_clean(str(error), source)) from None  # what it was raised from may hold the URL
    except (OSError, UnicodeError, ValueError) as error:
        raise UserError(f"cannot use the study storage {source.shown}: {type(error).__name__}") from None


def stamp(source: Source) -> str:
    """Changes whenever a SQLite source was written to, for a cache's key; always the same for a database."""
    found = []
    path = file_of(source)
    if path is None:
        return ""
    for part in (path, f"{path}-wal"):
        try:
            status = os.stat(part)
            found.append(f"{status.st_mtime_ns}-{status.st_size}-{status.st_ino}")
        except (OSError, ValueError):
            found.append("")
    return " ".join(found)


def file_of(source: Source) -> Path | None:
    """The SQLite file of a source; None for a database."""
    path = source.url.removeprefix("sqlite:///")
    return None if path == source.url else Path(unquote(path))


# --- files


def _study_files(folder: Path) -> list[Path]:
    """The study.db files below a folder, sorted; bounded, and none that a symbolic link leads out to."""
    return sorted(_walk(folder.resolve()))[:_MOST_SOURCES]


def _walk(root: Path) -> Iterator[Path]:
    for seen, (place, below, names) in enumerate(os.walk(root)):
        if seen >= _MOST_FOLDERS:
            return
        here = Path(place)
        if len(here.relative_to(root).parts) >= _DEEPEST:
            below.clear()
        below.sort()
        path = here / _STUDY_FILE
        if _STUDY_FILE in names and str(path).isprintable() and _inside(path, root) and path.is_file():
            yield path


def _inside(path: Path, root: Path) -> bool:
    """Whether what a path leads to lies below a resolved folder."""
    try:
        return path.resolve().is_relative_to(root)
    except (OSError, RuntimeError, ValueError):  # a circle of links; no path at all
        return False


def _file_source(first: str, root: Path, path: Path) -> Source:
    """Of a file below one of the folders."""
    from autotune.storage import storage_url

    relative = path.relative_to(root)
    name = "/".join((first, *relative.parent.parts))
    shown = "/".join((first, *relative.parts))
    kind: Literal["shipped", "local"] = "shipped" if first == "measurements" else "local"
    return Source(name, name, storage_url(path), shown, kind)


def _typed_file(text: str, known: dict[str, Source]) -> Source:
    from autotune.storage import storage_url

    try:
        path = Path(text.removeprefix("sqlite:///")).expanduser()
        path = (path if path.suffix == ".db" else path / _STUDY_FILE).resolve()
    except (OSError, RuntimeError, ValueError):
        raise UserError("a study's file must be a path, but this cannot be one") from None
    for first, folder in folders().items():
        root = folder.resolve()
        if path.is_relative_to(root) and str(path).isprintable():
            url = storage_url(path)
            same = (s for s in known.values() if s.url == url)
            shown = "/".join((first, *path.relative_to(root).parts))
            return next(same, Source(TYPED, shown, url, shown, "typed"))
    places = ", ".join(map(str, folders().values()))
    raise UserError(
        f"a study's file must lie below one of {places}: move it there, "
        f"or start the dashboard with its path in {ENVIRONMENT[1:]}"
    )


# --- databases


def _environment() -> Source:
    """What the operator has set: opened as it is, wherever it lies. If it cannot be read, reading it says so."""
    from autotune.storage import storage_url

    text = os.environ[ENVIRONMENT[1:]]
    unread = ("://", f"{ENVIRONMENT}, which cannot be read")
    if "://" in text and not text.startswith("sqlite:"):
        try:
            url, shown = _database(text, "", _OPERATORS)
        except UserError:
            url, shown = unread
    else:
        url = storage_url(text)
        shown = unquote(url.removeprefix("sqlite:///"))
        if "@" in shown and not os.path.exists(shown):  # a database's URL, mistyped
            url, shown = unread
    return Source(ENVIRONMENT, f"{ENVIRONMENT} ({shown})", url, shown, "environment")


def _database(text: str, password: str, options: tuple[str, ...] = _OPTIONS) -> tuple[str, str]:
    """(URL with the password, the same without) of a PostgreSQL database.

    Strict, because what is misread is shown: half a password that holds an @ would stand in the host's place.
    """
    from sqlalchemy.engine import URL, make_url
    from sqlalchemy.exc import ArgumentError

    if text.count("@") > 1:
        raise UserError(f"{_DATABASE}: there is more than one @")
    try:
        parsed = make_url(text)
    except (ArgumentError, ValueError):
        raise UserError(_DATABASE) from None
    if parsed.drivername not in ("postgresql", "postgres", "postgresql+psycopg"):
        raise UserError(f"{_DATABASE}; other databases are not read")
    query = dict(parsed.query)
    secret = password or str(query.get("password") or parsed.password or "")
    query.pop("password", None)
    if not set(query) <= set(options):  # not repeated: half a password may be read as one
        raise UserError(f"options of a database's URL may be {', '.join(_OPTIONS)}; give others by {ENVIRONMENT[1:]}")
    if ("@" in text and parsed.username is None) or "@" in f"{parsed.host}{parsed.database}":
        raise UserError(_DATABASE)
    if not secret.isprintable():
        raise UserError("a database's password must be printable")
    if secret and not parsed.username:
        raise UserError(f"a password needs a user: {_FORM}")
    query.setdefault("connect_timeout", _CONNECT_SECONDS)
    where = (parsed.host, parsed.port, parsed.database)
    url = URL.create(parsed.drivername, parsed.username, secret or None, *where, query)
    place = {name: value for name, value in query.items() if name in ("host", "port")}  # a socket's folder
    shown = URL.create(parsed.drivername, parsed.username, None, *where, place).render_as_string()
    return url.render_as_string(hide_password=False), shown


def _clean(words: str, source: Source) -> str:
    """A message without the source's password, however it is written; without all of it, where it was in it."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        secret = make_url(source.url).password or ""
    except (ArgumentError, ValueError):
        return words
    forms = {secret, quote(secret, safe=""), quote(secret), quote_plus(secret), repr(secret)[1:-1]} - {""}
    if any(form in words for form in forms):
        return f"cannot use the study storage {source.shown}: its answer is not shown, because the password is in it"
    return words
