"""Where studies are kept: a SQLite file for one worker, a PostgreSQL database for many."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import BaseModel
from sqlalchemy import Engine, create_engine, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from autotune.lost import retry, unmasked
from autotune.patience import Patience
from autotune.results import Decision, StudyResult, Subject, TrialRecord
from autotune.space import Space, Value
from hardware.files import UserError, build

optuna.logging.set_verbosity(optuna.logging.ERROR)  # its log is neither our result nor our progress
logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)  # tracebacks of connections that a restart has cut
STUDY_FILE = "study.db"
CLAIMS = "ridgepoint_claims"  # the table of `autotune.claims`, beside Optuna's
HEARTBEAT = "RIDGEPOINT_HEARTBEAT_SECONDS"
HEARTBEAT_SECONDS = 10
GRACE_HEARTBEATS = 4  # a trial that was not heard of for so many is lost
_DRIVER = "postgresql+psycopg"
_WRITTEN_ONCE = ("subject", "tiling_subject", "tilings")  # what a study is about: that of the first of many workers
_CREATING = 7_120_706  # any number, the same for all: PostgreSQL's lock under which tables are made
# A server that vanished without a word is noticed within half a minute, not after hours.
_ALIVE = {"connect_timeout": 10, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}


# --- URLs, and what may be printed of them


def storage_url(text: str | Path) -> str:
    """The URL of a storage given as one, as a folder that holds study.db, or as a SQLite file."""
    if "://" in str(text):
        return str(text)
    path = Path(text)
    if path.suffix != ".db":
        path = path / STUDY_FILE
    return URL.create("sqlite", database=str(path)).render_as_string()


def shown(url: str) -> str:
    """The URL without its password, fit to be printed or recorded."""
    with database_errors(url):
        return hide_passwords(_parsed(url).render_as_string(hide_password=True))


def hide_passwords(words: str) -> str:
    """A text, such as a command line, without the passwords of the URLs in it."""
    words = re.sub(r"(://[^:/?#\s]*):.*@", r"\1:***@", words, flags=re.DOTALL)  # it may hold / and blanks, unquoted
    return re.sub(r"([?&]\w*password=)[^&\s]*", r"\1***", words)


def single_worker(url: str) -> bool:
    """Whether the storage is SQLite, which serves one worker: trials that run while none does were lost."""
    with database_errors(url):
        return _parsed(url).get_backend_name() == "sqlite"


def sqlite_file(url: str) -> Path | None:
    """The file of a SQLite storage; None for a database, and in memory."""
    name = _parsed(url).database if single_worker(url) else None
    return None if not name or name == ":memory:" else Path(name)


def _parsed(url: str) -> URL:
    """The parts of a URL. An @ that is not %40 would put half the password into the host's name."""
    try:
        parsed = make_url(url)
    except ValueError as error:  # a port that is no number
        raise ArgumentError("no URL") from error
    if parsed.get_backend_name() not in ("sqlite", "postgresql", "postgres"):
        raise UserError(f"a storage must be SQLite or PostgreSQL, but its URL begins with {parsed.drivername!r}")
    if parsed.host and "@" in parsed.host:
        raise UserError("an @ in a storage URL's password must be written %40")
    return parsed


def _driven(parsed: URL) -> URL:
    """The same with the driver for PostgreSQL that the extra installs, where none is named."""
    return parsed.set(drivername=_DRIVER) if parsed.drivername in ("postgresql", "postgres") else parsed


@contextmanager
def database_errors(url: str) -> Iterator[None]:
    """Turn what a database can do wrong (not there, corrupt, full, no driver) into a UserError of one line."""
    try:
        with unmasked():
            yield
    except ArgumentError as error:
        raise UserError(
            "a storage must be a URL such as sqlite:///FILE or postgresql://HOST/DATABASE, but could not be read as one"
        ) from error
    except ImportError as error:
        name = _driven(_parsed(url)).drivername
        remedy = "pip install 'ridgepoint[postgres]'" if name == _DRIVER else str(error)
        raise UserError(f"the database driver of {name} is not installed: {remedy}") from error
    except (SQLAlchemyError, StorageInternalError) as error:
        cause = error.__cause__ if isinstance(error, StorageInternalError) else error
        reason = " ".join(str(getattr(cause, "orig", None) or cause or error).split())
        if "disk is full" in reason or "No space left" in reason:
            reason += "; free some space, then the same command continues"
        raise UserError(f"cannot use the study storage {shown(url)}: {reason}") from error


# --- connections


def connect(url: str) -> Engine:
    """The database of a storage."""
    return _engine(_parsed(url))


def _engine(parsed: URL) -> Engine:
    driven = _driven(parsed)
    return create_engine(driven, **_engine_options(driven))


def _engine_options(parsed: URL) -> dict[str, Any]:
    if parsed.drivername != _DRIVER:
        return {}
    arguments = {k: v for k, v in _ALIVE.items() if k not in parsed.query}
    return {"pool_pre_ping": True, "connect_args": arguments}


@contextmanager
def creating(engine: Engine) -> Iterator[None]:
    """Make tables, one worker after the other: two at once would both find none and both make them."""
    if engine.dialect.name != "postgresql":
        yield
        return
    with engine.connect() as connection:
        connection.execute(text(f"SELECT pg_advisory_lock({_CREATING})"))
        try:
            yield
        finally:
            connection.execute(text(f"SELECT pg_advisory_unlock({_CREATING})"))


class SharedStorage(RDBStorage):
    """A database that many workers share: patient, and sure about who is lost.

    Every call waits for a database that is away (`Patience`). All of them bear being run twice: what they set is the
    same again, and a trial that was created twice has no heartbeat, so that it is given up like a lost one.
    """

    def __init__(self, url: str, heartbeat_seconds: int, patience: Patience, *, create: bool) -> None:
        self.patience = patience
        parsed = _driven(_parsed(url))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            super().__init__(
                _template(parsed),
                _engine_options(parsed),
                heartbeat_interval=heartbeat_seconds,
                grace_period=GRACE_HEARTBEATS * heartbeat_seconds,
                heartbeat_stale_trial_callback=retry,
                skip_table_creation=not create,
            )
        # Heartbeats are local times: without this they jump when summer time begins, and every trial seems lost.
        event.listen(self.engine, "connect", _speak_utc)
        self.engine.dispose()

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        """Set an attribute. What a study is about stays as it is: who comes second must find that it differs."""
        if key not in _WRITTEN_ONCE or key not in self.get_study_user_attrs(study_id):
            super().set_study_user_attr(study_id, key, value)  # of two at once the database takes the first

    def record_heartbeat(self, trial_id: int) -> None:
        """One heartbeat. A lost one is no failure: the next follows, and the trial itself waits for the database."""
        with suppress(SQLAlchemyError, StorageInternalError):
            super().record_heartbeat(trial_id)

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        """Trials whose worker was not heard of for the grace period.

        A worker that has only just reached the database, for the first time or again, cannot tell: the others may
        have been cut off as it was, and get the same period to be heard again. A trial whose worker was killed before
        its first heartbeat gets that from whoever sees it.
        """
        first: Callable[[], None] = functools.partial(self._first_heartbeats, study_id)
        self.patience.run(first)
        if self.grace_period is not None and time.monotonic() - self.patience.reached < self.grace_period:
            return []
        return self.patience.run(lambda: super(SharedStorage, self)._get_stale_trial_ids(study_id))

    def _first_heartbeats(self, study_id: int) -> None:
        with self.engine.begin() as connection:
            connection.execute(
                text(
                    "INSERT INTO trial_heartbeats (trial_id, heartbeat) SELECT trial_id, CURRENT_TIMESTAMP FROM trials"
                    " WHERE study_id = :study AND state = 'RUNNING'"
                    " AND trial_id NOT IN (SELECT trial_id FROM trial_heartbeats) ON CONFLICT DO NOTHING"
                ),
                {"study": study_id},
            )


# What Optuna calls of a storage (through its cache), but for heartbeats, which must not wait.
PATIENT = (
    "_create_new_trial _get_best_trial_id _get_trials _set_trial_param create_new_study delete_study get_all_studies"
    " get_study_directions get_study_id_from_name get_study_name_from_id get_study_system_attrs get_study_user_attrs"
    " get_trial get_trial_id_from_study_id_trial_number set_study_system_attr set_study_user_attr"
    " set_trial_intermediate_value set_trial_state_values set_trial_system_attr set_trial_user_attr"
).split()


def _patient(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: SharedStorage, *args: Any, **options: Any) -> Any:
        return self.patience.run(lambda: method(self, *args, **options))

    return call


for _name in PATIENT:
    setattr(SharedStorage, _name, _patient(getattr(SharedStorage, _name)))


def _speak_utc(connection: Any, _: object) -> None:
    connection.execute("SET TIME ZONE 'UTC'")
    connection.commit()


def _template(parsed: URL) -> str:
    """The URL as Optuna wants it, which fills braces in."""
    return parsed.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")


def heartbeat_seconds() -> int:
    """Seconds between the heartbeats of a trial: 10, or RIDGEPOINT_HEARTBEAT_SECONDS (the same for all workers)."""
    found = os.environ.get(HEARTBEAT, str(HEARTBEAT_SECONDS))
    if not found.isdecimal() or int(found) < 1:
        raise UserError(f"{HEARTBEAT} must be whole seconds >= 1, but is {found!r}")
    return int(found)


def open_storage(url: str, *, create: bool) -> RDBStorage:
    """Connect. UserError where nothing is there and `create` is off, and for what is no study storage.

    Nothing is written into a damaged file, or into the database of another program. With `create` (a worker) a database
    that is away is waited for; without it, a SQLite file is only read.
    """
    with database_errors(url):
        patience = Patience(shown(url), *() if create else (0.0,))
        return patience.run(lambda: _open(url, patience, create=create))


def _open(url: str, patience: Patience, *, create: bool) -> RDBStorage:
    parsed = _parsed(url)
    path = Path(parsed.database) if single_worker(url) and parsed.database else None
    if path and not create and (not path.is_file() or not path.stat().st_size):
        raise UserError(f"there is no study at {path}; `ridgepoint tune` makes one")
    if path and not create:
        parsed = _read_only(parsed, path)
    engine = _engine(parsed)
    try:
        with creating(engine):
            complete = has_studies(engine, url)
            if not complete and not create:
                raise UserError(f"{shown(url)} holds no study of `ridgepoint tune`")
            if path:
                return RDBStorage(_template(parsed), skip_table_creation=complete)
            return SharedStorage(url, heartbeat_seconds(), patience, create=not complete)
    except RuntimeError as error:  # another version's tables
        raise UserError(f"cannot use the study storage {shown(url)}: {error}") from error
    finally:
        engine.dispose()


def _read_only(parsed: URL, path: Path) -> URL:
    """The URL by which SQLite only reads a file. What a killed worker left half written is taken back first."""
    if path.with_name(f"{path.name}-journal").exists():
        return parsed
    return parsed.set(database=path.resolve().as_uri(), query={**parsed.query, "mode": "ro", "uri": "true"})


def has_studies(engine: Engine, url: str) -> bool:
    """Whether a whole study storage is there; False for none, or a part of one. UserError for anything else."""
    with engine.connect() as connection:
        tables = set(inspect(connection).get_table_names())
        if engine.dialect.name == "sqlite" and tables:
            found = " ".join(str(connection.execute(text("PRAGMA quick_check(1)")).scalar()).split())
            if found != "ok":
                raise UserError(f"cannot use the study storage {shown(url)}: it is damaged: {found}")
    complete = {"studies", "trials", "version_info", "alembic_version"} <= tables
    foreign = sorted(tables - {*BaseModel.metadata.tables, "alembic_version", CLAIMS})
    if foreign and not complete:
        raise UserError(
            f"a storage must be an empty database or hold studies, but {shown(url)} holds another program's tables "
            f"({', '.join(foreign[:3])})"
        )
    return complete


# --- studies as plain data
def read_study(study: optuna.Study, known: dict[int, TrialRecord] | None = None) -> StudyResult:
    """A study as plain data. UserError for one that this program did not make, and for a damaged record.

    known: finished trials of an earlier reading, which change no more; filled with those read now.
    A trial whose worker has not drawn all parameters yet is read without any.
    """
    attributes = study.user_attrs
    where = f"study {study.study_name!r}"
    if "subject" not in attributes:
        raise UserError(f"{where} was not made by `ridgepoint tune`")
    subject = build(Subject, attributes["subject"], where)
    known = {} if known is None else known
    for trial in study.get_trials(deepcopy=False):
        if trial.number not in known or not known[trial.number].outcome:
            known[trial.number] = drawn_record(read_trial(trial, study.study_name), subject.space)
    decision = attributes.get("decision")
    return StudyResult(
        study.study_name,
        subject,
        tuple(record for _, record in sorted(known.items())),
        build(Decision, decision, where) if decision else None,
    )


def drawn_record(record: TrialRecord, space: Space) -> TrialRecord:
    """A trial without any parameters, if its worker has not drawn all of them yet."""
    drawn = record.outcome or _is_setting(record.params, space)
    return record if drawn else dataclasses.replace(record, params={})


def _is_setting(params: dict[str, Value], space: Space) -> bool:
    try:
        space.candidate(params)
    except (KeyError, UserError):
        return False
    return True


def read_trial(trial: optuna.trial.FrozenTrial, study_name: str) -> TrialRecord:
    """A trial as plain data: its findings are stored by stage, and all stages' names are the record's."""
    return record_of(trial.number, trial.user_attrs, trial.params, study_name)


def record_of(number: int, attributes: Mapping[str, Any], params: Mapping[str, Value], study_name: str) -> TrialRecord:
    """The same of a trial's parts."""
    names = {f.name for f in dataclasses.fields(TrialRecord)}
    parts = [part for part in attributes.values() if isinstance(part, dict)]
    found: dict[str, Any] = {k: v for part in parts for k, v in part.items() if k in names}
    found |= {"number": number, "params": params}
    return build(TrialRecord, found, f"study {study_name!r} trial {number}")


def read_studies(text: str | Path, *, least: int = 1) -> list[StudyResult]:
    """Every study of a storage (URL, folder or file), by batch and context. UserError for fewer than `least`."""
    url = storage_url(text)
    with database_errors(url):
        storage = open_storage(url, create=False)
        names = sorted(optuna.get_all_study_names(storage))
        studies = [optuna.load_study(study_name=name, storage=storage) for name in names]
        ours = [read_study(study) for study in studies if "subject" in study.user_attrs]
    if len(ours) < least:
        raise UserError(f"{shown(url)} holds no study of `ridgepoint tune`")
    return sorted(ours, key=lambda s: (s.subject.model, s.subject.workload.batch, s.subject.context or 0))
