"""Where studies are kept: an Optuna storage by URL, read into plain data, its failures turned into one line."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from autotune.results import Decision, StudyResult, Subject, TrialRecord
from hardware.files import UserError, build

optuna.logging.set_verbosity(optuna.logging.ERROR)  # its log is neither our result nor our progress
STUDY_FILE = "study.db"


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
        return make_url(url).render_as_string(hide_password=True)


@contextmanager
def database_errors(url: str) -> Iterator[None]:
    """Turn what a database can do wrong (not there, corrupt, full, no driver) into a UserError of one line."""
    try:
        yield
    except ArgumentError as error:
        raise UserError(
            "a storage must be a URL such as sqlite:///FILE or postgresql://HOST/DATABASE, but could not be read as one"
        ) from error
    except ImportError as error:
        raise UserError(f"the database driver of {make_url(url).drivername} is not installed: {error}") from error
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
        reason = getattr(cause, "orig", None) or cause or error
        raise UserError(f"cannot use the study storage {shown(url)}: {reason}") from error


def single_worker(url: str) -> bool:
    """Whether the storage is SQLite, which serves one worker: trials that run while none does were lost."""
    with database_errors(url):
        return make_url(url).get_backend_name() == "sqlite"


@contextmanager
def sole_worker(url: str) -> Iterator[None]:
    """Refuse a second process that tunes into the same SQLite file: it would also spoil the times of the first."""
    database = make_url(url).database if single_worker(url) else None
    if not database or database == ":memory:":
        yield
        return
    import fcntl

    lock = Path(f"{database}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        stream = lock.open("a")
    except OSError as error:
        raise UserError(f"cannot write {lock}: {error.strerror or error}") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process is tuning into {shown(url)}: SQLite serves one worker") from error
        yield


def open_storage(url: str, *, create: bool) -> RDBStorage:
    """Connect. UserError where nothing is there and `create` is off, and for what is no study storage."""
    with database_errors(url):
        parsed = make_url(url)
        if single_worker(url) and parsed.database and not create:
            path = Path(parsed.database)
            if not path.is_file() or not path.stat().st_size:
                raise UserError(f"there is no study at {path}; `ridgepoint tune` makes one")
        try:
            return RDBStorage(url)
        except RuntimeError as error:  # another version's tables
            raise UserError(f"cannot use the study storage {shown(url)}: {error}") from error


def read_study(study: optuna.Study, known: dict[int, TrialRecord] | None = None) -> StudyResult:
    """A study as plain data. UserError for one that this program did not make, and for a damaged record.

    known: finished trials of an earlier reading, which change no more; filled with those read now.
    """
    attributes = study.user_attrs
    where = f"study {study.study_name!r}"
    if "subject" not in attributes:
        raise UserError(f"{where} was not made by `ridgepoint tune`")
    known = {} if known is None else known
    for trial in study.get_trials(deepcopy=False):
        if trial.number not in known or not known[trial.number].outcome:
            known[trial.number] = read_trial(trial, study.study_name)
    decision = attributes.get("decision")
    return StudyResult(
        study.study_name,
        build(Subject, attributes["subject"], where),
        tuple(record for _, record in sorted(known.items())),
        build(Decision, decision, where) if decision else None,
    )


def read_trial(trial: optuna.trial.FrozenTrial, study_name: str) -> TrialRecord:
    """A trial as plain data: its findings are stored by stage, and all stages' names are the record's."""
    names = {f.name for f in dataclasses.fields(TrialRecord)}
    parts = [part for part in trial.user_attrs.values() if isinstance(part, dict)]
    found: dict[str, Any] = {k: v for part in parts for k, v in part.items() if k in names}
    found |= {"number": trial.number, "params": trial.params}
    return build(TrialRecord, found, f"study {study_name!r} trial {trial.number}")


def read_studies(text: str | Path) -> list[StudyResult]:
    """Every study of a storage (URL, folder or file), by batch. UserError when it holds none."""
    url = storage_url(text)
    with database_errors(url):
        storage = open_storage(url, create=False)
        names = sorted(optuna.get_all_study_names(storage))
        studies = [optuna.load_study(study_name=name, storage=storage) for name in names]
        ours = [read_study(study) for study in studies if "subject" in study.user_attrs]
    if not ours:
        raise UserError(f"{shown(url)} holds no study of `ridgepoint tune`")
    return sorted(ours, key=lambda s: (s.subject.model, s.subject.workload.batch))
